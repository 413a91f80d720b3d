"""Gradient of RoIAlign's max to the features, in gather form: no atomics, the same bits from run to run.

The forward kept the largest sample of each bin, in each channel another. A program owns a tile of cells of one level of
one image and a block of channels, goes through the boxes that touch the tile in the order of their index, and through
those of their bins that can. Each bin adds its gradient to the cells of the tile, weighted as the taps of the kept
sample. The sums stay in registers and are written once, in their final dtype.

Which boxes touch a tile stands in the bit mask of `touch`, written first. Letters as in `reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....backend import no_second_derivative
from ....common.kernels.boxes import load_box
from ....common.kernels.numbers import lowest_bit
from ....common.kernels.pyramid import of_level, strides_of_level
from ....common.kernels.roi_axis import axis, samples_a_row, tap_weight, window
from ....common.launch import cdiv, launch_known, next_power_of_2
from ....common.roi_geometry import RoIGeometry
from ....namespace import custom_op
from .backward import empty_gradients
from .touch import bins_near, mark_tiles, tile_place


@triton.jit
def _weights(bin_start, grid, step, sample, cells, length, SAMPLING_RATIO: tl.constexpr, CUBIC: tl.constexpr):
    """Weight of `cells` [L] in `sample` [C] of a bin, which counts from the first that the forward visits: [L, C]."""
    first, _ = window(bin_start, step, grid, length, SAMPLING_RATIO)
    at = bin_start + (first + sample.to(cells.dtype) + 0.5) * step
    at = tl.minimum(tl.maximum(at, 0.0), length - 1.0)
    return tap_weight(at[None, :], cells[:, None], length, CUBIC)


@triton.jit(do_not_specialize=["num_images", "boxes_an_image", "num_tiles", "num_words"])
def _max_gather_kernel(
    grad_ptrs,  # one [N, C, H, W] a level, any strides
    out_grad_ptr,  # [K, C, PH, PW], any strides
    index_ptr,  # int8 or int32 [K, C, PH, PW], any strides
    touch_ptr,
    boxes_ptr,  # [N, P, 4] or [K, 5], contiguous
    valid_ptr,  # [N, P] bytes
    num_images,
    boxes_an_image,
    C,
    heights,
    widths,
    scales,
    tiles_across,
    first_tiles,
    num_tiles,
    num_words,
    out_grad_strides,  # (k, c, h, w)
    index_strides,  # (k, c, h, w)
    grad_strides,  # (n, c, h, w) a level
    PH: tl.constexpr,
    PW: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    SAMPLING_RATIO: tl.constexpr,
    CUBIC: tl.constexpr,  # None: bilinear
    ALIGNED: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_VALID: tl.constexpr,
    GRAD_STRIDE_C_IS_1: tl.constexpr,
    OUT_GRAD_STRIDE_C_IS_1: tl.constexpr,
    INDEX_STRIDE_C_IS_1: tl.constexpr,
    ACC: tl.constexpr,
):
    blocks_c = tl.cdiv(C, BLOCK_C)
    offs_c = ((tl.program_id(0) % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    mask_c = offs_c < C
    tile = tl.program_id(0) // blocks_c % num_tiles
    n = (tl.program_id(0) // blocks_c // num_tiles).to(tl.int64)
    level, top, left = tile_place(tile, tiles_across, first_tiles, TILE_H, TILE_W, NUM_LEVELS)
    H, W = of_level(level, heights, NUM_LEVELS), of_level(level, widths, NUM_LEVELS)
    scale = of_level(level, scales, NUM_LEVELS)
    offs_y, offs_x = top + tl.arange(0, TILE_H), left + tl.arange(0, TILE_W)
    cells_y, cells_x = offs_y.to(ACC), offs_x.to(ACC)
    # The compiler cannot see these ones in the strides, and needs them for wide loads; so with the stores below.
    out_channels = offs_c if OUT_GRAD_STRIDE_C_IS_1 else offs_c * out_grad_strides[1]
    index_channels = offs_c if INDEX_STRIDE_C_IS_1 else offs_c * index_strides[1]

    sums = tl.zeros((TILE_H, TILE_W, BLOCK_C), ACC)
    touch_ptr += (n * num_tiles + tile) * num_words
    word = tl.full((), 0, tl.int32)
    while word < num_words:
        # 32 bits in an int64: no sign to mind.
        bits = tl.load(touch_ptr + word).to(tl.int64) & 0xFFFFFFFF
        while bits != 0:
            place, bits = lowest_bit(bits)
            k = (word * 32 + place).to(tl.int64)
            if PADDED:
                k += n * boxes_an_image
            x1, y1, x2, y2, _, _ = load_box(boxes_ptr, valid_ptr, k, num_images, boxes_an_image, PADDED, HAS_VALID)
            start_y, bin_h, grid_h, step_y = axis(y1, y2, scale, PH, ALIGNED, SAMPLING_RATIO)
            start_x, bin_w, grid_w, step_x = axis(x1, x2, scale, PW, ALIGNED, SAMPLING_RATIO)
            ph, past_ph = bins_near(start_y, step_y, grid_h, top, top + TILE_H - 1, PH, CUBIC)
            first_pw, past_pw = bins_near(start_x, step_x, grid_w, left, left + TILE_W - 1, PW, CUBIC)
            while ph < past_ph:
                out_row = out_grad_ptr + k * out_grad_strides[0] + ph.to(tl.int64) * out_grad_strides[2]
                index_row = index_ptr + k * index_strides[0] + ph.to(tl.int64) * index_strides[2]
                pw = first_pw
                while pw < past_pw:
                    at = pw.to(tl.int64)
                    kept = tl.load(index_row + at * index_strides[3] + index_channels, mask=mask_c, other=-1)
                    grad = tl.load(out_row + at * out_grad_strides[3] + out_channels, mask=mask_c, other=0.0)
                    kept = kept.to(tl.int32)
                    grad = tl.where(kept >= 0, grad.to(ACC), 0.0)
                    row, column = kept // samples_a_row(SAMPLING_RATIO), kept % samples_a_row(SAMPLING_RATIO)
                    bin_y, bin_x = start_y + ph.to(ACC) * bin_h, start_x + pw.to(ACC) * bin_w
                    wy = _weights(bin_y, grid_h, step_y, row, cells_y, H, SAMPLING_RATIO, CUBIC)  # [TILE_H, BLOCK_C]
                    wx = _weights(bin_x, grid_w, step_x, column, cells_x, W, SAMPLING_RATIO, CUBIC)  # [TILE_W, BLOCK_C]
                    sums = tl.fma((wy * grad[None, :])[:, None, :], wx[None, :, :], sums)
                    pw += 1
                ph += 1
        word += 1

    grad_ptr = of_level(level, grad_ptrs, NUM_LEVELS)
    stride_n, stride_c, stride_h, stride_w = strides_of_level(level, grad_strides, NUM_LEVELS)
    channels = offs_c if GRAD_STRIDE_C_IS_1 else offs_c * stride_c
    cells = (offs_y.to(tl.int64) * stride_h)[:, None] + (offs_x.to(tl.int64) * stride_w)[None, :]
    mask = ((offs_y < H)[:, None] & (offs_x < W)[None, :])[:, :, None] & mask_c[None, None, :]
    at = grad_ptr + n * stride_n + cells[:, :, None] + channels[None, None, :]
    tl.store(at, sums.to(grad_ptr.dtype.element_ty), mask=mask)


class GatherTile(NamedTuple):
    """Launch parameters: cells and channels of one program, its warps, and the most registers of a thread."""

    height: int
    width: int
    block_c: int
    num_warps: int
    max_registers: int


def pick_gather_tile(C: int, channels_last: bool, cubic: float | None) -> GatherTile:
    """One warp with 32 sums a thread: it loads a bin in 16 bytes a thread and waits for no other warp.

    Without channels_last every element of a bin is a load of its own: fewer channels and more cells, whose rows are
    then 32 bytes or more. The registers are those of 16 and 14 programs on an SM; left alone, the assembler spills a
    few of bicubic weights to have two more.
    """
    block_c = max(16, next_power_of_2(max(C, 1)))
    registers = 128 if cubic is None else 144
    if channels_last:
        return GatherTile(2, 2, min(block_c, 256), 1, registers)
    return GatherTile(4, 16, min(block_c, 16), 1, registers)


def _launch(
    grads: Sequence[Tensor],
    out_grad: Tensor,
    index: Tensor,
    boxes: Tensor,
    valid: Tensor | None,
    geometry: RoIGeometry,
) -> None:
    """Fill `grads` (one [N, C, H, W] a level, uninitialised) from `out_grad` and `index` [K, C, PH, PW]."""
    _, C, PH, PW = out_grad.shape
    channels_last = all(g.stride(1) == 1 for g in grads)
    tile = pick_gather_tile(C, channels_last, geometry.cubic)
    tensors, shared = mark_tiles(grads, boxes, valid, (PH, PW), (tile.height, tile.width), geometry)

    def plan() -> tuple[tuple[int], dict[str, Any]]:
        arguments = shared()
        return (grads[0].shape[0] * arguments["num_tiles"] * cdiv(C, tile.block_c),), {
            "C": C,
            "out_grad_strides": tuple(out_grad.stride()),
            "index_strides": tuple(index.stride()),
            "grad_strides": tuple(tuple(g.stride()) for g in grads),
            "BLOCK_C": tile.block_c,
            "GRAD_STRIDE_C_IS_1": channels_last,
            "OUT_GRAD_STRIDE_C_IS_1": out_grad.stride(1) == 1,
            "INDEX_STRIDE_C_IS_1": index.stride(1) == 1,
            "ACC": tl.float64 if out_grad.dtype == torch.float64 else tl.float32,
            "num_warps": tile.num_warps,
            **({} if torch.version.hip else {"maxnreg": tile.max_registers}),  # an option of NVIDIA's compiler
            **arguments,
        }

    tensors = {"grad_ptrs": tuple(grads), "out_grad_ptr": out_grad, "index_ptr": index, **tensors}
    launch_known(_max_gather_kernel, tensors, (geometry, tile), plan)


@custom_op("multiscale_roi_align_max_backward")
def multiscale_roi_align_max_backward(
    out_grad: Tensor,
    index: Tensor,
    boxes: Tensor,
    valid: Tensor | None,
    num_images: int,
    heights: Sequence[int],
    widths: Sequence[int],
    channels_last: bool,
    scales: Sequence[float],
    thresholds: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    cubic: float | None,
) -> list[Tensor]:
    """Gradient of `multiscale_roi_align_max` to each level [N, C, H, W], summed in fp32, in the dtype of `out_grad`."""
    grads = empty_gradients(out_grad, num_images, heights, widths, channels_last)
    if any(g.numel() for g in grads):
        geometry = RoIGeometry.unflatten(scales, thresholds, sampling_ratio, aligned, cubic)
        _launch(grads, out_grad, index, boxes, valid, geometry)
    return grads


multiscale_roi_align_max_backward.register_autograd(no_second_derivative("roi_align, multiscale_roi_align"))


@multiscale_roi_align_max_backward.register_fake
def _(out_grad, index, boxes, valid, num_images, heights, widths, channels_last, *geometry):
    return empty_gradients(out_grad, num_images, heights, widths, channels_last)
