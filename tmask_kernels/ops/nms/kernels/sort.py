"""Boxes in the order in which NMS takes them, in Triton. Letters: S segments, K boxes of a segment.

The sort is PyTorch's; one launch then gathers boxes, states and groups, whatever the strides of the caller's tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....common.kernels.numbers import decode_int
from ....common.launch import encode_ints, on_device
from ..reference import sort_order

BLOCK = 256

# What a slot holds: no box (or one that is removed), one that removes nothing (its score is NaN), or a box.
NO_BOX = tl.constexpr(0)
HARMLESS = tl.constexpr(1)
BOX = tl.constexpr(2)


class SortedBoxes(NamedTuple):
    """Contiguous, by falling score, ties by rising index, then NaN scores and, anywhere among these, empty slots."""

    order: Tensor  # [S, K] int64: position in the caller's tensors
    boxes: Tensor  # [S, K, 4] float32
    state: Tensor  # [S, K] int8: NO_BOX, HARMLESS or BOX
    groups: Tensor | None  # [S, K] int64: two boxes meet only if theirs are equal


@triton.jit
def store_kept(ptr, rows, x1, y1, x2, y2, state, mask):
    """Write boxes to a list of kept ones. A harmless one gets a coordinate that overlaps nothing."""
    tl.store(ptr + rows * 4, tl.where(state == BOX, x1, float("nan")), mask=mask)
    tl.store(ptr + rows * 4 + 1, y1, mask=mask)
    tl.store(ptr + rows * 4 + 2, x2, mask=mask)
    tl.store(ptr + rows * 4 + 3, y2, mask=mask)


@triton.jit
def _offset(segment, row, strides):
    """Of rows in segments; strides as `encode_ints` gives them."""
    return segment * decode_int(strides[0]) + row * decode_int(strides[1])


@triton.jit(do_not_specialize=["K", "slots"])
def _sorted_kernel(
    sorted_boxes_ptr,  # [S, K, 4] float32
    state_ptr,  # [S, K] int8
    sorted_groups_ptr,  # [S, K] int64, only with groups
    order_ptr,  # [S, K] int64
    boxes_ptr,  # [S, K, 4], and the rest [S, K], of any strides
    scores_ptr,
    valid_ptr,  # bool, only if HAS_VALID
    groups_ptr,  # int64, only with groups
    box_strides,  # these as `encode_ints` gives them, but the last of a box: 1 is to be seen
    score_strides,
    valid_strides,
    group_strides,
    K,
    slots,  # S K
    HAS_VALID: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = slot < slots
    segment = slot // K
    row = tl.load(order_ptr + slot, mask=mask, other=0)
    score = tl.load(scores_ptr + _offset(segment, row, score_strides), mask=mask, other=0.0)
    state = tl.where(score == score, BOX, HARMLESS)
    if HAS_VALID:
        valid = tl.load(valid_ptr + _offset(segment, row, valid_strides), mask=mask, other=0)
        state = tl.where(valid != 0, state, NO_BOX)
    tl.store(state_ptr + slot, state.to(tl.int8), mask=mask)
    if HAS_GROUPS:
        group = tl.load(groups_ptr + _offset(segment, row, group_strides), mask=mask, other=0)
        tl.store(sorted_groups_ptr + slot, group, mask=mask)
    side = tl.arange(0, 4)[None, :]
    source = boxes_ptr + _offset(segment, row, box_strides)[:, None] + side * box_strides[2]
    box = tl.load(source, mask=mask[:, None], other=0.0).to(tl.float32)
    tl.store(sorted_boxes_ptr + slot[:, None] * 4 + side, box, mask=mask[:, None])


def sort_boxes(boxes: Tensor, scores: Tensor, valid: Tensor | None, groups: Tensor | None) -> SortedBoxes:
    """Sort boxes [S, K, 4] by scores [S, K], as `reference.sort_segments` does; S and K are not 0."""
    S, K = scores.shape
    order = sort_order(scores, valid).contiguous()  # that of a transposed tensor of scores is transposed too
    out = SortedBoxes(
        order=order,
        boxes=torch.empty((S, K, 4), dtype=torch.float32, device=boxes.device),
        state=torch.empty((S, K), dtype=torch.int8, device=boxes.device),
        groups=None if groups is None else torch.empty((S, K), dtype=torch.int64, device=boxes.device),
    )
    # Tensors that are not there are never read; any of the same type serves.
    valid_or_any = scores.new_empty((1, 1), dtype=torch.bool) if valid is None else valid
    groups_or_any = order if groups is None else groups
    with on_device(boxes):
        _sorted_kernel[(triton.cdiv(S * K, BLOCK),)](
            sorted_boxes_ptr=out.boxes,
            state_ptr=out.state,
            sorted_groups_ptr=order if out.groups is None else out.groups,
            order_ptr=order,
            boxes_ptr=boxes,
            scores_ptr=scores,
            valid_ptr=valid_or_any,
            groups_ptr=groups_or_any,
            box_strides=(*encode_ints(boxes.stride()[:2]), boxes.stride(2)),
            score_strides=encode_ints(scores.stride()),
            valid_strides=encode_ints(valid_or_any.stride()),
            group_strides=encode_ints(groups_or_any.stride()),
            K=K,
            slots=S * K,
            HAS_VALID=valid is not None,
            HAS_GROUPS=groups is not None,
            BLOCK=BLOCK,
            enable_fp_fusion=True,
        )
    return out
