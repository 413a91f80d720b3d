"""Every setting of the project, as frozen dataclasses. Named presets of them stand in `tmask.presets`.

A config is plain data: it round-trips through `dataclasses.asdict`, YAML and checkpoints. Only `tmask.build_model`
turns a `ModelConfig` into modules; the modules take explicit arguments and never see it.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from tmask.checks import check_fields, nearest, require
from tmask.skeleton import Skeleton, make_skeleton

BackboneName = Literal[
    "resnet10", "resnet18", "resnet34", "resnet50", "resnet101",
    "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d",
]  # fmt: skip
NormName = Literal["bn", "sync_bn", "frozen_bn", "gn"]
ConventionName = Literal["detectron2", "torchvision"]
BoxLossName = Literal["smooth_l1", "giou", "diou", "ciou"]

# Pixels per cell of each level that a neck gives to the RPN: P2-P6, or one map of the backbone.
NECK_STRIDES: dict[str, tuple[int, ...]] = {"fpn": (4, 8, 16, 32, 64), "c4": (16,), "c5": (32,)}


@dataclass(frozen=True, kw_only=True)
class Convention:
    """Where published detectors differ by fractions of a pixel: weights give their figures only under their own."""

    roi_aligned: bool  # subtract half a pixel in RoIAlign
    roi_sampling_ratio: int  # samples per bin side; 0 = adaptive, ceil(size / bins)
    level_convention: ConventionName  # where the epsilon of the FPN level formula stands
    anchor_offset: float  # position of an anchor centre inside its cell
    anchors_rounded: bool  # anchor sizes rounded to whole pixels
    anchor_stride_from_grid: bool  # stride = image // grid (True) or 2^level (False)
    resize_antialias: bool
    mask_resize: Literal["bilinear", "nearest"]  # of ground-truth masks; bilinear is cut at 0.5
    mask_targets: ConventionName  # binary (detectron2) or soft (torchvision) 28 x 28 targets
    paste: ConventionName  # sample at pixel centres (detectron2) or in a box truncated to integers (torchvision)
    ignore_crowds: bool  # anchors and RoIs inside a crowd are no negatives; torchvision drops crowds before the model

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.roi_sampling_ratio >= 0, "roi_sampling_ratio", "at least 0", self.roi_sampling_ratio)


CONVENTIONS: dict[str, Convention] = {
    "detectron2": Convention(
        roi_aligned=True,
        roi_sampling_ratio=0,
        level_convention="detectron2",
        anchor_offset=0.0,
        anchors_rounded=False,
        anchor_stride_from_grid=False,
        resize_antialias=True,
        mask_resize="bilinear",
        mask_targets="detectron2",
        paste="detectron2",
        ignore_crowds=True,
    ),
    "torchvision": Convention(
        roi_aligned=False,
        roi_sampling_ratio=2,
        level_convention="torchvision",
        anchor_offset=0.0,
        anchors_rounded=True,
        anchor_stride_from_grid=True,
        resize_antialias=False,
        mask_resize="nearest",
        mask_targets="torchvision",
        paste="torchvision",
        ignore_crowds=False,
    ),
}


@dataclass(frozen=True, kw_only=True)
class RoIExtractorConfig:
    """How the features of a RoI are read from the pyramid. All but `op` and the level are options of RoIAlign."""

    op: Literal["roi_align", "roi_pool"] = "roi_align"  # RoIPool takes whole cells
    reduction: Literal["mean", "max"] = "mean"  # of RoIAlign's samples in a bin
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"  # of a sample between 2 x 2 or 4 x 4 cells
    sampling_ratio: int | None = None  # samples per bin side; 0 = adaptive; null: the convention's
    aligned: bool | None = None  # subtract half a pixel; null: as the convention
    level_convention: ConventionName | None = None  # epsilon of the level formula; null: the convention's

    def __post_init__(self) -> None:
        check_fields(self)
        require((self.sampling_ratio or 0) >= 0, "sampling_ratio", "at least 0, or none", self.sampling_ratio)
        if self.op == "roi_pool":
            for item in dataclasses.fields(self):
                name, value = item.name, getattr(self, item.name)
                expected = f"{item.default!r}, as roi_pool has no such option"
                require(name in ("op", "level_convention") or value == item.default, name, expected, value)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Which losses the detector learns by; their weights are ModelConfig's ``loss_...``."""

    # Focal: of all anchors, none drawn, over the number of positives; rpn_batch_size and its fraction are not used.
    rpn_objectness: Literal["bce", "focal"] = "bce"
    rpn_box: BoxLossName = "smooth_l1"  # the others: 1 - IoU of the decoded box, with a penalty
    # sigmoid_focal: a classifier without background, over the number of positives, sigmoid scores in inference.
    classifier: Literal["softmax", "softmax_focal", "sigmoid_focal"] = "softmax"
    box: BoxLossName = "smooth_l1"
    # sigmoid: of the channel of the RoI's own class; softmax: classes and background compete for each pixel.
    mask: Literal["sigmoid", "softmax"] = "sigmoid"
    focal_alpha: float = 0.25  # weight of positives in a sigmoid loss, 1 - alpha of negatives; below 0: no weights
    focal_gamma: float = 2.0  # 0: cross-entropy
    focal_prior: float = 0.01  # probability of an object that a sigmoid loss begins with

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.focal_alpha <= 1, "focal_alpha", "0..1, or below 0 for no weights", self.focal_alpha)
        require(self.focal_gamma >= 0, "focal_gamma", "at least 0", self.focal_gamma)
        require(0 < self.focal_prior < 1, "focal_prior", "in (0, 1)", self.focal_prior)
        by_sigmoid = self.rpn_objectness == "focal" or self.classifier == "sigmoid_focal"
        used = {"focal_gamma": by_sigmoid or self.classifier == "softmax_focal"}
        used |= {"focal_alpha": by_sigmoid, "focal_prior": by_sigmoid}
        for item in dataclasses.fields(self):
            value, expected = getattr(self, item.name), f"{item.default!r}, as no chosen loss takes it"
            require(used.get(item.name, True) or value == item.default, item.name, expected, value)


