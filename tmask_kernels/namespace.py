"""The namespace of the package's custom ops, ``torch.ops.tmask``, which nothing else names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef

NAMESPACE = "tmask"


def custom_op(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Make a function a custom op of this name, which changes none of its arguments."""
    return torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=())
