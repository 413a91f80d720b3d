"""Prediction on image files: COCO results and pictures with the instances drawn in."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tmask.engine.device import autocast
from tmask.engine.evaluate import coco_results, write_results

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
RESULTS_NAME = "predictions.json"


def find_images(pattern: str | Path) -> list[Path]:
    """The image files of a file name, a folder (not its subfolders) or a glob, sorted.

    Errors: ValueError if there are none.
    """
    path = Path(pattern)
    if path.is_dir():
        found = [item for item in path.iterdir() if item.suffix.lower() in IMAGE_SUFFIXES]
    elif path.is_file():
        found = [path]
    else:
        found = [Path(item) for item in glob.glob(str(pattern), recursive=True) if Path(item).is_file()]
    if not found:
        raise ValueError(f"images: expected an image, a folder of images or a glob, found no image at {str(pattern)!r}")
    return sorted(found)


def predict(
    model: Any,
    images: Sequence[Path],
    categories: Sequence[dict[str, Any]],
    *,
    out_dir: str | Path,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    score_threshold: float = 0.5,
) -> list[dict[str, Any]]:
    """Detect in each file of `images`; write ``predictions.json`` and a PNG an image to `out_dir`.

    The JSON array holds COCO results of every detection; ``image_id`` counts the images from 1 and ``file_name`` is
    added. `categories` are the checkpoint's: label i is ``categories[i - 1]``. `score_threshold` limits only what is
    drawn. The JSON is written however this ends, with all images done by then.
    Errors: ValueError, when all others are done, that names the files that are no images.
    """
    from tqdm import tqdm

    from tmask.data.images import read_image
    from tmask.visualize import draw_instances, save_png

    device, out_dir = torch.device(device), Path(out_dir)
    ids = [int(category["id"]) for category in categories]
    names = [str(category["name"]) for category in categories]
    pictures = _picture_names(images)
    model.to(device).eval()
    out_dir.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    unreadable: list[str] = []
    try:
        for number, path in enumerate(tqdm(images, unit="image", disable=None), start=1):
            try:
                image = read_image(path)  # [3, H, W] uint8
            except ValueError as error:
                unreadable.append(str(error))
                continue
            with torch.inference_mode(), autocast(device, precision):
                result = model([image.to(device)], masks="rle")[0]
            result = {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in result.items()}
            results += [{**row, "file_name": path.name} for row in coco_results(number, result, ids)]
            picture = draw_instances(image, result, names, min_score=score_threshold)
            save_png(out_dir / pictures[number - 1], picture)
    finally:
        write_results(out_dir / RESULTS_NAME, results)
    if unreadable:
        done = f"the {len(images) - len(unreadable)} others are done, {out_dir / RESULTS_NAME}"
        raise ValueError(f"{len(unreadable)} of {len(images)} images left out ({done}): {'; '.join(unreadable)}")
    return results


def _picture_names(images: Sequence[Path]) -> list[str]:
    """One PNG name an image; images of the same stem are told apart by a number."""
    names: list[str] = []
    taken: set[str] = set()
    for path in images:
        name, number = f"{path.stem}.png", 1
        while name in taken:
            number += 1
            name = f"{path.stem}-{number}.png"
        taken.add(name)
        names.append(name)
    return names
