"""The sigmoid mask loss. Letters as in reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backend import resolve, triton_reasons
from ...common.checks import check_tensor, wrong
from ...common.reference import no_autocast
from .reference import mask_bce_reference

INT32_LIMIT = 2**31 - 4096  # and a block beyond


def mask_bce(logits: Tensor, classes: Tensor, targets: Tensor, *, valid: Tensor, backend: str | None = None) -> Tensor:
    """Binary cross-entropy of each RoI's own mask channel, averaged over the pixels of the valid RoIs.

    Args:
        logits: [K, C, M, M] float, any strides.
        classes: [K] int64, the channel of each RoI in 0..C-1 (all 0 for class-agnostic masks). Rows that are not valid
            are not read.
        targets: [K, M, M] of any dtype, values in 0..1.
        valid: [K] bool.
        backend: triton or reference. Triton differentiates once, in the logits only.

    Returns:
        A scalar, float32 (float64 for float64 logits), summed in a fixed order. 0 with a graph if no RoI is valid. NaN
        if a valid RoI names a channel that does not exist. An infinite logit on the side of its target adds 0 and has
        gradient 0; on the other side the loss is infinite (PyTorch's `binary_cross_entropy_with_logits` gives NaN).
        Other channels and rows that are not valid have a gradient of exactly 0.

    Raises:
        ValueError: a shape, dtype or device is wrong.

    Source: He et al., Mask R-CNN, 2017, section 3.
    """
    check_tensor("mask_bce", "logits", logits, ("K", "C", "M", "M"), "float")
    k, channels, side, width = logits.shape
    if channels < 1 or side != width:
        raise wrong("mask_bce", "logits", "float [K, C, M, M] with C >= 1", logits)
    device = logits.device
    check_tensor("mask_bce", "classes", classes, (k,), "int64", device=device)
    check_tensor("mask_bce", "targets", targets, (k, side, side), "real or bool", device=device)
    check_tensor("mask_bce", "valid", valid, (k,), "bool", device=device)
    reasons: dict[str, list[str]] = {"triton": _triton_reasons(logits, targets), "reference": []}
    if resolve("mask_bce", backend, reasons, device=logits.device, differentiable=True) == "triton":
        from . import kernels

        return kernels.mask_bce(logits, classes, targets, valid)[0]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    with no_autocast(logits.device.type):
        return mask_bce_reference(logits, classes, targets.to(dtype), valid)


def _triton_reasons(logits: Tensor, targets: Tensor) -> list[str]:
    reasons = triton_reasons(logits)
    if logits.dtype == torch.float64 and logits.is_cuda:
        reasons.append("float64 runs in the interpreter only")
    if logits.shape[1] * logits.shape[2] ** 2 >= INT32_LIMIT:
        reasons.append("serves up to 2^31 - 1 logits a RoI")
    if torch.is_grad_enabled() and targets.requires_grad:
        reasons.append("the Triton backward gives no gradient to targets")
    return reasons
