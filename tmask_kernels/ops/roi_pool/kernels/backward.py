"""Gradient of RoIPool to the features, in gather form: no atomics, the same bits from run to run.

The forward kept the cell of each bin's largest value. A program owns a tile of cells of one image and a block of
channels, goes through the boxes that touch the tile in the order of their index, and through those of their bins that
do. Each bin adds its gradient to the one cell of the tile, in each channel another, that the forward kept, if it lies
in the tile. The sums stay in registers and are written once, in their final dtype.

Which boxes touch a tile stands in a bit mask that a small launch writes first, one bit a box and tile. Letters as in
`reference`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....backend import no_second_derivative
from ....common.kernels.numbers import lowest_bit
from ....common.launch import box_arguments, cdiv, empty_map, next_power_of_2, on_device
from ....namespace import custom_op
from .cells import axis, load_cells

WORD = 32  # boxes a word of the mask
BLOCK_TILES = 32  # tiles that one program of the mask's launch tests


@triton.jit(do_not_specialize=["num_images", "boxes_an_image", "tiles_across", "num_tiles", "num_words"])
def _touch_kernel(
    touch_ptr,  # [N, num_words, num_tiles] int32: bit i of word w is box 32 w + i of the image
    boxes_ptr,
    valid_ptr,
    num_images,
    boxes_an_image,  # of boxes [K, 5] each image sees all K
    scale,
    tiles_across,
    num_tiles,
    num_words,
    PH: tl.constexpr,
    PW: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_T: tl.constexpr,
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
    x1, y1, x2, y2, image, usable = load_cells(
        boxes_ptr, valid_ptr, k, num_images, boxes_an_image, scale, PADDED, HAS_VALID
    )
    usable &= (box < boxes_an_image) & (image == n)
    start_y, bin_h = axis(y1, y2, PH)
    start_x, bin_w = axis(x1, x2, PW)
    end_y, end_x = start_y + tl.ceil(PH * bin_h), start_x + tl.ceil(PW * bin_w)

    tile = tl.program_id(0) % blocks_t * BLOCK_T + tl.arange(0, BLOCK_T)
    top, left = (tile // tiles_across * TILE_H)[:, None], (tile % tiles_across * TILE_W)[:, None]
    touches = (start_y[None, :] < top + TILE_H) & (end_y[None, :] > top)  # [BLOCK_T, 32]
    touches &= (start_x[None, :] < left + TILE_W) & (end_x[None, :] > left)
    bits = tl.sum((touches & usable[None, :]).to(tl.int32) << offs[None, :], 1)
    tl.store(touch_ptr + (n * num_words + word) * num_tiles + tile, bits, mask=tile < num_tiles)


@triton.jit
def _bins(start, bin_size, first_cell, SIDE: tl.constexpr, bins: tl.constexpr):
    """Bins, first and past the last, that can hold any of the SIDE cells from `first_cell` on."""
    low = (first_cell - start) / bin_size
    high = (first_cell + SIDE - start) / bin_size
    slack = 0.01  # more than the rounding of a quotient that lies among the bins
    first = tl.minimum(tl.maximum(tl.floor(low - slack), 0.0), bins)
    past = tl.minimum(tl.maximum(tl.ceil(high + slack), 0.0), bins)
    return first.to(tl.int32), past.to(tl.int32)


@triton.jit(do_not_specialize=["num_images", "boxes_an_image", "H", "W", "tiles_across", "num_tiles", "num_words"])
def _gather_kernel(
    grad_ptr,  # [N, C, H, W], any strides
    out_grad_ptr,  # [K, C, PH, PW], any strides
    index_ptr,  # int32 [K, C, PH, PW], any strides
    touch_ptr,
    boxes_ptr,  # [N, P, 4] or [K, 5], contiguous
    valid_ptr,  # [N, P] bytes
    num_images,
    boxes_an_image,
    C,
    H,
    W,
    scale,
    tiles_across,
    num_tiles,
    num_words,
    grad_strides,  # (n, c, h, w)
    out_grad_strides,  # (k, c, h, w)
    index_strides,  # (k, c, h, w)
    PH: tl.constexpr,
    PW: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_VALID: tl.constexpr,
    GRAD_STRIDE_C_IS_1: tl.constexpr,
    OUT_GRAD_STRIDE_C_IS_1: tl.constexpr,
    INDEX_STRIDE_C_IS_1: tl.constexpr,
    ACC: tl.constexpr,
):
    blocks_c = tl.cdiv(C, BLOCK_C)
    offs_c = ((tl.program_id(0) % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    mask_c = offs_c < C
    tile = tl.program_id(0) // blocks_c % num_tiles
    n = (tl.program_id(0) // blocks_c // num_tiles).to(tl.int64)
    top, left = tile // tiles_across * TILE_H, tile % tiles_across * TILE_W
    offs_y, offs_x = top + tl.arange(0, TILE_H), left + tl.arange(0, TILE_W)
    # Past the right border this is a cell of the next row; what it sums is not stored.
    cells = (offs_y * W)[:, None] + offs_x[None, :]
    # The compiler cannot see these ones in the strides, and needs them for wide loads and stores.
    out_channels = offs_c if OUT_GRAD_STRIDE_C_IS_1 else offs_c * out_grad_strides[1]
    index_channels = offs_c if INDEX_STRIDE_C_IS_1 else offs_c * index_strides[1]
    channels = offs_c if GRAD_STRIDE_C_IS_1 else offs_c * grad_strides[1]

    sums = tl.zeros((TILE_H, TILE_W, BLOCK_C), ACC)
    word = tl.full((), 0, tl.int32)
    while word < num_words:
        # 32 bits in an int64: no sign to mind.
        bits = tl.load(touch_ptr + (n * num_words + word) * num_tiles + tile).to(tl.int64) & 0xFFFFFFFF
        while bits != 0:
            place, bits = lowest_bit(bits)
            k = (word * 32 + place).to(tl.int64)
            if PADDED:
                k += n * boxes_an_image
            x1, y1, x2, y2, _, _ = load_cells(
                boxes_ptr, valid_ptr, k, num_images, boxes_an_image, scale, PADDED, HAS_VALID
            )
            start_y, bin_h = axis(y1, y2, PH)
            start_x, bin_w = axis(x1, x2, PW)
            ph, past_ph = _bins(start_y, bin_h, top, TILE_H, PH)
            first_pw, past_pw = _bins(start_x, bin_w, left, TILE_W, PW)
            while ph < past_ph:
                out_row = out_grad_ptr + k * out_grad_strides[0] + ph.to(tl.int64) * out_grad_strides[2]
                index_row = index_ptr + k * index_strides[0] + ph.to(tl.int64) * index_strides[2]
                pw = first_pw
                while pw < past_pw:
                    at = pw.to(tl.int64)
                    kept = tl.load(index_row + at * index_strides[3] + index_channels, mask=mask_c, other=-1)
                    grad = tl.load(out_row + at * out_grad_strides[3] + out_channels, mask=mask_c, other=0.0).to(ACC)
                    sums += tl.where(kept[None, None, :] == cells[:, :, None], grad[None, None, :], 0.0)
                    pw += 1
                ph += 1
        word += 1

    at = (offs_y.to(tl.int64) * grad_strides[2])[:, None] + (offs_x.to(tl.int64) * grad_strides[3])[None, :]
    mask = ((offs_y < H)[:, None] & (offs_x < W)[None, :])[:, :, None] & mask_c[None, None, :]
    ptrs = grad_ptr + n * grad_strides[0] + at[:, :, None] + channels[None, None, :]
    tl.store(ptrs, sums.to(grad_ptr.dtype.element_ty), mask=mask)


class GatherTile(NamedTuple):
    """Launch parameters: cells and channels of one program, and its warps."""

    height: int
    width: int
    block_c: int
    num_warps: int


def pick_gather_tile(C: int, channels_last: bool) -> GatherTile:
    """One warp with 32 sums a thread: it loads a bin's cells in 16 bytes a thread and waits for no other warp.

    Without channels_last every element of a bin is a load of its own: fewer channels and more cells, whose rows are
    then 32 bytes or more.
    """
    block_c = max(16, next_power_of_2(max(C, 1)))
    if channels_last:
        return GatherTile(2, 2, min(block_c, 256), num_warps=1)
    return GatherTile(4, 16, min(block_c, 16), num_warps=1)


def _launch(grad: Tensor, out_grad: Tensor, index: Tensor, boxes: Tensor, valid: Tensor | None, scale: float) -> None:
    """Fill `grad` [N, C, H, W] (uninitialised) from `out_grad` and `index` [K, C, PH, PW]."""
    N, C, H, W = grad.shape
    tile = pick_gather_tile(C, grad.stride(1) == 1)
    tiles_across = cdiv(W, tile.width)
    num_tiles = cdiv(H, tile.height) * tiles_across
    num_words = cdiv(boxes.shape[-2], WORD)
    touch = torch.empty((N, num_words, num_tiles), dtype=torch.int32, device=boxes.device)
    shared = {
        "touch_ptr": touch,
        "scale": scale,
        "tiles_across": tiles_across,
        "num_tiles": num_tiles,
        "num_words": num_words,
        "PH": out_grad.shape[2],
        "PW": out_grad.shape[3],
        "TILE_H": tile.height,
        "TILE_W": tile.width,
        **box_arguments(boxes, valid, N),
    }
    with on_device(out_grad):
        if touch.numel():
            # One axis: the others end at 65,535 blocks of tiles, a map of 2,896 x 2,896 cells.
            _touch_kernel[(N * num_words * cdiv(num_tiles, BLOCK_TILES),)](
                BLOCK_T=BLOCK_TILES, enable_fp_fusion=False, **shared
            )
        _gather_kernel[(N * num_tiles * cdiv(C, tile.block_c),)](
            grad_ptr=grad,
            out_grad_ptr=out_grad,
            index_ptr=index,
            C=C,
            H=H,
            W=W,
            grad_strides=tuple(grad.stride()),
            out_grad_strides=tuple(out_grad.stride()),
            index_strides=tuple(index.stride()),
            BLOCK_C=tile.block_c,
            GRAD_STRIDE_C_IS_1=grad.stride(1) == 1,
            OUT_GRAD_STRIDE_C_IS_1=out_grad.stride(1) == 1,
            INDEX_STRIDE_C_IS_1=index.stride(1) == 1,
            ACC=tl.float64 if out_grad.dtype == torch.float64 else tl.float32,
            num_warps=tile.num_warps,
            enable_fp_fusion=False,  # the cells of a box are those of the forward
            **shared,
        )


@custom_op("roi_pool_backward")
def roi_pool_backward(
    out_grad: Tensor,
    index: Tensor,
    boxes: Tensor,
    valid: Tensor | None,
    shape: list[int],
    channels_last: bool,
    scale: float,
) -> Tensor:
    """Gradient of `roi_pool` to the features [N, C, H, W], summed in fp32, in the dtype of `out_grad`."""
    grad = empty_map(shape, out_grad, channels_last)
    if grad.numel():
        _launch(grad, out_grad, index, boxes, valid, scale)
    return grad


roi_pool_backward.register_autograd(no_second_derivative("roi_pool"))


@roi_pool_backward.register_fake
def _(out_grad, index, boxes, valid, shape, channels_last, scale):
    return empty_map(shape, out_grad, channels_last)
