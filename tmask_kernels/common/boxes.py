"""Checks of box and feature arguments, and the one form that the ops turn boxes into."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backend import under_vmap
from .checks import check_list, check_tensor, wrong


def check_features(op: str, features: list[Tensor], name: str = "features") -> None:
    """Check feature maps [N, C, H, W], one a level: all have the same N, C, dtype and device.

    Args:
        op: the public function, for the message.
        features: the maps.
        name: the argument's name; "features" is a list, any other name a single map.

    Raises:
        ValueError: a map is of another shape, dtype or device.
    """
    first = features[0]
    check_tensor(op, f"{name}[0]" if name == "features" else name, first, ("N", "C", "H", "W"), "float")
    N, C, _, _ = first.shape
    for i, feature in enumerate(features[1:], 1):
        check_tensor(op, f"features[{i}]", feature, (N, C, "H", "W"), "float", device=first.device)
        if feature.dtype != first.dtype:
            raise wrong(op, f"features[{i}]", f"the dtype of the first, {first.dtype}", feature)


def boxes_as_tensor(op: str, feature: Tensor, boxes: Tensor | Sequence[Tensor], valid: Tensor | None) -> Tensor:
    """Check `boxes` and `valid`, and return the boxes as one tensor: [N, P, 4], or [K, 5] with the image's index first.

    Raises:
        ValueError: boxes or valid have a wrong shape, dtype or device.
    """
    N, device = feature.shape[0], feature.device
    if not isinstance(boxes, Tensor):
        expected = f"[K, 5], a list of {N} tensors [L, 4], one an image, or [{N}, P, 4]"
        images = check_list(op, "boxes", boxes, expected, N)
        for i, b in enumerate(images):
            check_tensor(op, f"boxes[{i}]", b, ("L", 4), "float", device=device)
        # Half precision cannot hold the index of every image.
        wide = [b.to(torch.promote_types(b.dtype, torch.float32)) for b in images]
        rows = [torch.nn.functional.pad(b, (1, 0), value=float(i)) for i, b in enumerate(wide)]
        boxes = torch.cat(rows) if rows else feature.new_zeros((0, 5), dtype=torch.float32)
    padded = boxes.ndim == 3
    hint = "" if padded else f", a list of {N} tensors [L, 4] or [{N}, P, 4]"
    check_tensor(op, "boxes", boxes, (N, "P", 4) if padded else ("K", 5), "float", device=device, hint=hint)
    if valid is not None:
        if not padded:
            raise wrong(op, "valid", "None unless boxes are [N, P, 4]", valid)
        check_tensor(op, "valid", valid, boxes.shape[:2], "bool", device=device)
    return boxes


def check_image_indices(op: str, boxes: Tensor, num_images: int) -> None:
    """Raise ValueError if boxes [K, 5] name an image that does not exist. Reads values, so a GPU would have to wait."""
    index = boxes[:, 0].detach()
    inside = (index > -1) & (index < num_images)
    if not bool(inside.all()):
        got = index[~inside][0].item()
        raise ValueError(f"{op}: boxes: expected image indices in 0..{num_images - 1}, got {got}")


def is_traced(tensor: Tensor) -> bool:
    """Return whether values cannot be read: under torch.compile, torch.export or vmap, or of a fake or meta tensor."""
    if torch.compiler.is_compiling() or tensor.device.type == "meta" or under_vmap():
        return True
    if type(tensor) is Tensor:  # nearly always; the import takes as long as all of this
        return False
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def check_scored_boxes(op: str, boxes: Tensor, scores: Tensor, letters: tuple[str, ...]) -> None:
    """Raise ValueError unless boxes are [*letters, 4] and scores [*letters], both float and on one device."""
    check_tensor(op, "boxes", boxes, (*letters, 4), "float")
    check_tensor(op, "scores", scores, boxes.shape[:-1], "float", device=boxes.device)
