"""Functions that several references use."""

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
    """Return a context without autocast, which would compute products in half precision. The meta device has none."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def box_sizes(boxes: Tensor) -> Tensor:
    """Return width and height [..., 2] of xyxy boxes [..., 4]: NaN or infinite if a coordinate is."""
    return boxes[..., 2:] - boxes[..., :2]


def is_finite(boxes: Tensor) -> Tensor:
    """Return whether all coordinates and sides of boxes [..., 4] are finite: bool [...]."""
    return torch.isfinite(box_sizes(boxes.detach())).all(-1)


def in_cells(boxes: Tensor, scale: float, aligned: bool) -> tuple[Tensor, Tensor]:
    """Convert boxes [..., 4] from pixels to cells: start and size, each [..., 2] as x, y."""
    corners = boxes * scale - (0.5 if aligned else 0.0)
    size = corners[..., 2:] - corners[..., :2]
    return corners[..., :2], size if aligned else torch.where(size < 1, 1.0, size)


def bounded(values: Tensor, low: float | None = None, high: Tensor | float | None = None) -> Tensor:
    """Clamp `values` to `low` .. `high`; NaN stays NaN. A value equal to a bound passes its gradient.

    `torch.clamp` does not serve: its gradient at a bound is 1 before torch 2.14, and 0 from then on.
    """
    if low is not None:
        values = torch.where(values < low, low, values)
    return values if high is None else torch.where(values > high, high, values)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the IoU of boxes a and b, each [..., 4], broadcast. The overlap's sides are at least 0, areas not."""
    ax1, ay1, ax2, ay2 = a.unbind(-1)
    bx1, by1, bx2, by2 = b.unbind(-1)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    inter = width * height
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - inter
    return inter / union


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of targets in 0..1 under sigmoid(logits). PyTorch's gives NaN for infinite logits.

    A term whose target is 0 is 0 for every logit.
    """
    positive, negative = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    positive = positive.masked_fill(positive.isinf() & (targets == 0), 0)
    negative = negative.masked_fill(negative.isinf() & (targets == 1), 0)
    return targets * positive + (1 - targets) * negative
