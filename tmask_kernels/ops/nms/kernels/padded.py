"""Padded NMS in Triton. Letters: S segments, K boxes of a segment, M outputs of a segment.

Two strategies, by shape alone: many segments, or short ones, get a program each, below; few long ones are each spread
over the whole GPU (`blocks`). Both are bit-equal to the reference, and so deterministic.

A program takes the boxes, sorted before, in blocks of BLOCK: first the block against the list of boxes kept so far,
then the block against itself. Inside a block, keep[j] = alive[j] and no i < j with keep[i] and IoU[i, j] over the
threshold is iterated from keep = alive until it stops changing: entry j is right once all before it are, so there is
one fixed point, the greedy result, reached after as many rounds as the longest chain of removals. IoUs are never
stored: memory O(K).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....common.kernels.boxes import box_iou, load_boxes
from ....common.launch import launch_known
from ....namespace import custom_op
from .blocks import padded_nms_blocks
from .sort import BOX, NO_BOX, SortedBoxes, slot_arguments, slot_tensors, sort_boxes, sort_segment, store_kept

# A tile of 64 x 64 IoUs is 8 a thread in 16 warps; in 4 warps the coordinates spill. Not tuned on a GPU yet.
BLOCK = 64
NUM_WARPS = 16
SCAN = 1024  # states read at once
# From so many segments on, one program each fills half of an H100's 132 SMs, and steps would only add launches.
MANY = 64
# Up to so many boxes a program sorts its segment itself: 64 tiles of 64 x 128 comparisons, and no launches before it.
SHORT = 512


@triton.jit(do_not_specialize=["K", "M", "width"])
def _padded_nms_kernel(
    indices_ptr,  # [S, width] int64
    counts_ptr,  # [S] int64
    kept_ptr,  # [S, M, 4] float32, scratch: the kept boxes by falling score
    kept_groups_ptr,  # [S, M] int64, scratch, only with groups
    sorted_boxes_ptr,  # [S, K, 4] float32 by falling score; with SORTS these four are scratch
    order_ptr,  # [S, K] int64: position in the caller's tensors
    state_ptr,  # [S, K] int8
    sorted_groups_ptr,  # [S, K] int64 by falling score, only with groups
    thresholds_ptr,  # [S] float32
    boxes_ptr,  # the caller's boxes and what belongs to them, as `sort_segment` reads them
    scores_ptr,
    valid_ptr,
    groups_ptr,
    box_strides,
    score_strides,
    valid_strides,
    group_strides,
    K,
    M,
    width,
    HAS_VALID: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    SORTS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCAN: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    indices_ptr += segment * width
    kept_ptr += segment * M * 4
    kept_groups_ptr += segment * M
    sorted_boxes_ptr += segment * K * 4
    order_ptr += segment * K
    state_ptr += segment * K
    sorted_groups_ptr += segment * K
    threshold = tl.load(thresholds_ptr + segment)
    offs = tl.arange(0, BLOCK)
    if SORTS:
        sort_segment(
            sorted_boxes_ptr, state_ptr, order_ptr, sorted_groups_ptr, boxes_ptr, scores_ptr, valid_ptr, groups_ptr,
            box_strides, score_strides, valid_strides, group_strides, segment, K,
            HAS_VALID, HAS_GROUPS, BLOCK, 2 * BLOCK,
        )  # fmt: skip

    total = tl.program_id(0) * 0  # kept so far; a tensor from the start, since a loop carries it
    # Behind the last box there is nothing to do: of a class few boxes pass the score threshold.
    stop = total
    start = total
    while start < K:
        slots = (start + tl.arange(0, SCAN)).to(tl.int64)
        holds = tl.load(state_ptr + slots, mask=slots < K, other=NO_BOX) != NO_BOX
        stop = tl.maximum(stop, tl.max(tl.where(holds, slots + 1, 0), axis=0).to(tl.int32))
        start += SCAN

    start = total
    while (start < stop) & (total < M):
        rows = (start + offs).to(tl.int64)
        mask = rows < stop
        state = tl.load(state_ptr + rows, mask=mask, other=NO_BOX)
        x1, y1, x2, y2 = load_boxes(sorted_boxes_ptr, rows, mask)
        if HAS_GROUPS:
            group = tl.load(sorted_groups_ptr + rows, mask=mask, other=0)

        # The block against the kept list.
        hits = tl.zeros([BLOCK, BLOCK], dtype=tl.int32)  # reduced once, after the loop: a reduction is a barrier
        first = total * 0
        while first < total:
            cols = (first + offs).to(tl.int64)
            mask_k = cols < total
            k_x1, k_y1, k_x2, k_y2 = load_boxes(kept_ptr, cols, mask_k)
            iou = box_iou(
                k_x1[:, None], k_y1[:, None], k_x2[:, None], k_y2[:, None],
                x1[None, :], y1[None, :], x2[None, :], y2[None, :],
            )  # fmt: skip
            over = iou > threshold
            if HAS_GROUPS:
                k_group = tl.load(kept_groups_ptr + cols, mask=mask_k, other=0)
                over = over & (k_group[:, None] == group[None, :])
            hits = hits | over.to(tl.int32)
            first += BLOCK
        alive = (state > NO_BOX).to(tl.int32) * (1 - tl.max(hits, axis=0))

        # The block against itself, to the fixed point.
        iou = box_iou(
            x1[:, None], y1[:, None], x2[:, None], y2[:, None],
            x1[None, :], y1[None, :], x2[None, :], y2[None, :],
        )  # fmt: skip
        over = (iou > threshold) & (offs[:, None] < offs[None, :]) & (state[:, None] == BOX)
        if HAS_GROUPS:
            over = over & (group[:, None] == group[None, :])
        over = over.to(tl.int32)
        keep = alive
        changed = tl.max(alive, axis=0)
        while changed > 0:
            after = alive * (1 - tl.max(over * keep[:, None], axis=0))
            changed = tl.max((after != keep).to(tl.int32), axis=0)
            keep = after

        rank = (total + tl.cumsum(keep, axis=0) - keep).to(tl.int64)
        out = (keep > 0) & (rank < M)
        tl.store(indices_ptr + rank, tl.load(order_ptr + rows, mask=mask, other=0), mask=out)
        store_kept(kept_ptr, rank, x1, y1, x2, y2, state, out)
        if HAS_GROUPS:
            tl.store(kept_groups_ptr + rank, group, mask=out)
        total += tl.sum(keep, axis=0)
        start += BLOCK
        # The next block's threads read what other threads of this program have just written.
        tl.debug_barrier()

    total = tl.minimum(total, M)
    tl.store(counts_ptr + segment, total.to(tl.int64))
    first = total
    while first < width:
        cols = (first + offs).to(tl.int64)
        tl.store(indices_ptr + cols, tl.full([BLOCK], -1, dtype=tl.int64), mask=cols < width)
        first += BLOCK


def padded_nms_segments(
    boxes: Tensor, scores: Tensor, thresholds: Tensor, valid: Tensor | None, groups: Tensor | None, max_output: int
) -> tuple[Tensor, Tensor]:
    """One program a segment; arguments and results as `padded_nms_reference`."""
    S, K = scores.shape
    M, device, grouped = min(max_output, K), boxes.device, groups is not None
    indices = torch.empty((S, max_output), dtype=torch.int64, device=device)
    counts = torch.empty((S,), dtype=torch.int64, device=device)
    kept = torch.empty((S, M, 4), dtype=torch.float32, device=device)
    # Without groups their pointers are never read; any int64 tensor serves.
    kept_groups = torch.empty((S, M), dtype=torch.int64, device=device) if grouped else indices
    if short := K <= SHORT:
        segments = SortedBoxes(
            order=torch.empty((S, K), dtype=torch.int64, device=device),
            boxes=torch.empty((S, K, 4), dtype=torch.float32, device=device),
            state=torch.empty((S, K), dtype=torch.int8, device=device),
            groups=torch.empty((S, K), dtype=torch.int64, device=device) if grouped else None,
        )
    else:
        segments = sort_boxes(boxes, scores, valid, groups)
    tensors = {
        "indices_ptr": indices,
        "counts_ptr": counts,
        "kept_ptr": kept,
        "kept_groups_ptr": kept_groups,
        "sorted_boxes_ptr": segments.boxes,
        "order_ptr": segments.order,
        "state_ptr": segments.state,
        "sorted_groups_ptr": segments.order if segments.groups is None else segments.groups,
        "thresholds_ptr": thresholds,
        **slot_tensors(boxes, scores, valid, groups),
    }

    def plan() -> tuple[tuple[int], dict[str, Any]]:
        return (S,), {
            "K": K,
            "M": M,
            "width": max_output,
            "SORTS": short,
            "BLOCK": BLOCK,
            "SCAN": SCAN,
            "num_warps": NUM_WARPS,
            # A fused multiply-add would round the union differently from the reference.
            "enable_fp_fusion": False,
            **slot_arguments(boxes, scores, valid, groups),
        }

    launch_known(_padded_nms_kernel, tensors, (short, valid is None, grouped, BLOCK, SCAN, NUM_WARPS), plan)
    return indices, counts


Strategy = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, int], tuple[Tensor, Tensor]]


def strategy(S: int, K: int) -> Strategy:
    """The faster one of S segments of K boxes."""
    return padded_nms_segments if S >= MANY or K <= 2 * BLOCK else padded_nms_blocks


def padded_nms_fwd(
    boxes: Tensor, scores: Tensor, thresholds: Tensor, valid: Tensor | None, groups: Tensor | None, max_output: int
) -> tuple[Tensor, Tensor]:
    """Launch the strategy for the shape; arguments and results as `padded_nms_reference`."""
    S, K = scores.shape
    if S * min(max_output, K) == 0:
        device = boxes.device
        indices = torch.full((S, max_output), -1, dtype=torch.int64, device=device)
        return indices, torch.zeros(S, dtype=torch.int64, device=device)
    return strategy(S, K)(boxes, scores, thresholds.contiguous(), valid, groups, max_output)


@custom_op("padded_nms")
def padded_nms(
    boxes: Tensor, scores: Tensor, thresholds: Tensor, valid: Tensor | None, groups: Tensor | None, max_output: int
) -> tuple[Tensor, Tensor]:
    """boxes [S, K, 4], scores [S, K], thresholds [S], valid, groups [S, K] -> indices [S, max_output], counts [S]."""
    return padded_nms_fwd(boxes, scores, thresholds, valid, groups, max_output)


@padded_nms.register_fake
def _(
    boxes: Tensor, scores: Tensor, thresholds: Tensor, valid: Tensor | None, groups: Tensor | None, max_output: int
) -> tuple[Tensor, Tensor]:
    S = boxes.shape[0]
    return boxes.new_empty(S, max_output, dtype=torch.int64), boxes.new_empty(S, dtype=torch.int64)
