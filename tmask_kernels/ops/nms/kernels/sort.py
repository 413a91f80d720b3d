"""Boxes in the order in which NMS takes them, in Triton. Letters: S segments, K boxes of a segment.

The sort of long segments is PyTorch's, of keys that a launch writes; another then gathers boxes, states and groups,
whatever the strides of the caller's tensors. Short segments are sorted by the program that takes their boxes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....common.kernels.numbers import decode_int
from ....common.launch import cdiv, encode_ints, on_device

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


@triton.jit
def _load_slots(scores_ptr, valid_ptr, segment, row, score_strides, valid_strides, mask, HAS_VALID: tl.constexpr):
    """Scores and states of the slots `row` of `segment`; no box where `mask` is false."""
    score = tl.load(scores_ptr + _offset(segment, row, score_strides), mask=mask, other=0.0)
    if not score.dtype.is_fp64():
        score = score.to(tl.float32)  # the interpreter compares bf16 values as integers
    state = tl.where(score == score, BOX, HARMLESS)
    if HAS_VALID:
        valid = tl.load(valid_ptr + _offset(segment, row, valid_strides), mask=mask, other=0)
        state = tl.where(valid != 0, state, NO_BOX)
    return score, tl.where(mask, state, NO_BOX)


@triton.jit
def _load_box(boxes_ptr, segment, row, box_strides, mask):
    """The coordinates of boxes `row` [B] of `segment`, fp32 [B, 4]."""
    source = boxes_ptr + _offset(segment, row, box_strides)[:, None] + tl.arange(0, 4)[None, :] * box_strides[2]
    return tl.load(source, mask=mask[:, None], other=0.0).to(tl.float32)


@triton.jit
def sort_segment(
    sorted_boxes_ptr,  # [K, 4] float32, and the next three [K]: this segment's, to be written
    state_ptr,
    order_ptr,
    sorted_groups_ptr,  # only with groups
    boxes_ptr,  # the caller's, of all segments, and the rest, as `_sorted_kernel` has them
    scores_ptr,
    valid_ptr,
    groups_ptr,
    box_strides,
    score_strides,
    valid_strides,
    group_strides,
    segment,
    K,
    HAS_VALID: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """Sort a short segment: the place of a box is the number of those that come before it. O(K^2), without a launch."""
    for start in range(0, K, BLOCK):
        row = (start + tl.arange(0, BLOCK)).to(tl.int64)
        mask = row < K
        score, state = _load_slots(scores_ptr, valid_ptr, segment, row, score_strides, valid_strides, mask, HAS_VALID)
        place = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, K, OTHERS):
            other = (first + tl.arange(0, OTHERS)).to(tl.int64)
            exists = other < K
            rival, rival_state = _load_slots(
                scores_ptr, valid_ptr, segment, other, score_strides, valid_strides, exists, HAS_VALID
            )
            # Those with a score come first, by falling score; equals and all the rest by rising index.
            scored, rival_scored = (state == BOX)[:, None], (rival_state == BOX)[None, :]
            higher = scored & (rival[None, :] > score[:, None])
            equal = (scored == rival_scored) & ~(scored & (rival[None, :] != score[:, None]))
            before = (rival_scored & (~scored | higher)) | (equal & (other[None, :] < row[:, None]))
            place += tl.sum((before & exists[None, :]).to(tl.int32), 1)
        tl.store(order_ptr + place, row, mask=mask)
        tl.store(state_ptr + place, state, mask=mask)
        if HAS_GROUPS:
            group = tl.load(groups_ptr + _offset(segment, row, group_strides), mask=mask, other=0)
            tl.store(sorted_groups_ptr + place, group, mask=mask)
        box = _load_box(boxes_ptr, segment, row, box_strides, mask)
        tl.store(sorted_boxes_ptr + place[:, None] * 4 + tl.arange(0, 4)[None, :], box, mask=mask[:, None])
    # What other threads of this program read next.
    tl.debug_barrier()


@triton.jit(do_not_specialize=["K", "slots"])
def _keys_kernel(
    keys_ptr,  # [S, K] of the scores' dtype: an ascending, stable sort of them is the order
    scores_ptr,  # the rest as of `_sorted_kernel`
    valid_ptr,
    score_strides,
    valid_strides,
    K,
    slots,
    HAS_VALID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = slot < slots
    segment = slot // K
    score, state = _load_slots(
        scores_ptr, valid_ptr, segment, slot - segment * K, score_strides, valid_strides, mask, HAS_VALID
    )
    # The NaN is written anew: a negated one carries a sign bit, by which a radix sort may place it before all numbers.
    tl.store(keys_ptr + slot, tl.where(state == BOX, -score, float("nan")), mask=mask)


@triton.jit(do_not_specialize=["K", "slots", "outputs", "counters"])
def _sorted_kernel(
    sorted_boxes_ptr,  # [S, K, 4] float32
    state_ptr,  # [S, K] int8
    sorted_groups_ptr,  # [S, K] int64, only with groups
    indices_ptr,  # int64 [outputs], to be filled with -1
    counters_ptr,  # int64 [counters], to be filled with 0
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
    outputs,
    counters,
    HAS_VALID: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = slot < slots
    segment = slot // K
    row = tl.load(order_ptr + slot, mask=mask, other=0)
    _, state = _load_slots(scores_ptr, valid_ptr, segment, row, score_strides, valid_strides, mask, HAS_VALID)
    tl.store(state_ptr + slot, state.to(tl.int8), mask=mask)
    if HAS_GROUPS:
        group = tl.load(groups_ptr + _offset(segment, row, group_strides), mask=mask, other=0)
        tl.store(sorted_groups_ptr + slot, group, mask=mask)
    box = _load_box(boxes_ptr, segment, row, box_strides, mask)
    tl.store(sorted_boxes_ptr + slot[:, None] * 4 + tl.arange(0, 4)[None, :], box, mask=mask[:, None])
    tl.store(indices_ptr + slot, tl.full((BLOCK,), -1, tl.int64), mask=slot < outputs)
    tl.store(counters_ptr + slot, tl.zeros((BLOCK,), tl.int64), mask=slot < counters)


def slot_tensors(boxes: Tensor, scores: Tensor, valid: Tensor | None, groups: Tensor | None) -> dict[str, Tensor]:
    """Return the tensors from which a kernel reads the caller's boxes [S, K, 4] and what belongs to them."""
    return {
        "boxes_ptr": boxes,
        "scores_ptr": scores,
        # Tensors that are not there are never read; any of the same type serves.
        "valid_ptr": scores.new_empty((1, 1), dtype=torch.bool) if valid is None else valid,
        "groups_ptr": scores.new_empty((1, 1), dtype=torch.int64) if groups is None else groups,
    }


