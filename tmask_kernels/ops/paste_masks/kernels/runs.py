"""COCO's run lengths on the device, from the boxes' columns: no mask is ever held, not even as bits.

A run ends where a pixel differs from the one before it in column-major order: above it, or, in the top row, at the
bottom of the column to the left. Such changes are counted in each column, their running sum says where each column
writes, and a second launch of the same kernel writes their positions; the differences of those are the counts. The
pixels are computed twice, which costs less than keeping them.

A thread owns a column and goes down the rows that the box can reach; what it interpolates along x stays in registers
until the rows sample another cell. Letters as in `kernels`; and N images of their own sizes, D masks an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from ....common.launch import cdiv, on_device
from .geometry import BEYOND, along_x, along_y, axis, is_inside, taps

BLOCK_X = 32  # columns of a program: a warp


@triton.jit(do_not_specialize=["D", "rows", "columns"])
def _runs_kernel(
    changes_ptr,  # int64 [N, D, columns]: runs that end in each column; with WRITE the sum of those up to its end
    ends_ptr,  # int32 [runs], with WRITE: where they end in the pixels of their mask
    masks_ptr,  # [N, rows, M, M]
    boxes_ptr,  # [N, rows, 4] fp32
    images_ptr,  # int32 [N, 3]: H, W and how many masks there are
    D,  # at most, of an image
    rows,
    columns,  # of the widest image
    threshold,
    SIDE: tl.constexpr,
    BLOCK_X: tl.constexpr,
    TORCHVISION: tl.constexpr,
    WRITE: tl.constexpr,
):
    blocks = tl.cdiv(columns, BLOCK_X)
    slot_k = (tl.program_id(0) // blocks).to(tl.int64)
    n = slot_k // D
    d = slot_k - n * D
    H = tl.load(images_ptr + n * 3)
    W = tl.load(images_ptr + n * 3 + 1)
    exists = d < tl.load(images_ptr + n * 3 + 2)
    first_x = tl.program_id(0) % blocks * BLOCK_X
    x = first_x + tl.arange(0, BLOCK_X)
    mask_x = x < tl.where(exists, W, 0)  # by a limit: Triton 3.9's interpreter takes no mask with one bool spread in
    column = slot_k * columns + x
    k = n * rows + d
    box_ptr = boxes_ptr + k * 4
    x_start, x_scale, left, right = axis(tl.load(box_ptr), tl.load(box_ptr + 2), W, SIDE, TORCHVISION)
    y_start, y_scale, top, bottom = axis(tl.load(box_ptr + 1), tl.load(box_ptr + 3), H, SIDE, TORCHVISION)
    mask_ptr = masks_ptr + k * (SIDE * SIDE)

    if WRITE:  # after the runs of all columns before
        slot = tl.load(changes_ptr + column - 1, mask=mask_x & (column > 0), other=0)
    else:
        slot = tl.zeros((BLOCK_X,), tl.int64)
    # One column more than the box has: it may begin with the change that ends the last one.
    touched = exists & (first_x <= right) & (first_x + BLOCK_X > left)
    past = tl.where(touched, tl.minimum(bottom + 1, H), 0)
    y = H - 1
    cell, weight = taps(y, y_start, y_scale, top, bottom, SIDE, TORCHVISION)
    x_cell, x_weight = taps(x - 1, x_start, x_scale, left, right, SIDE, TORCHVISION)
    upper = along_x(mask_ptr, cell, x_cell, x_weight, SIDE)
    lower = along_x(mask_ptr, cell + 1, x_cell, x_weight, SIDE)
    before = is_inside(along_y(upper, lower, weight), threshold, TORCHVISION)
    x_cell, x_weight = taps(x, x_start, x_scale, left, right, SIDE, TORCHVISION)
    upper = tl.zeros((BLOCK_X,), tl.float32)
    lower = tl.zeros((BLOCK_X,), tl.float32)
    held = tl.full((), BEYOND, tl.int32)  # the row of cells that `upper` is of
    y = tl.full((), 0, tl.int32)
    while y < past:
        cell, weight = taps(y, y_start, y_scale, top, bottom, SIDE, TORCHVISION)
        if cell != held:
            upper = along_x(mask_ptr, cell, x_cell, x_weight, SIDE)
            lower = along_x(mask_ptr, cell + 1, x_cell, x_weight, SIDE)
            held = cell
        now = is_inside(along_y(upper, lower, weight), threshold, TORCHVISION)
        changes = (now != before) & mask_x
        if WRITE:
            tl.store(ends_ptr + slot, x * H + y, mask=changes)
        slot += changes.to(tl.int64)
        before = now
        y = tl.maximum(y + 1, top)  # the rows between are empty, and so is the top row then
    ends = mask_x & (x == W - 1)  # the last run of a mask ends with it
    if WRITE:
        tl.store(ends_ptr + slot, x * H + H, mask=ends)
    else:
        tl.store(changes_ptr + column, slot + ends.to(tl.int64), mask=x < columns)


def paste_runs(
    masks: Tensor,
    boxes: Tensor,
    num_masks: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    threshold: float,
    convention: str,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Run lengths of K masks one after another [C], zeros first, on the host, and how many each mask has [K].

    masks [N, D, M, M] fp16, bf16 or fp32 and boxes [N, D, 4] fp32, of which the first `num_masks[n]` of image n count,
    K in all; sizes: (H, W) of each image. The host waits twice, however many images: for the number of runs, so that
    no capacity can be too small, and for the runs.
    """
    if not sum(num_masks):
        return np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int64)
    masks, boxes = masks.contiguous(), boxes.contiguous()
    N, D, columns = len(masks), max(num_masks), max(width for _, width in sizes)
    table = [(*size, number) for size, number in zip(sizes, num_masks, strict=True)]
    images = torch.tensor(table, dtype=torch.int32).to(masks.device, non_blocking=True)  # [N, 3]

    def launch(changes: Tensor, ends: Tensor, write: bool) -> None:
        with on_device(masks):
            _runs_kernel[(N * D * cdiv(columns, BLOCK_X),)](
                changes_ptr=changes,
                ends_ptr=ends,
                masks_ptr=masks,
                boxes_ptr=boxes,
                images_ptr=images,
                D=D,
                rows=masks.shape[1],
                columns=columns,
                threshold=threshold,
                SIDE=masks.shape[2],
                BLOCK_X=BLOCK_X,
                TORCHVISION=convention == "torchvision",
                WRITE=write,
                num_warps=1,
                enable_fp_fusion=False,  # coordinates and values are the reference's, bit for bit
            )

    changes = torch.empty(N * D * columns, dtype=torch.int64, device=masks.device)
    launch(changes, changes, write=False)
    changes = changes.cumsum(0)
    totals = changes[columns - 1 :: columns].cpu().numpy()  # [N * D]; a wait: the output's size depends on it
    ends = torch.empty(int(totals[-1]), dtype=torch.int32, device=masks.device)
    launch(changes, ends, write=True)
    per_mask = np.diff(totals, prepend=0)
    per_mask = per_mask[per_mask > 0]  # [K]: each has a run at least, and where no mask is there is none
    end = ends.cpu().numpy()  # the other wait
    counts, first = end.copy(), np.cumsum(per_mask) - per_mask
    counts[1:] -= end[:-1]
    counts[first] = end[first]  # a mask's first run begins with it
    return counts, per_mask
