"""RoIPool kernels: the largest cell of each bin, and where it stands.

One program: one box x one row of bins x a block of channels. It works on a tile [bins of the row, channels] and goes
over the cells of the bins; their places are computed once a bin, not once a channel. Features are read where they lie,
by their strides; with channels_last a thread loads 16 bytes of channels, and the output is channels_last too. Without
it neighbouring threads load neighbouring columns of a bin, which share a largest cell at the end.

The backward is in `backward`. Both are deterministic. Letters as in `reference`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....common.launch import box_arguments, cdiv, empty_map, empty_pooled, is_channels_last, next_power_of_2, on_device
from ....namespace import custom_op
from . import backward as kernels_backward
from .cells import axis, bin_cells, load_cells

UNDER_WAY = 2  # cells of a bin that are loaded before the first is looked at


@triton.jit(do_not_specialize=["num_images", "boxes_an_image", "H", "W"])
def _roi_pool_kernel(
    out_ptr,  # [K, C, PH, PW], any strides
    index_ptr,  # int32 of the same shape and strides, or anything
    feature_ptr,  # [N, C, H, W], any strides
    boxes_ptr,  # [N, P, 4] or [K, 5], contiguous
    valid_ptr,  # [N, P] bytes
    num_images,
    boxes_an_image,
    C,
    H,
    W,
    scale,
    out_strides,  # (k, c, h, w)
    feature_strides,  # (n, c, h, w)
    PH: tl.constexpr,
    PW: tl.constexpr,
    BLOCK_PW: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNDER_WAY: tl.constexpr,
    COLUMNS: tl.constexpr,  # of a bin that are read at once: the rows of a tile for each bin
    PADDED: tl.constexpr,
    HAS_VALID: tl.constexpr,
    KEEP_INDEX: tl.constexpr,
    FEATURE_STRIDE_C_IS_1: tl.constexpr,
    OUT_STRIDE_C_IS_1: tl.constexpr,
    ACC: tl.constexpr,
):
    # Programs that read the same box and cells run next to one another, and a block of channels after the other: one of
    # a large map stays in the L2.
    programs_a_block = tl.num_programs(0) // tl.cdiv(C, BLOCK_C)
    ph = tl.program_id(0) % programs_a_block % PH
    k = (tl.program_id(0) % programs_a_block // PH).to(tl.int64)
    offs_c = (tl.program_id(0) // programs_a_block * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    mask_c = offs_c < C
    rows = tl.arange(0, BLOCK_PW * COLUMNS)
    pw, column = rows // COLUMNS, rows % COLUMNS

    x1, y1, x2, y2, image, usable = load_cells(
        boxes_ptr, valid_ptr, k, num_images, boxes_an_image, scale, PADDED, HAS_VALID
    )
    start_y, bin_h = axis(y1, y2, PH)
    start_x, bin_w = axis(x1, x2, PW)
    y, past_y = bin_cells(start_y, bin_h, ph.to(tl.float32), H.to(tl.float32))
    first_x, past_x = bin_cells(start_x, bin_w, pw.to(tl.float32), W.to(tl.float32))  # [BLOCK_PW COLUMNS]
    past_x = tl.where(pw < PW, past_x, first_x)
    past_x = tl.where(usable & (y < past_y), past_x, first_x)
    width = tl.max(past_x - first_x, 0)

    # The compiler cannot see these ones in the strides, and needs them for wide loads and stores.
    channels = offs_c if FEATURE_STRIDE_C_IS_1 else offs_c * feature_strides[1]
    out_channels = offs_c if OUT_STRIDE_C_IS_1 else offs_c * out_strides[1]
    base = feature_ptr + image * feature_strides[0]

    best = tl.full((BLOCK_PW * COLUMNS, BLOCK_C), float("-inf"), ACC)
    index = tl.full((BLOCK_PW * COLUMNS, BLOCK_C), -1, tl.int32)
    past_y = tl.where(width > 0, past_y, y)
    while y < past_y:
        row = base + y.to(tl.int64) * feature_strides[2]
        i = tl.full((), 0, tl.int32)
        while i < width:
            for j in tl.static_range(UNDER_WAY):
                x = first_x + (i + j * COLUMNS) + column
                mask = (x < past_x)[:, None] & mask_c[None, :]
                place = (x.to(tl.int64) * feature_strides[3])[:, None] + channels[None, :]
                value = tl.load(row + place, mask=mask, other=float("-inf")).to(ACC)
                larger = value > best  # false for NaN, and for the later of equals
                best = tl.where(larger, value, best)
                if KEEP_INDEX:
                    index = tl.where(larger, (y * W + x)[:, None], index)
            i += UNDER_WAY * COLUMNS
        y += 1

    best = tl.where((first_x < past_x)[:, None], best, 0.0)  # of an empty bin
    if COLUMNS > 1:
        best = tl.reshape(best, (BLOCK_PW, COLUMNS, BLOCK_C))
        largest = tl.max(best, 1)
        if KEEP_INDEX:  # the first of equals in row-major order has the least index
            index = tl.reshape(index, (BLOCK_PW, COLUMNS, BLOCK_C))
            index = tl.min(tl.where(best == largest[:, None, :], index, 2**31 - 1), 1)
        best = largest
    offs_pw = tl.arange(0, BLOCK_PW)
    place = k * out_strides[0] + ph.to(tl.int64) * out_strides[2]
    place += (offs_pw.to(tl.int64) * out_strides[3])[:, None] + out_channels[None, :]
    mask = (offs_pw < PW)[:, None] & mask_c[None, :]
    tl.store(out_ptr + place, best.to(out_ptr.dtype.element_ty), mask=mask)
    if KEEP_INDEX:
        tl.store(index_ptr + place, index, mask=mask)


class Tile(NamedTuple):
    """Launch parameters: the tile of one program and its warps."""

    block_pw: int
    columns: int
    block_c: int
    num_warps: int


def pick_tile(C: int, PW: int, channels_last: bool) -> Tile:
    """About 2,048 elements a program: 16 a thread of 4 warps, two 16-byte loads of bf16 channels for each cell.

    Half as many without channels_last: every element then has an address of its own, in two registers. There 4 columns
    of 8 bins are the threads of a warp.
    """
    block_pw = next_power_of_2(PW)
    elements = 2048 if channels_last else 1024
    columns = 1 if channels_last else 4
    block_c = max(16, min(next_power_of_2(max(C, 1)), elements // block_pw // columns, 256))
    return Tile(block_pw, columns, block_c, num_warps=max(1, min(4, 4 * block_pw * columns * block_c // elements)))


def _launch(out: Tensor, index: Tensor, feature: Tensor, boxes: Tensor, valid: Tensor | None, scale: float) -> None:
    """Fill `out` [K, C, PH, PW], and `index` if it has elements, from `feature` [N, C, H, W]."""
    K, C, PH, PW = out.shape
    if not out.numel():
        return
    if not feature.numel():
        out.zero_()
        index.fill_(-1)
        return
    tile = pick_tile(C, PW, feature.stride(1) == 1)
    with on_device(out):
        _roi_pool_kernel[(K * cdiv(C, tile.block_c) * PH,)](
            out_ptr=out,
            index_ptr=index if index.numel() else out,
            feature_ptr=feature,
            C=C,
            H=feature.shape[2],
            W=feature.shape[3],
            scale=scale,
            out_strides=tuple(out.stride()),
            feature_strides=tuple(feature.stride()),
            PH=PH,
            PW=PW,
            BLOCK_PW=tile.block_pw,
            BLOCK_C=tile.block_c,
            UNDER_WAY=UNDER_WAY,
            COLUMNS=tile.columns,
            KEEP_INDEX=index.numel() > 0,
            FEATURE_STRIDE_C_IS_1=feature.stride(1) == 1,
            OUT_STRIDE_C_IS_1=out.stride(1) == 1,
            ACC=tl.float64 if out.dtype == torch.float64 else tl.float32,
            num_warps=tile.num_warps,
            enable_fp_fusion=False,  # the cells of a bin follow from products and sums that are rounded one by one
            **box_arguments(boxes, valid, feature.shape[0]),
        )


def _empty_out(
    feature: Tensor, boxes: Tensor, pooled_height: int, pooled_width: int, keep_index: bool
) -> tuple[Tensor, Tensor]:
    out = empty_pooled([feature], boxes, pooled_height, pooled_width)
    if not keep_index:
        return out, torch.empty(0, dtype=torch.int32, device=feature.device)
    return out, empty_map(out.shape, out, is_channels_last([feature]), torch.int32)


@custom_op("roi_pool")
def roi_pool(
    feature: Tensor,
    boxes: Tensor,
    valid: Tensor | None,
    pooled_height: int,
    pooled_width: int,
    scale: float,
    keep_index: bool,
) -> tuple[Tensor, Tensor]:
    """Pool boxes [N, P, 4] (fp32, valid [N, P] bool) or [K, 5]: [K, C, PH, PW], and where its values come from.

    With `keep_index`, which the backward needs, that is int32 [K, C, PH, PW]: the cell y * W + x, or -1 where a bin
    takes no gradient; else it is empty.
    """
    out, index = _empty_out(feature, boxes, pooled_height, pooled_width, keep_index)
    _launch(out, index, feature, boxes, valid, scale)
    return out, index


@roi_pool.register_fake
def _(feature, boxes, valid, pooled_height, pooled_width, scale, keep_index):
    return _empty_out(feature, boxes, pooled_height, pooled_width, keep_index)


def _setup_context(ctx, inputs, output):
    feature, boxes, valid, _, _, ctx.scale, keep_index = inputs
    ctx.save_for_backward(boxes, valid, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else a gradient of the index would be filled with zeros
    ctx.shape, ctx.channels_last, ctx.kept = list(feature.shape), is_channels_last([feature]), keep_index


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 7
    if not ctx.kept:
        raise RuntimeError("roi_pool: a backward needs keep_index=True in the forward")
    boxes, valid, index = ctx.saved_tensors
    gradient = kernels_backward.roi_pool_backward(grad, index, boxes, valid, ctx.shape, ctx.channels_last, ctx.scale)
    return gradient, None, None, None, None, None, None


roi_pool.register_autograd(_backward, setup_context=_setup_context)
