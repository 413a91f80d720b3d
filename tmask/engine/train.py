"""The training loop: batches in, checkpoints and a log out.

The loop never waits for the device except where it logs: losses stay on the device until then, and that is also where
a loss that is not finite is found.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tmask.config import TrainConfig
from tmask.engine.checkpoint import CheckpointError, save_checkpoint
from tmask.engine.device import autocast, to_device
from tmask.engine.interrupt import Interrupted, StopSignals
from tmask.engine.optimizer import lr_factor, set_lr
from tmask.engine.report import NonFiniteLossError, Report, check_tensorboard, check_weights
from tmask.engine.state import TrainState
from tmask.engine.stream import BatchStream

CHECKPOINT_NAME = "checkpoint.pt"

EvaluateFn = Callable[[Any], dict[str, float]]


@dataclass(frozen=True)
class TrainResult:
    """What a run ends with."""

    step: int
    seconds: float  # training alone, without evaluations
    checkpoint: Path
    model: Any  # the one to use: with averaged weights if the run kept them
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
    exif: bool | None = None,
    evaluate_fn: EvaluateFn | None = None,
    resume: str | Path | None = None,
    on_start: Callable[[], None] | None = None,
) -> TrainResult:
    """Train `model` in place for ``config.steps`` updates and write ``checkpoint.pt`` and ``log.jsonl`` to `out_dir`.

    `train_loader` gives batches with ``.images`` (ImageBatch) and ``.targets`` (Targets), and is gone through again and
    again; `BatchStream` says how. `model` has ``forward_padded`` as MaskRCNN has; its loss terms are summed. With
    ``only="masks"`` the detector in it is frozen, for good.
    `categories` and `exif`, how the images were read, are stored with the model.
    `evaluate_fn` gives metrics of the model (of the averaged weights if ``ema_decay`` is above 0) to log, every
    ``eval_every`` steps and at the end, also where a resumed run has no step left; a checkpoint is written before.
    `resume` is a checkpoint to go on from: weights and their average, optimiser, position in the data, random state.
    `on_start` is called after the first update, before anything in `out_dir` changes: an error before leaves no trace.

    The first SIGINT or SIGTERM lets the update end and writes a checkpoint; during an evaluation, which has one on disk
    already, it stops at once, and so does a second one. Outside the main thread signals are left alone.

    Any other error is raised after a checkpoint of the last whole update is written. Its ``checkpoint_step`` is then
    the step of the checkpoint on disk, None if there is none, and its note says so, and why if it is not the last one:
    weights that are not finite, an update broken off while the weights were written, or a checkpoint that cannot be
    written.

    Errors: Interrupted (a KeyboardInterrupt) after such a signal; NonFiniteLossError at the next log point after a loss
    is NaN or infinite, or before a checkpoint would get such weights; CheckpointError if `resume` cannot be used or
    belongs to other settings, or a checkpoint cannot be written; ValueError for an empty loader, a precision the device
    lacks, ``tensorboard`` without the package, or a model whose detector is frozen without ``only``.
    """
    if config.only is None and getattr(model, "detector_frozen", False):
        raise ValueError("only: expected 'masks', as the detector of the model is frozen, got None")
    device, out_dir = torch.device(device), Path(out_dir)
    autocast(device, config.precision)  # refuses an impossible precision before any work
    check_tensorboard(config)
    model.to(device=device, memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
    if config.only == "masks":
        model.freeze_detector()
    state = TrainState(model, config, device, categories, exif=exif)
    if resume is not None:
        state.restore(resume)
    stream = BatchStream(train_loader, device, epoch=state.epoch, position=state.position, rng=state.rng)
    new_report = Report(out_dir, device, config, step=state.step, resumed=resume is not None)

    def begin() -> None:
        if not new_report.is_open:
            if on_start is not None:
                on_start()
            new_report.open()

    with contextlib.closing(new_report) as report, StopSignals() as stop:
        saver = _Saver(out_dir / CHECKPOINT_NAME, state, report, resume)
        try:
            metrics = _loop(state, stream, report, saver, stop, evaluate_fn, begin)
        except Interrupted as interrupted:
            interrupted.checkpoint_step = saver.step
            raise
        except BaseException as error:
            not_saved = saver.rescue(error)
            tell_checkpoint(error, saver.path, saver.step, not_saved)
            raise
    return TrainResult(state.step, report.seconds, saver.path, state.best_model(), report.means, metrics)


def _loop(
    state: TrainState,
    stream: BatchStream,
    report: Report,
    saver: _Saver,
    stop: StopSignals,
    evaluate_fn: EvaluateFn | None,
    begin: Callable[[], None],
) -> dict[str, float]:
    """The steps that are left; gives the metrics of the last evaluation. `begin` comes before any file is written."""
    config = state.config
    metrics: dict[str, float] = {}
    batches = iter(stream)
    state.model.train()
    finished = state.step >= config.steps
    while state.step < config.steps and stop.number is None:
        lr = config.lr * lr_factor(config, state.step)
        set_lr(state.optimizer, lr)
        with stop.workers_later():
            losses, images = _update(state, itertools.islice(batches, config.accumulate))
            state.end_update(stream.epoch, stream.position)
        begin()
        report.add(losses, images)
        step, finished = state.step, state.step == config.steps
        measure = evaluate_fn is not None and (finished or (config.eval_every > 0 and step % config.eval_every == 0))
        save = measure or finished or step % config.checkpoint_every == 0 or stop.number is not None
        if save or step % config.log_every == 0:
            report.write_losses(step, state.epoch, lr)
        if save:
            saver.save()
        if measure and evaluate_fn is not None:
            with stop.at_once():
                metrics = _evaluate(evaluate_fn, state)
            report.write_metrics(step, metrics)
        if save:
            report.timer.restart()
    begin()
    if saver.step != state.step:  # a signal came too late for the last update, or a resumed run has no step left
        report.write_losses(state.step, state.epoch, state.optimizer.param_groups[0]["lr"])
        saver.save()
    if stop.number is not None:
        raise Interrupted(stop.number)
    if finished and not metrics and evaluate_fn is not None:  # resumed with no step left
        with stop.at_once():
            metrics = _evaluate(evaluate_fn, state)
        report.write_metrics(state.step, metrics)
    return metrics


def _update(state: TrainState, batches: Iterator[Any]) -> tuple[dict[str, Tensor], int]:
    """One update by the gradient averaged over `batches` (as many as ``accumulate``). `end_update` is the caller's.

    Gives the loss terms, averaged too and still on the device, and the number of images.
    """
    config, device, optimizer, scaler = state.config, state.device, state.optimizer, state.scaler
    terms: dict[str, Tensor] = {}
    count = 0
    state.begin_update()
    optimizer.zero_grad(set_to_none=True)
    for batch in batches:
        images = to_device(batch.images, device, channels_last=config.channels_last)
        targets = to_device(batch.targets, device)
        with autocast(device, config.precision):
            losses = state.model.forward_padded(images, targets, compact=device.type == "cpu")
            total = torch.stack([loss.float() for loss in losses.values()]).sum() / config.accumulate
        (total if scaler is None else scaler.scale(total)).backward()
        for name, loss in losses.items():
            part = loss.detach().float() / config.accumulate
            terms[name] = terms[name] + part if name in terms else part
        count += len(batch.images.sizes)
    if scaler is not None:
        scaler.unscale_(optimizer)
    if config.clip_norm is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, config.clip_norm)
    state.phase = "written"
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    if state.average is not None:
        state.average.update()
    return terms, count


def _evaluate(evaluate_fn: EvaluateFn, state: TrainState) -> dict[str, float]:
    """Metrics; leaves the random state and the mode of the model as they were."""
    with torch.random.fork_rng(devices=[state.device] if state.device.type == "cuda" else []):
        metrics = evaluate_fn(state.best_model())
    state.model.train()
    return metrics


class _Saver:
    """Writes the checkpoint of a run and knows of which step the one on disk is."""

    def __init__(self, path: Path, state: TrainState, report: Report, resume: str | Path | None) -> None:
        self.path, self.state, self.report = path, state, report
        own = resume is not None and path.is_file() and path.samefile(resume)
        self.step = state.step if own else None  # None: none of this run yet

    def save(self) -> None:
        """Errors: CheckpointError that tells, as a row of the log does, of which step the last good one is; and
        NonFiniteLossError if the weights are not finite, which leaves the checkpoint on disk as it is."""
        step = self.state.step
        check_weights(self.state.model, step)
        try:
            save_checkpoint(self.path, self.state.content())
        except CheckpointError as error:
            with contextlib.suppress(OSError):  # the disk may be full
                self.report.log.write({"step": step, "error": str(error), "checkpoint_step": self.step})
            last = "there is none before it" if self.step is None else f"the last good one is of step {self.step}"
            raise CheckpointError(f"step {step}: {error}; {last}") from error
        self.step = step

    def rescue(self, error: BaseException) -> str:
        """Save the last whole update after `error`, unless it is saved; gives the reason if it cannot be, else ""."""
        state, report = self.state, self.report
        # Before the first update nothing is lost. What failed to be saved, or is not finite, says so itself.
        if not report.is_open or isinstance(error, CheckpointError | NonFiniteLossError):
            return ""
        if state.phase == "written":
            return f"step {state.step + 1} broke off while it changed the weights, so that they cannot be saved"
        try:
            with contextlib.suppress(OSError):  # the disk may be full
                report.write_losses(state.step, state.epoch, state.optimizer.param_groups[0]["lr"])
            if self.step != state.step:
                self.save()
        except Exception as second:
            return str(second) or type(second).__name__
        return ""


def tell_checkpoint(error: BaseException, path: Path, step: int | None, not_saved: str = "") -> None:
    """Let `error` tell of which step the checkpoint on disk is, in ``checkpoint_step`` and a note.

    `not_saved` says why it is not of the last update; it becomes ``error.not_saved``.
    """
    told: Any = error
    told.checkpoint_step, told.not_saved = step, not_saved
    reasons = [not_saved] * bool(not_saved) + ([] if step is None else [f"{path} is the checkpoint of step {step}"])
    if reasons:
        error.add_note("; ".join(reasons))
