"""Keypoint decoding in one launch, without resizing a map: most of its pixels are ruled out by bounds.

A patch is the square between four neighbouring cells; a bicubic surface in it depends on 4 x 4 cells, and cannot rise
above a bound that follows from them (README, "Bounds"). A program of one warp owns one map. It finds the largest cell,
takes the pixel there as the best so far, and goes down the rows of patches: only where a bound reaches the best are
pixels computed. Every pixel that could be the answer is, so the answer is that of the whole grid.

Letters as in `reference`. A patch has the number of the cell before it: the floor of its coordinates in cells.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.kernels.boxes import is_finite
from ...common.launch import next_power_of_2, on_device
from ...namespace import custom_op
from .reference import KEYS, MAX_GRID, MAX_LOGIT

BLOCK = 1024  # cells read at once in search of the largest: 32 a thread, 128 bytes of fp32 under way
TILE_Y, TILE_X = 8, 16  # pixels at once: the patches that are left are few and near one another

# What the outer two of four cells take from the inner two, or give to them, at most: a quarter of |a|, half-way.
OVERSHOOT = -KEYS / 4
# For the rounding of weights and sums, below 2^-20 of the cells' range.
MARGIN = 2.0**-18


@triton.jit
def _taps(pixel, step, A: tl.constexpr):
    """Of pixels [P]: the cell before each, and the weights of the first, third and fourth of the four around it."""
    at = (pixel.to(tl.float32) + 0.5) * step - 0.5
    cell = tl.floor(at)
    t = at - cell
    rest = 1.0 - t
    outer = A * t * rest
    after = t * (t * (2.0 * A + 3.0 - (A + 2.0) * t) - A)
    return cell.to(tl.int32), outer * rest, after, outer * t


@triton.jit
def _interpolate(first, base, third, fourth, before, after, beyond):
    return base + (before * (first - base) + after * (third - base) + beyond * (fourth - base))


@triton.jit
def _around(cell, length):
    """The four cells around `cell` [P] and the next, clamped to an axis: int64 [P] each."""
    first = tl.minimum(tl.maximum(cell - 1, 0), length - 1)
    base = tl.minimum(tl.maximum(cell, 0), length - 1)
    third, fourth = tl.minimum(cell + 1, length - 1), tl.minimum(cell + 2, length - 1)
    return first.to(tl.int64), base.to(tl.int64), third.to(tl.int64), fourth.to(tl.int64)


@triton.jit
def _load_row(row_ptr, first, base, third, fourth):
    """Cells at four offsets in a row, of the same shape: fp32."""
    return (
        tl.load(row_ptr + first).to(tl.float32),
        tl.load(row_ptr + base).to(tl.float32),
        tl.load(row_ptr + third).to(tl.float32),
        tl.load(row_ptr + fourth).to(tl.float32),
    )


@triton.jit
def _bounds(low, high, outer_low, outer_high, OVERSHOOT: tl.constexpr, MARGIN: tl.constexpr):
    """Lower and upper bound of values interpolated between two cells in low..high, with outer ones in their range."""
    rise = tl.maximum(high - outer_low, 0.0)
    fall = tl.maximum(outer_high - low, 0.0)
    lower = low - ((OVERSHOOT + MARGIN) * fall + MARGIN * rise)
    return lower, high + ((OVERSHOOT + MARGIN) * rise + MARGIN * fall)


@triton.jit
def _row_bounds(row_ptr, c0, c1, c2, c3, OVERSHOOT: tl.constexpr, MARGIN: tl.constexpr):
    """Bounds of a row of cells between the second and the third of four offsets [P]: fp32 [P] each."""
    first, base, third, fourth = _load_row(row_ptr, c0, c1, c2, c3)
    low, high = tl.minimum(base, third), tl.maximum(base, third)
    return _bounds(low, high, tl.minimum(first, fourth), tl.maximum(first, fourth), OVERSHOOT, MARGIN)


@triton.jit
def _pixels(first, past, cells_a_pixel, pixels):
    """First pixel of the patches first..past (without) along an axis, and the one past the last; or one more each."""
    low = tl.floor((tl.cast(first, tl.float32) + 0.5) / cells_a_pixel - 1.5)
    high = tl.ceil((tl.cast(past, tl.float32) + 0.5) / cells_a_pixel + 0.5)
    return tl.maximum(low.to(tl.int32), 0), tl.minimum(high.to(tl.int32), pixels)


@triton.jit
def _search(
    best,
    index,
    map_ptr,
    y_first,
    y_past,
    x_first,
    x_past,
    GW,
    H,
    W,
    stride,
    step_y,
    step_x,
    A: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
):
    """The better of `best`, at pixel `index` of the grid, and of a rectangle of pixels.

    Of equal ones it is the first in row-major order.
    """
    values = tl.full((TILE_Y, TILE_X), float("-inf"), tl.float32)
    places = tl.zeros((TILE_Y, TILE_X), tl.int32)
    for y in range(y_first, y_past, TILE_Y):
        offs_y = y + tl.arange(0, TILE_Y)
        cell_y, before_y, after_y, beyond_y = _taps(offs_y[:, None], step_y, A)
        r0, r1, r2, r3 = _around(cell_y, H)  # [TILE_Y, 1]
        for x in range(x_first, x_past, TILE_X):
            offs_x = x + tl.arange(0, TILE_X)
            cell_x, before, after, beyond = _taps(offs_x[None, :], step_x, A)
            c0, c1, c2, c3 = _around(cell_x, W)  # [1, TILE_X]
            c0, c1, c2, c3 = c0 * stride, c1 * stride, c2 * stride, c3 * stride
            v0, v1, v2, v3 = _load_row(map_ptr + r0 * W * stride, c0, c1, c2, c3)
            first = _interpolate(v0, v1, v2, v3, before, after, beyond)
            v0, v1, v2, v3 = _load_row(map_ptr + r1 * W * stride, c0, c1, c2, c3)
            base = _interpolate(v0, v1, v2, v3, before, after, beyond)
            v0, v1, v2, v3 = _load_row(map_ptr + r2 * W * stride, c0, c1, c2, c3)
            third = _interpolate(v0, v1, v2, v3, before, after, beyond)
            v0, v1, v2, v3 = _load_row(map_ptr + r3 * W * stride, c0, c1, c2, c3)
            fourth = _interpolate(v0, v1, v2, v3, before, after, beyond)
            value = _interpolate(first, base, third, fourth, before_y, after_y, beyond_y)
            place = (offs_y * GW)[:, None] + offs_x[None, :]
            inside = (offs_y < y_past)[:, None] & (offs_x < x_past)[None, :]
            better = inside & ((value > values) | ((value == values) & (place < places)))
            values = tl.where(better, value, values)
            places = tl.where(better, place, places)
    top = tl.max(tl.max(values, 1), 0)
    place = tl.where(values == top, places, 2**31 - 1)
    place = tl.min(tl.min(place, 1), 0)
    better = (top > best) | ((top == best) & (place < index))
    return tl.where(better, top, best), tl.where(better, place, index)


@triton.jit
def _largest_cell(map_ptr, num_cells, stride, BLOCK: tl.constexpr, MAX_LOGIT: tl.constexpr):
    """Place y * W + x of the largest cell, the first of equals, and whether all of them are within MAX_LOGIT."""
    values = tl.full((BLOCK,), float("-inf"), tl.float32)
    places = tl.zeros((BLOCK,), tl.int32)
    sound = 1
    for start in range(0, num_cells, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < num_cells
        value = tl.load(map_ptr + offs.to(tl.int64) * stride, mask=mask, other=0.0).to(tl.float32)
        sound = tl.minimum(sound, tl.min((tl.abs(value) <= MAX_LOGIT).to(tl.int32), 0))  # not of NaN either
        larger = mask & (value > values)
        values = tl.where(larger, value, values)
        places = tl.where(larger, offs, places)
    place = tl.min(tl.where(values == tl.max(values, 0), places, num_cells - 1), 0)
    return place, sound > 0


@triton.jit(do_not_specialize=["D", "K", "H", "W"])
def _decode_keypoints_kernel(
    xy_ptr,  # fp32 [N, D, K, 2]
    scores_ptr,  # fp32 [N, D, K]
    maps_ptr,  # [N, D, K, H, W]; cells, in row-major order, `stride` apart
    boxes_ptr,  # fp32 [N, D, 4]
    valid_ptr,  # [N, D] bytes
    D,
    K,
    H,
    W,
    num_cells,  # H * W
    stride_n,
    stride_d,
    stride_k,
    stride,
    HAS_VALID: tl.constexpr,
    A: tl.constexpr,  # Keys' coefficient
    OVERSHOOT: tl.constexpr,
    MARGIN: tl.constexpr,
    MAX_GRID: tl.constexpr,
    MAX_LOGIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_W: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    box = i // K
    x1, y1 = tl.load(boxes_ptr + box * 4), tl.load(boxes_ptr + box * 4 + 1)
    x2, y2 = tl.load(boxes_ptr + box * 4 + 2), tl.load(boxes_ptr + box * 4 + 3)
    usable = is_finite(x1, y1, x2, y2)
    if HAS_VALID:
        usable &= tl.load(valid_ptr + box) != 0
    x, y, score = 0.0, 0.0, 0.0
    if usable:
        map_ptr = maps_ptr + box // D * stride_n + box % D * stride_d + i % K * stride_k
        width, height = tl.maximum(x2 - x1, 1.0), tl.maximum(y2 - y1, 1.0)
        grid_w, grid_h = tl.minimum(tl.ceil(width), MAX_GRID), tl.minimum(tl.ceil(height), MAX_GRID)
        # IEEE division: fp32 `/` is approximate and would move a pixel to another cell.
        step_x, step_y = tl.math.div_rn(W.to(tl.float32), grid_w), tl.math.div_rn(H.to(tl.float32), grid_h)
        GW, GH = grid_w.to(tl.int32), grid_h.to(tl.int32)

        # A grid of no more pixels than cells is searched whole. Else begin with the pixel at the largest cell: most
        # bounds do not reach it.
        place, sound = _largest_cell(map_ptr, num_cells, stride, BLOCK, MAX_LOGIT)
        whole = num_cells >= GW * GH
        x_first = tl.minimum(((place % W).to(tl.float32) + 0.5) / step_x, grid_w - 1.0).to(tl.int32)
        y_first = tl.minimum(((place // W).to(tl.float32) + 0.5) / step_y, grid_h - 1.0).to(tl.int32)
        x_first, x_past = tl.where(whole, 0, x_first), tl.where(whole, GW, x_first + 1)
        y_first, y_past = tl.where(whole, 0, y_first), tl.where(whole, GH, y_first + 1)
        best, index = _search(
            float("-inf"), 0, map_ptr, y_first, y_past, x_first, x_past,
            GW, H, W, stride, step_y, step_x, A, TILE_Y, TILE_X,
        )  # fmt: skip

        offs_c = tl.arange(0, BLOCK_W) - 1  # patches: from the one before the first cell to the one at the last
        c0, c1, c2, c3 = _around(offs_c, W)
        c0, c1, c2, c3 = c0 * stride, c1 * stride, c2 * stride, c3 * stride
        low0, high0 = _row_bounds(map_ptr, c0, c1, c2, c3, OVERSHOOT, MARGIN)
        # The rows before the first row equal the first. `+ 0.0` gives each name a value of its own: Triton finds what a
        # loop carries by comparing values, and would carry none of the names that share one.
        low1, high1, low2, high2 = low0 + 0.0, high0 + 0.0, low0 + 0.0, high0 + 0.0
        for patch_y in range(-1, tl.where(sound & (whole == 0), H, -1)):
            row = tl.minimum(patch_y + 2, H - 1).to(tl.int64) * W
            low3, high3 = _row_bounds(map_ptr + row * stride, c0, c1, c2, c3, OVERSHOOT, MARGIN)
            low, high = tl.minimum(low1, low2), tl.maximum(high1, high2)
            _, bound = _bounds(low, high, tl.minimum(low0, low3), tl.maximum(high0, high3), OVERSHOOT, MARGIN)
            y_first, y_past = _pixels(patch_y, patch_y + 1, step_y, GH)
            # What can be no more than equal counts only where it may stand before the best.
            reach = (bound > best) | ((bound == best) & (y_first * GW <= index))
            reach &= offs_c < W
            first = tl.min(tl.where(reach, offs_c, BLOCK_W), 0)
            while first < BLOCK_W:
                past = tl.min(tl.where(reach | (offs_c < first), BLOCK_W, offs_c), 0)
                x_first, x_past = _pixels(first, past, step_x, GW)
                best, index = _search(
                    best, index, map_ptr, y_first, y_past, x_first, x_past,
                    GW, H, W, stride, step_y, step_x, A, TILE_Y, TILE_X,
                )  # fmt: skip
                first = tl.min(tl.where(reach & (offs_c > past), offs_c, BLOCK_W), 0)
            low0, high0, low1, high1, low2, high2 = low1, high1, low2, high2, low3, high3

        x = ((index % GW).to(tl.float32) + 0.5) * tl.math.div_rn(width, grid_w) + x1
        y = ((index // GW).to(tl.float32) + 0.5) * tl.math.div_rn(height, grid_h) + y1
        x, y = tl.where(sound, x, 0.0), tl.where(sound, y, 0.0)
        score = tl.where(sound, best, float("nan"))
    tl.store(xy_ptr + i * 2, x)
    tl.store(xy_ptr + i * 2 + 1, y)
    tl.store(scores_ptr + i, score)


def _empty_out(heatmaps: Tensor) -> tuple[Tensor, Tensor]:
    shape = heatmaps.shape[:3]
    xy = torch.empty((*shape, 2), dtype=torch.float32, device=heatmaps.device)
    return xy, torch.empty(shape, dtype=torch.float32, device=heatmaps.device)


@custom_op("decode_keypoints")
def decode_keypoints(heatmaps: Tensor, boxes: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """[N, D, K, H, W] fp16, bf16 or fp32, [N, D, 4] fp32, [N, D] bool -> [N, D, K, 2], [N, D, K], fp32."""
    xy, scores = _empty_out(heatmaps)
    if not scores.numel():
        return xy, scores
    _, D, K, H, W = heatmaps.shape
    # The step from cell to cell of a flattened map; that of an axis of one cell may be any number.
    stride = heatmaps.stride(4 if W > 1 else 3)
    if H > 1 and W > 1 and heatmaps.stride(3) != W * stride:
        heatmaps, stride = heatmaps.contiguous(), 1
    block_w = next_power_of_2(W + 1)
    with on_device(xy):
        _decode_keypoints_kernel[(scores.numel(),)](
            xy_ptr=xy,
            scores_ptr=scores,
            maps_ptr=heatmaps,
            boxes_ptr=boxes.contiguous(),
            valid_ptr=boxes if valid is None else valid.contiguous().view(torch.uint8),
            D=D,
            K=K,
            H=H,
            W=W,
            num_cells=H * W,
            stride_n=heatmaps.stride(0),
            stride_d=heatmaps.stride(1),
            stride_k=heatmaps.stride(2),
            stride=stride,
            HAS_VALID=valid is not None,
            A=KEYS,
            OVERSHOOT=OVERSHOOT,
            MARGIN=MARGIN,
            MAX_GRID=MAX_GRID,
            MAX_LOGIT=MAX_LOGIT,
            BLOCK=BLOCK,
            BLOCK_W=block_w,
            TILE_Y=TILE_Y,
            TILE_X=TILE_X,
            num_warps=max(1, block_w // 256),
            enable_fp_fusion=False,  # coordinates and values are the reference's, bit for bit
        )
    return xy, scores


@decode_keypoints.register_fake
def _(heatmaps, boxes, valid):
    return _empty_out(heatmaps)
