"""Checkpoints: one file with all that training needs to continue and all that prediction needs to start.

A checkpoint is written whole or not at all. It is read with ``weights_only=True``, so that no file can run code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tmask.build import build_model
from tmask.config import CONVENTIONS, ModelConfig, from_dict
from tmask.engine.files import replacing
from tmask.model.state_dict import ForeignFileError, bare_weights, describe, misfits, read_file
from tmask.weights import (
    BOX_PREDICTORS,
    CLASS_LAYERS,
    KEYPOINT_LAYER,
    LANDMARK,
    MASK_PARTS,
    MASK_PREDICTOR,
    adapted,
    architecture,
    is_own,
    is_published,
    torchvision_weights,
)

FORMAT = "tmask checkpoint"
VERSION = 2

# Tests freeze this list. Change VERSION when the list changes.
KEYS = (
    "format",
    "version",
    "model",  # state dict
    "ema",  # state dict of the averaged weights; None without an average or before the first update
    "model_config",  # ModelConfig as a dict; None for a model not made by build_model
    "categories",  # [{"id", "name"}], label i is categories[i - 1]; "boxes_only": True if its masks were not learnt
    "train_config",  # TrainConfig as a dict
    "optimizer",  # state dict
    "scaler",  # state dict of the fp16 gradient scaler, or None
    "step",  # optimiser updates done
    "epoch",
    "position",  # batches of this epoch already used
    "rng",  # torch and cuda states
)
YOUNGER_KEYS = ("exif",)  # of DataConfig; older files of this version lack these entries


class CheckpointError(ValueError):
    """A checkpoint cannot be used or written; the message names the file and the reason."""


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write `content`, with the entries ``KEYS`` and perhaps ``YOUNGER_KEYS``, as `replacing` does.

    Raises:
        CheckpointError: The write failed, as on a full disk. The old file stays.
    """
    if set(content) - set(YOUNGER_KEYS) != set(KEYS):
        raise ValueError(f"content: expected the keys {sorted(KEYS)}, got {sorted(content)}")
    try:
        with replacing(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {path}: cannot be written: {_reason(error)}") from error


def save_model(path: str | Path, model: nn.Module, categories: Sequence[dict[str, Any]]) -> None:
    """Write a checkpoint of a model alone: it predicts, and a run can begin with it, but no run can go on from it.

    Args:
        path: The file.
        model: A model of `build_model`.
        categories: ``{"id", "name"}`` of each label, from 1 on.

    Raises:
        CheckpointError: As `save_checkpoint`.
    """
    content = dict.fromkeys(KEYS) | {"format": FORMAT, "version": VERSION, "step": 0, "epoch": 0, "position": 0}
    config = config_dict(getattr(model, "config", None))
    save_checkpoint(path, content | {"model": model.state_dict(), "model_config": config, "categories": categories})


def load_checkpoint(path: str | Path, *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint: a dict with the entries ``KEYS``, tensors on `device`.

    Raises:
        CheckpointError: The file is missing, truncated, foreign or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: no such file")
    try:
        content, left_out = read_file(path, device)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ForeignFileError(_foreign(content, left_out))
    except ForeignFileError as error:
        raise CheckpointError(f"checkpoint {path}: expected a file written by tmask, got {error}") from error
    return _checked(content, left_out, path)


def _foreign(content: Any, left_out: Sequence[str]) -> str:
    """What the `content` of a foreign file is, and what the user can do with it."""
    try:
        weights = bare_weights(content, LANDMARK)
        if not weights:
            return describe(content, left_out)
        if is_own(weights):
            return "the weights of tmask's model alone: --init begins a run with them, model.load_state_dict takes them"
        torchvision_weights(weights)
    except ForeignFileError as error:
        return str(error)
    except ValueError:
        return "the weights of several models"
    return "a torchvision state dict: use tmask convert, or --init to begin a run with it"


def _checked(content: dict[str, Any], left_out: Sequence[str], path: str | Path) -> dict[str, Any]:
    """Return `content` if it is whole and of this version, else raise CheckpointError."""
    if left_out:
        raise CheckpointError(f"checkpoint {path}: holds {left_out[0]}, which is none of tmask's and could run code")
    version = content.get("version")
    if version != VERSION:
        age = "a newer" if isinstance(version, int) and version > VERSION else "an older"
        raise CheckpointError(
            f"checkpoint {path}: of format version {version}, from {age} tmask; this one reads version {VERSION} only"
        )
    missing = [key for key in KEYS if key not in content]
    if missing:
        raise CheckpointError(f"checkpoint {path}: entries are missing: {', '.join(missing)}")
    return content


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[Any, dict[str, Any]]:
    """Build the model of a checkpoint in eval mode on `device`, with the averaged weights if the run kept an average.

    Returns:
        The model, and the other entries of the checkpoint: ``categories``, ``model_config``, ``step``, ...

    Raises:
        CheckpointError: The file is unusable, the config is unknown, or the weights do not fit the config.
    """
    content = load_checkpoint(path)
    weights, average = content.pop("model"), content.pop("ema")
    if content["model_config"] is None:
        raise CheckpointError(f"checkpoint {path}: the model was not made by build_model; load its weights by hand")
    config = read_model_config(content["model_config"], path)
    # All weights are in the checkpoint. The ImageNet file that the run began with may be gone.
    model: Any = build_model(dataclasses.replace(config, backbone_weights=None), warn_if_untrained=False)
    load_weights(model, weights if average is None else average, path)
    model = model.to(device).eval()
    if torch.device(device).type == "cuda":  # faster for convolutions and RoIAlign
        model = model.to(memory_format=torch.channels_last)
    return model, content


def read_model_config(values: dict[str, Any], path: str | Path) -> ModelConfig:
    """The config in a checkpoint, with defaults for younger settings. Raises CheckpointError."""
    try:
        config: ModelConfig = from_dict(ModelConfig, values)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path}: model config: {error}") from error
    return config


def load_weights(model: nn.Module, weights: dict[str, Any], path: str | Path) -> None:
    """Load a state dict that must fit exactly. Raises CheckpointError that names the first keys that do not fit."""
    problems = misfits(model, weights)
    if problems:
        raise CheckpointError(f"checkpoint {path}: weights do not fit the model: {problems}")
    model.load_state_dict(weights)


def load_initial(model: nn.Module, path: str | Path, categories: Sequence[dict[str, Any]] = ()) -> dict[str, str]:
    """Load the weights that `model` begins with.

    A layer keeps its initial weights if its shape differs (`adapted`) or its meaning: layers of classes whose names
    differ from `categories`, a mask predictor for another loss, a layer of other keypoints. A state dict has no class
    names, so that the number of classes decides. One warning names weights for which `model` has no layer, another one
    settings of their training that `model` has not (`_warn_other_meaning`).

    Args:
        model: The model.
        path: A checkpoint of ours (its average if it has one), or a state dict of ours or of torchvision's Mask or
            Faster R-CNN, alone or inside a foreign checkpoint (`bare_weights`).
        categories: Categories of the data.

    Returns:
        The names of the weights that stay initial, with the reason, which is empty for a different shape.

    Raises:
        ValueError: The file is of another kind, or its weights do not fit.
    """
    own_config = getattr(model, "config", None)
    others: dict[str, str] = {}
    config = None
    try:
        content, left_out = read_file(path)
        if isinstance(content, dict) and content.get("format") == FORMAT:
            saved = _checked(content, left_out, path)
            weights = saved["model"] if saved["ema"] is None else saved["ema"]
            others = _other_classes(saved["categories"], categories, own_config)
            config = saved["model_config"] and read_model_config(saved["model_config"], path)
        else:
            weights = bare_weights(content, LANDMARK)
            if not weights:
                raise ForeignFileError(describe(content, left_out))
            if not is_own(weights):
                weights = torchvision_weights(weights)
                config = _torchvision_config(weights, own_config, published=is_published(path))
    except CheckpointError:
        raise
    except ForeignFileError as error:
        raise ValueError(f"init {path}: expected a checkpoint or weights of a Mask R-CNN, got {error}") from error
    except ValueError as error:
        raise ValueError(f"init {path}: {error}") from error
    others |= _other_predictors(config, own_config)
    own = model.state_dict()
    begin = adapted(weights, own, other=tuple(others))
    if own_config is not None and misfits(model, begin):
        _check_architecture(weights, own_config, path)
    load_weights(model, begin, path)
    unused = [name for name in weights if name not in begin and not name.endswith("num_batches_tracked")]
    _warn_other_meaning(config, own_config, path)
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        warnings.warn(f"init {path}: left out, as the model has no such part: {unused[0]}{more}", stacklevel=2)
    kept = [name for name, tensor in own.items() if begin[name] is tensor]
    return {name: next((why for part, why in others.items() if name.startswith(part)), "") for name in kept}


def _check_architecture(weights: dict[str, Any], config: ModelConfig, path: str | Path) -> None:
    """Raise CheckpointError if the weights are of a model with other settings; the error names the settings."""
    changed: list[str] = []
    with contextlib.suppress(ValueError):  # not a ResNet with an FPN
        saved = architecture(weights)
        free = ["norm", "trainable_layers", "num_classes", "masks"]  # may differ
        free += [] if config.masks else [name for name in saved if name.startswith("mask_")]
        changed = differences(*({n: v[n] for n in saved if n not in free} for v in (saved, vars(config))))
    if changed:
        raise CheckpointError(f"init {path}: the weights are of another model: {'; '.join(changed)}")


def _torchvision_config(weights: dict[str, Any], current: ModelConfig | None, *, published: bool) -> ModelConfig:
    """What is known of the settings that torchvision's weights were trained with."""
    return ModelConfig(
        masks=any(name.startswith(MASK_PARTS) for name in weights),
        convention=CONVENTIONS["torchvision"],
        norm_eps=0.0 if published or current is None else current.norm_eps,  # which only published files tell
    )


def _warn_other_meaning(saved: ModelConfig | None, current: ModelConfig | None, path: str | Path) -> None:
    """Warn of settings that change what the weights compute and no shape."""
    if saved is None or current is None:
        return
    names = ("convention", "norm_eps", "image_mean", "image_std")
    options = [f"--model.{n} {_value(saved, n)}" for n in names if getattr(saved, n) != getattr(current, n)]
    if options:
        text = f"init {path}: the weights were trained with other settings and fit those best: {' '.join(options)}"
        warnings.warn(text, stacklevel=3)


def _value(config: ModelConfig, name: str) -> str:
    """A setting as the command line takes it; a convention by its name if it has one."""
    value = getattr(config, name)
    if name == "convention":
        known = [key for key, convention in CONVENTIONS.items() if convention == value]
        return known[0] if known else shlex.quote(json.dumps(dataclasses.asdict(value)))
    return shlex.quote(json.dumps(value))


def _other_classes(
    saved: Sequence[dict[str, Any]], current: Sequence[dict[str, Any]], config: ModelConfig | None
) -> dict[str, str]:
    """Map the first parts of the names of layers with other classes to the reason; empty if either has no names.

    Ids do not count: they belong to one annotation file.
    """
    names = [[str(category["name"]) for category in part] for part in (saved, current)]
    if not all(names) or names[0] == names[1]:
        return {}
    pairs = enumerate(itertools.zip_longest(*names), start=1)
    why = next(f"label {label} is {old!r} there and {new!r} here" for label, (old, new) in pairs if old != new)
    return dict.fromkeys(BOX_PREDICTORS if config and config.mask_class_agnostic else CLASS_LAYERS, why)


def _other_predictors(saved: ModelConfig | None, current: ModelConfig | None) -> dict[str, str]:
    """The same for masks and keypoints that mean something else, by the settings of the two models."""
    others: dict[str, str] = {}
    if saved is None or current is None:
        return others
    masks = [(config.losses.mask, config.mask_class_agnostic) for config in (saved, current)]
    if current.masks and not saved.masks:
        others[MASK_PARTS] = "there are no masks there"
    elif masks[0] != masks[1]:
        others[MASK_PREDICTOR] = "the masks are of another kind there"
    if saved.keypoints and current.keypoints and saved.keypoints.skeleton.names != current.keypoints.skeleton.names:
        others[KEYPOINT_LAYER] = "the keypoints are others there"
    return others


def config_dict(config: Any) -> dict[str, Any] | None:
    """A config dataclass as plain values; None for anything else, as of a model not from build_model."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return None
    return dataclasses.asdict(config)


def differences(saved: dict[str, Any] | None, current: dict[str, Any] | None) -> list[str]:
    """The differing settings of two config dicts, as ``name: saved -> current``."""
    saved, current = saved or {}, current or {}
    names = sorted(saved.keys() | current.keys())
    return [f"{n}: {saved.get(n)} -> {current.get(n)}" for n in names if saved.get(n) != current.get(n)]


def _reason(error: BaseException) -> str:
    """Why a write failed, in one line. torch.save wraps the system's error in its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]
