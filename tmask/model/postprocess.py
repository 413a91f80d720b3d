"""From padded detections back to the caller's images: one dict an image, in original pixels.

Here stand the host synchronisations of inference, as many for a batch as for an image: reading how many detections
each image has, and the run lengths of masks where they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tmask.structures import Detections
from tmask_kernels import paste_masks_batched

MASK_FORMS = ("probability", "bool", "rle", "none")


def to_list(
    detections: Detections,
    image_sizes: Tensor,
    original_sizes: Sequence[tuple[int, int]],
    *,
    masks: str = "probability",
    convention: str = "detectron2",
) -> list[dict[str, Any]]:
    """Detections of N padded images as torchvision's list of dicts.

    `image_sizes` [N, 2]: height and width before padding; `original_sizes`: before the resize. Each dict holds
    ``boxes`` [D, 4] xyxy in original pixels, ``scores`` [D], ``labels`` [D] and ``masks``: [D, 1, H, W] float
    (``probability``), [D, H, W] bool (``bool``), a list of COCO run-length dicts (``rle``), or left out (``none``, and
    of a model without masks).
    Of a model with keypoints it also holds ``keypoints`` [D, Kp, 3], x and y in original pixels and 1, and
    ``keypoints_scores`` [D, Kp]. `convention` names the rule of `paste_masks`. Errors: ValueError for an unknown
    `masks`.
    """
    if masks not in MASK_FORMS:
        raise ValueError(f"masks: expected one of {', '.join(MASK_FORMS)}, got {masks!r}")
    counts = detections.counts.tolist()  # the one synchronisation, but for run lengths
    scales = _scales(image_sizes, original_sizes)  # [N, 4]
    boxes = detections.boxes * scales[:, None]  # [N, D, 4]
    results: list[dict[str, Any]] = [
        {"boxes": boxes[i, :count], "labels": detections.labels[i, :count], "scores": detections.scores[i, :count]}
        for i, count in enumerate(counts)
    ]
    if masks != "none" and detections.masks is not None:
        pasted = paste_masks_batched(
            detections.masks, boxes, counts, original_sizes, output=masks, convention=convention
        )
        for result, one in zip(results, pasted, strict=True):
            result["masks"] = one[:, None] if isinstance(one, Tensor) and masks == "probability" else one
    if detections.keypoints is not None:
        for i, result in enumerate(results):
            xy, score = detections.keypoints[i, : counts[i]].split((2, 1), dim=-1)
            result["keypoints"] = torch.cat([xy * scales[i, :2], torch.ones_like(score)], dim=-1)
            result["keypoints_scores"] = score.squeeze(-1)
    return results


def _scales(image_sizes: Tensor, original_sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Original pixels per resized pixel as a factor of xyxy boxes: [N, 4]."""
    # [N, 2] height, width; copied without a wait
    original = torch.tensor(original_sizes, dtype=torch.float32).to(image_sizes.device, non_blocking=True)
    return (original / image_sizes).flip(1).repeat(1, 2)
