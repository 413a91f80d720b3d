"""RoIAlign with the largest sample of each bin in place of the mean, and which sample that is.

One program as in `forward`: one box, some of its bins, and a block of channels, every level in one launch. It keeps the
largest sample so far and its index in registers; no sample outside the map is read, and one counts as 0.

The backward is in `max_backward`. Both are deterministic. Letters as in `reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....common.kernels.roi_axis import clamped, samples_a_row
from ....common.launch import empty_pooled
from ....common.roi_geometry import RoIGeometry
from ....namespace import custom_op
from . import max_backward as kernels_max_backward
from .backward import shapes
from .forward import launch
from .samples import (
    add_cubic,
    bins_of_block,
    blocks_of_program,
    channel_offsets,
    load_corners,
    load_roi,
    place_to_read,
    samples_along,
)


@triton.jit
def _keep_larger(best, kept, value, index):
    """The larger value and its index; of equals, and of two NaN, the first. A NaN is larger than any number."""
    stays = (value <= best) | (best != best)
    return tl.where(stays, best, value), tl.where(stays, kept, index)


@triton.jit
def _bilinear(base, channels, y, x, size, strides, mask, ACC: tl.constexpr, PAIRS: tl.constexpr):
    """A sample of each bin, at clamped y and x [B]: [B, G, L], 0 where masked.

    In the form a + t (b - a) samples of equal cells are equal to the last bit, and the first of them is kept.
    """
    v00, v01, v10, v11, ly, lx = load_corners(base, channels, y, x, size, strides, mask, ACC, PAIRS)
    top = tl.fma(lx[:, None, None], v01 - v00, v00)
    return tl.fma(ly[:, None, None], tl.fma(lx[:, None, None], v11 - v10, v10) - top, top)


@triton.jit(do_not_specialize=["num_images", "boxes_an_image", "blocks_a_program"])
def _roi_align_max_kernel(
    out_ptr,  # [K, C, PH, PW], any strides
    index_ptr,  # int8 or int32 of the same shape and strides, or anything
    feature_ptrs,  # one [N, C, H, W] a level, any strides
    boxes_ptr,  # [N, P, 4] or [K, 5], contiguous
    valid_ptr,  # [N, P] bytes
    num_images,
    boxes_an_image,
    blocks_a_program,
    C,
    heights,  # floats, which Triton does not compile a new kernel for
    widths,
    out_strides,  # (k, c, h, w)
    feature_strides,  # (n, c, h, w) a level
    scales,
    thresholds,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_BINS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_C: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    SAMPLING_RATIO: tl.constexpr,
    CUBIC: tl.constexpr,  # None: bilinear
    ALIGNED: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_VALID: tl.constexpr,
    KEEP_INDEX: tl.constexpr,
    FEATURE_STRIDE_C_IS_1: tl.constexpr,
    OUT_STRIDE_C_IS_1: tl.constexpr,
    PAIRS: tl.constexpr,
    ACC: tl.constexpr,
):
    block, past, k, first_c = blocks_of_program(blocks_a_program, C, BLOCK, GROUPS * GROUP_C, PH * PW)
    corners, usable, scale, base, size, strides = load_roi(
        boxes_ptr,
        valid_ptr,
        k,
        num_images,
        boxes_an_image,
        feature_ptrs,
        heights,
        widths,
        feature_strides,
        scales,
        thresholds,
        NUM_LEVELS,
        PADDED,
        HAS_VALID,
    )
    x1, y1, x2, y2 = corners
    base, strides, channels, mask_c = place_to_read(
        base + first_c * strides[0], strides, C - first_c, GROUPS, GROUP_C, FEATURE_STRIDE_C_IS_1, PAIRS
    )
    out_base = k * out_strides[0] + first_c.to(tl.int64) * out_strides[1]
    out_c, out_channels = channel_offsets(out_strides[1], GROUPS, GROUP_C, OUT_STRIDE_C_IS_1)

    while block < past:
        ph, pw, mask_bin = bins_of_block(block, PH, PW, BLOCK, TILE_BINS, 1)
        y = samples_along(y1, y2, scale, usable, ph.to(ACC), mask_bin, PH, size[0], ALIGNED, SAMPLING_RATIO)
        x = samples_along(x1, x2, scale, usable, pw.to(ACC), mask_bin, PW, size[1], ALIGNED, SAMPLING_RATIO)
        starts_y, step_y, grid_y, first_y, num_y, _ = y
        starts_x, step_x, grid_x, first_x, num_x, _ = x
        some = usable & (grid_y > 0) & (grid_x > 0)
        num_y, num_x = tl.where(some, num_y, 0), tl.where(some, num_x, 0)

        best = tl.full((TILE_BINS, GROUPS, GROUP_C), float("-inf"), ACC)
        kept = tl.full((TILE_BINS, GROUPS, GROUP_C), -1, tl.int32)
        iy = tl.full((), 0, tl.int32)
        while iy < num_y:
            at_y = first_y + iy.to(ACC)
            sample_y, inside_y = clamped(starts_y + (at_y + 0.5) * step_y, size[0])
            ix = tl.full((), 0, tl.int32)
            while ix < num_x:
                at_x = first_x + ix.to(ACC)
                sample_x, inside_x = clamped(starts_x + (at_x + 0.5) * step_x, size[1])
                # A bin that has no such sample visited one outside before, and a second 0 changes nothing.
                inside = inside_y & (at_y < grid_y) & inside_x & (at_x < grid_x)
                mask = (inside & mask_bin)[:, None, None] & mask_c
                if CUBIC is None:
                    value = _bilinear(base, channels, sample_y, sample_x, size, strides, mask, ACC, PAIRS)
                else:
                    value = tl.zeros((TILE_BINS, GROUPS, GROUP_C), ACC)
                    value = add_cubic(value, base, channels, sample_y, sample_x, size, strides, mask, CUBIC, PAIRS)
                index = tl.where(inside, iy * samples_a_row(SAMPLING_RATIO) + ix, -1)
                best, kept = _keep_larger(best, kept, value, index[:, None, None])
                ix += 1
            iy += 1
        if SAMPLING_RATIO == 0:
            # Samples that are not visited lie outside. Those of the window that do so have stood for them, each in its
            # turn among its equals, but where samples are so far from the start of their bin that one does not tell
            # them apart.
            unseen_x = tl.maximum(first_x, grid_x - (first_x + num_x.to(ACC)))
            unseen_y = tl.maximum(first_y, grid_y - (first_y + num_y.to(ACC)))
            unseen = tl.where(tl.maximum(unseen_x, unseen_y) > 0, 0.0, float("-inf"))
            best, kept = _keep_larger(best, kept, unseen[:, None, None], -1)

        best = tl.where(some, best, 0.0)
        bins_at = ph.to(tl.int64) * out_strides[2] + pw.to(tl.int64) * out_strides[3]
        place = (out_base + bins_at)[:, None, None] + out_channels
        mask = mask_bin[:, None, None] & (out_c < C - first_c)
        tl.store(out_ptr + place, best.to(out_ptr.dtype.element_ty), mask=mask)
        if KEEP_INDEX:
            tl.store(index_ptr + place, kept.to(index_ptr.dtype.element_ty), mask=mask)
        block += 1


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
        kept = {"index_ptr": index if keep_index else out}
        launch(_roi_align_max_kernel, out, features, boxes, valid, geometry, 16, kept, KEEP_INDEX=keep_index)
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
    return gradients, None, None, None, None, *[None] * 5, None


multiscale_roi_align_max.register_autograd(_backward, setup_context=_setup_context)