def slot_arguments(boxes: Tensor, scores: Tensor, valid: Tensor | None, groups: Tensor | None) -> dict[str, Any]:
    """Return these tensors, and what else a kernel needs to read them."""
    tensors = slot_tensors(boxes, scores, valid, groups)
    return {
        **tensors,
        "box_strides": (*encode_ints(boxes.stride()[:2]), boxes.stride(2)),
        "score_strides": encode_ints(scores.stride()),
        "valid_strides": encode_ints(tensors["valid_ptr"].stride()),
        "group_strides": encode_ints(tensors["groups_ptr"].stride()),
        "HAS_VALID": valid is not None,
        "HAS_GROUPS": groups is not None,
    }


def sort_boxes(
    boxes: Tensor,
    scores: Tensor,
    valid: Tensor | None,
    groups: Tensor | None,
    indices: Tensor | None = None,
    counters: Tensor | None = None,
) -> SortedBoxes:
    """Sort boxes [S, K, 4] by scores [S, K], as `reference.sort_segments` does; S and K are not 0.

    Also fill `indices` (int64) with -1 and `counters` (int64) with 0, if they are given.
    """
    S, K = scores.shape
    slots = slot_arguments(boxes, scores, valid, groups)
    keys = torch.empty((S, K), dtype=scores.dtype, device=scores.device)
    names = ("scores_ptr", "valid_ptr", "score_strides", "valid_strides", "HAS_VALID")
    with on_device(boxes):
        _keys_kernel[(cdiv(S * K, BLOCK),)](
            keys_ptr=keys,
            K=K,
            slots=S * K,
            BLOCK=BLOCK,
            enable_fp_fusion=True,
            **{name: slots[name] for name in names},
        )
        order = torch.sort(keys, dim=1, stable=True).indices
        out = SortedBoxes(
            order=order,
            boxes=torch.empty((S, K, 4), dtype=torch.float32, device=boxes.device),
            state=torch.empty((S, K), dtype=torch.int8, device=boxes.device),
            groups=None if groups is None else torch.empty((S, K), dtype=torch.int64, device=boxes.device),
        )
        outputs = 0 if indices is None else indices.numel()
        count = 0 if counters is None else counters.numel()
        most = max(S * K, outputs, count)
        _sorted_kernel[(cdiv(most, BLOCK),)](
            sorted_boxes_ptr=out.boxes,
            state_ptr=out.state,
            sorted_groups_ptr=order if out.groups is None else out.groups,
            indices_ptr=order if indices is None else indices,
            counters_ptr=order if counters is None else counters,
            order_ptr=order,
            K=K,
            slots=S * K,
            outputs=outputs,
            counters=count,
            BLOCK=BLOCK,
            enable_fp_fusion=True,
            **slots,
        )
    return out
