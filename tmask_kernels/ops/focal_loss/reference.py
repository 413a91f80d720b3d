"""Sigmoid focal loss in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid_focal_loss_reference(inputs: Tensor, targets: Tensor, alpha: float, gamma: float) -> Tensor:
    """See `op.sigmoid_focal_loss`, before the reduction; any shape, float32 or float64."""
    loss = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    if gamma != 0:
        # 1 - p_t, from sigmoid(-x) where 1 - sigmoid(x) would round to 0.
        miss = inputs.sigmoid() * (1 - targets) + (-inputs).sigmoid() * targets
        # 0 ** gamma has an infinite slope for gamma < 1.
        loss = loss * miss.clamp(min=torch.finfo(miss.dtype).tiny) ** gamma
    if alpha >= 0:
        loss = loss * (alpha * targets + (1 - alpha) * (1 - targets))
    return loss
