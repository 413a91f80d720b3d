"""Weights of other libraries' detectors in ours: torchvision's Mask and Faster R-CNN with a ResNet-FPN backbone.

The names of the parameters differ, the tensors do not: nothing is transposed or reordered.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights, MaskRCNN_ResNet50_FPN_Weights

from tmask.build import build_model
from tmask.checks import require
from tmask.config import ModelConfig
from tmask.model.backbone import RESNETS
from tmask.model.detector import MaskRCNN
from tmask.model.state_dict import ForeignFileError, bare_weights, describe, library, misfits, read_weights

# torchvision's name -> ours. The optional parts are its two generations of names: published files hold the older one.
_TORCHVISION_NAMES = [
    (r"backbone\.body\.(.+)", r"backbone.\1"),
    (r"backbone\.fpn\.inner_blocks\.(\d)(?:\.0)?\.(weight|bias)", r"fpn.lateral.\1.\2"),
    (r"backbone\.fpn\.layer_blocks\.(\d)(?:\.0)?\.(weight|bias)", r"fpn.output.\1.\2"),
    (r"rpn\.head\.conv(?:\.0\.0)?\.(weight|bias)", r"rpn.head.conv.\1"),
    (r"rpn\.head\.cls_logits\.(weight|bias)", r"rpn.head.objectness.\1"),
    (r"rpn\.head\.bbox_pred\.(weight|bias)", r"rpn.head.deltas.\1"),
    (r"roi_heads\.box_head\.(fc[67])\.(weight|bias)", r"roi_heads.box_head.\1.\2"),
    (r"roi_heads\.box_predictor\.cls_score\.(weight|bias)", r"roi_heads.box_head.classifier.\1"),
    (r"roi_heads\.box_predictor\.bbox_pred\.(weight|bias)", r"roi_heads.box_head.regressor.\1"),
    (r"roi_heads\.mask_head\.(\d)\.0\.(weight|bias)", r"roi_heads.mask_head.convs.\1.\2"),
    (r"roi_heads\.mask_predictor\.conv5_mask\.(weight|bias)", r"roi_heads.mask_head.deconv.\1"),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits\.(weight|bias)", r"roi_heads.mask_head.predictor.\1"),
]
# torchvision's published files, trained on COCO with frozen batch norms that add nothing to the variance.
_PUBLISHED = (MaskRCNN_ResNet50_FPN_Weights.COCO_V1, FasterRCNN_ResNet50_FPN_Weights.COCO_V1)
LANDMARK = "rpn.head.conv."  # every detector of ours and of torchvision's has such names
MASK_PARTS = "roi_heads.mask_"
MASK_PREDICTOR = "roi_heads.mask_head.predictor."
MASK_LAYERS = (MASK_PREDICTOR, "roi_heads.mask_head.fusion.", "roi_heads.mask_transfer.")
BOX_PREDICTORS = ("roi_heads.box_head.classifier.", "roi_heads.box_head.regressor.")
CLASS_LAYERS = (*BOX_PREDICTORS, MASK_PREDICTOR)
_KEYPOINT_HEAD = "roi_heads.keypoint_head."
KEYPOINT_LAYER = f"{_KEYPOINT_HEAD}deconv."
_KEYPOINTS = f"{KEYPOINT_LAYER}bias"
_CLASSES = "roi_heads.box_head.classifier.bias"
_OLD_MASK_CONV = re.compile(r"roi_heads\.mask_head\.mask_fcn(\d)\.(weight|bias)")  # counted from 1


def load_torchvision(state_dict: Mapping[str, Any] | str | Path, **overrides: Any) -> MaskRCNN:
    """Our model with the weights of torchvision's ``maskrcnn_resnet50_fpn``, giving its results.

    The weights of ``fasterrcnn_resnet50_fpn`` give a model without masks, and so does ``masks=False``.

    `state_dict` is that model's ``state_dict()`` or a file of one (.pth or .safetensors), of either generation of
    names. A checkpoint that holds it, such as that of torchvision's training scripts or of Lightning, and prefixes such
    as ``module.`` are unwrapped (`bare_weights`). The ResNet (18 to 101, or a ResNeXt; batch norm or frozen), the
    widths and the number of classes are read from it; every other setting is torchvision's default and can be replaced
    by `overrides`, fields of `tmask.ModelConfig`: ``min_size``, ``box_score_threshold``, ``anchor_sizes``... but not
    ``neck``. The convention is ``"torchvision"`` if not replaced.

    With another ``num_classes`` the three layers that depend on it start anew, for fine-tuning on other classes.

    The published COCO_V1 weights were trained with ``norm_eps=0.0``. That is the default for their file; for their
    ``state_dict()`` give it, as torchvision does when it downloads them. The model is in training mode, as
    torchvision's is when built.
    Errors: ValueError for a file that cannot be read, names that are not this architecture's, shapes that do not fit
    it, and overrides by which its masks would mean something else.
    """
    if isinstance(state_dict, str | Path):
        if Path(state_dict).is_file() and is_published(state_dict):
            overrides = {"norm_eps": 0.0, **overrides}
        state_dict = read_weights(state_dict, "state_dict", LANDMARK)
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"state_dict: expected names and tensors or a file of them, got {type(state_dict).__name__}")
    try:
        bare = bare_weights(state_dict, LANDMARK)
        if is_own(bare) or not bare:
            own = "those of tmask's own model: use its load_state_dict"
            raise ForeignFileError(own if bare else describe(state_dict))
        weights = torchvision_weights(bare)
    except ForeignFileError as error:
        expected = "the names of torchvision's maskrcnn_resnet50_fpn or fasterrcnn_resnet50_fpn (not _v2)"
        raise ValueError(f"state_dict: expected {expected}, got {error}") from error
    except ValueError as error:
        raise ValueError(f"state_dict: {error}") from error
    found = architecture(weights)
    settings = {"convention": "torchvision", **found, **overrides}
    model = build_model("r50_fpn", warn_if_untrained=False, **settings)
    _check_architecture(model.config, num_classes=found["num_classes"], masks=found["masks"])
    weights = adapted(weights, model.state_dict())
    problems = misfits(model, weights)
    if problems:
        raise ValueError(f"state_dict: does not fit the model: {problems}")
    model.load_state_dict(weights)
    return model


def is_published(path: str | Path) -> bool:
    """Return whether a file holds torchvision's published COCO_V1 weights of Mask or Faster R-CNN.

    Their names end in the first digits of their SHA-256, which decide here, whatever the name.
    """
    with Path(path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return any(digest.startswith(Path(weights.url).stem.rpartition("-")[2]) for weights in _PUBLISHED)


def missing_weights(argument: str, path: str | Path) -> str:
    """The message for a file of a detector's weights that is not there: where torchvision has its own."""
    return f"{argument}: no such file: {path}; torchvision's COCO weights are {_PUBLISHED[0].url}"


