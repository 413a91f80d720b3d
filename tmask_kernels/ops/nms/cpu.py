"""NMS on the CPU by torchvision's kernel, corrected where its rules differ from ours. Letters as in `op`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.reference import box_iou
from .reference import SortedSegments, sort_segments


def padded_nms_torchvision(
    boxes: Tensor, scores: Tensor, thresholds: Tensor, valid: Tensor | None, groups: Tensor | None, max_output: int
) -> tuple[Tensor, Tensor]:
    """Run torchvision's CPU kernel on the valid rows of each segment in turn.

    Arguments and results are those of `padded_nms_reference`, on the CPU. The loop reads values, which is free there.
    """
    segments = sort_segments(boxes, scores, valid)
    S, K = scores.shape
    ramp = torch.arange(K, 0, -1, dtype=torch.float32)  # [K] scores of boxes that are already sorted
    sorted_groups = None if groups is None else groups.gather(1, segments.order)  # [S, K]
    numbers = segments.suppresses.sum(1).tolist()
    alive = segments.alive.sum(1).tolist()
    indices = torch.full((S, max_output), -1, dtype=torch.int64)
    counts = [0] * S
    for s, threshold in enumerate(thresholds.tolist()):
        if not alive[s]:
            continue
        group = None if sorted_groups is None else sorted_groups[s]
        kept = _keep_torchvision(segments.boxes[s, : numbers[s]], ramp, group, threshold)
        if alive[s] > numbers[s]:
            kept = torch.cat([kept, _unordered_kept(segments, s, kept, group, threshold)])
        kept = kept[:max_output]
        counts[s] = len(kept)
        indices[s, : counts[s]] = segments.order[s][kept]
    return indices, torch.tensor(counts, dtype=torch.int64)


def _keep_torchvision(boxes: Tensor, ramp: Tensor, group: Tensor | None, threshold: float) -> Tensor:
    """Return the rising positions of the boxes [n, 4], already sorted, that survive."""
    import torchvision  # noqa: F401 - registers the op; its Python function may be ours by now

    n = len(boxes)
    if group is None:
        return torch.ops.torchvision.nms(boxes, ramp[:n], threshold)
    keep = torch.zeros(n, dtype=torch.bool)
    for value in group[:n].unique():
        rows = (group[:n] == value).nonzero()[:, 0]
        keep[rows[torch.ops.torchvision.nms(boxes[rows], ramp[: len(rows)], threshold)]] = True
    return keep.nonzero()[:, 0]


def _unordered_kept(segments: SortedSegments, s: int, kept: Tensor, group: Tensor | None, threshold: float) -> Tensor:
    """Return the boxes of segment s with a NaN score that no kept box removes."""
    rows = (segments.alive[s] & ~segments.suppresses[s]).nonzero()[:, 0]  # [n]
    over = box_iou(segments.boxes[s, rows, None], segments.boxes[s, kept]) > threshold  # [n, kept]
    if group is not None:
        over &= group[rows, None] == group[kept]
    return rows[~over.any(1)]
