"""Match anchors to ground truth, written as its definition. Letters: N images, A anchors, G ground-truth boxes
(padded), g boxes of one chunk.

The function passes over the ground truth twice, because the best IoU of a box is known only after all anchors. The
second pass computes each IoU by the same operations, so equal IoUs have equal bits. Memory is O(N (A + G)).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BACKGROUND = -1
IGNORED = -2

# An unmatched anchor with more than this part of its area inside a crowd is no negative.
CROWD_COVER = 0.7

# Elements of one temporary on the CPU, where it should stay in a core's cache, and on a GPU, where launches cost.
_CHUNK_CPU = 2**17
_CHUNK_GPU = 2**22


def match_anchors_reference(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    gt_crowd: Tensor | None,
    high: float,
    low: float,
    allow_low_quality: bool,
) -> tuple[Tensor, Tensor]:
    """Return matches [N, A] int64 and IoUs [N, A] float32; see `match_anchors`. Anchors are [N or 1, A, 4] float32."""
    N, G = gt_valid.shape
    A = anchors.shape[1]
    columns = anchors.transpose(1, 2).contiguous()  # [N or 1, 4, A]
    # Boxes that do not count become points: no anchor overlaps them.
    real = torch.where(gt_valid[..., None], gt_boxes, 0.0)  # [N, G, 4]
    best = torch.zeros(N, A, device=anchors.device)
    best_index = torch.zeros(N, A, dtype=torch.int64, device=anchors.device)
    best_of_gt = torch.zeros(N, G, device=anchors.device)
    for rows in _chunks(N * A, G, anchors.device):
        iou = _iou(columns, real[:, rows])  # [N, g, A]
        value, index = iou.max(dim=1)  # [N, A], the first of equals
        better = value > best  # strictly: the lowest index wins a tie
        best_index = torch.where(better, index + rows.start, best_index)
        best = torch.where(better, value, best)
        best_of_gt[:, rows] = iou.amax(dim=2) if A else 0.0

    positive = (best >= high) & (best > 0)  # [N, A]
    if allow_low_quality:
        # A ground truth that no anchor overlaps takes none: 2 is no IoU.
        wanted = torch.where(best_of_gt > 0, best_of_gt, 2.0)  # [N, G]
        for rows in _chunks(N * A, G, anchors.device):
            positive |= (_iou(columns, real[:, rows]) == wanted[:, rows, None]).any(dim=1)
    background = (best < low) | ~gt_valid.any(dim=1, keepdim=True)  # [N, A]
    if gt_crowd is not None:
        background &= ~_inside_crowd(columns, torch.where(gt_crowd[..., None], gt_boxes, 0.0))
    unmatched = torch.where(background, BACKGROUND, IGNORED)  # [N, A]
    return torch.where(positive, best_index, unmatched), best


def _inside_crowd(columns: Tensor, crowds: Tensor) -> Tensor:
    """Return which anchors have more than CROWD_COVER of their area inside one of crowds [N, G, 4]: [N, A]."""
    area = _area(columns)  # [N or 1, A]
    covered = torch.zeros(len(crowds), columns.shape[2], dtype=torch.bool, device=columns.device)
    for rows in _chunks(covered.numel(), crowds.shape[1], columns.device):
        inter = _intersection(columns, crowds[:, rows])  # [N, g, A]
        # An anchor inverted on one axis has a negative area, and overlaps nothing.
        covered |= ((inter > CROWD_COVER * area[:, None]) & (inter > 0)).any(dim=1)
    return covered


def _chunks(per_box: int, count: int, device: torch.device) -> Iterator[slice]:
    """Yield slices of the ground truth. A box has `per_box` elements; the slices depend on shapes alone."""
    step = max(1, (_CHUNK_CPU if device.type == "cpu" else _CHUNK_GPU) // max(per_box, 1))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _iou(columns: Tensor, boxes: Tensor) -> Tensor:
    """Return the IoU [N, g, A] of anchors [N or 1, 4, A] and boxes [N, g, 4]; 0 for 0 / 0."""
    area = _area(columns)  # [N or 1, A]
    x1, y1, x2, y2 = boxes[..., None].unbind(2)  # [N, g, 1] each
    inter = _intersection(columns, boxes)
    union = (x2 - x1) * (y2 - y1) + area[:, None]  # [N, g, A]
    union -= inter
    return inter.div_(union).nan_to_num_(nan=0.0)


def _area(columns: Tensor) -> Tensor:
    """Return areas [N or 1, A] of anchors [N or 1, 4, A]."""
    return (columns[:, 2] - columns[:, 0]) * (columns[:, 3] - columns[:, 1])


def _intersection(columns: Tensor, boxes: Tensor) -> Tensor:
    """Return the area of the overlap [N, g, A]. In place: on a CPU, temporaries cost the most."""
    ax1, ay1, ax2, ay2 = columns[:, :, None].unbind(1)  # [N or 1, 1, A] each
    x1, y1, x2, y2 = boxes[..., None].unbind(2)  # [N, g, 1] each
    width = torch.minimum(ax2, x2)
    width.sub_(torch.maximum(ax1, x1)).clamp_(min=0)
    height = torch.minimum(ay2, y2)
    height.sub_(torch.maximum(ay1, y1)).clamp_(min=0)
    return width.mul_(height)
