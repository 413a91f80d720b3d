"""The clocks: turns, samples, and the CUDA branch on a simulated GPU."""

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import timing
from bench.timing import ReplayTimer, median, peak_mib, percentile, time_in_turn

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
MICRO = 1e-6


class SimulatedGPU:
    """A host clock and a device that works off a queue; stands in for `torch.cuda` and for the host's clock."""

    READ = 60 * MICRO  # a read of the buffer takes the device this long

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.done = 0.0  # seconds: now, and when the queue will be empty
        self.reads = 0
        self.allocated = self.peak = 0
        self.buffers: list[torch.Tensor] = []
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                gpu.host += MICRO
                self.time = max(gpu.host, gpu.done)

            def synchronize(self) -> None:
                gpu.host = max(gpu.host, self.time)

            def elapsed_time(self, end: "Event") -> float:
                return (end.time - self.time) * 1e3

        def ones(*size: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
            self.buffers.append(torch.zeros(*size, **kwargs).add(1))
            return self.buffers[-1]

        real_empty = torch.empty
        monkeypatch.setattr(torch, "ones", ones)
        monkeypatch.setattr(torch, "empty", lambda *size, device=None, **kwargs: real_empty(*size, **kwargs))
        monkeypatch.setattr(torch, "sum", self.read)
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.host))
        cuda = {
            "Event": Event,
            "synchronize": self.synchronize,
            "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=4096),
            "memory_allocated": lambda device: self.allocated,
            "max_memory_allocated": lambda device: self.peak,
            "reset_peak_memory_stats": self.reset_peak,
        }
        for name, stand_in in cuda.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def launch(self, seconds: float, *, host: float = 5 * MICRO) -> None:
        self.host += host
        self.done = max(self.done, self.host) + seconds

    def synchronize(self, device: torch.device | None = None) -> None:
        self.host = max(self.host, self.done)

    def read(self, buffer: torch.Tensor, *, dim: int, out: torch.Tensor) -> None:
        self.reads += 1
        self.launch(self.READ)

    def allocate(self, size: int) -> None:
        self.allocated += size
        self.peak = max(self.peak, self.allocated)

    def reset_peak(self, device: torch.device) -> None:
        self.peak = self.allocated


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimulatedGPU:
    return SimulatedGPU(monkeypatch)


def test_cuda_events_see_the_device_alone_and_the_wall_sees_the_launches(gpu, monkeypatch):
    def call() -> None:
        for _ in range(20):
            gpu.launch(3 * MICRO, host=10 * MICRO)

    samples = time_in_turn({"a": call}, CUDA)["a"]
    assert median(samples.device) == pytest.approx(60 * MICRO, abs=2 * MICRO)
    assert median(samples.wall) == pytest.approx(203 * MICRO, abs=2 * MICRO)
    assert (len(samples.device), len(samples.wall)) == (timing.MAX_ROUNDS["cuda"], timing.WALL_ROUNDS)
    monkeypatch.setattr(timing, "MAX_READS", 1)  # without reads ahead the events would see gaps
    assert median(time_in_turn({"a": call}, CUDA)["a"].device) > 120 * MICRO


def test_a_call_that_waits_for_the_device_pays_for_it(gpu):
    def call() -> None:
        gpu.launch(10 * MICRO)
        gpu.synchronize()
        gpu.launch(10 * MICRO, host=100 * MICRO)

    assert median(time_in_turn({"a": call}, CUDA)["a"].device) == pytest.approx(120 * MICRO, abs=2 * MICRO)


def test_every_timed_call_comes_after_a_read_of_four_caches(gpu):
    seen = []

    def call() -> None:
        seen.append(gpu.reads)
        gpu.reads = 0
        gpu.launch(MICRO)

    samples = time_in_turn({"a": call}, CUDA)["a"]
    assert gpu.buffers[0].numel() * gpu.buffers[0].element_size() == 4 * 4096
    assert [reads > 0 for reads in seen].count(True) >= len(samples.device)


