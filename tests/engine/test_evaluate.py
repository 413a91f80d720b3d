"""The evaluator against pycocotools' own loading and summary."""

import contextlib
import copy
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tmask.engine import progress
from tmask.engine.evaluate import coco_metrics, coco_results, detect, evaluate, results_table
from tmask.structures import Detections, ImageBatch

H, W = 120, 150
CATEGORIES = [{"id": 3, "name": "disc"}, {"id": 8, "name": "bar"}]


def rle(mask: np.ndarray[Any, Any]) -> dict[str, Any]:
    encoded = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def rectangle(x: float, y: float, w: float, h: float) -> np.ndarray[Any, Any]:
    mask = np.zeros((H, W), bool)
    mask[int(y) : int(y + h), int(x) : int(x + w)] = True
    mask[int(y), int(x)] = False  # mask and box differ
    return mask


def fixture() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth of 12 images with crowds, polygons and RLEs, and results that are partly right."""
    rng = np.random.default_rng(0)
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image_id in range(1, 13):
        for _ in range(rng.integers(0, 7)):
            x, y = rng.integers(0, W - 60), rng.integers(0, H - 60)
            w, h = rng.integers(4, 60, 2)
            mask = rectangle(x, y, w, h)
            crowd = int(rng.random() < 0.1)
            polygon = [[float(v) for v in (x, y, x + w, y, x + w, y + h, x, y + h)]]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(rng.choice([3, 8])),
                    "bbox": [float(v) for v in (x, y, w, h)],
                    "area": float(mask.sum()),
                    "iscrowd": crowd,
                    "segmentation": polygon if not crowd and rng.random() < 0.5 else rle(mask),
                }
            )
            for _ in range(rng.integers(0, 3)):
                dx, dy, dw, dh = rng.integers(-4, 5, 4)
                box = [max(0, x + dx), max(0, y + dy), max(1, w + dw), max(1, h + dh)]
                results.append(
                    {
                        "image_id": image_id,
                        "category_id": annotations[-1]["category_id"],
                        "bbox": [float(v) for v in box],
                        "score": float(rng.random()),
                        "segmentation": rle(rectangle(*box)),
                    }
                )
    images = [{"id": i, "height": H, "width": W, "file_name": f"{i}.png"} for i in range(1, 13)]
    return {"images": images, "categories": CATEGORIES, "annotations": annotations}, results


def pycocotools_stats(truth: dict[str, Any], results: list[dict[str, Any]], kind: str) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        loaded = copy.deepcopy(results)
        if kind == "segm":
            for item in loaded:
                del item["bbox"]  # else loadRes takes the area of the box
        evaluation = COCOeval(coco, coco.loadRes(loaded), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = evaluation.stats
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    return {f"{kind}/{name}": stats[i] for i, name in enumerate(names)} | {f"{kind}/AR": stats[8]}


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_figures_equal_pycocotools(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    truth, results = fixture()
    before = copy.deepcopy((truth, results))
    metrics = coco_metrics(truth, results)
    assert (truth, results) == before
    assert capsys.readouterr().out == ""
    expected = pycocotools_stats(truth, results, kind)
    assert 0.2 < expected[f"{kind}/AP"] < 0.9
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    own = [metrics[f"{kind}/AP/{name}"] for name in ("disc", "bar")]
    assert metrics[f"{kind}/AP"] == pytest.approx(np.mean(own))


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
        part = {**truth, "categories": [item for item in truth["categories"] if item["id"] in ids]}
        part["annotations"] = [item for item in truth["annotations"] if item["category_id"] in ids]
        expected = pycocotools_stats(part, [item for item in results if item["category_id"] in ids], "segm")
        for name in ("AP", "AP50", "AP75"):
            assert metrics[f"segm/{name}_{suffix}"] == pytest.approx(expected[f"segm/{name}"], abs=1e-12)
    table = results_table(metrics).splitlines()
    heads = ["all classes", "classes with masks", "classes of boxes only"]
    cells = [f"{100 * metrics[f'segm/AP{suffix}']:.1f}" for suffix in ("", "_with_masks", "_boxes_only")]
    for line, head, cell in zip(table[1:4], heads, cells, strict=True):
        assert line.startswith(head)
        assert line.split()[-3] == cell
    assert [line.split()[0] for line in table[4:]] == ["disc", "bar", "ring"]
    assert len(set(cells)) == 3


def as_results(truth: dict[str, Any]) -> list[dict[str, Any]]:
    coco = COCO()
    with contextlib.redirect_stdout(io.StringIO()):
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
    return [
        {**{k: a[k] for k in ("image_id", "category_id", "bbox")}, "score": 0.9, "segmentation": coco.annToRLE(a)}
        for a in coco.dataset["annotations"]
        if not a["iscrowd"]
    ]


def test_ground_truth_as_prediction_gives_one() -> None:
    truth, _ = fixture()
    metrics = coco_metrics(truth, as_results(truth))
    for kind in ("bbox", "segm"):
        assert metrics[f"{kind}/AP"] == metrics[f"{kind}/AP75"] == metrics[f"{kind}/AR"] == 1.0


def test_no_results_give_zero_and_no_ground_truth_gives_minus_one() -> None:
    truth, results = fixture()
    metrics = coco_metrics(truth, [])
    assert {metrics[f"{kind}/{name}"] for kind in ("bbox", "segm") for name in ("AP", "AP50", "AP75", "AR")} == {0.0}
    assert metrics["segm/AP/disc"] == 0.0
    metrics = coco_metrics({**truth, "annotations": []}, results)
    assert metrics["bbox/AP"] == metrics["segm/AP"] == -1.0


def test_missing_area_and_iscrowd_are_filled_in() -> None:
    truth, results = fixture()
    truth["annotations"] = [a for a in truth["annotations"] if not a["iscrowd"]]
    bare = copy.deepcopy(truth)
    for item, whole in zip(bare["annotations"], truth["annotations"], strict=True):
        del item["area"], item["iscrowd"]
        whole["area"] = float(mask_utils.area(as_results({**truth, "annotations": [whole]})[0]["segmentation"]))
    assert coco_metrics(bare, results) == coco_metrics(truth, results)


def test_ground_truth_without_masks() -> None:
    truth, results = fixture()
    exact = as_results(truth)
    for item in truth["annotations"][::2]:
        del item["segmentation"]
    # The half without masks is ignored, so perfect results stay perfect.
    assert coco_metrics(truth, exact)["segm/AP"] == 1.0
    for item in truth["annotations"]:
        item.pop("segmentation", None)
    assert not [key for key in coco_metrics(truth, results) if key.startswith("segm")]


def test_annotation_id_zero_counts() -> None:
    truth, _ = fixture()
    for item in truth["annotations"]:
        item["id"] -= 1
    assert coco_metrics(truth, as_results(truth))["bbox/AP"] == 1.0


def test_results_of_an_unknown_image_are_an_error() -> None:
    truth, results = fixture()
    with pytest.raises(ValueError, match="results: image_id 99 is not in the ground truth"):
        coco_metrics(truth, [{**results[0], "image_id": 99}])


def test_ids_of_results_may_be_texts_of_known_ids() -> None:
    truth, results = fixture()
    texts = [{**item, "image_id": str(item["image_id"]), "category_id": str(item["category_id"])} for item in results]
    assert coco_metrics(truth, texts) == coco_metrics(truth, results)
    for name, value, message in (
        ("image_id", "99", "image_id: expected a whole number, got '99'"),
        ("category_id", "disc", "category_id: expected a whole number, got 'disc'"),
        ("category_id", 99, "category_id 99 is not in the ground truth"),
    ):
        with pytest.raises(ValueError, match=f"^results: {message}$"):
            coco_metrics(truth, [{**results[0], name: value}])


@pytest.mark.parametrize("field", ["iscrowd", "area"])
def test_null_is_as_if_the_field_were_missing(field: str) -> None:
    truth, results = fixture()
    missing, null = copy.deepcopy(truth), copy.deepcopy(truth)
    for item in missing["annotations"]:
        item.pop(field, None)
    for item in null["annotations"]:
        item[field] = None
    assert coco_metrics(null, results) == coco_metrics(missing, results)


def crowded() -> dict[str, Any]:
    """One image with 150 small objects."""
    boxes = [[float(10 * (i % 15)), float(10 * (i // 15)), 8.0, 8.0] for i in range(150)]
    annotations = [
        {"id": i + 1, "image_id": 1, "category_id": 3, "bbox": b, "segmentation": rle(rectangle(*b))}
        for i, b in enumerate(boxes)
    ]
    image = {"id": 1, "height": H, "width": W}
    return {"images": [image], "categories": CATEGORIES[:1], "annotations": annotations}


@pytest.mark.parametrize(("limit", "ap"), [(300, 1.0), (100, 67 / 101), (5, 4 / 101)])
def test_max_detections_limits_the_recall(limit: int, ap: float) -> None:
    truth = crowded()
    results = [{**item, "score": 0.5} for item in truth["annotations"]]
    # Precision is 1 up to recall limit / 150; AP counts the 101 recall steps below that.
    metrics = coco_metrics(truth, results, max_detections=limit)
    assert metrics["bbox/AP"] == metrics["segm/AP"] == pytest.approx(ap)
    assert metrics["bbox/AR"] == pytest.approx(min(limit, 150) / 150)


def test_coco_results_map_labels_and_boxes() -> None:
    result = {
        "boxes": torch.tensor([[1.0, 2.0, 11.0, 5.5]]),
        "labels": torch.tensor([2]),
        "scores": torch.tensor([0.5]),
        "masks": [{"size": [4, 5], "counts": "abc"}],
    }
    assert coco_results(7, result, [3, 8]) == [
        {
            "image_id": 7,
            "category_id": 8,
            "bbox": [1.0, 2.0, 10.0, 3.5],
            "score": 0.5,
            "segmentation": {"size": [4, 5], "counts": "abc"},
        }
    ]


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
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    box = [10.0, 20.0, 40.0, 60.0]
    mask = rectangle(*box)
    mask[20, 10] = True
    truth = {
        "images": [{"id": i, "height": H, "width": W} for i in (1, 2)],
        "categories": CATEGORIES,
        "annotations": [
            {"id": i, "image_id": i, "category_id": 8, "bbox": box, "segmentation": rle(mask)} for i in (1, 2)
        ],
    }
    dataset = SimpleNamespace(coco=SimpleNamespace(dataset=truth), category_ids=[3, 8])
    batch = SimpleNamespace(
        images=ImageBatch(torch.zeros(2, 3, 64, 96), torch.tensor([[60, 75], [60, 75]])),
        image_ids=[1, 2],
        original_sizes=[(H, W), (H, W)],
    )
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
    metrics = {f"{k}/{n}": 0.5 for k in ("bbox", "segm") for n in ("AP", "AP50", "AP75")}
    table = results_table(metrics | {"bbox/AP/disc": 0.123, "segm/AP/disc": -1.0}).splitlines()
    assert table[0].split() == ["bbox/AP", "bbox/AP50", "bbox/AP75", "segm/AP", "segm/AP50", "segm/AP75"]
    assert table[1].split() == ["all", "classes"] + ["50.0"] * 6
    assert table[2].split() == ["disc", "12.3", "-"]
