"""Clocks: CUDA events with a cold L2 cache on a GPU, the process's clock on a CPU; several providers in turn.

Providers take turns round by round, so that a clock that drifts or a card that warms up hits all of them alike. On a
GPU a buffer several times the size of the L2 cache is read before each timed call: the reads evict the inputs without
leaving written lines behind, whose write-back would fall into the measurement. The buffer is read as often as the host
needs to queue the call's launches, up to `MAX_READS`, so the events see the device's own time. A gap between kernels
counts only where the call itself waits for the device, or launches for longer than that.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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

median = statistics.median


@dataclass
class Samples:
    """Seconds of one provider, a sample a round; `wall` from call to end of work, nothing queued before it."""

    device: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


def time_in_turn(
    calls: Mapping[str, Callable[[], Any]],
    device: torch.device,
    started: Callable[[str], None] = lambda name: None,
    failed: Callable[[str, Exception], None] = lambda name, error: None,
) -> dict[str, Samples]:
    """Time each call, warm, in turn with the others; a call that raises is left out from there on.

    `started` is told each name before its call's first round. `failed` is told of each error while it is handled: a
    caller that kept the error would keep the tensors of its frames too.
    """
    if not calls:
        return {}
    cuda = device.type == "cuda"
    clock = _CudaClock(device) if cuda else None
    samples: dict[str, Samples] = {}
    plans: dict[str, tuple[int, float]] = {}

    def attempt(action: Callable[[str], None], name: str) -> None:
        try:
            action(name)
        except Exception as error:
            samples.pop(name, None)
            plans.pop(name, None)
            failed(name, error)

    def warm_up(name: str) -> None:
        plans[name], samples[name] = _plan(calls[name], device), Samples()

    def once(name: str) -> None:
        taken = clock(calls[name], plans[name][1]) if clock else wall_seconds(calls[name], device)
        samples[name].device.append(taken)

    def once_wall(name: str) -> None:
        samples[name].wall.append(wall_seconds(calls[name], device))

    for name in calls:
        started(name)
        attempt(warm_up, name)
    gc.collect()
    gc.disable()  # a collection would fall into one provider's round
    try:
        for turn in range(max((rounds for rounds, _ in plans.values()), default=0)):
            for name in [name for name, (rounds, _) in plans.items() if turn < rounds]:
                attempt(once, name)
        for name, (rounds, _) in list(plans.items()):
            for _ in range(min(WALL_ROUNDS, rounds) if cuda else 0):
                if name in plans:
                    attempt(once_wall, name)
    finally:
        gc.enable()
    for each in samples.values():
        each.wall = each.wall or each.device
    return samples


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` of the sorted values lie, interpolated between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def peak_mib(call: Callable[[], Any], device: torch.device) -> float | None:
    """Return the most memory of one warm call above what is held before it, outputs included. None on a CPU."""
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


def wall_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds from the call to the end of its work."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


class ReplayTimer:
    """A timer for pytest-benchmark that answers with seconds measured before.

    pytest-benchmark asks a timer before and after each round and takes the difference. Its own clock would time the
    host, one provider after another; this timer hands out the samples of `time_in_turn` to the last bit: each round
    starts at 0.
    """

    def __init__(self) -> None:
        self.samples: list[float] = []
        self._running = False

    def __call__(self) -> float:
        self._running = not self._running
        return 0.0 if self._running else self.samples.pop(0)


REPLAY = ReplayTimer()


def _plan(call: Callable[[], Any], device: torch.device) -> tuple[int, float]:
    """Warm a call up; return how often it fits into the time, and the seconds the host needs to queue its launches."""
    call()
    synchronize(device)
    start = time.perf_counter()
    call()
    queued = time.perf_counter()
    synchronize(device)
    took = max(time.perf_counter() - start, 1e-7)
    kind = device.type
    rounds = max(MIN_ROUNDS[kind] if took < 1 else 3, min(MAX_ROUNDS[kind], int(SECONDS[kind] / took)))
    return rounds, queued - start


class _CudaClock:
    """CUDA events around a call that finds its inputs in memory, not in the L2 cache, and its launches queued."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size or 2**26
        self._buffer = torch.ones(l2_bytes, dtype=torch.float32, device=device)  # of four times its size
        self._sum = torch.empty((), dtype=torch.float32, device=device)
        # Twice: the first reads warm the kernel up.
        self._read_seconds = [max(self._between(1, self._read), 1e-6) for _ in range(2)][-1]

    def __call__(self, call: Callable[[], Any], lead: float) -> float:
        """Return the device seconds of a call whose launches take the host `lead` seconds to queue."""
        # Half as much again, since the host needs a part of the time to queue the reads themselves.
        return self._between(min(MAX_READS, 1 + math.ceil(1.5 * lead / self._read_seconds)), call)

    def _read(self) -> None:
        torch.sum(self._buffer, dim=0, out=self._sum)

    def _between(self, reads: int, call: Callable[[], Any]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self._device)
        for _ in range(reads):
            self._read()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
