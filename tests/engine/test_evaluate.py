"""The evaluator against pycocotools' own loading and summary."""

import copy
import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils

from tests.engine.coco import (
    CATEGORIES,
    H,
    W,
    as_coco,
    fixture,
    keypoint_fixture,
    part,
    pycocotools_stats,
    rectangle,
    rle,
)
from tmask.engine import log
from tmask.engine.detect import coco_results, detect
from tmask.engine.evaluate import FIGURES, coco_metrics, evaluate, results_table, warn_limits
from tmask.structures import Detections, ImageBatch

SIGMAS = (0.05, 0.1, 0.02, 0.08)


@pytest.mark.parametrize(
    ("kind", "sigmas"), [("bbox", None), ("segm", None), ("keypoints", None), ("keypoints", SIGMAS)]
)
def test_figures_equal_pycocotools(kind: str, sigmas: tuple[float, ...] | None, capsys: Any) -> None:
    """Of all classes together and of each; keypoints are a person's, or others with spreads of their own."""
    truth, results = keypoint_fixture(17 if sigmas is None else 4) if kind == "keypoints" else fixture()
    before = copy.deepcopy((truth, results))
    metrics = coco_metrics(truth, results, kinds=[kind], keypoint_sigmas=sigmas)
    assert (truth, results) == before
    assert capsys.readouterr().out == ""
    expected = pycocotools_stats(truth, results, kind, sigmas)
    assert 0.1 < expected[f"{kind}/AP"] < 0.9
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert (f"{kind}/AP_small" in metrics) == (kind != "keypoints")
    for category in truth["categories"]:
        expected = pycocotools_stats(*part(truth, results, {category["id"]}), kind, sigmas)
        found = {name: metrics[f"{name}/{category['name']}"] for name in expected}
        assert found == pytest.approx(expected, abs=1e-12)
        assert len({*found.values()}) > 4


def test_classes_of_one_name_are_told_apart() -> None:
    truth, results = fixture()
    expected = coco_metrics(truth, results)
    metrics = coco_metrics({**truth, "categories": [{"id": 3, "name": "a"}, {"id": 8, "name": "a"}]}, results)
    for name, other in (("a (3)", "disc"), ("a (8)", "bar")):
        assert metrics[f"segm/AP/{name}"] == expected[f"segm/AP/{other}"]
    assert "segm/AP/a" not in metrics


def test_classes_of_boxes_only_are_measured_apart() -> None:
    truth, results = fixture()
    truth["categories"] = [*CATEGORIES, {"id": 9, "name": "ring"}]
    for item in [*truth["annotations"][::3], *results[::5]]:
        item["category_id"] = 9
    metrics = coco_metrics(truth, results, boxes_only=[8, 9], kinds=["segm"])
    for suffix, ids in (("with_masks", {3}), ("boxes_only", {8, 9})):
        expected = pycocotools_stats(*part(truth, results, ids), "segm")
        for name in ("AP", "AP50", "AP75"):
            assert metrics[f"segm/{name}_{suffix}"] == pytest.approx(expected[f"segm/{name}"], abs=1e-12)
    table = results_table(metrics).splitlines()
    heads = ["all classes", "classes with masks", "classes of boxes only"]
    cells = [f"{100 * metrics[f'segm/AP{suffix}']:.1f}" for suffix in ("", "_with_masks", "_boxes_only")]
    for line, head, cell in zip(table[1:4], heads, cells, strict=True):
        assert line.startswith(head)
        assert line[len(heads[-1]) :].split()[0] == cell
    assert [line.split()[0] for line in table[4:]] == ["disc", "bar", "ring"]
    assert len(set(cells)) == 3


def as_results(truth: dict[str, Any]) -> list[dict[str, Any]]:
    coco = as_coco(truth)
    fields = ("image_id", "category_id", "bbox")
    return [
        {**{name: item[name] for name in fields}, "score": 0.9, "segmentation": coco.annToRLE(item)}
        for item in coco.dataset["annotations"]
        if not item["iscrowd"]
    ]


def test_ground_truth_as_prediction_gives_one() -> None:
    """Also where an annotation has the id 0, and where half of the objects have no mask; without any no masks count."""
    truth, results = fixture()
    exact = as_results(truth)
    for number, item in enumerate(truth["annotations"]):
        item["id"] -= 1
        if number % 2:
            del item["segmentation"]
    metrics = coco_metrics(truth, exact)
    for kind in ("bbox", "segm"):
        assert metrics[f"{kind}/AP"] == metrics[f"{kind}/AP75"] == metrics[f"{kind}/AR"] == 1.0
    for item in truth["annotations"]:
        item.pop("segmentation", None)
    assert not [key for key in coco_metrics(truth, results) if key.startswith("segm")]


