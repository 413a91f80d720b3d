"""Mask targets in one launch, from the packed bits to what the loss reads.

One program: one RoI x one row of bins x a block of its columns, as a tile [BLOCK_Q, ROWS] of bins and sample rows. The
samples of a bin are at most a pixel apart, so SPAN of them in a row lie within 32 pixels: those bits are taken from two
words of either row into one register, and the samples go through it. Then come the next SPAN, and after them the next
sample rows. Sums are whole numbers: of a row of samples in int32, of a bin in int64; only the mean is a float64.
Letters as in `reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.kernels.boxes import is_finite
from ...common.kernels.roi_axis import axis, window
from ...common.launch import cdiv, next_power_of_2, on_device
from ...namespace import custom_op
from ...packed import WORD
from .reference import UNIT

TILE = 128  # bins x sample rows of a program, which is one warp: 4 a thread, of 4 words each
SPAN = 30  # samples a pixel apart: with the pixel after the last and a rounding, 32 pixels
MAX_BLOCK_Q = 32  # columns of bins in a program: a target of 28 is one block

_UNIT = tl.constexpr(UNIT)
_UNIT_BITS = tl.constexpr(UNIT.bit_length() - 1)
_WORD = tl.constexpr(WORD)
_WORD_BITS = tl.constexpr(WORD.bit_length() - 1)


@triton.jit(do_not_specialize=["num_masks", "rois_an_image", "H", "B", "stride_n", "stride_g", "stride_h"])
def _mask_targets_kernel(
    out_ptr,  # [N * S, P, P] fp32
    packed_ptr,  # [N, G, H, B] int32, words side by side
    boxes_ptr,  # [N * S, 4] fp32
    index_ptr,  # [N * S] int64
    sizes_ptr,  # [N, 2], or anything
    num_masks,  # G
    rois_an_image,  # S
    H,
    B,
    stride_n,
    stride_g,
    stride_h,
    P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BINARY: tl.constexpr,
):
    NUM_BLOCKS: tl.constexpr = (P + BLOCK_Q - 1) // BLOCK_Q
    offs_q = tl.program_id(0) % NUM_BLOCKS * BLOCK_Q + tl.arange(0, BLOCK_Q)
    p = tl.program_id(0) // NUM_BLOCKS % P
    k = tl.program_id(0) // (NUM_BLOCKS * P)
    n = (k // rois_an_image).to(tl.int64)
    k = k.to(tl.int64)

    height, width = H.to(tl.float32), (B * _WORD).to(tl.float32)
    if HAS_SIZES:
        height = tl.minimum(tl.load(sizes_ptr + 2 * n).to(tl.float32), height)
        width = tl.minimum(tl.load(sizes_ptr + 2 * n + 1).to(tl.float32), width)
    box_ptr = boxes_ptr + k * 4
    x1, y1, x2, y2 = tl.load(box_ptr), tl.load(box_ptr + 1), tl.load(box_ptr + 2), tl.load(box_ptr + 3)
    g = tl.load(index_ptr + k)
    has_target = (g >= 0) & (g < num_masks) & is_finite(x1, y1, x2, y2)
    x1, x2 = tl.where(has_target, x1, 0.0), tl.where(has_target, x2, 0.0)
    y1, y2 = tl.where(has_target, y1, 0.0), tl.where(has_target, y2, 0.0)

    y_start, bin_h, grid_y, y_step = axis(y1, y2, 1.0, P, ALIGNED, 0)
    x_start, bin_w, grid_x, x_step = axis(x1, x2, 1.0, P, ALIGNED, 0)
    y_start += p.to(tl.float32) * bin_h
    x_start += offs_q.to(tl.float32) * bin_w  # [BLOCK_Q]
    first_y, count_y = window(y_start, y_step, grid_y, height, 0)
    first_x, count_x = window(x_start, x_step, grid_x, width, 0)  # [BLOCK_Q]
    num_columns = tl.max(tl.where(offs_q < P, count_x, 0.0), 0).to(tl.int32)
    num_rows = tl.where(has_target & (num_columns > 0), count_y, 0.0).to(tl.int32)

    mask_ptr = packed_ptr + n * stride_n + g * stride_g
    total = tl.zeros((BLOCK_Q, ROWS), tl.int64)
    for row in range(0, num_rows, ROWS):
        i = (row + tl.arange(0, ROWS)).to(tl.float32)
        y, upper_weight, lower_weight = _sample(y_start, y_step, first_y, i, count_y, height)
        next_y = tl.minimum(y + 1, H - 1)
        upper_ptr = (mask_ptr + y.to(tl.int64) * stride_h)[None, :]  # [1, ROWS]
        lower_ptr = (mask_ptr + next_y.to(tl.int64) * stride_h)[None, :]
        upper_sum = tl.zeros((BLOCK_Q, ROWS), tl.int32)
        lower_sum = tl.zeros((BLOCK_Q, ROWS), tl.int32)
        for begin in range(0, num_columns, SPAN):
            j = tl.zeros((BLOCK_Q,), tl.float32) + begin
            left, _, _ = _sample(x_start, x_step, first_x, j, count_x, width)
            upper = _bits_from(upper_ptr, left[:, None], B)  # [BLOCK_Q, ROWS]
            lower = _bits_from(lower_ptr, left[:, None], B)
            for _ in range(tl.minimum(SPAN, num_columns - begin)):
                x, left_weight, right_weight = _sample(x_start, x_step, first_x, j, count_x, width)
                place = ((x - left) & (_WORD - 1))[:, None]  # below 32, unless a box is too large for float32 pixels
                left_weight, right_weight = left_weight[:, None], right_weight[:, None]
                pair = upper >> place
                upper_sum += (pair & 1) * left_weight + ((pair >> 1) & 1) * right_weight
                pair = lower >> place
                lower_sum += (pair & 1) * left_weight + ((pair >> 1) & 1) * right_weight
                j += 1.0
        total += upper_sum.to(tl.int64) * upper_weight[None, :] + lower_sum.to(tl.int64) * lower_weight[None, :]

    sums = tl.sum(total, 1).to(tl.float64) * (1.0 / _UNIT / _UNIT)
    mean = sums / (tl.maximum(grid_y, 1.0).to(tl.float64) * tl.maximum(grid_x, 1.0).to(tl.float64))
    target = (mean >= 0.5).to(tl.float32) if BINARY else mean.to(tl.float32)
    tl.store(out_ptr + (k * P + p) * P + offs_q, target, mask=offs_q < P)


@triton.jit
def _sample(bin_start, step, first, i, count, limit):
    """Sample first + i of a bin along an axis: its pixel, and the weights of that and of the next one in 1 / UNIT.

    One that is not there, or outside [-1, limit], weighs nothing and stands at a pixel that a neighbour reads too.
    """
    exists = i < count
    at = bin_start + (first + tl.maximum(tl.minimum(i, count - 1.0), 0.0) + 0.5) * step
    inside = exists & (at >= -1.0) & (at <= limit)
    at = tl.minimum(tl.maximum(at, 0.0), tl.maximum(limit - 1.0, 0.0)) * _UNIT
    whole = tl.floor(at)
    position = whole.to(tl.int32) + (at - whole >= 0.5).to(tl.int32)
    next_weight = position & (_UNIT - 1)  # 0 at the last pixel
    return position >> _UNIT_BITS, tl.where(inside, -next_weight + _UNIT, 0), tl.where(inside, next_weight, 0)


@triton.jit
def _bits_from(row_ptr, x, B):
    """The 32 bits of a row from pixel x on, its last word being followed by itself."""
    word = x >> _WORD_BITS
    shift = x & (_WORD - 1)
    low = tl.load(row_ptr + word).to(tl.uint32, bitcast=True)
    high = tl.load(row_ptr + tl.minimum(word + 1, B - 1)).to(tl.uint32, bitcast=True)
    return ((low >> shift) | (high << 1 << (shift ^ (_WORD - 1)))).to(tl.int32, bitcast=True)


def _empty_out(packed: Tensor, boxes: Tensor, size: int) -> Tensor:
    return torch.empty((*boxes.shape[:2], size, size), dtype=torch.float32, device=packed.device)


@custom_op("mask_targets")
def mask_targets(
    packed: Tensor, boxes: Tensor, gt_index: Tensor, size: int, detectron2: bool, image_sizes: Tensor | None
) -> Tensor:
    """packed [N, G, H, B], boxes [N, S, 4] fp32, gt_index [N, S], image_sizes [N, 2] -> [N, S, size, size] fp32."""
    out = _empty_out(packed, boxes, size)
    if not out.numel():
        return out
    if not packed.numel():
        return out.zero_()
    N, G, H, B = packed.shape
    if packed.stride(3) != 1:
        packed = packed.contiguous()
    block_q = min(next_power_of_2(size), MAX_BLOCK_Q)
    programs = N * boxes.shape[1] * size * cdiv(size, block_q)
    with on_device(out):
        _mask_targets_kernel[(programs,)](
            out_ptr=out,
            packed_ptr=packed,
            boxes_ptr=boxes.contiguous(),
            index_ptr=gt_index.contiguous(),
            sizes_ptr=boxes if image_sizes is None else image_sizes.contiguous(),
            num_masks=G,
            rois_an_image=boxes.shape[1],
            H=H,
            B=B,
            stride_n=packed.stride(0),
            stride_g=packed.stride(1),
            stride_h=packed.stride(2),
            P=size,
            BLOCK_Q=block_q,
            ROWS=TILE // block_q,
            SPAN=SPAN,
            HAS_SIZES=image_sizes is not None,
            ALIGNED=detectron2,
            BINARY=detectron2,
            num_warps=1,
            enable_fp_fusion=False,  # positions are the reference's, bit for bit
        )
    return out


@mask_targets.register_fake
def _(packed, boxes, gt_index, size, detectron2, image_sizes):
    return _empty_out(packed, boxes, size)
