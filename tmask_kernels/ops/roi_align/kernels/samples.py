"""Jit functions that the kernels of RoIAlign share: a box on its map, the samples of its bins, values of the map.

A program of the forward goes through some blocks of bins of one box, with a block of channels. It works on a tile
[B, G, L]: B bins of a block, and G groups of L neighbouring channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....common.kernels.boxes import is_finite, load_box
from ....common.kernels.pyramid import level_index, of_level, strides_of_level
from ....common.kernels.roi_axis import axis, cubic_tap, taps, window


@triton.jit
def load_roi(
    boxes_ptr,  # [N, P, 4] or [K, 5], contiguous
    valid_ptr,  # [N, P] bytes
    k,
    num_images,
    boxes_an_image,
    feature_ptrs,  # one [N, C, H, W] a level, any strides
    heights,
    widths,
    feature_strides,  # (n, c, h, w) a level
    scales,
    thresholds,
    NUM_LEVELS: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """Return the corners of box k, whether to pool it, and its level's scale, image, (H, W) and strides (c, h, w)."""
    x1, y1, x2, y2, image, usable = load_box(boxes_ptr, valid_ptr, k, num_images, boxes_an_image, PADDED, HAS_VALID)
    level = level_index(x1, y1, x2, y2, thresholds, NUM_LEVELS)
    scale = of_level(level, scales, NUM_LEVELS)
    H = tl.cast(of_level(level, heights, NUM_LEVELS), tl.int32)
    W = tl.cast(of_level(level, widths, NUM_LEVELS), tl.int32)
    stride_n, stride_c, stride_h, stride_w = strides_of_level(level, feature_strides, NUM_LEVELS)
    # Scaled by more than 1 a box may overflow; a level may have no cells.
    usable &= is_finite(x1 * scale, y1 * scale, x2 * scale, y2 * scale) & (H > 0) & (W > 0)
    image_ptr = of_level(level, feature_ptrs, NUM_LEVELS) + image * stride_n
    return (x1, y1, x2, y2), usable, scale, image_ptr, (H, W), (stride_c, stride_h, stride_w)


