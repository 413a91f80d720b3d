"""Every variant of the model learns, never waits for the host, keeps its precision, and compiles whole."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tmask
from tests.model.conftest import (
    FOCAL,
    KEYPOINTS,
    NECKS,
    VARIANTS,
    Batch,
    detected,
    images_and_targets,
    losses_of,
    padded,
    small,
    total,
)
from tests.model.sync import count_blocking
from tmask.structures import Detections
from tmask_kernels import use_backend

LOSSES = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}

SLOW: dict[str, dict[str, Any]] = {
    "transfer of a sigmoid": {"mask_transfer": {}, "losses": FOCAL},
    "c4 with transfer": {**NECKS["c4"], "mask_transfer": {}, "mask_fusion_layers": 1},
    **{f"{neck} of torchvision": {**NECKS[neck], "convention": "torchvision"} for neck in ("c4", "c5")},
}


@pytest.mark.parametrize("variant", [*VARIANTS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_it_learns_at_odd_sizes_and_never_waits(variant: str) -> None:
    """Waits are counted with the reference backend: ``auto`` on a CPU takes torchvision's ragged ops."""
    model = small(**(VARIANTS | SLOW)[variant], size_divisible=1)
    batch = padded(model)
    assert all(side % 32 for side in batch[0].tensor.shape[-2:])
    with use_backend("reference"), count_blocking() as waits:
        losses = losses_of(model, batch)
        total(losses).backward()
    assert not waits
    assert {(loss.shape, loss.dtype) for loss in losses.values()} == {((), torch.float32)}
    without, added = {"no masks": {"loss_mask"}}, {"keypoints": {"loss_keypoint"}}
    assert losses.keys() == LOSSES - without.get(variant, set()) | added.get(variant, set())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    missing = [name for name, p in trained.items() if not p.grad.any()]
    assert not missing, f"no gradient reaches {missing}"
    totals, optimizer = [], torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        later = total(losses_of(model, batch, compact=True))
        later.backward()
        totals.append(later.item())
    assert totals[-1] < 0.95 * total(losses)
    with use_backend("reference"), count_blocking() as waits:
        found = detected(model, batch)
    # The reference of the decoding of keypoints reads the boxes' sizes; for Triton's see test_sync_free.py.
    assert waits.keys() == ({"Tensor.tolist"} if variant == "keypoints" else set())
    assert found.counts.sum() > 0


COMPACT = ("fpn", "c4", "keypoints", "no masks", "softmax focal", "MLP", "transfer", "roi_pool")


@pytest.mark.parametrize("variant", COMPACT)
def test_dropping_empty_slots_changes_nothing(variant: str) -> None:
    model = small(**VARIANTS[variant])
    batch = padded(model)
    whole, few = (losses_of(copy.deepcopy(model), batch, compact=compact) for compact in (False, True))
    assert whole.keys() == few.keys()
    for name, loss in whole.items():
        torch.testing.assert_close(few[name], loss, msg=name)
    whole, few = (detected(model, batch, compact=compact) for compact in (False, True))
    for name, one, other in zip(Detections._fields, whole, few, strict=True):
        if name == "keypoints" and one is not None:  # the place of a maximum may move where a map is nearly flat
            one, other = one[..., 2], other[..., 2]
        assert one is other is None or torch.testing.assert_close(other, one, msg=name) is None


@pytest.mark.parametrize("variant", ["fpn", "keypoints", "MLP", "softmax focal", "transfer", "max"])
def test_bf16_autocast_keeps_boxes_masks_and_losses_in_fp32(variant: str) -> None:
    model = small(**VARIANTS[variant])
    batch = padded(model)
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(model, batch)
        total(losses).backward()
        found = detected(model, batch)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    values = (found.boxes, found.scores, found.masks, found.keypoints)
    assert {value.dtype for value in values if value is not None} == {torch.float32}
    # Coordinates in bf16 would have 8 bits: almost none of ours may fall on that grid.
    boxes = found.boxes[found.valid()]
    assert (boxes == boxes.bfloat16().float()).float().mean() < 0.3


PRECISE = (
    "fpn",
    "frozen_bn",
    "gn",
    "torchvision's convention",
    "keypoints",
    "c4",
    "sigmoid focal",
    "transfer",
    "roi_pool",
)
# Largest relative error of features and logits: the largest seen were 2e-6, 0.004 and 0.03.
DTYPES = {torch.float64: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.05}


def stages(model: tmask.MaskRCNN, images: Tensor, boxes: Tensor) -> list[Tensor]:
    """Features of padded images, and class logits, deltas and mask logits of the boxes [N, G, 4]."""
    heads, valid = model.roi_heads, torch.ones(boxes.shape[:2], dtype=torch.bool)
    features = model.fpn(list(model.backbone(images).values()))
    masks = heads._predicting(heads.mask_head)(heads.extractor(features, boxes, valid, heads.mask_branch.pool_size))
    return [*features, *heads.box_head(heads.extractor(features, boxes, valid, heads.box_pool_size)), masks]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", PRECISE)
