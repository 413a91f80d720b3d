"""Pasting in plain PyTorch: interpolation along x, then along y.

Letters: K instances, M mask side, H W image size, L pixels of one image axis.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...packed import WORD, pack_masks

# Image pixels pasted at once: bounds the memory beside the output.
_CHUNK_PIXELS = 2**22


def paste_masks_reference(
    masks: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float, output: str, *, convention: str
) -> Tensor:
    """See `op.paste_masks`. [K, M, M] probabilities, [K, 4] -> [K, H, W], or [K, H, ceil(W / 32)] if packed."""
    height, width = image_size
    count = len(masks)
    if output == "probability":
        out = masks.new_empty((count, height, width))
    elif output == "bool":
        out = masks.new_empty((count, height, width), dtype=torch.bool)
    else:
        out = masks.new_empty((count, height, -(-width // WORD)), dtype=torch.int32)
    y = torch.arange(height, dtype=boxes.dtype, device=boxes.device)  # [H]
    x = torch.arange(width, dtype=boxes.dtype, device=boxes.device)  # [W]
    step = max(1, _CHUNK_PIXELS // (height * width))
    for k in range(0, count, step):
        part = slice(k, k + step)
        value = resample(masks[part], boxes[part], y, x, convention)  # [k, H, W]
        if output == "probability":
            out[part] = value
            continue
        inside = is_inside(value, threshold, convention)
        out[part] = inside if output == "bool" else pack_masks(inside)
    return out


def resample(masks: Tensor, boxes: Tensor, y: Tensor, x: Tensor, convention: str) -> Tensor:
    """Bilinear values of K masks at image pixels; 0 outside their boxes.

    masks [K, M, M], boxes [K, 4]; y [H] or [K, H] and x [W] or [K, W] are pixel indices as floats. -> [K, H, W]
    """
    side = masks.shape[-1]
    ringed = F.pad(masks, (1, 1, 1, 1))  # [K, M + 2, M + 2]: cells beyond the mask are 0
    columns = _between(ringed.mT, mask_coordinates(boxes[:, 0], boxes[:, 2], x, side, convention))  # [K, W, M + 2]
    return _between(columns.mT, mask_coordinates(boxes[:, 1], boxes[:, 3], y, side, convention))


def _between(rows: Tensor, coordinate: Tensor) -> Tensor:
    """Linear interpolation between rows: [K, M + 2, N], row m + 1 of which is cell m, at [K, L] -> [K, L, N].

    Products and sums are rounded one by one, so that kernels can give the same bits.
    """
    count, ringed, _ = rows.shape
    reached = (coordinate > -1) & (coordinate < ringed - 2)  # false for NaN
    coordinate = torch.where(reached, coordinate, -1)  # the ring itself, with weight 1
    cell = coordinate.floor()
    weight = (coordinate - cell).to(rows.dtype)[..., None]
    first = (cell.long() + 1 + ringed * torch.arange(count, device=rows.device)[:, None]).flatten()  # [K * L]
    second = torch.where(reached.flatten(), first + 1, first)
    flat = rows.reshape(count * ringed, -1)
    shape = (*coordinate.shape, flat.shape[1])
    low, high = flat.index_select(0, first).view(shape), flat.index_select(0, second).view(shape)
    return low.mul_(1 - weight).add_(high.mul_(weight))


def mask_coordinates(low: Tensor, high: Tensor, pixel: Tensor, side: int, convention: str) -> Tensor:
    """Where on a mask's axis a pixel samples, in cells (cell m has its centre at m): [K, L]; NaN for an empty box.

    low, high [K]: the box on this axis; pixel [L] or [K, L]. Only a coordinate in -1..side, exclusive, meets a cell.
    """
    low, high = low[:, None], high[:, None]
    if convention == "detectron2":
        extent = high - low
        coordinate = (pixel + 0.5 - low) * _divide(side, extent) - 0.5
        return coordinate.masked_fill(~((extent > 0) & (extent < torch.inf)), float("nan"))
    # torchvision: one cell of zeros around the mask, the box grown with it and cut to integers, ends included.
    half = (high - low) * 0.5 * ((side + 2) / side)
    centre = (high + low) * 0.5
    first, last = (centre - half).trunc(), (centre + half).trunc()
    extent = last - first + 1  # pixels
    coordinate = (pixel + 0.5 - first) * _divide(side + 2, extent) - 1.5
    return coordinate.masked_fill(~((pixel >= first) & (pixel <= last)), float("nan"))


def _divide(number: int, by: Tensor) -> Tensor:
    """Rounded once; `number / by` multiplies by a reciprocal."""
    return torch.full_like(by, number) / by


def is_inside(value: Tensor, threshold: float, convention: str) -> Tensor:
    """The conventions differ at the threshold itself."""
    return value >= threshold if convention == "detectron2" else value > threshold
