"""RoIAlign's gradient to the boxes: kinks, what is kept and computed.

What it has in common with the gradient to the features is in test_rois.py, its mutants in test_roi_mutants.py.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.rois import KINDS, check, odd_boxes
from tmask_kernels import roi_align
from tmask_kernels.ops.roi_align.kernels import backward as kernels_backward
from tmask_kernels.ops.roi_align.kernels import forward as kernels

BOXES = KINDS["boxes"]


@pytest.mark.parametrize("name", ["boxes", "boxes-bicubic"])
def test_kinks_are_those_of_the_reference(name: str, device: torch.device) -> None:
    """Samples on cells and on and around both borders, exactly: an aligned box of no size is a point."""
    H, W = 4, 5
    ys = [-1.5, -1.0, -0.5, 0.0, 1.0, 1.5, 2.0, H - 1.0, H - 0.5, float(H), H + 0.5]
    xs = [1.5, 0.0, W - 1.0, 2.0, -0.5, W - 0.5, -1.0, float(W), 1.0, 0.5, 2.5]
    points = torch.tensor([xs, ys], device=device).T + 0.5
    points = torch.cat([points, points.new_tensor([[0.25, 1.25], [W + 0.25, 2.25]])])  # one free axis each
    boxes = torch.cat([points, points], 1)[None].requires_grad_()
    features = [torch.randn(1, 3, H, W, device=device, requires_grad=True)]
    *_, gradient = check(KINDS[name], features, boxes, 1, grid=(1, True), scale=1.0)[1]
    assert gradient[0, 3].any(), "on the first cell the slope is that of the inside"
    assert not gradient[0, 0].any()
    assert gradient[0, -2:].ne(0).tolist() == [[False, True, False, True]] * 2


@pytest.mark.parametrize("sampling_ratio", [0, 2], ids=["adaptive", "fixed"])
def test_short_boxes_that_are_not_aligned(sampling_ratio: int, device: torch.device) -> None:
    """A box of less than a cell is a cell long wherever it ends: all moves with the start. One of a cell is free."""
    rows = [[1.3, 2.1, 1.9, 4.7], [2.2, 1.4, 4.9, 1.6], [3.7, 2.6, 3.1, 2.5], [1.25, 2.5, 2.25, 3.5]]
    boxes = torch.tensor([rows], device=device, requires_grad=True)
    features = [torch.randn(1, 3, 7, 8, device=device, requires_grad=True)]
    *_, gradient = check(BOXES, features, boxes, 2, grid=(sampling_ratio, False), scale=1.0)[1]
    both_short = [True, True, False, False]
    assert gradient[0].ne(0).tolist() == [[True, True, False, True], [True, True, True, False], both_short, [True] * 4]


def test_boxes_that_are_not_finite_take_no_gradient_of_nan(device: torch.device) -> None:
    boxes = odd_boxes(device)[None, -3:].requires_grad_()
    out = BOXES.pool(BOXES.maps(device, images=1), boxes, 1, backend="triton")
    assert not torch.autograd.grad(out, boxes, torch.full_like(out, math.nan))[0].any()


def test_features_are_kept_only_for_the_boxes(device: torch.device) -> None:
    features, boxes = BOXES.maps(device), BOXES.boxes(device, 1)
    for needed in (False, True):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # noqa: B023
            BOXES.pool(features, boxes.detach().requires_grad_(needed), 2, backend="triton")
        assert [x.shape for x in kept if x.dim() == 4] == [f.shape for f in features if needed]


@pytest.mark.parametrize("needed", ["features", "boxes"])
def test_only_what_is_needed_is_computed(needed: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("not needed")

    if needed == "boxes":
        monkeypatch.setattr(kernels_backward, "multiscale_roi_align_backward", refuse)
    else:
        monkeypatch.setattr(kernels, "multiscale_roi_align_backward_boxes", refuse)
    feature = torch.randn(1, 2, 5, 5, device=device, requires_grad=needed == "features")
    boxes = torch.tensor([[[1.2, 1.3, 3.4, 4.2]]], device=device, requires_grad=needed == "boxes")
    out = roi_align(feature, boxes, 1, backend="triton")
    assert torch.autograd.grad(out.sum(), boxes if needed == "boxes" else feature)[0].any()
