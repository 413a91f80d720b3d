"""Focal loss on sigmoid logits."""

from __future__ import annotations

import torch
from torch import Tensor

from tmask_kernels.backend import resolve
from tmask_kernels.ops.focal_loss.reference import sigmoid_focal_loss_reference


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy that easy examples hardly enter: alpha_t (1 - p_t)^gamma CE(x, t).

    inputs: logits x of any shape, floating point. targets: same shape, t in 0..1 (soft ones too), any dtype.
    p = sigmoid(x), p_t = p t + (1 - p)(1 - t), alpha_t = alpha t + (1 - alpha)(1 - t).
    alpha: weight of the positives in 0..1; below 0 turns the weighting off. gamma: at least 0; 0 is binary
    cross-entropy. reduction: ``"none"`` (shape and dtype of `inputs`), ``"mean"`` or ``"sum"`` (scalar, float32 at
    least; the mean of nothing is 0).

    Computed in float32 (float64 for float64 logits), finite with finite gradients for logits up to 1e4 in magnitude.
    Differentiable in both tensors. Errors: ValueError for wrong shapes, dtypes, names, alpha > 1, gamma < 0.
    Source: Lin et al., Focal Loss for Dense Object Detection, 2017; signature and values of
    `torchvision.ops.sigmoid_focal_loss`.
    """
    if not inputs.is_floating_point():
        raise ValueError(f"inputs: expected a floating point dtype, got {inputs.dtype}")
    if targets.shape != inputs.shape:
        raise ValueError(f"targets: expected the shape of inputs {tuple(inputs.shape)}, got {tuple(targets.shape)}")
    if not alpha <= 1:
        raise ValueError(f"alpha: expected 0..1, or below 0 for no weighting, got {alpha}")
    if not gamma >= 0:
        raise ValueError(f"gamma: expected at least 0, got {gamma}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
    resolve("sigmoid_focal_loss", backend, {"reference": []}, device=inputs.device)
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    with torch.autocast(inputs.device.type, enabled=False):
        loss = sigmoid_focal_loss_reference(inputs.to(dtype), targets.to(dtype), alpha, gamma)
    if reduction == "none":
        return loss.to(inputs.dtype)
    return loss.sum() / max(1, loss.numel()) if reduction == "mean" else loss.sum()
