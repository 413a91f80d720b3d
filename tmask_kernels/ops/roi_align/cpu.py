"""RoIAlign on a CPU: torchvision's forward, with a backward by matrix products where they are faster.

torchvision's CPU backward adds every tap of every sample on one thread. The mean of samples is separable (see
`reference`), so the gradient of a feature map is dF = sum over boxes of Wy^T G Wx: two matrix products, which use all
cores. The products visit every cell of the map. They are faster on small maps and slower on large ones.
`reference` defines the letters; R is the number of boxes of one level.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...backend import first_derivative_only
from ...common.pyramid import box_levels
from ...common.reference import box_sizes, is_finite, no_autocast
from ...common.roi_geometry import RoIGeometry
from .reference import CHUNK_ELEMENTS, axis_weights, multiscale_roi_align_reference

# torchvision's CPU op tabulates the taps of all samples of a box. The reference takes boxes with more samples.
MAX_TORCHVISION_SAMPLES = 1 << 20

# Multiply-adds that the products may take for each addition of torchvision's backward. Two cores ran the products at
# about 80 GFLOP/s and took 3.5 ns for an addition, at 256 to 1,024 boxes. The ratio is 140; 100 is on the safe side.
DENSE_WORK = 100


def multiscale_roi_align_cpu(
    features: list[Tensor],
    boxes: Tensor,
    valid: Tensor | None,
    output_size: tuple[int, int],
    geometry: RoIGeometry,
) -> Tensor:
    """Same as `multiscale_roi_align_reference`, with one call of torchvision's op a level.

    Rows that give zeros never reach torchvision's op.
    """
    boxes = boxes.detach()
    if boxes.dim() == 3:
        images = torch.arange(boxes.shape[0]).repeat_interleave(boxes.shape[1])
        boxes = torch.cat([images[:, None].to(boxes.dtype), boxes.flatten(0, 1)], 1)  # [K, 5]
    K = boxes.shape[0]
    usable = is_finite(boxes[:, 1:])  # [K]
    if valid is not None:
        usable &= valid.flatten()
    levels = box_levels(boxes[:, 1:], geometry.thresholds)
    sampling_ratio, aligned = geometry.sampling_ratio, geometry.aligned
    all_rows, pooled = [], []
    for level, (feature, scale) in enumerate(zip(features, geometry.scales, strict=True)):
        feature = feature.to(boxes.dtype)  # torchvision's CPU op has no bf16, and is 17 times slower in fp16
        # torchvision's CPU op reads outside its memory for NaN and infinite boxes, and in a map without cells.
        here = usable & (levels == level) & is_finite(boxes[:, 1:] * scale)  # [K]
        rows = here.nonzero()[:, 0]  # a CPU may have sizes that depend on data
        outsized = rows if not feature.numel() else rows[:0]
        if feature.numel():
            if sampling_ratio <= 0:
                rows, outsized = _split_by_grid(boxes, rows, output_size, scale, aligned)
            feature = first_derivative_only("roi_align, multiscale_roi_align", "torchvision", feature)
            pooled.append(_RoIAlign.apply(feature, boxes[rows], output_size, scale, sampling_ratio, aligned))
            all_rows.append(rows)
        if len(outsized) or not feature.numel():
            one_level = replace(geometry, scales=(scale,), thresholds=())
            pooled.append(multiscale_roi_align_reference([feature], boxes[outsized], None, output_size, one_level))
            all_rows.append(outsized)
    index, values = torch.cat(all_rows), torch.cat(pooled)
    if len(features) == 1 and len(index) == K and len(all_rows) == 1:
        return values.to(features[0].dtype)
    return values.new_zeros(K, *values.shape[1:]).index_copy(0, index, values).to(features[0].dtype)


def _split_by_grid(
    boxes: Tensor, rows: Tensor, output_size: tuple[int, int], scale: float, aligned: bool
) -> tuple[Tensor, Tensor]:
    """Split `rows` into boxes whose adaptive grid torchvision can tabulate, and boxes with a larger grid.

    Neither part has the rows with an empty grid, which give zeros: torchvision fails on a grid of negative size.
    """
    corners = boxes[rows, 1:] * scale - (0.5 if aligned else 0.0)
    sizes = box_sizes(corners)  # [rows, 2] x, y
    if not aligned:
        sizes = sizes.clamp(min=1.0)
    bins = torch.tensor([output_size[1], output_size[0]])
    samples = ((sizes / bins).ceil() * bins).double().prod(1)
    some, large = (sizes > 0).all(1), samples > MAX_TORCHVISION_SAMPLES
    return rows[some & ~large], rows[some & large]


class _RoIAlign(torch.autograd.Function):
    """RoIAlign [R, C, PH, PW] of boxes [R, 5] on one level [N, C, H, W], fp32 or fp64."""

    @staticmethod
    def forward(
        ctx: Any,
        feature: Tensor,
        boxes: Tensor,
        output_size: tuple[int, int],
        scale: float,
        sampling_ratio: int,
        aligned: bool,
    ) -> Tensor:
        import torchvision  # noqa: F401 - registers the op; its Python function may be ours by now

        ctx.save_for_backward(boxes)
        ctx.shape, ctx.arguments = feature.shape, (output_size, scale, sampling_ratio, aligned)
        return torch.ops.torchvision.roi_align(feature, boxes, scale, *output_size, sampling_ratio, aligned)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (boxes,) = ctx.saved_tensors
        (height, width), scale, sampling_ratio, aligned = ctx.arguments
        N, C, H, W = ctx.shape
        samples = sampling_ratio**2 if sampling_ratio > 0 else 1  # the least number of a bin
        # Additions and multiply-adds of one channel and one row of bins: four taps a sample, and two products.
        if width * 4 * samples * DENSE_WORK > W * (width + H):
            dense = _dense_gradient(grad, boxes, ctx.shape, scale, sampling_ratio, aligned)
            return dense, None, None, None, None, None
        taps = torch.ops.torchvision._roi_align_backward(
            grad, boxes, scale, height, width, N, C, H, W, sampling_ratio, aligned
        )
        return taps, None, None, None, None, None


def _dense_gradient(
    grad: Tensor, boxes: Tensor, shape: tuple[int, int, int, int], scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    """Return dF [N, C, H, W] = sum of Wy^T G Wx over the boxes of each image; grad [R, C, PH, PW], boxes [R, 5]."""
    N, C, H, W = shape
    PH, PW = grad.shape[2:]
    corners = boxes[:, 1:] * scale - (0.5 if aligned else 0.0)
    start, size = corners[:, :2], box_sizes(corners)  # [R, 2] x, y in cells
    if not aligned:
        size = size.clamp(min=1.0)
    out = grad.new_zeros(N, H, W * C)
    chunk = max(1, CHUNK_ELEMENTS // (PH * W * C))
    weight_x = axis_weights(start[:, 0], size[:, 0], PW, W, sampling_ratio)  # [R, PW, W]
    weight_y = axis_weights(start[:, 1], size[:, 1], PH, H, sampling_ratio)  # [R, PH, H]
    with no_autocast("cpu"):
        for image in range(N):
            for rows in (boxes[:, 0].long() == image).nonzero()[:, 0].split(chunk):
                bins = grad[rows].permute(0, 2, 3, 1).reshape(-1, PW, C)  # [r * PH, PW, C]
                spread = weight_x[rows].mT[:, None].expand(-1, PH, -1, -1).reshape(-1, W, PW)
                along_x = torch.bmm(spread, bins)  # [r * PH, W, C]
                out[image].addmm_(weight_y[rows].reshape(-1, H).T, along_x.reshape(-1, W * C))
    return out.view(N, H, W, C).permute(0, 3, 1, 2)
