from typing import Any

import pytest
import torch
from torch import Tensor

import tmask
from tmask.model.transform import ImageTransform
from tmask.structures import ImageBatch, Targets

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
TRANSFORM = ImageTransform(
    num_classes=99, min_size=64, max_size=96, image_mean=(0.5, 0.5, 0.5), image_std=(0.25, 0.25, 0.25),
    size_divisible=32, antialias=True, mask_resize="bilinear", keep_crowds=True,
)  # fmt: skip
SPOTS = ((0.25, 2.0), (0.5, 1.0), (0.75, 0.0))  # part of the way through the box, visibility


@pytest.fixture
def small_model() -> tmask.MaskRCNN:
    torch.manual_seed(0)
    return tmask.build_model("tiny", num_classes=4, **SMALL)


def images_and_targets() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images of different, odd sizes with two and one objects."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 61, 83, generator=generator), torch.rand(3, 77, 59, generator=generator)]
    boxes = [torch.tensor([[5.0, 6.0, 35.0, 40.0], [40.0, 20.0, 70.0, 50.0]]), torch.tensor([[10.0, 12.0, 50.0, 60.0]])]
    targets = []
    for image, box in zip(images, boxes, strict=True):
        masks = torch.zeros(len(box), *image.shape[1:], dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, box.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        targets.append({"boxes": box, "labels": torch.arange(1, len(box) + 1), "masks": masks})
    return images, targets


@pytest.fixture
def keypoint_model() -> tmask.MaskRCNN:
    """`small_model` with a keypoint branch."""
    torch.manual_seed(0)
    return tmask.build_model("tiny", num_classes=4, **SMALL, keypoints=KEYPOINTS)


@pytest.fixture
def keypoint_batch(keypoint_model: tmask.MaskRCNN) -> tuple[ImageBatch, Targets]:
    """`images_and_targets` with three keypoints on the diagonal of each box, as `SPOTS` says."""
    images, targets = images_and_targets()
    for target in targets:
        corner, side = target["boxes"][:, :2], target["boxes"][:, 2:] - target["boxes"][:, :2]
        points = [torch.cat([corner + part * side, torch.full((len(side), 1), v)], 1) for part, v in SPOTS]
        target["keypoints"] = torch.stack(points, dim=1)  # [G, 3, 3]
    padded, padded_targets = keypoint_model.transform(images, targets)
    assert padded_targets is not None
    return padded, padded_targets


@pytest.fixture
def batch(small_model: tmask.MaskRCNN) -> tuple[ImageBatch, Targets]:
    images, targets = images_and_targets()
    padded, padded_targets = small_model.transform(images, targets)
    assert padded_targets is not None
    return padded, padded_targets
