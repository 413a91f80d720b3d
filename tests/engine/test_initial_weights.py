"""Weights a run begins with: of a checkpoint or of torchvision, of the same classes or others."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

import tmask
from tmask.config import TrainConfig
from tmask.engine.checkpoint import load_initial, save_checkpoint
from tmask.engine.state import TrainState
from tmask.weights import CLASS_LAYERS

HEAD: dict[str, Any] = {"head_channels": 8, "head_layers": 1}  # of keypoints
SMALL: dict[str, Any] = {"fpn_channels": 16, "box_head_dim": 16, "mask_head_channels": 16, "mask_head_layers": 1}


def model(seed: int, num_classes: int = 4, **settings: Any) -> tmask.MaskRCNN:
    torch.manual_seed(seed)
    return tmask.build_model("tiny", num_classes, **SMALL | settings)


def saved(
    path: Path, *, ema: bool = False, categories: Any = (), **settings: Any
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint and the weights in it that a new run is to begin with."""
    trained = model(0, **settings)
    state = TrainState(trained, TrainConfig(ema_decay=0.5 if ema else 0.0), torch.device("cpu"), categories)
    if state.average is not None:
        state.average.update()
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(1.0)  # the average stays behind
    save_checkpoint(path, state.content())
    return path, state.best_model().state_dict()


def equal_names(a: dict[str, Any], b: dict[str, Any]) -> set[str]:
    return {name for name in a if a[name].shape == b[name].shape and torch.equal(a[name], b[name])}


@pytest.mark.parametrize("ema", [False, True], ids=["plain", "averaged"])
def test_a_checkpoint_of_the_same_classes(ema: bool, tmp_path: Path) -> None:
    path, weights = saved(tmp_path / "a.pt", ema=ema)
    new = model(1)
    assert equal_names(weights, new.state_dict()) != weights.keys()
    load_initial(new, path)
    assert equal_names(weights, new.state_dict()) == weights.keys()


def test_a_keypoint_head_begins_anew_where_there_is_none(tmp_path: Path) -> None:
    path, weights = saved(tmp_path / "a.pt")
    new = model(1, keypoints=HEAD)
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    load_initial(new, path)
    after = new.state_dict()
    own = {name for name in after if name.startswith("roi_heads.keypoint_head.")}
    assert len(own) == 4
    assert equal_names(before, after) >= own
    assert equal_names(weights, after) == weights.keys() == after.keys() - own


def test_a_keypoint_head_is_left_out_where_there_is_no_place(tmp_path: Path) -> None:
    path, weights = saved(tmp_path / "a.pt", keypoints=HEAD)
    new = model(1)
    with pytest.warns(UserWarning, match=r"no such part: roi_heads.keypoint_head.convs.0.weight and 3 more$"):
        assert load_initial(new, path) == {}
    own = new.state_dict()
    assert own.keys() == {name for name in weights if not name.startswith("roi_heads.keypoint_head.")}
    assert equal_names(own, weights) == own.keys()


def test_masks_begin_anew_where_there_are_none(tmp_path: Path) -> None:
    path, weights = saved(tmp_path / "a.pt", masks=False)
    new = model(1)
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    kept = load_initial(new, path)
    masks = {name for name in before if name.startswith("roi_heads.mask_head.")}
    assert kept == dict.fromkeys(sorted(masks), "there are no masks there")
    assert equal_names(before, new.state_dict()) >= masks
    assert equal_names(weights, new.state_dict()) == weights.keys()


@pytest.mark.parametrize("settings", [{"masks": True}, {"mask_transfer": {}}, {"mask_head": "mlp"}], ids=str)
def test_masks_are_left_out_where_there_is_no_place(settings: dict[str, Any], tmp_path: Path) -> None:
    path, weights = saved(tmp_path / "a.pt", **settings)
    new = model(1, masks=False)
    with pytest.warns(UserWarning, match=r"^init .*a.pt: left out, as the model has no such part: roi_heads.mask_"):
        assert load_initial(new, path) == {}
    own = new.state_dict()
    assert equal_names(own, weights) == own.keys()


