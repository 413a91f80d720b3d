"""Inputs that look like a detector's, made from a seed. Letters: N images, K boxes of an image, C channels, S segments.

RoIs have log-uniform scales, varied aspect and stand in clusters around a few objects, as proposals do: uniform boxes
would touch far more distinct feature cells, and NMS would remove almost none of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STRIDES = (4, 8, 16, 32)  # P2-P5


@dataclass(frozen=True, kw_only=True)
class PyramidCase:
    """Pooling RoIs from four FPN levels of N images of height x width pixels."""

    images: int
    height: int
    width: int
    channels: int
    rois: int  # of all images
    pooled: int


@dataclass(frozen=True, kw_only=True)
class NMSCase:
    """Segments of equally many boxes."""

    segments: int
    boxes: int
    threshold: float
    keep: int


# Two 800 x 1344 images: the box head's and the mask head's pooling, and the RPN's NMS (five levels of two images).
W1 = PyramidCase(images=2, height=800, width=1344, channels=256, rois=1024, pooled=7)
W2 = PyramidCase(images=2, height=800, width=1344, channels=256, rois=256, pooled=14)
W5 = NMSCase(segments=10, boxes=2000, threshold=0.7, keep=1000)

# The same work at a size that a CPU does in milliseconds.
SMALL_PYRAMID = PyramidCase(images=2, height=256, width=320, channels=64, rois=128, pooled=7)
SMALL_NMS = NMSCase(segments=10, boxes=400, threshold=0.7, keep=200)


def rois(num_images: int, per_image: int, height: int, width: int, *, seed: int = 0) -> Tensor:
    """Proposal-like boxes [N, K, 4], xyxy float32 pixels, clustered around 10-50 objects an image."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    boxes = []
    for _ in range(num_images):
        objects = int(torch.randint(10, 51, (1,), generator=generator))
        centre = uniform(objects, 2) * torch.tensor([width, height])
        longest = min(800.0, float(max(height, width)))
        scale = 16 * (longest / 16) ** uniform(objects)
        aspect = 0.3 * 10 ** uniform(objects)  # 0.3 to 3
        side = torch.stack([scale / aspect.sqrt(), scale * aspect.sqrt()], dim=1)
        owner = torch.randint(objects, (per_image,), generator=generator)
        jitter = torch.randn(per_image, 2, generator=generator) * 0.15
        near_side = side[owner] * torch.exp(torch.randn(per_image, 2, generator=generator) * 0.2)
        near_centre = centre[owner] + jitter * side[owner]
        box = torch.cat([near_centre - near_side / 2, near_centre + near_side / 2], dim=1)
        boxes.append(box.clamp(min=0).minimum(torch.tensor([width, height, width, height], dtype=torch.float32)))
    return torch.stack(boxes)


def pyramid(case: PyramidCase, *, dtype: torch.dtype, channels_last: bool, device: torch.device) -> list[Tensor]:
    """Random features [N, C, H / stride, W / stride] of P2-P5."""
    generator = torch.Generator().manual_seed(1)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return [
        torch.randn(case.images, case.channels, case.height // s, case.width // s, generator=generator)
        .to(device, dtype)
        .contiguous(memory_format=layout)
        for s in STRIDES
    ]


def nms_inputs(case: NMSCase, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Clustered boxes [S, K, 4] and distinct scores [S, K]."""
    boxes = rois(case.segments, case.boxes, 800, 1344, seed=2)
    generator = torch.Generator().manual_seed(3)
    scores = torch.stack([torch.randperm(case.boxes, generator=generator) for _ in range(case.segments)])
    return boxes.to(device), scores.float().div(case.boxes).to(device)
