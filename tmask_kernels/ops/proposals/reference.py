"""From the RPN's maps to proposals, and from class scores to detections, as their definitions read.

Three steps with fixed shapes and no host synchronisation: candidates by segment, NMS of the segments, the best of each
image. The first and the last stand here; `kernels/candidates.py` and `kernels/select.py` are their kernels.
Letters: N images, A anchors of a cell, H W side lengths of a map, L levels, P proposals, Cls foreground classes, S
segments (a level or a class of an image), G of one image, K candidates of a segment, M of them that NMS kept, D rows
taken of an image. Order everywhere: score falling, then index rising. All arithmetic is float32 whatever the inputs'
dtype.
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
    """The best `top_n` of each level: boxes [N * L, K, 4], probabilities [N * L, K], valid [N * L, K] bool.

    objectness [N, A, H, W] and deltas [N, 4A, H, W] a level, image_sizes [N, 2], strides (y, x) a level. A level with
    fewer than K anchors has zeros behind them. Valid are candidates without NaN, with no side under min_size and a
    probability of at least score_threshold.
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
    """The best k of one level: logits [N, k], deltas [N, k, 4] and anchors [N, k, 4]."""
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
    """Every proposal once a class: boxes [N * Cls, P, 4] clipped to their image, scores and valid [N * Cls, P].

    class_scores [N, P, Cls], boxes [N, P, Cls or 1, 4], valid [N, P], image_sizes [N, 2]. Valid are those of a valid
    proposal that score over score_threshold and have no side under min_size.
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
    """Of each of N = `images` the best D = `limit` that NMS kept: boxes [N, D, 4], scores, segments [N, D], counts [N].

    boxes [S, K, 4], scores [S, K]; kept [S, M] indexes K, -1 names none. A row comes with its segment 0..G-1 of the
    image; zeros behind the last. Among equal scores the index decides: segment, then box, or with `box_first` box,
    then segment.
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


def _at_least(boxes: Tensor, min_size: float) -> Tensor:
    """Whether both sides of boxes [..., 4] have min_size: [...]; false for NaN."""
    return ((boxes[..., 2:] - boxes[..., :2]) >= min_size).all(-1)


def _mark(kept: Tensor, length: int) -> Tensor:
    """Mask [S, length] of the positions that kept [S, M] names; -1 names none."""
    marks = torch.zeros(kept.shape[0], length + 1, dtype=torch.bool, device=kept.device)
    return marks.scatter(1, torch.where(kept < 0, length, kept), True)[:, :length]
