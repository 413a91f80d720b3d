"""What the training loop reports to: log file, printed lines, progress bar, TensorBoard, clock and loss buffer."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import torch

from tmask.config import TrainConfig
from tmask.engine.log import JsonLines, LossBuffer, StepTimer, median, peak_memory_gib

LOG_NAME = "log.jsonl"
TENSORBOARD_NAME = "tensorboard"


_WAY_OUT = "Lower train.lr, lengthen train.warmup_steps, set train.clip_norm, or train in fp32."


class NonFiniteLossError(RuntimeError):
    """A loss or a weight became NaN or infinite; the message names the step and the terms."""


def check_weights(model: torch.nn.Module, step: int) -> None:
    """Errors: NonFiniteLossError if a weight of `model` after `step` is not finite, as after an infinite gradient."""
    for name, weight in model.named_parameters():
        if not weight.detach().cpu().isfinite().all():  # on the CPU: the GPU's memory may be full
            raise NonFiniteLossError(f"step {step}: the weights are not finite: {name}. {_WAY_OUT}")


def check_tensorboard(config: TrainConfig) -> None:
    """Errors: ValueError if `config` asks for TensorBoard's events and the package is not there."""
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("train.tensorboard: tensorboard is not installed; pip install 'tmask[tensorboard]'")


class Report:
    """The reports of one run, which begins at `step` (0, or that of the checkpoint it resumes). Close it at the end.

    Files change from `open` on. What an earlier run wrote about later steps goes; a fresh run (``resumed=False``) keeps
    nothing.
    """

    log: JsonLines

    def __init__(self, out_dir: Path, device: torch.device, config: TrainConfig, *, step: int, resumed: bool) -> None:
        from tqdm import tqdm

        self.out_dir, self.device, self.config = out_dir, device, config
        self.resume_step = step if resumed else None
        self.is_open = False
        self.events: Any = None
        # disable=None: the bar shows on a terminal only; the lines of `losses_of` always do.
        self.bar = tqdm(total=config.steps, initial=step, unit="step", disable=None, file=sys.stderr)
        self.losses = LossBuffer(config.log_every)
        self.timer = StepTimer(device)
        self.timer.restart()
        self.images = 0
        self.seconds = 0.0
        self.means: dict[str, float] = {}
        self._first = step

    def open(self) -> None:
        """Begin the log and TensorBoard's file, or go on with them."""
        self.log = JsonLines(self.out_dir / LOG_NAME, resume_step=self.resume_step)
        if self.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # TensorBoard hides the older events from this step on.
            step = 0 if self.resume_step is None else self.resume_step + 1
            self.events = SummaryWriter(self.out_dir / TENSORBOARD_NAME, purge_step=step)
        self.is_open = True

    def add(self, losses: dict[str, torch.Tensor], images: int) -> None:
        """One update is done."""
        self.losses.add(losses)
        self.timer.mark()
        self.images += images
        self.bar.update()

    def write_losses(self, step: int, epoch: int, lr: float) -> None:
        """Read the losses of the last steps (the loop's only wait for the device), check and log them."""
        rows = self.losses.read()
        if not rows:
            return
        self._check(rows)
        seconds = self.timer.read()
        self.seconds += sum(seconds)
        self.means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        total, memory = sum(self.means.values()), peak_memory_gib(self.device)
        row = {
            "epoch": epoch,
            "lr": lr,
            "loss": total,
            **self.means,
            "seconds_per_step": median(seconds),
            "images_per_second": self.images / max(sum(seconds), 1e-9),
            "peak_memory_gib": memory,
        }
        self._write(step, row, prefix="train/")
        terms = "  ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in self.means.items())
        line = f"step {step}/{self.config.steps}  lr {lr:.2e}  loss {total:.3f}  {terms}"
        self.bar.write(f"{line}  {median(seconds):.3f} s/step  {memory:.2f} GiB", file=sys.stderr)
        self.images = 0
        self._first = step

    def write_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Log the figures of an evaluation; their names are TensorBoard's tags as they are (``bbox/AP``)."""
        self._write(step, metrics, prefix="")

    def close(self) -> None:
        """End the progress bar and TensorBoard's file."""
        self.bar.close()
        if self.events is not None:
            with contextlib.suppress(OSError):  # a full disk, of which the last write has told
                self.events.close()

    def _write(self, step: int, row: dict[str, float], *, prefix: str) -> None:
        self.log.write({"step": step, **row})
        if self.events is not None:
            for name, value in row.items():
                self.events.add_scalar(prefix + name, value, step)
            self.events.flush()  # a killed run keeps its events, as it keeps its log

    def _check(self, rows: list[dict[str, float]]) -> None:
        for index, row in enumerate(rows):
            bad = {name: value for name, value in row.items() if not math.isfinite(value)}
            if bad:
                terms = ", ".join(f"{name} = {value}" for name, value in bad.items())
                raise NonFiniteLossError(f"step {self._first + index + 1}: the loss is not finite: {terms}. {_WAY_OUT}")
