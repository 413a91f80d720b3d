"""COCO's run lengths on the device, from the boxes' columns: no mask is ever held, not even as bits.

A run ends where a pixel differs from the one before it in column-major order: above it, or, in the top row, at the
bottom of the column to the left. The first launch counts such changes in each part of a column. The running sum of the
counts says where each part writes. The second launch of the same kernel writes the positions of the changes, and the
differences of the positions are COCO's counts. The pixels are computed twice, which costs less than keeping them.

A lane owns a part of a column and goes down its rows. The values that the lane interpolates along x stay in registers
until the rows sample another cell. If no value between two rows of cells can reach the threshold, the kernel looks at
one row between them and skips the others. Letters as in `dense`; and N images of their own sizes, D masks an image.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....common.launch import cdiv, on_device
from ....common.rle import read_later
from ....run_lengths import RunLengths
from .geometry import BEYOND, along_x, along_y, are_sure, axis, is_inside, last_row_of, taps

BLOCK_X = 32  # columns of a program: a warp
PARTS = 2  # of a box's rows, each of another program: the longest walk decides the time


@triton.jit(do_not_specialize=["room", "D", "rows", "columns"])
def _runs_kernel(
    changes_ptr,  # int32 [N, D, columns, PARTS]: runs that end in each part; with WRITE int64, the sums up to its end
    ends_ptr,  # int32 [room], with WRITE: where they end in the pixels of their mask
    masks_ptr,  # [N, rows, M, M]
    boxes_ptr,  # [N, rows, 4] fp32
    images_ptr,  # int32 [N, 3]: H, W and how many masks there are
    room,
    D,  # at most, of an image
    rows,
    columns,  # of the widest image
    threshold,
    SIDE: tl.constexpr,
    BLOCK_X: tl.constexpr,
    PARTS: tl.constexpr,
    TORCHVISION: tl.constexpr,
    WRITE: tl.constexpr,
):
    blocks = tl.cdiv(columns, BLOCK_X)
    part = tl.program_id(0) % PARTS
    block = tl.program_id(0) // PARTS
    slot_k = (block // blocks).to(tl.int64)
    n = slot_k // D
    d = slot_k - n * D
    H = tl.load(images_ptr + n * 3)
    W = tl.load(images_ptr + n * 3 + 1)
    exists = d < tl.load(images_ptr + n * 3 + 2)
    first_x = block % blocks * BLOCK_X
    x = first_x + tl.arange(0, BLOCK_X)
    mask_x = x < tl.where(exists, W, 0)  # by a limit: Triton 3.9's interpreter takes no mask with one bool spread in
    place = (slot_k * columns + x) * PARTS + part
    k = n * rows + d
    box_ptr = boxes_ptr + k * 4
    x_start, x_scale, left, right = axis(tl.load(box_ptr), tl.load(box_ptr + 2), W, SIDE, TORCHVISION)
    y_start, y_scale, top, bottom = axis(tl.load(box_ptr + 1), tl.load(box_ptr + 3), H, SIDE, TORCHVISION)
    mask_ptr = masks_ptr + k * (SIDE * SIDE)

    if WRITE:  # after the runs of all parts before
        slot = tl.load(changes_ptr + place - 1, mask=mask_x & (place > 0), other=0)
    else:
        slot = tl.zeros((BLOCK_X,), tl.int64)
    # One column more than the box has: it may begin with the change that ends the last one.
    touched = exists & (first_x <= right) & (first_x + BLOCK_X > left)
    # The first part begins with the top row of the image; the last one has a row more than the box.
    part_rows = (bottom - top) // PARTS
    first_y = tl.where(part == 0, 0, top + part * part_rows)
    past = tl.where(part == PARTS - 1, tl.minimum(bottom + 1, H), top + (part + 1) * part_rows)
    past = tl.where(touched, past, 0)
    before_y = tl.where(first_y == 0, H, first_y) - 1
    cell, weight = taps(before_y, y_start, y_scale, top, bottom, SIDE, TORCHVISION)
    before_x = tl.where(first_y == 0, x - 1, x)
    x_cell, x_weight = taps(before_x, x_start, x_scale, left, right, SIDE, TORCHVISION)
    upper = along_x(mask_ptr, cell, x_cell, x_weight, SIDE)
    lower = along_x(mask_ptr, cell + 1, x_cell, x_weight, SIDE)
    before = is_inside(along_y(upper, lower, weight), threshold, TORCHVISION)
    x_cell, x_weight = taps(x, x_start, x_scale, left, right, SIDE, TORCHVISION)
    upper = tl.zeros((BLOCK_X,), tl.float32)
    lower = tl.zeros((BLOCK_X,), tl.float32)
    held = tl.full((), BEYOND, tl.int32)  # the row of cells that `upper` is of
    y_step = 1.0 / y_scale  # pixels a cell
    y = first_y + 0
    while y < past:
        cell, weight = taps(y, y_start, y_scale, top, bottom, SIDE, TORCHVISION)
        last = y + 0  # the pixels of the rows y..last equal those of row y
        if cell != held:
            upper = along_x(mask_ptr, cell, x_cell, x_weight, SIDE)
            lower = along_x(mask_ptr, cell + 1, x_cell, x_weight, SIDE)
            held = cell
            if are_sure(upper, lower, threshold):
                # Cells never fall from row to row: if rows y and `far` sample one cell, so do the rows between.
                far = last_row_of(cell, y_start, y_step, past, TORCHVISION)
                far_cell, _ = taps(far, y_start, y_scale, top, bottom, SIDE, TORCHVISION)
                last = tl.where(far_cell == cell, tl.maximum(y, far), y)
        now = is_inside(along_y(upper, lower, weight), threshold, TORCHVISION)
        changes = (now != before) & mask_x
        if WRITE:
            tl.store(ends_ptr + slot, x * H + y, mask=changes & (slot < room))
        slot += changes.to(tl.int64)
        before = now
        y = tl.maximum(last + 1, top)  # the rows between are empty, and so is the top row then
    ends = mask_x & (x == tl.where(part == PARTS - 1, W - 1, -1))  # the last run of a mask ends with it
    if WRITE:
        tl.store(ends_ptr + slot, x * H + H, mask=ends & (slot < room))
    else:
        tl.store(changes_ptr + place, (slot + ends.to(tl.int64)).to(tl.int32), mask=x < columns)


def paste_runs(
    masks: Tensor,
    boxes: Tensor,
    numbers: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    threshold: float,
    convention: str,
) -> list[RunLengths]:
    """Run lengths of the masks of N images. The host does not wait.

    masks [N, D, M, M] fp16, bf16 or fp32 and boxes [N, D, 4] fp32, of which the first `numbers[n]` of image n count;
    sizes: (H, W) of each image. Masks and boxes must stay as they are until the run lengths are read.
    """
    firsts = itertools.accumulate(numbers, initial=0)
    if not sum(numbers):
        return [RunLengths(list, size, 0, 0) for size in sizes]
    masks, boxes = masks.contiguous(), boxes.contiguous()
    N, D, columns = len(masks), max(numbers), max(width for _, width in sizes)
    table = [(*size, number) for size, number in zip(sizes, numbers, strict=True)]
    images = torch.tensor(table, dtype=torch.int32).to(masks.device, non_blocking=True)  # [N, 3]

    def launch(changes: Tensor, ends: Tensor, write: bool = True) -> None:
        with on_device(masks):
            _runs_kernel[(N * D * cdiv(columns, BLOCK_X) * PARTS,)](
                changes_ptr=changes,
                ends_ptr=ends,
                masks_ptr=masks,
                boxes_ptr=boxes,
                images_ptr=images,
                room=len(ends),
                D=D,
                rows=masks.shape[1],
                columns=columns,
                threshold=threshold,
                SIDE=masks.shape[2],
                BLOCK_X=BLOCK_X,
                PARTS=PARTS,
                TORCHVISION=convention == "torchvision",
                WRITE=write,
                num_warps=1,
                enable_fp_fusion=False,  # coordinates and values are the reference's, bit for bit
            )

    changes = torch.empty(N * D * columns * PARTS, dtype=torch.int32, device=masks.device)
    launch(changes, changes, write=False)
    texts = read_later(changes, N * D, columns, launch)
    return [RunLengths(texts, *image) for image in zip(sizes, firsts, numbers, strict=False)]
