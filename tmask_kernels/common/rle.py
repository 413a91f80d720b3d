"""COCO's compressed run lengths: read from a device, counted from crops, written as strings.

COCO's runs go down the columns: zeros first, then ones, in turn. A count from the fourth on is stored as its difference
to the count two before. Each number is cut into groups of 5 bits, lowest first; a set sixth bit says that more follow;
and 48 is added to make it a printable character.
Letters: K masks, H W image size, h w size of a crop, R runs of ones, C counts.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Integers = npt.NDArray[np.int64]

RUNS_A_COLUMN = 2  # that `read_later` has room for: a shape without holes or bays has no more


def read_later(
    changes: Tensor, num_masks: int, columns: int, store_ends: Callable[[Tensor, Tensor], None]
) -> Callable[[], list[str]]:
    """Give the device the rest of the work on run lengths; return a function that waits for it and returns the strings.

    A run ends where a pixel differs from the one before it in column-major order, and with the mask. How many runs
    there are is not known yet. So their ends go to a buffer that has room for `RUNS_A_COLUMN` in each column, and a
    copy of it to the host. If the buffer was too small, the function stores the ends again in one that is not.

    Args:
        changes: [num_masks * parts] int32, how many runs end in each part of a mask; the parts are in the order of the
            pixels. A mask of 0 runs does not exist, and has no string.
        num_masks: the masks of `changes`.
        columns: of a mask, at most.
        store_ends: launches the kernel that stores the ends of the runs, int32, each part's after those of all parts
            before. It takes the running sums of `changes`, int64, and the buffer, beyond which it must not write.
            Whatever else it reads must stay as it is until the strings are read.
    """
    sums = changes.cumsum(0)
    ends = torch.empty(num_masks * (RUNS_A_COLUMN * columns + 1), dtype=torch.int32, device=changes.device)
    store_ends(sums, ends)
    (totals, some_ends), wait = _copy_to_host(sums.view(num_masks, -1)[:, -1], ends)

    @functools.cache
    def texts() -> list[str]:
        wait()
        sums_of_masks = totals.numpy()
        total = int(sums_of_masks[-1])
        stored = some_ends[:total]
        if total > len(ends):
            every_end = torch.empty(total, dtype=torch.int32, device=changes.device)
            store_ends(sums, every_end)
            stored = every_end.cpu()
        per_mask = np.diff(sums_of_masks, prepend=0)
        per_mask = per_mask[per_mask > 0]
        end = stored.numpy()
        counts, first = np.diff(end, prepend=end[:1]), np.cumsum(per_mask) - per_mask
        counts[first] = end[first]  # a mask's first run begins with it
        return strings(counts, per_mask)

    return texts


def _copy_to_host(*tensors: Tensor) -> tuple[list[Tensor], Callable[[], None]]:
    """Begin to copy tensors of a device to the host. Return the copies, and a function that waits until they are whole.

    Tensors that are on the host are returned as they are.
    """
    device = tensors[0].device
    if device.type != "cuda":
        return list(tensors), lambda: None
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    return copies, torch.cuda.current_stream(device).record_event().synchronize


def counts_of_crops(
    inside: Tensor, top: Integers, left: Integers, image_size: tuple[int, int]
) -> tuple[Integers, Integers]:
    """Return COCO's counts of K masks one after another [C], and how many each mask has [K].

    Args:
        inside: [K, w, h] bool on the host, the columns of a crop of each mask; a mask is 0 beyond its crop.
        top: [K], the first row of the crops. What lies beyond the image must be 0.
        left: [K], their first column.
        image_size: (H, W).
    """
    owner, start, length = _runs(inside, top, left, image_size[0])
    return _counts(owner, start, length, len(inside), image_size[0] * image_size[1])


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
