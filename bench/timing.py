"""Clocks: CUDA events with a cold L2 cache on a GPU, the process's clock on a CPU; several providers in turn.

Providers take turns round by round, so that a clock that drifts or a card that warms up hits all of them alike. Before
each timed call a buffer several times the size of the L2 cache is read: it evicts the inputs without leaving written
lines behind, whose write-back would fall into the measurement, and it gives the host the time to queue the launches. So
the events see the device's own time unless a call issues launches for longer than that read takes; `wall_us` is
what a single call costs with nothing queued before it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

# Aim and bounds of the rounds of one provider. A fast one gets `MAX_ROUNDS`, a slow one as many as fit into the time.
SECONDS = {"cuda": 0.3, "cpu": 1.5}
MAX_ROUNDS = {"cuda": 100, "cpu": 30}
MIN_ROUNDS = {"cuda": 10, "cpu": 3}
WALL_ROUNDS = 10


@dataclass
class Samples:
    """Seconds of one provider, a sample a round; `wall` from call to end of work."""

    device: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    error: Exception | None = None  # what ended it early


def time_in_turn(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, started: Callable[[str], None] = lambda name: None
) -> dict[str, Samples]:
    """Time each call, warm, in turn with the others. One that raises is left out from there on.

    `started` is told each name before its call's first round, so that a crash can be laid at its door.
    """
    samples = {name: Samples() for name in calls}
    rounds: dict[str, int] = {}
    clock = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    flush = _Flush(device) if device.type == "cuda" else None

    def step(name: str, action: Callable[[], None]) -> None:
        if samples[name].error is None:
            try:
                action()
            except Exception as error:
                samples[name].error = error

    for name, call in calls.items():
        started(name)
        step(name, lambda name=name, call=call: rounds.update({name: _rounds(call, device)}))
    for turn in range(max(rounds.values(), default=0)):
        for name, call in calls.items():
            if turn < rounds.get(name, 0):
                step(name, lambda name=name, call=call: samples[name].device.append(clock(call, flush)))
    for name, call in calls.items():
        if device.type != "cuda":
            samples[name].wall = samples[name].device
            continue
        for _ in range(min(WALL_ROUNDS, rounds.get(name, 0))):
            step(name, lambda name=name, call=call: samples[name].wall.append(_wall_seconds(call, device)))
    return samples


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the sorted values lie, interpolated between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def peak_mib(call: Callable[[], Any], device: torch.device) -> float | None:
    """Most memory of one warm call above what is held before it, outputs included. None where it is not counted."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    out = call()
    torch.cuda.synchronize(device)
    del out
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class ReplayTimer:
    """A timer for pytest-benchmark that answers with seconds measured before.

    pytest-benchmark asks a timer before and after each round and takes the difference. Its own clock would time the
    host, one provider after another; this one gives it the samples of `time_in_turn`.
    """

    def __init__(self) -> None:
        self._samples: list[float] = []
        self._now = 0.0
        self._running = False

    def load(self, samples: Iterable[float]) -> None:
        self._samples = list(samples)
        self._now, self._running = 0.0, False

    def __call__(self) -> float:
        if self._running:
            self._now += self._samples.pop(0)
        self._running = not self._running
        return self._now


REPLAY = ReplayTimer()


class _Flush:
    """Reads more memory than the L2 cache holds."""

    def __init__(self, device: torch.device) -> None:
        l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 2**26
        self._buffer = torch.ones(4 * l2 // 4, dtype=torch.float32, device=device)
        self._sum = torch.empty((), dtype=torch.float32, device=device)

    def __call__(self) -> None:
        torch.sum(self._buffer, dim=0, out=self._sum)


def _rounds(call: Callable[[], Any], device: torch.device) -> int:
    """Warm a call up and say how often it fits into the time."""
    call()
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    took = max(time.perf_counter() - start, 1e-7)
    kind = device.type
    return max(MIN_ROUNDS[kind] if took < 1 else 3, min(MAX_ROUNDS[kind], int(SECONDS[kind] / took)))


def _cuda_seconds(call: Callable[[], Any], flush: _Flush | None) -> float:
    assert flush is not None
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    flush()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _cpu_seconds(call: Callable[[], Any], flush: _Flush | None) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _wall_seconds(call: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def median(values: Sequence[float]) -> float:
    return statistics.median(values)
