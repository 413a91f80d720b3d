"""From the maps of the RPN to proposals, and from class scores to detections, written as their definitions.

There are three steps of fixed shapes, without host synchronisation: the candidates of each segment, NMS of the
segments, and the best of each image. This file has the first and the last step; their kernels are
`kernels/candidates.py` and `kernels/select.py`. Everything is ordered by falling score, then by rising index. All
arithmetic is float32.

Letters: N images, A anchors of a cell, H W sides of a map, L levels, P proposals, Cls foreground classes, S segments (a
level or a class of an image), G segments of one image, K candidates of a segment, M candidates that NMS kept in a
segment, D rows that an image keeps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..anchors.reference import AnchorSpec, anchors_at
from ..box_coding.reference import clip_boxes, decode_boxes_reference


def rpn_candidates_reference(
    objectness: Sequence[Tensor],
    deltas: Sequence[Tensor],
    image_sizes: Tensor,
    spec: AnchorSpec,
    strides: Sequence[tuple[int, int]],
    *,
    top_n: int,
    scale_clamp: float,
    min_size: float,
    score_threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best `top_n` anchors of each level, decoded and clipped.

    Args:
        objectness: [N, A, H, W] of each level.
        deltas: [N, 4A, H, W] of each level.
        image_sizes: [N, 2].
        spec: the anchors.
        strides: (y, x) of each level.
        top_n: candidates of a level.
        scale_clamp: as of `decode_boxes`.
        min_size: smallest side of a valid candidate.
        score_threshold: lowest probability of a valid candidate.

    Returns:
        boxes [N * L, K, 4], probabilities [N * L, K] and valid [N * L, K] bool. Zeros follow the anchors of a level
        that has fewer than K. A candidate with NaN is not valid.
    """
    most = max(min(top_n, x.shape[1:].numel()) for x in objectness)  # K
    boxes, scores, valid = [], [], []
    for level, (logits, delta) in enumerate(zip(objectness, deltas, strict=True)):
        logit, delta, anchors = _level_best(logits, delta, spec, level, strides[level], top_n)
        box = decode_boxes_reference(delta, anchors, (1.0, 1.0, 1.0, 1.0), scale_clamp, image_sizes)  # [N, k, 4]
        score = torch.sigmoid(logit)  # [N, k]
        good = ~(torch.isnan(logit) | torch.isnan(delta).any(-1))  # [N, k]
        good &= _at_least(box, min_size) & (score >= score_threshold)
        pad = most - score.shape[1]
        boxes.append(F.pad(box, (0, 0, 0, pad)))
        scores.append(F.pad(score, (0, pad)))
        valid.append(F.pad(good, (0, pad)))
    return (
        torch.stack(boxes, 1).flatten(0, 1),
        torch.stack(scores, 1).flatten(0, 1),
        torch.stack(valid, 1).flatten(0, 1),
    )


