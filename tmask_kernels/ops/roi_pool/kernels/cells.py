"""What the RoIPool kernels share: the cells of a box and of its bins along an axis. Letters as in `reference`."""

from __future__ import annotations

import triton
import triton.language as tl

from ....common.kernels.boxes import is_finite, load_box


@triton.jit
def load_cells(
    boxes_ptr, valid_ptr, k, num_images, boxes_an_image, scale, PADDED: tl.constexpr, HAS_VALID: tl.constexpr
):
    """Box k in cells, not rounded yet (0 where it is not to be pooled), its image, and whether it is to be pooled."""
    x1, y1, x2, y2, image, usable = load_box(boxes_ptr, valid_ptr, k, num_images, boxes_an_image, PADDED, HAS_VALID)
    x1, y1, x2, y2 = x1 * scale, y1 * scale, x2 * scale, y2 * scale
    usable &= is_finite(x1, y1, x2, y2)  # scaled by more than 1 a box may overflow
    x1, x2 = tl.where(usable, x1, 0.0), tl.where(usable, x2, 0.0)
    y1, y2 = tl.where(usable, y1, 0.0), tl.where(usable, y2, 0.0)
    return x1, y1, x2, y2, image, usable


@triton.jit
def round_half_away(x):
    """To the next whole number, halves away from zero."""
    size = tl.abs(x)
    whole = tl.floor(size)
    whole += tl.where(size - whole >= 0.5, 1.0, 0.0)
    return tl.where(x < 0, -whole, whole)


@triton.jit
def axis(low, high, bins):
    """Along an axis: first cell of a box, and the size of its bins. Both ends belong to it; it has a cell at least."""
    start = round_half_away(low)
    size = tl.maximum(round_half_away(high) - start + 1.0, 1.0)
    # IEEE division: fp32 `/` is approximate and would move a bin by a cell.
    return start, tl.math.div_rn(size, tl.zeros_like(size) + bins)


@triton.jit
def bin_cells(start, bin_size, index, length):
    """First cell of bin `index` (a float), and the one past its last, cut at the ends of the map."""
    first = tl.floor(index * bin_size) + start
    past = tl.ceil((index + 1.0) * bin_size) + start
    first = tl.minimum(tl.maximum(first, 0.0), length)
    past = tl.minimum(tl.maximum(past, 0.0), length)
    return first.to(tl.int32), past.to(tl.int32)
