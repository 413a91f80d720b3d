"""Keypoints on the way out: COCO's figures, results on disk and pictures."""

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
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.engine.predictions import CATEGORIES, by_name, make_model, read_pixels, rows
from tmask.config import DataConfig, KeypointConfig, ModelConfig
from tmask.data.coco import CocoDataset
from tmask.data.shapes import KEYPOINTS, write_shapes
from tmask.engine.evaluate import coco_metrics, coco_results, evaluate, results_table
from tmask.engine.predict import predict
from tmask.engine.run import augment, draw_pictures, open_dataset
from tmask.skeleton import PERSON

SMALL_HEAD = {"names": KEYPOINTS, "edges": ((0, 1), (2, 3)), "head_channels": 8, "head_layers": 1}


def fixture(num_keypoints: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth of 8 images, with crowds, persons without keypoints and one image of 25; results near and far."""
    rng = np.random.default_rng(1)
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image_id in range(1, 9):
        for _ in range(25 if image_id == 8 else int(rng.integers(1, 5))):
            side = rng.uniform(20, 180)
            corner = rng.uniform(0, 300, 2)
            xy = corner + side * rng.random((num_keypoints, 2))
            visibility = rng.integers(0, 3, (num_keypoints, 1)) * (rng.random() < 0.85)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 1,
                    "bbox": [*corner.tolist(), side, side],
                    "area": 0.6 * side**2,
                    "iscrowd": int(rng.random() < 0.1),
                    "keypoints": np.concatenate([xy * (visibility > 0), visibility], axis=1).ravel().tolist(),
                    "num_keypoints": int((visibility > 0).sum()),
                }
            )
            for _ in range(int(rng.integers(0, 3))):
                near = xy + side * rng.choice([0.01, 0.05, 0.3]) * rng.standard_normal(xy.shape)
                results.append(
                    {
                        "image_id": image_id,
                        "category_id": 1,
                        "score": float(rng.random()),
                        "keypoints": np.concatenate([near, np.ones((num_keypoints, 1))], axis=1).ravel().tolist(),
                    }
                )
    images = [{"id": i, "height": 500, "width": 500, "file_name": f"{i}.png"} for i in range(1, 9)]
    return {"images": images, "categories": [{"id": 1, "name": "person"}], "annotations": annotations}, results


def pycocotools_stats(
    truth: dict[str, Any], results: list[dict[str, Any]], sigmas: tuple[float, ...] | None
) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), "keypoints")
        if sigmas is not None:
            evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = ("AP", "AP50", "AP75", "AP_medium", "AP_large", "AR")
    return {f"keypoints/{name}": float(value) for name, value in zip(names, evaluation.stats, strict=False)}


@pytest.mark.parametrize("sigmas", [None, (0.05, 0.1, 0.02, 0.08)], ids=["person", "custom"])
def test_figures_equal_pycocotools(sigmas: tuple[float, ...] | None) -> None:
    truth, results = fixture(17 if sigmas is None else 4)
    before = copy.deepcopy((truth, results))
    metrics = coco_metrics(truth, results, kinds=["keypoints"], keypoint_sigmas=sigmas)
    assert (truth, results) == before
    expected = pycocotools_stats(truth, results, sigmas)
    assert 0.1 < expected["keypoints/AP"] < 0.9
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert "keypoints/AP_small" not in metrics
    assert metrics["keypoints/AP/person"] == metrics["keypoints/AP"]


def test_sigmas_of_a_person_are_pycocotools() -> None:
    assert PERSON.sigmas == tuple(COCOeval(iouType="keypoints").params.kpt_oks_sigmas.round(3))


def test_what_is_left_out_is_filled_in() -> None:
    truth, results = fixture(17)
    expected = coco_metrics(truth, results, kinds=["keypoints"])
    for item in truth["annotations"]:
        if not item.pop("num_keypoints"):
            del item["keypoints"]
    assert coco_metrics(truth, results, kinds=["keypoints"]) == expected


def test_keypoints_appear_only_if_asked_and_annotated() -> None:
    truth, results = fixture(17)
    boxes = [{**item, "bbox": [0, 0, 5, 5]} for item in results]
    assert not any(name.startswith("keypoints") for name in coco_metrics(truth, boxes, kinds=["bbox"]))
    for item in truth["annotations"]:
        item["keypoints"], item["num_keypoints"] = [0] * 51, 0
    assert coco_metrics(truth, results, kinds=["keypoints"]) == {}


def test_no_results_give_zero() -> None:
    truth, _ = fixture(17)
    assert coco_metrics(truth, [], kinds=["keypoints"])["keypoints/AP"] == 0


def test_keypoints_of_another_number_than_sigmas_are_refused() -> None:
    truth, results = fixture(4)
    with pytest.raises(ValueError, match="annotations: keypoints: expected 51 numbers, three for each sigma, got 12"):
        coco_metrics(truth, results, kinds=["keypoints"])
    results[1]["keypoints"] = []
    with pytest.raises(ValueError, match=r"results\[1\]: keypoints: expected 12 numbers, three for each sigma, got 0"):
        coco_metrics(truth, results, kinds=["keypoints"], keypoint_sigmas=[0.1] * 4)
    del results[1]["keypoints"]
    with pytest.raises(ValueError, match=r"results\[1\]: expected a field 'keypoints', got none"):
        coco_metrics(truth, results, kinds=["keypoints"], keypoint_sigmas=[0.1] * 4)


def test_results_hold_coco_pixels_and_scores() -> None:
    keypoints = torch.tensor([[[3.5, 4.0, 1.0], [8.0, 6.5, 1.0]]])
    result = {"boxes": torch.zeros(1, 4), "labels": torch.tensor([1]), "scores": torch.tensor([0.5]), "masks": [
        {"size": [9, 9], "counts": "x"}
    ], "keypoints": keypoints, "keypoints_scores": torch.tensor([[7.0, -2.0]])}  # fmt: skip
    assert coco_results(3, result, [1])[0]["keypoints"] == [3, 3.5, 7, 7.5, 6, -2]


def test_a_keypoint_of_a_diverged_head_is_not_known(
    corners: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results are JSON, which has no NaN; pictures leave it out."""
    drawn: list[torch.Tensor] = []
    monkeypatch.setattr("tmask.visualize.draw_instances", lambda image, result, *_, **__: drawn.append(result) or image)
    model, images = keypoint_model(), sorted(corners[0].iterdir())[:1]
    with torch.no_grad():
        model.roi_heads.keypoint_head.deconv.bias[1] = torch.nan
    predict(model, by_name(images), CATEGORIES, out_dir=tmp_path / "out")
    for name in ("predictions.json", "predictions.jsonl"):
        assert "NaN" not in (tmp_path / "out" / name).read_text()
    triples = torch.tensor([row["keypoints"] for row in rows(tmp_path / "out")]).unflatten(1, (4, 3))
    assert triples.count_nonzero((0, 2)).tolist() == [3 * len(triples), 0, 3 * len(triples), 3 * len(triples)]
    assert drawn[0]["keypoints"][..., 2].tolist() == [[1, 0, 1, 1]] * len(triples)


def test_there_is_a_table_of_each_kind() -> None:
    metrics = {f"{kind}/{name}": 0.5 for kind in ("bbox", "keypoints") for name in ("AP", "AP50", "AP75", "AP/disc")}
    table = results_table({**metrics, "keypoints/AP/disc": -1.0}).splitlines()
    assert [line.split()[0] for line in table] == ["bbox/AP", "all", "disc", "keypoints/AP", "all", "disc"]
    for cell, (head, every, disc) in (("50.0", table[:3]), ("-", table[3:])):
        assert every.split() == ["all", "classes", *["50.0"] * 3]
        assert disc.split() == ["disc", cell]
        assert disc.endswith(cell)
        assert len(disc) == head.index("/AP ") + 3


@pytest.fixture
def corners(tmp_path: Path) -> tuple[Path, Path]:
    return write_shapes(tmp_path / "shapes", num_images=2, seed=0, size=64, variant="corners")


def keypoint_model() -> Any:
    return make_model(keypoints=SMALL_HEAD)


def test_perfect_keypoints_of_the_loader_are_worth_one(corners: tuple[Path, Path]) -> None:
    """From the file through data set and results back to the file's pixels."""
    dataset = CocoDataset(*corners)
    results: list[dict[str, Any]] = []
    for _, target in (dataset[i] for i in range(len(dataset))):
        known = target["keypoints"][..., 2].any(1)
        found = {"boxes": target["boxes"][known], "labels": target["labels"][known]}
        count = int(known.sum())
        found |= {"scores": torch.ones(count), "masks": [{"size": [64, 64], "counts": ""}] * count}
        found |= {"keypoints": target["keypoints"][known], "keypoints_scores": target["keypoints"][known][..., 2]}
        results += coco_results(target["image_id"], found, dataset.category_ids)
    truth = dataset.coco.dataset
    assert coco_metrics(truth, results, kinds=["keypoints"], keypoint_sigmas=[0.001] * 4)["keypoints/AP"] > 0.999


def test_evaluation_counts_keypoints_where_model_and_data_have_them(corners: tuple[Path, Path]) -> None:
    from tmask.data.loader import make_loader

    dataset = CocoDataset(*corners)
    for model, kinds in ((keypoint_model(), {"bbox", "segm", "keypoints"}), (make_model(), {"bbox", "segm"})):
        loader = make_loader(dataset, model.transform, batch_size=2, shuffle=False)
        metrics = evaluate(model, loader, dataset)
        assert {name.split("/")[0] for name in metrics} == kinds


def test_configured_sigmas_decide_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, results = fixture(4)
    results = [{**item, "bbox": [0, 0, 5, 5]} for item in results]
    monkeypatch.setattr("tmask.engine.evaluate.detect", lambda *args, **options: results)
    dataset = SimpleNamespace(coco=SimpleNamespace(dataset=truth), category_ids=[1])
    found = []
    for sigmas in ((0.02,) * 4, (0.05, 0.1, 0.02, 0.08)):
        config = SimpleNamespace(keypoints=KeypointConfig(names=tuple("abcd"), sigmas=sigmas))
        found.append(evaluate(SimpleNamespace(config=config), [], dataset)["keypoints/AP"])
        assert found[-1] == pytest.approx(pycocotools_stats(truth, results, sigmas)["keypoints/AP"], abs=1e-12)
    assert found[0] < found[1]


def test_predictions_hold_keypoints_and_draw_them(
    corners: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[dict[str, Any]] = []

    def spy(image: torch.Tensor, result: dict[str, Any], names: Any, **options: Any) -> torch.Tensor:
        drawn.append({**result, **options})
        return image

    monkeypatch.setattr("tmask.visualize.draw_instances", spy)
    model, images = keypoint_model(), by_name(sorted(corners[0].iterdir()))
    predict(model, images, CATEGORIES, out_dir=tmp_path / "out")
    name = next(iter(images))
    expected = model([read_pixels(images[name])], masks="rle")[0]
    own = [row for row in rows(tmp_path / "out") if row["file_name"] == name]
    triples = torch.tensor([row["keypoints"] for row in own]).unflatten(1, (4, 3))
    assert torch.allclose(triples[..., :2] + 0.5, expected["keypoints"][..., :2], atol=1e-4)
    assert torch.allclose(triples[..., 2], expected["keypoints_scores"], atol=1e-4)
    assert torch.allclose(drawn[0]["keypoints"], expected["keypoints"], atol=1e-4)
    assert drawn[0]["edges"] == SMALL_HEAD["edges"]
    first = json.loads((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()[1])
    assert len(first["detections"][0]["keypoints"]) == 12


def test_pictures_of_a_run_show_both_skeletons(
    corners: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def spy(image: torch.Tensor, found: Any, truth: Any, names: Any, **options: Any) -> torch.Tensor:
        seen.append((found["keypoints"].shape[1:], truth["keypoints"].shape[1:], options["edges"]))
        return image

    monkeypatch.setattr("tmask.visualize.comparison", spy)
    draw_pictures(keypoint_model(), CocoDataset(*corners), tmp_path / "p", device=torch.device("cpu"), count=1)
    assert seen == [((4, 3), (4, 3), SMALL_HEAD["edges"])]


def flipped(corners: tuple[Path, Path], hflip: float = 1.0, vflip: float = 0.0, **settings: Any) -> torch.Tensor:
    """Keypoints of the first image as training sees them."""
    data = DataConfig(train_images=str(corners[0]), train_annotations=str(corners[1]), hflip=hflip, vflip=vflip)
    dataset = open_dataset(data, "train")
    augment(dataset, data, ModelConfig(keypoints=KeypointConfig(**{"names": KEYPOINTS, **settings})))
    return dataset[0][1]["keypoints"]


@pytest.mark.parametrize(("given", "order"), [(None, (0, 3, 2, 1)), (((0, 2),), (2, 1, 0, 3)), ((), (0, 1, 2, 3))])
def test_training_data_is_flipped_by_name_or_as_told(corners: tuple[Path, Path], given: Any, order: Any) -> None:
    plain = CocoDataset(*corners)[0][1]["keypoints"]
    keypoints = flipped(corners, flip_pairs=given)
    assert torch.equal(keypoints[..., 2], plain[:, list(order), 2])
    assert torch.allclose(keypoints[..., 0], 64 - plain[:, list(order), 0], atol=1e-4)


SIDES = ("L_Eye", "R_Eye", "Nose", "Chin")


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        ({"names": SIDES}, True),
        ({"names": SIDES, "flip_pairs": ()}, False),
        ({"names": SIDES, "flip_pairs": ((0, 1),)}, False),
        ({"names": SIDES, "hflip": 0.0}, False),
        ({}, False),
        ({"names": SIDES[:1]}, False),
    ],
    ids=["no left, no right", "none, as told", "pairs given", "no flips", "drawn corners", "one alone"],
)
def test_flips_that_swap_nothing_are_told(
    corners: tuple[Path, Path], settings: dict[str, Any], warns: bool, recwarn: pytest.WarningsRecorder
) -> None:
    flipped(corners, **settings)
    told = [str(item.message) for item in recwarn if "hflip" in str(item.message)]
    assert len(told) == warns
    assert all("none of the keypoints L_Eye, R_Eye, Nose, Chin" in text for text in told)
    assert all("with model.keypoints.flip_pairs, [] if there are none" in text for text in told)


def test_no_keypoints_of_the_model_need_no_pairs(corners: tuple[Path, Path], recwarn: pytest.WarningsRecorder) -> None:
    augment(CocoDataset(*corners), DataConfig(), ModelConfig())
    assert not [item for item in recwarn if "hflip" in str(item.message)]


def test_up_down_flips_are_refused(corners: tuple[Path, Path]) -> None:
    """They would turn left into right too, and top into bottom."""
    with pytest.raises(ValueError, match=r"^data.vflip: expected 0 with model.keypoints, got 0.5$"):
        flipped(corners, vflip=0.5)
    augment(CocoDataset(*corners), DataConfig(vflip=0.5), ModelConfig())
