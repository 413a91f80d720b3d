"""The mask loss in plain PyTorch. Letters: K RoIs, C mask channels, M mask side."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.reference import binary_cross_entropy


def mask_bce_reference(logits: Tensor, classes: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """See `op.mask_bce`: [K, C, M, M], [K], [K, M, M], [K] -> scalar."""
    side = logits.shape[-1]
    known = (classes >= 0) & (classes < logits.shape[1])
    channel = torch.where(valid & known, classes, 0)[:, None, None, None].expand(-1, 1, side, side)  # [K, 1, M, M]
    picked = logits.gather(1, channel)[:, 0].to(targets.dtype)  # [K, M, M]
    # Zeros go in where a row is not valid, so that even a NaN there has no gradient.
    keep = valid[:, None, None]
    loss = binary_cross_entropy(torch.where(keep, picked, 0), torch.where(keep, targets, 0))
    pixels = valid.sum().clamp(min=1) * side * side
    loss = torch.where(known[:, None, None], loss, torch.nan)
    return torch.where(keep, loss, 0).sum() / pixels