def test_no_results_give_zero_and_no_ground_truth_gives_minus_one() -> None:
    truth, results = fixture()
    metrics = coco_metrics(truth, [])
    assert {metrics[f"{kind}/{name}"] for kind in ("bbox", "segm") for name in ("AP", "AP50", "AP75", "AR")} == {0.0}
    assert metrics["segm/AP/disc"] == 0.0
    metrics = coco_metrics({**truth, "annotations": []}, results)
    assert metrics["bbox/AP"] == metrics["segm/AP"] == -1.0


def test_missing_area_and_iscrowd_are_filled_in() -> None:
    """And null is as if they were missing."""
    truth, results = fixture()
    truth["annotations"] = [item for item in truth["annotations"] if not item["iscrowd"]]
    missing, null = copy.deepcopy(truth), copy.deepcopy(truth)
    for item, whole in zip(missing["annotations"], truth["annotations"], strict=True):
        del item["area"], item["iscrowd"]
        whole["area"] = float(mask_utils.area(as_results({**truth, "annotations": [whole]})[0]["segmentation"]))
    for item in null["annotations"]:
        item |= {"area": None, "iscrowd": None}
    assert coco_metrics(missing, results) == coco_metrics(null, results) == coco_metrics(truth, results)


OTHER_RUNS = {"size": [H, W], "counts": "04"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": "99"}, "image_id: expected a whole number, got '99'"),
        # From 2^53 on a float is several whole numbers.
        ({"image_id": float(2**53 + 1)}, "image_id: expected a whole number, got 9007199254740992.0"),
        ({"segmentation": None}, "expected a field 'segmentation', got none"),
        ({"score": "0.5"}, "score: expected finite numbers, got '0.5'"),
        ({"bbox": [1, 2, 3]}, "bbox: expected four numbers [x, y, width, height], got [1, 2, 3]"),
        ({"bbox": [1, 2, float("inf"), 3]}, "bbox: expected finite numbers, got inf"),
        ({"segmentation": [[1, 2, 9, 2, 9, 9]]}, "segmentation: expected run lengths, got list"),
        ({"segmentation": OTHER_RUNS}, f"segmentation: expected runs of {H * W} pixels in all, got 4"),
    ],
)
def test_a_result_that_cannot_be_compared_is_an_error(change: dict[str, Any], message: str) -> None:
    """Others: docs/bad-input.md."""
    truth, results = fixture()
    truth["images"].append({"id": 2**53, "height": H, "width": W})
    with pytest.raises(ValueError, match=f"^{re.escape(f'results[2]: {message}')}$"):
        coco_metrics(truth, [*results[:2], {**results[0], **change}])
    assert coco_metrics(truth, [{**results[0], "image_id": float(results[0]["image_id"])}])


def test_run_lengths_of_results_may_be_numbers() -> None:
    truth, results = fixture()
    numbers = copy.deepcopy(results)
    for item in numbers:
        flat = mask_utils.decode(item["segmentation"]).ravel(order="F")
        runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[1 - flat[0]], flat, [1 - flat[-1]]]))))
        item["segmentation"] = {"size": [H, W], "counts": [*([0] if flat[0] else []), *runs.tolist()]}
    assert coco_metrics(truth, numbers) == coco_metrics(truth, results)


@pytest.mark.parametrize("name", ["image_id", "category_id"])
def test_an_annotation_of_nothing_known_is_an_error(name: str) -> None:
    truth, results = fixture()
    truth["annotations"][3][name] = 99
    with pytest.raises(ValueError, match=rf"^annotations\[3\]: {name} 99 is not in the ground truth$"):
        coco_metrics(truth, results)


IDS = {
    "beyond int64": lambda i: 2**64 - 20 + i,
    "on both sides of it": lambda i: i if i < 5 else 2**63 + i,
    "that float64 takes for one": lambda i: 2**53 + i,
    "negative": lambda i: i - 20,
    "around 0": lambda i: i - 3,
}


