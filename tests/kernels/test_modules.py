"""RoIAlign, MultiScaleRoIAlign and RoIPool against torchvision's modules, alone and inside its Mask R-CNN."""

import copy
import inspect
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn

import tmask_kernels
from tmask_kernels import MultiScaleRoIAlign, RoIAlign, RoIPool, multiscale_roi_align, roi_align, roi_pool
from tmask_kernels.testing import assert_close, random_boxes

NAMES = ["0", "1", "2", "3"]
PAGE = Path(__file__).parents[2] / "docs" / "torchvision.md"


def compare(ours: Any, theirs: Any, features: list[Tensor], call: Any) -> Tensor:
    """Compare the output and the gradient of the features; returns the output."""
    results = []
    for module in (ours, theirs):
        leaves = [feature.clone().requires_grad_() for feature in features]
        out = call(module, leaves)
        weight = torch.linspace(0.5, 1.5, out.numel(), device=out.device).reshape(out.shape)
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves, materialize_grads=True)])
    for got, want in zip(*results, strict=True):
        assert_close(got, want)
    return results[0][0]


@pytest.mark.parametrize("name", ["RoIAlign", "RoIPool", "MultiScaleRoIAlign"])
def test_constructors_take_what_torchvision_takes(name: str) -> None:
    ours, theirs = getattr(tmask_kernels, name), getattr(torchvision.ops, name)
    expected = inspect.signature(theirs.__init__).parameters
    got = inspect.signature(ours.__init__).parameters
    assert list(got)[: len(expected)] == list(expected)
    for parameter in expected.values():
        assert (got[parameter.name].kind, got[parameter.name].default) == (parameter.kind, parameter.default)
    assert all(got[extra].kind is inspect.Parameter.KEYWORD_ONLY for extra in set(got) - set(expected))
    assert list(inspect.signature(ours.forward).parameters) == list(inspect.signature(theirs.forward).parameters)
    assert issubclass(ours, theirs)


def test_attributes_and_reprs_are_torchvisions() -> None:
    for ours, theirs in [
        (RoIAlign((3, 5), 0.25, 2), torchvision.ops.RoIAlign((3, 5), 0.25, 2)),
        (RoIPool([3, 5], 0.25), torchvision.ops.RoIPool([3, 5], 0.25)),
        (MultiScaleRoIAlign(NAMES, 7, 2), torchvision.ops.MultiScaleRoIAlign(NAMES, 7, 2)),
    ]:
        assert repr(ours) == repr(theirs)
        assert {name: getattr(ours, name) for name in vars(theirs)} == vars(theirs)
    ours = RoIAlign(7, 0.25, 2, True, interpolation="bicubic", cubic_coeff=-0.75, backend="reference")
    assert repr(ours) == (
        "RoIAlign(output_size=7, spatial_scale=0.25, sampling_ratio=2, aligned=True, interpolation='bicubic', "
        "cubic_coeff=-0.75, backend='reference')"
    )
    assert repr(MultiScaleRoIAlign(["0"], 7, 2, aligned=True)) == (
        "MultiScaleRoIAlign(featmap_names=['0'], output_size=(7, 7), sampling_ratio=2, aligned=True)"
    )


def pyramid(levels: int = 4, device: Any = "cpu") -> dict[str, Tensor]:
    """Levels of strides 4, 8... of two images of 64 x 96, and one that no pool asks for."""
    generator = torch.Generator().manual_seed(0)
    maps = {str(i): torch.randn(2, 3, 16 >> i, 24 >> i, generator=generator).to(device) for i in range(levels)}
    return maps | {"pool": torch.zeros(2, 3, 1, 1, device=device)}


def some_boxes(*counts: int, device: Any = "cpu", **sizes: Any) -> list[Tensor]:
    sizes = {"height": 64, "width": 96, "min_size": 6} | sizes
    return [random_boxes(count, **sizes, seed=i, device=device) for i, count in enumerate(counts)]


