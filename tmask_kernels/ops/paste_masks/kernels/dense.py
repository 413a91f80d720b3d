"""Pasting in one launch: each element of a dense output (a byte, a float, a word of 32 bits) is written once.

The elements of one mask are a flat stretch of memory, whatever the width of the image. A program writes BLOCK * STEPS
of them, BLOCK at a time, and only where such a chunk touches the mask's box does it compute anything: elsewhere it
stores zeros. A thread owns GROUP neighbouring elements, 16 bytes, in chunks that begin at multiples of 16 elements of
memory, so rows of any width are stored 16 bytes at a time. A group has pixels of at most two rows.

Run lengths are in `runs`. Letters: K instances, M mask side, H W image size, L elements of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....common.launch import on_device
from ....namespace import custom_op
from ....packed import WORD
from .geometry import along_x, along_y, axis, is_inside, taps

CHUNK_BYTES = 512  # a warp's store of 16 bytes a thread
STEPS = 16  # chunks of a program: enough work to pay for reading the box


@triton.jit(do_not_specialize=["H", "W", "L", "programs"])
def _paste_kernel(
    out_ptr,  # [K, H, L]
    masks_ptr,  # [K, M, M]
    boxes_ptr,  # [K, 4] fp32
    H,
    W,
    L,
    programs,  # of a mask
    threshold,
    SIDE: tl.constexpr,
    PIXELS: tl.constexpr,  # of an element: 32 bits of a word, or 1
    BINARY: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    STEPS: tl.constexpr,
    TORCHVISION: tl.constexpr,
):
    k = (tl.program_id(0) // programs).to(tl.int64)
    part = tl.program_id(0) % programs
    box_ptr = boxes_ptr + k * 4
    x_start, x_scale, left, right = axis(tl.load(box_ptr), tl.load(box_ptr + 2), W, SIDE, TORCHVISION)
    y_start, y_scale, top, bottom = axis(tl.load(box_ptr + 1), tl.load(box_ptr + 3), H, SIDE, TORCHVISION)
    mask_ptr = masks_ptr + k * (SIDE * SIDE)
    left_element = left // PIXELS
    right_element = (right + PIXELS - 1) // PIXELS

    size = H * L
    origin = k * size
    aligned = origin // 16 * 16
    lead = (origin - aligned).to(tl.int32)  # elements of the mask before, in the first chunk
    offs = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    begin = part * (STEPS * BLOCK)
    for chunk in range(begin, tl.minimum(begin + STEPS * BLOCK, size + lead), BLOCK):
        first = chunk - lead  # element of the mask
        tile = tl.zeros((BLOCK // GROUP, GROUP), out_ptr.dtype.element_ty)
        if _touches(
            tl.maximum(first, 0), tl.minimum(first + BLOCK, size) - 1, L, left_element, right_element, top, bottom
        ):
            group = first + tl.arange(0, BLOCK // GROUP)[:, None] * GROUP
            y = group // L
            column = group - y * L + tl.arange(0, GROUP)[None, :]
            wraps = column >= L
            column = tl.where(wraps, column - L, column)
            this_cell, this_weight = taps(y, y_start, y_scale, top, bottom, SIDE, TORCHVISION)
            next_cell, next_weight = taps(y + 1, y_start, y_scale, top, bottom, SIDE, TORCHVISION)
            y_cell = tl.where(wraps, next_cell, this_cell)
            y_weight = tl.where(wraps, next_weight, this_weight)
            for i in range(PIXELS):
                x_cell, x_weight = taps(column * PIXELS + i, x_start, x_scale, left, right, SIDE, TORCHVISION)
                upper = along_x(mask_ptr, y_cell, x_cell, x_weight, SIDE)
                lower = along_x(mask_ptr, y_cell + 1, x_cell, x_weight, SIDE)
                value = along_y(upper, lower, y_weight)
                if BINARY:
                    tile |= (is_inside(value, threshold, TORCHVISION).to(tl.int32) << i).to(tile.dtype)
                else:
                    tile = value
        place = out_ptr + (aligned + chunk) + offs
        if (first >= 0) & (first + BLOCK <= size):
            tl.store(place, tile)
        else:  # the neighbours' elements stay theirs
            tl.store(place, tile, mask=(first + offs >= 0) & (first + offs < size))


@triton.jit
def _touches(first, last, L, left, right, top, bottom):
    """Whether elements first..last of a mask touch the rows top..bottom and the columns left..right (past the last)."""
    first_y = first // L
    last_y = last // L
    after = first - first_y * L < right  # the first row's part begins before the right edge
    before = last - last_y * L >= left  # the last row's part ends behind the left edge
    columns = tl.where(last_y == first_y, after & before, after | before | (last_y > first_y + 1))
    return columns & (last_y >= top) & (first_y < bottom) & (left < right)


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
    row = out.shape[2]
    block = CHUNK_BYTES // flat.element_size()
    group = min(16 // flat.element_size(), 1 << (row.bit_length() - 1))  # no more than a row, a power of two
    programs = triton.cdiv(height * row + 15, block * STEPS)
    with on_device(out):
        _paste_kernel[(len(masks) * programs,)](
            out_ptr=flat,
            masks_ptr=masks.contiguous(),
            boxes_ptr=boxes.contiguous(),
            H=height,
            W=width,
            L=row,
            programs=programs,
            threshold=threshold,
            SIDE=masks.shape[1],
            PIXELS=WORD if output == "packed" else 1,
            BINARY=output != "probability",
            BLOCK=block,
            GROUP=group,
            STEPS=STEPS,
            TORCHVISION=convention == "torchvision",
            num_warps=1,
            enable_fp_fusion=False,  # coordinates and values are the reference's, bit for bit
        )
    return out


@paste_masks.register_fake
def _(masks, boxes, height, width, threshold, output, convention):
    return _empty_out(masks, height, width, output)
