"""Gradient of RoIAlign to the boxes: the slopes of its samples, times how far each moves with the box's corners.

One program: one box x one row of bins x a block of channels. It visits the samples of the forward again. A sample at
``start + t * size`` moves by 1 - t with the box's start and by t with its end. So its slopes along y and x, each times
the gradient of the output and summed over the channels of a thread, go into four sums, weighted by 1 - t and by t. A
program writes them as four numbers, which are added up afterwards in a fixed order: no atomics, the same bits from run
to run. Letters as in `reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ....backend import no_second_derivative
from ....common.kernels.roi_axis import axis, clamped, cubic_slope, cubic_tap, taps, window
from ....common.launch import box_arguments, cdiv, next_power_of_2, on_device, side_arguments
from ....common.roi_geometry import RoIGeometry
from ....namespace import custom_op
from .samples import load_roi


@triton.jit
def _moves(at, sample, offs, grid, bins, length):
    """How far a sample of bin `offs` moves with the start and the end of its box; one clamped to the border does not.

    As in the reference one that is exactly on the border's cell does.
    """
    t = (offs + (sample + 0.5) / grid) / bins
    free = (at >= 0.0) & (at <= length - 1.0)
    return tl.where(free, 1.0 - t, 0.0), tl.where(free, t, 0.0)


@triton.jit
def _bilinear_slopes(base, y, x, H, W, stride_h, stride_w, channels, mask, ACC: tl.constexpr):
    """Slopes along y and x of a bilinear sample of each bin, at y and x [BLOCK_PW]: [BLOCK_PW, BLOCK_C]."""
    y_low, y_high, ly = taps(y, H)
    x_low, x_high, lx = taps(x, W)
    row_low, row_high = base + y_low * stride_h, base + y_high * stride_h
    left = (x_low * stride_w)[:, None] + channels[None, :]
    right = (x_high * stride_w)[:, None] + channels[None, :]
    v00 = tl.load(row_low + left, mask=mask, other=0.0).to(ACC)
    v01 = tl.load(row_low + right, mask=mask, other=0.0).to(ACC)
    v10 = tl.load(row_high + left, mask=mask, other=0.0).to(ACC)
    v11 = tl.load(row_high + right, mask=mask, other=0.0).to(ACC)
    lx = lx[:, None]
    return (1.0 - lx) * (v10 - v00) + lx * (v11 - v01), (1.0 - ly) * (v01 - v00) + ly * (v11 - v10)


@triton.jit
def _cubic_slopes(base, y, x, H, W, stride_h, stride_w, channels, mask, CUBIC: tl.constexpr, ACC: tl.constexpr):
    """As `_bilinear_slopes`, of a bicubic sample, a row of taps at a time."""
    along_y = tl.zeros(mask.shape, ACC)
    along_x = tl.zeros(mask.shape, ACC)
    for row in range(4):
        cell_y, weight_y = cubic_tap(y, row, H, CUBIC)
        slope_y = cubic_slope(y, row, CUBIC)
        row_ptr = base + cell_y * stride_h
        value = tl.zeros(mask.shape, ACC)  # of the row at x, and its slope there
        slope = tl.zeros(mask.shape, ACC)
        for column in tl.static_range(4):
            cell_x, weight_x = cubic_tap(x, column, W, CUBIC)
            cells = (cell_x * stride_w)[:, None] + channels[None, :]
            tap = tl.load(row_ptr + cells, mask=mask, other=0.0).to(ACC)
            # Fusion is off for the sake of the coordinates; a sum may take it.
            value = tl.fma(weight_x[:, None], tap, value)
            slope = tl.fma(cubic_slope(x, column, CUBIC)[:, None], tap, slope)
        along_y = tl.fma(slope_y, value, along_y)
        along_x = tl.fma(weight_y, slope, along_x)
    return along_y, along_x


@triton.jit
def _sum_groups(values, GROUP: tl.constexpr):
    """Sums over GROUP channels at a time, those that a thread loads at once: [BLOCK_PW, BLOCK_C // GROUP]."""
    if GROUP > 1:
        values = tl.sum(tl.reshape(values, (values.shape[0], values.shape[1] // GROUP, GROUP)), 2)
    return values


@triton.jit(do_not_specialize=["num_images", "boxes_an_image"])
def _box_gradient_kernel(
    sums_ptr,  # [K, PH, blocks of channels, 4]: x1, y1, x2, y2
    out_grad_ptr,  # [K, C, PH, PW], any strides
    feature_ptrs,  # one [N, C, H, W] a level, any strides
    boxes_ptr,  # [N, P, 4] or [K, 5], contiguous
    valid_ptr,  # [N, P] bytes
    num_images,
    boxes_an_image,
    C,
    heights,  # floats, which Triton does not compile a new kernel for
    widths,
    out_grad_strides,  # (k, c, h, w)
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
    OUT_GRAD_STRIDE_C_IS_1: tl.constexpr,
    GROUP: tl.constexpr,  # channels of a 16-byte load; 1 without channels_last
    ACC: tl.constexpr,
):
    # Programs that read the same box and cells run next to one another.
    num_blocks_c = tl.cdiv(C, BLOCK_C)
    ph = tl.program_id(0) % PH
    block_c = tl.program_id(0) // PH % num_blocks_c
    k = (tl.program_id(0) // PH // num_blocks_c).to(tl.int64)
    offs_c = (block_c * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    mask_c = offs_c < C
    offs_pw = tl.arange(0, BLOCK_PW)
    mask_pw = offs_pw < PW

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
    H, W = size
    stride_c, stride_h, stride_w = strides
    # The compiler cannot see these ones in the strides, and needs them for wide loads.
    channels = offs_c if FEATURE_STRIDE_C_IS_1 else offs_c * stride_c
    out_channels = offs_c if OUT_GRAD_STRIDE_C_IS_1 else offs_c * out_grad_strides[1]

    start_y, bin_h, grid_h, step_y = axis(y1, y2, scale, PH, ALIGNED, SAMPLING_RATIO)
    start_x, bin_w, grid_w, step_x = axis(x1, x2, scale, PW, ALIGNED, SAMPLING_RATIO)
    bin_y = start_y + ph.to(ACC) * bin_h
    bin_x = start_x + offs_pw.to(ACC) * bin_w  # [BLOCK_PW]
    first_y, count_y = window(bin_y, step_y, grid_h, H, SAMPLING_RATIO)
    first_x, counts_x = window(bin_x, step_x, grid_w, W, SAMPLING_RATIO)
    num_y = tl.where(usable, count_y, 0.0).to(tl.int32)
    num_x = tl.where(usable, tl.max(tl.where(mask_pw, counts_x, 0.0), 0), 0.0).to(tl.int32)

    row = out_grad_ptr + k * out_grad_strides[0] + ph.to(tl.int64) * out_grad_strides[2]
    row_ptrs = row + (offs_pw.to(tl.int64) * out_grad_strides[3])[:, None] + out_channels[None, :]
    out_grad = tl.load(row_ptrs, mask=mask_pw[:, None] & mask_c[None, :], other=0.0)  # [BLOCK_PW, BLOCK_C]

    sums_x1 = tl.zeros((BLOCK_PW, BLOCK_C // GROUP), ACC)
    sums_y1 = tl.zeros((BLOCK_PW, BLOCK_C // GROUP), ACC)
    sums_x2 = tl.zeros((BLOCK_PW, BLOCK_C // GROUP), ACC)
    sums_y2 = tl.zeros((BLOCK_PW, BLOCK_C // GROUP), ACC)
    iy = tl.full((), 0, tl.int32)
    while iy < num_y:
        at_y = first_y + iy.to(ACC)
        free_y = bin_y + (at_y + 0.5) * step_y
        y, inside_y = clamped(free_y, H)
        y_with_start, y_with_end = _moves(free_y, at_y, ph.to(ACC), grid_h, PH, H)
        num_x_here = tl.where(inside_y & (at_y < grid_h), num_x, 0)
        ix = tl.full((), 0, tl.int32)
        while ix < num_x_here:
            at_x = first_x + ix.to(ACC)
            free_x = bin_x + (at_x + 0.5) * step_x
            x, inside_x = clamped(free_x, W)
            x_with_start, x_with_end = _moves(free_x, at_x, offs_pw.to(ACC), grid_w, PW, W)
            mask = (inside_x & (at_x < grid_w) & mask_pw)[:, None] & mask_c[None, :]
            if CUBIC is None:
                along_y, along_x = _bilinear_slopes(base, y, x, H, W, stride_h, stride_w, channels, mask, ACC)
            else:
                along_y, along_x = _cubic_slopes(base, y, x, H, W, stride_h, stride_w, channels, mask, CUBIC, ACC)
            along_y = _sum_groups(along_y * out_grad.to(ACC), GROUP)
            along_x = _sum_groups(along_x * out_grad.to(ACC), GROUP)
            sums_x1 = tl.fma(x_with_start[:, None], along_x, sums_x1)
            sums_y1 = tl.fma(y_with_start, along_y, sums_y1)
            sums_x2 = tl.fma(x_with_end[:, None], along_x, sums_x2)
            sums_y2 = tl.fma(y_with_end, along_y, sums_y2)
            ix += 1
        iy += 1

    factor = tl.where(usable, scale / tl.maximum(grid_h * grid_w, 1.0), 0.0)
    grad_x1, grad_x2 = tl.sum(sums_x1) * factor, tl.sum(sums_x2) * factor
    grad_y1, grad_y2 = tl.sum(sums_y1) * factor, tl.sum(sums_y2) * factor
    if not ALIGNED:  # a box of less than a cell is one cell long, wherever it ends
        short_x, short_y = x2 * scale - x1 * scale < 1.0, y2 * scale - y1 * scale < 1.0
        grad_x1, grad_x2 = tl.where(short_x, grad_x1 + grad_x2, grad_x1), tl.where(short_x, 0.0, grad_x2)
        grad_y1, grad_y2 = tl.where(short_y, grad_y1 + grad_y2, grad_y1), tl.where(short_y, 0.0, grad_y2)
    sums = sums_ptr + ((k * PH + ph) * num_blocks_c + block_c) * 4
    tl.store(sums, grad_x1)
    tl.store(sums + 1, grad_y1)
    tl.store(sums + 2, grad_x2)
    tl.store(sums + 3, grad_y2)


class SlopeTile(NamedTuple):
    """Launch parameters: bins and channels of one program, its warps, and the most registers of a thread."""

    block_pw: int
    block_c: int
    num_warps: int
    max_registers: int


def pick_slope_tile(C: int, PW: int, item_bytes: int, channels_last: bool, cubic: float | None = None) -> SlopeTile:
    """About 1,024 elements a program, 8 a thread: a sample needs its four taps, their slopes and the output's gradient.

    Half as many without channels_last: every element then has an address of its own, in two registers. The registers
    are those of 5 programs on an SM, of 4 for wide loads of fp32; left alone, the assembler spills a few to have more.
    Triton 3.8 gives a thread 4 bins of one channel without channels_last, each with the bicubic weights of its own.
    """
    block_pw = next_power_of_2(PW)
    elements = 1024 if channels_last else 512
    block_c = max(16, min(next_power_of_2(max(C, 1)), elements // block_pw, 256))
    num_warps = max(1, min(4, 4 * block_pw * block_c // elements))
    if channels_last:
        max_registers = 104 if item_bytes >= 4 else 96
    else:
        max_registers = 96 if cubic is None else 144
    return SlopeTile(block_pw, block_c, num_warps, max_registers)


def _launch(
    out_grad: Tensor,
    features: Sequence[Tensor],
    boxes: Tensor,
    valid: Tensor | None,
    geometry: RoIGeometry,
) -> Tensor:
    """Gradient to the corners of each box: [K, 4]."""
    K, C, PH, PW = out_grad.shape
    if not out_grad.numel() or not any(f.numel() for f in features):
        return boxes.new_zeros(K, 4)
    channels_last = all(f.stride(1) == 1 for f in features)
    tile = pick_slope_tile(C, PW, out_grad.element_size(), channels_last, geometry.cubic)
    blocks = PH * cdiv(C, tile.block_c)
    sums = torch.empty((K, blocks, 4), dtype=boxes.dtype, device=boxes.device)
    with on_device(out_grad):
        _box_gradient_kernel[(K * blocks,)](
            sums_ptr=sums,
            out_grad_ptr=out_grad,
            feature_ptrs=tuple(features),
            C=C,
            out_grad_strides=tuple(out_grad.stride()),
            feature_strides=tuple(tuple(f.stride()) for f in features),
            PH=PH,
            PW=PW,
            BLOCK_PW=tile.block_pw,
            BLOCK_C=tile.block_c,
            FEATURE_STRIDE_C_IS_1=channels_last,
            OUT_GRAD_STRIDE_C_IS_1=out_grad.stride(1) == 1,
            GROUP=16 // features[0].element_size() if channels_last else 1,
            ACC=tl.float64 if boxes.dtype == torch.float64 else tl.float32,
            num_warps=tile.num_warps,
            # A fused coord * scale - 0.5 would round differently from the forward, and an adaptive grid with it.
            enable_fp_fusion=False,
            **box_arguments(boxes, valid, features[0].shape[0]),
            **side_arguments(features),
            **geometry.launch_arguments(),
            **({} if torch.version.hip else {"maxnreg": tile.max_registers}),  # an option of NVIDIA's compiler
        )
    return sums.sum(1)


@custom_op("multiscale_roi_align_backward_boxes")
def multiscale_roi_align_backward_boxes(
    out_grad: Tensor,
    features: Sequence[Tensor],
    boxes: Tensor,
    valid: Tensor | None,
    scales: Sequence[float],
    thresholds: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    cubic: float | None,
) -> Tensor:
    """Gradient of `multiscale_roi_align` to its boxes, of their shape and dtype; 0 to the index of boxes [K, 5]."""
    geometry = RoIGeometry.unflatten(scales, thresholds, sampling_ratio, aligned, cubic)
    gradient = _launch(out_grad, features, boxes, valid, geometry)
    return gradient.view(boxes.shape) if boxes.dim() == 3 else F.pad(gradient, (1, 0))


multiscale_roi_align_backward_boxes.register_autograd(no_second_derivative("roi_align, multiscale_roi_align"))


@multiscale_roi_align_backward_boxes.register_fake
def _(out_grad, features, boxes, valid, *geometry):
    return torch.empty(boxes.shape, dtype=boxes.dtype, device=boxes.device)
