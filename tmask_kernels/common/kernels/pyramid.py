"""Jit functions for the level of a box: its index, and the level's member of a tuple argument."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def of_level(level, values, NUM_LEVELS: tl.constexpr):
    """Return values[level] of a tuple of numbers or pointers."""
    value = values[0]
    for i in tl.static_range(1, NUM_LEVELS):
        value = tl.where(level >= i, values[i], value)
    return value


@triton.jit
def level_index(x1, y1, x2, y2, thresholds, NUM_LEVELS: tl.constexpr):
    """Return the level of a box: the number of `thresholds` (areas, rising) that its area reaches."""
    area = (x2 - x1) * (y2 - y1)
    level = tl.zeros_like(area).to(tl.int32)
    for i in tl.static_range(1, NUM_LEVELS):
        level += (area >= thresholds[i - 1]).to(tl.int32)
    return level


@triton.jit
def strides_of_level(level, strides, NUM_LEVELS: tl.constexpr):
    """Return the strides (n, c, h, w) of a level as int64: offsets may exceed 2^31."""
    stride_n, stride_c = tl.cast(strides[0][0], tl.int64), tl.cast(strides[0][1], tl.int64)
    stride_h, stride_w = tl.cast(strides[0][2], tl.int64), tl.cast(strides[0][3], tl.int64)
    for i in tl.static_range(1, NUM_LEVELS):
        stride_n = tl.where(level >= i, tl.cast(strides[i][0], tl.int64), stride_n)
        stride_c = tl.where(level >= i, tl.cast(strides[i][1], tl.int64), stride_c)
        stride_h = tl.where(level >= i, tl.cast(strides[i][2], tl.int64), stride_h)
        stride_w = tl.where(level >= i, tl.cast(strides[i][3], tl.int64), stride_w)
    return stride_n, stride_c, stride_h, stride_w
