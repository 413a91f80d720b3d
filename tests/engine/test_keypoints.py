"""Keypoints on the way out: results on disk, pictures, and COCO's figures; those of pycocotools: test_evaluate.py."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from pycocotools.cocoeval import COCOeval

from tests.engine.coco import keypoint_fixture, pycocotools_stats
from tests.engine.predictions import CATEGORIES, by_name, make_model, read_pixels, rows
from tests.engine.toy import CPU
from tmask.config import DataConfig, KeypointConfig, ModelConfig
from tmask.data.coco import CocoDataset
from tmask.data.loader import make_loader
from tmask.data.shapes import KEYPOINTS
from tmask.engine import pictures
from tmask.engine.dataset import augment, open_dataset
from tmask.engine.evaluate import coco_metrics, evaluate
from tmask.engine.predict import predict
from tmask.skeleton import PERSON

SMALL_HEAD = {"names": KEYPOINTS, "edges": ((0, 1), (2, 3)), "head_channels": 8, "head_layers": 1}
KINDS = ["keypoints"]
SIGMAS = (0.05, 0.1, 0.02, 0.08)


def test_sigmas_of_a_person_are_pycocotools() -> None:
    assert PERSON.sigmas == tuple(COCOeval(iouType="keypoints").params.kpt_oks_sigmas.round(3))


def test_what_is_left_out_is_filled_in() -> None:
    """Without results the figures are 0; without the kind or any keypoint there are none."""
    truth, results = keypoint_fixture(17)
    expected = coco_metrics(truth, results, kinds=KINDS)
    assert coco_metrics(truth, [], kinds=KINDS)["keypoints/AP"] == 0
    boxes = [{**item, "bbox": [0, 0, 5, 5]} for item in results]
    assert not any(name.startswith("keypoints") for name in coco_metrics(truth, boxes, kinds=["bbox"]))
    for item in truth["annotations"]:
        if not item.pop("num_keypoints"):
            del item["keypoints"]
    assert coco_metrics(truth, results, kinds=KINDS) == expected
    for item in truth["annotations"]:
        item["keypoints"], item["num_keypoints"] = [0] * 51, 0
    assert coco_metrics(truth, results, kinds=KINDS) == {}


def test_keypoints_of_another_number_than_sigmas_are_refused() -> None:
    truth, results = keypoint_fixture(4)
    with pytest.raises(ValueError, match="annotations: keypoints: expected 51 numbers, three for each sigma, got 12"):
        coco_metrics(truth, results, kinds=KINDS)
    for wrong, said in (
        ([], "keypoints: expected 12 numbers, three for each sigma, got 0"),
        (None, "expected a field 'keypoints', got none"),
    ):
        results[1]["keypoints"] = wrong
        with pytest.raises(ValueError, match=rf"results\[1\]: {said}"):
            coco_metrics(truth, results, kinds=KINDS, keypoint_sigmas=[0.1] * 4)


def keypoint_model() -> Any:
    return make_model(keypoints=SMALL_HEAD)


def test_evaluation_counts_keypoints_where_model_and_data_have_them(corners: tuple[Path, Path]) -> None:
    for model, kinds in ((keypoint_model(), {"bbox", "segm", "keypoints"}), (make_model(), {"bbox", "segm"})):
        dataset = CocoDataset(*corners)
        dataset.told.add("limits")  # of the small model
        loader = make_loader(dataset, model.transform, batch_size=2, shuffle=False)
        assert {name.split("/")[0] for name in evaluate(model, loader, dataset)} == kinds


def test_configured_sigmas_decide_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, results = keypoint_fixture(4)
    results = [{**item, "bbox": [0, 0, 5, 5]} for item in results]
    monkeypatch.setattr("tmask.engine.evaluate.detect", lambda *args, **options: results)
    dataset = SimpleNamespace(coco=SimpleNamespace(dataset=truth), category_ids=[1])
    found = []
    for sigmas in ((0.02,) * 4, SIGMAS):
        config = SimpleNamespace(keypoints=KeypointConfig(names=tuple("abcd"), sigmas=sigmas))
        found.append(evaluate(SimpleNamespace(config=config), [], dataset)["keypoints/AP"])
        expected = pycocotools_stats(truth, results, "keypoints", sigmas)["keypoints/AP"]
        assert found[-1] == pytest.approx(expected, abs=1e-12)
    assert found[0] < found[1]


@pytest.mark.filterwarnings("ignore:.*give exactly:UserWarning")
@pytest.mark.parametrize("diverged", [False, True], ids=["sound", "diverged"])
def test_predictions_hold_keypoints_and_draw_them(
    corners: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, diverged: bool
) -> None:
    """A keypoint of a diverged head is not known: results are JSON, which has no NaN, and pictures leave it out."""
    drawn: list[dict[str, Any]] = []

    def spy(image: torch.Tensor, result: dict[str, Any], names: Any, **options: Any) -> Image.Image:
        drawn.append({**result, **options})
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(pictures, "draw_instances", spy)
    model, images, out = keypoint_model(), by_name(sorted(corners[0].iterdir())), tmp_path / "out"
    if diverged:
        with torch.no_grad():
            model.roi_heads.keypoint_head.deconv.bias[1] = torch.nan
    predict(model, images, CATEGORIES, out_dir=out)
    name = next(iter(images))
    expected = model([read_pixels(images[name])], masks="rle")[0]
    own = [row for row in rows(out) if row["file_name"] == name]
    triples = torch.tensor([row["keypoints"] for row in own]).unflatten(1, (4, 3))
    known = torch.tensor([True, not diverged, True, True])
    assert torch.allclose((triples[..., :2] + 0.5)[:, known], expected["keypoints"][:, known, :2], atol=1e-4)
    assert torch.allclose(triples[:, known, 2], expected["keypoints_scores"][:, known], atol=1e-4)
    assert not triples[:, ~known].any()
    assert torch.allclose(drawn[0]["keypoints"][:, known], expected["keypoints"][:, known], atol=1e-4)
    assert not drawn[0]["keypoints"][:, ~known, 2].any()
    assert drawn[0]["edges"] == SMALL_HEAD["edges"]
    for file in ("predictions.json", "predictions.jsonl"):
        assert "NaN" not in (out / file).read_text()
    first = json.loads((out / "predictions.jsonl").read_text().splitlines()[1])
    assert len(first["detections"][0]["keypoints"]) == 12


def test_pictures_of_a_run_show_both_skeletons(
    corners: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def spy(image: torch.Tensor, found: Any, truth: Any, *_: Any, **options: Any) -> Image.Image:
        seen.append((found["keypoints"].shape[1:], truth["keypoints"].shape[1:], options["edges"]))
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(pictures, "comparison", spy)
    pictures.draw_pictures(keypoint_model(), CocoDataset(*corners), tmp_path / "p", device=CPU, count=1)
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


SETTINGS: dict[str, dict[str, Any]] = {
    "no left, no right": {"names": SIDES},
    "none, as told": {"names": SIDES, "flip_pairs": ()},
    "pairs given": {"names": SIDES, "flip_pairs": ((0, 1),)},
    "no flips": {"names": SIDES, "hflip": 0.0},
    "drawn corners": {},
    "one alone": {"names": SIDES[:1]},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_flips_that_swap_nothing_are_told(case: str, corners: tuple[Path, Path], recwarn: Any) -> None:
    flipped(corners, **SETTINGS[case])
    augment(CocoDataset(*corners), DataConfig(), ModelConfig())  # no keypoints of the model need no pairs
    told = [str(item.message) for item in recwarn if "hflip" in str(item.message)]
    assert len(told) == (case == "no left, no right")
    assert all("none of the keypoints L_Eye, R_Eye, Nose, Chin" in text for text in told)
    assert all("with model.keypoints.flip_pairs, [] if there are none" in text for text in told)


def test_up_down_flips_are_refused(corners: tuple[Path, Path]) -> None:
    """They would turn left into right too, and top into bottom."""
    with pytest.raises(ValueError, match=r"^data.vflip: expected 0 with model.keypoints, got 0.5$"):
        flipped(corners, vflip=0.5)
