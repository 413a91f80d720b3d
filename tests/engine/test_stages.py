"""Stage-wise training: the masks learn on a detector that stays as it is; and data without masks."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import tmask
from tests.engine.toy import CONFIG
from tests.model.conftest import SMALL, images_and_targets
from tmask.config import DataConfig
from tmask.data.coco import CocoDataset
from tmask.data.loader import make_loader
from tmask.data.shapes import CLASSES, KEYPOINTS, write_shapes
from tmask.engine.checkpoint import CheckpointError, load_initial, load_model, save_checkpoint
from tmask.engine.run import run_training
from tmask.engine.state import TrainState
from tmask.engine.train import train

MASKS = dataclasses.replace(CONFIG, only="masks", steps=2, ema_decay=0.5, eval_every=1)
KEYPOINT_HEAD = {"names": KEYPOINTS, "head_channels": 16, "head_layers": 1}
C4 = {"neck": "c4", "norm": "gn", "anchor_sizes": ((8.0, 16.0),), "mask_head_layers": 0, "mask_head_channels": 32}
MASK_PARTS = ("roi_heads.mask_head.", "roi_heads.mask_transfer.")


def build(seed: int = 0, **settings: Any) -> tmask.MaskRCNN:
    torch.manual_seed(seed)
    return tmask.build_model("tiny", **{"num_classes": 4, **SMALL, "mask_transfer": {}, **settings})


def copy_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def run(model: tmask.MaskRCNN, out: Path, config: Any = MASKS, **options: Any) -> Any:
    images, targets = model.transform(*images_and_targets())
    batch = SimpleNamespace(images=images, targets=targets)

    def measure(averaged: tmask.MaskRCNN) -> dict[str, float]:
        averaged.eval()
        return {"bbox/AP": 0.0}

    return train(model, [batch], config, out_dir=out, device="cpu", evaluate_fn=measure, **options)


def test_the_detector_stays_as_it_is_and_the_masks_learn(tmp_path: Path) -> None:
    model = build(mask_fusion_layers=1)
    before = copy_of(model)
    result = run(model, tmp_path)
    for after in (model.state_dict(), result.model.state_dict()):
        moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
        assert moved == {name for name in before if name.startswith(MASK_PARTS)}
    assert "backbone.bn1.running_mean" in before
    assert model.training
    assert model.rpn.training, "as many proposals as in training"
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert len(saved["optimizer"]["state"]) == sum(1 for name in before if name.startswith(MASK_PARTS))
    everything = dataclasses.replace(MASKS, only=None)
    with pytest.raises(CheckpointError, match="cannot resume, the run differs: only: masks -> None"):
        run(build(mask_fusion_layers=1), tmp_path, everything, resume=result.checkpoint)
    for frozen in (model, result.model):
        with pytest.raises(ValueError, match=r"^only: expected 'masks', as the detector .* is frozen, got None$"):
            run(frozen, tmp_path / "new", everything)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("settings", [{}, C4, {"keypoints": KEYPOINT_HEAD}], ids=["fpn", "c4", "keypoints"])
def test_no_statistics_can_move_outside_the_mask_parts(settings: dict[str, Any]) -> None:
    """RPN and RoI heads themselves stay in training mode, for their limits; what they are made of does not."""
    model = build(**settings)
    model.freeze_detector()
    heads = model.roi_heads
    expected = {model, model.rpn, heads} | {module for part in heads.mask_parts() for module in part.modules()}
    assert {module for module in model.modules() if module.training} == expected
    assert not any(module.training for module in model.eval().modules())
    assert {module for module in model.train().modules() if module.training} == expected


@pytest.mark.slow
def test_everything_learns_otherwise(tmp_path: Path) -> None:
    model = build()
    before = copy_of(model)
    run(model, tmp_path, dataclasses.replace(MASKS, only=None))
    assert not [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])]


def saved(model: tmask.MaskRCNN, path: Path, *names: str) -> Path:
    categories = [{"id": label, "name": name} for label, name in enumerate(names, start=1)]
    save_checkpoint(path, TrainState(model, CONFIG, torch.device("cpu"), categories).content())
    return path


def test_the_second_stage_begins_with_the_detector_of_the_first(tmp_path: Path) -> None:
    """Of the mask branch it takes the tower, and, as they are of no use to it, not the predictors of the classes."""
    first, second = build(mask_transfer=None), build(seed=1, mask_fusion_layers=1)
    own, trained = copy_of(second), first.state_dict()
    load_initial(second, saved(first, tmp_path / "first.pt"))
    after = second.state_dict()
    for name in trained.keys() - {f"roi_heads.mask_head.predictor.{part}" for part in ("weight", "bias")}:
        assert torch.equal(after[name], trained[name])
    for name in after.keys() - trained.keys():
        assert torch.equal(after[name], own[name])


class BegunError(Exception):
    pass


def begun() -> None:
    raise BegunError


@pytest.mark.parametrize(
    ("first", "second", "first_kept"),
    [
        ({"num_classes": 4}, {}, "box_head.classifier.weight and 3 more"),
        ({}, {"losses": {"classifier": "sigmoid_focal"}}, "box_head.classifier.weight and 1 more"),
        ({}, {"keypoints": KEYPOINT_HEAD}, "keypoint_head.convs.0.weight and 3 more"),
        ({"mask_transfer": None}, {"mask_fusion_layers": 1}, None),
    ],
    ids=["other classes", "another classifier", "keypoints", "other masks"],
)
def test_no_layer_is_frozen_that_nothing_was_read_for(
    first: dict[str, Any], second: dict[str, Any], first_kept: str | None, tmp_path: Path
) -> None:
    dataset = CocoDataset(*write_shapes(tmp_path / "data", num_images=2, seed=1, size=64, variant="corners"))
    settings = {"num_classes": len(CLASSES) + 1}
    path = saved(build(**settings | first), tmp_path / "first.pt")
    config = build(**settings | second).config
    options: dict[str, Any] = {"out_dir": tmp_path, "device": torch.device("cpu"), "init": path, "on_start": begun}
    expected: Any = pytest.raises(BegunError)
    if first_kept is not None:
        message = f"first.pt: expected all weights .* only the masks learn, got none that fit roi_heads.{first_kept}"
        expected = pytest.raises(ValueError, match=message)
    with expected:
        run_training(config, MASKS, DataConfig(num_workers=0), dataset, None, **options)
    with pytest.raises(BegunError):
        run_training(config, CONFIG, DataConfig(num_workers=0), dataset, None, **options)
    with pytest.raises(ValueError, match="init: expected the checkpoint of a detector, as only='masks', got none"):
        run_training(config, MASKS, DataConfig(num_workers=0), dataset, None, **options | {"init": None})


def test_classes_in_another_order_are_not_frozen_either(tmp_path: Path, capsys: Any) -> None:
    """Their layers would fit, and every label be wrong."""
    dataset = CocoDataset(*write_shapes(tmp_path / "data", num_images=2, seed=1, size=64))
    first = build(num_classes=len(CLASSES) + 1)
    path = saved(first, tmp_path / "first.pt", *reversed(CLASSES))
    options: dict[str, Any] = {"out_dir": tmp_path, "device": torch.device("cpu"), "init": path, "on_start": begun}
    why = rf"box_head.classifier.weight and 3 more \(label 1 is '{CLASSES[-1]}' there and '{CLASSES[0]}' here\)"
    with pytest.raises(ValueError, match=f"first.pt: expected all weights .*, got none that fit roi_heads.{why}"):
        run_training(first.config, MASKS, DataConfig(num_workers=0), dataset, None, **options)
    with pytest.raises(BegunError):
        run_training(first.config, CONFIG, DataConfig(num_workers=0), dataset, None, **options)
    assert re.fullmatch(f"init .*first.pt: begins anew: roi_heads.{why}\n", capsys.readouterr().err)


def test_a_checkpoint_holds_the_transfer_and_the_fusion(tmp_path: Path) -> None:
    model = build(mask_fusion_layers=1, mask_transfer={"inputs": "box", "layers": 1})
    path = saved(model, tmp_path / "a.pt")
    loaded, _ = load_model(path)
    assert loaded.config == model.config
    images = images_and_targets()[0]
    with torch.no_grad():
        for found, expected in zip(loaded(images), model.eval()(images), strict=True):
            assert torch.equal(found["masks"], expected["masks"])
    other = build(seed=1, mask_fusion_layers=1, mask_transfer={"inputs": "box", "layers": 1})
    load_initial(other, path)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
    classes = build(seed=1, mask_fusion_layers=1, mask_transfer={"inputs": "box", "layers": 1}, num_classes=7)
    load_initial(classes, path)
    assert torch.equal(classes.roi_heads.mask_transfer.layers[0].weight, model.roi_heads.mask_transfer.layers[0].weight)


@pytest.mark.parametrize("kept", [0, 1], ids=["none at all", "one of many"])
def test_a_data_set_with_next_to_no_mask_trains(kept: int, tmp_path: Path) -> None:
    images, annotations = write_shapes(tmp_path / "data", num_images=2, seed=1, size=64)
    content = json.loads(annotations.read_text())
    for item in content["annotations"][kept:]:
        del item["segmentation"]
    annotations.write_text(json.dumps(content))
    dataset = CocoDataset(images, annotations)
    model = build(num_classes=len(CLASSES) + 1)
    (batch,) = make_loader(dataset, model.transform, batch_size=2, shuffle=False)
    assert batch.targets.has_mask.sum() == kept
    losses = model.forward_padded(batch.images, batch.targets)
    torch.stack(list(losses.values())).sum().backward()
    assert (losses["loss_mask"] == 0) == (kept == 0)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
