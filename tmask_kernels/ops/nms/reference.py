"""Non-maximum suppression written as its definition. Letters: S segments, K boxes of a segment, M outputs of a segment.

A segment is a list of boxes that compete with each other, such as one level or one class of one image. Boxes of
different segments never compete.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...common.reference import box_iou


class SortedSegments(NamedTuple):
    """The boxes of each segment, sorted.

    Boxes with a score come first, by falling score, equal scores by rising index. Boxes with a NaN score and invalid
    slots follow in any order.
    """

    order: Tensor  # [S, K] int64: position in the caller's tensors
    boxes: Tensor  # [S, K, 4] float32
    alive: Tensor  # [S, K] bool: the caller's `valid`
    suppresses: Tensor  # [S, K] bool: alive and with a score that is a number


def sort_order(scores: Tensor, valid: Tensor | None) -> Tensor:
    """Return positions [S, K] int64 by falling score, equal scores by rising index; NaN scores and invalid slots come
    last.
    """
    real = ~torch.isnan(scores)  # [S, K]
    if valid is not None:
        real = real & valid
    # Ascending by the negated score, since a descending sort would put NaN first. The NaN is written anew because a
    # negated one carries a sign bit, by which a radix sort may place it before all numbers.
    return torch.sort(torch.where(real, -scores, torch.nan), dim=1, stable=True).indices


def sort_segments(boxes: Tensor, scores: Tensor, valid: Tensor | None) -> SortedSegments:
    """Sort boxes [S, K, 4] by scores [S, K]; `valid` [S, K] bool marks the slots that hold a box (None: all)."""
    order = sort_order(scores, valid)  # [S, K]
    boxes = boxes.float().gather(1, order[..., None].expand(-1, -1, 4))  # [S, K, 4]
    suppresses = ~torch.isnan(scores.gather(1, order))  # [S, K]
    alive = torch.ones_like(suppresses) if valid is None else valid.gather(1, order)  # [S, K]
    return SortedSegments(order, boxes, alive, suppresses & alive)


def padded_nms_reference(
    boxes: Tensor, scores: Tensor, thresholds: Tensor, valid: Tensor | None, groups: Tensor | None, max_output: int
) -> tuple[Tensor, Tensor]:
    """Greedy NMS, one row of IoUs at a time.

    Args:
        boxes: [S, K, 4].
        scores: [S, K].
        thresholds: [S] float32.
        valid: [S, K] bool, or None.
        groups: [S, K] integer, or None. Two boxes compete only if their groups are equal.
        max_output: M.

    Returns:
        indices [S, M] int64, padded with -1, and counts [S] int64. Needs O(S K) memory and no host synchronisation.
    """
    segments = sort_segments(boxes, scores, valid)
    sorted_boxes = segments.boxes  # [S, K, 4]
    sorted_groups = None if groups is None else groups.gather(1, segments.order)  # [S, K]
    keep = segments.alive.clone()  # [S, K]
    for i in range(boxes.shape[1] - 1):
        over = box_iou(sorted_boxes[:, i : i + 1], sorted_boxes[:, i + 1 :]) > thresholds[:, None]  # [S, K - i - 1]
        if sorted_groups is not None:
            over &= sorted_groups[:, i : i + 1] == sorted_groups[:, i + 1 :]
        takes = keep[:, i : i + 1] & segments.suppresses[:, i : i + 1]  # [S, 1]
        keep[:, i + 1 :] &= ~(over & takes)
    return first_kept(keep, segments.order, max_output)


def first_kept(keep: Tensor, order: Tensor, max_output: int) -> tuple[Tensor, Tensor]:
    """Return the first `max_output` kept entries of each row of `order`.

    Args:
        keep: [S, K] bool, by falling score.
        order: [S, K] int64, by falling score.
        max_output: M.

    Returns:
        indices [S, M], padded with -1, and counts [S].
    """
    S, K = keep.shape
    rank = keep.cumsum(1) - 1  # [S, K]
    # What is not output goes to a slot of its own past the end, so that no two writes meet.
    slot = torch.where(keep & (rank < max_output), rank, max_output + torch.arange(K, device=keep.device))  # [S, K]
    indices = torch.full((S, max_output + K), -1, dtype=torch.int64, device=keep.device).scatter(1, slot, order)
    return indices[:, :max_output].contiguous(), keep.sum(1).clamp(max=max_output)
