"""Clocks: CUDA events with a cold L2 cache on a GPU, the process's clock on a CPU; several providers in turn.

Providers take turns round by round, so that a clock that drifts or a card that warms up hits all of them alike. On a
GPU a buffer several times the size of the L2 cache is read before each timed call: it evicts the inputs without leaving
written lines behind, whose write-back would fall into the measurement. It is read as often as the host needs to queue
the call's launches, up to `MAX_READS`, so the events see the device's own time: gaps between kernels count only where
the call itself waits for the device, or launches for longer than that. `wall` is what a single call costs with nothing
queued before it.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

# Aim and bounds of the rounds of one provider. A fast one gets `MAX_ROUNDS`, a slow one as many as fit into the time.
SECONDS = {"cuda": 0.3, "cpu": 1.5}
MAX_ROUNDS = {"cuda": 100, "cpu": 30}
MIN_ROUNDS = {"cuda": 10, "cpu": 3}
WALL_ROUNDS = 10

# Reads of the buffer before a call: 50 of 200 MB take 3 ms on an H100, what some 300 launches take to queue.
MAX_READS = 50


@dataclass
class Samples:
    """Seconds of one provider, a sample a round; `wall` from call to end of work."""

    device: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


def time_in_turn(
    calls: Mapping[str, Callable[[], Any]],
    device: torch.device,
    started: Callable[[str], None] = lambda name: None,
    failed: Callable[[str, Exception], None] = lambda name, error: None,
) -> dict[str, Samples]:
    """Time each call, warm, in turn with the others; one that raises is left out from there on, and has no samples.

    `started` is told each name before its call's first round, so that a crash can be laid at its door. `failed` is told
    of each error while it is handled: whoever kept the error would keep the tensors of its frames too.
    """
    if not calls:
        return {}
    clock = _CudaClock(device) if device.type == "cuda" else _CpuClock()
    samples: dict[str, Samples] = {}
    plans: dict[str, _Plan] = {}

    def step(name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            samples.pop(name, None)
            plans.pop(name, None)
            failed(name, error)

    def warm_up(name: str) -> None:
        plans[name] = _plan(calls[name], device)
        samples[name] = Samples()

    for name in calls:
        started(name)
        step(name, lambda name=name: warm_up(name))
    with _no_garbage_collection():
        for turn in range(max((plan.rounds for plan in plans.values()), default=0)):
            for name, plan in list(plans.items()):
                if turn < plan.rounds:
                    step(name, lambda name=name, plan=plan: samples[name].device.append(clock(calls[name], plan.lead)))
        for name, plan in list(plans.items()):
            if device.type != "cuda":
                samples[name].wall = samples[name].device
                continue
            for _ in range(min(WALL_ROUNDS, plan.rounds)):
                if name in plans:
                    step(name, lambda name=name: samples[name].wall.append(_wall_seconds(calls[name], device)))
    return samples


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the sorted values lie, interpolated between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


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
    host, one provider after another; this one gives it the samples of `time_in_turn`, to the last bit: each round
    starts at 0.
    """

    def __init__(self) -> None:
        self._samples: list[float] = []
        self._running = False

    def load(self, samples: Iterable[float]) -> None:
        self._samples, self._running = list(samples), False

    def __call__(self) -> float:
        self._running = not self._running
        return 0.0 if self._running else self._samples.pop(0)


REPLAY = ReplayTimer()


@dataclass(frozen=True)
class _Plan:
    """How a call is timed: how often, and the seconds the host needs to queue its launches."""

    rounds: int
    lead: float


def _plan(call: Callable[[], Any], device: torch.device) -> _Plan:
    """Warm a call up and say how often it fits into the time."""
    call()
    synchronize(device)
    start = time.perf_counter()
    call()
    queued = time.perf_counter()
    synchronize(device)
    took = max(time.perf_counter() - start, 1e-7)
    kind = device.type
    rounds = max(MIN_ROUNDS[kind] if took < 1 else 3, min(MAX_ROUNDS[kind], int(SECONDS[kind] / took)))
    return _Plan(rounds, queued - start)


class _CpuClock:
    def __call__(self, call: Callable[[], Any], lead: float) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


class _CudaClock:
    """CUDA events around a call that finds its inputs in memory, not in the L2 cache, and its launches queued."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size or 2**26
        self._buffer = torch.ones(l2_bytes, dtype=torch.float32, device=device)  # of four times its size
        self._sum = torch.empty((), dtype=torch.float32, device=device)
        # Twice: the first reads warm the kernel up.
        self._read_seconds = [max(self._between(self._read, self._read), 1e-6) for _ in range(2)][-1]

    def __call__(self, call: Callable[[], Any], lead: float) -> float:
        """Device seconds of a call whose launches take the host `lead` seconds to queue."""
        # Half as much again, since the host needs a part of the time to queue the reads themselves.
        reads = min(MAX_READS, 1 + math.ceil(1.5 * lead / self._read_seconds))

        def prepare() -> None:
            for _ in range(reads):
                self._read()

        return self._between(prepare, call)

    def _read(self) -> None:
        torch.sum(self._buffer, dim=0, out=self._sum)

    def _between(self, prepare: Callable[[], Any], call: Callable[[], Any]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self._device)
        prepare()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def _wall_seconds(call: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect before the block and not inside it: a collection would fall into one provider's round."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