def test_slow_calls_get_few_rounds(gpu):
    samples = time_in_turn(
        {"slow": lambda: gpu.launch(0.05), "slowest": lambda: gpu.launch(2.0)}, CUDA
    )  # fmt: skip
    assert len(samples["slow"].device) == timing.MIN_ROUNDS["cuda"]
    assert len(samples["slowest"].device) == 3


def test_peak_memory_is_what_a_call_adds(gpu):
    gpu.allocate(5 * 2**20)

    def call() -> None:
        gpu.allocate(3 * 2**20)
        gpu.allocated -= 2**20

    gpu.peak = 2**40
    assert peak_mib(call, CUDA) == 3.0
    assert peak_mib(call, CPU) is None


def test_providers_take_turns():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = time_in_turn(calls, CPU)
    rounds = timing.MAX_ROUNDS["cpu"]
    assert order == [*"aabbcc", *"abc" * rounds]  # two calls each to warm up
    assert all(len(samples[name].device) == len(samples[name].wall) == rounds for name in "abc")


def test_a_slow_one_stops_and_the_others_go_on(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def work(seconds: float) -> None:
        now[0] += seconds

    samples = time_in_turn({"slow": lambda: work(0.25), "fast": lambda: work(0.01)}, CPU)
    assert samples["slow"].device == pytest.approx([0.25] * 6)
    assert samples["fast"].device == pytest.approx([0.01] * timing.MAX_ROUNDS["cpu"])


def failing_at(call_number: int) -> Callable[[], None]:
    left = [call_number]

    def call() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("gone")

    return call


@pytest.mark.parametrize(
    ("where", "at"),
    [("cpu", 1), ("cpu", 2), ("cpu", 9), ("cuda", 1), ("cuda", 2), ("cuda", 9), ("cuda", 105)],
    ids=["cpu-first", "cpu-warm", "cpu-timed", "cuda-first", "cuda-warm", "cuda-timed", "cuda-wall"],
)
def test_one_that_fails_is_left_out(gpu, where, at):
    told: list[tuple[str, str]] = []
    begun: list[str] = []
    calls = {"a": lambda: None, "bad": failing_at(at), "c": lambda: None}
    samples = time_in_turn(
        calls, torch.device(where), begun.append, lambda name, error: told.append((name, str(error)))
    )
    assert told == [("bad", "gone")]
    assert begun == ["a", "bad", "c"]
    assert list(samples) == ["a", "c"]
    assert len(samples["a"].device) == len(samples["c"].device) == timing.MAX_ROUNDS[where]


def test_an_error_keeps_no_tensor_alive():
    alive: list[weakref.ref[torch.Tensor]] = []

    def bad() -> None:
        held = torch.zeros(3)
        alive.append(weakref.ref(held))
        raise RuntimeError("gone")

    samples = time_in_turn({"bad": bad}, CPU)
    assert samples == {}
    assert alive[0]() is None


def test_no_collection_falls_into_a_round():
    seen = set()
    calls = [0]

    def call() -> None:
        calls[0] += 1
        if calls[0] > 2:  # warm
            seen.add(gc.isenabled())

    assert gc.isenabled()
    time_in_turn({"a": call, "bad": failing_at(5)}, CPU)
    assert seen == {False}
    assert gc.isenabled()


def test_nothing_to_time(gpu):
    assert time_in_turn({}, CUDA) == {}
    assert not gpu.buffers


def test_percentile():
    shares = {0.0: 1.0, 0.2: 1.8, 0.5: 3.0, 0.8: 4.2, 1.0: 5.0}
    assert [percentile([5.0, 3.0, 1.0, 4.0, 2.0], s) for s in shares] == pytest.approx(list(shares.values()))
    assert percentile([7.0], 0.3) == 7.0


def test_replay_gives_each_sample_to_the_last_bit():
    timer, samples = ReplayTimer(), [1 / 3, 1e-9, 123.456]
    timer.samples = list(samples)
    assert [-(timer() - timer()) for _ in samples] == samples
