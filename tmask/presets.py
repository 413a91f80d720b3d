"""Named settings of the model, each with settings for its training."""

from __future__ import annotations

import dataclasses
from typing import Any

from tmask.checks import nearest
from tmask.config import CONVENTIONS, INSTALLED, LITE0_SETTINGS, ModelConfig, TrainConfig, from_dict

_R50 = ModelConfig()

# Small enough to learn from scratch on two CPU cores in minutes; images of about 128 px.
_TINY = ModelConfig(
    min_size=128,
    max_size=192,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.25, 0.25, 0.25),
    backbone="resnet10",
    norm="bn",
    trainable_layers=5,
    fpn_channels=64,
    anchor_sizes=((12.0,), (20.0,), (32.0,), (48.0,), (72.0,)),
    rpn_batch_size=128,
    rpn_pre_nms_top_n_train=256,
    rpn_pre_nms_top_n_test=256,
    rpn_post_nms_top_n_train=128,
    rpn_post_nms_top_n_test=128,
    box_head_dim=256,
    box_batch_size=64,
    max_detections=50,
    mask_head_channels=64,
)

# A small backbone with ImageNet weights that pip brings. Its batch norms learn, as small data may look like no
# photograph.
_LITE0 = dataclasses.replace(
    _R50,
    backbone="efficientnet_lite0",
    backbone_weights=INSTALLED,
    norm="bn",
    trainable_layers=4,
    **LITE0_SETTINGS,
)

PRESETS: dict[str, ModelConfig] = {
    "tiny": _TINY,
    "tiny_c5": dataclasses.replace(_TINY, neck="c5", anchor_sizes=((12.0, 20.0, 32.0, 48.0, 72.0),)),
    "r18_fpn": dataclasses.replace(_R50, backbone="resnet18", norm="bn", trainable_layers=5),
    "lite0_fpn": _LITE0,
    "lite0_fpn_320": dataclasses.replace(
        _LITE0, min_size=320, max_size=533, anchor_sizes=((16.0,), (32.0,), (64.0,), (128.0,), (256.0,))
    ),
    "r50_fpn": _R50,
    "r101_fpn": dataclasses.replace(_R50, backbone="resnet101"),
    "x101_fpn": dataclasses.replace(_R50, backbone="resnext101_32x8d"),
    # As detectron2 trains it: 14 x 14 bins that conv5 brings to 7 x 7, masks of 14 x 14, and as many boxes into the NMS
    # of the one level as Faster R-CNN's own code. The paper samples 64 RoIs an image and tests 300.
    "r50_c4": dataclasses.replace(
        _R50,
        neck="c4",
        anchor_sizes=((32.0, 64.0, 128.0, 256.0, 512.0),),
        rpn_pre_nms_top_n_train=12_000,
        rpn_pre_nms_top_n_test=6_000,
        mask_pool_size=7,
        mask_head_layers=0,
    ),
}


_SMALL_DATA = TrainConfig(
    steps=1000,
    batch_size=4,
    optimizer="adamw",
    lr=4e-4,
    weight_decay=0.01,
    schedule="cosine",
    lr_floor=0.01,
    warmup_steps=49,
    warmup_start=1 / 50,
    clip_norm=5.0,
)

# The training defaults that go with each preset of the model: the small ones learn small data, the
# others follow the published schedule of fine-tuning from ImageNet weights.
TRAIN_PRESETS: dict[str, TrainConfig] = {
    "tiny": _SMALL_DATA,
    "tiny_c5": _SMALL_DATA,
    "r18_fpn": _SMALL_DATA,
    "lite0_fpn": _SMALL_DATA,
    "lite0_fpn_320": _SMALL_DATA,
    "r50_fpn": TrainConfig(),
    "r101_fpn": TrainConfig(),
    "x101_fpn": TrainConfig(),
    "r50_c4": TrainConfig(),
}


def model_config(preset: str | ModelConfig, **overrides: Any) -> ModelConfig:
    """Return a preset (or a config) with some fields replaced; ``convention`` may be a name of ``CONVENTIONS``.

    Raises:
        ValueError: A preset, field or convention is unknown (with the nearest name), or a value is impossible.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"preset: expected {nearest(preset, PRESETS)}, got {preset!r}")
        preset = PRESETS[preset]
    if not isinstance(preset, ModelConfig):
        raise ValueError(f"preset: expected a name or a ModelConfig, got {preset!r}")
    convention = overrides.get("convention")
    if isinstance(convention, str):
        if convention not in CONVENTIONS:
            raise ValueError(f"convention: expected {nearest(convention, CONVENTIONS)}, got {convention!r}")
        overrides["convention"] = CONVENTIONS[convention]
    config: ModelConfig = from_dict(ModelConfig, vars(preset) | overrides)
    return config