def test_other_keypoints_keep_their_own_last_layer(tmp_path: Path) -> None:
    path, weights = saved(tmp_path / "a.pt", keypoints=HEAD)
    last = {f"roi_heads.keypoint_head.deconv.{part}" for part in ("weight", "bias")}
    same = model(1, keypoints=HEAD)
    assert load_initial(same, path) == {}
    assert equal_names(weights, same.state_dict()) == weights.keys()
    new = model(1, keypoints={**HEAD, "names": ("top", "tail")})
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    assert set(load_initial(new, path)) == last
    assert equal_names(before, new.state_dict()) >= last
    assert equal_names(weights, new.state_dict()) == weights.keys() - last
    with pytest.raises(ValueError, match=r"weights do not fit the model: .*keypoint_head.convs.0.weight"):
        load_initial(model(1, keypoints={**HEAD, "head_channels": 4}), path)


def test_other_classes_keep_their_own_layers(tmp_path: Path) -> None:
    path, weights = saved(tmp_path / "a.pt")
    new = model(1, num_classes=7)
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    load_initial(new, path)
    after = new.state_dict()
    own = {name for name in after if name.startswith(CLASS_LAYERS)}
    assert len(own) == 6
    assert equal_names(weights, after) == weights.keys() - own
    assert own <= equal_names(before, after)


def test_class_agnostic_masks_serve_other_classes(tmp_path: Path) -> None:
    path, weights = saved(tmp_path / "a.pt", mask_class_agnostic=True)
    new = model(1, num_classes=7, mask_class_agnostic=True)
    load_initial(new, path)
    masks = {name for name in weights if name.startswith("roi_heads.mask_head.")}
    assert masks <= equal_names(weights, new.state_dict())


CATS = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "cow"}]
BOX, MASK = (
    {f"roi_heads.{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    for layers in (("box_head.classifier", "box_head.regressor"), ("mask_head.predictor",))
)
KEYPOINTS = {**HEAD, "names": ("top", "tail")}
OTHERS = {
    "another order": ({}, {}, ("dog", "cat", "cow"), BOX | MASK, "label 1 is 'cat' there and 'dog' here"),
    "other names": ({}, {}, ("cat", "dog", "car"), BOX | MASK, "label 3 is 'cow' there and 'car' here"),
    "class-agnostic masks": (
        *({"mask_class_agnostic": True},) * 2,
        *(("dog", "cat", "cow"), BOX, "label 1 is 'cat' there and 'dog' here"),
    ),
    "another mask loss": ({}, {"losses": {"mask": "softmax"}}, ("cat", "dog", "cow"), MASK, "of another kind"),
    "other keypoints": (
        *({"keypoints": KEYPOINTS}, {"keypoints": {**HEAD, "names": ("tail", "top")}}, ("cat", "dog", "cow")),
        *({f"roi_heads.keypoint_head.deconv.{part}" for part in ("weight", "bias")}, "keypoints are others"),
    ),
    "other ids": ({}, {}, ("cat", "dog", "cow"), set(), ""),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_means_something_else_begins_anew_though_it_fits(case: str, tmp_path: Path) -> None:
    first, second, names, layers, why = OTHERS[case]
    path, weights = saved(tmp_path / "a.pt", categories=CATS, **first)
    new = model(1, **second)
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    kept = load_initial(new, path, [{"id": 10 * i, "name": name} for i, name in enumerate(names)])
    assert kept.keys() == layers
    assert all(why in reason and reason for reason in kept.values())
    assert equal_names(before, new.state_dict()) >= layers
    assert equal_names(weights, new.state_dict()) >= weights.keys() - layers
    if why.startswith("label"):
        assert load_initial(model(1, **second), path) == {}, "no names to compare: shapes decide"


@pytest.mark.parametrize(
    ("norm", "num_classes", "mask", "kept"),
    [("frozen_bn", 3, "softmax", MASK), ("bn", 91, "sigmoid", BOX | MASK)],
    ids=["frozen_bn, another mask loss", "bn, other classes"],
)
def test_torchvision(norm: str, num_classes: int, mask: str, kept: set[str], tmp_path: Path) -> None:
    layer = FrozenBatchNorm2d if norm == "frozen_bn" else torch.nn.BatchNorm2d
    theirs = MaskRCNN(resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=layer), num_classes)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    new = tmask.build_model("r18_fpn", 3, norm="frozen_bn", trainable_layers=5, losses={"mask": mask})
    assert load_initial(new, tmp_path / "theirs.pth").keys() == kept
    assert torch.equal(new.rpn.head.conv.weight, theirs.rpn.head.conv[0][0].weight)
    assert torch.equal(new.roi_heads.box_head.fc6.weight, theirs.roi_heads.box_head.fc6.weight)
    assert new.roi_heads.box_head.classifier.weight.shape == (3, 1024)


def test_a_faster_rcnn_gives_all_but_the_masks(tmp_path: Path) -> None:
    """In the form that torchvision's training script writes."""
    theirs = FasterRCNN(resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d), 3)
    content = {"model": theirs.state_dict(), "optimizer": {}, "args": argparse.Namespace(lr=0.02), "epoch": 25}
    torch.save(content, tmp_path / "model_25.pth")
    new = tmask.build_model("r18_fpn", 3, norm="frozen_bn", trainable_layers=5)
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    kept = load_initial(new, tmp_path / "model_25.pth")
    assert kept.keys() == {name for name in before if name.startswith("roi_heads.mask_head.")}
    assert equal_names(before, new.state_dict()) >= kept.keys()
    assert torch.equal(new.roi_heads.box_head.classifier.weight, theirs.roi_heads.box_predictor.cls_score.weight)
    with pytest.raises(ValueError, match=r"another model: backbone: resnet18 -> resnet10; box_head_dim: 1024 -> 16; "):
        load_initial(model(0), tmp_path / "model_25.pth")