@pytest.mark.parametrize("new", IDS.values(), ids=IDS)
def test_any_whole_numbers_are_ids(new: Any) -> None:
    """The figures are those of small ids of the same order, and the results keep theirs; these may be texts."""
    truth, results = copy.deepcopy(fixture())
    truth["categories"] = [{"id": 3, "name": "same"}, {"id": 8, "name": "same"}]
    expected = coco_metrics(truth, results, boxes_only=[8])
    assert 0.2 < expected["segm/AP/same (8)"] < 0.9
    for item in [*truth["images"], *truth["categories"], *truth["annotations"]]:
        item["id"] = new(item["id"])
    for item in [*truth["annotations"], *results]:
        item |= {"image_id": new(item["image_id"]), "category_id": new(item["category_id"])}
    before = copy.deepcopy(results)
    metrics = coco_metrics(truth, results, boxes_only=[new(8)])
    assert results == before
    names = {f"({i})": f"({new(i)})" for i in (3, 8)}
    assert metrics == {key.replace(key[-3:], names.get(key[-3:], key[-3:])): value for key, value in expected.items()}
    texts = [{**item, "image_id": str(item["image_id"]), "category_id": str(item["category_id"])} for item in results]
    assert coco_metrics(truth, texts, boxes_only=[new(8)]) == metrics


def crowded() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One image with 150 small objects, and results that find all."""
    boxes = [[float(10 * (i % 15)), float(10 * (i // 15)), 8.0, 8.0] for i in range(150)]
    items = [
        {"id": i, "image_id": 1, "category_id": 3, "bbox": box, "segmentation": rle(rectangle(*box))}
        for i, box in enumerate(boxes, start=1)
    ]
    truth = {"images": [{"id": 1, "height": H, "width": W}], "categories": CATEGORIES[:1], "annotations": items}
    return truth, [{**item, "score": 0.5} for item in items]


@pytest.mark.parametrize(("limit", "ap"), [(300, 1.0), (150, 1.0), (100, 67 / 101), (5, 4 / 101)])
def test_max_detections_limits_the_recall(limit: int, ap: float) -> None:
    """And a warning says so."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        metrics = coco_metrics(*crowded(), max_detections=limit)
    # Precision is 1 up to recall limit / 150; AP counts the 101 recall steps below that.
    assert metrics["bbox/AP"] == metrics["segm/AP"] == pytest.approx(ap)
    assert metrics["bbox/AR"] == pytest.approx(min(limit, 150) / 150)
    said = f"the ground truth: 1 of 1 images hold more than {limit} objects, up to 150"
    told = [str(item.message) for item in caught if item.category is UserWarning]
    assert [text.startswith(said) for text in told] == [True] * (limit < 150)


def crowded_set(*counts: tuple[int, int], crowd: int = 0) -> Any:
    """A data set of images that hold so many objects of the first and of the second class."""
    items = [
        {"image_id": image, "category_id": category, "iscrowd": crowd}
        for image, pair in enumerate(counts)
        for category, count in zip((3, 8), pair, strict=True)
        for _ in range(count)
    ]
    content = {"images": [{"id": i} for i in range(len(counts))], "annotations": items}
    return SimpleNamespace(coco=SimpleNamespace(dataset=content), told=set(), annotation_file=Path("a.json"))


@pytest.mark.parametrize(
    ("dataset", "limits", "told"),
    [
        (crowded_set((60, 40), (1, 0)), (100, 100), None),
        (crowded_set((101, 0), crowd=1), (100, 100), None),
        # The evaluator counts detections of each class, the model gives them of all together.
        (crowded_set((60, 41), (1, 0)), (100, 100), (1, 2, 100, 101, "model")),
        (crowded_set((60, 41)), (300, 100), None),
        (crowded_set((1500, 0), (101, 9), (5, 5)), (300, 100, 2000), (2, 3, 100, 1500, "eval, model")),
        (crowded_set((150, 0)), (300, 200, 120), (1, 1, 120, 150, "rpn")),
    ],
)
def test_more_objects_than_count_are_told_once(dataset: Any, limits: tuple[int, ...], told: Any) -> None:
    detections, of_class, proposals = (*limits, 1000)[:3]
    rpn = SimpleNamespace(post_nms_top_n=SimpleNamespace(test=proposals))
    model = SimpleNamespace(roi_heads=SimpleNamespace(max_detections=detections), rpn=rpn)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            warn_limits(dataset, model, of_class, options=("eval", "model", "rpn"))
    words = "a.json: {0} of {1} images hold more than {2} objects, up to {3}, but {2} detections an image count: {4}"
    assert [str(item.message) for item in caught] == ([] if told is None else [words.format(*told)])


