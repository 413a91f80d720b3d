"""Which boxes touch which tile of cells: what the gathers of RoIAlign's gradients walk through.

A gather's program owns a tile of cells of one level of one image. `mark_tiles` writes a bit for each tile and box of
its image, 32 boxes a word. A program takes the set bits of its tile one by one, and of each box the bins near the tile.
The gather of the mean loads 32 words at once; that of max, which works longer on each box, has no registers for that.
Letters as in `reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....common.kernels.boxes import is_finite, load_box
from ....common.kernels.pyramid import level_index, of_level
from ....common.kernels.roi_axis import axis, divide
from ....common.launch import box_arguments, box_tensors, cdiv, launch_known, side_arguments
from ....common.roi_geometry import RoIGeometry

WORD = 32  # boxes a word of the mask
WORDS = tl.constexpr(32)  # words of a tile that a gather loads at once
BLOCK_TILES = 32  # tiles that one program of the mask's launch tests


@triton.jit
def _reach(start, bin_size, bins, length, CUBIC: tl.constexpr):
    """First and last cell (floats) that the samples of a box can touch along an axis; first > last if none."""
    more: tl.constexpr = 0.0 if CUBIC is None else 1.0  # a tap on either side
    end = start + bins * bin_size
    low, high = tl.minimum(start, end), tl.maximum(start, end)
    slack = 0.01 + 1e-5 * (tl.abs(low) + tl.abs(high))  # more than rounding can move a sample
    low, high = low - slack, high + slack
    outside = (high < -1.0) | (low > length)
    first = tl.minimum(tl.maximum(tl.floor(low) - more, 0.0), length - 1.0)
    last = tl.minimum(tl.maximum(tl.floor(high) + 1.0 + more, 0.0), length - 1.0)
    return tl.where(outside, 1.0, first), tl.where(outside, 0.0, last)


@triton.jit(do_not_specialize=["num_images", "boxes_an_image", "num_tiles", "num_words"])
def _touch_kernel(
    touch_ptr,  # [N, num_tiles, num_words] int32: bit i of word w is box 32 w + i of the image
    boxes_ptr,
    valid_ptr,
    num_images,
    boxes_an_image,  # of boxes [K, 5] each image sees all K
    heights,  # these are floats, which Triton does not compile a new kernel for
    widths,
    scales,
    thresholds,
    tiles_across,
    first_tiles,  # of each level
    num_tiles,
    num_words,
    PH: tl.constexpr,
    PW: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_T: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    SAMPLING_RATIO: tl.constexpr,
    CUBIC: tl.constexpr,  # None: bilinear
    ALIGNED: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    blocks_t = tl.cdiv(num_tiles, BLOCK_T)
    n = (tl.program_id(0) // blocks_t // num_words).to(tl.int64)
    word = tl.program_id(0) // blocks_t % num_words
    offs = tl.arange(0, 32)
    box = word * 32 + offs
    k = tl.where(box < boxes_an_image, box, 0).to(tl.int64)
    if PADDED:
        k += n * boxes_an_image
    x1, y1, x2, y2, image, usable = load_box(boxes_ptr, valid_ptr, k, num_images, boxes_an_image, PADDED, HAS_VALID)
    level = level_index(x1, y1, x2, y2, thresholds, NUM_LEVELS)
    H = tl.zeros_like(x1) + of_level(level, heights, NUM_LEVELS)  # [32]
    W = tl.zeros_like(x1) + of_level(level, widths, NUM_LEVELS)
    scale = of_level(level, scales, NUM_LEVELS)
    usable &= (box < boxes_an_image) & (image == n) & (H > 0) & (W > 0)
    usable &= is_finite(x1 * scale, y1 * scale, x2 * scale, y2 * scale)
    start_y, bin_h, _, _ = axis(y1, y2, scale, PH, ALIGNED, SAMPLING_RATIO)
    start_x, bin_w, _, _ = axis(x1, x2, scale, PW, ALIGNED, SAMPLING_RATIO)
    first_y, last_y = _reach(start_y, bin_h, PH, H, CUBIC)
    first_x, last_x = _reach(start_x, bin_w, PW, W, CUBIC)

    tile = tl.program_id(0) % blocks_t * BLOCK_T + tl.arange(0, BLOCK_T)
    tile_level, top, left = tile_place(tile, tiles_across, first_tiles, TILE_H, TILE_W, NUM_LEVELS)
    top, left = top.to(tl.float32)[:, None], left.to(tl.float32)[:, None]
    touches = usable[None, :] & (tile_level[:, None] == level[None, :])  # [BLOCK_T, 32]
    touches &= (first_y[None, :] <= top + (TILE_H - 1)) & (last_y[None, :] >= top)
    touches &= (first_x[None, :] <= left + (TILE_W - 1)) & (last_x[None, :] >= left)
    bits = tl.sum(touches.to(tl.int32) << offs[None, :], 1)
    tl.store(touch_ptr + (n * num_tiles + tile) * num_words + word, bits, mask=tile < num_tiles)


@triton.jit
def load_words(tile_ptr, first, num_words):
    """Load the words of a tile from `first` on: [WORDS], and as bits of an int64 which of them are not 0."""
    offs = tl.arange(0, WORDS)
    words = tl.load(tile_ptr + first + offs, mask=first + offs < num_words, other=0)
    return words, tl.sum((words != 0).to(tl.int64) << offs, 0)


@triton.jit
def word_at(words, place):
    """Return the word at `place` of `words` [WORDS] as an int64: its 32 bits have no sign to mind."""
    return tl.sum(tl.where(tl.arange(0, WORDS) == place, words, 0), 0).to(tl.int64) & 0xFFFFFFFF


@triton.jit
def tile_place(tile, tiles_across, first_tiles, TILE_H: tl.constexpr, TILE_W: tl.constexpr, NUM_LEVELS: tl.constexpr):
    """Level of a tile, and its first row and column of cells."""
    level = tile * 0
    for i in tl.static_range(1, NUM_LEVELS):
        level += (tile.to(tl.float32) >= first_tiles[i]).to(tl.int32)
    within = tile - tl.cast(of_level(level, first_tiles, NUM_LEVELS), tl.int32)
    across = tl.cast(of_level(level, tiles_across, NUM_LEVELS), tl.int32)
    return level, within // across * TILE_H, within % across * TILE_W


@triton.jit
def bins_near(start, step, grid, low, high, bins: tl.constexpr, CUBIC: tl.constexpr):
    """Bins along an axis, first and past the last, of the samples that can touch the cells `low` to `high`.

    Samples of a fixed grid may be many cells apart, and most rows of bins then have none near a tile. Of an inverted
    box all bins are near.
    """
    reach: tl.constexpr = 1.0 if CUBIC is None else 2.0
    slack = 0.01 + 1e-5 * (tl.abs(start) + high)  # more than rounding can move a sample
    size = tl.where(step > 0, step, 1.0)
    first = tl.maximum(tl.ceil((low - reach - slack - start) / size - 0.5), 0.0)
    last = tl.minimum(tl.floor((high + reach + slack - start) / size - 0.5), bins * grid - 1.0)
    near = first <= last
    # A whole quotient has to come out whole.
    first, past = tl.floor(divide(first, grid)), tl.floor(divide(last, grid)) + 1.0
    first = tl.where(step > 0, tl.where(near, first, 0.0), 0.0)
    past = tl.where(step > 0, tl.where(near, past, 0.0), bins)
    return first.to(tl.int32), past.to(tl.int32)


def mark_tiles(
    grads: Sequence[Tensor],
    boxes: Tensor,
    valid: Tensor | None,
    output_size: tuple[int, int],
    tile_size: tuple[int, int],
    geometry: RoIGeometry,
) -> tuple[dict[str, Tensor], Callable[[], dict[str, Any]]]:
    """Launch the mask for tiles of `tile_size` cells.

    grads: one [N, C, H, W] a level, of which only the shapes count. Of no boxes the mask is empty, and not launched.

    Returns:
        The tensors that a gather's launch shares with it, and a function that returns the other arguments.
    """
    N, sides = grads[0].shape[0], tuple(g.shape[2:] for g in grads)
    tiles_across = [cdiv(width, tile_size[1]) for _, width in sides]
    counts = [cdiv(height, tile_size[0]) * across for (height, _), across in zip(sides, tiles_across, strict=True)]
    num_tiles, num_words = sum(counts), cdiv(boxes.shape[-2], WORD)
    touch = torch.empty((N, num_tiles, num_words), dtype=torch.int32, device=boxes.device)
    tensors = {"touch_ptr": touch, **box_tensors(boxes, valid)}

    def shared() -> dict[str, Any]:
        arguments = {
            "tiles_across": tuple(float(max(across, 1)) for across in tiles_across),
            "first_tiles": tuple(float(sum(counts[:i])) for i in range(len(counts))),
            "num_tiles": num_tiles,
            "num_words": num_words,
            "PH": output_size[0],
            "PW": output_size[1],
            "TILE_H": tile_size[0],
            "TILE_W": tile_size[1],
            # A fused coord * scale - 0.5 would round differently from the forward, and an adaptive grid with it.
            "enable_fp_fusion": False,
            **box_arguments(boxes, valid, N),
            **side_arguments(grads),
            **geometry.launch_arguments(),
        }
        del arguments["thresholds"]
        return arguments

    def plan() -> tuple[tuple[int], dict[str, Any]]:
        thresholds = geometry.launch_arguments()["thresholds"]
        grid = (N * num_words * cdiv(num_tiles, BLOCK_TILES),)
        return grid, {"thresholds": thresholds, "BLOCK_T": BLOCK_TILES, **shared()}

    if touch.numel():
        launch_known(_touch_kernel, tensors, (N, sides, output_size, tile_size, geometry, BLOCK_TILES), plan)
    return tensors, shared
