"""Data sets in COCO's instance format: a folder of images and one JSON file.

Everything that can be wrong in the files is found when the data set is opened, and named; a training run does not die
of a missing image in its third hour. Letters: G annotations of an image, H W its size.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tmask.data.images import read_image

Target = dict[str, Any]
Transforms = Callable[[Tensor, Target], tuple[Tensor, Target]]


class CocoDataset(Dataset[tuple[Tensor, Target]]):
    """Item i: the image, uint8 [3, H, W] RGB, and its target, a dict of

    ``image_id`` int, ``boxes`` [G, 4] float32 xyxy clipped to the image, ``labels`` [G] int64, ``masks`` [G, H, W]
    uint8 0/1, ``iscrowd`` [G] bool, ``has_mask`` [G] bool (False where there is no polygon and no run length, or it
    covers no pixel; the mask is zeros then).

    Label i in 1..num_classes-1 stands for ``category_ids[i - 1]``; 0 is the background. Images without annotations
    are kept. Annotations whose box has no area inside the image are left out of the targets, with one warning.
    A missing ``iscrowd`` means 0, a missing ``area`` is the mask's, or the box's without a mask.

    `transforms` (image, target) -> (image, target) runs on each item. Images are read as they are stored: an EXIF
    orientation is not applied, since COCO's annotations were drawn on the stored pixels.

    ``coco`` is the `pycocotools.coco.COCO` of the whole file for evaluation. There an annotation id of 0 is replaced,
    since its evaluator takes a match with id 0 for none.

    Errors: ValueError, naming file and entry, for a missing folder, file or image, broken JSON, missing or
    contradictory fields; on reading an item, for an image that cannot be decoded or is not of the size the file says.
    """

    def __init__(
        self, images_folder: str | Path, annotation_file: str | Path, *, transforms: Transforms | None = None
    ) -> None:
        from pycocotools.coco import COCO

        self.images_folder, self.annotation_file = Path(images_folder), Path(annotation_file)
        self.transforms = transforms
        if not self.images_folder.is_dir():
            raise ValueError(f"images_folder: no such folder: {self.images_folder}")
        content = read_json(self.annotation_file)
        _check_content(self.annotation_file, content)
        self.images: list[dict[str, Any]] = content["images"]
        self.categories: list[dict[str, Any]] = sorted(content["categories"], key=lambda category: category["id"])
        self.category_ids: list[int] = [category["id"] for category in self.categories]
        self._check_image_files()
        self._annotations, self._boxes = self._sort_annotations(content["annotations"])
        _fill_annotations(self.annotation_file, content["annotations"], self.images)
        self.coco = COCO()
        self.coco.dataset = content
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            self.coco.createIndex()

    @property
    def num_classes(self) -> int:
        """Number of categories and background."""
        return len(self.categories) + 1

    def __len__(self) -> int:
        return len(self.images)

    def image_path(self, i: int) -> Path:
        """The file of image i."""
        return self.images_folder / self.images[i]["file_name"]

    def aspect_ratio(self, i: int) -> float:
        """Width / height of image i, without reading it."""
        return float(self.images[i]["width"] / self.images[i]["height"])

    def __getitem__(self, i: int) -> tuple[Tensor, Target]:
        record, annotations = self.images[i], self._annotations[i]
        size = (record["height"], record["width"])
        image = read_image(self.image_path(i))
        if tuple(image.shape[1:]) != size:
            expected, got = f"{size[1]}x{size[0]}", f"{image.shape[2]}x{image.shape[1]}"
            raise ValueError(f"{self.image_path(i)}: expected {expected} pixels by {self.annotation_file}, got {got}")
        masks = self._masks(annotations, size)
        labels = {category_id: label for label, category_id in enumerate(self.category_ids, start=1)}
        target = {
            "image_id": record["id"],
            "boxes": torch.from_numpy(self._boxes[i].copy()),
            "labels": torch.tensor([labels[item["category_id"]] for item in annotations], dtype=torch.int64),
            "masks": masks,
            "iscrowd": torch.tensor([bool(item["iscrowd"]) for item in annotations], dtype=torch.bool),
            "has_mask": masks.flatten(1).any(1),
        }
        return (image, target) if self.transforms is None else self.transforms(image, target)

    def _check_image_files(self) -> None:
        missing = [i for i in range(len(self)) if not self.image_path(i).is_file()]
        if missing:
            raise ValueError(
                f"{self.annotation_file}: {len(missing)} of {len(self)} images do not exist, "
                f"first {self.image_path(missing[0])} (image id {self.images[missing[0]]['id']})"
            )

    def _sort_annotations(
        self, annotations: Sequence[dict[str, Any]]
    ) -> tuple[list[list[dict[str, Any]]], list[np.ndarray[Any, np.dtype[np.float32]]]]:
        """The annotations of each image that have a box inside it, and those boxes, clipped: [G, 4] each."""
        row = {record["id"]: i for i, record in enumerate(self.images)}
        kept: list[list[dict[str, Any]]] = [[] for _ in self.images]
        boxes: list[list[tuple[float, ...]]] = [[] for _ in self.images]
        dropped = []
        for item in annotations:
            i = row[item["image_id"]]
            x, y, width, height = item["bbox"]
            right, bottom = self.images[i]["width"], self.images[i]["height"]
            box = (max(x, 0), max(y, 0), min(x + width, right), min(y + height, bottom))
            # Compared as stored: in float32 a sliver may lose its area.
            x1, y1, x2, y2 = np.array(box, dtype=np.float32)
            if x2 > x1 and y2 > y1:
                kept[i].append(item)
                boxes[i].append(box)
            else:
                dropped.append(item["id"])
        if dropped:
            warnings.warn(
                f"{self.annotation_file}: left out {len(dropped)} of {len(annotations)} annotations, whose box has no "
                f"area inside the image; first annotation id {dropped[0]}",
                stacklevel=3,
            )
        return kept, [np.array(item, dtype=np.float32).reshape(-1, 4) for item in boxes]

    def _masks(self, annotations: Sequence[dict[str, Any]], size: tuple[int, int]) -> Tensor:
        """Decode the annotations of an image of `size` (H, W): [G, H, W] uint8."""
        from pycocotools import mask as coco_mask

        masks = torch.zeros(len(annotations), *size, dtype=torch.uint8)
        runs, rows = [], []
        for g, item in enumerate(annotations):
            with _naming(self.annotation_file, item):
                run = run_length(item.get("segmentation"), size)
            if run is not None:
                runs.append(run)
                rows.append(g)
        if runs:
            decoded = np.ascontiguousarray(coco_mask.decode(runs).transpose(2, 0, 1))  # [rows, H, W]
            masks[rows] = torch.from_numpy(decoded)
        return masks


def run_length(segmentation: Any, size: tuple[int, int]) -> dict[str, Any] | None:
    """COCO's compressed run lengths of any of its mask forms, for an image of `size` (H, W); None for no mask.

    Forms: polygons (a list of [x, y, x, y, ...]; those of fewer than three points are ignored), or run lengths, as
    numbers or compressed. Errors: ValueError for another form or size.
    """
    from pycocotools import mask as coco_mask

    if not segmentation:
        return None
    if isinstance(segmentation, list):
        # pycocotools would take a list of four numbers for a box.
        polygons = [points for points in segmentation if len(points) >= 6]
        if any(len(points) % 2 for points in polygons):
            raise ValueError("segmentation: expected polygons of x, y pairs, got an odd number of values")
        return coco_mask.merge(coco_mask.frPyObjects(polygons, *size)) if polygons else None
    if not isinstance(segmentation, dict) or "counts" not in segmentation or "size" not in segmentation:
        raise ValueError(f"segmentation: expected polygons or run lengths, got {type(segmentation).__name__}")
    if tuple(segmentation["size"]) != size:
        raise ValueError(f"segmentation: expected run lengths of size {size}, got {tuple(segmentation['size'])}")
    if isinstance(segmentation["counts"], list):
        if sum(segmentation["counts"]) != size[0] * size[1]:
            raise ValueError(f"segmentation: expected runs of {size[0] * size[1]} pixels in all")
        return coco_mask.frPyObjects(segmentation, *size)
    return segmentation


def read_json(path: Path) -> Any:
    """Parse a JSON file. Errors: ValueError that names the file, and line and column of a syntax error."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"annotation_file: no such file: {path}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def _check_content(path: Path, content: Any) -> None:
    """Raise ValueError unless `content` has COCO's three lists with the fields that are used."""
    fields = {
        "images": ("id", "file_name", "width", "height"),
        "categories": ("id", "name"),
        "annotations": ("id", "image_id", "category_id", "bbox"),
    }
    ids: dict[str, set[Any]] = {}
    for name, keys in fields.items():
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise ValueError(f"{path}: expected a COCO file, an object with a list {name!r}")
        ids[name] = set()
        for i, item in enumerate(content[name]):
            for key in keys:
                if not isinstance(item, dict) or key not in item:
                    raise ValueError(f"{path}: {name}[{i}]: expected a field {key!r}, got none")
            if item["id"] in ids[name]:
                raise ValueError(f"{path}: {name}[{i}]: id {item['id']} occurs twice")
            ids[name].add(item["id"])
    if not content["categories"]:
        raise ValueError(f"{path}: expected at least one category, got none")
    for item in content["annotations"]:
        where = f"{path}: annotation id {item['id']}"
        for key, known in (("image_id", ids["images"]), ("category_id", ids["categories"])):
            if item[key] not in known:
                raise ValueError(f"{where}: {key} {item[key]} is not in the file")
        box = item["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(_is_finite(value) for value in box)):
            raise ValueError(f"{where}: bbox: expected four finite numbers [x, y, width, height], got {box}")
    for i, item in enumerate(content["images"]):
        if not (item["width"] > 0 and item["height"] > 0):
            raise ValueError(f"{path}: images[{i}]: expected a positive size, got {item['width']}x{item['height']}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


@contextlib.contextmanager
def _naming(path: Path, annotation: dict[str, Any]) -> Iterator[None]:
    """Errors in here are about this annotation of the file: a ValueError says so."""
    try:
        yield
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: annotation id {annotation['id']}: {error}") from error


def _fill_annotations(path: Path, annotations: Sequence[dict[str, Any]], images: Sequence[dict[str, Any]]) -> None:
    """Add, in place, the fields that COCO's evaluator needs and files leave out."""
    from pycocotools import mask as coco_mask

    sizes = {record["id"]: (record["height"], record["width"]) for record in images}
    top = max((item["id"] for item in annotations), default=0)
    for item in annotations:
        item.setdefault("iscrowd", 0)
        if "area" not in item:
            with _naming(path, item):
                run = run_length(item.get("segmentation"), sizes[item["image_id"]])
                item["area"] = float(coco_mask.area(run)) if run else float(item["bbox"][2] * item["bbox"][3])
        if item["id"] == 0:
            item["id"] = top + 1
