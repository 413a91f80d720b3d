"""The evaluator's matches are pycocotools' own, in time and memory that grow with the detections."""

import contextlib
import copy
import io
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.engine.coco import H, W, as_coco, rectangle, rle
from tests.mutation import mutant
from tmask.engine import matching
from tmask.engine.evaluate import coco_metrics
from tmask.engine.matching import Evaluator, match_instances
from tmask.visualize import CROWD, FALSE


def make(annotations: list[dict[str, Any]]) -> COCO:
    images = [{"id": i, "height": H, "width": W} for i in range(1, 9)]
    categories = [{"id": i, "name": str(i)} for i in (1, 2)]
    return as_coco({"images": images, "categories": categories, "annotations": annotations})


def crowded(seed: int) -> tuple[COCO, COCO]:
    """Few places, so that IoUs, scores and areas tie; crowds, doubles, images without one or the other."""
    rng = np.random.default_rng(seed)
    parts: list[list[dict[str, Any]]] = []
    for is_result in (False, True):
        items = []
        for image in range(1, 9):
            for _ in range(rng.integers(0, 25)):
                box = [int(v) for v in (*rng.integers(0, 6, 2), *rng.integers(12, 20, 2) * rng.choice([1, 2]))]
                item = {"id": len(items) + 1, "image_id": image, "category_id": int(rng.integers(1, 3)), "bbox": box}
                item |= {"segmentation": rle(rectangle(*box)), "area": box[2] * box[3]}
                item["iscrowd"] = 0 if is_result else int(rng.random() < 0.2)
                items.append(item | ({"score": rng.integers(0, 5) / 4} if is_result else {}))
        parts.append(items)
    return make(parts[0]), make(parts[1])


def run(evaluator: type, truth: COCO, found: COCO, kind: str, limit: int, use_cats: int = 1) -> Any:
    evaluation = evaluator(copy.deepcopy(truth), copy.deepcopy(found), kind)
    evaluation.params.maxDets, evaluation.params.useCats = [limit], use_cats
    evaluation.params.areaRng = [[0, 1e10], [0, 300], [300, 700], [700, 1e10]]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        if use_cats:
            evaluation.accumulate()
    return evaluation


def same(ours: Any, theirs: Any) -> bool:
    """Whether every value of every image, class and area range is the same, and so are the figures."""
    for a, b in zip(ours.evalImgs, theirs.evalImgs, strict=True):
        if (a is None) != (b is None):
            return False
        if a is not None and not (a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)):
            return False
    return all(np.array_equal(ours.eval[name], theirs.eval[name]) for name in ("precision", "recall") if ours.eval)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("kind", "limit", "use_cats"), [("bbox", 100, 1), ("segm", 100, 1), ("bbox", 3, 1), ("segm", 40, 0)]
)
def test_every_match_is_that_of_pycocotools(kind: str, limit: int, use_cats: int, seed: int) -> None:
    truth, found = crowded(seed)
    theirs = run(COCOeval, truth, found, kind, limit, use_cats)
    assert sum(int(e["dtMatches"].astype(bool).sum()) for e in theirs.evalImgs if e) > 100
    assert same(run(Evaluator, truth, found, kind, limit, use_cats), theirs)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(-image.object, -image.iou,", "(image.object, -image.iou,"),  # the first of equals
        ("-image.iou, ignored[image.object], ", "-image.iou, "),  # an ignored object before another
        ("refused = ~crowd[at] & (", "refused = (True | crowd[at]) & ("),  # a crowd is taken up
        ("(found == 0) & outside", "outside"),
    ],
)
def test_the_comparison_can_fail(old: str, new: str, tmp_path: Path) -> None:
    broken = mutant(matching, old, new, tmp_path).Evaluator
    pairs = (crowded(seed) for seed in range(6))
    assert not all(same(run(broken, *pair, "bbox", 100), run(COCOeval, *pair, "bbox", 100)) for pair in pairs)


