"""Tiny COCO files made on the spot."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def polygon(x: float, y: float, width: float, height: float) -> list[list[float]]:
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


# Two images, 20x10 and 8x12 (width x height); the second has no annotation.
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
        {"id": 13, "image_id": 7, "category_id": 5, "bbox": [15, 5, 9, 9]},
    ],
}  # fmt: skip


@pytest.fixture
def content() -> dict:
    """A copy of CONTENT to change."""
    return copy.deepcopy(CONTENT)


@pytest.fixture
def write(tmp_path: Path):
    """Write images and a COCO file; gives the arguments of CocoDataset."""

    def write(content: object) -> tuple[Path, Path]:
        rng = np.random.default_rng(0)
        (tmp_path / "images").mkdir(exist_ok=True)
        for record in CONTENT["images"]:
            pixels = rng.integers(0, 256, (record["height"], record["width"], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / record["file_name"])
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "file.json").write_text(text)
        return tmp_path / "images", tmp_path / "file.json"

    return write