@triton.jit
def blocks_of_program(blocks_a_program, C, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BINS: tl.constexpr):
    """Return the first block of bins of this program, and the one after its last; its box; and its first channel.

    Programs that read the same box and cells run next to one another.
    """
    num_blocks: tl.constexpr = (BINS + BLOCK - 1) // BLOCK
    programs_a_box = tl.cdiv(num_blocks, blocks_a_program)
    first = tl.program_id(0) % programs_a_box * blocks_a_program
    past = tl.minimum(first + blocks_a_program, num_blocks)
    per_c = tl.num_programs(0) // tl.cdiv(C, BLOCK_C)
    first_c = tl.program_id(0) // per_c * BLOCK_C
    return first, past, (tl.program_id(0) % per_c // programs_a_box).to(tl.int64), first_c


@triton.jit
def bins_of_block(
    block, PH: tl.constexpr, PW: tl.constexpr, BLOCK: tl.constexpr, TILE_BINS: tl.constexpr, EACH: tl.constexpr
):
    """Return the rows and columns of the bins of a block, each EACH times, and which of them exist: [TILE_BINS * EACH].

    A bin that does not exist has the place of the last one.
    """
    place = tl.arange(0, TILE_BINS * EACH) // EACH
    bins = block * BLOCK + tl.minimum(place, BLOCK - 1)
    mask = (place < BLOCK) & (bins < PH * PW)
    bins = tl.minimum(bins, PH * PW - 1)
    return bins // PW, bins % PW, mask


@triton.jit
def channel_offsets(stride, GROUPS: tl.constexpr, GROUP_C: tl.constexpr, STRIDE_IS_1: tl.constexpr):
    """Return the channels of a program counted from its first, and their offsets: int64 [1, GROUPS, GROUP_C].

    All in int64, so that the compiler puts the distance of a group into the instruction. It cannot see in `stride` that
    it is 1, and needs that for wide loads and stores.
    """
    group, place = tl.arange(0, GROUPS).to(tl.int64), tl.arange(0, GROUP_C).to(tl.int64)
    channels = (group[:, None] * GROUP_C + place[None, :])[None, :, :]
    return channels, channels if STRIDE_IS_1 else channels * stride


@triton.jit
def place_to_read(
    base, strides, left, GROUPS: tl.constexpr, GROUP_C: tl.constexpr, STRIDE_IS_1: tl.constexpr, PAIRS: tl.constexpr
):
    """Return what the loads of a program take: pointer, strides (h, w), offsets of channels, and which of them exist.

    base: pointer to the first channel of an image; strides (c, h, w); left: channels from the first to the last.
    PAIRS: these are of pairs of channels, as int32.
    """
    _, stride_h, stride_w = strides
    if PAIRS:
        base = base.to(tl.pointer_type(tl.int32))
        channels, offsets = channel_offsets(1, GROUPS, GROUP_C // 2, True)
        stride_h, stride_w, left = stride_h // 2, stride_w // 2, left // 2
    else:
        channels, offsets = channel_offsets(strides[0], GROUPS, GROUP_C, STRIDE_IS_1)
    return base, (stride_h, stride_w), offsets, channels < left


@triton.jit
def samples_along(low, high, scale, usable, bins, mask, num_bins, length, ALIGNED: tl.constexpr, RATIO: tl.constexpr):
    """Return the samples of `bins` [B] of a box from `low` to `high`, along an axis of `length` cells.

    Returns:
        starts [B], the step and the grid of the samples: sample i is at start + (i + 0.5) * step, 0 <= i < grid; the
        first sample to visit in each bin [B]; how many to visit in the bins of `mask`, a whole number, 0 if the box is
        not `usable`; and whether all samples of the box, not of these bins alone, lie in the map.
    """
    start, bin_size, grid, step = axis(low, high, scale, num_bins, ALIGNED, RATIO)
    starts = start + bins * bin_size
    first, counts = window(starts, step, grid, length, RATIO)
    if RATIO > 0:
        number = tl.where(usable, RATIO, 0)
    else:
        number = tl.where(usable, tl.max(tl.where(mask, counts, 0.0), 0), 0.0).to(tl.int32)
    # Rounding keeps the order of samples, so those at the two ends speak for all.
    one_end = start + 0.5 * step
    other_end = start + (num_bins - 1.0) * bin_size + (grid - 0.5) * step
    inside = (tl.minimum(one_end, other_end) >= -1.0) & (tl.maximum(one_end, other_end) <= length)
    return starts, step, grid, first, number, inside


@triton.jit
def load_values(ptrs, mask, ACC: tl.constexpr, PAIRS: tl.constexpr):
    """Load values of a map [B, G, L] as ACC, 0 where `mask` is false; a mask of None loads all.

    PAIRS: `ptrs` [B, G, L / 2] point at pairs of bfloat16. A bfloat16 is the upper half of a float32.
    """
    if mask is None:
        values = tl.load(ptrs)
    else:
        values = tl.load(ptrs, mask=mask, other=0)
    if PAIRS:
        low = (values << 16).to(tl.float32, bitcast=True)
        high = (values & -65536).to(tl.float32, bitcast=True)
        values = tl.reshape(tl.join(low, high), (values.shape[0], values.shape[1], values.shape[2] * 2))
    else:
        values = values.to(ACC)
    return values


@triton.jit
def load_corners(base, channels, y, x, size, strides, mask, ACC: tl.constexpr, PAIRS: tl.constexpr):
    """Load the cells around a sample of each bin, at clamped y and x [B]: two above, two below, [B, G, L] each.

    Also return the weights of the lower row and of the right column, [B] each.
    """
    y_low, y_high, ly = taps(y, size[0])
    x_low, x_high, lx = taps(x, size[1])
    row_low, row_high = base + y_low * strides[0], base + y_high * strides[0]
    left, right = x_low * strides[1], x_high * strides[1]
    v00 = load_values((row_low + left)[:, None, None] + channels, mask, ACC, PAIRS)
    v01 = load_values((row_low + right)[:, None, None] + channels, mask, ACC, PAIRS)
    v10 = load_values((row_high + left)[:, None, None] + channels, mask, ACC, PAIRS)
    v11 = load_values((row_high + right)[:, None, None] + channels, mask, ACC, PAIRS)
    return v00, v01, v10, v11, ly, lx


@triton.jit
def add_bilinear(tile, base, channels, y, x, size, strides, mask, PAIRS: tl.constexpr):
    """Add to `tile` [B, G, L] a bilinear sample of each bin, at clamped y and x [B]."""
    v00, v01, v10, v11, ly, lx = load_corners(base, channels, y, x, size, strides, mask, tile.dtype, PAIRS)
    # Fusion is off for the sake of the coordinates; a sum may take it.
    tile = tl.fma(((1.0 - ly) * (1.0 - lx))[:, None, None], v00, tile)
    tile = tl.fma(((1.0 - ly) * lx)[:, None, None], v01, tile)
    tile = tl.fma((ly * (1.0 - lx))[:, None, None], v10, tile)
    return tl.fma((ly * lx)[:, None, None], v11, tile)


@triton.jit
def add_cubic(tile, base, channels, y, x, size, strides, mask, CUBIC: tl.constexpr, PAIRS: tl.constexpr):
    """Add to `tile` [B, G, L] a bicubic sample of each bin, at clamped y and x [B], a row of taps at a time.

    Four loads are under way at once, as many as of a bilinear sample.
    """
    for row in range(4):
        cell_y, weight_y = cubic_tap(y, row, size[0], CUBIC)
        row_ptr = base + cell_y * strides[0]
        for column in tl.static_range(4):
            cell_x, weight_x = cubic_tap(x, column, size[1], CUBIC)
            value = load_values((row_ptr + cell_x * strides[1])[:, None, None] + channels, mask, tile.dtype, PAIRS)
            tile = tl.fma((weight_y * weight_x)[:, None, None], value, tile)
    return tile


@triton.jit
def tap_along(at, tap, length, CUBIC: tl.constexpr):
    """Return the cell of a tap of a clamped sample, and its weight: of two taps, or of a bicubic sample's four."""
    if CUBIC is None:
        low, high, upper = taps(at, length)
        cell, weight = tl.where(tap == 0, low, high), tl.where(tap == 0, 1.0 - upper, upper)
    else:
        cell, weight = cubic_tap(at, tap, length, CUBIC)
    return cell, weight