@dataclass(frozen=True, kw_only=True)
class KeypointConfig:
    """The keypoint branch and what it learns. Keypoints have numbers from 0, in the order of their names."""

    names: tuple[str, ...] | None = None  # null: those of the training data, or without data COCO's 17 of a person
    edges: tuple[tuple[int, int], ...] | None = None  # lines of the pictures; null: those that come with the names
    flip_pairs: tuple[tuple[int, int], ...] | None = None  # swapped by a left-right flip; null: left and right by name
    sigmas: tuple[float, ...] | None = None  # of the evaluation, one a name; null: COCO's of a person, else 0.05
    pool_size: int = 14  # the heat maps are four times as large
    head_channels: int = 512
    head_layers: int = 8

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("pool_size", "head_channels", "head_layers"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        assert self.skeleton  # made here for its checks

    @property
    def skeleton(self) -> Skeleton:
        """The keypoints, with what is left out filled in."""
        return make_skeleton(self.names, self.edges, self.flip_pairs, self.sigmas)


@dataclass(frozen=True, kw_only=True)
class MaskTransferConfig:
    """Mask^X R-CNN: a function, learnt with the rest, makes each class's mask predictor of its weights in the box head.

    So classes without masks, by DataConfig's ``mask_classes``, get masks too.
    """

    inputs: Literal["cls", "box", "cls_box"] = "cls_box"  # a class's weights in the classifier, in the regressor, both
    layers: int = 2  # of the function: 1, 2 or 3
    activation: Literal["leaky_relu", "relu"] = "leaky_relu"  # between them; of slope 0.1
    stop_grad: bool = True  # the mask loss leaves those weights of the box head alone

    def __post_init__(self) -> None:
        check_fields(self)
        require(1 <= self.layers <= 3, "layers", "in 1..3", self.layers)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The detector. Defaults are the published Mask R-CNN R50-FPN; sizes are pixels of the resized image."""

    num_classes: int = 91  # with background, as torchvision; labels are 1..num_classes-1
    convention: Convention = field(default_factory=lambda: CONVENTIONS["detectron2"])

    # Image transform
    min_size: int = 800  # short side after the resize
    max_size: int = 1333  # long side at most
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # ImageNet, of images in 0..1
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    size_divisible: int = 32

    # Backbone and neck
    backbone: BackboneName = "resnet50"
    backbone_weights: str | None = None  # path of a torchvision ImageNet state dict (.pth or .safetensors)
    norm: NormName = "frozen_bn"  # gn also stands in the neck and the mask head, to train from scratch
    norm_eps: float = 1e-5  # torchvision's published COCO_V1 weights were made with 0
    trainable_layers: int = 3  # of 5, counted from the top; 3 freezes the stem and the first stage
    neck: Literal["fpn", "c4", "c5"] = "fpn"  # a pyramid, or the one map of stride 16 (conv5 on each RoI) or 32
    fpn_channels: int = 256  # of each level; c4 keeps the backbone's width

    # Region proposal network
    anchor_sizes: tuple[tuple[float, ...], ...] = ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,))  # one tuple a level
    anchor_aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # height / width
    rpn_fg_iou: float = 0.7
    rpn_bg_iou: float = 0.3
    rpn_batch_size: int = 256  # anchors an image in the loss
    rpn_positive_fraction: float = 0.5
    rpn_pre_nms_top_n_train: int = 2000  # per level
    rpn_pre_nms_top_n_test: int = 1000
    rpn_post_nms_top_n_train: int = 2000  # per image
    rpn_post_nms_top_n_test: int = 1000
    rpn_nms_threshold: float = 0.7
    rpn_min_size: float = 1e-3
    rpn_score_threshold: float = 0.0

    # RoI features
    roi_extractor: RoIExtractorConfig = field(default_factory=RoIExtractorConfig)

    # Box head
    box_pool_size: int = 7
    box_head_dim: int = 1024  # of two hidden layers, in place of which c4 has conv5
    box_fg_iou: float = 0.5
    box_bg_iou: float = 0.5
    box_batch_size: int = 512  # sampled RoIs an image
    box_positive_fraction: float = 0.25
    box_score_threshold: float = 0.05
    box_nms_threshold: float = 0.5
    max_detections: int = 100

    # Mask head
    masks: bool = True  # false: boxes alone (Faster R-CNN), also of data without masks; no other field of masks counts
    mask_pool_size: int = 14  # the mask is twice as large
    mask_head: Literal["fcn", "mlp"] = "fcn"  # convolutions and a deconvolution, or fully connected layers
    mask_head_channels: int = 256  # of fcn
    mask_head_layers: int = 4  # of fcn: 3x3 convolutions; 0 with the published c4
    mask_fusion_layers: int = 0  # of fcn: fully connected, of one mask that is added to every other; 0: none, 1 or 2
    mask_mlp_dim: int = 1024  # of mlp: units of a hidden layer
    mask_mlp_layers: int = 2  # of mlp: hidden layers
    mask_class_agnostic: bool = False  # one mask for all classes, not one a class
    mask_transfer: MaskTransferConfig | None = None  # null: a mask predictor of its own for each class

    keypoints: KeypointConfig | None = None  # null: no keypoint branch

    # Losses and their weights
    losses: LossConfig = field(default_factory=LossConfig)
    loss_rpn_objectness: float = 1.0
    loss_rpn_box: float = 1.0
    loss_classifier: float = 1.0
    loss_box: float = 1.0
    loss_mask: float = 1.0
    loss_keypoint: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.num_classes >= 2, "num_classes", "at least 2 (background and one class)", self.num_classes)
        require(0 < self.min_size <= self.max_size, "min_size", "in 1..max_size", self.min_size)
        require(min(self.image_std) > 0, "image_std", "numbers above 0", self.image_std)
        require(0 <= self.trainable_layers <= 5, "trainable_layers", "in 0..5", self.trainable_layers)
        require(0 <= self.mask_fusion_layers <= 2, "mask_fusion_layers", "0, 1 or 2", self.mask_fusion_layers)
        if not self.masks:  # sizes stay, since presets have their own
            off = {"mask_head": "'fcn'", "mask_fusion_layers": "0", "mask_class_agnostic": "false"}
            for name, none in (off | {"mask_transfer": "none"}).items():
                value = getattr(self, name)
                require(value == getattr(type(self), name), name, f"{none} with masks false", value)
            require(self.losses.mask == "sigmoid", "losses.mask", "'sigmoid' with masks false", self.losses.mask)
        computed = [name for name in ("mask_transfer", "mask_fusion_layers") if getattr(self, name)]
        for name in computed:  # they work on what leaves the deconvolution; in a softmax the fusion would cancel out
            require(self.mask_head == "fcn", "mask_head", f"'fcn' with {name}", self.mask_head)
            require(self.losses.mask == "sigmoid", "losses.mask", f"'sigmoid' with {name}", self.losses.mask)
        both = self.mask_transfer is not None and self.mask_class_agnostic
        require(not both, "mask_class_agnostic", "false with mask_transfer", self.mask_class_agnostic)
        levels = len(NECK_STRIDES[self.neck])
        expected = "5 tuples, one a level P2-P6" if levels > 1 else f"1 tuple, as the neck {self.neck} is one level"
        require(len(self.anchor_sizes) == levels, "anchor_sizes", expected, self.anchor_sizes)
        # One RPN head serves all levels, so each has as many anchors a cell.
        counts = {len(level) for level in self.anchor_sizes}
        require(len(counts) == 1, "anchor_sizes", "as many sizes in each level", self.anchor_sizes)
        positive = min(counts) > 0 and all(size > 0 for level in self.anchor_sizes for size in level)
        require(positive, "anchor_sizes", "numbers above 0, at least one a level", self.anchor_sizes)
        ratios = self.anchor_aspect_ratios
        require(min(ratios, default=0) > 0, "anchor_aspect_ratios", "numbers above 0, at least one", ratios)
        for item in dataclasses.fields(self):
            name, value = item.name, getattr(self, item.name)
            if item.type == "int":
                least = 0 if name in ("trainable_layers", "mask_head_layers", "mask_fusion_layers") else 1
                require(value >= least, name, f"at least {least}", value)
            elif name.endswith(("_iou", "_threshold")):
                require(0 <= value <= 1, name, "in 0..1", value)
            elif name.endswith("_positive_fraction"):
                require(0 < value <= 1, name, "in (0, 1]", value)
            elif item.type == "float":
                require(value >= 0, name, "at least 0", value)
        for part in ("rpn", "box"):
            low, high = getattr(self, f"{part}_bg_iou"), getattr(self, f"{part}_fg_iou")
            require(low <= high, f"{part}_bg_iou", f"at most {part}_fg_iou ({high})", low)
            size, fraction = getattr(self, f"{part}_batch_size"), getattr(self, f"{part}_positive_fraction")
            sampled = part == "box" or self.losses.rpn_objectness != "focal"  # which learns from all anchors
            expected = f"enough for a positive at {part}_positive_fraction ({fraction})"
            require(not sampled or int(size * fraction) >= 1, f"{part}_batch_size", expected, size)
        self._check_norm()

    def _check_norm(self) -> None:
        if self.neck == "c4":
            # Many slots of the mask branch are empty: their zeros would be in the statistics.
            expected = "'frozen_bn' or 'gn', as the neck c4 has conv5 on RoIs, of which batch statistics tell nothing"
            require(self.norm in ("frozen_bn", "gn"), "norm", expected, self.norm)
        if self.norm == "gn":
            masks = self.masks and self.mask_head == "fcn" and self.mask_head_layers > 0
            for name in ["fpn_channels"] * (self.neck != "c4") + ["mask_head_channels"] * masks:
                require(getattr(self, name) % 32 == 0, name, "a multiple of the 32 groups of gn", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images and COCO-format annotations are. Paths; None where a command does not need one."""

    train_images: str | None = None
    train_annotations: str | None = None
    val_images: str | None = None
    val_annotations: str | None = None
    # Classes whose masks are learnt from; of the others only boxes are. voc: those of COCO that VOC has too.
    mask_classes: str | None = None  # names or ids with commas between, voc, non_voc or random:COUNT:SEED; null: all
    crowds: Literal["ignore", "instances"] = "ignore"  # what annotations with iscrowd 1 are taken for
    hflip: float = 0.5  # probability of a left-right flip in training
    vflip: float = 0.0
    min_crop: float = 1.0  # random crops in training: each side is at least this part of the image's; 1: none
    min_sizes: tuple[int, ...] = ()  # short sides, one drawn for each training image; empty: the model's min_size
    exif: bool | None = None  # turn images by their EXIF orientation; null: no, with a warning where there is one
    # What is read of each image before the first step: its pixels, its kind and size alone, or nothing.
    check: Literal["full", "headers", "off"] | None = None  # of images, before a run; null: headers (skip_bad: full)
    skip_bad: bool = False  # leave out images that cannot be read, and list them; check is full then, unless given
    num_workers: int = 2
    aspect_grouping: bool = True  # batch portrait with portrait, landscape with landscape

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("hflip", "vflip"):
            require(0 <= getattr(self, name) <= 1, name, "in 0..1", getattr(self, name))
        require(0 < self.min_crop <= 1, "min_crop", "in (0, 1]", self.min_crop)
        require(min(self.min_sizes, default=1) >= 1, "min_sizes", "at least 1 each", self.min_sizes)
        skips = not (self.skip_bad and self.check == "off")
        require(skips, "check", "'full' or 'headers' with skip_bad", self.check)
        require(self.num_workers >= 0, "num_workers", "at least 0", self.num_workers)
        for split in ("train", "val"):
            pair = (f"{split}_images", f"{split}_annotations")
            for name, other in (pair, pair[::-1]):
                given = getattr(self, name) is not None or getattr(self, other) is None
                require(given, name, f"a path, as {other} has one", None)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. A step is one optimiser update, of ``accumulate`` batches.

    The rate at step s (from 0) is ``lr * min(1, w + (1 - w) * s / warmup_steps) * schedule(s)`` with
    w = ``warmup_start``. So ``warmup_steps=49, warmup_start=1/50`` is the common ``min(1, (s + 1) / 50)``.
    """

    steps: int = 90_000  # optimiser updates
    batch_size: int = 16  # images a batch
    only: Literal["masks"] | None = None  # what learns, the rest stays as it is (stage-wise training); null: all
    optimizer: Literal["sgd", "adamw"] = "sgd"
    accumulate: int = 1  # batches an update; the gradient is their mean
    lr: float = 0.02  # for this batch_size; scale linearly with it (times accumulate)
    momentum: float = 0.9  # SGD only
    weight_decay: float = 1e-4  # factor of the weights in SGD's gradient; AdamW's is decoupled
    decay_norm_and_bias: bool = True  # False: no weight decay on biases and norm layers
    schedule: Literal["steps", "cosine", "constant"] = "steps"  # of the rate after warm-up
    milestones: tuple[float, ...] = (2 / 3, 8 / 9)  # fractions of `steps` at which the rate falls tenfold
    lr_floor: float = 0.0  # added to the cosine factor 0.5 * (1 + cos(pi * s / steps))
    warmup_steps: int = 1000  # in which the rate rises linearly
    warmup_start: float = 0.001  # factor of the first step
    clip_norm: float | None = None  # largest norm of the gradient; null: no limit
    ema_decay: float = 0.0  # of the average of weights that is evaluated and predicts, e.g. 0.999; 0: none
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"  # of the features; boxes are always fp32
    channels_last: bool = True  # memory layout of images and convolutions
    seed: int = 0  # of weights, data order and flips
    log_every: int = 20  # steps
    checkpoint_every: int = 1000  # steps
    eval_every: int = 0  # steps; 0 = only at the end
    eval_max_detections: int = 100  # of COCO's evaluation, an image
    tensorboard: bool = False  # also write the log as TensorBoard's events

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every", "eval_max_detections"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("lr", "momentum", "weight_decay", "warmup_steps", "eval_every", "lr_floor"):
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        require(0 <= self.warmup_start <= 1, "warmup_start", "in 0..1", self.warmup_start)
        require(0 <= self.ema_decay < 1, "ema_decay", "in [0, 1)", self.ema_decay)
        require(all(0 < m <= 1 for m in self.milestones), "milestones", "fractions of steps", self.milestones)
        require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "above 0, or none", self.clip_norm)


def from_dict(cls: type[Any], values: dict[str, Any]) -> Any:
    """Build a config dataclass from the plain dict that `dataclasses.asdict` gives (lists become tuples again).

    Errors: ValueError for an unknown key (with the nearest name), a missing one, and impossible values.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{cls.__name__}: expected settings by name, got {values!r}")
    hints = typing.get_type_hints(cls)
    out = {}
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"unknown {cls.__name__} setting {name!r}: expected {nearest(str(name), hints)}")
        nested = nested_config(hints[name])
        if nested is not None and isinstance(value, dict):
            try:
                value = from_dict(nested, value)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        out[name] = _tuples(value)
    for item in dataclasses.fields(cls):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in out:
            raise ValueError(f"{cls.__name__}: expected a setting {item.name!r}, got none")
    return cls(**out)


def nested_config(hint: Any) -> type[Any] | None:
    """The config dataclass that a field of this type holds, or may hold; None for plain values."""
    return next((part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)), None)  # type: ignore[return-value]


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value
