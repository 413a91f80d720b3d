"""From the RPN's maps to proposals, and from class scores to detections: fixed shapes, no host synchronisation.

Letters: N images, A anchors of a cell, H W side lengths of a map, L levels, K candidates of a level, P proposals,
Cls foreground classes, D detections, M boxes that one NMS segment may give. Order everywhere: score falling, then index
rising. All arithmetic is float32 whatever the inputs' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tmask_kernels.ops.boxes.anchors import AnchorSpec, anchors_at, level_strides
from tmask_kernels.ops.boxes.reference import clip_boxes

# decode(deltas [N, K, 4], anchors [N, K, 4], image_sizes [N, 2]) -> boxes [N, K, 4], clipped
Decode = Callable[[Tensor, Tensor, Tensor], Tensor]


class PaddedNMS(Protocol):
    """`tmask_kernels.padded_nms` with its backend chosen."""

    def __call__(
        self, boxes: Tensor, scores: Tensor, iou_threshold: float, *, valid: Tensor, max_output: int
    ) -> tuple[Tensor, Tensor]:
        """Indices [S, max_output], -1 pads, and counts [S]."""


def propose(
    objectness: Sequence[Tensor],
    deltas: Sequence[Tensor],
    image_sizes: Tensor,
    spec: AnchorSpec,
    *,
    padded_size: tuple[int, int],
    pre_nms_top_n: int,
    post_nms_top_n: int,
    nms_threshold: float,
    min_size: float,
    score_threshold: float,
    nms: PaddedNMS,
    decode: Decode,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rpn_proposals` out of the NMS and the box decoder it is given."""
    strides = level_strides(spec, [(x.shape[2], x.shape[3]) for x in objectness], padded_size)
    most = max(min(pre_nms_top_n, x.shape[1:].numel()) for x in objectness)  # K
    boxes, scores, valid = [], [], []
    for level, (logits, delta) in enumerate(zip(objectness, deltas, strict=True)):
        box, score, good = _level_candidates(
            logits, delta, image_sizes, spec, level, strides[level], pre_nms_top_n, decode
        )
        sides = box[..., 2:] - box[..., :2]  # [N, k, 2]
        good &= (sides >= min_size).all(-1) & (score >= score_threshold)
        pad = most - score.shape[1]
        boxes.append(F.pad(box, (0, 0, 0, pad)))
        scores.append(F.pad(score, (0, pad)))
        valid.append(F.pad(good, (0, pad)))
    all_boxes = torch.stack(boxes, 1).flatten(1, 2)  # [N, L * K, 4]
    all_scores = torch.stack(scores, 1).flatten(1, 2)  # [N, L * K]
    all_valid = torch.stack(valid, 1).flatten(1, 2)  # [N, L * K]
    N, L = len(image_sizes), len(strides)
    kept, _ = nms(
        all_boxes.view(N * L, most, 4),
        all_scores.view(N * L, most),
        nms_threshold,
        valid=all_valid.view(N * L, most),
        max_output=min(post_nms_top_n, most),
    )
    keep = _mark(kept, most).reshape(N, L * most)
    best, picked, counts = _best(keep, all_scores, post_nms_top_n)
    picked_boxes = all_boxes.gather(1, picked[..., None].expand(-1, -1, 4))  # [N, P', 4]
    picked_boxes = torch.where(best[..., None], picked_boxes, 0.0)
    picked_scores = torch.where(best, all_scores.gather(1, picked), 0.0)  # [N, P']
    missing = post_nms_top_n - picked.shape[1]
    return F.pad(picked_boxes, (0, 0, 0, missing)), F.pad(picked_scores, (0, missing)), counts


