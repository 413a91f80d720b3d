"""Pasting in one launch, to bools, to packed bits, or to probabilities.

A program owns a band of ROWS rows of one mask. The rows are one stretch of memory. The program first stores zeros over
the whole stretch, 16 bytes a thread. It then writes the pixels of the box: a lane owns a column of a block, and goes
down the rows of the band. The values that the lane interpolates along x stay in registers until the rows sample another
cell of the mask.

Run lengths are in `runs`. Letters: K instances, M mask side, H W image size, L elements of a row (pixels, or words).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....common.launch import cdiv, on_device
from ....namespace import custom_op
from ....packed import WORD
from .geometry import BEYOND, along_x, along_y, axis, is_inside, taps

CHUNK_BYTES = 2048  # zeros of one step: four stores of 16 bytes a thread
ROWS = 16  # rows of a band: enough to share what is interpolated along x, and enough programs for small boxes
BLOCK_X = 128  # columns of a block: four of a lane
GROUP = tl.constexpr(16)  # elements: a store of 16 elements begins at a multiple of 16, so that the store is wide


@triton.jit(do_not_specialize=["H", "W", "L", "bands"])
def _paste_kernel(
    out_ptr,  # [K, H, L]
    masks_ptr,  # [K, M, M]
    boxes_ptr,  # [K, 4] fp32
    H,
    W,
    L,
    bands,  # of a mask
    threshold,
    SIDE: tl.constexpr,
    PACKED: tl.constexpr,
    BINARY: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    TORCHVISION: tl.constexpr,
):
    k = (tl.program_id(0) // bands).to(tl.int64)
    first_y = tl.program_id(0) % bands * ROWS
    past_y = tl.minimum(first_y + ROWS, H)
    box_ptr = boxes_ptr + k * 4
    x_start, x_scale, left, right = axis(tl.load(box_ptr), tl.load(box_ptr + 2), W, SIDE, TORCHVISION)
    y_start, y_scale, top, bottom = axis(tl.load(box_ptr + 1), tl.load(box_ptr + 3), H, SIDE, TORCHVISION)
    mask_ptr = masks_ptr + k * (SIDE * SIDE)
    mask_out = out_ptr + k * H * L

    begin = k * H * L + first_y * L
    _store_zeros(out_ptr, begin, begin + (past_y - first_y) * L, CHUNK)
    tl.debug_barrier()  # another thread may have stored the zero of a pixel

    first_y = tl.maximum(first_y, top)
    past_y = tl.minimum(past_y, bottom)
    if first_y < past_y:
        if PACKED:
            first_x = left // 32 * 32  # the first pixel of a word
        else:
            first_x = left
        for block_x in range(first_x, right, BLOCK_X):
            x = block_x + tl.arange(0, BLOCK_X)
            x_cell, x_weight = taps(x, x_start, x_scale, left, right, SIDE, TORCHVISION)
            upper = tl.zeros((BLOCK_X,), tl.float32)
            lower = tl.zeros((BLOCK_X,), tl.float32)
            held = tl.full((), BEYOND, tl.int32)  # the cell of `upper`
            y = first_y + 0
            while y < past_y:
                cell, weight = taps(y, y_start, y_scale, top, bottom, SIDE, TORCHVISION)
                if cell != held:
                    upper = along_x(mask_ptr, cell, x_cell, x_weight, SIDE)
                    lower = along_x(mask_ptr, cell + 1, x_cell, x_weight, SIDE)
                    held = cell
                value = along_y(upper, lower, weight)
                row_out = mask_out + y * L
                if PACKED:
                    bits = is_inside(value, threshold, TORCHVISION).to(tl.int32) << tl.arange(0, BLOCK_X) % 32
                    word = block_x // 32 + tl.arange(0, BLOCK_X // 32)
                    tl.store(row_out + word, tl.sum(tl.reshape(bits, (BLOCK_X // 32, 32)), 1), mask=word < L)
                elif BINARY:
                    tl.store(row_out + x, is_inside(value, threshold, TORCHVISION).to(tl.uint8), mask=x < right)
                else:
                    tl.store(row_out + x, value, mask=x < right)
                y += 1


@triton.jit
def _store_zeros(out_ptr, begin, end, CHUNK: tl.constexpr):
    """Store zeros in the elements begin..end (past the last, int64) of an output that begins at a multiple of 16."""
    first = (begin + GROUP - 1) // GROUP
    last = end // GROUP
    groups = (last - first).to(tl.int32)  # -1 if begin and end lie inside one group
    offs = tl.arange(0, CHUNK)
    zeros = tl.zeros((CHUNK,), out_ptr.dtype.element_ty)
    for chunk in range(0, groups, CHUNK // GROUP):
        # A limit in groups, and not in elements, keeps a store wide.
        tl.store(out_ptr + (first + chunk) * GROUP + offs, zeros, mask=offs // GROUP < groups - chunk)
    offs = tl.arange(0, GROUP)
    zeros = tl.zeros((GROUP,), out_ptr.dtype.element_ty)
    tl.store(out_ptr + begin + offs, zeros, mask=begin + offs < tl.minimum(first * GROUP, end))
    tail = last * GROUP + offs
    tl.store(out_ptr + tail, zeros, mask=(tail >= begin) & (tail < end))


def _empty_out(masks: Tensor, height: int, width: int, output: str) -> Tensor:
    shape, dtype = (masks.shape[0], height, width), torch.float32
    if output == "packed":
        shape, dtype = (masks.shape[0], height, -(-width // WORD)), torch.int32
    elif output == "bool":
        dtype = torch.bool
    return torch.empty(shape, dtype=dtype, device=masks.device)


@custom_op("paste_masks")
def paste_masks(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float, output: str, convention: str
) -> Tensor:
    """masks [K, M, M] fp16, bf16 or fp32, boxes [K, 4] fp32 -> [K, H, W] fp32 or bool, or packed int32."""
    out = _empty_out(masks, height, width, output)
    if not out.numel():
        return out
    flat = out.view(torch.uint8) if output == "bool" else out
    bands = cdiv(height, ROWS)
    with on_device(out):
        _paste_kernel[(len(masks) * bands,)](
            out_ptr=flat,
            masks_ptr=masks.contiguous(),
            boxes_ptr=boxes.contiguous(),
            H=height,
            W=width,
            L=out.shape[2],
            bands=bands,
            threshold=threshold,
            SIDE=masks.shape[1],
            PACKED=output == "packed",
            BINARY=output != "probability",
            CHUNK=CHUNK_BYTES // flat.element_size(),
            ROWS=ROWS,
            BLOCK_X=BLOCK_X,
            TORCHVISION=convention == "torchvision",
            num_warps=1,
            enable_fp_fusion=False,  # coordinates and values are the reference's, bit for bit
        )
    return out


@paste_masks.register_fake
def _(masks, boxes, height, width, threshold, output, convention):
    return _empty_out(masks, height, width, output)
