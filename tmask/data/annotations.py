"""COCO annotation files: reading them, checking every entry, and their forms of a mask.

All that is wrong with a file is found here, before anything uses it, and named: file, entry, expected, got.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Larger coordinates are no pixels, and pycocotools would walk a polygon's outline pixel by pixel.
MAX_COORDINATE = 1e6

_FIELDS = {
    "images": ("id", "file_name", "width", "height"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
}


def read_coco(path: Path) -> dict[str, Any]:
    """The content of a COCO instance file. Errors: ValueError that names the file and the first entry that is wrong."""
    content = _read_json(path)
    ids = {name: _check_list(path, content, name) for name in _FIELDS}
    for name in ("images", "categories"):
        if not content[name]:
            raise ValueError(f"{path}: {name}: expected at least one, got none")
    _check_images(path, content["images"])
    sizes = {item["id"]: (item["height"], item["width"]) for item in content["images"]}
    named = keypoints_of(content["categories"], path)
    for item in content["annotations"]:
        with naming(path, item):
            for key, known in (("image_id", ids["images"]), ("category_id", ids["categories"])):
                if not _is_int(item[key]) or item[key] not in known:
                    raise ValueError(f"{key} {item[key]!r} is not in the file")
            _check_annotation(item, sizes[item["image_id"]])
            if named is not None:
                check_keypoints(item.get("keypoints"), len(named[0]))
    return dict(content)


def read_images(path: Path) -> list[dict[str, Any]]:
    """The images alone of a COCO file, which may hold nothing else. Errors: as of `read_coco`."""
    content = _read_json(path)
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


def outlines_nothing(segmentation: Any) -> bool:
    """Whether a mask is given, but without a single polygon of three points."""
    return isinstance(segmentation, list) and not any(len(points) >= 6 for points in segmentation)


def is_outlined(segmentation: Any) -> bool:
    """Whether there is a mask in it."""
    return segmentation is not None and not outlines_nothing(segmentation)


def covers_pixels(segmentation: Any) -> bool:
    """Whether there is a mask in it and, of run lengths, one that has a pixel. Polygons are not drawn: that is slow."""
    if not isinstance(segmentation, dict):
        return is_outlined(segmentation)
    if isinstance(segmentation["counts"], list):
        return sum(segmentation["counts"][1::2]) > 0
    from pycocotools import mask as coco_mask

    return bool(coco_mask.area(segmentation) > 0)


def run_length(segmentation: Any, size: tuple[int, int]) -> dict[str, Any] | None:
    """COCO's compressed run lengths of any of its mask forms, for an image of `size` (H, W); None for no mask.

    Forms: polygons (a list of [x, y, x, y, ...]; those of fewer than three points are ignored), or run lengths, as
    numbers or compressed. Errors: ValueError for another form or size, and for damaged run lengths.
    """
    check_segmentation(segmentation, size)
    return compressed(segmentation, size)


def compressed(segmentation: Any, size: tuple[int, int]) -> dict[str, Any] | None:
    """`run_length` of what `read_coco` has checked already: training asks for every mask in every epoch."""
    from pycocotools import mask as coco_mask

    if not is_outlined(segmentation):
        return None
    if isinstance(segmentation, list):
        # pycocotools would take a list of four numbers for a box.
        return coco_mask.merge(coco_mask.frPyObjects([points for points in segmentation if len(points) >= 6], *size))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, *size)
    return segmentation


def check_segmentation(segmentation: Any, size: tuple[int, int]) -> None:
    """Raise ValueError unless `segmentation` is None or one of COCO's forms, whole and for an image of `size`."""
    if segmentation is None:
        return
    if isinstance(segmentation, list):
        for points in segmentation:
            if not isinstance(points, list):
                raise ValueError(f"segmentation: expected polygons [[x, y, ...], ...], got a list of {points!r}")
            if len(points) % 2:
                raise ValueError(
                    f"segmentation: expected polygons of x, y pairs, got an odd number of values, {len(points)}"
                )
            _check_numbers("segmentation", points)
        return
    if not isinstance(segmentation, dict) or "counts" not in segmentation or "size" not in segmentation:
        raise ValueError(f"segmentation: expected polygons or run lengths, got {type(segmentation).__name__}")
    given, counts = segmentation["size"], segmentation["counts"]
    if not isinstance(given, list | tuple) or tuple(given) != size:
        got = tuple(given) if isinstance(given, list) else given
        raise ValueError(f"segmentation: expected run lengths of size {size}, got {got!r}")
    if isinstance(counts, list):
        pixels = sum(counts) if all(_is_int(count) and count >= 0 for count in counts) else None
    elif isinstance(counts, str | bytes):
        pixels = _pixels(counts.encode() if isinstance(counts, str) else counts)
    else:
        raise ValueError(f"segmentation: expected run lengths as a list or a text, got {counts!r}")
    if pixels != size[0] * size[1]:
        got = "damaged ones" if pixels is None else str(pixels)
        raise ValueError(f"segmentation: expected runs of {size[0] * size[1]} pixels in all, got {got}")


