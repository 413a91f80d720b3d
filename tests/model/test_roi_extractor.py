"""The model runs the RoI extractor that its config names."""

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

import tmask
from tests.model.conftest import NECKS, assert_same_gradients, small, watched
from tmask_kernels import multiscale_roi_align
from tmask_kernels.testing import random_boxes

SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]

# Settings of the config, and what `multiscale_roi_align` is called with for the same; None for RoIPool. The neck c5 has
# the coarsest level alone.
EXTRACTORS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "default": ({}, {"sampling_ratio": 0}),
    "fixed ratio": ({"sampling_ratio": 2}, {"sampling_ratio": 2}),
    "unaligned": ({"aligned": False}, {"sampling_ratio": 0, "aligned": False}),
    "bicubic": ({"interpolation": "bicubic"}, {"sampling_ratio": 0, "interpolation": "bicubic"}),
    "max": ({"reduction": "max", "sampling_ratio": 2}, {"reduction": "max", "sampling_ratio": 2}),
    "roi_pool": ({"op": "roi_pool"}, None),
    "c5": ({}, {"sampling_ratio": 0}),
    "c5 and roi_pool": ({"op": "roi_pool"}, None),
}


def model_of(name: str) -> tmask.MaskRCNN:
    return small(**NECKS["c5" if "c5" in name else "fpn"], roi_extractor=EXTRACTORS[name][0])


def pooled_by_hand(name: str, features: list[Tensor], boxes: Tensor, valid: Tensor, size: int) -> Tensor:
    """By a direct call of the op; RoIPool by torchvision's, a box at a time from the level of the formula."""
    options, scales = EXTRACTORS[name][1], SCALES[-len(features) :]
    if options is not None:
        return multiscale_roi_align(features, boxes, size, scales, valid=valid, **options)
    mapper = torchvision.ops.poolers.initLevelMapper(2, 5, eps=0)
    rows = []
    for image, (own, real) in enumerate(zip(boxes, valid, strict=True)):
        for box, is_real in zip(own, real, strict=True):
            level = int(mapper([box[None]])) if len(features) > 1 else 0
            roi = torch.cat([torch.tensor([[float(image)]]), box[None]], 1)
            row = torchvision.ops.roi_pool(features[level], roi, size, scales[level])
            rows.append(row if is_real else torch.zeros_like(row))
    return torch.cat(rows)


@pytest.mark.parametrize("name", EXTRACTORS)
def test_extractor_is_the_op_of_the_config(name: str) -> None:
    sides = (20,) if "c5" in name else (160, 80, 40, 20)
    features = [torch.randn(2, 3, side, side, requires_grad=True) for side in sides]
    boxes = torch.cat([random_boxes(8, height=640, width=640, min_size=s, seed=s).view(2, 4, 4) for s in (4, 60)], 1)
    boxes[0, 0] = torch.tensor([3.0, 5.0, 630.0, 600.0])  # of the coarsest level
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[1, 5:] = False
    out = model_of(name).roi_heads.extractor(features, boxes, valid, 3)
    expected = pooled_by_hand(name, features, boxes, valid, 3)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    assert not out.view(2, 8, -1)[1, 5:].any()
    assert all(gradient.any() for gradient in assert_same_gradients(out, expected, features, torch.randn(out.shape)))
    if name not in ("default", "c5"):
        assert not torch.allclose(out, pooled_by_hand("default", features, boxes, valid, 3), atol=1e-2)


@pytest.mark.parametrize("name", EXTRACTORS)
def test_both_heads_get_what_the_extractor_reads(name: str) -> None:
    seen, found = watched(model_of(name))
    features, (proposals, _) = list(seen["fpn"][1])[:4], seen["rpn"][1]
    expected = pooled_by_hand(name, features, proposals.boxes, proposals.valid(), 7)
    torch.testing.assert_close(seen["box"][0][0], expected, rtol=1e-5, atol=1e-5)
    real = torch.arange(found.boxes.shape[1]) < found.counts[:, None]
    expected = pooled_by_hand(name, features, found.boxes, real, 14)
    torch.testing.assert_close(seen["mask"][0][0], expected, rtol=1e-5, atol=1e-5)
    assert found.counts.sum() > 0


def test_convention_decides_what_is_not_set() -> None:
    for convention, own, expected in (
        ("detectron2", {"interpolation": "bicubic"}, (True, 0)),
        ("torchvision", {"interpolation": "bicubic"}, (False, 2)),
        ("detectron2", {"aligned": False}, (False, 0)),
    ):
        extractor = small(convention=convention, roi_extractor=own).roi_heads.extractor
        assert (extractor.aligned, extractor.sampling_ratio) == expected
        assert extractor.level_convention == convention
