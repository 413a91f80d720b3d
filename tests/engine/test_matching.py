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
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.engine.coco import H, W, as_coco, rectangle, rle
from tests.mutation import mutant
from tmask.engine import matching
from tmask.engine.evaluate import coco_metrics
from tmask.engine.matching import Evaluator


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
