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
from tests.engine.toy import CPU, toy
from tmask.engine.checkpoint import load_initial, save_checkpoint
from tmask.engine.state import TrainState
from tmask.weights import CLASS_LAYERS

HEAD: dict[str, Any] = {"head_channels": 8, "head_layers": 1}  # of keypoints
SMALL: dict[str, Any] = {"fpn_channels": 16, "box_head_dim": 16, "mask_head_channels": 16, "mask_head_layers": 1}
CATS = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "cow"}]
KEYPOINTS = {**HEAD, "names": ("top", "tail")}
TRANSFER: dict[str, Any] = {
    **{"mask_transfer": {"inputs": "box", "layers": 1}, "mask_fusion_layers": 1, "mask_pool_size": 7}
}
NO_MASKS, NO_PART = "there are no masks there", r"^init .*a.pt: left out, as the model has no such part: roi_heads."


def parameters(*layers: str) -> set[str]:
    """The names of weight and bias of some layers of the RoI heads."""
    return {f"roi_heads.{layer}.{part}" for layer in layers for part in ("weight", "bias")}


BOX, MASK = parameters("box_head.classifier", "box_head.regressor"), parameters("mask_head.predictor")
MASK_HEAD = MASK | parameters("mask_head.convs.0", "mask_head.deconv")
LAST_KEYPOINT = parameters("keypoint_head.deconv")
KEYPOINT_HEAD = LAST_KEYPOINT | parameters("keypoint_head.convs.0")


def model(seed: int, num_classes: int = 4, **settings: Any) -> tmask.MaskRCNN:
    torch.manual_seed(seed)
    return tmask.build_model("tiny", num_classes, **SMALL | settings)


