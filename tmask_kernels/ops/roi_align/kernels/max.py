"""RoIAlign with the largest sample of each bin in place of the mean, and which sample that is.

One program as in `kernels`: one box x one row of bins x a block of channels, every level in one launch. It keeps the
largest sample so far and its index in registers; no sample outside the map is read, and one counts as 0.

The backward is in `max_backward`. Both are deterministic. Letters as in `reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....common.kernels.boxes import is_finite, load_box
from ....common.kernels.pyramid import level_index, of_level, strides_of_level
from ....common.kernels.roi_axis import axis, clamped, samples_a_row, taps, window
from ....common.launch import empty_pooled
from ....common.roi_geometry import RoIGeometry
from ....namespace import custom_op
from . import max_backward as kernels_max_backward
from .backward import shapes
from .forward import add_cubic, launch


@triton.jit
def _keep_larger(best, kept, value, index):
    """The larger value and its index; of equals, and of two NaN, the first. A NaN is larger than any number."""
    stays = (value <= best) | (best != best)
    return tl.where(stays, best, value), tl.where(stays, kept, index)


@triton.jit
def _bilinear(base, y, x, H, W, stride_h, stride_w, channels, mask, ACC: tl.constexpr):
    """A sample of each bin, at y and x [BLOCK_PW]: [BLOCK_PW, BLOCK_C], 0 where masked.

    In the form a + t (b - a) samples of equal cells are equal to the last bit, and the first of them is kept.
    """
    y_low, y_high, ly = taps(y, H)
    x_low, x_high, lx = taps(x, W)
    left = (x_low * stride_w)[:, None] + channels[None, :]
    right = (x_high * stride_w)[:, None] + channels[None, :]
    row_low, row_high = base + y_low * stride_h, base + y_high * stride_h
    v00 = tl.load(row_low + left, mask=mask, other=0.0).to(ACC)
    v01 = tl.load(row_low + right, mask=mask, other=0.0).to(ACC)
    v10 = tl.load(row_high + left, mask=mask, other=0.0).to(ACC)
    v11 = tl.load(row_high + right, mask=mask, other=0.0).to(ACC)
    top = tl.fma(lx[:, None], v01 - v00, v00)
    return tl.fma(ly, tl.fma(lx[:, None], v11 - v10, v10) - top, top)


@triton.jit(do_not_specialize=["num_images", "boxes_an_image"])
def _roi_align_max_kernel(
    out_ptr,  # [K, C, PH, PW], any strides
    index_ptr,  # int8 or int32 of the same shape and strides, or anything
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
    KEEP_INDEX: tl.constexpr,
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
    # The compiler cannot see these ones in the strides, and needs them for wide loads and stores.
    channels = offs_c if FEATURE_STRIDE_C_IS_1 else offs_c * stride_c
    out_channels = offs_c if OUT_STRIDE_C_IS_1 else offs_c * out_strides[1]
    base = feature_ptr + image * stride_n

    start_y, bin_h, grid_h, step_y = axis(y1, y2, scale, PH, ALIGNED, SAMPLING_RATIO)
    start_x, bin_w, grid_w, step_x = axis(x1, x2, scale, PW, ALIGNED, SAMPLING_RATIO)
    bin_y = start_y + ph.to(ACC) * bin_h
    bin_x = start_x + offs_pw.to(ACC) * bin_w  # [BLOCK_PW]
    first_y, count_y = window(bin_y, step_y, grid_h, H, SAMPLING_RATIO)
    first_x, counts_x = window(bin_x, step_x, grid_w, W, SAMPLING_RATIO)
    usable &= (grid_h > 0) & (grid_w > 0)
    num_y = tl.where(usable, count_y, 0.0).to(tl.int32)
    num_x = tl.where(usable, tl.max(tl.where(mask_pw, counts_x, 0.0), 0), 0.0).to(tl.int32)

    best = tl.full((BLOCK_PW, BLOCK_C), float("-inf"), ACC)
    kept = tl.full((BLOCK_PW, BLOCK_C), -1, tl.int32)
    iy = tl.full((), 0, tl.int32)
    while iy < num_y:
        y, inside_y = clamped(bin_y + (first_y + iy.to(ACC) + 0.5) * step_y, H)
        past_x = tl.where(inside_y, grid_w, 0.0)
        ix = tl.full((), 0, tl.int32)
        while ix < num_x:
            at_x = first_x + ix.to(ACC)
            x, inside_x = clamped(bin_x + (at_x + 0.5) * step_x, W)
            # A bin that has no such sample visited one outside before, and a second 0 changes nothing.
            inside = inside_x & (at_x < past_x)
            mask = (inside & mask_pw)[:, None] & mask_c[None, :]
            if CUBIC is None:
                value = _bilinear(base, y, x, H, W, stride_h, stride_w, channels, mask, ACC)
            else:
                value = tl.zeros((BLOCK_PW, BLOCK_C), ACC)
                value = add_cubic(value, base, y, x, H, W, stride_h, stride_w, channels, mask, CUBIC)
            index = tl.where(inside, iy * samples_a_row(SAMPLING_RATIO) + ix, -1)
            best, kept = _keep_larger(best, kept, value, index[:, None])
            ix += 1
        iy += 1
    if SAMPLING_RATIO == 0:
        # Samples that are not visited lie outside. Those of the window that do so have stood for them, each in its turn
        # among its equals, but where samples are so far from the start of their bin that one does not tell them apart.
        unseen_x = tl.maximum(first_x, grid_w - (first_x + num_x.to(ACC)))
        unseen_y = tl.maximum(first_y, grid_h - (first_y + num_y.to(ACC)))
        unseen = tl.where(tl.maximum(unseen_x, unseen_y) > 0, 0.0, float("-inf"))
        best, kept = _keep_larger(best, kept, unseen[:, None], -1)

    best = tl.where(usable, best, 0.0)
    place = k * out_strides[0] + ph.to(tl.int64) * out_strides[2]
    place += (offs_pw.to(tl.int64) * out_strides[3])[:, None] + out_channels[None, :]
    mask = mask_pw[:, None] & mask_c[None, :]
    tl.store(out_ptr + place, best.to(out_ptr.dtype.element_ty), mask=mask)
    if KEEP_INDEX:
        tl.store(index_ptr + place, kept.to(index_ptr.dtype.element_ty), mask=mask)


def index_dtype(sampling_ratio: int) -> torch.dtype:
    """Of the kept samples: a byte, as long as all of a bin's have a number in it."""
    return torch.int8 if 0 < sampling_ratio <= 11 else torch.int32


