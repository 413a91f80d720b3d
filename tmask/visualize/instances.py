"""The instances of a result, checked and on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from tmask.model.transform import xyxy
from tmask.visualize.colours import Array, choose_shades

WRONG = ("false", "missed")  # verdicts of a comparison with a red outline


class Instances(NamedTuple):
    """K instances on the host, and how comparisons show them."""

    boxes: Array  # [K, 4] xyxy, inside the image
    labels: Array  # [K]
    scores: Array | None  # [K]
    masks: Sequence[Any] | None  # K
    keypoints: Array | None  # [K, Kp, 3]
    shades: Array  # [K] in 0..len(SHADES)-1
    verdicts: Array | None = None  # [K] results of a comparison, such as "hit"

    @property
    def sides(self) -> Array:
        """[K] side of a square as large as the box."""
        return np.sqrt((self.boxes[:, 2:] - self.boxes[:, :2]).prod(1))


def read_instances(
    result: Mapping[str, Any], class_names: Sequence[str], size: tuple[int, int], min_score: float = 0.0
) -> Instances:
    """Check a result for an image of `size` (W, H) and return its instances of `min_score` and more."""
    boxes, labels = to_numpy(xyxy(result["boxes"])).astype(np.float64), to_numpy(result["labels"])
    scores, masks, keypoints = (result.get(name) for name in ("scores", "masks", "keypoints"))
    wrong = [int(label) for label in labels if not 1 <= label <= len(class_names)]
    if wrong:
        raise ValueError(f"labels: expected 1..{len(class_names)}, one a class name, got {wrong[0]}")
    if masks is not None:
        _check_masks(masks, len(boxes), (size[1], size[0]))
    kept = np.arange(len(boxes)) if scores is None else np.flatnonzero(to_numpy(scores) >= min_score)
    boxes = np.clip(np.nan_to_num(boxes.reshape(-1, 4)), 0, [*size, *size])[kept]
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2])
    return Instances(
        boxes,
        labels[kept],
        None if scores is None else to_numpy(scores)[kept],
        None if masks is None else [masks[k] for k in kept],
        None if keypoints is None else to_numpy(keypoints)[kept],
        choose_shades(boxes, labels[kept]),
    )


def _check_masks(masks: Any, count: int, size: tuple[int, int]) -> None:
    """Raise ValueError unless there are `count` masks of `size` (H, W)."""
    if isinstance(masks, Tensor):
        shapes = {tuple(masks.shape[-2:])}
    else:
        shapes = {tuple(int(side) for side in run["size"]) for run in masks}
    if len(masks) != count or shapes - {size}:
        got = f"{len(masks)} of {', '.join(f'{h}x{w}' for h, w in sorted(shapes)) or 'no size'}"
        raise ValueError(f"masks: expected {count} of {size[0]}x{size[1]} pixels, got {got}")


def to_picture(image: Any) -> Image.Image:
    """Return the image as a PIL image, RGB."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    pixels = image
    if isinstance(image, Tensor):
        pixels = to_numpy(image.movedim(0, -1) if image.dim() == 3 else image)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        got = f"{image.dtype} {tuple(image.shape)}" if hasattr(image, "shape") else type(image).__name__
        expected = "a PIL image, an array uint8 [H, W, 3] or a tensor uint8 [3, H, W]"
        raise ValueError(f"image: expected {expected}, got {got}")
    return Image.fromarray(np.ascontiguousarray(pixels))


def to_numpy(values: Any) -> Array:
    """Return a tensor on any device, or anything array-like, as an array."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
