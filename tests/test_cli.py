"""The command line from end to end on a few small pictures, and each way of using it wrongly."""

import dataclasses
import inspect
import json
import re
import shutil
import typing
import warnings
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml

from tests.engine.toy import files
from tests.image_files import with_exif
from tmask import cli
from tmask.checks import bounds
from tmask.cli.common import precision_of
from tmask.cli.train import COMMON, GROUPS, train_parser
from tmask.config import (
    CONVENTIONS,
    KeypointConfig,
    MaskTransferConfig,
    RoIExtractorConfig,
    TrainConfig,
    field_texts,
)
from tmask.data.shapes import CLASSES, KEYPOINT_EDGES, KEYPOINTS, write_shapes
from tmask.engine import evaluate
from tmask.engine.log import read_log
from tmask.model.backbone import ResNet
from tmask.presets import PRESETS, TRAIN_PRESETS

SMALL = [
    *("--model.min_size", "64", "--model.max_size", "64", "--model.fpn_channels", "16"),
    *("--model.box_head_dim", "16", "--model.mask_head_channels", "16", "--model.box_batch_size", "16"),
    *("--train.batch_size", "2", "--train.precision", "fp32", "--train.log_every", "2", "--data.num_workers", "0"),
]
MAX_DETECTIONS = 120  # of the run: more than COCO's 100, and fewer than the model finds


class Data(NamedTuple):
    train_images: Path
    train_annotations: Path
    val_images: Path
    val_annotations: Path

    def options(self) -> list[str]:
        return [part for name, path in self._asdict().items() for part in (f"--data.{name}", str(path))]


def call(command: str, *words: str, **options: object) -> int:
    return cli.main([command, *words, *(f"--{name}={value}" for name, value in options.items())])


def evaluated(folder: Path, data: Data, **options: object) -> int:
    """Evaluate the checkpoint in a folder."""
    given = {"images": data.val_images, "annotations": data.val_annotations, **options}
    return call("eval", checkpoint=folder / "checkpoint.pt", **given)


def trained_again(run: Path, *words: str, **options: object) -> int:
    """Train with the settings of a run."""
    return call("train", *words, config=run / "config.yaml", **options)


def parsed(folder: Path, name: str = "metrics.json") -> Any:
    return json.loads((folder / name).read_text())


def settings(folder: Path) -> Any:
    return yaml.safe_load((folder / "config.yaml").read_text())


def checkpoint(folder: Path) -> Any:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("data")
    train = write_shapes(folder / "train", num_images=6, seed=1, size=64)
    return Data(*train, *write_shapes(folder / "val", num_images=3, seed=2, size=64))


