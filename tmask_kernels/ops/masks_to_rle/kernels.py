"""Run lengths of masks that are in memory, in two kernels.

The first reads the masks once and packs them, 32 rows of a column into a word. The second goes down the columns of
words: a bit that differs from the bit before it is the end of a run. It runs twice: it counts the ends of each column,
and then stores them. Letters as in `reference`; and B = ceil(H / 32) words a column.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.kernels.numbers import count_bits, lowest_bit
from ...common.launch import cdiv, on_device
from ...common.rle import read_later
from ...packed import WORD
from ...run_lengths import RunLengths

PACKED_X = 128  # columns that a program packs: four of a lane
BLOCK_X = 32  # columns of words of a program: a warp


@triton.jit(do_not_specialize=["H", "W", "B"])
def _pack_kernel(
    words_ptr,  # int32 [K, B, W]
    masks_ptr,  # [K, H, W]
    H,
    W,
    B,
    threshold,
    BINARY: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    blocks = tl.cdiv(W, BLOCK_X)
    row = (tl.program_id(0) // blocks).to(tl.int64)  # of words, over all masks
    k = row // B
    first_y = ((row - k * B) * 32).to(tl.int32)
    first_x = tl.program_id(0) % blocks * BLOCK_X
    lane = tl.arange(0, BLOCK_X)  # added last, so that the addresses of a lane's columns differ by constants
    exists = lane < W - first_x
    word = tl.zeros((BLOCK_X,), tl.int32)
    for y in tl.static_range(32):
        # Rows beyond the mask repeat its last one, so that no run ends there.
        row_ptr = masks_ptr + (k * H + tl.minimum(first_y + y, H - 1)) * W + first_x
        value = tl.load(row_ptr + lane, mask=exists)
        if BINARY:
            inside = value != 0
        else:
            inside = value.to(tl.float32) > threshold
        word |= inside.to(tl.int32) << y
    tl.store(words_ptr + row * W + first_x + lane, word, mask=exists)


@triton.jit(do_not_specialize=["room", "columns", "H", "W", "B"])
def _ends_kernel(
    changes_ptr,  # int32 [K, W]: runs that end in each column; with WRITE int64, the sums up to its end
    ends_ptr,  # int32 [room], with WRITE: where they end in the pixels of their mask
    words_ptr,  # int32 [K, B, W]
    room,
    columns,  # K W
    H,
    W,
    B,
    BLOCK_X: tl.constexpr,
    WRITE: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    exists = column < columns
    k = column // W
    x = (column - k * W).to(tl.int32)
    column_ptr = words_ptr + k * B * W + x
    if WRITE:  # after the runs of all columns before
        slot = tl.load(changes_ptr + column - 1, mask=exists & (column > 0), other=0)
    else:
        slot = tl.zeros((BLOCK_X,), tl.int64)
    # Of the pixel before: the last one of the column to the left.
    before = tl.load(column_ptr + (tl.cast(B, tl.int64) - 1) * W - 1, mask=exists & (x > 0), other=0)
    before = before.to(tl.uint32, bitcast=True) >> 31
    for b in range(B):
        word = tl.load(column_ptr + tl.cast(b, tl.int64) * W, mask=exists, other=0).to(tl.uint32, bitcast=True)
        changes = word ^ (word << 1 | before)
        before = word >> 31
        if WRITE:
            while tl.max((changes > 0).to(tl.int32), 0) > 0:
                there = changes > 0
                bit, changes = lowest_bit(changes)
                tl.store(ends_ptr + slot, x * H + b * 32 + bit, mask=there & (slot < room))
                slot += there.to(tl.int64)
        else:
            slot += count_bits(changes)
    ends = exists & (x == W - 1)  # the last run of a mask ends with it
    if WRITE:
        tl.store(ends_ptr + slot, x * H + H, mask=ends & (slot < room))
    else:
        tl.store(changes_ptr + column, (slot + ends.to(tl.int64)).to(tl.int32), mask=exists)


def encode(masks: Tensor, threshold: float) -> RunLengths:
    """masks [K, H, W] fp16, bf16, fp32 or bool. The host does not wait; `masks` may change afterwards."""
    K, H, W = masks.shape
    if not K:
        return RunLengths(list, (H, W), 0, 0)
    B, binary, device = cdiv(H, WORD), not masks.is_floating_point(), masks.device
    masks = masks.contiguous().view(torch.uint8) if binary else masks.contiguous()
    words = torch.empty((K, B, W), dtype=torch.int32, device=device)
    with on_device(words):
        _pack_kernel[(K * B * cdiv(W, PACKED_X),)](
            words_ptr=words,
            masks_ptr=masks,
            H=H,
            W=W,
            B=B,
            threshold=threshold,
            BINARY=binary,
            BLOCK_X=PACKED_X,
            num_warps=1,
            enable_fp_fusion=False,  # there is nothing to fuse
        )

    def launch(changes: Tensor, ends: Tensor, write: bool = True) -> None:
        with on_device(words):
            _ends_kernel[(cdiv(K * W, BLOCK_X),)](
                changes_ptr=changes,
                ends_ptr=ends,
                words_ptr=words,
                room=len(ends),
                columns=K * W,
                H=H,
                W=W,
                B=B,
                BLOCK_X=BLOCK_X,
                WRITE=write,
                num_warps=1,
                enable_fp_fusion=False,
            )

    changes = torch.empty(K * W, dtype=torch.int32, device=device)
    launch(changes, changes, write=False)
    return RunLengths(read_later(changes, K, W, launch), (H, W), 0, K)
