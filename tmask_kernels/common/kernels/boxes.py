"""Jit functions on boxes: loads, stores, IoU."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def is_finite(x1, y1, x2, y2):
    """Return whether coordinates and sides are finite. A difference is finite only if both terms are."""
    return (tl.abs(x2 - x1) < float("inf")) & (tl.abs(y2 - y1) < float("inf"))


@triton.jit
def load_box(boxes_ptr, valid_ptr, k, num_images, boxes_an_image, PADDED: tl.constexpr, HAS_VALID: tl.constexpr):
    """Load box k: corners, image index, and whether to pool it (it is valid, finite, and its image exists)."""
    if PADDED:  # [N, P, 4]
        row = boxes_ptr + k * 4
        image = k // boxes_an_image
        usable = image < num_images
    else:  # [K, 5]
        index = tl.load(boxes_ptr + k * 5)
        row = boxes_ptr + k * 5 + 1
        usable = (index > -1) & (index < num_images)  # false for NaN
        image = tl.where(usable, index, 0.0).to(tl.int64)
    x1, y1, x2, y2 = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    usable &= is_finite(x1, y1, x2, y2)
    if HAS_VALID:
        usable &= tl.load(valid_ptr + k) != 0
    return x1, y1, x2, y2, image, usable


@triton.jit
def load_boxes(ptr, rows, mask):
    """Load the coordinates of boxes `rows`. Masked boxes get NaN: they overlap nothing."""
    x1 = tl.load(ptr + rows * 4, mask=mask, other=float("nan"))
    y1 = tl.load(ptr + rows * 4 + 1, mask=mask, other=float("nan"))
    x2 = tl.load(ptr + rows * 4 + 2, mask=mask, other=float("nan"))
    y2 = tl.load(ptr + rows * 4 + 3, mask=mask, other=float("nan"))
    return x1, y1, x2, y2


@triton.jit
def load4(ptr, rows, mask, BLOCK: tl.constexpr, DTYPE: tl.constexpr, OTHER: tl.constexpr = 0.0):
    """Load the four numbers of boxes `rows` [BLOCK], OTHER if masked. One tile makes each box one 16-byte load."""
    tile = tl.load(ptr + rows[:, None] * 4 + tl.arange(0, 4)[None, :], mask=mask[:, None], other=OTHER).to(DTYPE)
    even, odd = tl.split(tl.reshape(tile, (BLOCK, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def store4(ptr, rows, mask, first, second, third, fourth, BLOCK: tl.constexpr):
    tile = tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), (BLOCK, 4))
    offsets = rows[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=mask[:, None])


@triton.jit
def box_iou(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2):
    """Return the IoU of boxes a and b (they broadcast). The overlap's sides are clamped at 0, areas are not."""
    width = tl.maximum(tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1), 0.0)
    height = tl.maximum(tl.minimum(ay2, by2) - tl.maximum(ay1, by1), 0.0)
    inter = width * height
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - inter
    return tl.math.div_rn(inter, union)
