"""Masks as COCO's compressed run lengths, from the crop of each box: never K full masks at once.

COCO runs go down the columns: zeros first, then ones, in turn. A count from the fourth on is stored as its difference
to the count two before; each number is cut into groups of 5 bits, lowest first, a set sixth bit says that more follow,
and 48 is added to make it a printable character.
Letters: K instances, M mask side, H W image size, h w size of a crop, R runs of ones, C counts.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import is_inside, mask_coordinates, resample

Integers = npt.NDArray[np.int64]

_CHUNK_PIXELS = 2**20  # pixels of all crops that are pasted at once


def paste_rle(
    masks: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float, *, convention: str
) -> list[dict[str, Any]]:
    """The masks of `paste_masks` as a list of ``{"size": [H, W], "counts": str}``. One sync a chunk."""
    height, width = image_size
    side = masks.shape[-1]
    top, rows = _window(boxes[:, 1], boxes[:, 3], height, side, convention)
    left, columns = _window(boxes[:, 0], boxes[:, 2], width, side, convention)
    results: list[dict[str, Any]] = [{}] * len(masks)
    for chunk in _chunks(rows, columns):
        # A chunk's crops share one size; where a crop is smaller, its mask is over anyway.
        y = _pixels(top[chunk], int(rows[chunk].max()), height).to(boxes)  # [k, h]
        x = _pixels(left[chunk], int(columns[chunk].max()), width).to(boxes)  # [k, w]
        index = torch.from_numpy(chunk).to(masks.device)
        value = resample(masks[index], boxes[index], y, x, convention)  # [k, h, w]
        inside = is_inside(value, threshold, convention).mT.cpu()  # [k, w, h]
        owner, start, length = _runs(inside, top[chunk], left[chunk], height)
        counts, per_mask = _counts(owner, start, length, len(chunk), height * width)
        for k, string in zip(chunk, strings(counts, per_mask), strict=True):
            results[k] = {"size": [height, width], "counts": string}
    return results


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


def _runs(inside: Tensor, top: Integers, left: Integers, height: int) -> tuple[Integers, Integers, Integers]:
    """Runs of ones of crops [K, w, h]: owner, start (in column-major order of the full mask) and length, each [R]."""
    w, h = inside.shape[1:]
    # A zero after every column ends its last run; one before the first makes every run start with a change.
    columns = F.pad(inside, (0, 1)).reshape(-1)  # [K * w * (h + 1)]
    flat = F.pad(columns, (1, 0)).numpy()
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    begin, end = edges[0::2], edges[1::2]
    column, row = np.divmod(begin, h + 1)
    owner = column // max(w, 1)
    start = (left[owner] + column - owner * w) * height + top[owner] + row
    length = end - begin
    # A run that reaches the bottom of the image goes on at the top of the next column.
    goes_on = np.zeros(len(start), dtype=bool)
    goes_on[1:] = (owner[1:] == owner[:-1]) & (start[:-1] + length[:-1] == start[1:])
    if goes_on.any():
        head = np.flatnonzero(~goes_on)
        owner, start, length = owner[head], start[head], np.add.reduceat(length, head)
    return owner, start, length


def _counts(owner: Integers, start: Integers, length: Integers, num_masks: int, area: int) -> tuple[Integers, Integers]:
    """COCO's counts of all masks one after another [C] and how many each mask has [K], of masks of `area` pixels."""
    runs = np.bincount(owner, minlength=num_masks)  # [K]
    end = start + length
    covered = np.zeros(num_masks, dtype=np.int64)  # where the last run of each mask ends
    covered[owner] = end  # runs stand in rising order, so the last one stays
    tail = area - covered
    per_mask = 2 * runs + (tail > 0)
    before = np.roll(end, 1)
    first_run = np.cumsum(runs) - runs  # [K]
    before[first_run[runs > 0]] = 0
    counts = np.empty(per_mask.sum(), dtype=np.int64)
    offset = np.cumsum(per_mask) - per_mask  # [K]
    slot = offset[owner] + 2 * (np.arange(len(start)) - first_run[owner])
    counts[slot] = start - before
    counts[slot + 1] = length
    has_tail = tail > 0
    counts[(offset + 2 * runs)[has_tail]] = tail[has_tail]
    return counts, per_mask


def strings(counts: npt.NDArray[Any], per_mask: Integers) -> list[str]:
    """COCO's compressed string of each mask; `per_mask` [K] counts each (one at least) of `counts` [C], int32 or 64."""
    ends = np.cumsum(per_mask)
    value = counts.copy()
    value[2:] -= counts[:-2]
    for place in range(3):  # the first three counts of a mask stand for themselves
        index = (ends - per_mask + place)[per_mask > place]
        value[index] = counts[index]

    # A group holds five bits, the highest of the last one is the sign.
    size = np.where(value < 0, ~value, value)
    groups = np.ones(len(value), dtype=np.int64)
    limit, largest = 1 << 4, size.max(initial=0)
    while limit <= largest:
        groups += size >= limit
        limit <<= 5
    stop = np.cumsum(groups)
    text = np.empty(groups.sum(), dtype=np.uint8)
    slot = stop - groups
    while len(value):
        more = groups > 1
        text[slot] = (value & 0x1F) + 48 + 0x20 * more
        rest = np.flatnonzero(more)
        slot, value, groups = slot[rest] + 1, value[rest] >> 5, groups[rest] - 1
    joined, cuts = text.tobytes().decode("ascii"), [0, *stop[ends - 1].tolist()]
    return [joined[a:b] for a, b in itertools.pairwise(cuts)]
