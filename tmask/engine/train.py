"""The training loop: batches in, checkpoints and a log out.

The loop never waits for the device except where it logs: losses stay on the device until then, and that is also where
a loss that is not finite is found.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
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
    save_checkpoint,
)
from tmask.engine.device import autocast, to_device
from tmask.engine.log import JsonLines, LossBuffer, StepTimer, median, peak_memory_gib
from tmask.engine.optimizer import build_optimizer, lr_factor, set_lr

CHECKPOINT_NAME = "checkpoint.pt"
LOG_NAME = "log.jsonl"

# A resumed run must agree in these: the first two decide the order of the data, the others the optimiser's state.
_FIXED_ON_RESUME = ("batch_size", "seed", "optimizer", "decay_norm_and_bias")

EvaluateFn = Callable[[Any], dict[str, float]]


class NonFiniteLossError(RuntimeError):
    """A loss became NaN or infinite; the message names the step and the terms."""


@dataclass(frozen=True)
class TrainResult:
    """What a run ends with."""

    step: int
    seconds: float  # training alone, without evaluations
    checkpoint: Path
    losses: dict[str, float]  # means over the last log window
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation


def train(
    model: Any,
    train_loader: Iterable[Any],
    config: TrainConfig,
    *,
    out_dir: str | Path,
    device: torch.device | str,
    categories: Sequence[dict[str, Any]] = (),
    evaluate_fn: EvaluateFn | None = None,
    resume: str | Path | None = None,
    on_start: Callable[[], None] | None = None,
) -> TrainResult:
    """Train `model` in place for ``config.steps`` updates and write ``checkpoint.pt`` and ``log.jsonl`` to `out_dir`.

    `train_loader` gives batches with ``.images`` (ImageBatch) and ``.targets`` (Targets), and is gone through again and
    again; if its batch sampler has ``set_epoch`` that is called first. `model` has ``forward_padded`` as MaskRCNN has;
    its loss terms are summed. `categories` are stored with the model.
    `evaluate_fn` gives metrics to log, every ``eval_every`` steps and at the end, also where a resumed run has no step
    left. `resume` is a checkpoint to go on from: weights, optimiser, position in the data and random state.
    `on_start` is called when `resume` and all else is found good, before anything in `out_dir` changes.

    Errors: NonFiniteLossError at the next log point after a loss is NaN or infinite; CheckpointError if `resume`
    cannot be used or belongs to other settings; ValueError for an empty loader or a precision the device lacks.
    """
    device, out_dir = torch.device(device), Path(out_dir)
    autocast(device, config.precision)  # refuses an impossible precision before any work
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(device=device, memory_format=memory_format)
    optimizer = build_optimizer(model, config)
    scaler = GradScaler(device.type) if config.precision == "fp16" else None
    saved = None
    if resume is not None:
        saved = _restore(resume, model, optimizer, scaler, config, _stored(categories))
    stream = BatchStream(train_loader, device, saved)
    step = saved["step"] if saved else 0
    if on_start is not None:
        on_start()
    run = _Run(out_dir, device, config, resume_step=step if saved else None)

    def checkpoint() -> None:
        save_checkpoint(
            out_dir / CHECKPOINT_NAME,
            {
                "format": FORMAT,
                "version": VERSION,
                "model": model.state_dict(),
                "model_config": config_dict(getattr(model, "config", None)),
                "categories": _stored(categories),
                "train_config": config_dict(config),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler else None,
                "step": step,
                "epoch": stream.epoch,
                "position": stream.position,
                "rng": {"now": rng_state(device), "epoch": stream.epoch_rng},
            },
        )

    metrics: dict[str, float] = {}
    model.train()
    run.start(step)
    steps_left = max(0, config.steps - step)
    for batch in itertools.islice(stream, steps_left):
        lr = config.lr * lr_factor(config, step)
        set_lr(optimizer, lr)
        run.losses.add(_train_step(model, batch, optimizer, scaler, device, config))
        run.timer.mark()
        run.images += len(batch.images.sizes)
        step += 1
        last = step == config.steps
        save = last or step % config.checkpoint_every == 0
        measure = evaluate_fn is not None and (last or (config.eval_every > 0 and step % config.eval_every == 0))
        run.bar.update()
        if save or measure or step % config.log_every == 0:
            run.report(step, stream.epoch, lr)
        if save:
            checkpoint()
        if measure and evaluate_fn is not None:
            metrics = _evaluate(evaluate_fn, model, device)
            run.log.write({"step": step, **metrics})
        if save or measure:
            run.timer.restart()
    run.bar.close()
    if not (out_dir / CHECKPOINT_NAME).is_file():
        checkpoint()  # a resumed run that had no step left, in a new folder
    if steps_left == 0 and evaluate_fn is not None:
        metrics = _evaluate(evaluate_fn, model, device)
        run.log.write({"step": step, **metrics})
    return TrainResult(step, run.seconds, out_dir / CHECKPOINT_NAME, run.means, metrics)


def _train_step(
    model: Any,
    batch: Any,
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler | None,
    device: torch.device,
    config: TrainConfig,
) -> dict[str, torch.Tensor]:
    """One update; gives the loss terms, still on the device."""
    losses: dict[str, torch.Tensor]
    images = to_device(batch.images, device, channels_last=config.channels_last)
    targets = to_device(batch.targets, device)
    optimizer.zero_grad(set_to_none=True)
    with autocast(device, config.precision):
        losses = model.forward_padded(images, targets, compact=device.type == "cpu")
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
    if scaler is None:
        total.backward()
    else:
        scaler.scale(total).backward()
        scaler.unscale_(optimizer)
    if config.clip_norm is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, config.clip_norm)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    return losses


class BatchStream:
    """Batches without end: epoch after epoch, knowing at every moment how far it is.

    To resume inside an epoch it puts back the random state the epoch began with, draws and drops the batches already
    used (so that loader and workers reach the same state), then puts back the state of the checkpoint.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device, saved: dict[str, Any] | None = None) -> None:
        self.loader, self.device = loader, device
        self.epoch: int = saved["epoch"] if saved else 0
        self.position: int = saved["position"] if saved else 0  # batches of this epoch given out
        self.epoch_rng: dict[str, Any] = saved["rng"]["epoch"] if saved else rng_state(device)
        self._saved_rng: dict[str, Any] | None = saved["rng"]["now"] if saved else None

    def __iter__(self) -> Iterator[Any]:
        while True:
            sampler: Any = getattr(self.loader, "batch_sampler", None)
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.epoch)
            if self._saved_rng is None:
                self.epoch_rng = rng_state(self.device)
                batches = iter(self.loader)
            else:
                set_rng_state(self.epoch_rng, self.device)
                batches = iter(self.loader)
                for _ in itertools.islice(batches, self.position):
                    pass
                set_rng_state(self._saved_rng, self.device)
                self._saved_rng = None
            for batch in batches:
                self.position += 1
                yield batch
            if self.position == 0:
                raise ValueError("train_loader: expected at least one batch, got none (fewer images than batch_size?)")
            self.epoch, self.position = self.epoch + 1, 0