def coco_categories() -> list[dict[str, Any]]:
    """The 90 categories of torchvision's COCO weights: label i is COCO's category id i. 10 ids have no class."""
    names = _PUBLISHED[0].meta["categories"]
    return [{"id": i, "name": f"N/A {i}" if name == "N/A" else name} for i, name in enumerate(names) if i]


def _check_architecture(config: ModelConfig, *, num_classes: int, masks: bool) -> None:
    """torchvision's has an FPN, and an FCN with a sigmoid mask a class; of other classes the predictor is new."""
    require(masks or not config.masks, "masks", "false, as there are no masks in the weights", config.masks)
    require(config.neck == "fpn", "neck", "'fpn', as torchvision's", config.neck)
    require(config.mask_head == "fcn", "mask_head", "'fcn', as torchvision's", config.mask_head)
    if config.num_classes == num_classes:
        mask, agnostic = config.losses.mask, config.mask_class_agnostic
        require(mask == "sigmoid", "losses.mask", "'sigmoid', by which these masks are trained", mask)
        require(not agnostic, "mask_class_agnostic", "false, as there is a mask for each class", agnostic)
        for name, none in (("mask_transfer", None), ("mask_fusion_layers", 0)):
            require(getattr(config, name) == none, name, f"{none}, as torchvision's", getattr(config, name))


