"""The keypoint fields of a COCO file: the names and lines of its categories, the points of its annotations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tmask.data.annotations import naming
from tmask.data.segmentation import check_numbers, is_int


class KeypointFields(NamedTuple):
    """The keypoints of a file. No names: the file has none, or `fault` says what is wrong with them."""

    names: tuple[str, ...] = ()
    edges: tuple[tuple[int, int], ...] = ()  # pairs of numbers from 0
    fault: str | None = None


def read_keypoints(content: dict[str, Any], path: Path) -> KeypointFields:
    """Check the keypoint fields of a whole file.

    A fault is returned, not raised: data for masks may hold any keypoint fields.
    """
    try:
        named = _keypoints_of(content["categories"], path)
        if named is None:
            return KeypointFields()
        for item in content["annotations"]:
            with naming(path, item):
                _check_keypoints(item.get("keypoints"), len(named[0]))
    except ValueError as error:
        return KeypointFields(fault=str(error))
    return KeypointFields(*named)


def _keypoints_of(
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
            pair = isinstance(line, list) and len(line) == 2 and all(map(is_int, line)) and line[0] != line[1]
            if not pair or not 1 <= min(line) <= max(line) <= len(names):
                raise ValueError(f"{where}: skeleton: expected pairs of numbers in 1..{len(names)}, got {line!r}")
        own = tuple(names), tuple((first - 1, second - 1) for first, second in lines)
        if names and found is not None and own[0] != found[0]:
            raise ValueError(f"{where}: keypoints: expected those of the other categories, {found[0]}, got {own[0]}")
        found = own if names and (found is None or not found[1]) else found  # the first that has lines
    return found


def _check_keypoints(keypoints: Any, count: int) -> None:
    """Raise ValueError unless `keypoints` is None, empty, or `count` triples of x, y and visibility."""
    if keypoints is None or keypoints == []:
        return
    if not isinstance(keypoints, list) or len(keypoints) != 3 * count:
        got = f"{len(keypoints)}" if isinstance(keypoints, list) else repr(keypoints)
        raise ValueError(f"keypoints: expected {3 * count} numbers, x, y and visibility of each of {count}, got {got}")
    check_numbers("keypoints", keypoints)
    wrong = [value for value in keypoints[2::3] if value not in (0, 1, 2)]
    if wrong:
        raise ValueError(f"keypoints: expected a visibility of 0, 1 or 2, got {wrong[0]!r}")