def _level_candidates(
    logits: Tensor,
    deltas: Tensor,
    image_sizes: Tensor,
    spec: AnchorSpec,
    level: int,
    stride: tuple[int, int],
    top_n: int,
    decode: Decode,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best k of one level: boxes [N, k, 4], probabilities [N, k], and whether logit and deltas are numbers."""
    N, A, _, W = logits.shape
    flat = logits.permute(0, 2, 3, 1).flatten(1)  # [N, H * W * A]
    index = top_indices(flat, min(top_n, flat.shape[1]))  # [N, k]
    logit = flat.gather(1, index).float()  # [N, k]
    # Only the survivors' deltas are read, whatever the memory layout of the map.
    cell, anchor = index // A, index % A  # [N, k]
    channel = anchor[..., None] * 4 + torch.arange(4, device=index.device)  # [N, k, 4]
    image = torch.arange(N, device=index.device)[:, None, None]  # [N, 1, 1]
    delta = deltas[image, channel, (cell // W)[..., None], (cell % W)[..., None]].float()  # [N, k, 4]
    boxes = decode(delta, anchors_at(spec, level, index, W, stride), image_sizes)  # [N, k, 4]
    numbers = ~(torch.isnan(logit) | torch.isnan(delta).any(-1))  # [N, k]
    return boxes, torch.sigmoid(logit), numbers


def detect(
    class_scores: Tensor,
    boxes: Tensor,
    *,
    valid: Tensor,
    image_sizes: Tensor,
    score_threshold: float,
    nms_threshold: float,
    max_detections: int,
    min_size: float,
    nms: PaddedNMS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`detections` out of the NMS it is given; a segment is one class of one image."""
    N, P, Cls = class_scores.shape
    scores = class_scores.float()
    boxes = clip_boxes(boxes.float(), image_sizes)  # [N, P, Cls or 1, 4]
    large = ((boxes[..., 2:] - boxes[..., :2]) >= min_size).all(-1)  # [N, P, Cls or 1]
    alive = (scores > score_threshold) & large & valid[..., None]  # [N, P, Cls]
    kept, _ = nms(
        boxes.expand(N, P, Cls, 4).transpose(1, 2).reshape(N * Cls, P, 4),
        scores.transpose(1, 2).reshape(N * Cls, P),
        nms_threshold,
        valid=alive.transpose(1, 2).reshape(N * Cls, P),
        max_output=min(max_detections, P),
    )
    keep = _mark(kept, P).view(N, Cls, P).transpose(1, 2).reshape(N, P * Cls)
    flat_scores = scores.flatten(1)  # [N, P * Cls]
    best, picked, counts = _best(keep, flat_scores, max_detections)
    row = picked // Cls * boxes.shape[2] + (picked % Cls if boxes.shape[2] > 1 else 0)  # [N, D']
    picked_boxes = boxes.flatten(1, 2).gather(1, row[..., None].expand(-1, -1, 4))  # [N, D', 4]
    picked_boxes = torch.where(best[..., None], picked_boxes, 0.0)
    picked_scores = torch.where(best, flat_scores.gather(1, picked), 0.0)  # [N, D']
    labels = torch.where(best, picked % Cls, 0)  # [N, D']
    missing = max_detections - picked.shape[1]
    return (
        F.pad(picked_boxes, (0, 0, 0, missing)),
        F.pad(picked_scores, (0, missing)),
        F.pad(labels, (0, missing)),
        counts,
    )


def top_indices(scores: Tensor, k: int) -> Tensor:
    """Indices [N, k] of the k largest of scores [N, M], by falling score, ties by rising index, NaN last (behind -inf).

    `torch.topk` promises no order among ties, and half-precision logits tie often; so it is given integers that are
    all different: the score's bits, made to rise with the score, above the index counted from the end.
    """
    M = scores.shape[1]
    values = scores.float() + 0.0  # adding 0 turns -0 into 0
    bits = values.view(torch.int32).long()  # [N, M]
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # negative floats have the reverse order
    rising = torch.where(torch.isnan(values), -(2**31), rising)
    keys = rising * 2**32 + (M - 1 - torch.arange(M, device=scores.device))  # [N, M]
    return M - 1 - (keys.topk(k, dim=1).values & 0xFFFFFFFF)


def _mark(kept: Tensor, length: int) -> Tensor:
    """Mask [S, length] of the positions that kept [S, M] names; -1 names none."""
    marks = torch.zeros(kept.shape[0], length + 1, dtype=torch.bool, device=kept.device)
    return marks.scatter(1, torch.where(kept < 0, length, kept), True)[:, :length]


def _best(keep: Tensor, scores: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `limit` best kept entries of each row of scores [N, X]: which are real and their indices, both
    [N, min(limit, X)], and counts [N]."""
    ranked = torch.where(keep, scores, -torch.inf)  # [N, X]
    picked = torch.sort(ranked, dim=1, descending=True, stable=True).indices[:, :limit]
    counts = keep.sum(1).clamp(max=limit)  # [N]
    real = torch.arange(picked.shape[1], device=keep.device) < counts[:, None]
    return real, picked, counts
