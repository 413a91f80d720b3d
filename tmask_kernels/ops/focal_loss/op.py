"""Focal loss on sigmoid logits and on softmax logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backend import resolve, triton_reasons
from ...common.checks import check_choice, check_number, check_tensor, wrong
from ...common.reference import no_autocast
from .reference import sigmoid_focal_loss_reference


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy with a small weight for easy examples: alpha_t (1 - p_t)^gamma CE(x, t).

    p = sigmoid(x), p_t = p t + (1 - p)(1 - t) and alpha_t = alpha t + (1 - alpha)(1 - t). The loss is computed in
    float32 (float64 for float64 logits).

    Args:
        inputs: logits x of any shape, float.
        targets: t in 0..1, the shape of `inputs`, any dtype. Soft targets are allowed.
        alpha: weight of the positives in 0..1. Below 0: no weights.
        gamma: at least 0. 0 is binary cross-entropy.
        reduction: none, mean or sum.
        backend: triton or reference. Triton differentiates once, in the logits only.

    Returns:
        For none, the shape and dtype of `inputs`. For mean and sum a scalar, float32 at least, summed in a fixed order;
        the mean of no element is 0. Loss and gradient are finite for logits up to 1e4 in magnitude. An infinite logit
        on the side of its target has loss and gradient 0; on the other side it has an infinite loss and the gradient of
        cross-entropy (PyTorch's `binary_cross_entropy_with_logits` gives NaN).

    Raises:
        ValueError: a shape, dtype, device or name is wrong, alpha > 1, or gamma < 0.

    Source: Lin et al., Focal Loss for Dense Object Detection, 2017; signature and values of
    `torchvision.ops.sigmoid_focal_loss`.
    """
    check_tensor("sigmoid_focal_loss", "inputs", inputs, ("...",), "float")
    check_tensor("sigmoid_focal_loss", "targets", targets, inputs.shape, "real or bool", device=inputs.device)
    alpha, gamma = _check_options("sigmoid_focal_loss", alpha, gamma, reduction)
    return _sigmoid_focal_loss("sigmoid_focal_loss", inputs, targets, alpha, gamma, reduction, backend)


def _sigmoid_focal_loss(
    op: str, inputs: Tensor, targets: Tensor, alpha: float, gamma: float, reduction: str, backend: str | None
) -> Tensor:
    reasons: dict[str, list[str]] = {"triton": _triton_reasons(inputs, targets), "reference": []}
    if resolve(op, backend, reasons, device=inputs.device, differentiable=True) == "triton":
        from . import kernels

        return kernels.sigmoid_focal_loss(inputs, targets, alpha, gamma, reduction)
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    with no_autocast(inputs.device.type):
        loss = sigmoid_focal_loss_reference(inputs.to(dtype), targets.to(dtype), alpha, gamma)
    return _reduced(loss, reduction, inputs.dtype)


def softmax_focal_loss(
    inputs: Tensor,
    labels: Tensor,
    alpha: float = -1.0,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    backend: str | None = None,
) -> Tensor:
    """Softmax cross-entropy with a small weight for easy examples: -alpha_t (1 - p_y)^gamma log p_y.

    p = softmax(inputs), and y is the label. The loss is computed in float32 (float64 for float64 logits) and is
    differentiable in the logits.

    Args:
        inputs: logits [..., C] of at least two classes, float.
        labels: [...] int64, the class y of each row. 0 is the background.
        alpha: weight of the foreground in 0..1; the background has 1 - alpha. Below 0, the default: no weights. Weights
            are for a flood of negatives; a sampler of RoIs has removed most negatives already.
        gamma: at least 0. 0 is cross-entropy.
        reduction: none, mean (over rows; of no row 0) or sum.
        backend: triton or reference.

    Returns:
        For none, the shape of `labels` and the dtype of `inputs`. For mean and sum a scalar, float32 at least. Loss and
        gradient are finite for logits up to 1e4 in magnitude. A logit of -inf removes its class from the softmax and
        has gradient 0, as in `torch.nn.functional.cross_entropy`. A row whose own class is removed has an infinite
        loss; a row without classes has NaN.

    Raises:
        ValueError: a shape, dtype, device or name is wrong, alpha > 1, or gamma < 0.

    Source: Lin et al., Focal Loss for Dense Object Detection, 2017, equation 5, with the softmax of the own class as
    p_t.
    """
    check_tensor("softmax_focal_loss", "inputs", inputs, ("...", "C"), "float")
    if inputs.shape[-1] < 2:
        raise wrong("softmax_focal_loss", "inputs", "float [..., C] with C > 1", inputs)
    check_tensor("softmax_focal_loss", "labels", labels, inputs.shape[:-1], "int64", device=inputs.device)
    alpha, gamma = _check_options("softmax_focal_loss", alpha, gamma, reduction)
    x, own = inputs.to(torch.promote_types(inputs.dtype, torch.float32)), labels[..., None]
    # By how much the own class leads all others together: its sigmoid is the softmax of the class.
    others = x.scatter(-1, own, -torch.inf)
    most = others.detach().amax(-1, keepdim=True)  # taken out, or the sum's gradient suffers from large logits
    alone = most == -torch.inf  # all others are masked, and their sum has no gradient
    rest = (others - most).masked_fill(alone, 0).logsumexp(-1, keepdim=True)
    mine = x.gather(-1, own)
    lead = torch.where(alone, mine + torch.inf, mine - most - rest).squeeze(-1)
    loss = _sigmoid_focal_loss("softmax_focal_loss", lead, torch.ones_like(lead), -1.0, gamma, "none", backend)
    if alpha >= 0:
        loss = loss * torch.where(labels > 0, alpha, 1 - alpha)
    return _reduced(loss, reduction, inputs.dtype)


def _check_options(op: str, alpha: float, gamma: float, reduction: str) -> tuple[float, float]:
    """Return alpha and gamma as floats."""
    alpha = check_number(op, "alpha", alpha, high=1, expected="a number in 0..1, or below 0 for no weighting")
    gamma = check_number(op, "gamma", gamma, 0)
    check_choice(op, "reduction", reduction, ("none", "mean", "sum"))
    return alpha, gamma


def _reduced(loss: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    if reduction == "none":
        return loss.to(dtype)
    return loss.sum() / max(1, loss.numel()) if reduction == "mean" else loss.sum()


def _triton_reasons(inputs: Tensor, targets: Tensor) -> list[str]:
    reasons = triton_reasons(inputs, targets)
    if inputs.dtype == torch.float64 and inputs.is_cuda:
        reasons.append("float64 runs in the interpreter only")
    if torch.is_grad_enabled() and targets.requires_grad:
        reasons.append("the Triton backward gives no gradient to targets")
    return reasons