def grid(count: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One image with so many objects, and detections a little beside them, of which each overlaps several objects."""
    boxes = [[3.0 * (i % 50), 3.0 * (i // 50), 10.0, 10.0] for i in range(count)]
    items = [{"id": i, "image_id": 1, "category_id": 1, "bbox": box} for i, box in enumerate(boxes)]
    found = [
        {**item, "bbox": [box[0] + i % 2, *box[1:]], "score": 1 - i % 97 / 100}
        for i, (item, box) in enumerate(zip(items, boxes, strict=True))
    ]
    image = {"id": 1, "height": 400, "width": 400}
    return {"images": [image], "categories": [{"id": 1, "name": "a"}], "annotations": items}, found


def test_memory_grows_with_the_detections() -> None:
    """Of every pair of 2,000 objects and detections one float64 would be 32 MB."""
    peaks = []
    for count in (500, 2000):
        truth, found = grid(count)
        tracemalloc.start()
        coco_metrics(truth, found, max_detections=count, kinds=["bbox"])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 5 * peaks[0]
    assert peaks[1] < 16e6


def test_matching_has_no_loop_over_instances() -> None:
    """The lines that Python runs for 2,000 instances are hardly more than for 200."""
    lines = []
    for count in (200, 2000):
        truth, found = grid(count)
        ran = [0]

        def trace(frame: Any, event: str, _: Any, ran: list[int] = ran) -> Any:
            if frame.f_code.co_filename != matching.__file__ or frame.f_code.co_name not in ("evaluateImg", "_match"):
                return None  # others make arrays of pycocotools' dicts
            ran[0] += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            coco_metrics(truth, found, max_detections=count, kinds=["bbox"])
        finally:
            sys.settrace(before)
        lines.append(ran[0])
    assert 0 < lines[1] < 2 * lines[0]


def instances(*rows: tuple[int, tuple[int, int, int, int]], **extra: Any) -> dict[str, Any]:
    """Labels and boxes (x, y, w, h), with rectangles for masks."""
    boxes = torch.tensor([(x, y, x + w, y + h) for _, (x, y, w, h) in rows], dtype=torch.float32).reshape(-1, 4)
    masks = [rle(rectangle(*box)) for _, box in rows]
    return {"boxes": boxes, "labels": torch.tensor([label for label, _ in rows]), "masks": masks, **extra}


def test_detections_of_an_image_are_hits_false_or_in_a_crowd() -> None:
    """Object 0 is found twice, 1 as another class, 2 by too little, 3 is a crowd, 4 has no mask, 5 is missed."""
    truth = instances(
        (1, (0, 0, 10, 10)),
        (2, (12, 0, 8, 10)),
        (1, (0, 12, 10, 10)),
        (2, (12, 12, 12, 12)),
        (1, (0, 24, 8, 6)),
        (2, (24, 0, 4, 4)),
        iscrowd=torch.tensor([False, False, False, True, False, False]),
        has_mask=torch.tensor([True, True, True, True, False, True]),
    )
    found = instances(
        (1, (0, 0, 10, 8)),
        (1, (0, 0, 10, 10)),
        (1, (12, 0, 8, 10)),
        (1, (0, 12, 10, 4)),
        (2, (13, 13, 4, 4)),
        (2, (18, 18, 4, 4)),
        (1, (0, 24, 8, 6)),
        scores=torch.tensor([0.6, 0.9, 0.8, 0.8, 0.8, 0.8, 0.8]),
    )
    expected = [FALSE, 0, FALSE, FALSE, CROWD, CROWD, CROWD]
    assert match_instances(truth, found, (H, W)) == expected
    assert match_instances(truth, found, (H, W), iou=0.35)[3] == 2
    boxes = {name: value for name, value in found.items() if name != "masks"}
    assert match_instances(truth, boxes, (H, W)) == [*expected[:6], 4]
    nothing = instances(scores=torch.zeros(0)) | {"labels": torch.zeros(0, dtype=torch.int64)}
    assert match_instances(truth, nothing, (H, W)) == []
    assert match_instances(nothing, found, (H, W)) == [FALSE] * 7
    assert match_instances(nothing, nothing, (H, W)) == []


def test_matches_of_an_image_follow_masks_where_both_sides_have_them() -> None:
    """Two triangles fill one box."""
    lower = np.tril(np.ones((20, 20), dtype=np.uint8))
    masks = [np.zeros((H, W), dtype=np.uint8) for _ in range(2)]
    masks[0][:20, :20], masks[1][:20, :20] = lower, 1 - lower
    truth = instances((1, (0, 0, 20, 20))) | {"masks": [rle(masks[0])]}
    found = instances((1, (0, 0, 20, 20)), scores=torch.ones(1)) | {"masks": [rle(masks[1])]}
    assert match_instances(truth, found, (H, W)) == [FALSE]
    del truth["masks"]
    assert match_instances(truth, found, (H, W)) == [0]
