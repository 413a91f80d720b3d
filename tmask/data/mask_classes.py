"""Which classes of a data set have masks to learn from, where the others have boxes alone.

Source of the splits: Hu et al. 2018, "Learning to Segment Every Thing", section 4: the 20 of COCO's 80 classes that
PASCAL VOC has too, the other 60, and random ones.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from tmask.checks import nearest

# By COCO's names: their places in a list of categories are others in a part of COCO.
# fmt: off
VOC = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "boat", "bird", "cat",
    "dog", "horse", "sheep", "cow", "bottle", "chair", "couch", "potted plant", "dining table", "tv",
)
# fmt: on


def mask_category_ids(chosen: str, categories: Sequence[dict[str, Any]]) -> frozenset[int]:
    """The ids of the `categories` ({"id", "name"}) with masks.

    `chosen` is ``voc`` or ``non_voc``, for COCO's classes; ``random:COUNT:SEED``, as many drawn by that seed; or names
    and ids of categories with commas between; a number is an id only where it is no category's name. Errors: ValueError
    for an unknown category, an impossible count, and categories that are none of VOC's or all.
    """
    ids = [int(category["id"]) for category in categories]
    if chosen in ("voc", "non_voc"):
        voc = frozenset(int(category["id"]) for category in categories if category["name"] in VOC)
        if not 0 < len(voc) < len(ids):
            got = f"{len(voc)} of {len(ids)} that are VOC's"
            expected = f"categories of COCO for {chosen!r}, some but not all of them VOC's"
            raise ValueError(f"mask_classes: expected {expected}, got {got}")
        return voc if chosen == "voc" else frozenset(ids) - voc
    if is_split(chosen):
        count, seed = map(int, chosen.split(":")[1:])
        if not 1 <= count <= len(ids):
            raise ValueError(f"mask_classes: expected a count in 1..{len(ids)}, got {chosen!r}")
        return frozenset(random.Random(seed).sample(sorted(ids), count))
    return frozenset(number for name in chosen.split(",") for number in _ids_of(name.strip(), categories))


def is_split(chosen: str) -> bool:
    """Whether `chosen` is the name of a split, and no list of categories."""
    return re.fullmatch(r"voc|non_voc|random:\d+:\d+", chosen) is not None


def _ids_of(name: str, categories: Sequence[dict[str, Any]]) -> list[int]:
    """The categories of a name (two may share it), or else the one of an id."""
    for key in ("name", "id"):
        found = [int(category["id"]) for category in categories if str(category[key]) == name]
        if found:
            return found
    known = [str(category["name"]) for category in categories]
    raise ValueError(f"mask_classes: unknown category {name!r}: expected {nearest(name, known)}")