def saved(
    path: Path, *, ema: bool = False, categories: Any = (), **settings: Any
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint and the weights in it that a new run is to begin with."""
    trained = model(0, **settings)
    state = TrainState(trained, toy(ema_decay=0.5 if ema else 0.0), CPU, categories)
    if state.average is not None:
        state.average.update()
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(1.0)  # the average stays behind
    save_checkpoint(path, state.content())
    return path, state.best_model().state_dict()


def equal_names(a: dict[str, Any], b: dict[str, Any]) -> set[str]:
    return {name for name in a if name in b and a[name].shape == b[name].shape and torch.equal(a[name], b[name])}


def load(new: tmask.MaskRCNN, path: Path, weights: dict[str, Any], *categories: Any) -> dict[str, str]:
    """What stays as it is, with the reasons; checks that this is so, and that all other weights are those of `path`."""
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    kept = load_initial(new, path, *categories)
    after = new.state_dict()
    assert equal_names(before, after) >= kept.keys()
    assert equal_names(after, weights) >= after.keys() - kept.keys()
    return kept


# What the checkpoint and the new model have, the categories of the new data, what begins anew, and why.
SAME = ("cat", "dog", "cow")
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...], set[str], str]] = {
    "the same": ({}, {}, SAME, set(), ""),
    "the average": ({"ema": True}, {}, SAME, set(), ""),
    "no keypoints there": ({}, {"keypoints": HEAD}, SAME, KEYPOINT_HEAD, ""),
    "no masks there": ({"masks": False}, {}, SAME, MASK_HEAD, NO_MASKS),
    "another order": ({}, {}, ("dog", "cat", "cow"), BOX | MASK, "label 1 is 'cat' there and 'dog' here"),
    "other names": ({}, {}, ("cat", "dog", "car"), BOX | MASK, "label 3 is 'cow' there and 'car' here"),
    "more classes": ({}, {"num_classes": 7}, (*SAME, "a", "b", "c"), BOX | MASK, "label 4 is None there and 'a' here"),
    "more classes, class-agnostic masks": (
        *({"mask_class_agnostic": True}, {"mask_class_agnostic": True, "num_classes": 7}),
        *((*SAME, "a", "b", "c"), BOX, "label 4 is None there and 'a' here"),
    ),
    "class-agnostic masks": (
        *({"mask_class_agnostic": True},) * 2,
        *(("dog", "cat", "cow"), BOX, "label 1 is 'cat' there and 'dog' here"),
    ),
    "another mask loss": ({}, {"losses": {"mask": "softmax"}}, SAME, MASK, "the masks are of another kind there"),
    "other keypoints": (
        *({"keypoints": KEYPOINTS}, {"keypoints": {**HEAD, "names": ("tail", "top")}}, SAME),
        *(LAST_KEYPOINT, "the keypoints are others there"),
    ),
    "the same keypoints": ({"keypoints": KEYPOINTS}, {"keypoints": KEYPOINTS}, SAME, set(), ""),
    "the same transfer of weights": (TRANSFER, TRANSFER, SAME, set(), ""),
    "more classes, a transfer of weights": (
        *(TRANSFER, TRANSFER | {"num_classes": 7}),
        *((*SAME, "a", "b", "c"), BOX, "label 4 is None there and 'a' here"),
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_fits_and_means_the_same_is_taken_over(case: str, tmp_path: Path) -> None:
    first, second, names, layers, why = OTHERS[case]
    path, weights = saved(tmp_path / "a.pt", categories=CATS, **first)
    categories = [{"id": 10 * i, "name": name} for i, name in enumerate(names)]
    assert load(model(1, **second), path, weights, categories) == dict.fromkeys(layers, why)
    if why.startswith("label"):  # without names to compare shapes decide
        assert load(model(1, **second), path, weights).keys() == (layers if "num_classes" in second else set())
        assert all(name.startswith(CLASS_LAYERS) for name in layers)


@pytest.mark.parametrize(
    ("first", "second", "left"),
    [
        ({"keypoints": HEAD}, {}, "keypoint_head.convs.0.weight and 3 more$"),
        ({}, {"masks": False}, "mask_"),
        ({"mask_transfer": {}}, {"masks": False}, "mask_"),
        ({"mask_head": "mlp"}, {"masks": False}, "mask_"),
        ({}, TRANSFER, "mask_head.predictor.weight and 1 more$"),  # the second stage of Mask^X R-CNN
    ],
    ids=["keypoints", "masks", "transfer", "mlp", "predictor"],
)
def test_a_head_is_left_out_where_there_is_no_place(
    first: dict[str, Any], second: dict[str, Any], left: str, tmp_path: Path
) -> None:
    path, weights = saved(tmp_path / "a.pt", **first)
    new = model(1, **second)
    with pytest.warns(UserWarning, match=NO_PART + left):
        kept = load(new, path, weights)
    assert kept.keys() == {name for name in new.state_dict() if ".mask_transfer." in name or ".fusion." in name}


def theirs(kind: type, num_classes: int = 3, norm: type = FrozenBatchNorm2d) -> torch.nn.Module:
    """A model of torchvision."""
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=norm)
    return kind(backbone, num_classes)  # type: ignore[no-any-return]


def ours(**settings: Any) -> tmask.MaskRCNN:
    """A model for its weights."""
    settings = {"convention": "torchvision", **settings}
    return tmask.build_model("r18_fpn", 3, norm="frozen_bn", trainable_layers=5, **settings)


@pytest.mark.parametrize(
    ("norm", "num_classes", "mask", "kept"),
    [(FrozenBatchNorm2d, 3, "softmax", MASK), (torch.nn.BatchNorm2d, 91, "sigmoid", BOX | MASK)],
    ids=["frozen_bn, another mask loss", "bn, other classes"],
)
def test_torchvision(norm: type, num_classes: int, mask: str, kept: set[str], tmp_path: Path) -> None:
    given: Any = theirs(MaskRCNN, num_classes, norm)
    torch.save(given.state_dict(), tmp_path / "theirs.pth")
    new = ours(losses={"mask": mask})
    assert load_initial(new, tmp_path / "theirs.pth").keys() == kept
    assert torch.equal(new.rpn.head.conv.weight, given.rpn.head.conv[0][0].weight)
    assert torch.equal(new.roi_heads.box_head.fc6.weight, given.roi_heads.box_head.fc6.weight)
    assert new.roi_heads.box_head.classifier.weight.shape == (3, 1024)


def test_a_faster_rcnn_gives_all_but_the_masks(tmp_path: Path) -> None:
    """In the form that torchvision's training script writes."""
    given: Any = theirs(FasterRCNN)
    path = tmp_path / "model_25.pth"
    torch.save({"model": given.state_dict(), "optimizer": {}, "args": argparse.Namespace(lr=0.02), "epoch": 25}, path)
    bare, whole = ours(masks=False), ours()
    masks = whole.state_dict().keys() - bare.state_dict().keys()
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    assert load_initial(bare, path) == {}
    assert load_initial(whole, path) == dict.fromkeys(masks, NO_MASKS)
    assert equal_names(before, whole.state_dict()) >= masks
    for new in (bare, whole):
        assert torch.equal(new.roi_heads.box_head.fc6.weight, given.roi_heads.box_head.fc6.weight)
        assert torch.equal(new.roi_heads.box_head.classifier.weight, given.roi_heads.box_predictor.cls_score.weight)
    with pytest.raises(ValueError, match=r"another model: backbone: resnet18 -> resnet10; box_head_dim: 1024 -> 16; "):
        load_initial(model(0), path)


@pytest.mark.parametrize("wrap", ["bare", "compiled", "DataParallel", "average"])
def test_a_state_dict_of_ours(wrap: str, tmp_path: Path) -> None:
    """As PyTorch's own wrappers write it. Other forms of files: tests/model/test_state_dict.py."""
    trained = model(0, keypoints=HEAD)
    weights = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    content: Any = weights
    if wrap == "compiled":
        content = torch.compile(trained).state_dict()
    elif wrap == "DataParallel":
        content = {"net": torch.nn.DataParallel(trained).state_dict(), "args": argparse.Namespace()}
    elif wrap == "average":
        average = torch.optim.swa_utils.AveragedModel(trained)
        content = {"model": model(1, keypoints=HEAD).state_dict(), "model_ema": average.state_dict()}
    torch.save(content, tmp_path / "a.pt")
    assert load(model(1, keypoints=HEAD), tmp_path / "a.pt", weights, CATS) == {}
    with pytest.warns(UserWarning, match=NO_PART + "keypoint_head"):
        assert load(model(1, num_classes=7), tmp_path / "a.pt", weights).keys() == BOX | MASK
    names = r"names of torchvision's .*, got those of tmask's own model: use its load_stat"
    with pytest.raises(ValueError, match=names):
        tmask.load_torchvision(content)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    """Other settings and other files: docs/bad-input.md, tests/model/test_state_dict.py."""
    path, _ = saved(tmp_path / "a.pt", keypoints=HEAD)
    with pytest.raises(ValueError, match=r"weights do not fit the model: .*keypoint_head.convs.0.weight"):
        load_initial(model(1, keypoints={**HEAD, "head_channels": 4}), path)
