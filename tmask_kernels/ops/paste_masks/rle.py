"""Pasted masks as COCO's compressed run lengths, from the crop of each box: never K full masks at once.

Letters: K instances, M mask side, H W image size, h w size of a crop.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...common.rle import Integers, counts_of_crops, strings
from .reference import is_inside, mask_coordinates, resample

_CHUNK_PIXELS = 2**20  # pixels of all crops that are pasted at once


def paste_rle(
    masks: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float, *, convention: str
) -> list[str]:
    """Return the counts of the K masks of `paste_masks` as COCO's strings. One wait a chunk."""
    height, width = image_size
    side = masks.shape[-1]
    top, rows = _window(boxes[:, 1], boxes[:, 3], height, side, convention)
    left, columns = _window(boxes[:, 0], boxes[:, 2], width, side, convention)
    texts = [""] * len(masks)
    for chunk in _chunks(rows, columns):
        # A chunk's crops share one size; where a crop is smaller, its mask is over anyway.
        y = _pixels(top[chunk], int(rows[chunk].max()), height).to(boxes)  # [k, h]
        x = _pixels(left[chunk], int(columns[chunk].max()), width).to(boxes)  # [k, w]
        index = torch.from_numpy(chunk).to(masks.device)
        value = resample(masks[index], boxes[index], y, x, convention)  # [k, h, w]
        inside = is_inside(value, threshold, convention).mT.cpu()  # [k, w, h]
        counts = counts_of_crops(inside, top[chunk], left[chunk], image_size)
        for k, text in zip(chunk, strings(*counts), strict=True):
            texts[k] = text
    return texts


def _window(low: Tensor, high: Tensor, length: int, side: int, convention: str) -> tuple[Integers, Integers]:
    """First pixel and number of pixels of an axis that a mask can reach: [K], [K]."""
    pixel = torch.arange(length, dtype=low.dtype, device=low.device)
    coordinate = mask_coordinates(low, high, pixel, side, convention)  # [K, L]
    reached = ((coordinate > -1) & (coordinate < side)).cpu().numpy()
    return reached.argmax(axis=1), reached.sum(axis=1)


def _chunks(rows: Integers, columns: Integers) -> list[Integers]:
    """Split the instances, largest crop first, so that no chunk of several holds more than `_CHUNK_PIXELS` pixels."""
    order = np.argsort(-rows * columns, kind="stable")
    chunks, first, h, w = [], 0, 0, 0
    for i, k in enumerate(order):
        # Every crop of a chunk takes the room of the tallest times the widest.
        h, w = max(h, int(rows[k])), max(w, int(columns[k]))
        if i > first and (i + 1 - first) * h * w > _CHUNK_PIXELS:
            chunks.append(order[first:i])
            first, h, w = i, int(rows[k]), int(columns[k])
    return [*chunks, order[first:]] if len(order) else []


def _pixels(first: Integers, count: int, length: int) -> Tensor:
    """Pixel indices from `first` [K] on, `count` of them: [K, count] float64; NaN beyond the image."""
    pixel = torch.from_numpy(first)[:, None] + torch.arange(count)
    return pixel.double().masked_fill(pixel >= length, float("nan"))
