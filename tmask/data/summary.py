"""What an annotation file holds, and where it contradicts itself. No mask is drawn for it.

Letters: K annotations of the file; boxes are xyxy in pixels, float64 [K, 4], with NaN where there is none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tmask.data.segmentation import compressed

Array = np.ndarray[Any, np.dtype[Any]]

# Of a box and the bounding box of its mask: sound data have 0.95 or more.
_LEAST_IOU = 0.5
# Pixels. A box from the centre of the first pixel to that of the last is one pixel smaller than its mask. Of a small
# object that is more than half.
_SLACK = 1.0
# COCO has 1 crowd in 80 annotations. Annotation tools that mark every brush mask as a crowd have many more.
_MOST_CROWDS = 1 / 20
# Of boxes without a mask: so many reach beyond their image, and at least three, if they hold x1, y1, x2, y2. For every
# box right of the middle x1 + x2 passes the image's width.
_BEYOND, _FEWEST_BEYOND = 1 / 4, 3
_MOST_NAMES = 100  # of classes, in the summary

_FORMS: dict[str, Callable[[Array], Array]] = {
    "x1, y1, x2, y2": lambda b: b,
    "y1, x1, y2, x2": lambda b: b[:, [1, 0, 3, 2]],
    "x, y, width, height": lambda b: np.concatenate([b[:, :2], b[:, :2] + b[:, 2:]], axis=1),
    "y, x, height, width": lambda b: np.concatenate([b[:, 1::-1], b[:, 1::-1] + b[:, :1:-1]], axis=1),
    "centre x, centre y, width, height": lambda b: np.concatenate(
        [b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2], 1
    ),
}


class Summary(NamedTuple):
    """What to print when a data set is opened, and the contradictions to warn of."""

    text: str
    warnings: list[str]


def summarize(
    path: Path, content: dict[str, Any], boxes_only: Collection[int] = (), *, masks_used: bool = True
) -> Summary:
    """Survey what `read_coco` read from `path`.

    In place, an annotation without a box gets the box of its mask, and an empty mask that would be used becomes None:
    evaluation would count it as an object that no mask can match.

    `boxes_only` are the ids of categories whose masks are left out on purpose. With `masks_used` False those of all
    are: masks that are empty or missing are no fault.
    Errors: ValueError if masks are given and all of them are empty.
    """
    items = content["annotations"]
    sides = {record["id"]: (record["width"], record["height"]) for record in content["images"]}
    size = np.array([sides[item["image_id"]] for item in items], dtype=np.float64).reshape(-1, 2)
    size = np.tile(size, 2)  # [K, 4], width height width height
    masks = _mask_boxes(items, sides)
    inside = np.clip(masks, 0, size)
    has_mask: Array = np.all(inside[:, 2:] > inside[:, :2], axis=1)
    masks[~has_mask] = np.nan
    crowd = np.array([bool(item.get("iscrowd")) for item in items], dtype=bool)
    ids = [item["id"] for item in items]
    told: list[str] = []

    def tell(rows: Array, text: str, of: str = "annotations", total: int = len(items)) -> None:
        if rows.any():
            told.append(f"{path}: {text.format(f'{rows.sum()} of {total} {of}')}; first {_first(ids, rows)}")

    tell(_fill_boxes(items, masks), "the box of {} is missing and made from the mask")
    given = np.array([item["bbox"] for item in items], dtype=np.float64).reshape(-1, 4)
    boxes = _FORMS["x, y, width, height"](given)  # not clipped: that hides what is too large
    iou = _iou(boxes, masks)
    cut = np.clip(boxes, 0, size)
    wrong = (iou < _LEAST_IOU) & (np.abs(boxes - masks).max(1) > _SLACK)
    wrong &= (cut[:, 2:] > cut[:, :2]).all(1)  # CocoDataset leaves out the others, and says so
    hint = _hint(items, given[wrong], masks[wrong], size[wrong], np.flatnonzero(wrong))
    tell(wrong, "bbox and mask of {} contradict each other (IoU of the box and the mask's box below 0.5" + hint + ")")
    unit = ((given >= 0) & (given <= 1)).all(1) & (given[:, 2:] > 0).all(1) & (given[:, 2:] < 1).any(1)
    unit &= (size[:, :2] > 2).all(1) & ~wrong
    tell(unit, "bbox of {} lies in 0..1: expected pixels, got parts of the image's size")
    alone = np.flatnonzero(~has_mask)
    far, text = _beyond(given[alone], size[alone])
    tell(np.isin(np.arange(len(items)), alone[far]), text, "boxes without a mask", len(alone))
    if crowd.sum() > max(1, _MOST_CROWDS * len(items)):
        tell(
            crowd,
            "{} are crowds (iscrowd 1), which are not learnt; if they are single objects, set --data.crowds "
            "(eval: --crowds) instances",
        )
    if masks_used:
        told += _without_masks(path, content, has_mask, crowd, boxes_only)
        for row in np.flatnonzero(~has_mask) if has_mask.any() else ():
            if "segmentation" in items[row]:  # an empty mask, which evaluation would count as an object to find
                items[row]["segmentation"] = None
    return Summary(_text(path, content, has_mask, crowd, iou), told)


def _first(ids: Sequence[int], rows: Array) -> str:
    return f"annotation id {ids[int(rows.argmax())]}"


def _mask_boxes(items: Sequence[dict[str, Any]], sides: dict[int, tuple[int, int]]) -> Array:
    """The bounding box of each mask: the bounds of its polygons, or of the pixels of its run lengths."""
    from pycocotools import mask as coco_mask

    boxes = np.full((len(items), 4), np.nan)
    runs, rows = [], []
    for row, item in enumerate(items):
        segmentation = item.get("segmentation")
        if isinstance(segmentation, dict):
            runs.append(compressed(segmentation, sides[item["image_id"]][::-1]))
            rows.append(row)
        elif segmentation:
            bounds = [(min(p[::2]), min(p[1::2]), max(p[::2]), max(p[1::2])) for p in segmentation if len(p) >= 6]
            if len(bounds) == 1:
                boxes[row] = bounds[0]
            elif bounds:
                lows, highs = list(zip(*bounds, strict=True))[:2], list(zip(*bounds, strict=True))[2:]
                boxes[row] = *map(min, lows), *map(max, highs)
    if runs:
        boxes[rows] = _FORMS["x, y, width, height"](coco_mask.toBbox(runs))
    return boxes


def _fill_boxes(items: Sequence[dict[str, Any]], masks: Array) -> Array:
    """Replace missing boxes and boxes of zeros by the box of the mask. Return which were replaced, bool [K]."""
    filled = np.zeros(len(items), dtype=bool)
    for row, item in enumerate(items):
        if any(item.get("bbox", ())):
            continue
        x1, y1, x2, y2 = masks[row].tolist()
        filled[row] = x1 == x1  # no NaN: there is a mask
        item["bbox"] = [x1, y1, x2 - x1, y2 - y1] if filled[row] else [0, 0, 0, 0]
    return filled


def _iou(a: Array, b: Array) -> Array:
    """Return the IoU of each pair of boxes; NaN if one of them has no area."""
    inner = np.maximum(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0).prod(1)
    areas = [np.maximum(box[:, 2:] - box[:, :2], 0).prod(1) for box in (a, b)]
    known = (areas[0] > 0) & (areas[1] > 0)
    return np.divide(inner, areas[0] + areas[1] - inner, out=np.full(len(a), np.nan), where=known)


def _hint(items: Sequence[dict[str, Any]], given: Array, masks: Array, size: Array, rows: Array) -> str:
    """How `given` boxes, or masks, that contradict each other would agree, if more than half of them do in one way.

    Of fewer than three that may be chance.
    """
    if len(given) < 3:
        return ""
    agreeing: dict[str, int] = {}

    def try_reading(text: str, box: Array, mask: Array) -> None:
        agreeing[text] = int((_iou(box, mask) >= _LEAST_IOU).sum())

    boxes = _FORMS["x, y, width, height"](given)
    # The likeliest first: in a square image run lengths by rows also agree with a box of y, x.
    turned = np.full_like(masks, np.nan)
    for row, number in enumerate(rows):
        if isinstance(items[number]["segmentation"], dict):
            turned[row] = _box_by_rows(items[number]["segmentation"])
    try_reading("as if run lengths went along the rows, and not down the columns", boxes, turned)
    for scale, words in ((np.ones(4), ""), (size, " in parts of the image's size")):
        for name, form in _FORMS.items():
            try_reading(f"as if bbox held {name}{words}", form(given * scale), masks)
    try_reading("as if polygons held y, x", boxes, masks[:, [1, 0, 3, 2]])
    try_reading("as if polygons held parts of the image's size", boxes, masks * size)
    best = max(agreeing, key=lambda text: agreeing[text])
    return f"; {best}" if 2 * agreeing[best] > len(given) else ""


def _box_by_rows(segmentation: dict[str, Any]) -> Array:
    """Return the box of a mask whose run lengths go along the rows."""
    from pycocotools import mask as coco_mask

    height, width = segmentation["size"]
    run = compressed({"size": [width, height], "counts": segmentation["counts"]}, (width, height))
    return _FORMS["y, x, height, width"](coco_mask.toBbox([run]))[0]


def _beyond(given: Array, size: Array) -> tuple[Array, str]:
    """Which boxes alone are wrong, and how: those beyond their images, if many, or all, if all fit otherwise."""

    def fit(form: str) -> Array:
        box = _FORMS[form](given)
        inside: Array = (box[:, :2] >= -_SLACK) & (box[:, 2:] <= size[:, 2:] + _SLACK) & (box[:, 2:] > box[:, :2])
        return np.all(inside, axis=1)

    beyond = ~fit("x, y, width, height") & (given[:, 2:] > 0).all(1)
    if beyond.sum() < max(_FEWEST_BEYOND, _BEYOND * len(given)):
        return np.zeros_like(beyond), ""
    for form in ("x1, y1, x2, y2", "centre x, centre y, width, height"):
        if fit(form).all():
            return np.ones_like(beyond), f"{{}} fit their images only as {form}: expected x, y, width, height"
    return beyond, "{} reach beyond their images: expected x, y, width, height in pixels of the image"


def _without_masks(
    path: Path, content: dict[str, Any], has_mask: Array, crowd: Array, boxes_only: Collection[int]
) -> list[str]:
    """Warnings of masks that are empty or not there. Errors: ValueError if masks are given and all are empty."""
    items = content["annotations"]
    if not items:
        return []
    ids = [item["id"] for item in items]
    outlined = np.array([_is_given(item.get("segmentation")) for item in items])
    if not has_mask.any():
        if outlined.any():
            raise ValueError(
                f"{path}: segmentation: expected masks that cover pixels, got {outlined.sum()} that are all empty, "
                f"first {_first(ids, outlined)}"
            )
        return [
            f"{path}: none of {len(items)} annotations has a mask: boxes alone are learnt from and evaluated; a model "
            "trained with --model.masks false predicts no masks"
        ]
    told = []
    empty = np.array(["segmentation" in item for item in items]) & ~has_mask
    if empty.any():
        told.append(
            f"{path}: the mask of {empty.sum()} of {len(items)} annotations is empty and left out, their boxes count; "
            f"first {_first(ids, empty)}"
        )
    instances, masked = (
        {item["category_id"] for item, chosen in zip(items, rows, strict=True) if chosen}
        for rows in (~crowd, ~crowd & has_mask)
    )
    bare = [item for item in content["categories"] if item["id"] in instances - masked - set(boxes_only)]
    if bare:
        names = ", ".join(f"{item['name']} (id {item['id']})" for item in bare)
        first = next(item["id"] for item in items if item["category_id"] == bare[0]["id"])
        told.append(f"{path}: no instance of {names} has a mask; first annotation id {first}")
    return told


def _is_given(segmentation: Any) -> bool:
    """Return whether a segmentation holds anything. Files of boxes alone have empty lists."""
    return isinstance(segmentation, dict) or any(segmentation or ())


def _text(path: Path, content: dict[str, Any], has_mask: Array, crowd: Array, iou: Array) -> str:
    items = content["annotations"]
    bare = len(content["images"]) - len({item["image_id"] for item in items})
    lines = [
        f"{path}: {len(content['images'])} images, {bare} of them without annotations; {(~crowd).sum()} instances, "
        f"{(~crowd & ~has_mask).sum()} of them without a mask; {crowd.sum()} crowds"
    ]
    known = iou[~np.isnan(iou)]
    if known.size:
        lines.append(f"IoU of a box and its mask's box: least {known.min():.3f}, median {np.median(known):.3f}")
    counts = Counter(item["category_id"] for item, is_crowd in zip(items, crowd, strict=True) if not is_crowd)
    classes = sorted(content["categories"], key=lambda item: -counts[item["id"]])
    found = [f"{item['name']} {counts[item['id']]}" for item in classes if counts[item["id"]]]
    lines.append(f"instances a class: {_listed(found)}")
    if len(found) < len(classes):
        never = [str(item["name"]) for item in classes[len(found) :]]
        lines.append(f"{len(never)} of {len(classes)} classes have none: {_listed(never)}")
    if any("neg_category_ids" in record for record in content["images"]):
        lines.append("as LVIS: classes were looked for in some images alone, and AP counts them as wrong in all others")
    return "\n  ".join(lines)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join([*names[:_MOST_NAMES], *([f"and {more} more"] if more > 0 else [])]) or "none"
