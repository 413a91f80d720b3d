"""What a run leaves in its folder, and what it does with what another one left there."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engine.predictions import make_model, pictures
from tmask.config import DataConfig, TrainConfig
from tmask.data.coco import CocoDataset
from tmask.data.shapes import write_shapes
from tmask.engine import run
from tmask.engine.run import draw_pictures, run_training

CPU = torch.device("cpu")


@pytest.fixture
def dataset(tmp_path: Path) -> CocoDataset:
    """Three pictures, of which two share a name, and the third has that of the overview."""
    folder, annotations = write_shapes(tmp_path / "data", num_images=3, seed=1, size=64)
    content = json.loads(annotations.read_text())
    for item, name in zip(content["images"], ("a/1.png", "b/1.png", "overview.png"), strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / item["file_name"]).rename(folder / name)
        item["file_name"] = name
    annotations.write_text(json.dumps(content))
    return CocoDataset(folder, annotations)


def train(dataset: CocoDataset, out: Path, **options: Any) -> Any:
    options = {"out_dir": out, "device": CPU, **options}
    return run_training(
        make_model().config,
        TrainConfig(steps=1, precision="fp32"),
        DataConfig(num_workers=0),
        dataset,
        dataset,
        **options,
    )


def test_each_image_has_its_own_picture(dataset: CocoDataset, tmp_path: Path) -> None:
    paths = draw_pictures(make_model(), dataset, tmp_path / "pictures", device=CPU)
    assert [path.name for path in paths] == ["1-1.png", "2-1.png", "3-overview.png"]
    assert pictures(tmp_path) == [*sorted(path.name for path in paths), "overview.png"]


def test_metrics_come_last(dataset: CocoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is taken for done once it has them."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(run, "train", lambda *_, **__: SimpleNamespace(model=None, metrics={"bbox/AP": 0.5}))
    monkeypatch.setattr(run, "draw_pictures", full)
    with pytest.raises(OSError, match="no space"):
        train(dataset, tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.json").exists()
    monkeypatch.setattr(run, "draw_pictures", lambda *_, **__: [])
    train(dataset, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == {"bbox/AP": 0.5}
