"""What a run leaves to read: a JSON-lines log, step times and peak memory, none of which makes the device wait."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tmask.engine.files import naming, replace_text


class JsonLines:
    """Appends one JSON object a line to `path`; each line is flushed, so a killed run keeps its log.

    A fresh log starts empty. With `resume_step` the old lines up to that step stay and later ones go: the run is about
    to do those steps again.
    """

    def __init__(self, path: str | Path, *, resume_step: int | None = None) -> None:
        self.path = Path(path)
        kept = []
        if resume_step is not None and self.path.is_file():
            kept = [row for row in read_log(self.path) if row.get("step", 0) <= resume_step]
        replace_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, row: dict[str, Any]) -> None:
        """Append one line. Errors: OSError that names the file."""
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a log; a last line that a killed run left half written is skipped."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class LossBuffer:
    """Keeps the losses of up to `capacity` steps on the device, so that only `read` waits for it."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.names: tuple[str, ...] = ()
        self.values: Tensor | None = None  # [capacity, L] float32
        self.count = 0

    def add(self, losses: dict[str, Tensor]) -> None:
        """Store the (detached) scalars of one step."""
        if self.values is None:
            self.names = tuple(losses)
            device = next(iter(losses.values())).device
            self.values = torch.zeros(self.capacity, len(self.names), device=device)
        row = torch.stack([losses[name].detach().float() for name in self.names])
        self.values[self.count].copy_(row)
        self.count += 1

    def read(self) -> list[dict[str, float]]:
        """The losses of the steps since the last call, and forget them. Waits for the device."""
        if self.values is None:
            return []
        rows = self.values[: self.count].tolist()  # the one sync of `log_every` steps
        self.count = 0
        return [dict(zip(self.names, row, strict=True)) for row in rows]


class StepTimer:
    """Seconds between successive `mark` calls: by CUDA events on a GPU (no wait), else by the clock."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        """A step begins or ends here."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))  # by default that of the current device
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def read(self) -> list[float]:
        """Seconds of each step since the last call. On CUDA: call it after a sync."""
        if self.cuda and self.marks:
            self.marks[-1].synchronize()
        pairs = zip(self.marks, self.marks[1:], strict=False)
        seconds = [a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in pairs]
        self.marks = self.marks[-1:]
        return seconds

    def restart(self) -> None:
        """Forget the time since the last mark (an evaluation or a checkpoint stood there)."""
        self.marks = []
        self.mark()


def median(values: list[float]) -> float:
    """The median; 0 of an empty list."""
    return statistics.median(values) if values else 0.0


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far, GiB: of PyTorch's allocator on a GPU, of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # not on Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
