"""The sigmoid mask loss. Letters as in reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from tmask_kernels.backend import resolve
from tmask_kernels.ops.mask_bce.reference import mask_bce_reference


def mask_bce(logits: Tensor, classes: Tensor, targets: Tensor, *, valid: Tensor, backend: str | None = None) -> Tensor:
    """Binary cross-entropy of each RoI's own channel, mean over the pixels of the valid RoIs.

    logits: [K, C, M, M] floating point. classes: [K] int64, the channel of each RoI, 0..C-1 (all 0 for class-agnostic
    masks); whatever stands in rows that are not valid is not read. targets: [K, M, M], 0..1. valid: [K] bool.
    Returns a scalar, float32 (float64 for float64 logits); 0 with a graph when no RoI is valid.

    Differentiable in the logits; other channels and rows that are not valid get a gradient of exactly 0. No sync.
    Errors: ValueError for wrong shapes and dtypes. Source: He et al., Mask R-CNN, 2017, section 3.
    """
    if logits.dim() != 4 or logits.shape[2] != logits.shape[3] or not logits.is_floating_point():
        raise ValueError(f"logits: expected floating point [K, C, M, M], got {logits.dtype} {tuple(logits.shape)}")
    k, channels, side, _ = logits.shape
    if channels < 1:
        raise ValueError("logits: expected at least one channel, got 0")
    if classes.shape != (k,) or classes.dtype != torch.int64:
        raise ValueError(f"classes: expected int64 [{k}], got {classes.dtype} {tuple(classes.shape)}")
    if targets.shape != (k, side, side):
        raise ValueError(f"targets: expected shape [{k}, {side}, {side}], got {tuple(targets.shape)}")
    if valid.shape != (k,) or valid.dtype != torch.bool:
        raise ValueError(f"valid: expected bool [{k}], got {valid.dtype} {tuple(valid.shape)}")
    resolve("mask_bce", backend, {"reference": []}, device=logits.device)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    with torch.autocast(logits.device.type, enabled=False):
        return mask_bce_reference(logits, classes, targets.to(dtype), valid)