def test_coco_results_are_of_coco_s_pixels_and_ids() -> None:
    mask = {"size": [4, 5], "counts": "abc"}
    result = {"boxes": torch.tensor([[1.0, 2.0, 11.0, 5.5]]), "scores": torch.tensor([0.5]), "masks": [mask]}
    result["keypoints"] = torch.tensor([[[3.5, 4.0, 1.0], [8.0, 6.5, 1.0]]])
    result["keypoints_scores"] = torch.tensor([[7.0, -2.0]])
    (item,) = coco_results(7, {**result, "labels": torch.tensor([2])}, [3, 8])
    found = {"bbox": [1.0, 2.0, 10.0, 3.5], "score": 0.5, "keypoints": [3, 3.5, 7, 7.5, 6, -2]}
    assert item == {"image_id": 7, "category_id": 8, **found, "segmentation": mask}
    for label in (0, 3):
        with pytest.raises(ValueError, match=f"^labels: expected 1..2, one a category, got {label}$"):
            coco_results(7, {**result, "labels": torch.tensor([label])}, [3, 8])


class Oracle(torch.nn.Module):
    """Gives each image's one object, with a full mask, in padded pixels at half the original size."""

    paste = "detectron2"

    def forward_padded(self, images: ImageBatch, targets: None = None, *, compact: bool = False) -> Detections:
        n = len(images.sizes)
        boxes = torch.tensor([[5.0, 10.0, 25.0, 40.0], [0.0, 0.0, 0.0, 0.0]]).expand(n, 2, 4)
        scores, labels = torch.tensor([[0.9, 0.0]]).expand(n, 2), torch.tensor([[2, 0]]).expand(n, 2)
        return Detections(boxes, scores, labels, torch.ones(n, dtype=torch.int64), torch.ones(n, 2, 28, 28))


def test_evaluate_maps_back_to_original_pixels_and_writes_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(log, "_LINE_SECONDS", 0.0)
    box = [10.0, 20.0, 40.0, 60.0]
    mask = rectangle(*box)
    mask[20, 10] = True
    item = {"category_id": 8, "bbox": box, "segmentation": rle(mask)}
    truth = {
        "images": [{"id": i, "height": H, "width": W} for i in (1, 2)],
        "categories": CATEGORIES,
        "annotations": [{"id": i, "image_id": i, **item} for i in (1, 2)],
    }
    dataset = SimpleNamespace(coco=SimpleNamespace(dataset=truth), category_ids=[3, 8])
    images = ImageBatch(torch.zeros(2, 3, 64, 96), torch.tensor([[60, 75], [60, 75]]))
    batch = SimpleNamespace(images=images, image_ids=[1, 2], original_sizes=[(H, W), (H, W)])
    model = Oracle().train()
    metrics = evaluate(model, [batch], dataset, results_file=tmp_path / "out" / "results.json")
    assert metrics["bbox/AP"] == metrics["segm/AP"] == metrics["segm/AP/bar"] == 1.0
    assert metrics["segm/AP/disc"] == -1.0
    assert model.training
    assert capsys.readouterr().err.startswith("evaluation: batch 1/1  ")
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(r["image_id"], r["category_id"], r["bbox"]) for r in written] == [(1, 8, box), (2, 8, box)]
    assert coco_metrics(truth, written) == metrics


@pytest.mark.parametrize("count", [1, 3])
def test_a_model_of_other_classes_is_refused(count: int) -> None:
    model = Oracle()
    model.config = SimpleNamespace(num_classes=3)
    with pytest.raises(ValueError, match=f"category_ids: expected 2, the model's classes .*, got {count}"):
        detect(model, [], list(range(count)))
    assert detect(model, [], [3, 8]) == []


def test_results_table_shows_percent_and_gaps() -> None:
    """A table of each kind; keypoints have no AP of small objects."""
    rows = {"": 0.5, "/disc": 0.123, "/a / b": 0.123}
    keys = [f"{kind}/{name}" for kind in ("bbox", "segm", "keypoints") for name in FIGURES]
    metrics = {key + row: value for key in keys for row, value in rows.items() if key != "keypoints/AP_small"}
    table = results_table(metrics | {"segm/AP_large/disc": -1.0, "segm/AP50/disc": 1.0}).splitlines()
    assert [line.split()[0] for line in table] == [
        word for kind in ("bbox", "segm", "keypoints") for word in (f"{kind}/AP", "all", "disc", "a")
    ]
    assert table[0].split() == ["bbox/AP", "bbox/AP50", "bbox/AP75", "bbox/AR", "small", "medium", "large"]
    assert table[1].split() == ["all", "classes"] + ["50.0"] * 7
    assert table[6].split() == ["disc", "12.3", "100.0", "12.3", "12.3", "12.3", "12.3", "-"]
    assert table[9].split() == ["all", "classes"] + ["50.0"] * 6
    small = table[8].index("small")
    assert table[9][small : small + 5].isspace()
    assert {len(line) for line in table[:8]} == {68}
