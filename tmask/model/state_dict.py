"""State dicts from files, and whether they fit a module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn


def read_state_dict(path: str | Path, argument: str) -> Mapping[str, Any]:
    """The mapping in a .pth or .safetensors file; nothing in the file can run code.

    Errors: ValueError, naming `argument` and the file, if there is none or it cannot be read.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{argument}: expected a state-dict file, got {str(path)!r}, which does not exist")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, safetensors and the system each have errors of their own
        raise ValueError(f"{argument}: {path} is truncated, damaged or no state dict") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{argument}: expected a state dict in {path}, got {type(state).__name__}")
    return state


def misfits(model: nn.Module, weights: Mapping[str, Any]) -> str:
    """The first names and shapes in which a state dict differs from the model's own; empty if it fits exactly."""
    own = model.state_dict()
    problems = [f"missing {name}" for name in own if name not in weights]
    problems += [f"unknown {name}" for name in weights if name not in own]
    for name in (name for name in own if name in weights):
        shape, expected = getattr(weights[name], "shape", type(weights[name]).__name__), own[name].shape
        if shape != expected:
            problems.append(f"{name}: expected {_text(expected)}, got {_text(shape)}")
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more


def _text(shape: Any) -> str:
    return str(list(shape)) if isinstance(shape, tuple) else str(shape)
