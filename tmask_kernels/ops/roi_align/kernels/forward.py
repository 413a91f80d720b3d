"""RoIAlign kernels: mean of bilinear or bicubic samples, every pyramid level in one launch.

One program: one box, some of its bins, and a block of channels. It reads the box, finds its level, and goes through its
bins a few at a time; coordinates and weights are computed once a bin, not once a channel. Features are read where they
lie, by their strides. Where every level has its channels side by side (channels_last), a thread loads 16 bytes of them,
and the output is channels_last too. Elsewhere neighbouring threads load what is near in a row of the map: the two (four
if bicubic) taps along x, of neighbouring samples, of neighbouring bins.

The backward is in `backward` and, to the boxes, in `boxes`. All are deterministic. Letters as in `reference`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....common.kernels.roi_axis import clamped
from ....common.launch import (
    box_arguments,
    box_tensors,
    cdiv,
    empty_pooled,
    launch_known,
    next_power_of_2,
    side_arguments,
)
from ....common.roi_geometry import RoIGeometry
from ....namespace import custom_op
from . import backward as kernels_backward
from .boxes import multiscale_roi_align_backward_boxes
from .samples import (
    add_bilinear,
    add_cubic,
    bins_of_block,
    blocks_of_program,
    channel_offsets,
    load_roi,
    load_values,
    place_to_read,
    samples_along,
    tap_along,
)


@triton.jit
def _add_samples(tile, base, channels, y, x, size, strides, mask, CUBIC: tl.constexpr, PAIRS: tl.constexpr):
    """Add the samples of the bins to `tile` [B, G, L].

    y, x: what `samples_along` returns. mask: the bins and channels to read, or None if all exist and lie in the map.
    """
    ACC: tl.constexpr = tile.dtype
    starts_y, step_y, grid_y, first_y, num_y, _ = y
    starts_x, step_x, grid_x, first_x, num_x, _ = x
    iy = tl.full((), 0, tl.int32)
    while iy < num_y:
        at_y = first_y + iy.to(ACC)
        sample_y, inside_y = clamped(starts_y + (at_y + 0.5) * step_y, size[0])
        ix = tl.full((), 0, tl.int32)
        while ix < num_x:
            at_x = first_x + ix.to(ACC)
            sample_x, inside_x = clamped(starts_x + (at_x + 0.5) * step_x, size[1])
            if mask is None:
                read = None
            else:
                read = mask & (inside_y & (at_y < grid_y) & inside_x & (at_x < grid_x))[:, None, None]
            if CUBIC is None:
                tile = add_bilinear(tile, base, channels, sample_y, sample_x, size, strides, read, PAIRS)
            else:
                tile = add_cubic(tile, base, channels, sample_y, sample_x, size, strides, read, CUBIC, PAIRS)
            ix += 1
        iy += 1
    return tile


@triton.jit
def _add_taps(
    tile, base, channels, y, x, size, strides, mask, SAMPLES: tl.constexpr, TAPS: tl.constexpr, CUBIC: tl.constexpr
):
    """Add the samples of the bins to `tile` [B * SAMPLES * TAPS, G, 1], not yet summed along x.

    A row of the tile has one tap along x of every SAMPLES-th sample of a bin.
    """
    ACC: tl.constexpr = tile.dtype
    starts_y, step_y, grid_y, first_y, num_y, _ = y
    starts_x, step_x, grid_x, first_x, num_x, _ = x
    row = tl.arange(0, tile.shape[0])
    tap_x, sample = row % TAPS, row // TAPS % SAMPLES
    iy = tl.full((), 0, tl.int32)
    while iy < num_y:
        at_y = first_y + iy.to(ACC)
        sample_y, inside_y = clamped(starts_y + (at_y + 0.5) * step_y, size[0])
        inside_y &= at_y < grid_y
        ix = tl.full((), 0, tl.int32)
        while ix < num_x:
            at_x = first_x + (ix + sample).to(ACC)
            sample_x, inside_x = clamped(starts_x + (at_x + 0.5) * step_x, size[1])
            cell_x, weight_x = tap_along(sample_x, tap_x, size[1], CUBIC)
            inside = inside_y & inside_x & (at_x < grid_x)
            column = base + cell_x * strides[1]
            for tap_y in tl.static_range(TAPS):
                cell_y, weight_y = tap_along(sample_y, tap_y, size[0], CUBIC)
                ptrs = (column + cell_y * strides[0])[:, None, None] + channels
                value = load_values(ptrs, mask & inside[:, None, None], ACC, False)
                tile = tl.fma((weight_y * weight_x)[:, None, None], value, tile)
            ix += SAMPLES
        iy += 1
    return tile


@triton.jit(do_not_specialize=["num_images", "boxes_an_image", "blocks_a_program"])
def _roi_align_kernel(
    out_ptr,  # [K, C, PH, PW], any strides
    feature_ptrs,  # one [N, C, H, W] a level, any strides
    boxes_ptr,  # [N, P, 4] or [K, 5], contiguous
    valid_ptr,  # [N, P] bytes
    num_images,
    boxes_an_image,
    blocks_a_program,
    C,
    heights,  # floats, which Triton does not compile a new kernel for
    widths,
    out_strides,  # (k, c, h, w)
    feature_strides,  # (n, c, h, w) a level
    scales,
    thresholds,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BLOCK: tl.constexpr,  # bins of a block; a tile has the next power of two
    TILE_BINS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_C: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    SAMPLING_RATIO: tl.constexpr,
    CUBIC: tl.constexpr,  # None: bilinear
    ALIGNED: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_VALID: tl.constexpr,
    FEATURE_STRIDE_C_IS_1: tl.constexpr,
    OUT_STRIDE_C_IS_1: tl.constexpr,
    PAIRS: tl.constexpr,  # bfloat16 is read two at a time; every offset in a map is even
    ACC: tl.constexpr,
):
    # Of a tile for each bin: 1, or 4 for the taps along x of neighbouring samples.
    rows: tl.constexpr = 1 if FEATURE_STRIDE_C_IS_1 else 4
    block, past, k, first_c = blocks_of_program(blocks_a_program, C, BLOCK, GROUPS * GROUP_C, PH * PW)
    corners, usable, scale, base, size, strides = load_roi(
        boxes_ptr,
        valid_ptr,
        k,
        num_images,
        boxes_an_image,
        feature_ptrs,
        heights,
        widths,
        feature_strides,
        scales,
        thresholds,
        NUM_LEVELS,
        PADDED,
        HAS_VALID,
    )
    x1, y1, x2, y2 = corners
    base, strides, channels, mask_c = place_to_read(
        base + first_c * strides[0], strides, C - first_c, GROUPS, GROUP_C, FEATURE_STRIDE_C_IS_1, PAIRS
    )
    out_base = out_ptr + k * out_strides[0] + first_c.to(tl.int64) * out_strides[1]
    out_c, out_channels = channel_offsets(out_strides[1], GROUPS, GROUP_C, OUT_STRIDE_C_IS_1)

    while block < past:
        ph, pw, mask = bins_of_block(block, PH, PW, BLOCK, TILE_BINS, rows)
        y = samples_along(y1, y2, scale, usable, ph.to(ACC), mask, PH, size[0], ALIGNED, SAMPLING_RATIO)
        x = samples_along(x1, x2, scale, usable, pw.to(ACC), mask, PW, size[1], ALIGNED, SAMPLING_RATIO)
        tile = tl.zeros((TILE_BINS * rows, GROUPS, GROUP_C), ACC)
        read = mask[:, None, None] & mask_c
        _, _, grid_y, _, _, inside_y = y
        _, _, grid_x, _, _, inside_x = x
        if rows > 1:
            taps_x: tl.constexpr = 2 if CUBIC is None else 4
            tile = _add_taps(tile, base, channels, y, x, size, strides, read, rows // taps_x, taps_x, CUBIC)
            tile = tl.sum(tl.reshape(tile, (TILE_BINS, rows, GROUPS, GROUP_C)), 1)
            ph, pw, mask = bins_of_block(block, PH, PW, BLOCK, TILE_BINS, 1)
        elif inside_y & inside_x & (C - first_c >= GROUPS * GROUP_C):
            tile = _add_samples(tile, base, channels, y, x, size, strides, None, CUBIC, PAIRS)
        else:
            tile = _add_samples(tile, base, channels, y, x, size, strides, read, CUBIC, PAIRS)
        share = 1.0 / tl.maximum(tl.where(usable, grid_y * grid_x, 1.0), 1.0)
        place = ph.to(tl.int64) * out_strides[2] + pw.to(tl.int64) * out_strides[3]
        value = (tile * share).to(out_ptr.dtype.element_ty)
        write = mask[:, None, None] & (out_c < C - first_c)
        tl.store((out_base + place)[:, None, None] + out_channels, value, mask=write)
        block += 1


class Tile(NamedTuple):
    """Launch parameters: what a program works on at a time, its warps, and the most registers of a thread."""

    bins: int  # up to 8
    groups: int
    group_c: int  # channels of a group
    num_warps: int
    max_registers: int = 255


def pick_tile(C: int, size: tuple[int, int], item_bytes: int, channels_last: bool, channels: int = 32) -> Tile:
    """A thread has one bin and some `channels` of it: it computes coordinates, weights and addresses once for all.

    In channels_last 8 threads read 128 bytes of a cell, 16 each, and so of each group of channels. Else the bins of a
    tile are of one row if they can be, so that neighbouring threads read cells of one row of the map; and a thread has
    16 channels at most, as each has an address of its own.
    """
    PH, PW = size
    block_c = next_power_of_2(max(C, 1))
    if channels_last:
        group_c = min(block_c, 128 // item_bytes)
        return Tile(min(PH * PW, 8), max(min(block_c, 8 * channels) // group_c, 1), group_c, num_warps=2)
    bins = cdiv(PW, cdiv(PW, 8)) if PW > 8 else PW * min(PH, 8 // PW)
    return Tile(bins, min(block_c, channels, 16), 1, num_warps=1, max_registers=168 if channels > 16 else 255)


def blocks_of_each_program(tiles: int, blocks: int) -> int:
    """Return how many of the `blocks` of bins of a box one program takes, where all boxes have `tiles` in all.

    Blocks of one program read shared cells from the L1. 2,112 programs are 16 for each multiprocessor of an H100.
    """
    programs_a_box = cdiv(blocks, max(1, tiles // 2112))
    return cdiv(blocks, programs_a_box)


def launch(
    kernel: triton.JITFunction,
    out: Tensor,
    features: Sequence[Tensor],
    boxes: Tensor,
    valid: Tensor | None,
    geometry: RoIGeometry,
    channels: int,
    tensors: Mapping[str, Tensor] = MappingProxyType({}),
    **constants: Any,
) -> None:
    """Fill `out` [K, C, PH, PW], which has elements, from `features` (one [N, C, H, W] a level, of which one has).

    kernel: that of the mean, or another with its own `tensors` and `constants`. channels: of a thread.
    """
    features, channels_last = tuple(features), all(f.stride(1) == 1 for f in features)
    tile = pick_tile(out.shape[1], (out.shape[2], out.shape[3]), out.element_size(), channels_last, channels)
    tensors = {"out_ptr": out, "feature_ptrs": features, **box_tensors(boxes, valid), **tensors}

    def plan() -> tuple[tuple[int], dict[str, Any]]:
        K, C, PH, PW = out.shape
        blocks = cdiv(PH * PW, tile.bins)
        tiles = K * cdiv(C, tile.groups * tile.group_c) * blocks
        each = blocks_of_each_program(tiles, blocks)
        return (tiles // blocks * cdiv(blocks, each),), {
            "blocks_a_program": each,
            "C": C,
            "out_strides": tuple(out.stride()),
            "feature_strides": tuple(tuple(f.stride()) for f in features),
            "PH": PH,
            "PW": PW,
            "BLOCK": tile.bins,
            "TILE_BINS": next_power_of_2(tile.bins),
            "GROUPS": tile.groups,
            "GROUP_C": tile.group_c,
            "FEATURE_STRIDE_C_IS_1": channels_last,
            "OUT_STRIDE_C_IS_1": out.stride(1) == 1,
            "PAIRS": channels_last and _in_pairs(features),
            "ACC": tl.float64 if out.dtype == torch.float64 else tl.float32,
            "num_warps": tile.num_warps,
            # A fused coord * scale - 0.5 would round differently from the reference, and an adaptive grid with it.
            "enable_fp_fusion": False,
            **box_arguments(boxes, valid, features[0].shape[0]),
            **side_arguments(features),
            **geometry.launch_arguments(),
            # Left alone, NVIDIA's assembler spills a few registers to have one program more on a multiprocessor.
            **({} if torch.version.hip else {"maxnreg": tile.max_registers}),
            **constants,
        }

    launch_known(kernel, tensors, (geometry, tile, *constants.values()), plan)


def _in_pairs(features: Sequence[Tensor]) -> bool:
    """Return whether the channels of these channels_last maps can be read as pairs of bfloat16."""
    if features[0].dtype != torch.bfloat16:
        return False
    numbers = [number for f in features for number in (f.stride(0), f.stride(2), f.stride(3), f.data_ptr() // 2)]
    return features[0].shape[1] % 2 == 0 and all(number % 2 == 0 for number in numbers)


@custom_op("multiscale_roi_align")
def multiscale_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    valid: Tensor | None,
    pooled_height: int,
    pooled_width: int,
    scales: Sequence[float],
    thresholds: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    cubic: float | None,
) -> Tensor:
    """Pool boxes [N, P, 4] (fp32, valid [N, P] bool) or [K, 5]: [K, C, PH, PW]. The last five are a `RoIGeometry`."""
    out = empty_pooled(features, boxes, pooled_height, pooled_width)
    if out.numel() and any(f.numel() for f in features):
        geometry = RoIGeometry.unflatten(scales, thresholds, sampling_ratio, aligned, cubic)
        channels = 32 if cubic is None else 16
        launch(_roi_align_kernel, out, features, boxes, valid, geometry, channels)
        return out
    return out.zero_()


@multiscale_roi_align.register_fake
def _(features, boxes, valid, pooled_height, pooled_width, *geometry):
    return empty_pooled(features, boxes, pooled_height, pooled_width)


def _setup_context(ctx, inputs, output):
    features, boxes, valid, _, _, *geometry = inputs
    # The gradient to the features needs none of them, that to the boxes all.
    ctx.save_for_backward(boxes, valid, *(features if boxes.requires_grad else ()))
    ctx.geometry, ctx.maps = RoIGeometry.unflatten(*geometry), kernels_backward.shapes(features)


def _backward(ctx, grad):
    boxes, valid, *features = ctx.saved_tensors
    gradients, to_boxes = [None] * len(ctx.geometry.scales), None
    if any(ctx.needs_input_grad[0]):
        gradients = kernels_backward.multiscale_roi_align_backward(
            grad, boxes, valid, *ctx.maps, *ctx.geometry.flatten()
        )
    if ctx.needs_input_grad[1]:
        to_boxes = multiscale_roi_align_backward_boxes(grad, features, boxes, valid, *ctx.geometry.flatten())
    return gradients, to_boxes, None, None, None, *[None] * 5


multiscale_roi_align.register_autograd(_backward, setup_context=_setup_context)