@pytest.fixture(scope="module")
def run(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps."""
    out = tmp_path_factory.mktemp("runs") / "a"
    code = call(
        "train",
        *data.options(),
        *SMALL,
        "--model.convention=torchvision",
        "--model.box_score_threshold=0.001",
        f"--model.max_detections={MAX_DETECTIONS}",
        "--train.steps=4",
        "--train.checkpoint_every=2",
        "--train.schedule=constant",  # so that the steps of a shorter run are the first of this one
        "--train.precision=bf16",
        preset="tiny",
        out=out,
    )
    assert code == 0
    return out


def test_train_leaves_a_whole_run(run: Path) -> None:
    names = {"checkpoint.pt", "config.yaml", "log.jsonl", "metrics.json", "pictures", "results.json"}
    assert {item.name for item in run.iterdir()} == names
    names = {"overview.png", "1-000000.png", "2-000001.png", "3-000002.png"}
    assert {item.name for item in (run / "pictures").iterdir()} == names
    config = settings(run)
    assert config["model"]["num_classes"] == len(CLASSES) + 1
    assert config["model"]["convention"]["roi_aligned"] is False
    assert set(parsed(run)) >= {"bbox/AP", "segm/AP", f"segm/AP/{CLASSES[0]}"}
    assert [row["step"] for row in read_log(run / "log.jsonl")] == [2, 4, 4]


def detections(folder: Path) -> list[tuple[Any, ...]]:
    """What results.json holds, but for the masks."""
    rows = parsed(folder, "results.json")
    return [(row["image_id"], row["category_id"], row["score"], *row["bbox"]) for row in rows]


# Few detections warn, which docs/bad-input.md is about.
few_detections = pytest.mark.filterwarnings("ignore:.* 3 images hold more than", "ignore:. of . images give exactly")


@few_detections
def test_eval_repeats_the_figures_of_training(
    run: Path, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    metrics = Mock(wraps=evaluate.coco_metrics)
    monkeypatch.setattr(evaluate, "coco_metrics", metrics)
    assert evaluated(run, data, out=tmp_path) == 0
    assert "all classes" in capsys.readouterr().out
    assert parsed(tmp_path) == pytest.approx(parsed(run), abs=1e-9)
    # AP is next to 0 after four steps, so what is found must agree too, one by one.
    found, trained = detections(tmp_path), detections(run)
    assert len(trained) == 3 * MAX_DETECTIONS
    assert len({round(row[2], 4) for row in trained}) > 20
    assert [row[:2] for row in found] == [row[:2] for row in trained]
    for ours, theirs in zip(found, trained, strict=True):
        assert ours[2:] == pytest.approx(theirs[2:], abs=1e-4)
    limited = tmp_path / "limited"
    evaluated(run, data, out=limited, max_detections=1)
    assert [row[0] for row in detections(limited)] == [1, 2, 3]
    cuts = [call.kwargs["max_detections"] for call in metrics.call_args_list]
    assert cuts == [TrainConfig().eval_max_detections, 1]


@few_detections
def test_predict_gives_the_detections_of_the_evaluation(run: Path, data: Data, tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint": run / "checkpoint.pt", "images": data.val_images, "score_threshold": 0}
    assert call("predict", **options, out=tmp_path) == 0
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 3
    results, expected = parsed(tmp_path, "predictions.json"), parsed(run, "results.json")
    assert [row["score"] for row in results] == pytest.approx([row["score"] for row in expected], abs=1e-4)
    assert {row["file_name"] for row in results if row["image_id"] == 1} == {"000000.png"}


def losses(folder: Path) -> list[Any]:
    """Step, rate and losses of each row of the log."""
    rows = [row for row in read_log(folder / "log.jsonl") if "loss" in row]
    return [{name: value for name, value in row.items() if name in ("step", "lr") or "loss" in name} for row in rows]


def test_saved_config_repeats_the_run_and_resume_goes_on(run: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "b"
    assert trained_again(run, "--train.steps=2", out=out) == 0
    whole = losses(run)
    assert losses(out) == whole[:1]
    assert trained_again(run, out=out) == 2
    assert "holds a checkpoint" in capsys.readouterr().err
    assert trained_again(run, out=out, resume=out / "checkpoint.pt") == 0
    assert losses(out) == whole


def test_resume_of_a_finished_run_evaluates_it(run: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    (out / "metrics.json").unlink()
    assert trained_again(run, out=out, resume=out / "checkpoint.pt") == 0
    assert "all classes" in capsys.readouterr().out
    assert parsed(out) == pytest.approx(parsed(run), abs=1e-9)


def test_a_refused_resume_changes_no_file(run: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    before = files(out)
    assert trained_again(run, "--train.batch_size=3", out=out, resume=out / "checkpoint.pt") == 1
    assert "batch_size: 2 -> 3" in capsys.readouterr().err
    assert files(out) == before


def test_resume_needs_no_backbone_weights(data: Data, tmp_path: Path) -> None:
    weights, out = tmp_path / "imagenet.pth", tmp_path / "out"
    torch.save(ResNet("resnet10", norm="frozen_bn", trainable_layers=3).state_dict(), weights)
    words = [*data.options(), *SMALL, "--preset=tiny", "--model.norm=frozen_bn", "--model.trainable_layers=3"]
    named = f"--model.backbone_weights={weights}"
    assert call("train", *words, named, "--train.steps=1", out=out) == 0
    weights.unlink()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*random")
        for more in ([named, "--train.steps=2"], ["--train.steps=3"]):
            assert call("train", *words, *more, out=out, resume=out / "checkpoint.pt") == 0
    assert read_log(out / "log.jsonl")[-1]["step"] == 3


def test_config_files_round_trip(run: Path, capsys: Any) -> None:
    assert cli.main(["train", "--config", str(run / "config.yaml"), "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    saved = settings(run)
    assert {name: printed[name] for name in saved} == saved


def printed_config(capsys: Any, *options: str) -> dict[str, Any]:
    assert cli.main(["train", *options, "--print_config"]) == 0
    config: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return config


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_give_the_defaults(preset: str, capsys: Any) -> None:
    config = printed_config(capsys, "--preset", preset)
    assert config["preset"] == preset
    assert config["model"]["min_size"] == PRESETS[preset].min_size
    assert config["model"]["backbone"] == PRESETS[preset].backbone
    assert config["model"]["num_classes"] is None
    assert config["train"]["lr"] == TRAIN_PRESETS[preset].lr


DEFAULT_KEYPOINTS = json.loads(json.dumps(dataclasses.asdict(KeypointConfig())))
# Text of a config file (the preset is tiny), options, and where the settings have what. YAML reads off as false.
GIVEN: list[tuple[str, list[str], str, object]] = [
    ("train: {steps: 7}", ["--train.steps", "9"], "train.steps", 9),
    ("model: {min_size: 100}", ["--train.steps=9"], "model.min_size", 100),
    (
        "model: {convention: torchvision}",
        ["--model.convention.roi_sampling_ratio=3"],
        "model.convention",
        vars(CONVENTIONS["torchvision"]) | {"roi_sampling_ratio": 3},
    ),
    ("", ["--model.convention=torchvision"], "model.convention", vars(CONVENTIONS["torchvision"])),
    ("", ["--model.anchor_sizes=[[8],[16],[32],[64],[128]]"], "model.anchor_sizes", [[8], [16], [32], [64], [128]]),
    ("data: {check: off}", [], "data.check", "off"),
    ("", ["--data.check", "off"], "data.check", "off"),
    ("", [], "data.check", None),
    (
        "model: {roi_extractor: {interpolation: bicubic, sampling_ratio: 2}}",
        ["--model.roi_extractor.aligned", "false"],
        "model.roi_extractor",
        vars(RoIExtractorConfig()) | {"interpolation": "bicubic", "sampling_ratio": 2, "aligned": False},
    ),
    ("", [], "model.keypoints", None),
    ("", ["--model.keypoints", "{}"], "model.keypoints", DEFAULT_KEYPOINTS),
    (
        "model: {keypoints: {names: [a, b], edges: [[0, 1]]}}",
        ["--model.keypoints.head_channels", "64"],
        "model.keypoints",
        DEFAULT_KEYPOINTS | {"names": ["a", "b"], "edges": [[0, 1]], "head_channels": 64},
    ),
]


@pytest.mark.parametrize(("text", "options", "name", "expected"), GIVEN)
def test_settings_are_given_by_file_and_option(
    text: str, options: list[str], name: str, expected: object, tmp_path: Path, capsys: Any
) -> None:
    """Options override the file, wherever they stand."""
    file = tmp_path / "c.yaml"
    file.write_text(f"preset: tiny\n{text}\n")
    config = printed_config(capsys, *options, "--config", str(file))
    assert config["preset"] == "tiny"
    group, _, field = name.partition(".")
    assert config[group][field] == expected
    assert printed_config(capsys, "--config", str(file), *options) == config


def test_a_keypoint_model_takes_its_skeleton_from_the_data(tmp_path: Path, capsys: Any) -> None:
    images, annotations = write_shapes(tmp_path / "corners", num_images=2, seed=1, size=64, variant="corners")
    paths = Data(images, annotations, images, annotations)
    options = [*SMALL, "--model.keypoints.head_channels=8", "--model.keypoints.head_layers=1", "--train.steps=1"]
    options += ["--model.box_score_threshold=0", "--model.max_detections=5", "--device=cpu"]
    assert call("train", *paths.options(), *options, preset="tiny", out=tmp_path / "out") == 0
    saved = settings(tmp_path / "out")["model"]["keypoints"]
    assert (saved["names"], saved["edges"]) == (list(KEYPOINTS), [list(edge) for edge in KEYPOINT_EDGES])
    assert "keypoints/AP50" in capsys.readouterr().out
    assert evaluated(tmp_path / "out", paths, out=tmp_path / "eval") == 0
    assert parsed(tmp_path / "eval") == parsed(tmp_path / "out")


def test_flip_pairs_reach_the_training_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orders = []

    def spy(*_: Any, flip_order: Any, **__: Any) -> Any:
        orders.append(flip_order)
        raise ValueError("seen enough")

    monkeypatch.setattr("tmask.data.transforms.train_transforms", spy)
    data = write_shapes(tmp_path / "corners", num_images=1, seed=1, size=64, variant="corners")
    options = [*Data(*data, *data).options(), "--model.keypoints.flip_pairs=[[0, 2]]"]
    assert call("train", *options, preset="tiny", out=tmp_path / "out") == 1
    assert orders == [(2, 1, 0, 3)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "usage: tmask COMMAND [options]"),
        ("trian", "tmask: error: unknown command 'trian': expected 'train'? (see tmask --help)"),
        ("train --out out", "tmask train: error: --data.train_images is required (see tmask train --help)"),
        (
            "train --data.train_images x --data.train_annotations y",
            "tmask train: error: --out is required: the folder of the run (see tmask train --help)",
        ),
        (
            "eval --images x --annotations y",
            "tmask eval: error: the following arguments are required: checkpoint (see tmask eval --help)",
        ),
    ],
)
def test_what_is_left_out_of_a_command_is_named(line: str, expected: str, capsys: Any) -> None:
    """Wrong values: docs/bad-input.md."""
    assert cli.main(line.split()) == 2
    assert capsys.readouterr().err.splitlines()[0] == expected


def test_a_preset_that_is_a_list_is_refused(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "c.yaml").write_text("preset: [tiny]")
    assert call("train", config=tmp_path / "c.yaml") == 2
    assert "error: --preset: expected 'tiny'?, got ['tiny'] (see" in capsys.readouterr().err


def test_debug_shows_the_traceback(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.pt").write_text("no checkpoint")
    monkeypatch.setenv("TMASK_DEBUG", "1")
    with pytest.raises(ValueError, match="a text that begins"):
        call("predict", checkpoint=tmp_path / "bad.pt", images=data.val_images, out=tmp_path)


def test_demo_leaves_pictures(tmp_path: Path, capsys: Any) -> None:
    sizes = {"steps": 1, "train_images": 2, "val_images": 2, "image_size": 64, "batch_size": 2}
    assert call("demo", out=tmp_path, **sizes) == 0
    out = capsys.readouterr().out
    assert "all classes" in out
    assert str(tmp_path / "pictures") in out
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 3


def help_of(command: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> tuple[str, dict[str, str]]:
    """The help of a command in a wide terminal, and the text of each option in its order."""
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main([command, "--help"]) == 0
    out: str = capsys.readouterr().out
    found = re.findall(r"^  (-\S.*?)(?: {2,}|\n {4,})(\S.*(?:\n {4,}\S.*)*)", out, re.MULTILINE)
    return out, {re.findall(r"--[\w.]+", names)[0]: " ".join(text.split()) for names, text in found}


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_option_has_a_sentence(command: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    out, texts = help_of(command, monkeypatch, capsys)
    assert [line for line in out.splitlines() if len(line) > 100] == []
    assert "<class" not in out
    assert "required" not in out
    assert {name: text for name, text in texts.items() if not re.fullmatch(r"[A-Z0-9].{10,}\.( \(.+\))?", text)} == {}
    assert re.match(rf"usage: tmask {command} ?", out)


def test_the_help_has_every_setting_with_its_bounds(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    _, texts = help_of("train", monkeypatch, capsys)
    nested = {"model.mask_transfer": MaskTransferConfig, "model.keypoints": KeypointConfig}
    for group, config in (GROUPS | nested).items():
        for name, hint in typing.get_type_hints(config, include_extras=True).items():
            if f"{group}.{name}" not in GROUPS and (group, name) != ("model", "num_classes"):
                text = texts[f"--{group}.{name}"]
                assert field_texts(config)[name] in text
                assert all(bound.expected in text for bound in bounds(hint)), text
                assert "default: " in text
    assert "(at least 1; default: 16)" in texts["--train.batch_size"]
    assert "(bce, focal; default: bce)" in texts["--model.losses.rpn_objectness"]


@pytest.mark.parametrize(
    ("command", "first"),
    [
        ("train", [f"--{name}" for name in COMMON]),
        ("eval", ["--checkpoint", "--images", "--annotations", "--out", "--plots", "--batch_size", "--device"]),
        ("predict", ["--checkpoint", "--images", "--out", "--overwrite", "--score_threshold", "--device"]),
        ("demo", ["--out", "--steps", "--batch_size", "--lr", "--device"]),
    ],
)
def test_common_options_come_first(
    command: str, first: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    _, texts = help_of(command, monkeypatch, capsys)
    assert [name for name in texts if name != "--help"][: len(first)] == first


def test_help_and_version(capsys: Any) -> None:
    for argv in (["--help"], ["--version"]):
        assert cli.main(argv) == 0
    out = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"  {name}" in out


def test_options_stay_where_the_source_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    options = [action.option_strings for action in train_parser("tiny")._actions]
    monkeypatch.setattr(inspect, "getsource", Mock(side_effect=OSError("could not get source code")))
    parser = train_parser("tiny")
    assert [action.option_strings for action in parser._actions] == options
    assert "--train.lr" in parser.format_help()


def test_eval_of_a_checkpoint_without_a_run(run: Path, data: Data, tmp_path: Path, capsys: Any) -> None:
    torch.save(checkpoint(run) | {"train_config": None}, tmp_path / "checkpoint.pt")
    assert evaluated(tmp_path, data) == 0
    assert "all classes" in capsys.readouterr().out


def test_a_run_begins_with_the_weights_of_another(run: Path, data: Data, tmp_path: Path, capsys: Any) -> None:
    """With a rate of 0 it ends with them too. It resumes without the file that it began with."""
    first, out = tmp_path / "checkpoint.pt", tmp_path / "out"
    shutil.copy(run / "checkpoint.pt", first)
    assert trained_again(run, "--train.lr=0", "--train.steps=1", out=out, init=first) == 0
    before, after = checkpoint(tmp_path), checkpoint(out)
    names = [name for name in before["model"] if "running_" not in name and "num_batches" not in name]
    assert all(torch.equal(before["model"][name], after["model"][name]) for name in names)
    assert after["step"] == 1
    first.unlink()
    again = {"out": out, "resume": out / "checkpoint.pt"}
    assert trained_again(run, "--train.lr=0", "--train.steps=2", **again) == 0
    capsys.readouterr()
    assert trained_again(run, "--train.lr=0", "--train.steps=2", **again, init=run / "checkpoint.pt") == 2
    assert "--init begins a run and --resume goes on with one" in capsys.readouterr().err


def test_masks_of_some_classes(data: Data, tmp_path: Path, capsys: Any) -> None:
    """From the command line to the figures, which `tmask eval` gives too."""
    out = tmp_path / "a"
    base = [*data.options(), *SMALL, "--preset=tiny", "--train.steps=1", "--data.mask_classes=disc, ring"]
    assert call("train", *base, "--model.mask_transfer.inputs=cls", out=out) == 0
    assert settings(out)["model"]["mask_transfer"]["inputs"] == "cls"
    saved = checkpoint(out)
    assert [item["name"] for item in saved["categories"] if not item.get("boxes_only")] == ["disc", "ring"]
    assert saved["model"]["roi_heads.mask_transfer.layers.0.weight"].shape == (16, 16)
    assert {"segm/AP_with_masks", "segm/AP_boxes_only", "bbox/AP75_boxes_only"} <= parsed(out).keys()
    assert evaluated(out, data, out=tmp_path / "e") == 0
    assert parsed(tmp_path / "e").keys() == parsed(out).keys()
    assert capsys.readouterr().out.count("classes of boxes only") == 4  # of boxes and of masks, twice
    assert evaluated(out, data, mask_classes="disc,square,triangle,star,ring") == 0
    assert "classes of boxes only" not in capsys.readouterr().out


@pytest.mark.parametrize("with_masks", [True, False], ids=["data with masks", "boxes alone"])
def test_a_detector_without_masks(
    with_masks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, capsys: Any
) -> None:
    """Keypoints included: nothing reads, draws, writes or evaluates a mask, and nothing is said of them."""
    images, file = write_shapes(tmp_path / "data", num_images=3, seed=1, size=64, variant="corners")
    if not with_masks:
        content = json.loads(file.read_text())
        for item in content["annotations"]:
            del item["segmentation"]
        file.write_text(json.dumps(content))
    drawn: list[Any] = []
    monkeypatch.setattr("tmask.visualize.draw._draw", lambda image, found, *_, **__: drawn.append(found) or image)
    for name in ("decode", "encode", "merge"):
        monkeypatch.setattr(f"pycocotools.mask.{name}", lambda *_: pytest.fail("a mask was used"))
    out, base = tmp_path / "a", ["--model.masks=false", "--model.keypoints.head_channels=8", "--data.min_crop=0.9"]
    data = Data(images, file, images, file)
    few = ["--train.steps=1", "--model.box_score_threshold=0", "--model.max_detections=5"]
    assert call("train", *data.options(), *SMALL, *base, *few, preset="tiny", out=out) == 0
    assert {name.split("/")[0] for name in parsed(out)} == {"bbox", "keypoints"}
    saved = checkpoint(out)
    assert saved["model_config"]["masks"] is settings(out)["model"]["masks"] is False
    assert not [name for name in saved["model"] if "mask" in name]
    assert "mask" not in (out / "log.jsonl").read_text()
    assert evaluated(out, data, out=tmp_path / "e") == 0
    assert parsed(tmp_path / "e") == parsed(out)
    assert "segm" not in capsys.readouterr().out
    options: dict[str, Any] = {"checkpoint": out / "checkpoint.pt", "images": images}
    assert call("predict", **options, score_threshold=0, out=tmp_path / "p") == 0
    rows = parsed(tmp_path / "p", "predictions.json")
    assert len(rows) == 15
    assert all(row.keys() == {*("image_id", "category_id", "bbox", "score", "keypoints", "file_name")} for row in rows)
    assert len(drawn) == 3 * 2 + 3
    assert not [found for found in drawn if found.masks is not None]
    told = [str(item.message) for item in recwarn if item.category is UserWarning]
    assert not [text for text in told if "max_detections" not in text]
    capsys.readouterr()
    assert evaluated(out, data, mask_classes="disc") == 2
    assert "--mask_classes: expected null, as the model has no masks, got 'disc'" in capsys.readouterr().err


def test_a_checkpoint_keeps_how_images_are_turned(tmp_path: Path, capsys: Any) -> None:
    """Quarter turns: read otherwise, an image is not of the size that the file says."""
    images, file = write_shapes(tmp_path / "data", num_images=2, seed=1, size=64)
    content = json.loads(file.read_text())
    for item in content["annotations"]:
        del item["segmentation"]  # of another size
    for item in content["images"]:
        item["width"] = 70
        (images / item["file_name"]).write_bytes(with_exif(np.zeros((70, 64, 3), np.uint8), "png", 6))
    file.write_text(json.dumps(content))
    data, out = Data(images, file, images, file), tmp_path / "a"
    base = [*data.options(), *SMALL, "--data.exif=true", "--train.steps=1", "--model.masks=false"]
    assert call("train", *base, preset="tiny", out=out) == 0
    options: dict[str, Any] = {"checkpoint": out / "checkpoint.pt", "images": images, "annotations": file}
    options["max_detections"] = 1000
    assert evaluated(out, data, out=tmp_path / "e") == call("predict", **options, out=tmp_path / "p") == 0
    assert parsed(tmp_path / "e") == parsed(out)
    assert evaluated(out, data, exif="false") == 1
    assert call("predict", **options, exif="false", out=tmp_path / "q") == 1
    saved = checkpoint(out)
    assert saved.pop("exif") is True  # as in a checkpoint from before it was kept
    torch.save(saved, out / "checkpoint.pt")
    assert evaluated(out, data) == call("predict", **options, out=tmp_path / "r") == 1
    assert capsys.readouterr().err.count("expected 70x64 pixels by") == 2 + 2 + 2 + 2
    assert evaluated(out, data, exif="true") == 0


def test_precision_is_that_of_training_where_the_device_has_it() -> None:
    cpu = torch.device("cpu")
    for given, trained, expected in ((None, "bf16", "bf16"), (None, "fp16", "fp32"), ("fp32", "bf16", "fp32")):
        assert precision_of(cpu, given, {"train_config": {"precision": trained}}) == expected
    assert precision_of(cpu, None, {"train_config": None}) == "fp32"


def test_options_are_a_contract() -> None:
    assert " ".join(sorted(cli.COMMANDS)) == "ablate bench convert demo eval info predict train validate"
    options = {
        option
        for action in train_parser("tiny")._actions
        for option in action.option_strings
        if not option.startswith(("--model.", "--data.", "--train."))
    }
    names = ["help", "config", "print_config", "preset", "out", "device", "init", "resume", "overwrite"]
    assert options == {"-h", *(f"--{name}" for name in [*names, "model", "data", "train"])}
