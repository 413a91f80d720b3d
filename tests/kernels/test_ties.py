"""Gradients exactly at a bound: ours to define, so the same in every backend and with every version of torch.

`torch.clamp` passed the gradient of a value at its bound before torch 2.14, and stops it since. Here such a gradient
passes; no reference hands one to torch's clamp.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.graph import recorded
from tmask_kernels import decode_boxes, roi_align, sigmoid_focal_loss
from tmask_kernels.common.spec import Inputs, OpSpec, op_specs, roi_inputs
from tmask_kernels.ops.focal_loss.example import focal_inputs


def gradient(of: Callable[[Tensor], Tensor], rows: list[list[float]], weights: list[float], where: Any) -> list[Any]:
    leaf = torch.tensor(rows, device=where, requires_grad=True)
    out = of(leaf)
    (result,) = torch.autograd.grad(out, leaf, torch.tensor(weights, device=where).expand_as(out))
    return result.tolist()


def test_a_scale_at_its_clamp_passes_its_gradient(backend, device):
    """Below the clamp, at it, and one step above."""
    anchors = torch.tensor([[0.0, 0.0, 8.0, 2.0]], device=device)
    clamp, weights = 0.5, (1.0, 1.0, 4.0, 2.0)  # dw is divided by 4, dh by 2
    above = 0.5 + 2**-24
    rows = [[0.0, 0.0, 4 * dw, 2 * dh] for dw, dh in ((0.25, 0.25), (0.5, 0.5), (above, above))]

    def decode(deltas: Tensor) -> Tensor:
        return decode_boxes(deltas, anchors, weights=weights, scale_clamp=clamp, backend=backend)

    got = gradient(decode, rows, [0.0, 0.0, 1.0, 1.0], device)
    below, at = math.exp(0.25) / 2, math.exp(0.5) / 2
    expected = [[8, 2, 8 * below / 4, 2 * below / 2], [8, 2, 8 * at / 4, 2 * at / 2], [8, 2, 0, 0]]
    torch.testing.assert_close(got, [[float(x) for x in row] for row in expected], rtol=1e-5, atol=0)


@pytest.mark.parametrize("image_size", [(6, 10), torch.tensor([[6, 10]])], ids=["tuple", "tensor"])
def test_a_coordinate_on_the_edge_of_the_image_passes_its_gradient(image_size, backend, device):
    """Anchors that are the image, that reach beyond it on the left and top, and on the right and bottom."""
    anchors = torch.tensor([[0.0, 0.0, 10.0, 6.0], [-2.0, -2.0, 8.0, 4.0], [2.0, 2.0, 12.0, 8.0]], device=device)
    image_size = image_size.to(device) if isinstance(image_size, Tensor) else image_size

    def decode(deltas: Tensor) -> Tensor:
        return decode_boxes(deltas, anchors, image_size=image_size, backend=backend)

    got = gradient(decode, [[[0.0] * 4] * 3], [1.0, 10.0, 100.0, 1000.0], device)
    # dx moves x1 and x2 by the width, dy y1 and y2 by the height; dw and dh move them apart by half a side each.
    assert got == [[[1010.0, 6060.0, 495.0, 2970.0], [1000.0, 6000.0, 500.0, 3000.0], [10.0, 60.0, -5.0, -30.0]]]


@pytest.mark.parametrize("sampling_ratio", [0, 1], ids=["adaptive", "fixed"])
def test_the_end_of_a_box_of_one_cell_is_free(sampling_ratio, backend, device):
    """Not aligned, on a ramp of 2 x + 4 y: one bin, one sample in the middle. A shorter box moves with its start."""
    y, x = torch.meshgrid(torch.arange(5.0), torch.arange(6.0), indexing="ij")
    ramp = (2 * x + 4 * y)[None, None].to(device)
    boxes = [[0, 1.25, 1.5, 2.25, 2.5], [0, 1.25, 1.5, 2.0, 2.25]]
    got = gradient(lambda b: roi_align(ramp, b, 1, 1.0, sampling_ratio, backend=backend), boxes, [1.0], device)
    assert got == [[0.0, 1.0, 2.0, 1.0, 2.0], [0.0, 2.0, 4.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("reduction", "backend"), [("mean", "reference"), ("mean", "triton"), ("max", "reference")], ids=str
)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_sample_on_the_cell_of_the_border_moves(interpolation, reduction, backend, device):
    """Aligned boxes of no size: points on the first cell, the last one, and beyond either."""
    H, W = 4, 5
    features = torch.randn(1, 3, H, W, dtype=torch.float64, device=device)
    points = [[0.0, 0.0], [W - 1.0, H - 1.0], [-0.5, -0.5], [W - 0.5, H - 0.5]]
    options: dict[str, Any] = {"interpolation": interpolation, "reduction": reduction, "backend": backend}

    def pool(boxes: Tensor) -> Tensor:
        return roi_align(features.to(boxes.dtype), boxes, 1, 1.0, 1, True, **options)

    boxes = [[0, x + 0.5, y + 0.5, x + 0.5, y + 0.5] for x, y in points]
    got = torch.tensor(gradient(pool, boxes, [1.0], device)).view(4, 5)[:, 1:]
    assert not got[2:].any()
    map_ = features.sum(1)[0].cpu()
    # A bilinear sample has the slope of the inside at the first cell; at the last one both of its cells are the last.
    # The taps of a bicubic one beyond the border are the border's cell: half the slope of the inside, either way.
    slope = [
        [map_[0, 1] - map_[0, 0], map_[1, 0] - map_[0, 0]],
        [map_[-1, -1] - map_[-1, -2], map_[-1, -1] - map_[-2, -1]],
    ]
    expected = torch.tensor(slope) * (0.5 if interpolation == "bicubic" else torch.tensor([[1.0], [0.0]]))
    torch.testing.assert_close(got[:2, :2] + got[:2, 2:], expected.float(), rtol=1e-5, atol=1e-5)


def unaligned(reduction: str) -> Callable[[Inputs, str], Tensor]:
    return lambda x, backend: roi_align(x["features"], x["rois"], 3, 0.25, 0, reduction=reduction, backend=backend)


MORE_CHECKS = [
    OpSpec(
        name=f"roi_align (boxes, {reduction}, not aligned)",
        make=roi_inputs,
        call=unaligned(reduction),
        gradients=("features", "rois"),
    )
    for reduction in ("mean", "max")
]
FOCAL = OpSpec(
    name="sigmoid_focal_loss (any gamma)",
    make=focal_inputs,
    call=lambda x, backend: sigmoid_focal_loss(x["logits"], x["targets"], gamma=0.5, backend=backend),
    gradients=("logits",),
)
DIFFERENTIABLE = [check for check in [*op_specs(), *MORE_CHECKS, FOCAL] if check.gradients]


@pytest.mark.parametrize("check", DIFFERENTIABLE, ids=lambda check: check.name)
def test_no_reference_hands_a_gradient_to_torchs_clamp(check):
    inputs = check.make()
    for name in check.gradients:
        inputs[name].requires_grad_()
    nodes = recorded(check.call(inputs, "reference"))
    assert len(nodes) > 1
    assert not {node for node in nodes if "Clamp" in node or "Maximum" in node or "Minimum" in node}
