"""What the pasting kernels share: where pixels sample a mask, and its value there, with the reference's bits.

Kernels are launched without fusion of products and sums, which are rounded one by one as in `reference`.
"""

from __future__ import annotations

import triton
import triton.language as tl

BEYOND = tl.constexpr(-2)  # a cell that is as far outside the mask as its neighbour: both are 0


@triton.jit
def axis(low, high, length, SIDE: tl.constexpr, TORCHVISION: tl.constexpr):
    """A box along an axis: where its samples start, cells a pixel, and the pixels first..past that can meet a cell.

    For detectron2's rule first and past are a pixel or two too wide; for torchvision's they are part of the rule.
    """
    if TORCHVISION:
        half = (high - low) * 0.5 * ((SIDE + 2) / SIDE)
        centre = (high + low) * 0.5
        start = _truncate(centre - half)
        last = _truncate(centre + half)
        extent = last - start + 1.0
        usable = (extent > 0) & (extent < float("inf"))
        extent = tl.where(usable, extent, 1.0)
        scale = tl.math.div_rn(tl.zeros_like(extent) + (SIDE + 2), extent)
        first = start
        past = last + 1.0
    else:
        extent = high - low
        usable = (extent > 0) & (extent < float("inf"))
        extent = tl.where(usable, extent, 1.0)
        start = low
        scale = tl.math.div_rn(tl.zeros_like(extent) + SIDE, extent)
        # Half a cell beyond the box, and more than rounding can move a coordinate.
        reach = extent * (0.5 / SIDE) + (tl.abs(low) + tl.abs(high)) * 2.0**-20 + 1.0
        first = tl.floor(low - 0.5 - reach)
        past = tl.ceil(high - 0.5 + reach) + 1.0
    limit = length.to(tl.float32)
    first = tl.minimum(tl.maximum(tl.where(usable, first, 0.0), 0.0), limit)
    past = tl.minimum(tl.maximum(tl.where(usable, past, 0.0), 0.0), limit)
    return tl.where(usable, start, 0.0), scale, first.to(tl.int32), past.to(tl.int32)


@triton.jit
def _truncate(x):
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))


@triton.jit
def taps(pixel, start, scale, first, past, SIDE: tl.constexpr, TORCHVISION: tl.constexpr):
    """The cell before the sample of a pixel, and the weight of the cell after it; BEYOND and 0 if it meets none."""
    shift: tl.constexpr = 1.5 if TORCHVISION else 0.5
    at = (pixel.to(tl.float32) + 0.5 - start) * scale - shift
    reached = (at > -1.0) & (at < SIDE) & (pixel >= first) & (pixel < past)
    at = tl.where(reached, at, BEYOND)
    cell = tl.floor(at)
    return cell.to(tl.int32), at - cell


@triton.jit
def along_x(mask_ptr, row, cell, weight, SIDE: tl.constexpr):
    """Row `row` of a mask between `cell` and the next; 0 beyond the mask."""
    row += tl.zeros_like(cell)  # of one number the interpreter of Triton 3.9 makes no mask
    exists = (row >= 0) & (row < SIDE)
    low = tl.load(mask_ptr + (row * SIDE + cell), mask=exists & (cell >= 0), other=0.0)
    high = tl.load(mask_ptr + (row * SIDE + cell + 1), mask=exists & (cell >= -1) & (cell < SIDE - 1), other=0.0)
    return low.to(tl.float32) * (1.0 - weight) + high.to(tl.float32) * weight


@triton.jit
def along_y(upper, lower, weight):
    """Between the values of two rows."""
    return upper * (1.0 - weight) + lower * weight


@triton.jit
def is_inside(value, threshold, TORCHVISION: tl.constexpr):
    """The conventions differ at the threshold itself."""
    if TORCHVISION:
        inside = value > threshold
    else:
        inside = value >= threshold
    return inside


@triton.jit
def are_sure(upper, lower, threshold):
    """Whether, in every column, all values between `upper` and `lower` lie on the same side of the threshold.

    A value `along_y` differs from the exact one by less than the margin, rounding and underflow included. A NaN or an
    infinity is not sure.
    """
    margin = (tl.abs(upper) + tl.abs(lower)) * 2.0**-20 + 2.0**-120
    inside = tl.minimum(upper, lower) - margin > threshold
    outside = tl.maximum(upper, lower) + margin < threshold
    return tl.min((inside | outside).to(tl.int32), 0) == 1


@triton.jit
def last_row_of(cell, start, step, past, TORCHVISION: tl.constexpr):
    """Guess the last pixel before `past` of an axis that samples `cell`; `step` is pixels a cell."""
    shift: tl.constexpr = 1.5 if TORCHVISION else 0.5
    end = (cell.to(tl.float32) + (1.0 + shift)) * step + start - 0.5  # where the next cell begins
    return tl.minimum(tl.maximum(tl.floor(end - 0.0625), 0.0), past.to(tl.float32) - 1.0).to(tl.int32)
