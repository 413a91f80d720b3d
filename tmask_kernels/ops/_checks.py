"""Checks that several ops make of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor


def check_device(op: str, device: torch.device, **tensors: Tensor | None) -> None:
    """That all tensors lie on `device`: a kernel would read a foreign one, or the host's memory. Errors: ValueError."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: {name}: expected device {device}, got {tensor.device}")
