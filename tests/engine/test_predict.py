"""Prediction on files: what one bad file, or an early end, leaves of the others."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tmask
from tmask import cli
from tmask.data.shapes import CLASSES, write_shapes
from tmask.engine.checkpoint import FORMAT, VERSION, save_checkpoint
from tmask.engine.predict import predict

CATEGORIES = [{"id": 10 * label, "name": name} for label, name in enumerate(CLASSES, start=1)]


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    small = {"min_size": 64, "max_size": 64, "fpn_channels": 16, "box_head_dim": 16, "mask_head_channels": 16}
    return tmask.build_model("tiny", len(CLASSES) + 1, **small, max_detections=5, box_score_threshold=1e-6)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    folder, _ = write_shapes(tmp_path / "shapes", num_images=4, seed=0, size=64)
    return sorted(folder.iterdir())


def seen(out: Path) -> list[tuple[int, str]]:
    """Image ids and files of predictions.json."""
    return sorted({(row["image_id"], row["file_name"]) for row in json.loads((out / "predictions.json").read_text())})


def test_unreadable_images_are_named_when_the_others_are_done(
    model: Any, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = dict.fromkeys(("ema", "optimizer", "scaler", "step", "epoch", "position", "rng", "train_config"))
    content |= {"format": FORMAT, "version": VERSION, "model": model.state_dict(), "categories": CATEGORIES}
    content |= {"model_config": dataclasses.asdict(model.config)}
    save_checkpoint(tmp_path / "a.pt", content)
    images[0].write_text("no image")
    images[2].write_bytes(images[2].read_bytes()[:100])
    out = tmp_path / "out"
    argv = ["predict", "--checkpoint", str(tmp_path / "a.pt"), "--images", str(images[0].parent), "--out", str(out)]
    assert cli.main(argv) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "2 of 4 images left out (the 2 others are done" in err
    assert all((str(images[i]) in err) == (i in (0, 2)) for i in range(4))
    # An image's number is its place in the list, whatever happens to the others.
    assert seen(out) == [(2, images[1].name), (4, images[3].name)]
    assert sorted(path.name for path in out.glob("*.png")) == [images[1].name, images[3].name]


def test_an_early_end_leaves_what_was_done(model: Any, images: list[Path], tmp_path: Path) -> None:
    def interrupt(module: Any, inputs: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    calls: list[int] = []
    model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        predict(model, images, CATEGORIES, out_dir=tmp_path / "out")
    assert seen(tmp_path / "out") == [(1, images[0].name), (2, images[1].name)]
