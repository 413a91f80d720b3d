"""Checks of what ops that pool boxes from feature maps are given, and the forms of their boxes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_features(features: list[Tensor], scales: list[float]) -> None:
    """Features [N, C, H, W], one a spatial scale, of one N, C, dtype and device. Errors: ValueError."""
    if len(features) != len(scales):
        raise ValueError(f"features: expected one a spatial scale ({len(scales)}), got {len(features)}")
    for feature in features:
        if feature.dim() != 4 or feature.shape[:2] != features[0].shape[:2]:
            shapes = [tuple(f.shape) for f in features]
            raise ValueError(f"features: expected [N, C, H, W] with one N and one C, got {shapes}")
        if not feature.dtype.is_floating_point or feature.dtype != features[0].dtype:
            raise ValueError(f"features: expected one floating point dtype, got {[f.dtype for f in features]}")
        if feature.device != features[0].device:
            raise ValueError(f"features: expected one device, got {[str(f.device) for f in features]}")


def boxes_as_tensor(feature: Tensor, boxes: Tensor | Sequence[Tensor], valid: Tensor | None) -> Tensor:
    """Check `boxes` and `valid`; join a list of [L, 4] to [K, 5]. Errors: ValueError."""
    N = feature.shape[0]
    if not isinstance(boxes, Tensor):
        if len(boxes) != N or any(b.dim() != 2 or b.shape[1] != 4 for b in boxes):
            shapes = [tuple(b.shape) for b in boxes]
            raise ValueError(f"boxes: expected {N} tensors [L, 4], one an image, got {shapes}")
        # Half precision does not hold every image's index.
        wide = [b.to(torch.promote_types(b.dtype, torch.float32)) if b.is_floating_point() else b for b in boxes]
        rows = [torch.nn.functional.pad(b, (1, 0), value=float(i)) for i, b in enumerate(wide)]
        boxes = torch.cat(rows) if rows else feature.new_zeros((0, 5), dtype=torch.float32)
    flat, padded = boxes.dim() == 2 and boxes.shape[1] == 5, boxes.dim() == 3 and boxes.shape[::2] == (N, 4)
    if not flat and not padded:
        raise ValueError(f"boxes: expected [K, 5], a list of [L, 4] or [{N}, P, 4], got {tuple(boxes.shape)}")
    if not boxes.dtype.is_floating_point:
        raise ValueError(f"boxes: expected a floating point dtype, got {boxes.dtype}")
    if boxes.device != feature.device:
        raise ValueError(f"boxes: expected the features' device {feature.device}, got {boxes.device}")
    if valid is not None and (not padded or valid.shape != boxes.shape[:2] or valid.dtype != torch.bool):
        raise ValueError(
            f"valid: expected bool [N, P] with boxes [N, P, 4], got {valid.dtype} {tuple(valid.shape)} "
            f"with boxes {tuple(boxes.shape)}"
        )
    if valid is not None and valid.device != feature.device:
        raise ValueError(f"valid: expected the features' device {feature.device}, got {valid.device}")
    return boxes


def check_image_indices(boxes: Tensor, num_images: int) -> None:
    """That boxes [K, 5] name images that exist; reads values. Errors: ValueError."""
    index = boxes[:, 0].detach()
    inside = (index > -1) & (index < num_images)
    if not bool(inside.all()):
        raise ValueError(f"boxes: expected image indices in 0..{num_images - 1}, got {index[~inside][0].item()}")


def is_traced(tensor: Tensor) -> bool:
    """Whether values cannot be read: under torch.compile, torch.export, or on fake and meta tensors."""
    from torch._subclasses.fake_tensor import FakeTensor

    return torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or tensor.device.type == "meta"