def _level_best(
    logits: Tensor, deltas: Tensor, spec: AnchorSpec, level: int, stride: tuple[int, int], top_n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best k of one level: logits [N, k], deltas [N, k, 4] and anchors [N, k, 4]."""
    N, A, _, W = logits.shape
    flat = logits.permute(0, 2, 3, 1).flatten(1)  # [N, H * W * A]
    index = top_indices(flat, min(top_n, flat.shape[1]))  # [N, k]
    # Only the survivors' deltas are read, whatever the memory layout of the map.
    cell, anchor = index // A, index % A  # [N, k]
    channel = anchor[..., None] * 4 + torch.arange(4, device=index.device)  # [N, k, 4]
    image = torch.arange(N, device=index.device)[:, None, None]  # [N, 1, 1]
    delta = deltas[image, channel, (cell // W)[..., None], (cell % W)[..., None]].float()  # [N, k, 4]
    return flat.gather(1, index).float(), delta, anchors_at(spec, level, index, W, stride)


def class_candidates_reference(
    class_scores: Tensor,
    boxes: Tensor,
    valid: Tensor,
    image_sizes: Tensor,
    *,
    score_threshold: float,
    min_size: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each proposal once for each class.

    Args:
        class_scores: [N, P, Cls].
        boxes: [N, P, Cls or 1, 4].
        valid: [N, P].
        image_sizes: [N, 2].
        score_threshold: a valid candidate scores above it.
        min_size: smallest side of a valid candidate.

    Returns:
        boxes [N * Cls, P, 4] clipped to their image, scores and valid [N * Cls, P].
    """
    N, P, Cls = class_scores.shape
    scores = class_scores.float()
    boxes = clip_boxes(boxes.float(), image_sizes)  # [N, P, Cls or 1, 4]
    alive = (scores > score_threshold) & _at_least(boxes, min_size) & valid[..., None]  # [N, P, Cls]
    return (
        boxes.expand(N, P, Cls, 4).transpose(1, 2).reshape(N * Cls, P, 4),
        scores.transpose(1, 2).reshape(N * Cls, P),
        alive.transpose(1, 2).reshape(N * Cls, P),
    )


def select_best_reference(
    boxes: Tensor, scores: Tensor, kept: Tensor, images: int, limit: int, box_first: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the best boxes of each image among those that NMS kept.

    Args:
        boxes: [S, K, 4].
        scores: [S, K].
        kept: [S, M] indices into K; -1 is padding.
        images: N.
        limit: D.
        box_first: orders equal scores by box, then segment; else by segment, then box.

    Returns:
        boxes [N, D, 4], scores [N, D], segments [N, D] in 0..G-1 and counts [N]. Zeros follow the last box.
    """
    S, K = scores.shape
    G = S // max(images, 1)
    marked = _mark(kept, K).view(images, G, K)
    ranked = torch.where(marked, scores.reshape(images, G, K), -torch.inf)
    if box_first:
        ranked = ranked.transpose(1, 2)
    order = torch.sort(ranked.flatten(1), dim=1, descending=True, stable=True).indices[:, :limit]  # [N, D']
    counts = marked.flatten(1).sum(1).clamp(max=limit)  # [N]
    real = torch.arange(order.shape[1], device=kept.device) < counts[:, None]  # [N, D']
    segment, box = (order % G, order // G) if box_first else (order // K, order % K)
    row = segment * K + box  # [N, D'] within the image
    picked_boxes = boxes.reshape(images, G * K, 4).gather(1, row[..., None].expand(-1, -1, 4))  # [N, D', 4]
    missing = limit - order.shape[1]
    return (
        F.pad(torch.where(real[..., None], picked_boxes, 0.0), (0, 0, 0, missing)),
        F.pad(torch.where(real, scores.reshape(images, G * K).gather(1, row), 0.0), (0, missing)),
        F.pad(torch.where(real, segment, 0), (0, missing)),
        counts,
    )


def top_indices(scores: Tensor, k: int) -> Tensor:
    """Return indices [N, k] of the k largest of scores [N, M], by falling score, then rising index; NaN is last.

    `torch.topk` promises no order among equal scores, and half-precision logits are often equal. So the function sorts
    integers that all differ: the bits of the score, changed to rise with the score, above the index counted from the
    end.
    """
    M = scores.shape[1]
    values = scores.float() + 0.0  # adding 0 turns -0 into 0
    bits = values.view(torch.int32).long()  # [N, M]
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # negative floats have the reverse order
    rising = torch.where(torch.isnan(values), -(2**31), rising)
    keys = rising * 2**32 + (M - 1 - torch.arange(M, device=scores.device))  # [N, M]
    return M - 1 - (keys.topk(k, dim=1).values & 0xFFFFFFFF)


def _at_least(boxes: Tensor, min_size: float) -> Tensor:
    """Return whether both sides of boxes [..., 4] are at least `min_size`: [...]; false for NaN."""
    return ((boxes[..., 2:] - boxes[..., :2]) >= min_size).all(-1)


def _mark(kept: Tensor, length: int) -> Tensor:
    """Return a mask [S, length] of the positions in kept [S, M]; -1 marks no position."""
    marks = torch.zeros(kept.shape[0], length + 1, dtype=torch.bool, device=kept.device)
    return marks.scatter(1, torch.where(kept < 0, length, kept), True)[:, :length]
