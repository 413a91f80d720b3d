"""Padded NMS in Triton. Letters: S segments, K boxes of a segment, M outputs of a segment.

One program a segment. It takes the boxes, sorted outside the kernel, in blocks of BLOCK: first the block against the
list of boxes kept so far, then the block against itself. Inside a block, keep[j] = alive[j] and no i < j with keep[i]
and IoU[i, j] over the threshold is iterated from keep = alive until it stops changing: entry j is right once all before
it are, so there is one fixed point, the greedy result, reached after as many rounds as the longest chain of removals.
IoUs are never stored: memory O(K). Bit-equal to the reference, and so deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tmask_kernels._triton import box_iou, on_device
from tmask_kernels.ops.nms.reference import SortedSegments, sort_segments

# A tile of 64 x 64 IoUs is 8 a thread in 16 warps; in 4 warps the coordinates spill. Not tuned on a GPU yet.
BLOCK = 64
NUM_WARPS = 16


@triton.jit
def _load_boxes(ptr, rows, mask):
    """Coordinates of boxes `rows`, NaN where masked: such a box overlaps nothing."""
    x1 = tl.load(ptr + rows * 4, mask=mask, other=float("nan"))
    y1 = tl.load(ptr + rows * 4 + 1, mask=mask, other=float("nan"))
    x2 = tl.load(ptr + rows * 4 + 2, mask=mask, other=float("nan"))
    y2 = tl.load(ptr + rows * 4 + 3, mask=mask, other=float("nan"))
    return x1, y1, x2, y2


@triton.jit
def _padded_nms_kernel(
    indices_ptr,  # [S, M] int64
    counts_ptr,  # [S] int64
    kept_ptr,  # [S, M, 4] float32, scratch: the kept boxes by falling score
    kept_groups_ptr,  # [S, M] int64, scratch, only with groups
    boxes_ptr,  # [S, K, 4] float32 by falling score
    order_ptr,  # [S, K] int64: position in the caller's tensors
    state_ptr,  # [S, K] int8: 0 no box, 1 a box that removes nothing, 2 a box
    groups_ptr,  # [S, K] int64 by falling score, only with groups
    thresholds_ptr,  # [S] float32
    K,
    M,
    HAS_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    indices_ptr += segment * M
    kept_ptr += segment * M * 4
    kept_groups_ptr += segment * M
    boxes_ptr += segment * K * 4
    order_ptr += segment * K
    state_ptr += segment * K
    groups_ptr += segment * K
    threshold = tl.load(thresholds_ptr + segment)
    offs = tl.arange(0, BLOCK)

    total = tl.program_id(0) * 0  # kept so far; a tensor from the start, since a loop carries it
    start = total
    while (start < K) & (total < M):
        rows = (start + offs).to(tl.int64)
        mask = rows < K
        state = tl.load(state_ptr + rows, mask=mask, other=0)
        x1, y1, x2, y2 = _load_boxes(boxes_ptr, rows, mask)
        if HAS_GROUPS:
            group = tl.load(groups_ptr + rows, mask=mask, other=0)

        # The block against the kept list; a block without boxes skips it.
        hits = tl.zeros([BLOCK, BLOCK], dtype=tl.int32)  # reduced once, after the loop: a reduction is a barrier
        end = tl.where(tl.max(state.to(tl.int32), axis=0) > 0, total, 0)
        first = total * 0
        while first < end:
            cols = (first + offs).to(tl.int64)
            mask_k = cols < end
            k_x1, k_y1, k_x2, k_y2 = _load_boxes(kept_ptr, cols, mask_k)
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
        alive = (state > 0).to(tl.int32) * (1 - tl.max(hits, axis=0))

        # The block against itself, to the fixed point.
        iou = box_iou(
            x1[:, None], y1[:, None], x2[:, None], y2[:, None],
            x1[None, :], y1[None, :], x2[None, :], y2[None, :],
        )  # fmt: skip
        over = (iou > threshold) & (offs[:, None] < offs[None, :]) & (state[:, None] == 2)
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
        # A box that removes nothing enters the list with a coordinate that overlaps nothing.
        tl.store(kept_ptr + rank * 4, tl.where(state == 2, x1, float("nan")), mask=out)
        tl.store(kept_ptr + rank * 4 + 1, y1, mask=out)
        tl.store(kept_ptr + rank * 4 + 2, x2, mask=out)
        tl.store(kept_ptr + rank * 4 + 3, y2, mask=out)
        if HAS_GROUPS:
            tl.store(kept_groups_ptr + rank, group, mask=out)
        total += tl.sum(keep, axis=0)
        start += BLOCK
        # The next block's threads read what other threads of this program have just written.
        tl.debug_barrier()

    total = tl.minimum(total, M)
    tl.store(counts_ptr + segment, total.to(tl.int64))
    first = total
    while first < M:
        cols = (first + offs).to(tl.int64)
        tl.store(indices_ptr + cols, tl.full([BLOCK], -1, dtype=tl.int64), mask=cols < M)
        first += BLOCK


def padded_nms_fwd(
    boxes: Tensor, scores: Tensor, thresholds: Tensor, valid: Tensor | None, groups: Tensor | None, max_output: int
) -> tuple[Tensor, Tensor]:
    """Sort, gather and launch; arguments and results as `padded_nms_reference`."""
    S, K = scores.shape
    M = min(max_output, K)
    if S * M == 0:
        device = boxes.device
        indices = torch.full((S, max_output), -1, dtype=torch.int64, device=device)
        return indices, torch.zeros(S, dtype=torch.int64, device=device)
    # The order of a transposed tensor of scores would be transposed too.
    segments = SortedSegments(*(t.contiguous() for t in sort_segments(boxes, scores, valid)))
    state = segments.alive.to(torch.int8) + segments.suppresses.to(torch.int8)  # [S, K]
    sorted_groups = None if groups is None else groups.gather(1, segments.order).contiguous()  # [S, K]
    indices = torch.empty((S, M), dtype=torch.int64, device=boxes.device)
    counts = torch.empty((S,), dtype=torch.int64, device=boxes.device)
    kept = torch.empty((S, M, 4), dtype=torch.float32, device=boxes.device)
    # Without groups their pointers are never read; any int64 tensor serves.
    kept_groups = indices if groups is None else torch.empty((S, M), dtype=torch.int64, device=boxes.device)
    with on_device(boxes):
        _padded_nms_kernel[(S,)](
            indices_ptr=indices,
            counts_ptr=counts,
            kept_ptr=kept,
            kept_groups_ptr=kept_groups,
            boxes_ptr=segments.boxes,
            order_ptr=segments.order,
            state_ptr=state,
            groups_ptr=segments.order if sorted_groups is None else sorted_groups,
            thresholds_ptr=thresholds.contiguous(),
            K=K,
            M=M,
            HAS_GROUPS=groups is not None,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            # A fused multiply-add would round the union differently from the reference.
            enable_fp_fusion=False,
        )
    if max_output > M:
        indices = torch.nn.functional.pad(indices, (0, max_output - M), value=-1)
    return indices, counts


@torch.library.custom_op("tmask::padded_nms", mutates_args=())
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
