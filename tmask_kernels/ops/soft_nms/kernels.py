"""Soft-NMS in Triton: one program, which reads all boxes once for each it takes. Letters: K boxes.

The pass that lowers the scores by the box just taken also finds the next best one. Linear decay is bit-equal to the
reference; gaussian differs from it by the rounding of `exp`. Deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.kernels.boxes import box_iou, load_boxes
from ...common.launch import on_device
from ...namespace import custom_op

BLOCK = 1024
NUM_WARPS = 8


@triton.jit(do_not_specialize=["iou_threshold", "sigma", "score_threshold", "K"])
def _soft_nms_kernel(
    indices_ptr,  # [K] int64
    taken_ptr,  # [K] float32: the scores of the boxes taken
    count_ptr,  # [1] int64
    left_ptr,  # [K] float32: the scores of the others, -inf once taken; no NaN
    boxes_ptr,  # [K, 4] float32
    iou_threshold,
    sigma,
    score_threshold,
    K,
    GAUSSIAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.arange(0, BLOCK)
    count = tl.program_id(0) * 0  # a tensor from the start, since a loop carries it
    last = count - 1  # the box just taken; before the first there is none, and its coordinates are NaN
    running = count < K
    while running & (count < K):
        x1_t, y1_t, x2_t, y2_t = load_boxes(boxes_ptr, last.to(tl.int64), last >= 0)
        best_score = tl.min(tl.full([BLOCK], -float("inf"), tl.float32), axis=0)
        best = last * 0
        start = last * 0
        while start < K:
            rows = start + offs
            mask = rows < K
            x1, y1, x2, y2 = load_boxes(boxes_ptr, rows.to(tl.int64), mask)
            score = tl.load(left_ptr + rows, mask=mask, other=-float("inf"))
            iou = box_iou(x1, y1, x2, y2, x1_t, y1_t, x2_t, y2_t)
            if GAUSSIAN:
                decay = tl.where(iou > 0, tl.exp(-tl.math.div_rn(iou * iou, tl.zeros_like(iou) + sigma)), 1.0)
            else:
                decay = tl.where(iou > iou_threshold, 1.0 - iou, 1.0)
            score = score * decay
            # An infinite score times 0 is no number, which no threshold lets through.
            score = tl.where((rows == last) | (score != score), -float("inf"), score)
            tl.store(left_ptr + rows, score, mask=mask)
            top = tl.max(score, axis=0)
            first = tl.min(tl.where(score == top, rows, K), axis=0)
            best = tl.where(top > best_score, first, best)
            best_score = tl.maximum(top, best_score)
            start += BLOCK
        running = best_score >= score_threshold
        tl.store(indices_ptr + count, best.to(tl.int64), mask=running)
        tl.store(taken_ptr + count, best_score, mask=running)
        count += running.to(tl.int32)
        last = best
        # The next pass may read by other threads what these have just written.
        tl.debug_barrier()
    tl.store(count_ptr, count.to(tl.int64))


@custom_op("soft_nms")
def soft_nms(
    boxes: Tensor, scores: Tensor, gaussian: bool, iou_threshold: float, sigma: float, score_threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as `soft_nms_reference`."""
    K, device = len(scores), boxes.device
    indices = torch.full((K,), -1, dtype=torch.int64, device=device)
    taken = torch.zeros(K, dtype=torch.float32, device=device)
    count = torch.zeros(1, dtype=torch.int64, device=device)
    scores = scores.float()
    left = torch.where(torch.isnan(scores), -torch.inf, scores)  # a copy, by which NaN is below every threshold
    if K == 0:
        return indices, taken, count
    with on_device(boxes):
        _soft_nms_kernel[(1,)](
            indices_ptr=indices,
            taken_ptr=taken,
            count_ptr=count,
            left_ptr=left,
            boxes_ptr=boxes.float().contiguous(),
            iou_threshold=iou_threshold,
            sigma=sigma,
            score_threshold=score_threshold,
            K=K,
            GAUSSIAN=gaussian,
            BLOCK=BLOCK,
            num_warps=min(NUM_WARPS, BLOCK // 32),  # warps with the same rows would lower their scores twice
            # A fused multiply-add would round the union and the decay differently from the reference.
            enable_fp_fusion=False,
        )
    return indices, taken, count


@soft_nms.register_fake
def _(
    boxes: Tensor, scores: Tensor, gaussian: bool, iou_threshold: float, sigma: float, score_threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    K = len(scores)
    return (
        boxes.new_empty(K, dtype=torch.int64),
        boxes.new_empty(K, dtype=torch.float32),
        boxes.new_empty(1, dtype=torch.int64),
    )
