"""What a run tells: log.jsonl, printed lines, progress bars, TensorBoard."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from tmask.config import TrainConfig
from tmask.engine.files import LOG_NAME, TENSORBOARD_NAME, naming, replace_text

T = TypeVar("T")

_LINE_SECONDS = 30.0  # between two lines of `progress`
_WAY_OUT = "Lower train.lr, lengthen train.warmup_steps, set train.clip_norm, or train in fp32."


class NonFiniteLossError(RuntimeError):
    """A loss or a weight became NaN or infinite; the message names the step and the terms."""


def check_weights(model: torch.nn.Module, step: int) -> None:
    """Raise NonFiniteLossError if a weight of `model` after `step` is not finite, as after an infinite gradient."""
    for name, weight in model.named_parameters():
        if not weight.detach().cpu().isfinite().all():  # on the CPU: the GPU's memory may be full
            raise NonFiniteLossError(f"step {step}: the weights are not finite: {name}. {_WAY_OUT}")


def check_tensorboard(config: TrainConfig) -> None:
    """Raise ValueError if `config` asks for TensorBoard and the package is missing."""
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("train.tensorboard: tensorboard is not installed; pip install 'tmask[tensorboard]'")


class Report:
    """The reports of one run that begins at `step` (0, or the step of the resumed checkpoint). Close it at the end.

    No file changes before `open`. `open` removes what an earlier run logged after `step`; for a fresh run
    (``resumed=False``) it removes all.
    """

    log: JsonLines

    def __init__(self, out_dir: Path, device: torch.device, config: TrainConfig, *, step: int, resumed: bool) -> None:
        from tqdm import tqdm

        self.out_dir, self.device, self.config = out_dir, device, config
        self.resume_step = step if resumed else None
        self.is_open = False
        self.events: Any = None
        # disable=None: a bar on a terminal only. The lines of `write_losses` are always printed.
        self.bar = tqdm(total=config.steps, initial=step, unit="step", disable=None, file=sys.stderr)
        self.losses = LossBuffer()
        self.timer = StepTimer(device)
        self.timer.restart()
        self.images = 0
        self.seconds = 0.0
        self.means: dict[str, float] = {}
        self._first = step

    def open(self) -> None:
        """Begin or continue the log and TensorBoard's file."""
        self.log = JsonLines(self.out_dir / LOG_NAME, resume_step=self.resume_step)
        if self.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # TensorBoard hides older events from step purge_step on.
            step = 0 if self.resume_step is None else self.resume_step + 1
            self.events = SummaryWriter(self.out_dir / TENSORBOARD_NAME, purge_step=step)
        self.is_open = True

    def add(self, losses: dict[str, Tensor], images: int) -> None:
        """Count one update with its `losses` (scalars on the device) and its number of images."""
        self.losses.add(losses)
        self.timer.mark()
        self.images += images
        self.bar.update()

    def write_losses(self, step: int, epoch: int, lr: float) -> None:
        """Read, check and log the losses since the last call. This is the loop's only wait for the device."""
        rows = self.losses.read()
        if not rows:
            return
        self._check(rows)
        times = self.timer.read()
        self.seconds += sum(times)
        seconds, memory = statistics.median(times or [0.0]), peak_memory_gib(self.device)
        self.means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        total = sum(self.means.values())
        row = {
            "epoch": epoch,
            "lr": lr,
            "loss": total,
            **self.means,
            "seconds_per_step": seconds,
            "images_per_second": self.images / max(sum(times), 1e-9),
            "peak_memory_gib": memory,
        }
        self._write(step, row, prefix="train/")
        terms = "  ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in self.means.items())
        line = f"step {step}/{self.config.steps}  lr {lr:.2e}  loss {total:.3f}  {terms}"
        self.bar.write(f"{line}  {seconds:.3f} s/step  {memory:.2f} GiB", file=sys.stderr)
        self.images = 0
        self._first = step

    def write_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Log the figures of an evaluation; their names (``bbox/AP``) are TensorBoard's tags."""
        self._write(step, metrics, prefix="")

    def close(self) -> None:
        """End the progress bar and TensorBoard's file."""
        self.bar.close()
        if self.events is not None:
            with contextlib.suppress(OSError):  # a full disk; the last write has raised already
                self.events.close()

    def _write(self, step: int, row: dict[str, float], *, prefix: str) -> None:
        self.log.write({"step": step, **row})
        if self.events is not None:
            for name, value in row.items():
                self.events.add_scalar(prefix + name, value, step)
            self.events.flush()  # so that a killed run keeps its events

    def _check(self, rows: list[dict[str, float]]) -> None:
        for index, row in enumerate(rows):
            bad = {name: value for name, value in row.items() if not math.isfinite(value)}
            if bad:
                terms = ", ".join(f"{name} = {value}" for name, value in bad.items())
                raise NonFiniteLossError(f"step {self._first + index + 1}: the loss is not finite: {terms}. {_WAY_OUT}")