def adapted(
    weights: Mapping[str, Tensor], own: Mapping[str, Tensor], *, other: Sequence[str] = ()
) -> dict[str, Tensor]:
    """`weights` (by our names) as the model whose state is `own` can begin with them.

    Batch-norm counters that it has no place for are left out; if they are of another number of classes, it keeps its
    own layers that depend on that, which the predictor of class-agnostic masks does not. What predicts its masks it
    keeps where they are of a model that does it otherwise, its mask or keypoint head where they have none, and of the
    latter the last layer where they have another number of keypoints. A head that it has no place for is left out. It
    keeps layers whose names begin as one of `other`, where they mean something else in it, whatever their shapes. What
    it keeps are the tensors of `own` themselves.
    """
    out = {name: tensor for name, tensor in weights.items() if name in own or not name.endswith("num_batches_tracked")}
    if _CLASSES in out and _CLASSES in own and out[_CLASSES].shape != own[_CLASSES].shape:
        layers = {name: tensor for name, tensor in own.items() if name.startswith(CLASS_LAYERS)}
        out |= {name: tensor for name, tensor in layers.items() if name not in out or out[name].shape != tensor.shape}
    out |= {name: own[name] for name in own if name in out and name.startswith(tuple(other))}
    for head in (MASK_PARTS, _KEYPOINT_HEAD):
        if not any(name.startswith(head) for name in weights) or not any(name.startswith(head) for name in own):
            out = {name: tensor for name, tensor in out.items() if not name.startswith(head)}
            out |= {name: tensor for name, tensor in own.items() if name.startswith(head)}
    theirs, ours = ({n: t.shape for n, t in part.items() if n.startswith(MASK_LAYERS)} for part in (out, own))
    if theirs and theirs != ours:
        out = {name: tensor for name, tensor in out.items() if name not in theirs} | {name: own[name] for name in ours}
    theirs, ours = ({n: t.shape for n, t in part.items() if n.startswith(_KEYPOINT_HEAD)} for part in (out, own))
    if theirs.get(_KEYPOINTS) != ours.get(_KEYPOINTS):
        out |= {name: own[name] for name in ours if name.startswith(KEYPOINT_LAYER)}
    return out


def torchvision_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A bare state dict of torchvision's Mask R-CNN by our names. Errors: ForeignFileError for names of another."""
    names = {key: _our_name(key) for key in weights}
    unknown = [key for key, name in names.items() if name is None]
    if unknown:
        raise ForeignFileError(library(unknown) or f"{len(unknown)} other names, first {unknown[0]!r}")
    return {name: weights[key] for key, name in names.items() if name is not None}


def is_own(weights: Mapping[str, Tensor]) -> bool:
    """Whether weights have our names, and not torchvision's."""
    return any(name.startswith("rpn.head.objectness.") for name in weights)


def _our_name(name: str) -> str | None:
    old = _OLD_MASK_CONV.fullmatch(name)
    if old:
        return f"roi_heads.mask_head.convs.{int(old[1]) - 1}.{old[2]}"
    for pattern, ours in _TORCHVISION_NAMES:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(ours)
    return None


def architecture(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of `ModelConfig` that a state dict (with our names) of a ResNet-FPN decides.

    Errors: ValueError for weights of another kind of model.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in weights:
            raise ValueError(f"state_dict: expected the weights of a Mask R-CNN, got none for {name}")
        return tuple(weights[name].shape)

    blocks = tuple(len(_numbers(weights, rf"backbone\.layer{stage}\.(\d+)\.conv1\.weight")) for stage in range(1, 5))
    bottleneck = "backbone.layer1.0.conv3.weight" in weights
    outputs, group = shape("backbone.layer1.0.conv2.weight")[:2]  # all channels, and those of one group
    own = (bottleneck, blocks, outputs // group, group)
    names = [name for name, resnet in RESNETS.items() if resnet == own]
    if not names:
        kind = "bottleneck" if bottleneck else "basic"
        got = f"a ResNet of {blocks} {kind} blocks, groups of {group} channels"
        raise ValueError(f"state_dict: expected one of {', '.join(RESNETS)}, got {got}")
    channels = shape("fpn.output.0.weight")[0]
    hidden, pooled = shape("roi_heads.box_head.fc6.weight")
    masks: dict[str, Any] = {"masks": any(name.startswith(MASK_PARTS) for name in weights)}
    if masks["masks"]:
        masks["mask_head_channels"] = shape("roi_heads.mask_head.deconv.weight")[1]
        masks["mask_head_layers"] = len(_numbers(weights, r"roi_heads\.mask_head\.convs\.(\d+)\.weight"))
    trained_norm = "backbone.bn1.num_batches_tracked" in weights
    return {
        "backbone": names[0],
        "norm": "bn" if trained_norm else "frozen_bn",
        "trainable_layers": 5 if trained_norm else 3,  # as torchvision builds them
        "fpn_channels": channels,
        "num_classes": shape("roi_heads.box_head.classifier.weight")[0],
        "box_pool_size": round((pooled / channels) ** 0.5),
        "box_head_dim": hidden,
        **masks,
    }


def _numbers(weights: Mapping[str, Tensor], pattern: str) -> set[str]:
    return {match[1] for match in (re.fullmatch(pattern, name) for name in weights) if match}
