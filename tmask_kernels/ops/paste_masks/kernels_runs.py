"""COCO's run lengths on the device, from the boxes' columns: no mask is ever held, not even as bits.

A run ends where a pixel differs from the one before it in column-major order: above it, or, in the top row, at the
bottom of the column to the left. Such changes are counted in each column, their running sum says where each column
writes, and a second launch of the same kernel writes their positions; the differences of those are the counts. The
pixels are computed twice, which costs less than keeping them.

A thread owns a column and goes down the rows that the box can reach; what it interpolates along x stays in registers
until the rows sample another cell. Letters as in `kernels`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from tmask_kernels._triton import on_device
from tmask_kernels.ops.paste_masks.kernels_geometry import BEYOND, along_x, along_y, axis, is_inside, taps

BLOCK_X = 32  # columns of a program: a warp


@triton.jit(do_not_specialize=["H", "W"])
def _runs_kernel(
    changes_ptr,  # int64 [K, W]: changes in each column; with WRITE the sum of those up to its end
    ends_ptr,  # int32 [changes + K + 1], with WRITE: where runs end in the pixels of all masks, modulo 2^32
    masks_ptr,  # [K, M, M]
    boxes_ptr,  # [K, 4] fp32
    H,
    W,
    threshold,
    SIDE: tl.constexpr,
    BLOCK_X: tl.constexpr,
    TORCHVISION: tl.constexpr,
    WRITE: tl.constexpr,
):
    blocks = tl.cdiv(W, BLOCK_X)
    k = (tl.program_id(0) // blocks).to(tl.int64)
    first_x = tl.program_id(0) % blocks * BLOCK_X
    x = first_x + tl.arange(0, BLOCK_X)
    mask_x = x < W
    column = k * W + x
    box_ptr = boxes_ptr + k * 4
    x_start, x_scale, left, right = axis(tl.load(box_ptr), tl.load(box_ptr + 2), W, SIDE, TORCHVISION)
    y_start, y_scale, top, bottom = axis(tl.load(box_ptr + 1), tl.load(box_ptr + 3), H, SIDE, TORCHVISION)
    mask_ptr = masks_ptr + k * (SIDE * SIDE)

    if WRITE:  # after the leading 0, the changes of all columns before, and the ends of all masks before
        slot = tl.load(changes_ptr + column - 1, mask=mask_x & (column > 0), other=0) + k + 1
        tl.store(ends_ptr, 0, mask=tl.program_id(0) == 0)
    else:
        slot = tl.zeros((BLOCK_X,), tl.int64)
    # One column more than the box has: it may begin with the change that ends the last one.
    past = tl.where((first_x <= right) & (first_x + BLOCK_X > left), tl.minimum(bottom + 1, H), 0)
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
            tl.store(ends_ptr + slot, (column * H + y).to(tl.int32), mask=changes)
        slot += changes.to(tl.int64)
        before = now
        y = tl.maximum(y + 1, top)  # the rows between are empty, and so is the top row then
    if WRITE:  # the last run of a mask ends with it
        tl.store(ends_ptr + slot, ((k + 1) * W * H).to(tl.int32), mask=x == W - 1)
    else:
        tl.store(changes_ptr + column, slot, mask=mask_x)


def paste_runs(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float, convention: str
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Run lengths of K masks one after another [C], zeros first, on the host, and how many each mask has [K].

    masks [K, M, M] fp16, bf16 or fp32, boxes [K, 4] fp32. The host waits twice: for the number of runs, so that no
    capacity can be too small, and for the runs.
    """
    K = len(masks)
    if not K:
        return np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int64)
    masks, boxes = masks.contiguous(), boxes.contiguous()

    def launch(changes: Tensor, ends: Tensor, write: bool) -> None:
        with on_device(masks):
            _runs_kernel[(K * triton.cdiv(width, BLOCK_X),)](
                changes_ptr=changes,
                ends_ptr=ends,
                masks_ptr=masks,
                boxes_ptr=boxes,
                H=height,
                W=width,
                threshold=threshold,
                SIDE=masks.shape[1],
                BLOCK_X=BLOCK_X,
                TORCHVISION=convention == "torchvision",
                WRITE=write,
                num_warps=1,
                enable_fp_fusion=False,  # coordinates and values are the reference's, bit for bit
            )

    changes = torch.empty(K * width, dtype=torch.int64, device=masks.device)
    launch(changes, changes, write=False)
    changes = changes.cumsum(0)
    totals = changes[width - 1 :: width].cpu().numpy()  # [K]; a wait: the output's size depends on it
    ends = torch.empty(int(totals[-1]) + K + 1, dtype=torch.int32, device=masks.device)
    launch(changes, ends, write=True)
    # Positions are modulo 2^32, and so are their differences, which are below.
    counts = (ends[1:] - ends[:-1]).cpu().numpy()
    return counts, np.diff(totals, prepend=0) + 1
