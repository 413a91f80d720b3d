"""The training loop: batches in, weights, checkpoints and a log out.

The loop waits for the device only where it logs: losses stay on the device until then. There it also finds a loss that
is not finite.
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
from tmask.engine.files import CHECKPOINT_NAME
from tmask.engine.interrupt import Interrupted, StopSignals
from tmask.engine.log import NonFiniteLossError, Report, check_tensorboard, check_weights
from tmask.engine.optimizer import lr_factor, set_lr
from tmask.engine.state import BatchStream, TrainState

EvaluateFn = Callable[[Any], dict[str, float]]


@dataclass(frozen=True)
class TrainResult:
    """The end of a run."""

    step: int
    seconds: float  # of training alone, without evaluations
    checkpoint: Path
    model: Any  # the model to use: the averaged one if the run kept an average
    losses: dict[str, float]  # means over the last log window
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation


def fit(
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
    """Train `model` in place for ``config.steps`` updates; write ``checkpoint.pt`` and ``log.jsonl`` to `out_dir`.

    The first SIGINT or SIGTERM ends the run after the present update, with a checkpoint. A second signal, or one during
    an evaluation, ends the run at once; a checkpoint is written before each evaluation.

    After any other error `fit` saves the last whole update. ``checkpoint_step`` of the error is the step of the
    checkpoint on disk, or None. A note names that step, and why the last update is not saved: weights that are not
    finite, an update that broke off while it wrote weights, or a failed write.

    Args:
        model: Has MaskRCNN's ``forward_padded``. ``only="masks"`` freezes its detector for good.
        train_loader: Yields batches with ``images`` (ImageBatch) and ``targets`` (Targets); see `BatchStream`.
        config: Settings of the training.
        out_dir: Folder of the run.
        device: Where the training runs.
        categories: COCO categories, for the checkpoint.
        exif: Whether images are turned by their EXIF orientation, for the checkpoint.
        evaluate_fn: Returns metrics of a model (the averaged one if the run keeps an average). Called every
            ``eval_every`` steps and at the end, also if a resumed run has no step left.
        resume: Checkpoint to continue.
        on_start: Called after the first update, before any file in `out_dir` changes.

    Raises:
        Interrupted: (a KeyboardInterrupt) After a signal.
        NonFiniteLossError: A loss is NaN or infinite (at the next log point), or weights are (before a checkpoint).
        CheckpointError: `resume` is unusable or has other settings, or a checkpoint cannot be written.
        ValueError: The loader is empty, the device lacks the precision, TensorBoard is missing, or the detector of the
            model is frozen without ``only``.
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
    """Do the remaining updates and return the metrics of the last evaluation. `begin` runs before any file changes."""
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
            metrics = _evaluate(evaluate_fn, state, report, stop)
        if save:
            report.timer.restart()
    begin()
    if saver.step != state.step:  # a signal came too late for the last update, or a resumed run has no step left
        report.write_losses(state.step, state.epoch, state.optimizer.param_groups[0]["lr"])
        saver.save()
    if stop.number is not None:
        raise Interrupted(stop.number)
    if finished and not metrics and evaluate_fn is not None:  # resumed with no step left
        metrics = _evaluate(evaluate_fn, state, report, stop)
    return metrics


def _update(state: TrainState, batches: Iterator[Any]) -> tuple[dict[str, Tensor], int]:
    """Do one update by the mean gradient over `batches` (``accumulate`` of them). The caller calls `end_update`.

    Returns:
        The mean of each loss term, on the device, and the number of images.
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


def _evaluate(evaluate_fn: EvaluateFn, state: TrainState, report: Report, stop: StopSignals) -> dict[str, float]:
    """Evaluate and log the metrics. The random state and the mode of the model stay as they are."""
    with stop.at_once():
        with torch.random.fork_rng(devices=[state.device] if state.device.type == "cuda" else []):
            metrics = evaluate_fn(state.best_model())
        state.model.train()
    report.write_metrics(state.step, metrics)
    return metrics


class _Saver:
    """Writes the checkpoint of a run; ``step`` is the step of the checkpoint on disk, None before the first one."""

    def __init__(self, path: Path, state: TrainState, report: Report, resume: str | Path | None) -> None:
        self.path, self.state, self.report = path, state, report
        own = resume is not None and path.is_file() and path.samefile(resume)
        self.step = state.step if own else None

    def save(self) -> None:
        """Save the state.

        Raises:
            NonFiniteLossError: The weights are not finite. The checkpoint on disk stays.
            CheckpointError: The write failed. The error and a row of the log name the step of the last good one.
        """
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
        """After `error`, save the last whole update unless it is saved. Return why it is not saved, or ""."""
        state, report = self.state, self.report
        # Before the first update nothing is lost. A failed save and weights that are not finite have said so.
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
    """Add to `error` the step of the checkpoint on disk, in ``checkpoint_step`` and a note.

    `not_saved` is the reason why the last update is not saved; it becomes ``error.not_saved``.
    """
    told: Any = error
    told.checkpoint_step, told.not_saved = step, not_saved
    reasons = [not_saved] * bool(not_saved) + ([] if step is None else [f"{path} is the checkpoint of step {step}"])
    if reasons:
        error.add_note("; ".join(reasons))
