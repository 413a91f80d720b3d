"""What the RoIAlign kernels share: a box, its level, and its bins along an axis. Letters as in `reference`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def divide(a, b):
    """IEEE division: fp32 `/` is approximate and would move the ceil of an adaptive grid by one."""
    if a.dtype.is_fp64():
        return a / b
    else:
        return tl.math.div_rn(a, b)


@triton.jit
def axis(low_corner, high_corner, scale, bins, ALIGNED: tl.constexpr, SAMPLING_RATIO: tl.constexpr):
    """Along an axis, in cells: start of the box, size of a bin, samples in it (a float: it may be huge), their step."""
    shift: tl.constexpr = 0.5 if ALIGNED else 0.0
    start = low_corner * scale - shift
    size = high_corner * scale - shift - start
    if not ALIGNED:
        size = tl.maximum(size, 1.0)
    bin_size = divide(size, tl.zeros_like(size) + bins)
    if SAMPLING_RATIO > 0:
        grid = tl.zeros_like(size) + SAMPLING_RATIO
    else:
        grid = tl.ceil(bin_size)
    step = divide(bin_size, tl.where(grid > 0, grid, 1.0))
    return start, bin_size, grid, step


@triton.jit
def window(bin_start, step, grid, length, SAMPLING_RATIO: tl.constexpr):
    """First sample of a bin to visit, and how many: the adaptive grid of a huge box has most outside the map.

    With an adaptive grid samples are at least half a cell apart (or there is just one), so at most
    2 * (length + 1) + 1 fall inside [-1, length]; one more on either side absorbs rounding. So one of the samples
    beyond a border is visited, if there are any.
    """
    if SAMPLING_RATIO > 0:
        first = tl.zeros_like(bin_start)
        count = tl.zeros_like(bin_start) + SAMPLING_RATIO
    else:
        step = tl.where(step != 0, step, 1.0)  # 0 / 0 would be NaN
        first = tl.floor((-1.0 - bin_start) / step - 0.5) - 1
        first = tl.maximum(tl.minimum(first, grid - 1), 0.0)
        last = tl.ceil((length - bin_start) / step - 0.5) + 1
        count = tl.maximum(tl.minimum(last, grid - 1) - first + 1, 0.0)
    return first, count


@triton.jit
def clamped(at, length):
    """Samples moved onto the border's cell where they are beyond it, and whether they lie in the map."""
    inside = (at >= -1.0) & (at <= length)  # false for NaN
    at = tl.where(inside, at, 0.0)
    return tl.minimum(tl.maximum(at, 0.0), length - 1.0), inside


@triton.jit
def taps(at, length):
    """Cells below and above a sample that is clamped to the map, and the weight of the upper one."""
    low = tl.floor(at)
    upper_weight = at - low
    low = low.to(tl.int32)
    high = tl.minimum(low + 1, length - 1)
    return low.to(tl.int64), high.to(tl.int64), upper_weight


@triton.jit
def cubic_weight(distance, CUBIC: tl.constexpr):
    """Keys' kernel of coefficient CUBIC at a distance of 0 or more cells, as in `reference`; 0 from 2 on."""
    near = (1.0 - distance) * (1.0 + distance - (CUBIC + 2.0) * distance * distance)
    beyond = tl.minimum(distance - 2.0, 0.0)
    far = CUBIC * (distance - 1.0) * beyond * beyond
    return tl.where(distance <= 1.0, near, far)


@triton.jit
def tap_weight(at, cells, length, CUBIC: tl.constexpr):
    """Weight of whole-numbered `cells` in samples `at` that are clamped to the map; broadcast together."""
    if CUBIC is None:
        weight = tl.maximum(1.0 - tl.abs(at - cells), 0.0)
    else:
        # The taps beyond a border are of its last cell: one on either side, the others weigh 0.
        weight = cubic_weight(tl.abs(at - cells), CUBIC)
        weight += tl.where(cells == 0, cubic_weight(at + 1.0, CUBIC), 0.0)
        weight += tl.where(cells == length - 1.0, cubic_weight(length - at, CUBIC), 0.0)
    return weight


@triton.jit
def cubic_tap(at, tap, length, CUBIC: tl.constexpr):
    """Cell of tap 0 to 3 of a sample that is clamped to the map, and its weight."""
    cell = tl.floor(at) + (tap - 1)
    weight = cubic_weight(tl.abs(at - cell), CUBIC)
    return tl.minimum(tl.maximum(cell, 0.0), length - 1.0).to(tl.int32).to(tl.int64), weight


@triton.jit
def cubic_slope(at, tap, CUBIC: tl.constexpr):
    """Derivative of the weight of tap 0 to 3 by the coordinate `at` of a sample that is clamped to the map."""
    offset = at - tl.floor(at) - (tap - 1)
    distance = tl.abs(offset)
    near = distance * ((3.0 * CUBIC + 6.0) * distance - (2.0 * CUBIC + 6.0))
    far = CUBIC * (3.0 * distance - 4.0) * (distance - 2.0)
    slope = tl.where(distance <= 1.0, near, far)
    return tl.where(offset < 0, -slope, slope)


@triton.jit
def samples_a_row(SAMPLING_RATIO: tl.constexpr):
    """Numbers that the indices of kept samples leave for a row of a bin's samples: row x this + column.

    The window of an adaptive grid has at most 2 * length + 5 rows and columns, which leaves 16 bits for either.
    """
    return SAMPLING_RATIO if SAMPLING_RATIO > 0 else 65536
