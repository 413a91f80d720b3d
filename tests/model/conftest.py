"""A small model, what it sees, and its variants: the one home of what the tests of the model share."""

from typing import Any

import pytest
import torch
from torch import Tensor

import tmask
from tmask.model.transform import ImageTransform
from tmask.structures import Detections, ImageBatch, Targets
from tmask_kernels.testing import assert_close

Batch = tuple[ImageBatch, Targets]
SMALL = {
    "min_size": 64,
    "max_size": 96,
    "fpn_channels": 16,
    "box_head_dim": 32,
    "mask_head_channels": 16,
    "mask_head_layers": 1,
    "rpn_pre_nms_top_n_train": 40,
    "rpn_pre_nms_top_n_test": 40,
    "rpn_post_nms_top_n_train": 30,
    "rpn_post_nms_top_n_test": 30,
    "rpn_batch_size": 32,
    "box_batch_size": 16,
    "max_detections": 10,
    "box_score_threshold": 0.0,
}
ONE_LEVEL = ((8.0, 16.0, 32.0, 64.0),)
# As the presets r50_c4 and tiny_c5, smaller. Batch statistics of conv5's RoIs are refused, see test_config.py.
NECKS: dict[str, dict[str, Any]] = {
    "fpn": {},
    "c4": {"neck": "c4", "norm": "gn", "anchor_sizes": ONE_LEVEL, "mask_pool_size": 7, "mask_head_layers": 0,
           "mask_head_channels": 32},
    "c5": {"neck": "c5", "anchor_sizes": ONE_LEVEL},
}  # fmt: skip
KEYPOINTS = {"names": ("nose", "left_ear", "right_ear"), "head_channels": 16, "head_layers": 1}
FOCAL = {"rpn_objectness": "focal", "rpn_box": "diou", "classifier": "sigmoid_focal", "box": "ciou"}
MLP = {"mask_head": "mlp", "mask_mlp_dim": 32, "mask_mlp_layers": 3}
# Each choice of the config in one model at least; test_variants.py and test_fake_cuda.py run them.
VARIANTS: dict[str, dict[str, Any]] = {
    **NECKS,
    "frozen_bn": {"norm": "frozen_bn", "trainable_layers": 5},
    "gn": {"norm": "gn", "fpn_channels": 32, "mask_head_channels": 32},
    "torchvision's convention": {"convention": "torchvision"},
    "keypoints": {"keypoints": KEYPOINTS},
    "no masks": {"masks": False},
    "sigmoid focal": {"losses": FOCAL},
    "softmax focal": {"losses": {"classifier": "softmax_focal", "box": "giou", "mask": "softmax"}},
    "MLP": {**MLP, "losses": {"mask": "softmax"}, "mask_class_agnostic": True},
    "transfer": {"mask_transfer": {}, "mask_fusion_layers": 1, "mask_pool_size": 7},
    "transfer of boxes": {"mask_transfer": {"inputs": "box", "activation": "relu", "layers": 3, "stop_grad": False}},
    "fusion": {"mask_fusion_layers": 2, "mask_pool_size": 7, "mask_class_agnostic": True},
    "bicubic": {"roi_extractor": {"interpolation": "bicubic"}},
    "max": {"roi_extractor": {"reduction": "max", "sampling_ratio": 2}},
    "roi_pool": {"roi_extractor": {"op": "roi_pool"}},
}
TRANSFORM = ImageTransform(
    num_classes=99, min_size=64, max_size=96, image_mean=(0.5, 0.5, 0.5), image_std=(0.25, 0.25, 0.25),
    size_divisible=32, antialias=True, mask_resize="bilinear", keep_crowds=True,
)  # fmt: skip
SPOTS = ((0.25, 2.0), (0.5, 1.0), (0.75, 0.0))  # part of the way through the box, visibility


def small(preset: str = "tiny", **settings: Any) -> tmask.MaskRCNN:
    """A small model, of 4 classes unless told, the same at every call."""
    torch.manual_seed(0)
    return tmask.build_model(preset, **{"num_classes": 4, **SMALL, **settings})


def images_and_targets(*, keypoints: bool = False) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images of different, odd sizes with two and one objects; with three `keypoints`, as `SPOTS` says."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 61, 83, generator=generator), torch.rand(3, 77, 59, generator=generator)]
    boxes = [torch.tensor([[5.0, 6.0, 35.0, 40.0], [40.0, 20.0, 70.0, 50.0]]), torch.tensor([[10.0, 12.0, 50.0, 60.0]])]
    targets = []
    for image, box in zip(images, boxes, strict=True):
        masks = torch.zeros(len(box), *image.shape[1:], dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, box.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        targets.append({"boxes": box, "labels": torch.arange(1, len(box) + 1), "masks": masks})
        if keypoints:
            corner, side = box[:, :2], box[:, 2:] - box[:, :2]
            points = [torch.cat([corner + part * side, torch.full((len(box), 1), v)], 1) for part, v in SPOTS]
            targets[-1]["keypoints"] = torch.stack(points, dim=1)  # [G, 3, 3]
    return images, targets


def padded(model: tmask.MaskRCNN) -> tuple[ImageBatch, Targets]:
    """The images and targets as `model` takes them."""
    images, targets = model.transform(*images_and_targets(keypoints=model.config.keypoints is not None))
    assert targets is not None
    return images, targets


def losses_of(model: tmask.MaskRCNN, batch: Batch | None = None, *, compact: bool = False) -> dict[str, Tensor]:
    """The losses in training, of the same samples at every call."""
    images, targets = batch or padded(model)
    torch.manual_seed(1)  # the samplers draw
    losses = model.train().forward_padded(images, targets, compact=compact)
    assert isinstance(losses, dict)
    return losses


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def assert_same_gradients(got: Tensor, expected: Tensor, inputs: Any, upstream: Tensor | None = None) -> Any:
    """Two values have the same gradient of each of `inputs`, a tensor or several. Returns these gradients."""
    found, wanted = (torch.autograd.grad(value, inputs, upstream) for value in (got, expected))
    for gradient, want in zip(found, wanted, strict=True):
        assert_close(gradient, want)
    return found


@torch.no_grad()
def detected(model: tmask.MaskRCNN, batch: Batch | None = None, *, compact: bool = False) -> Detections:
    found = model.eval().forward_padded((batch or padded(model))[0], compact=compact)
    assert isinstance(found, Detections)
    return found


def watched(model: tmask.MaskRCNN) -> tuple[dict[str, tuple[Any, Any]], Detections]:
    """What goes into and comes out of FPN, RPN and heads in inference, and the result."""
    seen: dict[str, tuple[Any, Any]] = {}
    parts = {"fpn": model.fpn, "rpn": model.rpn, "box": model.roi_heads.box_head, "mask": model.roi_heads.mask_head}
    for part, module in parts.items():
        module.register_forward_hook(lambda _, inputs, output, part=part: seen.update({part: (inputs, output)}))
    return seen, detected(model)


@pytest.fixture
def small_model() -> tmask.MaskRCNN:
    return small()


@pytest.fixture
def keypoint_model() -> tmask.MaskRCNN:
    return small(keypoints=KEYPOINTS)


@pytest.fixture
def batch(small_model: tmask.MaskRCNN) -> Batch:
    return padded(small_model)
