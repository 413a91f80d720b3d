"""Sigmoid focal loss in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.reference import binary_cross_entropy


def sigmoid_focal_loss_reference(inputs: Tensor, targets: Tensor, alpha: float, gamma: float) -> Tensor:
    """See `op.sigmoid_focal_loss`, before the reduction. Any shape, float32 or float64."""
    loss = binary_cross_entropy(inputs, targets)
    if gamma != 0:
        # 1 - p_t, from sigmoid(-x) where 1 - sigmoid(x) would round to 0.
        miss = inputs.sigmoid() * (1 - targets) + (-inputs).sigmoid() * targets
        # 0 ** gamma has an infinite slope for gamma < 1. Not by `clamp`: its gradient at the bound depends on torch.
        tiny = torch.finfo(miss.dtype).tiny
        power = torch.where(miss < tiny, tiny, miss) ** gamma
        # The power is flat at an infinite logit, which autograd would multiply with the infinite loss.
        loss = loss * torch.where(loss.isinf(), power.detach(), power)
    if alpha >= 0:
        loss = loss * (alpha * targets + (1 - alpha) * (1 - targets))
    return loss
