"""Pasting in plain PyTorch: two matrix products an instance.

Letters: K instances, M mask side, H W image size, L pixels of one image axis.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tmask_kernels.packed import WORD, pack_masks

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
    # Matrix products of float32 may run in TF32 on a GPU, which moves the outline; float64 never does.
    dtype = torch.float64 if masks.is_cuda else masks.dtype
    wy = _weights(mask_coordinates(boxes[:, 1], boxes[:, 3], y, side, convention), side).to(dtype)  # [K, H, M]
    wx = _weights(mask_coordinates(boxes[:, 0], boxes[:, 2], x, side, convention), side).to(dtype)  # [K, W, M]
    return (wy @ masks.to(dtype) @ wx.mT).to(masks.dtype)


def mask_coordinates(low: Tensor, high: Tensor, pixel: Tensor, side: int, convention: str) -> Tensor:
    """Where on a mask's axis a pixel samples, in cells (cell m has its centre at m): [K, L]; NaN for an empty box.

    low, high [K]: the box on this axis; pixel [L] or [K, L]. Only a coordinate in -1..side, exclusive, meets a cell.
    """
    low, high = low[:, None], high[:, None]
    if convention == "detectron2":
        extent = high - low
        return ((pixel + 0.5 - low) / extent * side - 0.5).masked_fill(~(extent > 0), float("nan"))
    # torchvision: one cell of zeros around the mask, the box grown with it and cut to integers, ends included.
    half = (high - low) * 0.5 * ((side + 2) / side)
    centre = (high + low) * 0.5
    first, last = (centre - half).trunc(), (centre + half).trunc()
    extent = last - first + 1  # pixels
    coordinate = (pixel - first + 0.5) * ((side + 2) / extent) - 1.5
    return coordinate.masked_fill(~((pixel >= first) & (pixel <= last)), float("nan"))


def _weights(coordinate: Tensor, side: int) -> Tensor:
    """Bilinear weight of each cell at each coordinate, zeros beyond the mask: [K, L] -> [K, L, M]."""
    cell = torch.arange(side, dtype=coordinate.dtype, device=coordinate.device)
    near = 1 - (coordinate[..., None] - cell).abs()
    return torch.where(near > 0, near, 0)  # a NaN gives 0


def is_inside(value: Tensor, threshold: float, convention: str) -> Tensor:
    """The conventions differ at the threshold itself."""
    return value >= threshold if convention == "detectron2" else value > threshold
