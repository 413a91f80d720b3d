"""Checkpoints: one file that holds all that training needs to go on and all that prediction needs to start.

The file is written whole or not at all, and is read with ``weights_only=True``: nothing in it can run code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tmask.config import ModelConfig, from_dict

FORMAT = "tmask checkpoint"
VERSION = 1

# A contract: tests freeze this list. Change VERSION when it changes.
KEYS = (
    "format",
    "version",
    "model",  # state dict
    "model_config",  # ModelConfig as a dict; None for a model not made by build_model
    "categories",  # [{"id", "name"}], label i is categories[i - 1]
    "train_config",  # TrainConfig as a dict
    "optimizer",  # state dict
    "scaler",  # state dict of the fp16 gradient scaler; None without
    "step",  # optimiser updates done; the learning rate is a function of it
    "epoch",
    "position",  # batches of this epoch already used
    "rng",  # torch and cuda states now, and as they were when the epoch began
)


class CheckpointError(ValueError):
    """A file that is no usable checkpoint; the message says which and why."""


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write `content` (exactly the entries of ``KEYS``) so that `path` holds the old file or the new, never a part.

    The bytes go to a temporary file in the same folder and reach the disk before it takes the name. On an error the
    temporary file is removed and the old one stays.
    """
    if set(content) != set(KEYS):
        raise ValueError(f"content: expected the keys {sorted(KEYS)}, got {sorted(content)}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; give it the mode that a plain open() would.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def load_checkpoint(path: str | Path, *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint: a dict with the entries of ``KEYS``, its tensors on `device`.

    Errors: CheckpointError for a file that is missing, truncated, foreign or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: no such file")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, pickle.UnpicklingError) as error:
        # torch's own message advises to load without weights_only, which would let the file run code.
        raise CheckpointError(f"checkpoint {path}: truncated, damaged or no checkpoint") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path}: expected a file written by tmask, got something else")
    if content["version"] != VERSION:
        raise CheckpointError(f"checkpoint {path}: expected version {VERSION}, got {content['version']}")
    missing = [key for key in KEYS if key not in content]
    if missing:
        raise CheckpointError(f"checkpoint {path}: entries are missing: {', '.join(missing)}")
    return content


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[Any, dict[str, Any]]:
    """Build the model of a checkpoint, load its weights and put it in eval mode on `device`.

    The second value holds the other entries: ``categories``, ``model_config``, ``step``, ... Errors: CheckpointError
    for an unusable file, an unknown config or weights that do not fit it.
    """
    from tmask.build import build_model

    content = load_checkpoint(path)
    weights = content.pop("model")
    if content["model_config"] is None:
        raise CheckpointError(f"checkpoint {path}: the model was not made by build_model; load its weights by hand")
    try:
        config = from_dict(ModelConfig, content["model_config"])
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path}: model config: {error}") from error
    # The weights are all in the checkpoint: the ImageNet file the run began with may be gone.
    model = build_model(dataclasses.replace(config, backbone_weights=None), warn_if_untrained=False)
    load_weights(model, weights, path)
    return model.to(device).eval(), content


def load_weights(model: nn.Module, weights: dict[str, Any], path: str | Path) -> None:
    """Load a state dict that must fit exactly. Errors: CheckpointError that names the first keys that do not."""
    own = model.state_dict()
    problems = [f"missing {name}" for name in own if name not in weights]
    problems += [f"unknown {name}" for name in weights if name not in own]
    problems += [
        f"{name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"checkpoint {path}: weights do not fit the model: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(weights)


def config_dict(config: Any) -> dict[str, Any] | None:
    """A config dataclass as plain values; None for anything else (a model not made by build_model)."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return None
    return dataclasses.asdict(config)


def differences(saved: dict[str, Any] | None, current: dict[str, Any] | None) -> list[str]:
    """The settings in which two config dicts differ, as ``name: saved -> current``."""
    saved, current = saved or {}, current or {}
    names = sorted(saved.keys() | current.keys())
    return [f"{n}: {saved.get(n)} -> {current.get(n)}" for n in names if saved.get(n) != current.get(n)]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make the new name last: fsync of the folder, which only POSIX systems have."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
