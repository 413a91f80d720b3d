"""load_torchvision: what it reads from a state dict, the forms it takes, and what it refuses."""

import argparse
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models.detection import MaskRCNN, fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

import tmask
from tmask.weights import BOX_PREDICTORS, MASK_PARTS, adapted


def theirs(backbone: str = "resnet18", num_classes: int = 4, frozen: bool = True) -> MaskRCNN:
    torch.manual_seed(0)
    norm = FrozenBatchNorm2d if frozen else torch.nn.BatchNorm2d
    return MaskRCNN(resnet_fpn_backbone(backbone_name=backbone, weights=None, norm_layer=norm), num_classes)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return theirs().state_dict()


def older(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of torchvision before 0.13, which the published files hold."""

    def rename(key: str) -> str:
        key = re.sub(r"(inner_blocks|layer_blocks)\.(\d)\.0\.", r"\1.\2.", key).replace("head.conv.0.0.", "head.conv.")
        return re.sub(r"mask_head\.(\d)\.0", lambda match: f"mask_head.mask_fcn{int(match[1]) + 1}", key)

    return {rename(key): tensor for key, tensor in state.items()}


def same(a: tmask.MaskRCNN, b: tmask.MaskRCNN) -> bool:
    ours, others = a.state_dict(), b.state_dict()
    return ours.keys() == others.keys() and all(torch.equal(ours[name], others[name]) for name in ours)


@pytest.mark.parametrize(
    ("backbone", "frozen"),
    [
        *((name, False) for name in ("resnet18", "resnet34", "resnet50", "resnet101")),
        *((name, True) for name in ("resnet50", "resnext50_32x4d")),
    ],
    ids=lambda value: value if isinstance(value, str) else ("frozen_bn" if value else "bn"),
)
def test_the_architecture_is_read_from_the_names(backbone: str, frozen: bool) -> None:
    with torch.device("meta"):
        state = theirs(backbone, 7, frozen).state_dict()
    config = tmask.load_torchvision({name: torch.zeros(t.shape) for name, t in state.items()}).config
    assert (config.backbone, config.num_classes) == (backbone, 7)
    assert (config.norm, config.trainable_layers) == (("frozen_bn", 3) if frozen else ("bn", 5))
    assert config.convention == tmask.CONVENTIONS["torchvision"]
    assert (config.box_pool_size, config.box_head_dim, config.mask_head_layers) == (7, 1024, 4)


def test_older_names(state: dict[str, Tensor]) -> None:
    old = older(state)
    assert old.keys() != state.keys()
    assert same(tmask.load_torchvision(old), tmask.load_torchvision(state))


@pytest.mark.parametrize(
    "form", ["pth", "safetensors", "training checkpoint", "DataParallel", "Lightning", "training script"]
)
def test_forms(form: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    given: object = None
    if form == "pth":
        given = tmp_path / "weights.pth"
        torch.save(state, given)
    elif form == "safetensors":
        given = str(tmp_path / "weights.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, given)
    elif form == "training checkpoint":
        given = {"model": state, "epoch": 3}
    elif form == "Lightning":
        given = tmp_path / "last.ckpt"
        hyper = {"callbacks": {}, "hyper_parameters": {"lr": 0.1}, "optimizer_states": [{"state": {}}]}
        torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}, **hyper}, given)
    elif form == "training script":
        given = tmp_path / "model_25.pth"
        args = argparse.Namespace(lr=0.02, device=torch.device("cuda"), output_dir=Path("out"))
        torch.save({"model": state, "optimizer": {}, "lr_scheduler": {}, "args": args, "epoch": 25}, given)
    else:
        given = {f"module.{name}": tensor for name, tensor in state.items()}
    assert same(tmask.load_torchvision(given), tmask.load_torchvision(state))  # type: ignore[arg-type]


def test_overrides(state: dict[str, Tensor]) -> None:
    model = tmask.load_torchvision(state, min_size=320, box_score_threshold=0.3, convention="detectron2", norm_eps=0.0)
    assert model.config.min_size == model.transform.min_size == 320
    assert model.roi_heads.score_threshold == 0.3
    assert model.config.convention == tmask.CONVENTIONS["detectron2"]
    assert {module.eps for module in model.modules() if isinstance(module, FrozenBatchNorm2d)} == {0.0}


def test_batch_norm_can_be_frozen() -> None:
    model = tmask.load_torchvision(theirs(frozen=False).state_dict(), norm="frozen_bn")
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())


def test_other_classes_start_anew(state: dict[str, Tensor]) -> None:
    model = tmask.load_torchvision(state, num_classes=9, losses={"mask": "softmax"})  # which the same classes refuse
    kept = tmask.load_torchvision(state).state_dict()
    fresh = [name for name, tensor in model.state_dict().items() if tensor.shape != kept[name].shape]
    layers = ("roi_heads.box_head.classifier", "roi_heads.box_head.regressor", "roi_heads.mask_head.predictor")
    assert {name.rsplit(".", 1)[0] for name in fresh} == set(layers)
    assert all(torch.equal(t, kept[name]) for name, t in model.state_dict().items() if not name.startswith(layers))


def test_a_faster_rcnn_is_a_model_without_masks(state: dict[str, Tensor]) -> None:
    names = ("roi_heads.mask_head.", "roi_heads.mask_predictor.")
    boxes = {name: tensor for name, tensor in state.items() if not name.startswith(names)}
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    assert {name for name in boxes if not name.startswith("backbone.body.")} <= theirs.keys()
    model = tmask.load_torchvision(boxes)
    assert not model.config.masks
    assert len(model.state_dict()) == len(boxes)
    assert same(model, tmask.load_torchvision(state, masks=False))
    whole = tmask.load_torchvision(state).state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())
    assert len(tmask.load_torchvision(theirs).state_dict()) == len(theirs)
    assert tmask.load_torchvision(boxes, num_classes=9).roi_heads.box_head.classifier.weight.shape[0] == 9


def test_masks_of_other_classes_begin_with_a_faster_rcnn(state: dict[str, Tensor]) -> None:
    weights = tmask.load_torchvision(state, masks=False).state_dict()
    own = tmask.load_torchvision(state, num_classes=9).state_dict()
    begin = adapted(weights, own)
    assert begin.keys() == own.keys()
    anew = (*BOX_PREDICTORS, MASK_PARTS)
    assert all((begin[name] is own[name]) == name.startswith(anew) for name in own)
    assert all(begin[name] is weights[name] for name in own if not name.startswith(anew))


BAD = {
    "v2": r"expected the names of torchvision's maskrcnn_resnet50_fpn or .* \(not _v2\), got weights of torchvision's",
    "faster": "masks: expected false, as there are no masks in the weights, got True",
    "half a mask head": "expected the weights of a Mask R-CNN, got none for roi_heads.mask_head.deconv.weight",
    "resnet": r"one of resnet10, .*, got a ResNet of \(3, 8, 36, 3\) bottleneck blocks, groups of 64 channels",
    "wide": r"got a ResNet of \(3, 4, 6, 3\) bottleneck blocks, groups of 128 channels",
    "missing": "does not fit the model: missing fpn.output.2.bias",
    "shape": r"rpn.head.objectness.weight: expected \[3, 256, 1, 1\], got \[5, 256, 1, 1\]",
    "empty": "got nothing",
    "type": "expected names and tensors or a file of them, got int",
    "file": "expected a state-dict file, got 'nowhere.pth', which does not exist",
    "damaged": "expected weights in .*damaged.pth, got a truncated or damaged file",
    "neck": "neck: expected 'fpn', as torchvision's, got 'c5'",
    "setting": "unknown ModelConfig setting 'min_sise': expected 'min_size'",
    "mlp": "mask_head: expected 'fcn', as torchvision's, got 'mlp'",
    "softmax": "losses.mask: expected 'sigmoid', by which these masks are trained, got 'softmax'",
    "agnostic": "mask_class_agnostic: expected false, as there is a mask for each class, got True",
    "transfer": "mask_transfer: expected None, as torchvision's, got MaskTransferConfig",
    "fusion": "mask_fusion_layers: expected 0, as torchvision's, got 1",
}


@pytest.mark.parametrize("case", list(BAD))
def test_what_is_refused(case: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    given: object = dict(state)
    overrides = {
        "setting": {"min_sise": 3},
        "neck": {"neck": "c5", "anchor_sizes": ((32.0,),)},
        "mlp": {"mask_head": "mlp", "mask_mlp_dim": 8, "num_classes": 9},
        "softmax": {"losses": {"mask": "softmax"}},
        "agnostic": {"mask_class_agnostic": True},
        "transfer": {"mask_transfer": {}},
        "fusion": {"mask_fusion_layers": 1, "mask_pool_size": 2},
        "faster": {"masks": True},
    }.get(case, {})
    if case in ("v2", "faster", "resnet", "wide"):
        build = {"v2": maskrcnn_resnet50_fpn_v2, "faster": fasterrcnn_resnet50_fpn}.get(case)
        other = "wide_resnet50_2" if case == "wide" else "resnet152"
        with torch.device("meta"):
            model = build(weights=None, weights_backbone=None) if build else theirs(other)
        given = model.state_dict()
    elif case == "half a mask head":
        del given["roi_heads.mask_predictor.conv5_mask.weight"]  # type: ignore[attr-defined]
    elif case == "missing":
        del given["backbone.fpn.layer_blocks.2.0.bias"]  # type: ignore[attr-defined]
    elif case == "shape":
        given["rpn.head.cls_logits.weight"] = torch.zeros(5, 256, 1, 1)  # type: ignore[index]
    elif case in ("empty", "type", "file"):
        given = {"empty": {}, "type": 5, "file": "nowhere.pth"}[case]
    elif case == "damaged":
        given = tmp_path / "damaged.pth"
        torch.save(state, given)
        given.write_bytes(given.read_bytes()[:5000])
    with pytest.raises(ValueError, match=BAD[case]):
        tmask.load_torchvision(given, **overrides)  # type: ignore[arg-type]
