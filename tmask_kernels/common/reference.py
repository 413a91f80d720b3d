"""What several references share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

# An adaptive grid with two or more samples has them more than half a cell apart, so at most 4 lie within a cell of a
# given cell. One more absorbs an estimate of where they begin that is one too low; one too high misses a sample a whole
# cell away, whose weight is 0.
NEARBY_SAMPLES = 5


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast would turn the products into half precision. The meta device knows none."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def box_sizes(boxes: Tensor) -> Tensor:
    """Width and height of xyxy boxes [..., 4]: [..., 2]. NaN or infinite where any coordinate is."""
    return boxes[..., 2:] - boxes[..., :2]


def is_finite(boxes: Tensor) -> Tensor:
    """Whether the coordinates and the sides of boxes [..., 4] are finite: bool [...]."""
    return torch.isfinite(box_sizes(boxes.detach())).all(-1)


def in_cells(boxes: Tensor, scale: float, aligned: bool) -> tuple[Tensor, Tensor]:
    """Start and size [..., 2], x y in cells, of boxes [..., 4] in pixels."""
    corners = boxes * scale - (0.5 if aligned else 0.0)
    size = corners[..., 2:] - corners[..., :2]
    return corners[..., :2], size if aligned else torch.where(size < 1, 1.0, size)


def bounded(values: Tensor, low: float | None = None, high: Tensor | float | None = None) -> Tensor:
    """`values` brought to `low` .. `high`; NaN stays. A value equal to a bound passes its gradient.

    Not by `clamp`, whose gradient there depends on the version of torch: 1 before 2.14, then 0.
    """
    if low is not None:
        values = torch.where(values < low, low, values)
    return values if high is None else torch.where(values > high, high, values)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes a [..., 4] and b [..., 4], broadcast. Sides of the overlap are clamped at 0, areas are not."""
    ax1, ay1, ax2, ay2 = a.unbind(-1)
    bx1, by1, bx2, by2 = b.unbind(-1)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    inter = width * height
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - inter
    return inter / union


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of targets in 0..1 under sigmoid(logits), also of infinite logits, where PyTorch's is NaN.

    The term of a class with target 0 is 0, whatever its logit.
    """
    positive, negative = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    positive = positive.masked_fill(positive.isinf() & (targets == 0), 0)
    negative = negative.masked_fill(negative.isinf() & (targets == 1), 0)
    return targets * positive + (1 - targets) * negative