def _empty_outputs(
    features: Sequence[Tensor], boxes: Tensor, height: int, width: int, sampling_ratio: int, keep_index: bool
) -> tuple[Tensor, Tensor]:
    out = empty_pooled(features, boxes, height, width)
    dtype = index_dtype(sampling_ratio)
    return out, torch.empty_like(out, dtype=dtype) if keep_index else out.new_empty(0, dtype=dtype)


@custom_op("multiscale_roi_align_max")
def multiscale_roi_align_max(
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
    keep_index: bool,
) -> tuple[Tensor, Tensor]:
    """Pool boxes [N, P, 4] (fp32, valid [N, P] bool) or [K, 5]: [K, C, PH, PW], and where its values come from.

    With `keep_index`, which the backward needs, that is int8 or int32 [K, C, PH, PW]: the sample, row by row of those
    visited (`roi_axis.samples_a_row`), or -1 where a bin takes no gradient; else it is empty.
    """
    out, index = _empty_outputs(features, boxes, pooled_height, pooled_width, sampling_ratio, keep_index)
    if out.numel() and any(f.numel() for f in features):
        geometry = RoIGeometry.unflatten(scales, thresholds, sampling_ratio, aligned, cubic)
        kept = {"index_ptr": index if keep_index else out, "KEEP_INDEX": keep_index}
        launch(_roi_align_max_kernel, out, features, boxes, valid, geometry, **kept)
        return out, index
    return out.zero_(), index.fill_(-1)


@multiscale_roi_align_max.register_fake
def _(features, boxes, valid, height, width, scales, thresholds, sampling_ratio, aligned, cubic, keep_index):
    return _empty_outputs(features, boxes, height, width, sampling_ratio, keep_index)


def _setup_context(ctx, inputs, output):
    features, boxes, valid, _, _, *geometry, ctx.kept = inputs
    ctx.save_for_backward(boxes, valid, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else a gradient of the index would be filled with zeros
    ctx.geometry, ctx.maps = RoIGeometry.unflatten(*geometry), shapes(features)


def _backward(ctx, grad, _):
    gradients = [None] * len(ctx.geometry.scales)
    if grad is not None:
        if not ctx.kept:
            raise RuntimeError("multiscale_roi_align_max: a backward needs keep_index=True in the forward")
        boxes, valid, index = ctx.saved_tensors
        gradients = kernels_max_backward.multiscale_roi_align_max_backward(
            grad, index, boxes, valid, *ctx.maps, *ctx.geometry.flatten()
        )
    return gradients, None, None, None, None, *ctx.geometry.gradients(), None


multiscale_roi_align_max.register_autograd(_backward, setup_context=_setup_context)