class JsonLines:
    """Appends one JSON object a line to `path`. Each line is flushed, so that a killed run keeps its log.

    A fresh log is empty. With `resume_step` the lines up to that step stay and later lines go, because the run
    repeats these steps.
    """

    def __init__(self, path: str | Path, *, resume_step: int | None = None) -> None:
        self.path = Path(path)
        kept = []
        if resume_step is not None and self.path.is_file():
            kept = [row for row in read_log(self.path) if row.get("step", 0) <= resume_step]
        replace_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, row: dict[str, Any]) -> None:
        """Append one line. Raises an OSError that names the file."""
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a log, without a last line that a killed run left half written."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class LossBuffer:
    """Keeps the losses of some steps on the device; only `read` waits for the device."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.rows: list[Tensor] = []  # of each step its losses, float32

    def add(self, losses: dict[str, Tensor]) -> None:
        """Store the scalars of one step."""
        self.names = tuple(losses)
        self.rows.append(torch.stack([loss.detach().float() for loss in losses.values()]))

    def read(self) -> list[dict[str, float]]:
        """Return and forget the losses of the steps since the last call. Waits for the device."""
        values = torch.stack(self.rows).tolist() if self.rows else []  # the one sync of `log_every` steps
        self.rows = []
        return [dict(zip(self.names, row, strict=True)) for row in values]


class StepTimer:
    """Seconds between successive `mark` calls: by CUDA events on a GPU (no wait), else by the clock."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Mark the border between two steps."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))  # record() alone takes the current device's stream
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def read(self) -> list[float]:
        """Seconds of each step since the last call. On a GPU, call it after a sync."""
        if self.cuda and self.marks:
            self.marks[-1].synchronize()
        pairs = zip(self.marks, self.marks[1:], strict=False)
        seconds = [a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in pairs]
        self.marks = self.marks[-1:]
        return seconds

    def restart(self) -> None:
        """Drop the time since the last mark: an evaluation or a checkpoint took it."""
        self.marks = []
        self.mark()


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: of PyTorch's allocator on a GPU, of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # not on Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def progress(items: Iterable[T], task: str, unit: str) -> Iterator[T]:
    """Yield the items and show progress on stderr: a bar on a terminal, else a line every 30 seconds.

    Args:
        items: The items; their number is shown if they have a length.
        task: What the caller does with the items, such as "evaluation".
        unit: What one item is, such as "image".
    """
    from tqdm import tqdm

    total = len(items) if isinstance(items, Sized) else None
    if total == 0:
        return
    of_total = "" if total is None else f"/{total}"
    start = last = time.monotonic()
    # disable=None: a bar on a terminal only. leave=None: a bar below the bar of a training goes when it is full.
    bar = tqdm(items, desc=task, unit=unit, disable=None, leave=None, file=sys.stderr)
    for count, item in enumerate(bar, start=1):
        yield item
        now = time.monotonic()
        if now - last >= _LINE_SECONDS and not sys.stderr.isatty():
            last = now
            rate = count / (now - start)
            print(f"{task}: {unit} {count}{of_total}  {rate:.2f} {unit}/s", file=sys.stderr, flush=True)
