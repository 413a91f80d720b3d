"""Checks COCO's forms of a mask, polygons and run lengths, and converts them to one form. Checks numbers too."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

# Larger coordinates are no pixels, and pycocotools would walk a polygon's outline pixel by pixel.
MAX_COORDINATE = 1e6


def is_outlined(segmentation: Any) -> bool:
    """Return True if there are run lengths, or at least one polygon of three points."""
    if isinstance(segmentation, list):
        return any(len(points) >= 6 for points in segmentation)
    return segmentation is not None


def covers_pixels(segmentation: Any) -> bool:
    """Return True if there is a mask. Run lengths must cover a pixel; polygons are not drawn, as drawing is slow."""
    if not isinstance(segmentation, dict):
        return is_outlined(segmentation)
    if isinstance(segmentation["counts"], list):
        return sum(segmentation["counts"][1::2]) > 0
    from pycocotools import mask as coco_mask

    return bool(coco_mask.area(segmentation) > 0)


def flat_polygons(segmentation: list[Any]) -> list[Any]:
    """Return polygons in COCO's form, [[x, y, x, y, ...], ...].

    Args:
        segmentation: Polygons in COCO's form, as lists of [x, y] pairs, or nested deeper. Three or more pairs are the
            points of one polygon, since a polygon of one point has no area. Anything but lists of numbers is returned
            unchanged.
    """
    if not any(isinstance(part, list) and (len(part) == 2 or _is_nested(part)) for part in segmentation):
        return segmentation
    parts = []
    for part in segmentation:
        while isinstance(part, list) and len(part) == 1 and isinstance(part[0], list):  # as OpenCV's contours
            part = part[0]
        parts.append(part)
    if len(parts) >= 3 and all(isinstance(part, list) and len(part) == 2 and not _is_nested(part) for part in parts):
        return [[value for point in parts for value in point]]
    return [flat for part in parts for flat in (flat_polygons(part) if _is_nested(part) else [part])]


def _is_nested(part: Any) -> bool:
    return isinstance(part, list) and bool(part) and isinstance(part[0], list)


def run_length(segmentation: Any, size: tuple[int, int]) -> dict[str, Any] | None:
    """Return COCO's compressed run lengths of a mask; None for no mask.

    Args:
        segmentation: Polygons, in a form that `flat_polygons` accepts, or run lengths, as numbers or compressed.
            Polygons of fewer than three points are ignored.
        size: Height and width of the image.

    Raises:
        ValueError: The mask has another form or size, or its run lengths are damaged.
    """
    if isinstance(segmentation, list):
        segmentation = flat_polygons(segmentation)
    check_segmentation(segmentation, size)
    return compressed(segmentation, size)


def compressed(segmentation: Any, size: tuple[int, int]) -> dict[str, Any] | None:
    """Return `run_length` of a mask that `read_coco` has checked: training reads every mask in every epoch."""
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
            check_numbers("segmentation", points)
        return
    if not isinstance(segmentation, dict) or "counts" not in segmentation or "size" not in segmentation:
        raise ValueError(f"segmentation: expected polygons or run lengths, got {type(segmentation).__name__}")
    given, counts = segmentation["size"], segmentation["counts"]
    if not isinstance(given, list | tuple) or tuple(given) != size:
        got = tuple(given) if isinstance(given, list) else given
        raise ValueError(f"segmentation: expected run lengths of size {size}, got {got!r}")
    if isinstance(counts, list):
        pixels = sum(counts) if all(is_int(count) and count >= 0 for count in counts) else None
    elif isinstance(counts, str | bytes):
        runs = run_counts(counts.encode() if isinstance(counts, str) else counts)
        pixels = None if runs is None else int(runs.sum())
    else:
        raise ValueError(f"segmentation: expected run lengths as a list or a text, got {counts!r}")
    if pixels != size[0] * size[1]:
        got = "damaged ones" if pixels is None else str(pixels)
        raise ValueError(f"segmentation: expected runs of {size[0] * size[1]} pixels in all, got {got}")


def run_counts(counts: bytes) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """Return the pixels of each run in compressed run lengths; None if the run lengths are damaged.

    If the runs end early, pycocotools leaves the rest of the mask uninitialised. The format (`rleFrString` of
    maskApi.c): each character is a digit of 6 bits, from '0' on. The low 5 bits of the digits make a number, the least
    significant digit first. Bit 5 of a digit says that another digit follows. Bit 4 of the last digit is the sign. From
    the fourth run on, the number is the difference to the run before the previous one.
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
    return runs if runs.min() >= 0 else None


def check_numbers(name: str, values: Sequence[Any], *, limit: float = MAX_COORDINATE) -> None:
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


def is_int(value: Any) -> bool:
    """Return True for a whole number. True and False are no numbers."""
    return isinstance(value, int) and not isinstance(value, bool)