@pytest.mark.parametrize("wrap", ["bare", "compiled", "DataParallel", "Lightning", "average", "before PyTorch 1.6"])
def test_a_state_dict_of_ours(wrap: str, tmp_path: Path) -> None:
    trained = model(0, keypoints=HEAD)
    weights = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    content: Any = weights
    if wrap == "compiled":
        content = torch.compile(trained).state_dict()
    elif wrap == "DataParallel":
        content = {"net": torch.nn.DataParallel(trained).state_dict(), "args": argparse.Namespace()}
    elif wrap == "Lightning":
        content = {"state_dict": {f"model.{name}": tensor for name, tensor in weights.items()}, "hyper_parameters": {}}
    elif wrap == "average":
        average = torch.optim.swa_utils.AveragedModel(trained)
        content = {"model": model(1, keypoints=HEAD).state_dict(), "model_ema": average.state_dict()}
    torch.save(content, tmp_path / "own.pth", _use_new_zipfile_serialization=wrap != "before PyTorch 1.6")
    new = model(1, keypoints=HEAD)
    assert load_initial(new, tmp_path / "own.pth", CATS) == {}
    assert equal_names(weights, new.state_dict()) == weights.keys()
    other = model(1, num_classes=7)
    assert load_initial(other, tmp_path / "own.pth").keys() == BOX | MASK
    with pytest.raises(
        ValueError, match=r"names of torchvision's .*, got those of tmask's own model: use its load_stat"
    ):
        tmask.load_torchvision(content)


def test_torchvision_without_masks(tmp_path: Path) -> None:
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d)
    torch.save((theirs := FasterRCNN(backbone, 3)).state_dict(), tmp_path / "theirs.pth")
    bare, whole = (
        tmask.build_model("r18_fpn", 3, norm="frozen_bn", trainable_layers=5, masks=masks) for masks in (False, True)
    )
    assert load_initial(bare, tmp_path / "theirs.pth") == {}
    assert len(theirs.state_dict()) == len(bare.state_dict())
    kept = load_initial(whole, tmp_path / "theirs.pth")
    assert kept == dict.fromkeys(whole.state_dict().keys() - bare.state_dict().keys(), "there are no masks there")
    for new in (bare, whole):
        assert torch.equal(new.roi_heads.box_head.fc6.weight, theirs.roi_heads.box_head.fc6.weight)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.zeros(1)}, "init .*a.pt: expected a checkpoint or .*, got 1 other names, first 'a'"),
        ([1], "init .*a.pt: expected a checkpoint or .*, got a list"),
        (None, "init .*a.pt: expected a checkpoint or .*, got a truncated or damaged file"),
    ],
    ids=["other names", "a list", "damaged"],
)
def test_what_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    if content is None:
        (tmp_path / "a.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match=message):
        load_initial(model(0), tmp_path / "a.pt")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    path, _ = saved(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"init .*a.pt: the weights are of another model: fpn_channels: 16 -> 32$"):
        load_initial(model(1, fpn_channels=32), path)
