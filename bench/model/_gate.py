"""When two results of the model are the same, and when they are as alike as rounding leaves them.

Letters: D detections of an image, h w its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou

from bench.rle import decode_rle

# Full precision, another order of sums: some 1e-6 of every value. What stands at a threshold or at the last place of
# the list, or scores as much as a neighbour that overlaps it, may still go either way.
DIFFERING = 0.005
SAME_IOU, SAME_SCORE, SAME_MASK = 0.98, 1e-3, 0.98

MASKS_COMPARED = 20  # of an image: the best ones


class Likeness(NamedTuple):
    """How much of a result is in another.

    Half precision, and the TF32 of a GPU's convolutions, put a logit of this random network of 50 layers off by some
    per cent of the spread of all, and of many overlapping RoIs another wins. What scores well above the last place is
    found again, though, near where it was.
    """

    found: float  # of the clear ones, with IoU of at least 0.5
    pixels: float  # median difference of a coordinate
    score: float  # median difference as a part of the score
    masks: float  # mean IoU where box and label are the same


CLEARLY = 1.5  # times the lowest score that enters the list
# bf16 on a CPU at full size, ours and torchvision's: 0.7 found, 2 pixels, 0.2 of a score.
LEAST = Likeness(found=0.5, pixels=8.0, score=0.4, masks=0.5)
# Under autocast torchvision decodes boxes in bf16, 4 to 8 pixels apart at this size, and on a GPU its NMS of levels
# moves them apart by thousands of pixels in it. That is what its users run, so it is timed; only a wreck is not.
LEAST_OF_PEERS = Likeness(found=0.1, pixels=64.0, score=0.8, masks=0.2)


class Found(NamedTuple):
    """The detections of one image, by falling score, on one device."""

    boxes: Tensor  # [D, 4] float32
    scores: Tensor  # [D] float32
    labels: Tensor  # [D] int64
    masks: Tensor  # [min(D, MASKS_COMPARED), h, w] bool


def found(result: dict[str, Any]) -> Found:
    """A result in torchvision's form; masks as probabilities [D, 1, h, w] or COCO's run lengths."""
    masks, boxes = result["masks"], result["boxes"]
    if isinstance(masks, Tensor):
        pixels = masks[:MASKS_COMPARED, 0] > 0.5
    else:
        pixels = (
            torch.stack([decode_rle(rle) for rle in masks[:MASKS_COMPARED]]) if masks else boxes.new_zeros(0, 1, 1) > 0
        )
    return Found(boxes.float(), result["scores"].float(), result["labels"], pixels.to(boxes.device))


def check_same(got: Sequence[Found], true: Sequence[Found]) -> None:
    """Errors: AssertionError unless all but `DIFFERING` of the detections are the same, masks included."""
    total = differ = 0
    for ours, theirs in zip(got, true, strict=True):
        for one, other in ((ours, theirs), (theirs, ours)):
            if not len(other.scores):
                total, differ = total + len(one.scores), differ + len(one.scores)
                continue
            pair, iou = _partners(one, other)
            same = (iou >= SAME_IOU) & ((one.scores - other.scores[pair]).abs() <= SAME_SCORE)
            same[: len(one.masks)] &= _mask_iou(one, other, pair) >= SAME_MASK
            total, differ = total + len(same), differ + int((~same).sum())
    # Of a few, one that moves out of the list and one that moves in are more than the share.
    assert differ <= max(4, DIFFERING * total), f"{differ} of {total} detections differ"


def check_alike(got: Sequence[Found], true: Sequence[Found], least: Likeness = LEAST) -> None:
    """Errors: AssertionError unless the clear detections of each are found in the other, near where they were."""
    for given, truth in zip(got, true, strict=True):
        for one, other, what in ((truth, given, "true"), (given, truth, "given")):
            is_like = likeness(one, other)
            assert is_like.found >= least.found, f"{is_like.found:.0%} of the {what} detections found again"
            assert is_like.pixels <= least.pixels, f"boxes off by {is_like.pixels:.1f} pixels"
            assert is_like.score <= least.score, f"scores off by {is_like.score:.0%}"
            assert is_like.masks >= least.masks, f"masks: mean IoU {is_like.masks:.2f}"


def likeness(one: Found, other: Found) -> Likeness:
    """How much of `one` is in `other`."""
    if not len(one.scores):
        return Likeness(1.0, 0.0, 0.0, 1.0)
    clear = one.scores >= min(CLEARLY * float(one.scores.min()), float(one.scores.max()))
    pair, iou = _partners(one, other)
    hit = clear & (iou >= 0.5)
    if not hit.any():
        return Likeness(0.0, 0.0, 0.0, 1.0)
    pixels = (one.boxes[hit] - other.boxes[pair[hit]]).abs().median()
    score = ((one.scores[hit] - other.scores[pair[hit]]).abs() / one.scores[hit]).median()
    masks = _mask_iou(one, other, pair)[iou[: len(one.masks)] >= 0.9]
    return Likeness(
        float(hit.sum() / clear.sum()), float(pixels), float(score), float(masks.mean()) if len(masks) else 1.0
    )


def _partners(one: Found, other: Found) -> tuple[Tensor, Tensor]:
    """For each detection of `one` the best of its label in `other` and the IoU of their boxes: [D], [D]."""
    if not len(other.boxes):
        return torch.zeros_like(one.labels), torch.zeros_like(one.scores)
    overlap = box_iou(one.boxes, other.boxes) * (one.labels[:, None] == other.labels)  # [D, D']
    best = overlap.max(1)
    return best.indices, best.values


def _mask_iou(one: Found, other: Found, pair: Tensor) -> Tensor:
    """IoU of the compared masks; 1 where the partner's is not compared."""
    ious = torch.ones(len(one.masks), device=one.boxes.device)
    for i, j in enumerate(pair[: len(one.masks)].tolist()):
        if j < len(other.masks):
            union = (one.masks[i] | other.masks[j]).sum()
            ious[i] = torch.where(union > 0, (one.masks[i] & other.masks[j]).sum() / union, 1.0)
    return ious
