"""Soft-NMS written as its definition. Letters: K boxes."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.reference import box_iou


def soft_nms_reference(
    boxes: Tensor, scores: Tensor, gaussian: bool, iou_threshold: float, sigma: float, score_threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Take the best remaining box and lower the scores of the others by their IoU with it, K times.

    Args:
        boxes: [K, 4].
        scores: [K].
        gaussian: whether the decay is gaussian; else it is linear.
        iou_threshold: of the linear decay.
        sigma: of the gaussian decay.
        score_threshold: the lowest score that counts.

    Returns:
        indices [K] int64 in the order of taking, their lowered scores [K] float32, and count [1] int64, the number of
        scores of at least `score_threshold`. Entries behind the count are -1 and 0. No host synchronisation.
    """
    K, device = len(scores), boxes.device
    boxes, left = boxes.float(), scores.float()  # [K, 4], [K]
    left = torch.where(torch.isnan(left), -torch.inf, left)  # below every threshold
    indices = torch.full((K,), -1, dtype=torch.int64, device=device)
    taken = torch.zeros(K, dtype=torch.float32, device=device)
    count = torch.zeros(1, dtype=torch.int64, device=device)
    # Compared in float32, like everything else.
    over, enough_for = (torch.full((1,), limit, device=device) for limit in (iou_threshold, score_threshold))
    for i in range(K):
        best = left.argmax(0, keepdim=True)  # [1]; the first of equals
        score = left[best]
        enough = score >= enough_for
        indices[i : i + 1] = torch.where(enough, best, -1)
        taken[i : i + 1] = torch.where(enough, score, 0.0)
        count += enough
        iou = box_iou(boxes[best], boxes)  # [K]
        if gaussian:
            decay = torch.where(iou > 0, torch.exp(-(iou * iou) / sigma), 1.0)
        else:
            decay = torch.where(iou > over, 1 - iou, 1.0)
        left = torch.where(enough, left * decay, left)
        left = torch.where(torch.isnan(left), -torch.inf, left)  # an infinite score times 0
        left = left.index_fill(0, best, -torch.inf)
    return indices, taken, count
