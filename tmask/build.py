"""From a config to a model. The only place that sees both a `ModelConfig` and the modules."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tmask.config import NECK_STRIDES, ModelConfig
from tmask.model.backbone import (
    EfficientNetLite0,
    ResNet,
    as_backbone,
    load_backbone,
    load_installed,
    warn_if_random_and_frozen,
)
from tmask.model.box_head import BoxHead, MeanBoxHead
from tmask.model.detector import MaskRCNN
from tmask.model.fpn import FPN
from tmask.model.keypoint_branch import KeypointBranch
from tmask.model.keypoint_head import KeypointHead
from tmask.model.losses import Focal
from tmask.model.mask_branch import MaskBranch
from tmask.model.mask_fusion import MaskFusion
from tmask.model.mask_head import MaskHead, MLPMaskHead
from tmask.model.mask_transfer import MaskTransfer
from tmask.model.norm import head_norm_layer
from tmask.model.roi_extractor import Extractor, RoIExtractor, StageExtractor
from tmask.model.roi_heads import RoIHeads
from tmask.model.rpn import RPN, TopN
from tmask.model.single_level import SingleLevel
from tmask.model.transform import ImageTransform
from tmask.presets import model_config
from tmask_kernels import AnchorSpec


def build_model(
    preset: str | ModelConfig,
    num_classes: int | None = None,
    *,
    backbone: str | nn.Module | None = None,
    warn_if_untrained: bool = True,
    **overrides: Any,
) -> MaskRCNN:
    """A Mask R-CNN with random heads, in training mode.

    `preset` names an entry of `tmask.PRESETS` or is a config; `num_classes` counts the background; `overrides`
    replace fields of the config (``min_size=640``, ``convention="torchvision"``...). `backbone` is a name or
    any module as tmask/model/backbone.py describes, timm's with ``features_only=True`` among them; `norm` and
    `trainable_layers` do not reach into it, and a checkpoint of it is loaded by hand. `warn_if_untrained`:
    say so when frozen layers hold random weights; off where a checkpoint will fill them. The result has ``.config``.
    Errors: ValueError for unknown names (with the nearest) and impossible values.
    """
    if num_classes is not None:
        overrides["num_classes"] = num_classes
    if isinstance(backbone, str):
        overrides["backbone"], backbone = backbone, None
    config = model_config(preset, **overrides)
    if backbone is not None and config.backbone_weights is not None:
        raise ValueError(
            f"backbone_weights: expected none beside a backbone of your own, got {config.backbone_weights!r}"
        )
    backbone = _backbone(config, warn_if_untrained) if backbone is None else as_backbone(backbone)
    neck, extractor, channels = _neck(config, backbone)
    model = MaskRCNN(
        transform=_transform(config),
        backbone=backbone,
        fpn=neck,
        rpn=_rpn(config, neck.out_channels),
        roi_heads=_roi_heads(config, extractor, channels),
        loss_weights={
            "loss_objectness": config.loss_rpn_objectness,
            "loss_rpn_box_reg": config.loss_rpn_box,
            "loss_classifier": config.loss_classifier,
            "loss_box_reg": config.loss_box,
            "loss_mask": config.loss_mask,
            "loss_keypoint": config.loss_keypoint,
        },
        paste=config.convention.paste,
    )
    model.config = config
    return model


def _transform(config: ModelConfig) -> ImageTransform:
    return ImageTransform(
        num_classes=config.num_classes,
        min_size=config.min_size,
        max_size=config.max_size,
        image_mean=config.image_mean,
        image_std=config.image_std,
        size_divisible=config.size_divisible,
        antialias=config.convention.resize_antialias,
        mask_resize=config.convention.mask_resize,
        keep_crowds=config.convention.ignore_crowds,
        masks=config.masks,
        num_keypoints=0 if config.keypoints is None else len(config.keypoints.skeleton.names),
    )


def _backbone(config: ModelConfig, warn_if_untrained: bool) -> nn.Module:
    settings: dict[str, Any] = {name: getattr(config, name) for name in ("norm", "norm_eps", "trainable_layers")}
    backbone: nn.Module
    if config.backbone == "efficientnet_lite0":
        backbone = EfficientNetLite0(**settings)
        if config.backbone_weights is not None:
            load_installed(backbone)
    else:
        backbone = ResNet(config.backbone, **settings)
        if config.backbone_weights is not None:
            load_backbone(backbone, config.backbone_weights)
    if config.backbone_weights is None and warn_if_untrained:
        warn_if_random_and_frozen(backbone)
    return backbone


def _neck(config: ModelConfig, backbone: Any) -> tuple[FPN | SingleLevel, Extractor, int]:
    """What gives the levels, what reads RoIs from them, and the width of what it reads."""
    extractor = _roi_extractor(config)
    if config.neck == "c4":
        if not isinstance(backbone, ResNet):
            expected = "'fpn' or 'c5' with a backbone of your own, as c4 puts conv5 of a ResNet into the RoI heads"
            raise ValueError(f"neck: expected {expected}, got 'c4'")
        channels = backbone.out_channels[-1]
        conv5 = backbone.get_submodule([*backbone.stages.values()][-1])
        if any(isinstance(module, _BatchNorm) for module in conv5.modules()):  # ModelConfig knows the named ones alone
            expected = "a ResNet of norm 'frozen_bn' or 'gn', as the neck c4 has its conv5 on RoIs"
            raise ValueError(f"backbone: expected {expected}, got one with batch statistics")
        stage = backbone.take_last_stage()
        return SingleLevel(backbone.out_channels), StageExtractor(extractor, stage), channels
    kind = FPN if config.neck == "fpn" else SingleLevel
    norm = head_norm_layer(config.norm, config.norm_eps)
    return kind(backbone.out_channels, config.fpn_channels, norm=norm), extractor, config.fpn_channels


def _rpn(config: ModelConfig, channels: int) -> RPN:
    return RPN(
        channels=channels,
        anchors=AnchorSpec(
            sizes=config.anchor_sizes,
            aspect_ratios=config.anchor_aspect_ratios,
            strides=None if config.convention.anchor_stride_from_grid else NECK_STRIDES[config.neck],
            offset=config.convention.anchor_offset,
            rounded=config.convention.anchors_rounded,
        ),
        fg_iou=config.rpn_fg_iou,
        bg_iou=config.rpn_bg_iou,
        batch_size=config.rpn_batch_size,
        positive_fraction=config.rpn_positive_fraction,
        pre_nms_top_n=TopN(config.rpn_pre_nms_top_n_train, config.rpn_pre_nms_top_n_test),
        post_nms_top_n=TopN(config.rpn_post_nms_top_n_train, config.rpn_post_nms_top_n_test),
        nms_threshold=config.rpn_nms_threshold,
        min_size=config.rpn_min_size,
        score_threshold=config.rpn_score_threshold,
        focal=_focal(config) if config.losses.rpn_objectness == "focal" else None,
        box_loss=config.losses.rpn_box,
    )


def _focal(config: ModelConfig) -> Focal:
    own = config.losses
    return Focal(alpha=own.focal_alpha, gamma=own.focal_gamma, prior=own.focal_prior)


def _roi_extractor(config: ModelConfig) -> RoIExtractor:
    own, convention = config.roi_extractor, config.convention
    return RoIExtractor(
        strides=NECK_STRIDES[config.neck][:4],  # P6 serves the RPN alone
        op=own.op,
        aligned=convention.roi_aligned if own.aligned is None else own.aligned,
        sampling_ratio=convention.roi_sampling_ratio if own.sampling_ratio is None else own.sampling_ratio,
        reduction=own.reduction,
        interpolation=own.interpolation,
        level_convention=convention.level_convention if own.level_convention is None else own.level_convention,
    )


def _box_head(config: ModelConfig, channels: int) -> BoxHead | MeanBoxHead:
    by_sigmoid = config.losses.classifier == "sigmoid_focal"
    bias = _focal(config).bias if by_sigmoid else 0.0
    if config.neck == "c4":
        return MeanBoxHead(
            channels=channels, num_classes=config.num_classes, background=not by_sigmoid, class_bias=bias
        )
    return BoxHead(
        channels=channels,
        pool_size=config.box_pool_size,
        hidden=config.box_head_dim,
        num_classes=config.num_classes,
        background=not by_sigmoid,
        class_bias=bias,
    )


def _mask_head(config: ModelConfig, in_channels: int, num_masks: int) -> nn.Module:
    if config.mask_head == "mlp":
        return MLPMaskHead(
            in_channels=in_channels,
            pool_size=config.mask_pool_size,
            hidden=config.mask_mlp_dim,
            num_layers=config.mask_mlp_layers,
            num_masks=num_masks,
        )
    channels, fusion = config.mask_head_channels, None
    if config.mask_fusion_layers:
        fusion = MaskFusion(channels=channels, size=2 * config.mask_pool_size, num_layers=config.mask_fusion_layers)
    return MaskHead(
        in_channels=in_channels,
        channels=channels,
        num_layers=config.mask_head_layers,
        num_masks=num_masks if config.mask_transfer is None else None,
        norm=head_norm_layer(config.norm, config.norm_eps),
        fusion=fusion,
    )


def _roi_heads(config: ModelConfig, extractor: Extractor, channels: int) -> RoIHeads:
    box_head = _box_head(config, channels)
    return RoIHeads(
        extractor=extractor,
        box_head=box_head,
        box_pool_size=config.box_pool_size,
        fg_iou=config.box_fg_iou,
        bg_iou=config.box_bg_iou,
        batch_size=config.box_batch_size,
        positive_fraction=config.box_positive_fraction,
        score_threshold=config.box_score_threshold,
        nms_threshold=config.box_nms_threshold,
        max_detections=config.max_detections,
        class_loss=config.losses.classifier,
        box_loss=config.losses.box,
        focal=_focal(config),
        **_masks(config, channels, box_head.classifier.in_features),
        **_keypoints(config, channels),
    )


def _masks(config: ModelConfig, in_channels: int, box_features: int) -> dict[str, Any]:
    """The mask branch, as arguments of `RoIHeads`; none without masks."""
    if not config.masks:
        return {}
    branch = MaskBranch(
        pool_size=config.mask_pool_size,
        targets=config.convention.mask_targets,
        mask_loss=config.losses.mask,
        class_agnostic=config.mask_class_agnostic,
    )
    head = _mask_head(config, in_channels, branch.num_channels(config.num_classes))
    return {"mask_head": head, "mask_transfer": _mask_transfer(config, box_features), "mask_branch": branch}


def _keypoints(config: ModelConfig, in_channels: int) -> dict[str, Any]:
    """The keypoint branch, as arguments of `RoIHeads`; none without keypoints."""
    own = config.keypoints
    if own is None:
        return {}
    head = KeypointHead(
        in_channels=in_channels,
        channels=own.head_channels,
        num_layers=own.head_layers,
        num_keypoints=len(own.skeleton.names),
    )
    branch = KeypointBranch(pool_size=own.pool_size, size=4 * own.pool_size)
    return {"keypoint_head": head, "keypoint_branch": branch}


def _mask_transfer(config: ModelConfig, features: int) -> MaskTransfer | None:
    own = config.mask_transfer
    if own is None:
        return None
    return MaskTransfer(
        features=features,
        channels=config.mask_head_channels,
        inputs=own.inputs,
        num_layers=own.layers,
        activation=own.activation,
        stop_grad=own.stop_grad,
    )
