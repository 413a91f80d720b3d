"""COCO annotation files: reading them and checking every entry.

All that is wrong with a file is found here, before anything uses it, and named: file, entry, expected, got.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tmask.data.segmentation import check_numbers, check_segmentation, compressed, flat_polygons, is_int

_FIELDS = {
    "images": ("id", "file_name", "width", "height"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id"),
}


def read_coco(path: Path, *, masks: bool = True) -> dict[str, Any]:
    """The content of a COCO instance file.

    Where a file writes another form of what COCO means, the content has COCO's form: a field that is null is left
    out, polygons are flat lists, a text or a float that names a known id is that whole number, and LVIS' ``coco_url``
    gives a missing ``file_name``. An annotation without ``bbox`` has a ``segmentation``. Keypoints are not checked.
    With `masks` False a wrong ``segmentation`` beside a ``bbox`` is left out.
    Errors: ValueError that names the file and the first entry that is wrong.
    """
    content = _read_json(path)
    _leave_out_nulls(content)
    ids = {name: _check_list(path, content, name) for name in _FIELDS}
    for name in ("images", "categories"):
        if not content[name]:
            raise ValueError(f"{path}: {name}: expected at least one, got none")
    _check_images(path, content["images"])
    sizes = {item["id"]: (item["height"], item["width"]) for item in content["images"]}
    for item in content["annotations"]:
        with naming(path, item):
            for key, known in (("image_id", ids["images"]), ("category_id", ids["categories"])):
                item[key] = known_id(key, item[key], known)
            if type(item.get("segmentation")) is list:
                item["segmentation"] = flat_polygons(item["segmentation"])
            _check_annotation(item)
            try:
                check_segmentation(item.get("segmentation"), sizes[item["image_id"]])
            except (ValueError, TypeError, KeyError):
                if masks or not any(item.get("bbox", ())):  # the box is to be made from it
                    raise
                del item["segmentation"]
    return dict(content)


def known_id(key: str, value: Any, known: Container[int], *, where: str = "the file") -> int:
    """The id of `known` that `value` is, or is as a text or as a float. Errors: ValueError if there is none."""
    if is_int(value) or isinstance(value, np.integer):
        if value in known:
            return int(value)
        raise ValueError(f"{key} {value} is not in {where}")
    if isinstance(value, str) and re.fullmatch(r"0|-?[1-9]\d{0,39}", value) and int(value) in known:
        return int(value)
    if isinstance(value, float) and value.is_integer() and int(value) in known and abs(value) < 2**53:
        return int(value)  # from 2^53 on a float stands for several whole numbers
    raise ValueError(f"{key}: expected a whole number, got {value!r}")


def read_images(path: Path) -> list[dict[str, Any]]:
    """The images alone of a COCO file, which may hold nothing else. Errors: as of `read_coco`."""
    content = _read_json(path)
    _leave_out_nulls(content)
    _check_list(path, content, "images")
    _check_images(path, content["images"])
    return list(content["images"])


def _read_json(path: Path) -> Any:
    """Parse a JSON file. Errors: ValueError that names the file, and line and column of a syntax error."""
    if path.is_dir():
        raise ValueError(f"annotation_file: expected a file, got a folder: {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))  # with or without a byte-order mark
    except FileNotFoundError as error:
        raise ValueError(f"annotation_file: no such file: {path}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or a number of thousands of digits
        raise ValueError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _leave_out_nulls(content: Any) -> None:
    """Remove, in place, the fields that are null: writers of JSON put null where they have nothing."""
    for name in _FIELDS if isinstance(content, dict) else ():
        for item in content[name] if isinstance(content.get(name), list) else ():
            if not isinstance(item, dict):
                continue
            if None in item.values():
                for key in [key for key, value in item.items() if value is None]:
                    del item[key]
            if name == "images" and "file_name" not in item and isinstance(item.get("coco_url"), str):
                item["file_name"] = item["coco_url"].rpartition("/")[2]  # LVIS has no file names


def fill_annotations(content: dict[str, Any]) -> None:
    """Add, in place, what COCO's evaluator needs and files leave out: ``iscrowd``, ``area``, an id other than 0."""
    from pycocotools import mask as coco_mask

    sizes = {record["id"]: (record["height"], record["width"]) for record in content["images"]}
    top = max((item["id"] for item in content["annotations"]), default=0)
    for item in content["annotations"]:
        item.setdefault("iscrowd", 0)
        if "area" not in item:
            run = compressed(item.get("segmentation"), sizes[item["image_id"]])
            item["area"] = float(coco_mask.area(run)) if run else float(item["bbox"][2] * item["bbox"][3])
        if item["id"] == 0:
            item["id"] = max(top, 0) + 1


@contextlib.contextmanager
def naming(path: Path, annotation: dict[str, Any]) -> Iterator[None]:
    """Errors in here are about this annotation of the file: a ValueError says so."""
    try:
        yield
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: annotation id {annotation['id']}: {error}") from error


def _check_list(path: Path, content: Any, name: str) -> set[int]:
    """The ids of a list of the file, whose items have the fields they need."""
    if not isinstance(content, dict) or not isinstance(content.get(name), list):
        raise ValueError(f"{path}: expected a COCO file, an object with a list {name!r}")
    ids: set[int] = set()
    for i, item in enumerate(content[name]):
        for key in _FIELDS[name]:
            if not isinstance(item, dict) or key not in item:
                raise ValueError(f"{path}: {name}[{i}]: expected a field {key!r}, got none")
        if not is_int(item["id"]):
            raise ValueError(f"{path}: {name}[{i}]: id: expected a whole number, got {item['id']!r}")
        if item["id"] in ids:
            raise ValueError(f"{path}: {name}[{i}]: id {item['id']} occurs twice")
        ids.add(item["id"])
    return ids


def _check_images(path: Path, images: Sequence[dict[str, Any]]) -> None:
    for i, item in enumerate(images):
        width, height = item["width"], item["height"]
        if not (is_int(width) and is_int(height) and width > 0 and height > 0):
            raise ValueError(f"{path}: images[{i}]: expected a size in whole pixels, got {width!r} x {height!r}")
        if not isinstance(item["file_name"], str):
            raise ValueError(f"{path}: images[{i}]: file_name: expected a text, got {item['file_name']!r}")


def _check_annotation(item: dict[str, Any]) -> None:
    """All fields but the mask."""
    box = item.get("bbox", [])
    if not isinstance(box, list) or len(box) not in (0, 4):
        raise ValueError(f"bbox: expected four numbers [x, y, width, height], got {box!r}")
    check_numbers("bbox", box)
    if not box and item.get("segmentation") is None:
        raise ValueError("expected a bbox or a segmentation, got neither")
    if item.get("iscrowd", 0) not in (0, 1):
        raise ValueError(f"iscrowd: expected 0 or 1, got {item['iscrowd']!r}")
    area = item.get("area", 0)
    if isinstance(area, list) and len(area) == 1:
        area = item["area"] = area[0]
    check_numbers("area", [area], limit=math.inf)
