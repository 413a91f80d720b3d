"""From a model's detections to COCO results, for evaluation and prediction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tmask.engine.device import autocast, to_device
from tmask.engine.log import progress
from tmask.skeleton import Skeleton


def skeleton_of(model: Any) -> Skeleton | None:
    """The keypoints of a model from `build_model`; None for a model without keypoints."""
    keypoints = getattr(getattr(model, "config", None), "keypoints", None)
    return None if keypoints is None else keypoints.skeleton


def detect(
    model: Any,
    loader: Iterable[Any],
    category_ids: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
) -> list[dict[str, Any]]:
    """Run `model` on the images of `loader` and return the detections as COCO results (see `coco_results`).

    The model's mode (train or eval) is restored at the end.

    Raises:
        ValueError: The number of `category_ids` is not the model's number of foreground classes.
    """
    from tmask.model.postprocess import to_list

    device = torch.device(device)
    num_classes = getattr(getattr(model, "config", None), "num_classes", None)
    if num_classes is not None and num_classes != len(category_ids) + 1:
        need = f"{num_classes - 1}, the model's classes without background"
        raise ValueError(f"category_ids: expected {need}, got {len(category_ids)}")
    was_training = model.training
    model.eval()
    results = []
    try:
        with torch.inference_mode():
            for batch in progress(loader, "evaluation", "batch"):
                images = to_device(batch.images, device, channels_last=True)
                with autocast(device, precision):
                    detections = model.forward_padded(images, compact=device.type == "cpu")
                found = to_list(detections, images.sizes, batch.original_sizes, masks="rle", convention=model.paste)
                for image_id, result in zip(batch.image_ids, _on_host(found), strict=True):
                    results += coco_results(image_id, result, category_ids)
    finally:
        model.train(was_training)
    return results


def _on_host(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copy the results of a batch to the host, with one wait for each field, not one for each image."""
    counts = [len(result["boxes"]) for result in found]
    names = [name for name, value in found[0].items() if isinstance(value, Tensor)]
    fields = {name: torch.cat([result[name] for result in found]).cpu() for name in names}
    rows = zip(*(values.split(counts) for values in fields.values()), strict=True)
    return [result | dict(zip(fields, row, strict=True)) for result, row in zip(found, rows, strict=True)]


def coco_results(image_id: int, result: dict[str, Any], category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Convert the detections of one image to COCO results.

    COCO's keypoint coordinates are half a pixel less than ours. A keypoint with a NaN score, from a head that has
    diverged, becomes 0, 0, 0, COCO's value for an unknown keypoint, because JSON has no NaN.

    Args:
        image_id: COCO's id of the image.
        result: ``boxes`` [D, 4] xyxy, ``labels`` [D], ``scores`` [D]; optional: ``masks`` (D run lengths), and
            ``keypoints`` [D, Kp, 3] with ``keypoints_scores`` [D, Kp].
        category_ids: Label i is the category ``category_ids[i - 1]``.

    Returns:
        D dicts: image_id, category_id, bbox (xywh), score, and, if given, segmentation and keypoints (x, y, score).
    """
    boxes: Tensor = result["boxes"]
    labels = result["labels"].tolist()
    wrong = [label for label in labels if not 1 <= label <= len(category_ids)]
    if wrong:
        raise ValueError(f"labels: expected 1..{len(category_ids)}, one a category, got {wrong[0]}")
    xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
    results = [
        {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score}
        for box, label, score in zip(xywh, labels, result["scores"].tolist(), strict=True)
    ]
    if "masks" in result:
        for item, rle in zip(results, result["masks"], strict=True):
            item["segmentation"] = {"size": [int(side) for side in rle["size"]], "counts": rle["counts"]}
    if "keypoints" in result:
        triples = torch.cat([result["keypoints"][..., :2] - 0.5, result["keypoints_scores"][..., None]], dim=-1)
        triples = torch.where(triples[..., 2:].isnan(), 0.0, triples)
        for item, keypoints in zip(results, triples.flatten(1).tolist(), strict=True):
            item["keypoints"] = keypoints
    return results
