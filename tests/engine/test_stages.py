"""Stage-wise training: the masks learn on a detector that stays as it is."""

import copy
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tmask
from tests.engine.toy import CONFIG, CPU, BrokenError, after, toy
from tests.model.conftest import NECKS, images_and_targets, small
from tmask.config import DataConfig
from tmask.data.coco import CocoDataset
from tmask.data.shapes import CLASSES, KEYPOINTS, write_shapes
from tmask.engine.checkpoint import CheckpointError, save_checkpoint
from tmask.engine.loop import fit
from tmask.engine.state import TrainState
from tmask.engine.train import train

MASKS = toy(only="masks", steps=2, ema_decay=0.5, eval_every=1)
EVERYTHING = toy(steps=2, ema_decay=0.5, eval_every=1)
KEYPOINT_HEAD = {"names": KEYPOINTS, "head_channels": 16, "head_layers": 1}
MASK_PARTS = ("roi_heads.mask_head.", "roi_heads.mask_transfer.")
ALL_CLASSES = {"num_classes": len(CLASSES) + 1}


def build(**settings: Any) -> tmask.MaskRCNN:
    return small(**{"mask_transfer": {}, **settings})


def run(model: tmask.MaskRCNN, out: Path, config: Any = MASKS, **options: Any) -> Any:
    images, targets = model.transform(*images_and_targets())

    def measure(averaged: tmask.MaskRCNN) -> dict[str, float]:
        averaged.eval()
        return {"bbox/AP": 0.0}

    batches = [SimpleNamespace(images=images, targets=targets)]
    return fit(model, batches, config, out_dir=out, device="cpu", evaluate_fn=measure, **options)


def test_the_detector_stays_as_it_is_and_the_masks_learn(tmp_path: Path) -> None:
    model = build(mask_fusion_layers=1)
    before = copy.deepcopy(model.state_dict())
    masks = {name for name in before if name.startswith(MASK_PARTS)}
    result = run(model, tmp_path)
    for after_run in (model.state_dict(), result.model.state_dict()):
        assert {name for name, tensor in after_run.items() if not torch.equal(tensor, before[name])} == masks
    assert "backbone.bn1.running_mean" in before
    assert model.training
    assert model.rpn.training, "as many proposals as in training"
    assert len(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["optimizer"]["state"]) == len(masks)
    with pytest.raises(CheckpointError, match="cannot resume, the run differs: only: masks -> None"):
        run(build(mask_fusion_layers=1), tmp_path, EVERYTHING, resume=result.checkpoint)
    for frozen in (model, result.model):
        with pytest.raises(ValueError, match=r"^only: expected 'masks', as the detector .* is frozen, got None$"):
            run(frozen, tmp_path / "new", EVERYTHING)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("settings", [{}, NECKS["c4"], {"keypoints": KEYPOINT_HEAD}], ids=["fpn", "c4", "keypoints"])
def test_no_statistics_can_move_outside_the_mask_parts(settings: dict[str, Any]) -> None:
    """RPN and RoI heads themselves stay in training mode, for their limits; their children do not."""
    model = build(**settings)
    model.freeze_detector()
    heads = model.roi_heads
    expected = {model, model.rpn, heads} | {module for part in heads.mask_parts() for module in part.modules()}
    assert {module for module in model.modules() if module.training} == expected
    assert not any(module.training for module in model.eval().modules())
    assert {module for module in model.train().modules() if module.training} == expected


def saved(model: tmask.MaskRCNN, path: Path, *names: str) -> Path:
    categories = [{"id": label, "name": name} for label, name in enumerate(names, start=1)]
    save_checkpoint(path, TrainState(model, CONFIG, CPU, categories).content())
    return path


@pytest.mark.parametrize(
    ("first", "second", "names", "fault"),
    [
        ({"num_classes": 4}, {}, (), "box_head.classifier.weight and 3 more"),
        ({}, {"keypoints": KEYPOINT_HEAD}, (), "keypoint_head.convs.0.weight and 3 more"),
        ({"mask_transfer": None}, {"mask_fusion_layers": 1}, (), None),
        # Their layers would fit, and every label be wrong.
        ({}, {}, tuple(reversed(CLASSES)), "box_head.classifier.weight and 3 more (label 1 is {} there and {} here)"),
    ],
    ids=["other classes", "keypoints", "other masks", "another order"],
)
@pytest.mark.filterwarnings("ignore:init .* left out, as the model has no such part:UserWarning")
def test_no_layer_is_frozen_that_nothing_was_read_for(
    first: dict[str, Any], second: dict[str, Any], names: tuple[str, ...], fault: Any, tmp_path: Path, capsys: Any
) -> None:
    dataset = CocoDataset(*write_shapes(tmp_path / "data", num_images=2, seed=1, size=64, variant="corners"))
    path = saved(build(**ALL_CLASSES | first), tmp_path / "first.pt", *names)
    config = build(**ALL_CLASSES | second).config

    def begin(training: Any, init: Path | None = path) -> None:
        options: dict[str, Any] = {"out_dir": tmp_path, "device": CPU, "on_start": after(0, lambda: None)}
        train(config, training, DataConfig(num_workers=0), dataset, None, init=init, **options)

    expected: Any = pytest.raises(BrokenError)
    if fault is not None:
        fault = f"roi_heads.{fault.format(repr(CLASSES[-1]), repr(CLASSES[0]))}"
        message = f"first.pt: expected all weights of the detector, as only the masks learn, got none that fit {fault}"
        expected = pytest.raises(ValueError, match=f"{re.escape(message)}$")
    with expected:
        begin(MASKS)
    capsys.readouterr()
    with pytest.raises(BrokenError):
        begin(CONFIG)
    if names:
        assert f"init {path}: begins anew: {fault}" in capsys.readouterr().err
    with pytest.raises(ValueError, match="init: expected the checkpoint of a detector, as only='masks', got none"):
        begin(MASKS, init=None)
