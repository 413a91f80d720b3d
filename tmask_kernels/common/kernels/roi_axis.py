"""Jit functions for the bins, samples and interpolation weights of a RoI along one axis."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def divide(a, b):
    """Divide by IEEE rules. The approximate fp32 `/` could move the ceil of an adaptive grid by one."""
    if a.dtype.is_fp64():
        return a / b
    else:
        return tl.math.div_rn(a, b)


@triton.jit
def axis(low_corner, high_corner, scale, bins, ALIGNED: tl.constexpr, SAMPLING_RATIO: tl.constexpr):
    """Return, in cells along an axis: box start, bin size, samples a bin (a float: it may be huge), sample step."""
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
    """Return the first sample of a bin to visit, and the number of samples to visit.

    Most samples of a huge box's adaptive grid lie outside the map, and the kernel skips them. Adaptive samples are at
    least half a cell apart (or there is only one), so at most 2 * (length + 1) + 1 lie in [-1, length]. One more on
    each side absorbs rounding; therefore one sample beyond each border is visited if there is any.
    """
    if SAMPLING_RATIO > 0:
        first = tl.zeros_like(bin_start)
        count = tl.zeros_like(bin_start) + SAMPLING_RATIO
    else:
        step = tl.where(step != 0, step, 1.0)  # avoid 0 / 0
        first = tl.floor((-1.0 - bin_start) / step - 0.5) - 1
        first = tl.maximum(tl.minimum(first, grid - 1), 0.0)
        last = tl.ceil((length - bin_start) / step - 0.5) + 1
        count = tl.maximum(tl.minimum(last, grid - 1) - first + 1, 0.0)
    return first, count


@triton.jit
def clamped(at, length):
    """Clamp sample positions to the map; also return whether each lies in it (NaN does not)."""
    inside = (at >= -1.0) & (at <= length)  # false for NaN
    at = tl.where(inside, at, 0.0)
    return tl.minimum(tl.maximum(at, 0.0), length - 1.0), inside


@triton.jit
def taps(at, length):
    """Return the cells below and above a clamped sample, and the weight of the upper cell."""
    low = tl.floor(at)
    upper_weight = at - low
    low = low.to(tl.int32)
    high = tl.minimum(low + 1, length - 1)
    return low.to(tl.int64), high.to(tl.int64), upper_weight


@triton.jit
def cubic_weight(distance, CUBIC: tl.constexpr):
    """Return Keys' kernel with coefficient CUBIC at a distance >= 0 in cells. It is 0 from a distance of 2 on."""
    near = (1.0 - distance) * (1.0 + distance - (CUBIC + 2.0) * distance * distance)
    beyond = tl.minimum(distance - 2.0, 0.0)
    far = CUBIC * (distance - 1.0) * beyond * beyond
    return tl.where(distance <= 1.0, near, far)


@triton.jit
def tap_weight(at, cells, length, CUBIC: tl.constexpr):
    """Return the weight of `cells` (whole numbers) in clamped samples `at`; the two broadcast."""
    if CUBIC is None:
        weight = tl.maximum(1.0 - tl.abs(at - cells), 0.0)
    else:
        # A tap beyond the border reads the border's cell. Only one tap on each side has a weight other than 0.
        weight = cubic_weight(tl.abs(at - cells), CUBIC)
        weight += tl.where(cells == 0, cubic_weight(at + 1.0, CUBIC), 0.0)
        weight += tl.where(cells == length - 1.0, cubic_weight(length - at, CUBIC), 0.0)
    return weight


@triton.jit
def cubic_tap(at, tap, length, CUBIC: tl.constexpr):
    """Return the cell of tap 0..3 of a clamped sample, and the tap's weight."""
    cell = tl.floor(at) + (tap - 1)
    weight = cubic_weight(tl.abs(at - cell), CUBIC)
    return tl.minimum(tl.maximum(cell, 0.0), length - 1.0).to(tl.int32).to(tl.int64), weight


@triton.jit
def cubic_slope(at, tap, CUBIC: tl.constexpr):
    """Return the derivative of the weight of tap 0..3 by the position `at` of a clamped sample."""
    offset = at - tl.floor(at) - (tap - 1)
    distance = tl.abs(offset)
    near = distance * ((3.0 * CUBIC + 6.0) * distance - (2.0 * CUBIC + 6.0))
    far = CUBIC * (3.0 * distance - 4.0) * (distance - 2.0)
    slope = tl.where(distance <= 1.0, near, far)
    return tl.where(offset < 0, -slope, slope)


@triton.jit
def samples_a_row(SAMPLING_RATIO: tl.constexpr):
    """Return the factor F by which max pooling numbers a bin's samples: row * F + column.

    The window of an adaptive grid has at most 2 * length + 5 rows and columns, so each fits 16 bits.
    """
    return SAMPLING_RATIO if SAMPLING_RATIO > 0 else 65536
