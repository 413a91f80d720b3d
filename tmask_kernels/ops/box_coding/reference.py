"""Box coding written as its definition: a box relative to an anchor, and back.

Deltas are (dx, dy, dw, dh): the shift of the centre in anchor sides, and the logarithm of the ratio of the sides. Each
is multiplied by a weight. Source: R-CNN (Girshick et al. 2014), appendix C.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...common.reference import bounded

Weights = Sequence[float]  # of dx, dy, dw, dh


def encode_boxes_reference(boxes: Tensor, anchors: Tensor, weights: Weights) -> Tensor:
    """Return deltas [..., 4] that take anchors [..., 4] to boxes [..., 4]; zeros where a side is not above 0."""
    wx, wy, ww, wh = weights
    ax, ay, aw, ah = centre_size(anchors)
    bx, by, bw, bh = centre_size(boxes)
    proper = (aw > 0) & (ah > 0) & (bw > 0) & (bh > 0)  # [...]; padding has sides of 0
    aw, ah, bw, bh = (torch.where(proper, side, 1.0) for side in (aw, ah, bw, bh))
    deltas = [wx * (bx - ax) / aw, wy * (by - ay) / ah, ww * torch.log(bw / aw), wh * torch.log(bh / ah)]
    return torch.where(proper[..., None], torch.stack(deltas, dim=-1), 0.0)


def decode_boxes_reference(
    deltas: Tensor,
    anchors: Tensor,
    weights: Weights,
    scale_clamp: float,
    image_size: tuple[int, int] | Tensor | None,
) -> Tensor:
    """Return boxes [..., 4] at deltas [..., 4] from anchors [..., 4]; clipped to `image_size`; zeros for NaN."""
    wx, wy, ww, wh = weights
    ax, ay, aw, ah = centre_size(anchors)
    bad = torch.isnan(deltas).any(-1, keepdim=True)  # [..., 1]
    dx, dy, dw, dh = torch.where(bad, 0.0, deltas).unbind(-1)
    x = dx / wx * aw + ax
    y = dy / wy * ah + ay
    half_width = 0.5 * (torch.exp(bounded(dw / ww, high=scale_clamp)) * aw)
    half_height = 0.5 * (torch.exp(bounded(dh / wh, high=scale_clamp)) * ah)
    bad = bad | (torch.isnan(x) | torch.isnan(y))[..., None]  # inf * 0
    boxes = torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], dim=-1)
    if image_size is not None:
        boxes = clip_boxes(boxes, image_size)
    return torch.where(bad, 0.0, boxes)


def centre_size(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return centre x, centre y, width and height [...] of boxes [..., 4]."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    width, height = x2 - x1, y2 - y1
    return x1 + 0.5 * width, y1 + 0.5 * height, width, height


def clip_boxes(boxes: Tensor, image_size: tuple[int, int] | Tensor) -> Tensor:
    """Boxes [..., 4] with every coordinate brought inside the image.

    image_size is (height, width), or [N, 2] for boxes [N, ..., 4].
    """
    if isinstance(image_size, Tensor):
        limit = image_size.flip(-1).repeat(1, 2).to(boxes.dtype)  # [N, 4] width, height, width, height
        return bounded(boxes, 0.0, limit.view(-1, *[1] * (boxes.ndim - 2), 4))
    height, width = image_size
    x1, y1, x2, y2 = bounded(boxes, 0.0).unbind(-1)
    clipped = [bounded(x1, high=width), bounded(y1, high=height), bounded(x2, high=width), bounded(y2, high=height)]
    return torch.stack(clipped, dim=-1)
