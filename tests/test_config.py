"""Configs as data: their fields are a contract, and they survive YAML."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tmask.config import (
    CONVENTIONS,
    Convention,
    DataConfig,
    KeypointConfig,
    LossConfig,
    MaskTransferConfig,
    ModelConfig,
    RoIExtractorConfig,
    TrainConfig,
    from_dict,
)
from tmask.presets import PRESETS, TRAIN_PRESETS, model_config
from tmask.skeleton import PERSON, UNKNOWN_SIGMA, Skeleton, make_skeleton

FIELDS = {
    DataConfig: """train_images train_annotations val_images val_annotations mask_classes crowds hflip vflip
        min_crop min_sizes exif check skip_bad num_workers aspect_grouping""",
    TrainConfig: """steps batch_size only optimizer accumulate lr momentum weight_decay decay_norm_and_bias schedule
        milestones lr_floor warmup_steps warmup_start clip_norm ema_decay precision channels_last seed log_every
        checkpoint_every eval_every eval_max_detections tensorboard""",
    ModelConfig: """num_classes convention min_size max_size image_mean image_std size_divisible backbone
        backbone_weights norm norm_eps trainable_layers neck fpn_channels anchor_sizes anchor_aspect_ratios rpn_fg_iou
        rpn_bg_iou rpn_batch_size rpn_positive_fraction rpn_pre_nms_top_n_train rpn_pre_nms_top_n_test
        rpn_post_nms_top_n_train rpn_post_nms_top_n_test rpn_nms_threshold rpn_min_size rpn_score_threshold
        roi_extractor box_pool_size box_head_dim box_fg_iou box_bg_iou box_batch_size box_positive_fraction
        box_score_threshold box_nms_threshold max_detections masks mask_pool_size mask_head mask_head_channels
        mask_head_layers mask_fusion_layers mask_mlp_dim mask_mlp_layers mask_class_agnostic mask_transfer keypoints
        losses loss_rpn_objectness loss_rpn_box loss_classifier loss_box loss_mask loss_keypoint""",
    KeypointConfig: """names edges flip_pairs sigmas pool_size head_channels head_layers""",
    MaskTransferConfig: """inputs layers activation stop_grad""",
    RoIExtractorConfig: """op reduction interpolation sampling_ratio aligned level_convention""",
    LossConfig: """rpn_objectness rpn_box classifier box mask focal_alpha focal_gamma focal_prior""",
}


@pytest.mark.parametrize("cls", list(FIELDS), ids=lambda cls: cls.__name__)
def test_fields_are_a_contract(cls: type) -> None:
    assert [item.name for item in dataclasses.fields(cls)] == FIELDS[cls].split()


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_configs_survive_yaml(name: str) -> None:
    for config in (PRESETS[name], TRAIN_PRESETS[name], DataConfig(hflip=0.25)):
        text = yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config))))
        assert from_dict(type(config), yaml.safe_load(text)) == config


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("keypoints", {}, KeypointConfig()),
        (
            "keypoints",
            {"names": ["a", "b"], "edges": [[0, 1]], "sigmas": [0.1, 0.2]},
            KeypointConfig(names=("a", "b"), edges=((0, 1),), sigmas=(0.1, 0.2)),
        ),
        ("keypoints", None, None),
        ("mask_transfer", {}, MaskTransferConfig()),
        (
            "mask_transfer",
            {"inputs": "cls", "layers": 1, "stop_grad": False},
            MaskTransferConfig(inputs="cls", layers=1, stop_grad=False),
        ),
        ("mask_transfer", None, None),
        ("roi_extractor", {"op": "roi_pool"}, RoIExtractorConfig(op="roi_pool")),
        ("roi_extractor", RoIExtractorConfig(op="roi_pool"), RoIExtractorConfig(op="roi_pool")),
    ],
)
def test_nested_settings_are_given_in_part_or_not_at_all(name: str, given: object, expected: object) -> None:
    config = model_config("tiny", **{name: given})
    assert getattr(config, name) == expected
    text = yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config))))
    assert from_dict(ModelConfig, yaml.safe_load(text)) == config


@pytest.mark.parametrize("name", ["roi_extractor", "losses", "masks", "mask_transfer", "keypoints"])
def test_settings_of_a_checkpoint_older_than_a_field_have_its_default(name: str) -> None:
    saved = dataclasses.asdict(PRESETS["tiny"])
    del saved[name]
    assert from_dict(ModelConfig, saved) == PRESETS["tiny"]


def test_keypoints_are_a_persons_unless_named() -> None:
    assert KeypointConfig().skeleton == PERSON == KeypointConfig(names=PERSON.names).skeleton
    own = KeypointConfig(names=("left_tip", "tail", "right_tip", "left_over")).skeleton
    assert own.flip_pairs == ((0, 2),)
    assert own.flip_order == (2, 1, 0, 3)
    assert own.edges == ()
    assert own.sigmas == (UNKNOWN_SIGMA,) * 4
    given = {"edges": ((0, 1),), "flip_pairs": ((1, 3),), "sigmas": (0.1, 0.2, 0.3, 0.4)}
    other = KeypointConfig(names=own.names, **given).skeleton  # type: ignore[arg-type]
    assert other == Skeleton(own.names, **given)  # type: ignore[arg-type]


def test_a_persons_keypoints_are_mirrored_by_their_names() -> None:
    assert make_skeleton(("Right Eye", "Nose", "Left Eye")).flip_pairs == ((2, 0),)
    assert make_skeleton(PERSON.names).flip_pairs == PERSON.flip_pairs
    order = PERSON.flip_order
    assert [order[number] for number in order] == list(range(17))
    for number, other in enumerate(order):
        sides = {"left": "right", "right": "left"}
        side = next((side for side in sides if side in PERSON.names[number]), None)
        assert PERSON.names[other] == (PERSON.names[number].replace(side, sides[side]) if side else "nose")


# He et al. 2017 and the schedule that its followers train R50-FPN with; the steps at which the rate falls:
# tests/engine/test_optimizer.py.
PUBLISHED_MODEL = {
    "min_size": 800, "max_size": 1333, "size_divisible": 32, "backbone": "resnet50", "norm": "frozen_bn",
    "trainable_layers": 3, "neck": "fpn", "fpn_channels": 256,
    "anchor_sizes": ((32,), (64,), (128,), (256,), (512,)), "anchor_aspect_ratios": (0.5, 1, 2),
    "rpn_fg_iou": 0.7, "rpn_bg_iou": 0.3, "rpn_batch_size": 256, "rpn_positive_fraction": 0.5,
    "rpn_pre_nms_top_n_train": 2000, "rpn_pre_nms_top_n_test": 1000, "rpn_nms_threshold": 0.7,
    "rpn_post_nms_top_n_train": 2000, "rpn_post_nms_top_n_test": 1000,
    "box_pool_size": 7, "box_head_dim": 1024, "box_fg_iou": 0.5, "box_bg_iou": 0.5, "box_batch_size": 512,
    "box_positive_fraction": 0.25, "box_score_threshold": 0.05, "box_nms_threshold": 0.5, "max_detections": 100,
    "mask_pool_size": 14, "mask_head": "fcn", "mask_head_channels": 256, "mask_head_layers": 4,
    "mask_mlp_dim": 1024, "mask_mlp_layers": 2,
}  # fmt: skip
PUBLISHED_TRAINING = {
    "optimizer": "sgd", "lr": 0.02, "batch_size": 16, "accumulate": 1, "momentum": 0.9, "weight_decay": 1e-4,
    "steps": 90_000, "schedule": "steps",
}  # fmt: skip
PUBLISHED_KEYPOINTS = {"pool_size": 14, "head_channels": 512, "head_layers": 8}
# From scratch on cell nuclei, with torchvision's Mask R-CNN: docs/recipes/nuclei.yaml.
SMALL_DATA_MODEL = {"backbone": "resnet18", "norm": "bn", "trainable_layers": 5}
SMALL_DATA_TRAINING = {
    "optimizer": "adamw", "lr": 4e-4, "weight_decay": 0.01, "decay_norm_and_bias": True, "clip_norm": 5.0,
    "batch_size": 4, "precision": "bf16",
}  # fmt: skip


def test_defaults_are_the_published_settings() -> None:
    for config, table in (
        (PRESETS["r50_fpn"], PUBLISHED_MODEL),
        (TRAIN_PRESETS["r50_fpn"], PUBLISHED_TRAINING),
        (KeypointConfig(), PUBLISHED_KEYPOINTS),
        (PRESETS["r18_fpn"], SMALL_DATA_MODEL),
        (TRAIN_PRESETS["r18_fpn"], SMALL_DATA_TRAINING),
    ):
        assert {name: getattr(config, name) for name in table} == table


def test_every_model_preset_has_training_defaults() -> None:
    assert sorted(PRESETS) == sorted(TRAIN_PRESETS)


def test_the_two_conventions_differ_and_are_named() -> None:
    assert sorted(CONVENTIONS) == ["detectron2", "torchvision"]
    assert model_config("tiny", convention="torchvision").convention == CONVENTIONS["torchvision"]
    assert model_config("tiny").convention == CONVENTIONS["detectron2"]
    whole = dataclasses.asdict(CONVENTIONS["torchvision"])
    assert model_config("tiny", convention=whole).convention == CONVENTIONS["torchvision"]


LITE0 = dataclasses.asdict(PRESETS["lite0_fpn"])
# By config class: values, and a part of the message. Others: docs/bad-input.md.
WRONG: dict[type, list[tuple[Any, str]]] = {
    TrainConfig: [
        ({"stepz": 3}, "unknown TrainConfig setting 'stepz': expected 'steps'?"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"accumulate": 0}, "accumulate: expected at least 1, got 0"),
        ({"ema_decay": 1.0}, "ema_decay: expected in [0, 1), got 1.0"),
        ({"optimizer": "adam"}, "optimizer: expected 'adamw'"),
        ({"schedule": "linear"}, "schedule: expected one of constant, cosine, steps, got 'linear'"),
        ({"clip_norm": 0.0}, "clip_norm: expected above 0, or none, got 0.0"),
        ({"warmup_start": 2.0}, "warmup_start: expected in 0..1, got 2.0"),
        ({"milestones": [60000.0]}, "milestones: expected fractions of steps"),
        ({"only": "boxes"}, "only: expected one of masks or none, got 'boxes'"),
        ({"lr": math.nan}, "lr: expected a finite number, got nan"),
        ({"lr": 10**400}, "lr: expected a finite number, got 1000"),
        ({"lr": "fast"}, "lr: expected a finite number, got 'fast'"),
        ({"milestones": [0.5, "x"]}, "milestones: expected a tuple (any number of: a finite number), got"),
        ({"channels_last": 1}, "channels_last: expected true or false, got 1"),
    ],
    Convention: [
        ({**dataclasses.asdict(CONVENTIONS["torchvision"]), "paste": "torch"}, "paste: expected 'torchvision'"),
    ],
    DataConfig: [
        ({"hflip": 1.5}, "hflip: expected in 0..1, got 1.5"),
        ({"min_crop": 0.0}, "min_crop: expected in (0, 1], got 0.0"),
        ({"min_sizes": [640, 0]}, "min_sizes: expected at least 1 each, got (640, 0)"),
        ({"num_workers": -1}, "num_workers: expected at least 0, got -1"),
        ({"train_images": Path("x")}, "train_images: expected a text or none, got"),
        ({"train_annotations": "x"}, "train_images: expected a path, as train_annotations has one"),
        (["hflip"], "DataConfig: expected settings by name, got ['hflip']"),
    ],
    ModelConfig: [
        ({"convention": {"paste_": 1}}, "unknown Convention setting 'paste_': expected 'paste'?"),
        ({"convention": {"paste": "torchvision"}}, "convention: Convention: expected a setting 'roi_align"),
        ({"convention": "torchvision"}, "convention: expected a Convention, got 'torchvision'"),
        ({"roi_extractor": "roi_pool"}, "roi_extractor: expected a RoIExtractorConfig, got 'roi_pool'"),
        ({"roi_extractor": {"opp": 1}}, "roi_extractor: unknown RoIExtractorConfig setting 'opp'"),
        ({"box_bg_iou": 0.6}, "box_bg_iou: expected at most box_fg_iou (0.5), got 0.6"),
        ({"rpn_nms_threshold": 1.5}, "rpn_nms_threshold: expected in 0..1, got 1.5"),
        ({"norm": "frozen"}, "norm: expected 'frozen_bn'?, got 'frozen'"),
        ({"keypoints": "person"}, "keypoints: expected a KeypointConfig or none, got 'person'"),
        ({"keypoints": {"nams": ["a"]}}, "keypoints: unknown KeypointConfig setting 'nams': expected"),
        ({"num_classes": 3.0}, "num_classes: expected a whole number, got 3.0"),
        ({"num_classes": True}, "num_classes: expected a whole number, got True"),
        ({"backbone": "resnet51"}, "backbone: expected 'resnet50'?, got 'resnet51'"),
        ({"backbone_weights": 3}, "backbone_weights: expected a text or none, got 3"),
        ({"backbone_weights": "installed"}, "backbone_weights: expected a file, as 'installed' names weights of eff"),
        (LITE0 | {"backbone_weights": "a.pth"}, "backbone_weights: expected 'installed' or none with efficientnet_li"),
        (LITE0 | {"norm": "gn"}, "norm: expected 'bn', 'sync_bn' or 'frozen_bn' with efficientnet_lite0, got 'gn'"),
        (
            LITE0 | {"neck": "c4", "anchor_sizes": [[8]], "norm": "frozen_bn"},
            "neck: expected 'fpn' or 'c5' with efficientnet_lite0",
        ),
        (LITE0 | {"norm_eps": 1e-5}, "norm_eps: expected 0.001 with the installed weights, as in the preset lite0_f"),
        (LITE0 | {"image_mean": [0.485, 0.456, 0.406]}, "image_mean: expected (0.498"),
        (LITE0 | {"image_std": [0.229, 0.224, 0.225]}, "image_std: expected (0.501"),
        ({"image_mean": [0.2, 0.2]}, "image_mean: expected a tuple (3 of: a finite number), got (0.2, 0.2)"),
        ({"image_mean": "grey"}, "image_mean: expected a tuple (3 of: a finite number), got 'grey'"),
        ({"max_size": -1}, "min_size: expected in 1..max_size, got 800"),
        ({"trainable_layers": 6}, "trainable_layers: expected in 0..5, got 6"),
        ({"neck": "c6", "anchor_sizes": [[8]]}, "neck: expected one of c4, c5, fpn, got 'c6'"),
        (
            {"neck": "c4", "anchor_sizes": [[8]], "norm": "sync_bn"},
            "norm: expected 'frozen_bn' or 'gn', as the neck c4",
        ),
        ({"norm": "gn", "mask_head_channels": 16}, "mask_head_channels: expected a multiple of the 32"),
        ({"anchor_sizes": [[8], [8], [8], [8], [0]]}, "anchor_sizes: expected numbers above 0"),
        ({"anchor_aspect_ratios": []}, "anchor_aspect_ratios: expected numbers above 0, at least one, got"),
        ({"anchor_aspect_ratios": [1, -1]}, "anchor_aspect_ratios: expected numbers above 0"),
        ({"box_score_threshold": 1.5}, "box_score_threshold: expected in 0..1, got 1.5"),
        ({"box_positive_fraction": 0}, "box_positive_fraction: expected in (0, 1], got 0"),
        (
            {"rpn_batch_size": 9, "rpn_positive_fraction": 0.1},
            "rpn_batch_size: expected enough for a positive at rpn_positive_fraction (0.1), got 9",
        ),
        ({"rpn_min_size": -1.0}, "rpn_min_size: expected at least 0, got -1.0"),
        ({"loss_mask": math.nan}, "loss_mask: expected a finite number, got nan"),
        ({"mask_head_layers": -1}, "mask_head_layers: expected at least 0, got -1"),
        ({"box_pool_size": 0}, "box_pool_size: expected at least 1, got 0"),
        ({"mask_head": "fc"}, "mask_head: expected 'fcn'?, got 'fc'"),
        ({"mask_mlp_dim": 0}, "mask_mlp_dim: expected at least 1, got 0"),
        ({"mask_mlp_layers": 0}, "mask_mlp_layers: expected at least 1, got 0"),
        ({"mask_class_agnostic": 1}, "mask_class_agnostic: expected true or false, got 1"),
        ({"mask_fusion_layers": 3}, "mask_fusion_layers: expected 0, 1 or 2, got 3"),
        ({"mask_fusion_layers": 1, "mask_head": "mlp"}, "mask_head: expected 'fcn' with mask_fusion_lay"),
        ({"mask_transfer": {}, "mask_head": "mlp"}, "mask_head: expected 'fcn' with mask_transfer, got"),
        ({"mask_transfer": {}, "losses": {"mask": "softmax"}}, "losses.mask: expected 'sigmoid' with mas"),
        ({"mask_transfer": {}, "mask_class_agnostic": True}, "mask_class_agnostic: expected false with"),
        ({"mask_transfer": {"layers": 4}}, "mask_transfer: layers: expected in 1..3, got 4"),
        ({"mask_transfer": {"layer": 1}}, "mask_transfer: unknown MaskTransferConfig setting 'layer'"),
        ({"masks": 0}, "masks: expected true or false, got 0"),
        ({"masks": False, "mask_head": "mlp"}, "mask_head: expected 'fcn' with masks false, got 'mlp'"),
        ({"masks": False, "mask_class_agnostic": True}, "mask_class_agnostic: expected false with masks"),
        ({"masks": False, "mask_transfer": {}}, "mask_transfer: expected none with masks false, got Mask"),
        ({"masks": False, "losses": {"mask": "softmax"}}, "losses.mask: expected 'sigmoid' with masks fa"),
    ],
    RoIExtractorConfig: [
        ({"op": "roi_pol"}, "op: expected 'roi_pool'?, got 'roi_pol'"),
        ({"sampling_ratio": -1}, "sampling_ratio: expected at least 0, or none, got -1"),
        ({"aligned": 1}, "aligned: expected true or false or none, got 1"),
        (
            {"op": "roi_pool", "interpolation": "bicubic"},
            "interpolation: expected 'bilinear', as roi_pool has no such option, got 'bicubic'",
        ),
        ({"op": "roi_pool", "reduction": "max"}, "reduction: expected 'mean', as roi_pool has no"),
        ({"op": "roi_pool", "sampling_ratio": 0}, "sampling_ratio: expected None, as roi_pool has"),
    ],
    KeypointConfig: [
        ({"names": []}, "names: expected at least one, none of them twice, got ()"),
        ({"names": ["a", "a"]}, "names: expected at least one, none of them twice, got ('a', 'a')"),
        ({"names": ["a"], "edges": [[0, 1]]}, "edges: expected pairs of numbers in 0..0, got ((0, 1),)"),
        ({"flip_pairs": [[0, 0]]}, "flip_pairs: expected pairs of numbers in 0..16, got ((0, 0),)"),
        ({"flip_pairs": [[0, 1], [1, 2]]}, "flip_pairs: expected each keypoint in one pair at most"),
        ({"sigmas": [0.1]}, "sigmas: expected 17 numbers above 0, one a name, got (0.1,)"),
        ({"names": ["a"], "sigmas": [0]}, "sigmas: expected 1 numbers above 0, one a name, got (0,)"),
        ({"head_layers": 0}, "head_layers: expected at least 1, got 0"),
    ],
    LossConfig: [
        ({"rpn_objectness": "focl"}, "rpn_objectness: expected 'focal'?, got 'focl'"),
        ({"box": "iou"}, "box: expected 'giou'?, got 'iou'"),
        ({"focal_alpha": 1.5}, "focal_alpha: expected 0..1, or below 0 for no weights, got 1.5"),
        ({"focal_gamma": -1.0}, "focal_gamma: expected at least 0, got -1.0"),
        ({"focal_gamma": 1.0}, "focal_gamma: expected 2.0, as no chosen loss takes it"),
        ({"classifier": "softmax_focal", "focal_alpha": 0.9}, "focal_alpha: expected 0.25, as no chosen"),
        ({"classifier": "softmax_focal", "focal_prior": 0.2}, "focal_prior: expected 0.01, as no chosen"),
        ({"mask": "sigmod"}, "mask: expected 'sigmoid'?, got 'sigmod'"),
    ],
}


@pytest.mark.parametrize(("cls", "values", "message"), [(cls, *row) for cls, rows in WRONG.items() for row in rows])
def test_wrong_values_name_field_expected_and_got(cls: type, values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        from_dict(cls, values)


def test_one_positive_in_a_sample_is_enough() -> None:
    ModelConfig(box_batch_size=4, rpn_batch_size=10, rpn_positive_fraction=0.1)


def test_overrides_take_lists_and_presets_have_names() -> None:
    assert model_config("tiny", image_mean=[0.1, 0.2, 0.3]).image_mean == (0.1, 0.2, 0.3)
    assert model_config("tiny", anchor_sizes=[[8], [16], [32], [64], [128]]).anchor_sizes[4] == (128,)
    with pytest.raises(ValueError, match="preset: expected a name or a ModelConfig, got 50"):
        model_config(50)  # type: ignore[arg-type]


def test_every_preset_may_be_without_masks() -> None:
    """Sizes of the mask head are not used then: presets have their own, and GroupNorm does not divide them."""
    for preset in PRESETS:
        assert not model_config(preset, masks=False).masks
    assert not model_config("r50_fpn", masks=False, norm="gn", mask_head_channels=16).masks


def test_a_focal_rpn_samples_no_anchors() -> None:
    losses = {"rpn_objectness": "focal"}
    assert from_dict(ModelConfig, {"num_classes": 4, "rpn_batch_size": 1, "losses": losses}).rpn_batch_size == 1
