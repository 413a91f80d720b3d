"""The categories of two files that belong together, and categories that stand for no class."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tmask.checks import nearest

Categories = Sequence[dict[str, Any]]


def root_category(categories: Categories, used: Collection[int]) -> dict[str, Any] | None:
    """The category that is no class but the heading of all others; None if there is none.

    Roboflow writes one, of id 0: no annotation has it, and all others name it as their ``supercategory``. `used` are
    the ids that annotations have.
    """
    for item in categories:
        others = [other for other in categories if other is not item]
        if item["id"] not in used and others and all(o.get("supercategory") == item["name"] for o in others):
            return item
    return None


def match_categories(train: Categories, own: Categories, used: Collection[int], path: Path) -> list[dict[str, Any]]:
    """The categories of the file `path`, which has `own`, in the order of the labels of `train`.

    Names decide, where none occurs twice: ids and order may differ. A class that the file lacks gets an id of its own;
    one that `train` lacks is left out if no annotation has it (`used`). Where a name occurs twice, ids and names must
    be those of `train`. Errors: ValueError for categories that do not match.
    """
    if any(len({_key(item) for item in part}) < len(part) for part in (train, own)):
        for label, item in enumerate(train, start=1):
            _check_same(label, item, own[label - 1] if label <= len(own) else None)
        if len(own) > len(train):
            _check_same(len(train) + 1, None, own[len(train)])
        return list(own)
    by_name = {_key(item): item for item in own}
    names = {_key(item) for item in train}
    for item in own:
        if item["id"] in used and _key(item) not in names:
            expected = nearest(str(item["name"]), (str(other["name"]) for other in train))
            raise ValueError(
                f"{path}: categories: expected those of training, {expected}, got {item['name']!r} (id {item['id']})"
            )
    taken = {int(item["id"]) for item in own}
    matched = []
    for item in train:
        if _key(item) not in by_name:
            new = int(item["id"]) if item["id"] not in taken else max(taken) + 1
            taken.add(new)
        matched.append(by_name.get(_key(item)) or {"id": new, "name": item["name"]})
    return matched


def _key(item: dict[str, Any]) -> str:
    return unicodedata.normalize("NFC", str(item["name"])).strip()


def _check_same(label: int, *pair: dict[str, Any] | None) -> None:
    old, new = (None if item is None else (int(item["id"]), str(item["name"])) for item in pair)
    if old != new:
        raise ValueError(f"categories: expected those of training, where label {label} is {old}, got {new}")