@pytest.mark.parametrize(
    ("levels", "sizes", "counts"),
    [
        (4, [(64, 96), (64, 96)], (9, 7)),
        (4, [(32, 48), (64, 80)], (6, 0)),  # half-size image, empty image
        (1, [(64, 96), (60, 90)], (3, 4)),
        (2, [(64, 96), (64, 96)], (0, 0)),
    ],
    ids=["pyramid", "half-size and empty images", "one level", "no boxes"],
)
def test_multi_scale_equals_torchvision(
    levels: int, sizes: list[tuple[int, int]], counts: tuple[int, int], device: torch.device
) -> None:
    features = pyramid(levels, device)
    boxes = some_boxes(*counts, device=device, min_size=2, width=min(w for _, w in sizes))
    options: dict[str, Any] = {"canonical_scale": 32, "canonical_level": 4}
    ours = MultiScaleRoIAlign(NAMES[:levels], (2, 3), 2, **options)
    theirs = torchvision.ops.MultiScaleRoIAlign(NAMES[:levels], (2, 3), 2, **options)

    def call(module: Any, leaves: list[Tensor]) -> Tensor:
        return module(dict(zip(features, leaves, strict=True)), boxes, sizes)

    out = compare(ours, theirs, list(features.values()), call)
    assert ours.scales == theirs.scales == [2.0 ** -(2 + k) for k in range(levels)]
    assert bool(out.any()) == bool(sum(counts))
    sizes = [(8, 8), (8, 8)]  # the scales of the first call stay, as torchvision's do
    compare(ours, theirs, list(features.values()), call)


def test_boxes_at_a_boundary_take_torchvisions_level(device: torch.device) -> None:
    """A box just under 32 px stands on the coarser level only by torchvision's epsilon."""
    features = {"0": torch.zeros(1, 1, 16, 16, device=device), "1": torch.ones(1, 1, 8, 8, device=device)}
    box = [torch.tensor([[0.0, 0.0, 32 * (1 - 3e-7), 32.0]], device=device)]
    theirs = torchvision.ops.MultiScaleRoIAlign(["0", "1"], 1, 2, canonical_scale=64)(features, box, [(64, 64)])
    for convention, expected in (("torchvision", 1.0), ("detectron2", 0.0)):
        pool = MultiScaleRoIAlign(["0", "1"], 1, 2, canonical_scale=64, level_convention=convention)
        assert pool(features, box, [(64, 64)]).item() == expected
        assert convention == "detectron2" or theirs.item() == expected


def test_options_of_ours_reach_the_op(device: torch.device) -> None:
    features, boxes = pyramid(2, device), some_boxes(4, 4, device=device)
    maps = [features["0"], features["1"]]
    ours = {"interpolation": "bicubic", "cubic_coeff": -0.75, "backend": "reference"}
    expected = roi_align(maps[0], boxes, 2, 0.25, 2, True, **ours)  # type: ignore[arg-type]
    assert torch.equal(RoIAlign(2, 0.25, 2, True, **ours)(maps[0], boxes), expected)
    pool = MultiScaleRoIAlign(["0", "1"], 2, 0, canonical_scale=64, aligned=True, level_convention="detectron2", **ours)
    expected = multiscale_roi_align(
        maps, boxes, 2, [0.25, 0.125], sampling_ratio=0, canonical_scale=64, **ours  # type: ignore[arg-type]
    )  # fmt: skip
    assert torch.equal(pool(features, boxes, [(64, 96)] * 2), expected)
    pooled = RoIPool(2, 0.25, backend="reference")(maps[0], boxes)
    assert torch.equal(pooled, roi_pool(maps[0], boxes, 2, 0.25, backend="reference"))
    for module in (RoIAlign(2, 0.25, 2, backend="no"), RoIPool(2, 0.25, backend="no")):
        with pytest.raises(ValueError, match="backend: expected one of"):
            module(maps[0], boxes)


