"""Pictures of detections: beside the ground truth at the end of a training, and alone for each predicted image."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tmask.engine.detect import skeleton_of
from tmask.engine.device import autocast
from tmask.engine.files import replacing
from tmask.engine.matching import match_instances
from tmask.model.transform import is_packed, mask_chunks
from tmask.skeleton import Pairs
from tmask.visualize import PARTS, comparison, draw_instances, grid
from tmask_kernels import unpack_masks

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {"png": ".png", "jpeg": ".jpg"}  # of the formats
JPEG_QUALITY = 92
PNG_LEVEL = 3  # of compression: half the time of Pillow's 6 for a tenth more bytes
NUM_PICTURES = 8  # of validation images
OVERVIEW_NAME, OVERVIEW_PICTURES = "overview.png", 4


def draw_pictures(
    model: Any,
    dataset: Any,
    folder: Path,
    *,
    device: torch.device,
    precision: str = "fp32",
    count: int = NUM_PICTURES,
    score_threshold: float = 0.5,
) -> list[Path]:
    """Write predictions beside the ground truth for the first `count` images of `dataset`, as ``1-NAME.png``.

    A detection and its object have the same colour; false detections and misses are marked (see `comparison`).
    ``overview.png`` shows the first few pictures on one page. Returns the paths of the others.
    """
    skeleton = skeleton_of(model)
    edges = () if skeleton is None else skeleton.edges
    folder.mkdir(parents=True, exist_ok=True)
    names = [str(category["name"]) for category in dataset.categories]
    was_training = model.training
    model.eval()
    paths, pictures = [], []
    for index in [i for i in range(len(dataset)) if i not in dataset.left_out][:count]:
        image, target = dataset[index]
        with torch.inference_mode(), autocast(device, precision):
            found = model([image.to(device)], masks="rle")[0]
        shown = torch.nonzero(found["scores"] >= score_threshold).flatten().tolist()
        found = {
            key: value[shown].cpu() if isinstance(value, Tensor) else [value[k] for k in shown]
            for key, value in found.items()
        }
        truth = {key: value for key, value in target.items() if key in ("boxes", "labels", "iscrowd", "has_mask")}
        if "masks" in target:
            truth["masks"] = _run_lengths(target["masks"], image.shape[-1])
        if skeleton is not None and "keypoints" in target:
            truth["keypoints"] = target["keypoints"]
        matches = match_instances(truth, found, (image.shape[-2], image.shape[-1]))
        pictures.append(comparison(image, found, truth, names, matches, edges=edges))
        # With the number: images of two folders may share a name, and an image may be called overview.png.
        paths.append(folder / f"{index + 1}-{Path(dataset.image_path(index)).stem}.png")
        _save(paths[-1], pictures[-1])
    if pictures:
        _save(folder / OVERVIEW_NAME, grid(pictures[:OVERVIEW_PICTURES], columns=2))
    model.train(was_training)
    return paths


def draw_detections(
    path: Path,
    image: Tensor,
    detections: Sequence[dict[str, Any]],
    categories: Sequence[dict[str, Any]],
    *,
    score_threshold: float,
    parts: Collection[str] = PARTS,
    max_side: int | None = None,
    edges: Pairs = (),
) -> None:
    """Write a picture of `image` [3, H, W] with its `detections`, which are COCO results, to `path`.

    The suffix of `path` decides between PNG and JPEG. `parts` and `max_side` are those of `draw_instances`.
    """
    labels = {int(category["id"]): label for label, category in enumerate(categories, start=1)}
    xywh = torch.tensor([item["bbox"] for item in detections]).reshape(-1, 4)
    result: dict[str, Any] = {
        "boxes": torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1),
        "labels": torch.tensor([labels[item["category_id"]] for item in detections], dtype=torch.int64),
        "scores": torch.tensor([item["score"] for item in detections]),
    }
    if detections and "segmentation" in detections[0]:
        result["masks"] = [item["segmentation"] for item in detections]
    if detections and "keypoints" in detections[0]:
        keypoints = torch.tensor([item["keypoints"] for item in detections]).unflatten(1, (-1, 3))
        known = (keypoints != 0).any(-1, keepdim=True)
        result["keypoints"] = torch.cat([keypoints[..., :2] + 0.5, known.float()], dim=-1)
    names = [str(category["name"]) for category in categories]
    picture = draw_instances(
        image, result, names, min_score=score_threshold, parts=parts, max_side=max_side, edges=edges
    )
    _save(path, picture)


def _save(path: Path, picture: Image) -> None:
    """Write a picture as JPEG if `path` has its suffix, else as PNG."""
    options: dict[str, Any] = {"format": "PNG", "compress_level": PNG_LEVEL}
    if path.suffix == SUFFIXES["jpeg"]:  # Pillow's default, colours at half the resolution, would blur thin lines
        options = {"format": "JPEG", "quality": JPEG_QUALITY, "subsampling": 0}
    with replacing(path) as file:
        picture.save(file, **options)


def _run_lengths(masks: Tensor, width: int) -> list[dict[str, Any]]:
    """Encode masks [G, H, W], bytes or packed, as COCO's run lengths; few masks at a time are bytes."""
    from pycocotools import mask as coco_mask

    runs: list[dict[str, Any]] = []
    for chunk in mask_chunks(len(masks), masks.shape[1] * width):
        part = unpack_masks(masks[chunk], width) if is_packed(masks, width) else masks[chunk]
        runs += coco_mask.encode(np.asfortranarray(part.to(torch.uint8).permute(1, 2, 0).numpy()))
    return runs
