"""Each RoI extractor of a config: it is the one that the model runs, it trains, and nothing waits for the host."""

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

import tmask
from tests.model.conftest import SMALL
from tests.model.sync import count_blocking
from tmask.structures import Detections, ImageBatch, Targets
from tmask_kernels import multiscale_roi_align, use_backend
from tmask_kernels.testing import random_boxes

SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]

# Settings of the config, and what `multiscale_roi_align` is called with for the same; None for RoIPool.
EXTRACTORS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "default": ({}, {"sampling_ratio": 0}),
    "fixed ratio": ({"sampling_ratio": 2}, {"sampling_ratio": 2}),
    "unaligned": ({"aligned": False}, {"sampling_ratio": 0, "aligned": False}),
    "bicubic": ({"interpolation": "bicubic"}, {"sampling_ratio": 0, "interpolation": "bicubic"}),
    "max": ({"reduction": "max", "sampling_ratio": 2}, {"reduction": "max", "sampling_ratio": 2}),
    "roi_pool": ({"op": "roi_pool"}, None),
}


def model_of(name: str, **settings: Any) -> tmask.MaskRCNN:
    torch.manual_seed(0)
    return tmask.build_model("tiny", num_classes=4, roi_extractor=EXTRACTORS[name][0], **SMALL, **settings)


def pooled_by_hand(name: str, features: list[Tensor], boxes: Tensor, valid: Tensor, size: int) -> Tensor:
    """By a direct call of the op; RoIPool by torchvision's, a box at a time from the level of the formula."""
    options = EXTRACTORS[name][1]
    if options is not None:
        return multiscale_roi_align(features, boxes, size, SCALES, valid=valid, **options)
    mapper = torchvision.ops.poolers.initLevelMapper(2, 5, eps=0)
    rows = []
    for image, (own, real) in enumerate(zip(boxes, valid, strict=True)):
        for box, is_real in zip(own, real, strict=True):
            level = int(mapper([box[None]]))
            roi = torch.cat([torch.tensor([[float(image)]]), box[None]], 1)
            row = torchvision.ops.roi_pool(features[level], roi, size, SCALES[level])
            rows.append(row if is_real else torch.zeros_like(row))
    return torch.cat(rows)


@pytest.mark.parametrize("name", EXTRACTORS)
def test_extractor_is_the_op_of_the_config(name: str) -> None:
    sides = (160, 80, 40, 20)
    features = [torch.randn(2, 3, side, side, requires_grad=True) for side in sides]
    boxes = torch.cat([random_boxes(8, height=640, width=640, min_size=s, seed=s).view(2, 4, 4) for s in (4, 60)], 1)
    boxes[0, 0] = torch.tensor([3.0, 5.0, 630.0, 600.0])  # of the coarsest level
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[1, 5:] = False
    out = model_of(name).roi_heads.extractor(features, boxes, valid, 3)
    expected = pooled_by_hand(name, features, boxes, valid, 3)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    assert not out.view(2, 8, -1)[1, 5:].any()
    upstream = torch.randn(out.shape)
    for got, want in zip(
        torch.autograd.grad(out, features, upstream), torch.autograd.grad(expected, features, upstream), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert got.any()
    if name != "default":
        assert not torch.allclose(out, pooled_by_hand("default", features, boxes, valid, 3), atol=1e-2)


@pytest.mark.parametrize("name", EXTRACTORS)
def test_both_heads_get_what_the_extractor_reads(name: str, batch: tuple[ImageBatch, Targets]) -> None:
    model, seen = model_of(name).eval(), {}
    parts = {"fpn": model.fpn, "rpn": model.rpn, "box": model.roi_heads.box_head, "mask": model.roi_heads.mask_head}
    for part, module in parts.items():
        module.register_forward_hook(lambda _, inputs, output, part=part: seen.update({part: (inputs, output)}))
    with torch.no_grad():
        found = model.forward_padded(batch[0])
    assert isinstance(found, Detections)
    features, (proposals, _) = list(seen["fpn"][1])[:-1], seen["rpn"][1]
    expected = pooled_by_hand(name, features, proposals.boxes, proposals.valid(), 7)
    torch.testing.assert_close(seen["box"][0][0], expected, rtol=1e-5, atol=1e-5)
    real = torch.arange(found.boxes.shape[1]) < found.counts[:, None]
    expected = pooled_by_hand(name, features, found.boxes, real, 14)
    torch.testing.assert_close(seen["mask"][0][0], expected, rtol=1e-5, atol=1e-5)
    assert found.counts.sum() > 0


@pytest.mark.parametrize("name", ["bicubic", "max", "roi_pool"])
def test_every_extractor_trains_without_waiting(name: str, batch: tuple[ImageBatch, Targets]) -> None:
    model = model_of(name)
    with use_backend("reference"), count_blocking() as found:
        losses = model.forward_padded(*batch)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[union-attr]
        with torch.no_grad():
            model.eval().forward_padded(batch[0])
    assert not found
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    for part in (model.backbone, model.fpn, model.roi_heads.box_head, model.roi_heads.mask_head):
        assert all(p.grad.any() for p in part.parameters() if p.dim() > 1)


def test_convention_decides_what_is_not_set() -> None:
    for convention, expected in (("detectron2", (True, 0)), ("torchvision", (False, 2))):
        extractor = model_of("bicubic", convention=convention).roi_heads.extractor
        assert (extractor.aligned, extractor.sampling_ratio) == expected
        assert extractor.level_convention == convention
    extractor = model_of("unaligned", convention="detectron2").roi_heads.extractor
    assert (extractor.aligned, extractor.sampling_ratio) == (False, 0)