def test_maps_of_one_scale_at_the_end() -> None:
    """As in torchvision's MobileNet detectors, where names are missing too: the first of them is used."""
    features = {"0": torch.randn(1, 2, 4, 6), "1": torch.randn(1, 2, 4, 6), "pool": torch.randn(1, 2, 2, 3)}
    boxes, sizes = some_boxes(5, height=128, width=192), [(128, 192)]
    ours, theirs = MultiScaleRoIAlign(NAMES, 2, 2), torchvision.ops.MultiScaleRoIAlign(NAMES, 2, 2)

    def call(module: Any, leaves: list[Tensor]) -> Tensor:
        return module(dict(zip(features, leaves, strict=True)), boxes, sizes)

    compare(ours, theirs, list(features.values()), call)
    assert ours.scales == theirs.scales == [1 / 32, 1 / 32]


def test_levels_that_are_not_each_half_the_one_before_are_refused() -> None:
    with pytest.raises(ValueError, match="expected each half the one before"):
        MultiScaleRoIAlign(["0", "2"], 2, 2)(pyramid(), [torch.zeros(1, 4), torch.zeros(0, 4)], [(64, 96)])


def test_copies_pickles_and_state_dicts() -> None:
    features, boxes = pyramid(), some_boxes(4, 4)
    pool = MultiScaleRoIAlign(NAMES, 2, 2, interpolation="bicubic")
    expected = pool(features, boxes, [(64, 96)] * 2)
    for again in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        assert again.scales == pool.scales
        assert repr(again) == repr(pool)
        assert torch.equal(again(features, boxes, [(64, 96)] * 2), expected)
    for module in (pool, RoIAlign(2, 0.25, 2), RoIPool(2, 0.25)):
        assert module.state_dict() == {}
        torchvision.ops.RoIAlign(2, 0.25, 2).load_state_dict(module.state_dict())
        assert repr(pickle.loads(pickle.dumps(module))) == repr(module)


@pytest.mark.slow
def test_modules_trace() -> None:
    features, boxes = pyramid(), some_boxes(4, 4)
    pool = MultiScaleRoIAlign(NAMES, 2, 2)
    compiled = torch.compile(copy.deepcopy(pool), fullgraph=True, backend="eager")
    expected = pool(features, boxes, [(64, 96)] * 2)
    assert_close(compiled(features, boxes, [(64, 96)] * 2), expected)


def test_torchvision_model_with_our_modules_detects_the_same() -> None:
    """Swapped in a model that exists, and given to the constructor, which checks their type."""
    settings = {"min_size": 96, "max_size": 128, "box_score_thresh": 0.0}
    settings |= {"rpn_post_nms_top_n_test": 40, "box_detections_per_img": 12}
    model: Any = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, **settings).eval()
    images = [torch.rand(3, 90, 121), torch.rand(3, 101, 77)]
    heads = model.roi_heads
    with torch.no_grad():
        expected = model(images)
        # What docs/torchvision.md tells to type, on this model.
        (snippet,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
        exec(re.sub(r"^model = .*$", "", snippet, flags=re.MULTILINE), {"model": model})
        assert isinstance(heads.box_roi_pool, MultiScaleRoIAlign)
        assert isinstance(heads.mask_roi_pool, MultiScaleRoIAlign)
        found = model(images)
        parts = {name: getattr(heads, name) for name in ("box_head", "box_predictor", "mask_head", "mask_predictor")}
        pools = {
            "box_roi_pool": MultiScaleRoIAlign(NAMES, output_size=7, sampling_ratio=2, interpolation="bicubic"),
            "mask_roi_pool": heads.mask_roi_pool,
        }
        built = MaskRCNN(model.backbone, **settings, **parts, **pools).eval()  # type: ignore[arg-type]
        built.rpn.load_state_dict(model.rpn.state_dict())
        cubic = built(images)
    for got, want, other in zip(found, expected, cubic, strict=True):
        assert len(want["scores"]) == 12
        assert torch.equal(got["labels"], want["labels"])
        for name in ("boxes", "scores", "masks"):
            torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5)
        assert not torch.equal(other["scores"], want["scores"])


def test_a_wrong_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'RoIPoll'"):
        _ = tmask_kernels.RoIPoll  # type: ignore[attr-defined]
