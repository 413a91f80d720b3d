"""All that training changes: what a checkpoint holds, and what a resumed run begins with."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from tmask.config import TrainConfig
from tmask.engine.checkpoint import (
    FORMAT,
    VERSION,
    CheckpointError,
    config_dict,
    differences,
    load_checkpoint,
    load_weights,
    read_model_config,
)
from tmask.engine.ema import WeightAverage
from tmask.engine.optimizer import build_optimizer
from tmask.engine.stream import rng_state, set_rng_state

# A resumed run must agree in these: the first two decide the order of the data, the others the optimiser's state.
_FIXED_ON_RESUME = ("batch_size", "seed", "optimizer", "decay_norm_and_bias", "only")


class TrainState:
    """Model (already on `device`), optimiser, gradient scaler, averaged weights, and how far the run is.

    `step` counts updates; `epoch` and `position` are those of the data after the last whole update.

    `phase` is ``"whole"`` between updates. In the ``"forward"`` part of an update, `content` gives the state before it.
    While the update is ``"written"`` to weights, optimiser and average, there is no whole state to save.
    """

    def __init__(
        self,
        model: Any,
        config: TrainConfig,
        device: torch.device,
        categories: Sequence[dict[str, Any]],
        *,
        exif: bool | None = None,
    ) -> None:
        self.model, self.config, self.device, self.exif = model, config, device, exif
        self.categories = [
            {"id": int(c["id"]), "name": str(c["name"])} | ({"boxes_only": True} if c.get("boxes_only") else {})
            for c in categories
        ]
        self.optimizer = build_optimizer(model, config)
        self.scaler = GradScaler(device.type) if config.precision == "fp16" else None
        self.average = WeightAverage(model, config.ema_decay) if config.ema_decay > 0 else None
        self.step = self.epoch = self.position = 0
        self.rng: dict[str, Any] | None = None  # of the checkpoint; None in a fresh run
        self.phase: Literal["whole", "forward", "written"] = "whole"
        # What forward passes change: batch statistics and the random state, as they were before the update.
        self._buffers = dict(model.named_buffers(remove_duplicate=False))
        self._buffers_before = {name: buffer.clone() for name, buffer in self._buffers.items()}
        self._rng_before: dict[str, Any] = {}

    def best_model(self) -> Any:
        """The model to evaluate: with the averaged weights if there are any."""
        return self.average.model if self.average else self.model

    def begin_update(self) -> None:
        """Remember what the forward passes of an update change, so that an error in them leaves a whole state."""
        self._rng_before = rng_state(self.device)
        if self._buffers:
            torch._foreach_copy_([*self._buffers_before.values()], [*self._buffers.values()])
        self.phase = "forward"

    def end_update(self, epoch: int, position: int) -> None:
        """An update is whole; it used the data up to there."""
        self.step += 1
        self.epoch, self.position = epoch, position
        self.phase = "whole"  # last: an error may come between any two lines, from a data worker that dies

    def content(self) -> dict[str, Any]:
        """What `save_checkpoint` takes: the state after the last whole update."""
        assert self.phase != "written"
        weights, rng = self.model.state_dict(), rng_state(self.device)
        if self.phase == "forward":
            weights |= {name: value for name, value in self._buffers_before.items() if name in weights}
            rng = self._rng_before
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": weights,
            "ema": self.average.model.state_dict() if self.average and not self.average.empty else None,
            "model_config": config_dict(getattr(self.model, "config", None)),
            "categories": self.categories,
            "train_config": config_dict(self.config),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "step": self.step,
            "epoch": self.epoch,
            "position": self.position,
            "rng": rng,
            "exif": self.exif,
        }

    def restore(self, path: str | Path) -> None:
        """Take over the checkpoint `path`; nothing is taken if it does not belong to the same run.

        Settings that may change (rates, weight decay, steps) are those of the present config. An average that the
        checkpoint lacks begins at its weights. Errors: CheckpointError.
        """
        saved = load_checkpoint(path)
        self._check(saved, path)
        load_weights(self.model, saved["model"], path)
        if self.average is not None:
            load_weights(self.average.model, saved["ema"] or saved["model"], path)
            self.average.empty = saved["ema"] is None
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(saved["optimizer"])
        for parameter, values in self.optimizer.state.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    # Fused optimisers go by the parameter's order in memory; the saved run may have had the other one.
                    values[name] = torch.empty_like(parameter).copy_(value)
        for group, values in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(values)  # load_state_dict put the old ones there
        if self.scaler is not None and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        self.step, self.epoch, self.position = saved["step"], saved["epoch"], saved["position"]
        self.rng = saved["rng"]
        set_rng_state(self.rng, self.device)  # what `content` gives if no step is left

    def _check(self, saved: dict[str, Any], path: str | Path) -> None:
        old, new = saved["model_config"], config_dict(getattr(self.model, "config", None))
        if old is not None and new is not None:  # settings that came since have their defaults
            old = config_dict(read_model_config(old, path))
        changed = differences(old, new)
        changed = [line for line in changed if line.split(":")[0] != "backbone_weights"]  # read only to begin with
        if changed:
            raise CheckpointError(f"checkpoint {path}: cannot resume, the model differs: {'; '.join(changed)}")
        changed = differences(dataclasses.asdict(TrainConfig()) | saved["train_config"], config_dict(self.config))
        changed = [line for line in changed if line.split(":")[0] in _FIXED_ON_RESUME]
        if changed:
            raise CheckpointError(f"checkpoint {path}: cannot resume, the run differs: {'; '.join(changed)}")
        pairs = itertools.zip_longest(saved["categories"], self.categories)
        for label, (old, new) in enumerate(pairs, start=1):
            if old != new:
                raise CheckpointError(
                    f"checkpoint {path}: cannot resume, the category of label {label}: {old} -> {new}"
                )
