"""``tmask convert``: torchvision's COCO weights as a checkpoint that predicts as torchvision's model does."""

import hashlib
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from torch import nn
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights
from torchvision.models.detection._utils import overwrite_eps
from torchvision.ops import FrozenBatchNorm2d
from torchvision.transforms.functional import to_pil_image

from tests.engine.toy import CPU, toy
from tests.model.test_torchvision_parity import calibrate, generated
from tests.test_weights import older, theirs
from tmask import build_model, cli, weights
from tmask.engine.checkpoint import CheckpointError, load_checkpoint, load_initial, load_model
from tmask.engine.state import TrainState
from tmask.weights import coco_categories, is_published


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return (generated()[0][0] * 255).to(torch.uint8)


@pytest.fixture(scope="module")
def model(image: torch.Tensor) -> nn.Module:
    """torchvision's Mask R-CNN of 91 classes, with an eps of 0 as it gives its published weights."""
    network = theirs(num_classes=91, frozen=True)
    for module in network.modules():
        if isinstance(module, FrozenBatchNorm2d):  # an eps of 1e-5 would take 0.3 of the signal
            module.running_var.fill_(1e-5)
            module.weight.fill_(1e-5**0.5)
    overwrite_eps(network, 0.0)
    calibrate(network, [image / 255])
    return network.eval()


@pytest.fixture
def file(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its weights under the older names, as the published file has, and that file's digest."""
    path = tmp_path / "renamed.pth"
    torch.save(older(model.state_dict()), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    published = SimpleNamespace(url=f"https://x/a_coco-{digest[:8]}.pth", meta=weights._PUBLISHED[0].meta)
    monkeypatch.setattr(weights, "_PUBLISHED", (published,))
    return path


def convert(*words: object) -> int:
    return cli.main(["convert", *map(str, words)])


def test_a_converted_checkpoint_predicts_as_torchvision(
    file: Path, model: nn.Module, image: torch.Tensor, tmp_path: Path, capsys: Any
) -> None:
    checkpoint, out = tmp_path / "coco.pt", tmp_path / "out"
    assert convert(file, "--out", checkpoint) == 0
    assert capsys.readouterr().out.startswith(f"{checkpoint}: resnet18, norm_eps 0, masks\n")
    to_pil_image(image).save(tmp_path / "a.png")
    words = ["predict", "--checkpoint", checkpoint, "--images", tmp_path / "a.png", "--out", out, "--device", "cpu"]
    with pytest.warns(UserWarning, match="exactly 100 detections"):
        assert cli.main([*map(str, words), "--no_pictures"]) == 0
    with torch.no_grad():
        (result,) = model([image / 255])
    found = json.loads((out / "predictions.json").read_text())
    assert len(found) == len(result["boxes"]) > 50
    names = {item["id"]: item["name"] for item in json.loads((out / "images.json").read_text())["categories"]}
    classes = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    for label in {item["category_id"] for item in found}:
        assert names[label] == classes[label] or (names[label], classes[label]) == (f"N/A {label}", "N/A")
    assert names[1] == "person"
    assert names[90] == "toothbrush"
    assert [item["category_id"] for item in found] == result["labels"].tolist()
    boxes = torch.tensor([item["bbox"] for item in found])
    boxes[:, 2:] += boxes[:, :2]
    torch.testing.assert_close(boxes, result["boxes"], rtol=0, atol=0.02)
    torch.testing.assert_close(torch.tensor([item["score"] for item in found]), result["scores"], rtol=0, atol=1e-4)
    masks = np.stack([rle.decode(item["segmentation"]) for item in found])
    assert ((result["masks"][:, 0] > 0.5).numpy() == masks).mean() > 0.9999


def test_published_files_are_known_by_their_digest(file: Path, tmp_path: Path) -> None:
    """Any other file keeps an eps of 1e-5; an option decides over both."""
    other = tmp_path / "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth"
    torch.save({"model": torch.load(file, weights_only=True)}, other)
    assert [is_published(path) for path in (file, other)] == [True, False]
    for number, (path, words, expected) in enumerate(
        [(file, [], 0.0), (other, [], 1e-5), (file, ["--norm_eps", "1e-3"], 1e-3)]
    ):
        assert convert(path, "--out", tmp_path / f"{number}.pt", *words) == 0
        assert load_checkpoint(tmp_path / f"{number}.pt")["model_config"]["norm_eps"] == expected


def test_no_run_goes_on_from_it(file: Path, tmp_path: Path) -> None:
    assert convert(file, "--out", tmp_path / "coco.pt") == 0
    state = TrainState(load_model(tmp_path / "coco.pt")[0], toy(), CPU, coco_categories())
    with pytest.raises(CheckpointError, match=r"coco\.pt: cannot resume, it is of a model alone: use --init"):
        state.restore(tmp_path / "coco.pt")


@pytest.mark.parametrize("form", ["published", "own training", "checkpoint"])
def test_settings_of_their_training_are_told(form: str, file: Path, tmp_path: Path) -> None:
    path, eps = file, " --model.norm_eps 0.0"
    if form == "own training":
        path, eps = tmp_path / "a.pth", ""
        torch.save({"model": torch.load(file, weights_only=True)}, path)
    elif form == "checkpoint":
        path = tmp_path / "coco.pt"
        assert convert(file, "--out", path) == 0
    settings: dict[str, Any] = {"norm": "frozen_bn", "warn_if_untrained": False}
    told = f"with other settings and fit those best: --model.convention torchvision{eps}$"
    with pytest.warns(UserWarning, match=told):
        load_initial(build_model("r18_fpn", 91, **settings), path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_initial(build_model("r18_fpn", 91, convention="torchvision", norm_eps=0.0, **settings), path)


def test_what_is_refused(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    torch.save(theirs(num_classes=4).state_dict(), tmp_path / "four.pth")
    monkeypatch.undo()  # the real addresses
    url = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.url
    data = [f"--data.train_{name}={file}" for name in ("images", "annotations")]
    there = f"no such file: no.pth; torchvision's COCO weights are {url} (see"
    classes = "four.pth: expected COCO's 91 classes with the background, got 4; see tmask.load_torchvision"
    new = tmp_path / "a.pt"
    for words, message, code in (
        (["convert", "no.pth", "--out", new], f"WEIGHTS: {there}", 2),
        (["train", "--out", tmp_path / "a", "--init", "no.pth", *data], f"--init: {there}", 2),
        (["convert", file, "--out", file], f"--out {file}: expected a new file, got one that exists (see", 2),
        (["convert", file], "the following arguments are required: out (see", 2),
        (["convert", tmp_path / "four.pth", "--out", new], classes, 1),
    ):
        assert cli.main([*map(str, words)]) == code
        assert message in capsys.readouterr().err
    assert not new.exists()