def keypoints_of(
    categories: Sequence[dict[str, Any]], path: Path
) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...]] | None:
    """Names of the keypoints, and the lines between them as pairs of numbers from 0; None if no category has any.

    Categories may have none, but not different ones. Errors: ValueError for fields of another form, and for those.
    """
    found = None
    for i, item in enumerate(categories):
        names, lines = item.get("keypoints") or [], item.get("skeleton") or []
        where = f"{path}: categories[{i}]"
        texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not texts or len(set(names)) < len(names):
            raise ValueError(f"{where}: keypoints: expected a list of names, none of them twice, got {names!r}")
        for line in lines if isinstance(lines, list) else [lines]:
            pair = isinstance(line, list) and len(line) == 2 and all(map(_is_int, line)) and line[0] != line[1]
            if not pair or not 1 <= min(line) <= max(line) <= len(names):
                raise ValueError(f"{where}: skeleton: expected pairs of numbers in 1..{len(names)}, got {line!r}")
        own = tuple(names), tuple((first - 1, second - 1) for first, second in lines)
        if names and found is not None and own[0] != found[0]:
            raise ValueError(f"{where}: keypoints: expected those of the other categories, {found[0]}, got {own[0]}")
        found = own if names and found is None else found
    return found


def check_keypoints(keypoints: Any, count: int) -> None:
    """Raise ValueError unless `keypoints` is None, empty, or `count` triples of x, y and visibility."""
    if keypoints is None or keypoints == []:
        return
    if not isinstance(keypoints, list) or len(keypoints) != 3 * count:
        got = f"{len(keypoints)}" if isinstance(keypoints, list) else repr(keypoints)
        raise ValueError(f"keypoints: expected {3 * count} numbers, x, y and visibility of each of {count}, got {got}")
    _check_numbers("keypoints", keypoints)
    wrong = [value for value in keypoints[2::3] if value not in (0, 1, 2)]
    if wrong:
        raise ValueError(f"keypoints: expected a visibility of 0, 1 or 2, got {wrong[0]!r}")


def _pixels(counts: bytes) -> int | None:
    """How many pixels compressed run lengths cover in all; None if they are damaged.

    pycocotools fills the rest of a mask whose runs end early with whatever stood in memory. Its format (`rleFrString`
    of maskApi.c): a number is a row of characters from '0' on, low 5 bits first, bit 5 of each says that more follow,
    bit 4 of the last is the sign; from the fourth on a run is stored as its difference to the last but one.
    """
    digits = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    if not digits.size or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        return None
    last = np.flatnonzero(digits & 32 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    place = np.arange(digits.size) - np.repeat(first, last - first + 1)
    if place.max() > 6:  # 35 bits: more than any run
        return None
    runs = np.add.reduceat((digits & 31) << (5 * place), first)
    runs -= (digits[last] >> 4 & 1) << (5 * (place[last] + 1))
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return int(runs.sum()) if runs.min() >= 0 else None


def _check_list(path: Path, content: Any, name: str) -> set[int]:
    """The ids of a list of the file, whose items have the fields they need."""
    if not isinstance(content, dict) or not isinstance(content.get(name), list):
        raise ValueError(f"{path}: expected a COCO file, an object with a list {name!r}")
    ids: set[int] = set()
    for i, item in enumerate(content[name]):
        for key in _FIELDS[name]:
            if not isinstance(item, dict) or key not in item:
                raise ValueError(f"{path}: {name}[{i}]: expected a field {key!r}, got none")
        if not _is_int(item["id"]):
            raise ValueError(f"{path}: {name}[{i}]: id: expected a whole number, got {item['id']!r}")
        if item["id"] in ids:
            raise ValueError(f"{path}: {name}[{i}]: id {item['id']} occurs twice")
        ids.add(item["id"])
    return ids


def _check_images(path: Path, images: Sequence[dict[str, Any]]) -> None:
    for i, item in enumerate(images):
        width, height = item["width"], item["height"]
        if not (_is_int(width) and _is_int(height) and width > 0 and height > 0):
            raise ValueError(f"{path}: images[{i}]: expected a size in whole pixels, got {width!r} x {height!r}")
        if not isinstance(item["file_name"], str):
            raise ValueError(f"{path}: images[{i}]: file_name: expected a text, got {item['file_name']!r}")


def _check_annotation(item: dict[str, Any], size: tuple[int, int]) -> None:
    box = item["bbox"]
    if not isinstance(box, list) or len(box) != 4:
        raise ValueError(f"bbox: expected four numbers [x, y, width, height], got {box!r}")
    _check_numbers("bbox", box)
    if item.get("iscrowd", 0) not in (0, 1):
        raise ValueError(f"iscrowd: expected 0 or 1, got {item['iscrowd']!r}")
    if "area" in item:
        _check_numbers("area", [item["area"]], limit=math.inf)
    check_segmentation(item.get("segmentation"), size)


def _check_numbers(name: str, values: Sequence[Any], *, limit: float = MAX_COORDINATE) -> None:
    """Raise ValueError for the first of `values` that is no finite number or larger than `limit`."""
    try:  # sum, min and max run at C's speed: COCO has forty million coordinates
        if not values or (math.isfinite(sum(values)) and -limit <= min(values) and max(values) <= limit):
            return
    except (TypeError, OverflowError):
        pass
    for value in values:
        # Whole numbers that no float holds count as infinite; the comparison also refuses NaN.
        if not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            raise ValueError(f"{name}: expected finite numbers, got {value!r}")
        if abs(value) > limit:
            raise ValueError(f"{name}: expected pixels within {limit:g}, got {value!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