def rng_state(device: torch.device) -> dict[str, Any]:
    """The random state of torch on the CPU and, on CUDA, of `device`; plain tensors."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `rng_state` gave; a CUDA state is dropped on a machine without."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def _restore(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler | None,
    config: TrainConfig,
    categories: list[dict[str, Any]],
) -> dict[str, Any]:
    """Load `path` into model, optimiser and scaler. Nothing is loaded if it does not belong to the same run."""
    saved = load_checkpoint(path)
    changed = differences(saved["model_config"], config_dict(getattr(model, "config", None)))
    changed = [line for line in changed if line.split(":")[0] != "backbone_weights"]  # read only to begin with
    if changed:
        raise CheckpointError(f"checkpoint {path}: cannot resume, the model differs: {'; '.join(changed)}")
    changed = differences(saved["train_config"], config_dict(config))
    changed = [line for line in changed if line.split(":")[0] in _FIXED_ON_RESUME]
    if changed:
        raise CheckpointError(f"checkpoint {path}: cannot resume, the run differs: {'; '.join(changed)}")
    for label, (old, new) in enumerate(itertools.zip_longest(saved["categories"], categories), start=1):
        if old != new:
            raise CheckpointError(f"checkpoint {path}: cannot resume, the category of label {label}: {old} -> {new}")
    load_weights(model, saved["model"], path)
    optimizer.load_state_dict(saved["optimizer"])
    if scaler is not None and saved["scaler"]:
        scaler.load_state_dict(saved["scaler"])
    return saved


def _stored(categories: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Categories as a checkpoint holds them."""
    return [{"id": int(category["id"]), "name": str(category["name"])} for category in categories]


def _evaluate(evaluate_fn: EvaluateFn, model: Any, device: torch.device) -> dict[str, float]:
    """Metrics; leaves the random state and the mode of the model as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        metrics = evaluate_fn(model)
    model.train()
    return metrics


class _Run:
    """What the loop reports to: log file, progress bar, clock and loss buffer."""

    def __init__(self, out_dir: Path, device: torch.device, config: TrainConfig, *, resume_step: int | None) -> None:
        from tqdm import tqdm

        self.device, self.config = device, config
        self.log = JsonLines(out_dir / LOG_NAME, resume_step=resume_step)
        # disable=None: the bar shows on a terminal only; the lines of `report` always do.
        self.bar = tqdm(total=config.steps, initial=resume_step or 0, unit="step", disable=None, file=sys.stderr)
        self.losses = LossBuffer(config.log_every)
        self.timer = StepTimer(device)
        self.images = 0
        self.seconds = 0.0
        self.means: dict[str, float] = {}
        self._first = 0

    def start(self, step: int) -> None:
        self._first = step
        self.timer.restart()

    def report(self, step: int, epoch: int, lr: float) -> None:
        """Read the losses of the last steps (the loop's only wait for the device), check and log them."""
        rows = self.losses.read()
        self._check(rows)
        seconds = self.timer.read()
        self.seconds += sum(seconds)
        self.means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        total = sum(self.means.values())
        row = {
            "step": step,
            "epoch": epoch,
            "lr": lr,
            "loss": total,
            **self.means,
            "seconds_per_step": median(seconds),
            "images_per_second": self.images / max(sum(seconds), 1e-9),
            "peak_memory_gib": peak_memory_gib(self.device),
        }
        self.log.write(row)
        terms = "  ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in self.means.items())
        line = f"step {step}/{self.config.steps}  lr {lr:.2e}  loss {total:.3f}  {terms}  {median(seconds):.3f} s/step"
        self.bar.write(line, file=sys.stderr)
        self.images = 0
        self._first = step

    def _check(self, rows: list[dict[str, float]]) -> None:
        for index, row in enumerate(rows):
            bad = {name: value for name, value in row.items() if not math.isfinite(value)}
            if bad:
                self.bar.close()
                terms = ", ".join(f"{name} = {value}" for name, value in bad.items())
                raise NonFiniteLossError(
                    f"step {self._first + index + 1}: the loss is not finite: {terms}. "
                    "Lower train.lr, lengthen train.warmup_steps, set train.clip_norm, or train in fp32."
                )