def test_weights_of_another_precision(variant: str, dtype: torch.dtype) -> None:
    """Features and logits are near those in float32; what comes out is float32, losses too."""
    model = small(**VARIANTS[variant]).eval()
    images, targets = images_and_targets(keypoints=variant == "keypoints")
    other = copy.deepcopy(model).to(dtype)
    batch, boxes = model.transform(images)[0], padded(model)[1].boxes
    with torch.no_grad():
        expected, found = model(images), other([image.to(dtype) for image in images])
        expected_stages = stages(model, batch.tensor, boxes)
        for one, two in zip(expected_stages, stages(other, batch.tensor.to(dtype), boxes), strict=True):
            assert two.dtype == dtype
            assert (two.double() - one).norm() <= DTYPES[dtype] * one.double().norm()
    assert_same_results(found, expected, tolerance=1e-3 if dtype == torch.float64 else None)
    losses = [one.train()(images, targets) for one in (model, other)]
    for name, loss in losses[1].items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, losses[0][name], rtol=0.5, atol=0.5)  # each draws a sample of its own
    total(losses[1]).backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in other.parameters() if p.grad is not None)


def assert_same_results(found: Any, expected: Any, tolerance: float | None) -> None:
    """The same types, and with `tolerance` the same values."""
    for one, two in zip(expected, found, strict=True):
        assert {name: value.dtype for name, value in two.items()} == {name: value.dtype for name, value in one.items()}
        for name in one if tolerance else ():
            torch.testing.assert_close(two[name], one[name], rtol=tolerance, atol=tolerance)


def test_a_model_built_in_double_precision() -> None:
    """torch.set_default_dtype(torch.float64) around all of it."""
    model = small(keypoints=KEYPOINTS).double().eval()
    images, targets = images_and_targets(keypoints=True)
    expected = model(images)
    torch.set_default_dtype(torch.float64)
    try:
        built = small(keypoints=KEYPOINTS)
        assert {parameter.dtype for parameter in built.parameters()} == {torch.float64}
        built.load_state_dict(model.state_dict())
        assert_same_results(built.eval()(images), expected, tolerance=1e-5)
        losses = built.train()(images, targets)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", ["backbone.layer2", "fpn", "rpn", "roi_heads.box_head", "roi_heads.mask_head"])
def test_weights_of_several_precisions_are_refused_outside_autocast(
    part: str, dtype: torch.dtype, small_model: tmask.MaskRCNN
) -> None:
    small_model.eval().get_submodule(part).to(dtype)
    images, _ = images_and_targets()
    names = " and ".join(sorted(["float32", str(dtype).removeprefix("torch.")]))
    with pytest.raises(ValueError, match=f"^weights: expected one dtype, got {names}: .*torch.autocast .*--precision"):
        small_model(images)
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype):
            assert len(small_model(images)) == 2


def test_weights_of_half_precision_in_an_autocast_that_refuses_them_are_named(small_model: tmask.MaskRCNN) -> None:
    images, _ = images_and_targets()
    expected = "^weights: expected float32 with torch.autocast, got float16: model.float()"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=expected):
        small_model.eval().half()(images)


# torch.compile takes the padded model whole, forward and backward, and returns the results of eager mode.


def compiled(model: tmask.MaskRCNN, backend: str) -> Callable[..., Any]:
    return torch.compile(model.forward_padded, fullgraph=True, backend=backend, dynamic=False)


@pytest.mark.parametrize(
    "variant", ["keypoints", *(pytest.param(name, marks=pytest.mark.slow) for name in ("c4", "c5", "transfer"))]
)
def test_compiled_inference(variant: str) -> None:
    model = small(**VARIANTS[variant])
    batch = padded(model)
    with torch.no_grad(), use_backend("reference"):
        eager, traced = detected(model, batch), compiled(model, "eager")(batch[0])
    assert eager.counts.sum() > 0
    for name, one, other in zip(Detections._fields, eager, traced, strict=True):
        assert one is other is None or torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5, msg=name) is None


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["keypoints", "sigmoid focal", "softmax focal", "MLP", "transfer"])
def test_compiled_losses_and_gradients(variant: str) -> None:
    model = small(**VARIANTS[variant])
    batch = padded(model)
    with use_backend("reference"):
        eager = step(model, model.forward_padded, batch)
        traced = step(model, compiled(model, "aot_eager"), batch)
    assert traced.keys() == eager.keys()
    for name, value in eager.items():
        torch.testing.assert_close(traced[name], value, rtol=1e-4, atol=1e-6, msg=name)


def step(model: tmask.MaskRCNN, forward: Callable[..., Any], batch: Batch) -> dict[str, Tensor]:
    """Losses and gradients of one random sample. The norms' statistics move, and do not enter."""
    torch.manual_seed(3)
    model.zero_grad()
    losses = forward(*batch)
    total(losses).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {name: loss.detach() for name, loss in losses.items()} | gradients
