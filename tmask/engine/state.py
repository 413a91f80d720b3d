"""All that training changes: what a checkpoint holds, where the run is in its data, and the random state."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
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
from tmask.engine.optimizer import WeightAverage, build_optimizer

# A resumed run must agree in these settings. batch_size and seed decide the order of the data, the others the
# optimiser's state.
_FIXED_ON_RESUME = ("batch_size", "seed", "optimizer", "decay_norm_and_bias", "only")


class TrainState:
    """Model (already on `device`), optimiser, gradient scaler, averaged weights and progress of a run.

    `step` counts updates. `epoch` and `position` (used batches of the epoch) belong to the last whole update.

    `phase` is ``"whole"`` between updates. In the ``"forward"`` phase of an update, `content` returns the state before
    the update. In the ``"written"`` phase the update changes weights, optimiser and average: no whole state exists.
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
        # What a forward pass changes, as it was before the update: batch statistics and the random state.
        self._buffers = dict(model.named_buffers(remove_duplicate=False))
        self._buffers_before = {name: buffer.clone() for name, buffer in self._buffers.items()}
        self._rng_before: dict[str, Any] = {}

    def best_model(self) -> Any:
        """The model to evaluate: the averaged one if the run keeps an average."""
        return self.average.model if self.average else self.model

    def begin_update(self) -> None:
        """Keep what the forward passes of an update change, so that an error in them leaves a whole state."""
        self._rng_before = rng_state(self.device)
        if self._buffers:
            torch._foreach_copy_([*self._buffers_before.values()], [*self._buffers.values()])
        self.phase = "forward"

    def end_update(self, epoch: int, position: int) -> None:
        """Count an update as whole; the update has used the data up to `position` of `epoch`."""
        self.step += 1
        self.epoch, self.position = epoch, position
        self.phase = "whole"  # last: a data worker that dies may raise between any two lines

    def content(self) -> dict[str, Any]:
        """The state after the last whole update, for `save_checkpoint`."""
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
        """Load the checkpoint `path`, or change nothing if it belongs to another run.

        Rates, weight decay and steps come from the present config. If the checkpoint has no average, the average
        begins at the checkpoint's weights. Raises CheckpointError.
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
                    # A fused optimiser needs the memory format of the parameter; the saved run may have had another.
                    values[name] = torch.empty_like(parameter).copy_(value)
        for group, values in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(values)  # in place of the saved settings, from load_state_dict
        if self.scaler is not None and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        self.step, self.epoch, self.position = saved["step"], saved["epoch"], saved["position"]
        self.rng = saved["rng"]
        set_rng_state(self.rng, self.device)  # for `content`, if no step is left

    def _check(self, saved: dict[str, Any], path: str | Path) -> None:
        if saved["optimizer"] is None:  # of save_model
            raise CheckpointError(f"checkpoint {path}: cannot resume, it is of a model alone: use --init")
        old, new = saved["model_config"], config_dict(getattr(self.model, "config", None))
        if old is not None and new is not None:  # settings younger than the checkpoint have their defaults
            old = config_dict(read_model_config(old, path))
        train_config = dataclasses.asdict(TrainConfig()) | saved["train_config"]
        changed = {
            "model": [d for d in differences(old, new) if not d.startswith("backbone_weights:")],  # read at step 0 only
            "run": [
                d for d in differences(train_config, config_dict(self.config)) if d.split(":")[0] in _FIXED_ON_RESUME
            ],
        }
        for part, found in changed.items():
            if found:
                raise CheckpointError(f"checkpoint {path}: cannot resume, the {part} differs: {'; '.join(found)}")
        pairs = itertools.zip_longest(saved["categories"], self.categories)
        for label, (old, new) in enumerate(pairs, start=1):
            if old != new:
                raise CheckpointError(
                    f"checkpoint {path}: cannot resume, the category of label {label}: {old} -> {new}"
                )


class BatchStream:
    """The batches of a loader, epoch after epoch without end, from any batch of any epoch on.

    Before each epoch the stream calls ``set_epoch`` of the loader's batch sampler, if the sampler has it. To begin
    inside an epoch it calls ``set_epoch(epoch, start=position)``, so that no used batch is read again. The stream sets
    the random state `rng` after it has made the loader's iterator, because that may draw random numbers.

    Raises:
        ValueError: The stream shall begin inside an epoch, but the sampler lacks ``set_epoch`` or has fewer batches;
            or the loader is empty (raised on iteration).
    """

    def __init__(
        self,
        loader: Iterable[Any],
        device: torch.device,
        *,
        epoch: int = 0,
        position: int = 0,
        rng: dict[str, Any] | None = None,
    ) -> None:
        self.loader, self.device = loader, device
        self.epoch, self.position = epoch, position  # position: batches of the epoch that were yielded
        self._rng = rng
        self._sampler: Any = getattr(loader, "batch_sampler", None)
        if position:
            sampler: Any = self._sampler
            if not hasattr(sampler, "set_epoch"):
                raise ValueError("train_loader: expected a batch sampler with set_epoch, to resume inside an epoch")
            if position > len(sampler):
                expected = f"expected the data of the run, {position} batches an epoch or more, got {len(sampler)}"
                raise ValueError(f"train_loader: cannot resume: {expected}")

    def __iter__(self) -> Iterator[Any]:
        while True:
            if self.position:
                self._sampler.set_epoch(self.epoch, start=self.position)
            elif hasattr(self._sampler, "set_epoch"):
                self._sampler.set_epoch(self.epoch)
            batches = iter(self.loader)
            if self._rng is not None:
                set_rng_state(self._rng, self.device)
                self._rng = None
            for batch in batches:
                self.position += 1
                yield batch
            if self.position == 0:
                raise ValueError("train_loader: expected at least one batch, got none (fewer images than batch_size?)")
            self.epoch, self.position = self.epoch + 1, 0


def rng_state(device: torch.device) -> dict[str, Any]:
    """The random state of torch on the CPU and, if `device` is a GPU, of that GPU, as byte tensors."""
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Set the random state that `rng_state` returned; without a GPU its CUDA part is ignored."""
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
