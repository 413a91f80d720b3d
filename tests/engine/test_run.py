"""What a run leaves in its folder, and what it does with what another one left there."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pycocotools import mask as coco_mask

from tests.allocations import peak_allocated
from tests.engine.predictions import make_model, pictures, touch
from tests.engine.toy import CPU, BrokenError, after, files
from tmask.config import DataConfig, TrainConfig
from tmask.data.coco import CocoDataset
from tmask.data.shapes import write_shapes
from tmask.engine import train as module
from tmask.engine.checkpoint import save_checkpoint
from tmask.engine.pictures import _run_lengths, draw_pictures
from tmask.engine.state import TrainState
from tmask_kernels import pack_masks

CONFIG = TrainConfig(steps=1, batch_size=2, precision="fp32")


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


def tiny() -> Any:
    return make_model(box_score_threshold=0.0)


def train(dataset: CocoDataset, out: Path, val: CocoDataset | None = None, **options: Any) -> Any:
    return module.train(
        tiny().config, CONFIG, DataConfig(num_workers=0), dataset, val or dataset, out_dir=out, device=CPU, **options
    )


def test_each_image_has_its_own_picture(dataset: CocoDataset, tmp_path: Path) -> None:
    paths = draw_pictures(make_model(), dataset, tmp_path / "pictures", device=CPU)
    assert [path.name for path in paths] == ["1-1.png", "2-1.png", "3-overview.png"]
    assert pictures(tmp_path) == [*sorted(path.name for path in paths), "overview.png"]


def test_metrics_come_last(dataset: CocoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is taken for done once it has them."""
    done = SimpleNamespace(model=None, metrics={"bbox/AP": 0.5}, checkpoint=Path("c.pt"), step=7)
    monkeypatch.setattr(module, "fit", lambda *_, **__: done)
    monkeypatch.setattr(module, "draw_pictures", after(0, lambda *_, **__: [], OSError("no space left")))
    with pytest.raises(OSError, match="no space") as error:
        train(dataset, tmp_path / "out")
    assert error.value.__notes__ == ["c.pt is the checkpoint of step 7"]
    assert not (tmp_path / "out" / "metrics.json").exists()
    train(dataset, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == {"bbox/AP": 0.5}


def test_masks_are_not_learnt_from_data_opened_without(dataset: CocoDataset, tmp_path: Path) -> None:
    bare = CocoDataset(dataset.images_folder, dataset.annotation_file, masks=False)
    with pytest.raises(ValueError, match=r"^masks: expected false, as the training data were opened without masks"):
        train(bare, tmp_path / "out")
    assert not (tmp_path / "out").exists()


OWN = ("metrics.json", "results.json", "pictures/1-1.png", "pictures/2-a.png", "pictures/overview.png")
FOREIGN = ("notes.txt", "data.json", "pictures/mine.png", "pictures/10-days.png")


@pytest.mark.parametrize(
    ("fresh", "stays"),
    [
        ("fresh", FOREIGN),
        ("init", (*FOREIGN, "checkpoint.pt")),
        ("no run there", (*FOREIGN, *OWN)),
        ("resume", (*FOREIGN, *OWN, "checkpoint.pt")),
    ],
)
def test_a_fresh_run_removes_what_would_be_taken_for_its_own(
    fresh: str, stays: tuple[str, ...], dataset: CocoDataset, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    touch(out, *OWN, *FOREIGN)
    if fresh != "no run there":
        save_checkpoint(out / "checkpoint.pt", TrainState(tiny(), CONFIG, CPU, dataset.categories).content())
    begins = {fresh: out / "checkpoint.pt"} if fresh in ("init", "resume") else {}
    with pytest.raises(BrokenError):
        train(dataset, out, on_start=after(0, lambda: None), **begins)
    assert {path.relative_to(out).as_posix() for path in files(out)} == set(stays)


def test_a_validation_set_of_other_ids_gives_the_same_figures(dataset: CocoDataset, tmp_path: Path) -> None:
    """Its results have its own ids, which int64 does not hold, and a class that it lacks has no AP."""
    content = json.loads(dataset.annotation_file.read_text())
    disc, *others = content["categories"]
    content["annotations"] = [item for item in content["annotations"] if item["category_id"] != disc["id"]]
    own = {item["id"]: 2**64 - item["id"] for item in others}
    variants = {"same ids": content, "other ids": json.loads(json.dumps(content))}
    variants["other ids"]["categories"] = [{"id": own[item["id"]], "name": item["name"]} for item in others]
    for item in variants["other ids"]["annotations"]:
        item["category_id"] = own[item["category_id"]]
    learnt = CocoDataset(dataset.images_folder, dataset.annotation_file, mask_classes="triangle,square")
    figures, results = {}, {}
    for name, variant in variants.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(variant))
        val = CocoDataset(dataset.images_folder, tmp_path / f"{name}.json")
        figures[name] = train(learnt, tmp_path / name, val).metrics
        results[name] = json.loads((tmp_path / name / "results.json").read_text())
    assert figures["other ids"] == figures["same ids"]
    assert figures["other ids"]["bbox/AP/disc"] == -1
    assert {"segm/AP_boxes_only", "segm/AP_with_masks"} <= figures["other ids"].keys()
    assert max(value for key, value in figures["other ids"].items() if key.startswith("bbox/AP/")) >= 0
    back = {new: old for old, new in own.items()}
    found = [item["category_id"] for item in results["other ids"]]
    assert set(found) & set(back)
    assert [back.get(number, 1) for number in found] == [item["category_id"] for item in results["same ids"]]


@pytest.mark.parametrize("packed", [True, False])
def test_masks_are_drawn_from_run_lengths(packed: bool) -> None:
    """The instances of a crowded image are never all held as bytes."""
    masks = torch.rand(5, 40, 70, generator=torch.Generator().manual_seed(0)) > 0.5
    runs = _run_lengths(pack_masks(masks) if packed else masks, 70)
    assert torch.equal(torch.from_numpy(coco_mask.decode(runs)).permute(2, 0, 1).bool(), masks)
    assert _run_lengths(torch.zeros(0, 40, 70), 70) == []
    many = torch.ones(1, 1, 1, dtype=torch.int32).expand(200, 640, 20)
    with peak_allocated() as peak:
        _run_lengths(many, 640)
    assert peak.bytes < 2**24  # of 82 MB
