"""RoIAlign kernels: mean of bilinear or bicubic samples, every pyramid level in one launch.

One program: one box x one row of bins x a block of channels. It reads the box, finds its level, and works on a tile
[bins of the row, channels]; coordinates and weights are computed once a bin, not once a channel. Features are read
where they lie, by their strides; where every level has its channels side by side (channels_last), a thread
loads 16 bytes of them, and the output is channels_last too.

The backward is in `backward` and, to the boxes, in `boxes`. All are deterministic. Letters as in
`reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....common.kernels.boxes import is_finite, load_box
from ....common.kernels.pyramid import level_index, of_level, strides_of_level
from ....common.kernels.roi_axis import axis, clamped, cubic_tap, taps, window
from ....common.launch import box_arguments, empty_pooled, on_device, side_arguments
from ....common.roi_geometry import RoIGeometry
from ....namespace import custom_op
from . import backward as kernels_backward
from .boxes import multiscale_roi_align_backward_boxes


@triton.jit
def add_cubic(tile, base, y, x, H, W, stride_h, stride_w, channels, mask, CUBIC: tl.constexpr):
    """Add to `tile` [BLOCK_PW, BLOCK_C] a bicubic sample of each bin, at y and x [BLOCK_PW], a row of taps at a time.

    Four loads are under way at once, as many as of a bilinear sample.
    """
    for row in range(4):
        cell_y, weight_y = cubic_tap(y, row, H, CUBIC)
        row_ptr = base + cell_y * stride_h
        for column in tl.static_range(4):
            cell_x, weight_x = cubic_tap(x, column, W, CUBIC)
            cells = (cell_x * stride_w)[:, None] + channels[None, :]
            value = tl.load(row_ptr + cells, mask=mask, other=0.0).to(tile.dtype)
            # Fusion is off for the sake of the coordinates; a sum may take it.
            tile = tl.fma((weight_y * weight_x)[:, None], value, tile)
    return tile


@triton.jit(do_not_specialize=["num_images", "boxes_an_image"])
def _roi_align_kernel(
    out_ptr,  # [K, C, PH, PW], any strides
    feature_ptrs,  # one [N, C, H, W] a level, any strides
    boxes_ptr,  # [N, P, 4] or [K, 5], contiguous
    valid_ptr,  # [N, P] bytes
    num_images,
    boxes_an_image,
    C,
    heights,  # floats, which Triton does not compile a new kernel for
    widths,
    out_strides,  # (k, c, h, w)
    feature_strides,  # (n, c, h, w) a level
    scales,
    thresholds,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BLOCK_PW: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    SAMPLING_RATIO: tl.constexpr,
    CUBIC: tl.constexpr,  # None: bilinear
    ALIGNED: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_VALID: tl.constexpr,
    FEATURE_STRIDE_C_IS_1: tl.constexpr,
    OUT_STRIDE_C_IS_1: tl.constexpr,
    ACC: tl.constexpr,
):
    # Programs that read the same box and cells run next to one another.
    num_blocks_c = tl.cdiv(C, BLOCK_C)
    ph = tl.program_id(0) % PH
    k = (tl.program_id(0) // PH // num_blocks_c).to(tl.int64)
    offs_c = ((tl.program_id(0) // PH % num_blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    mask_c = offs_c < C
    offs_pw = tl.arange(0, BLOCK_PW)
    mask_pw = offs_pw < PW

    x1, y1, x2, y2, image, usable = load_box(boxes_ptr, valid_ptr, k, num_images, boxes_an_image, PADDED, HAS_VALID)
    level = level_index(x1, y1, x2, y2, thresholds, NUM_LEVELS)
    feature_ptr, scale = of_level(level, feature_ptrs, NUM_LEVELS), of_level(level, scales, NUM_LEVELS)
    H = tl.cast(of_level(level, heights, NUM_LEVELS), tl.int32)
    W = tl.cast(of_level(level, widths, NUM_LEVELS), tl.int32)
    stride_n, stride_c, stride_h, stride_w = strides_of_level(level, feature_strides, NUM_LEVELS)
    # Scaled by more than 1 a box may overflow; a level may have no cells.
    usable &= is_finite(x1 * scale, y1 * scale, x2 * scale, y2 * scale) & (H > 0) & (W > 0)
    out_row = out_ptr + k * out_strides[0] + ph.to(tl.int64) * out_strides[2]
    # The compiler cannot see these ones in the strides, and needs them for wide loads and stores.
    channels = offs_c if FEATURE_STRIDE_C_IS_1 else offs_c * stride_c
    out_channels = offs_c if OUT_STRIDE_C_IS_1 else offs_c * out_strides[1]
    out_ptrs = out_row + (offs_pw.to(tl.int64) * out_strides[3])[:, None] + out_channels[None, :]
    out_mask = mask_pw[:, None] & mask_c[None, :]
    base = feature_ptr + image * stride_n

    start_y, bin_h, grid_h, step_y = axis(y1, y2, scale, PH, ALIGNED, SAMPLING_RATIO)
    start_x, bin_w, grid_w, step_x = axis(x1, x2, scale, PW, ALIGNED, SAMPLING_RATIO)
    bin_y = start_y + ph.to(ACC) * bin_h
    bin_x = start_x + offs_pw.to(ACC) * bin_w  # [BLOCK_PW]
    first_y, count_y = window(bin_y, step_y, grid_h, H, SAMPLING_RATIO)
    first_x, counts_x = window(bin_x, step_x, grid_w, W, SAMPLING_RATIO)
    num_y = tl.where(usable, count_y, 0.0).to(tl.int32)
    num_x = tl.where(usable, tl.max(tl.where(mask_pw, counts_x, 0.0), 0), 0.0).to(tl.int32)
    share = 1.0 / tl.maximum(tl.where(usable, grid_h * grid_w, 1.0), 1.0)

    tile = tl.zeros((BLOCK_PW, BLOCK_C), ACC)
    iy = tl.full((), 0, tl.int32)
    while iy < num_y:
        at_y = first_y + iy.to(ACC)
        y, inside_y = clamped(bin_y + (at_y + 0.5) * step_y, H)
        y_low, y_high, ly = taps(y, H)
        num_x_here = tl.where(inside_y & (at_y < grid_h), num_x, 0)
        row_low, row_high = base + y_low * stride_h, base + y_high * stride_h
        ix = tl.full((), 0, tl.int32)
        while ix < num_x_here:
            at_x = first_x + ix.to(ACC)
            x, inside_x = clamped(bin_x + (at_x + 0.5) * step_x, W)
            mask = (inside_x & (at_x < grid_w) & mask_pw)[:, None] & mask_c[None, :]
            if CUBIC is None:
                x_low, x_high, lx = taps(x, W)
                left = (x_low * stride_w)[:, None] + channels[None, :]
                right = (x_high * stride_w)[:, None] + channels[None, :]
                v00 = tl.load(row_low + left, mask=mask, other=0.0).to(ACC)
                v01 = tl.load(row_low + right, mask=mask, other=0.0).to(ACC)
                v10 = tl.load(row_high + left, mask=mask, other=0.0).to(ACC)
                v11 = tl.load(row_high + right, mask=mask, other=0.0).to(ACC)
                # Fusion is off for the sake of the coordinates; a sum may take it.
                tile = tl.fma(((1.0 - ly) * (1.0 - lx))[:, None], v00, tile)
                tile = tl.fma(((1.0 - ly) * lx)[:, None], v01, tile)
                tile = tl.fma((ly * (1.0 - lx))[:, None], v10, tile)
                tile = tl.fma((ly * lx)[:, None], v11, tile)
            else:
                tile = add_cubic(tile, base, y, x, H, W, stride_h, stride_w, channels, mask, CUBIC)
            ix += 1
        iy += 1
    tl.store(out_ptrs, (tile * share).to(out_ptr.dtype.element_ty), mask=out_mask)


class Tile(NamedTuple):
    """Launch parameters: the tile of one program and its warps."""

    block_pw: int
    block_c: int
    num_warps: int


def pick_tile(C: int, PW: int, channels_last: bool) -> Tile:
    """About 2,048 elements a program: 16 a thread of 4 warps, two 16-byte loads of bf16 channels for each tap.

    Half as many without channels_last: every element then has an address of its own, in two registers.
    """
    block_pw = triton.next_power_of_2(PW)
    elements = 2048 if channels_last else 1024
    block_c = max(16, min(triton.next_power_of_2(max(C, 1)), elements // block_pw, 256))
    return Tile(block_pw, block_c, num_warps=max(1, min(4, 4 * block_pw * block_c // elements)))


def launch(
    kernel: triton.JITFunction,
    out: Tensor,
    features: Sequence[Tensor],
    boxes: Tensor,
    valid: Tensor | None,
    geometry: RoIGeometry,
    **more: Any,
) -> None:
    """Fill `out` [K, C, PH, PW], which has elements, from `features` (one [N, C, H, W] a level, of which one has).

    kernel: that of the mean, or another with `more` arguments.
    """
    K, C, PH, PW = out.shape
    channels_last = all(f.stride(1) == 1 for f in features)
    tile = pick_tile(C, PW, channels_last)
    with on_device(out):
        kernel[(K * triton.cdiv(C, tile.block_c) * PH,)](
            out_ptr=out,
            feature_ptrs=tuple(features),
            C=C,
            out_strides=tuple(out.stride()),
            feature_strides=tuple(tuple(f.stride()) for f in features),
            PH=PH,
            PW=PW,
            BLOCK_PW=tile.block_pw,
            BLOCK_C=tile.block_c,
            FEATURE_STRIDE_C_IS_1=channels_last,
            OUT_STRIDE_C_IS_1=out.stride(1) == 1,
            ACC=tl.float64 if out.dtype == torch.float64 else tl.float32,
            num_warps=tile.num_warps,
            # A fused coord * scale - 0.5 would round differently from the reference, and an adaptive grid with it.
            enable_fp_fusion=False,
            **box_arguments(boxes, valid, features[0].shape[0]),
            **side_arguments(features),
            **geometry.launch_arguments(),
            **more,
        )


@custom_op("multiscale_roi_align")
def multiscale_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    valid: Tensor | None,
    pooled_height: int,
    pooled_width: int,
    scales: Sequence[float],
    thresholds: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    cubic: float | None,
) -> Tensor:
    """Pool boxes [N, P, 4] (fp32, valid [N, P] bool) or [K, 5]: [K, C, PH, PW]. The last five are a `RoIGeometry`."""
    out = empty_pooled(features, boxes, pooled_height, pooled_width)
    if out.numel() and any(f.numel() for f in features):
        geometry = RoIGeometry.unflatten(scales, thresholds, sampling_ratio, aligned, cubic)
        launch(_roi_align_kernel, out, features, boxes, valid, geometry)
        return out
    return out.zero_()


@multiscale_roi_align.register_fake
def _(features, boxes, valid, pooled_height, pooled_width, *geometry):
    return empty_pooled(features, boxes, pooled_height, pooled_width)


def _setup_context(ctx, inputs, output):
    features, boxes, valid, _, _, *geometry = inputs
    # The gradient to the features needs none of them, that to the boxes all.
    ctx.save_for_backward(boxes, valid, *(features if boxes.requires_grad else ()))
    ctx.geometry, ctx.maps = RoIGeometry.unflatten(*geometry), kernels_backward.shapes(features)


def _backward(ctx, grad):
    boxes, valid, *features = ctx.saved_tensors
    gradients, to_boxes = [None] * len(ctx.geometry.scales), None
    if any(ctx.needs_input_grad[0]):
        gradients = kernels_backward.multiscale_roi_align_backward(
            grad, boxes, valid, *ctx.maps, *ctx.geometry.flatten()
        )
    if ctx.needs_input_grad[1]:
        to_boxes = multiscale_roi_align_backward_boxes(grad, features, boxes, valid, *ctx.geometry.flatten())
    return gradients, to_boxes, None, None, None, *ctx.geometry.gradients()


multiscale_roi_align.register_autograd(_backward, setup_context=_setup_context)
