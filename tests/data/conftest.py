"""Tiny COCO files made on the spot, and the warnings of opening them."""

import copy
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


def polygon(x: float, y: float, width: float, height: float) -> list[list[float]]:
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


# Two images, 20x10 and 8x12 (width x height); the second has no annotation. The one plane is a crowd.
CONTENT = {
    "images": [
        {"id": 7, "file_name": "wide.png", "width": 20, "height": 10},
        {"id": 3, "file_name": "tall.png", "width": 8, "height": 12},
    ],
    "categories": [{"id": 90, "name": "brush"}, {"id": 5, "name": "plane"}],
    "annotations": [
        {
            "id": 11, "image_id": 7, "category_id": 90, "bbox": [2, 3, 6, 4], "segmentation": polygon(2, 3, 6, 4),
            "area": 24, "iscrowd": 0,
        },
        {
            "id": 12, "image_id": 7, "category_id": 5, "bbox": [3, 0, 1, 10], "iscrowd": 1, "area": 10,
            "segmentation": {"size": [10, 20], "counts": [30, 10, 160]},
        },
        {"id": 13, "image_id": 7, "category_id": 90, "bbox": [15, 5, 9, 9]},
    ],
}  # fmt: skip


@pytest.fixture
def content() -> dict:
    """A copy of CONTENT to change."""
    return copy.deepcopy(CONTENT)


@pytest.fixture
def write(tmp_path: Path):
    """Writes the images of CONTENT, and a COCO file of the argument; returns the arguments of CocoDataset."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir(exist_ok=True)
    for record in CONTENT["images"]:
        pixels = rng.integers(0, 256, (record["height"], record["width"], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / record["file_name"])
    return lambda content: write_coco(tmp_path, content)


def coco(
    images: Sequence[tuple[str, int, int]],
    annotations: Sequence[dict[str, Any]] = (),
    categories: Sequence[str] = ("disc",),
) -> dict[str, Any]:
    """A COCO file of images (name, width, height). Ids count from 1; annotations are of image 1 and category 1 unless
    they say otherwise.
    """
    return {
        "images": [{"id": i, "file_name": n, "width": w, "height": h} for i, (n, w, h) in enumerate(images, 1)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(categories, 1)],
        "annotations": [{"id": i, "image_id": 1, "category_id": 1, **item} for i, item in enumerate(annotations, 1)],
    }


def write_coco(folder: Path, content: object) -> tuple[Path, Path]:
    """Writes a COCO file, an object or its text, beside the folder `images`; returns the arguments of CocoDataset."""
    (folder / "file.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / "images", folder / "file.json"


@contextmanager
def told() -> Iterator[list[str]]:
    """Collects the texts of the UserWarnings inside the block; the list is complete when the block ends."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(item.message) for item in caught if item.category is UserWarning]
