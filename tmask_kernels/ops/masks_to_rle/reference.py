"""Masks as COCO's run lengths in plain PyTorch and numpy. Letters: K masks, H W their size."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...common.rle import counts_of_crops, strings

_CHUNK_PIXELS = 2**22  # of the masks that are encoded at once: bounds the memory beside the output


def masks_to_rle_reference(masks: Tensor, threshold: float) -> list[str]:
    """Return COCO's strings of masks [K, H, W] that are inside above `threshold`, or True."""
    _, height, width = masks.shape
    texts: list[str] = []
    for some in masks.split(max(1, _CHUNK_PIXELS // (height * width))):
        inside = is_inside(some, threshold).mT.cpu()  # [k, W, H]
        corner = np.zeros(len(some), dtype=np.int64)
        texts += strings(*counts_of_crops(inside, corner, corner, (height, width)))
    return texts


def is_inside(masks: Tensor, threshold: float) -> Tensor:
    """Which pixels are inside: bool, of the shape of `masks`. Half precision is compared in float32."""
    if masks.is_floating_point():
        return masks.to(torch.promote_types(masks.dtype, torch.float32)) > threshold
    return masks
