"""Gradient of RoIAlign to the features, in gather form: no atomics, the same bits from run to run.

The mean of bilinear or bicubic samples is separable, out = Wy F Wx^T, so dF = sum over boxes of Wy^T G Wx. A program
owns a tile of cells of one level of one image and a block of channels, goes through the boxes that touch the tile in
the order of their index, keeps the sum in registers and writes each gradient once, in its final dtype. A few rows of
bins at a time are spread over the tile by one product, [cells, bins] x [bins, channels], whose weights are Wy times Wx;
only rows of bins that can reach the tile are read.

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
from ....common.kernels.numbers import lowest_bit, weighted_sum
from ....common.kernels.pyramid import of_level, strides_of_level
from ....common.kernels.roi_axis import axis, tap_weight
from ....common.launch import cdiv, empty_map, is_channels_last, launch_known, next_power_of_2
from ....common.roi_geometry import RoIGeometry
from ....namespace import custom_op
from .touch import WORDS, bins_near, load_words, mark_tiles, tile_place, word_at

MIN_BINS = 16  # the least inner side of a product

# Terms of the gradient's dtype that add up to a float32 weight, and a power of two that the weights are multiplied by
# and the sums divided by: a float16 below 2^-14 has fewer bits, and a sample of a large adaptive grid weighs less.
WEIGHTS = {torch.bfloat16: (2, 1.0), torch.float16: (2, 4096.0)}


@triton.jit
def _axis_weights(start, bin_size, grid, step, bins, cells, length, SAMPLING_RATIO: tl.constexpr, CUBIC: tl.constexpr):
    """Sum over the samples of `bins` of their weight on `cells` (broadcast together), not yet divided by the grid.

    With an adaptive grid only the samples near a cell are visited: at most 5, or 6 bicubic ones, as in `reference`.
    """
    reach: tl.constexpr = 1.0 if CUBIC is None else 2.0
    bin_start = start + bins * bin_size
    if SAMPLING_RATIO > 0:
        first = tl.zeros_like(bin_start + cells)
        candidates: tl.constexpr = SAMPLING_RATIO
    else:
        first = tl.floor((cells - reach - bin_start) / tl.where(step != 0, step, 1.0) - 0.5)
        first = tl.maximum(tl.minimum(first, grid - 1.0), 0.0)
        candidates: tl.constexpr = 5 if CUBIC is None else 6
    total = tl.zeros_like(first)
    for i in range(candidates):
        index = first + i
        at = bin_start + (index + 0.5) * step
        inside = (at >= -1.0) & (at <= length) & (index < grid)
        at = tl.minimum(tl.maximum(at, 0.0), length - 1.0)
        total += tl.where(inside, tap_weight(at, cells, length, CUBIC), 0.0)
    return total


@triton.jit(do_not_specialize=["num_images", "boxes_an_image", "num_tiles", "num_words"])
def _gather_kernel(
    grad_ptrs,  # one [N, C, H, W] a level, any strides
    out_grad_ptr,  # [K, C, PH, PW], any strides
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
    grad_strides,  # (n, c, h, w) a level
    PH: tl.constexpr,
    PW: tl.constexpr,
    BLOCK_PH: tl.constexpr,
    BLOCK_PW: tl.constexpr,
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
    WEIGHT_TERMS: tl.constexpr,
    WEIGHT_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    OFFSET: tl.constexpr,  # int64 where an offset in a box or in a tile needs it; int32 takes half the registers
    ACC: tl.constexpr,
):
    blocks_c = tl.cdiv(C, BLOCK_C)
    first_c = (tl.program_id(0) % blocks_c).to(tl.int64) * BLOCK_C
    offs_c = first_c + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    tile = tl.program_id(0) // blocks_c % num_tiles
    n = (tl.program_id(0) // blocks_c // num_tiles).to(tl.int64)
    level, top, left = tile_place(tile, tiles_across, first_tiles, TILE_H, TILE_W, NUM_LEVELS)
    H, W = of_level(level, heights, NUM_LEVELS), of_level(level, widths, NUM_LEVELS)
    scale = of_level(level, scales, NUM_LEVELS)
    offs_y, offs_x = top + tl.arange(0, TILE_H), left + tl.arange(0, TILE_W)
    cells_y, cells_x = offs_y.to(ACC), offs_x.to(ACC)
    offs_ph, offs_pw = tl.arange(0, BLOCK_PH), tl.arange(0, BLOCK_PW)
    mask_pw = offs_pw < PW
    # Bins of BLOCK_PH rows of a box, row by row: the inner side of the product.
    offs_bin = tl.arange(0, BLOCK_PH * BLOCK_PW)
    bin_row, bin_column = offs_bin // BLOCK_PW, offs_bin % BLOCK_PW
    # The compiler cannot see this one in the strides, and needs it for wide loads; so with the stores below.
    out_channels = offs_c.to(OFFSET) if OUT_GRAD_STRIDE_C_IS_1 else offs_c.to(OFFSET) * out_grad_strides[1]
    bin_offsets = bin_row.to(OFFSET) * out_grad_strides[2] + bin_column.to(OFFSET) * out_grad_strides[3]
    chunk = bin_offsets[:, None] + out_channels[None, :]

    sums = tl.zeros((TILE_H * TILE_W, BLOCK_C), ACC)
    tile_ptr = touch_ptr + (n * num_tiles + tile) * num_words
    first_word = tl.full((), 0, tl.int32)
    while first_word < num_words:
        words, marked = load_words(tile_ptr, first_word, num_words)
        while marked != 0:
            word, marked = lowest_bit(marked)
            bits = word_at(words, word)
            while bits != 0:
                place, bits = lowest_bit(bits)
                k = ((first_word + word) * 32 + place).to(tl.int64)
                if PADDED:
                    k += n * boxes_an_image
                x1, y1, x2, y2, _, _ = load_box(boxes_ptr, valid_ptr, k, num_images, boxes_an_image, PADDED, HAS_VALID)
                start_y, bin_h, grid_h, step_y = axis(y1, y2, scale, PH, ALIGNED, SAMPLING_RATIO)
                start_x, bin_w, grid_w, step_x = axis(x1, x2, scale, PW, ALIGNED, SAMPLING_RATIO)
                weights_x = _axis_weights(
                    start_x, bin_w, grid_w, step_x, offs_pw.to(ACC)[None, :], cells_x[:, None], W, SAMPLING_RATIO, CUBIC
                )  # [TILE_W, BLOCK_PW]
                weights_x = tl.where(mask_pw[None, :], weights_x, 0.0)
                share = WEIGHT_SCALE / tl.maximum(grid_h * grid_w, 1.0)
                ph, past = bins_near(start_y, step_y, grid_h, top, top + TILE_H - 1, PH, CUBIC)
                while ph < past:
                    weights_y = share * _axis_weights(
                        start_y,
                        bin_h,
                        grid_h,
                        step_y,
                        (ph + offs_ph).to(ACC)[None, :],
                        cells_y[:, None],
                        H,
                        SAMPLING_RATIO,
                        CUBIC,
                    )  # [TILE_H, BLOCK_PH]
                    weights = weights_y[:, None, :, None] * weights_x[None, :, None, :]
                    weights = tl.reshape(weights, (TILE_H * TILE_W, BLOCK_PH * BLOCK_PW))
                    row_ptr = out_grad_ptr + k * out_grad_strides[0] + ph.to(tl.int64) * out_grad_strides[2]
                    mask = (bin_column < PW) & (ph + bin_row < past)
                    bins = tl.load(row_ptr + chunk, mask=mask[:, None] & mask_c[None, :], other=0.0)
                    sums = weighted_sum(weights, bins, sums, WEIGHT_TERMS, PRECISION)
                    ph += BLOCK_PH
        first_word += WORDS

    grad_ptr = of_level(level, grad_ptrs, NUM_LEVELS)
    stride_n, stride_c, stride_h, stride_w = strides_of_level(level, grad_strides, NUM_LEVELS)
    corner = grad_ptr + n * stride_n + top * stride_h + left * stride_w
    corner += first_c * (1 if GRAD_STRIDE_C_IS_1 else stride_c)
    channels = tl.arange(0, BLOCK_C).to(OFFSET)
    if not GRAD_STRIDE_C_IS_1:
        channels *= stride_c.to(OFFSET)
    cells_down = tl.arange(0, TILE_H).to(OFFSET) * stride_h.to(OFFSET)
    cells = cells_down[:, None] + (tl.arange(0, TILE_W).to(OFFSET) * stride_w.to(OFFSET))[None, :]
    mask = ((offs_y < H)[:, None] & (offs_x < W)[None, :])[:, :, None] & mask_c[None, None, :]
    at = corner + (cells[:, :, None] + channels[None, None, :])
    sums = tl.reshape(sums * (1.0 / WEIGHT_SCALE), (TILE_H, TILE_W, BLOCK_C))
    tl.store(at, sums.to(grad_ptr.dtype.element_ty), mask=mask)


class GatherTile(NamedTuple):
    """Launch parameters of the gather."""

    height: int  # cells of a program
    width: int
    block_c: int  # channels of a program
    rows: int  # of bins of a box that one product adds, and more if they are short of 16 bins
    num_warps: int
    max_registers: int  # of a thread


def pick_gather_tile(C: int, item_bytes: int, channels_last: bool) -> GatherTile:
    """4 x 16 cells are the 64 rows of Hopper's tensor core product; 256 bytes of channels.

    Wider tiles read a row of bins less often, but leave room for fewer programs on an SM. In channels_last a float32
    product takes 2 warps: with 4 the compiler picks Hopper's own, which wants the bins transposed, 4 bytes a store.
    168 registers are those of 3 programs of 4 warps; half precision without channels_last needs more, or spills.
    """
    block_c = max(16, min(next_power_of_2(max(C, 1)), 256 // item_bytes))
    if item_bytes == 2:
        num_warps, registers = 4, 168 if channels_last else 255
    else:
        num_warps, registers = (2, 255) if channels_last else (4, 168)
    return GatherTile(4, 16, block_c, 2, num_warps, registers)


def _span(x: Tensor, limits: Sequence[int]) -> int:
    """Return the offset of the last element of the first `limits` of `x`, in elements."""
    return sum((min(side, most) - 1) * step for side, most, step in zip(x.shape, limits, x.stride(), strict=True))


def _launch(
    grads: Sequence[Tensor],
    out_grad: Tensor,
    boxes: Tensor,
    valid: Tensor | None,
    geometry: RoIGeometry,
) -> None:
    """Fill `grads` (one [N, C, H, W] a level, uninitialised) from `out_grad` [K, C, PH, PW]."""
    _, C, PH, PW = out_grad.shape
    channels_last = all(g.stride(1) == 1 for g in grads)
    tile = pick_gather_tile(C, out_grad.element_size(), channels_last)
    tensors, shared = mark_tiles(grads, boxes, valid, (PH, PW), (tile.height, tile.width), geometry)

    def plan() -> tuple[tuple[int], dict[str, Any]]:
        arguments, block_pw = shared(), next_power_of_2(PW)
        # The farthest offset in a box, and in the cells and channels of a program.
        cells = (1, tile.block_c, tile.height, tile.width)
        spans = [_span(out_grad, (1, C, PH, PW)), *(_span(g, cells) for g in grads)]
        terms, weight_scale = WEIGHTS.get(out_grad.dtype, (1, 1.0))
        return (grads[0].shape[0] * arguments["num_tiles"] * cdiv(C, tile.block_c),), {
            "C": C,
            "out_grad_strides": tuple(out_grad.stride()),
            "grad_strides": tuple(tuple(g.stride()) for g in grads),
            "BLOCK_PH": max(tile.rows, MIN_BINS // block_pw),
            "BLOCK_PW": block_pw,
            "BLOCK_C": tile.block_c,
            "GRAD_STRIDE_C_IS_1": channels_last,
            "OUT_GRAD_STRIDE_C_IS_1": out_grad.stride(1) == 1,
            "WEIGHT_TERMS": terms,
            "WEIGHT_SCALE": weight_scale,
            "PRECISION": "ieee" if torch.version.hip else "tf32x3",
            "OFFSET": tl.int32 if max(spans) < 2**31 else tl.int64,
            "ACC": tl.float64 if out_grad.dtype == torch.float64 else tl.float32,
            "num_warps": tile.num_warps,
            **({} if torch.version.hip else {"maxnreg": tile.max_registers}),  # an option of NVIDIA's compiler
            **arguments,
        }

    tensors = {"grad_ptrs": tuple(grads), "out_grad_ptr": out_grad, **tensors}
    launch_known(_gather_kernel, tensors, (geometry, tile), plan)


@custom_op("multiscale_roi_align_backward")
def multiscale_roi_align_backward(
    out_grad: Tensor,
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
    """Gradient of `multiscale_roi_align` to each level [N, C, H, W], summed in fp32, in the dtype of `out_grad`."""
    grads = empty_gradients(out_grad, num_images, heights, widths, channels_last)
    if any(g.numel() for g in grads):
        geometry = RoIGeometry.unflatten(scales, thresholds, sampling_ratio, aligned, cubic)
        _launch(grads, out_grad, boxes, valid, geometry)
    return grads


multiscale_roi_align_backward.register_autograd(no_second_derivative("roi_align, multiscale_roi_align"))


@multiscale_roi_align_backward.register_fake
def _(out_grad, boxes, valid, num_images, heights, widths, channels_last, *geometry):
    return empty_gradients(out_grad, num_images, heights, widths, channels_last)


def shapes(features: Sequence[Tensor]) -> tuple[int, list[int], list[int], bool]:
    """What `empty_gradients` must know of the features: their number, heights and widths, and their layout."""
    heights, widths = [f.shape[2] for f in features], [f.shape[3] for f in features]
    return features[0].shape[0], heights, widths, is_channels_last(features)


def empty_gradients(
    out_grad: Tensor, num_images: int, heights: Sequence[int], widths: Sequence[int], channels_last: bool
) -> list[Tensor]:
    """Uninitialised, one [N, C, H, W] a level, in the dtype of `out_grad`."""
    C = out_grad.shape[1]
    return [empty_map((num_images, C, H, W), out_grad, channels_last) for H, W in zip(heights, widths, strict=True)]
