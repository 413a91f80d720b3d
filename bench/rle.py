"""COCO's compressed run lengths: written as the peers' users do, read without pycocotools, which may be missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def encoder() -> Callable[[Tensor], list[dict[str, Any]]]:
    """Return the encoder of masks [K, H, W] bool by pycocotools on the host. Errors: ImportError."""
    from pycocotools import mask as coco

    # [K, W, H] by rows is [H, W, K] by columns, as pycocotools wants it: so the GPU turns the masks.
    return lambda masks: coco.encode(masks.to(torch.uint8).mT.contiguous().cpu().numpy().T)


def decode_rle(rle: dict[str, Any]) -> Tensor:
    """The mask [H, W] bool of {"size": [H, W], "counts": str or bytes}. AssertionError if the runs do not fill it."""
    text = rle["counts"] if isinstance(rle["counts"], bytes) else rle["counts"].encode()
    counts: list[int] = []
    value = shift = 0
    for character in text:
        group = character - 48
        value |= (group & 0x1F) << shift
        shift += 5
        if not group & 0x20:  # the last group of this number; its fifth bit is the sign
            value -= (1 << shift) if group & 0x10 else 0
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    height, width = rle["size"]
    assert sum(counts) == height * width, f"{sum(counts)} pixels in runs, {height} x {width} in the mask"
    runs = torch.tensor(counts)
    ones = (torch.arange(len(counts)) % 2).bool()
    return ones.repeat_interleave(runs).view(width, height).T
