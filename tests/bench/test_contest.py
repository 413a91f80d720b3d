"""The gate: right before timed, and whatever a provider does, a row says so and the others go on."""

import gc
import json
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor

from bench import contest as contest_module
from bench import machine, timing
from bench.contest import Contest, ContextLostError, UnavailableError, compare, gradients
from bench.machine import Roofs, Work
from bench.process import CONTEXT_LOST, Journal
from bench.result import Row
from tests.mutation import mutant
from tmask_kernels import multiscale_roi_align, sigmoid_focal_loss
from tmask_kernels.backend import resolve
from tmask_kernels.common.kernels import roi_axis
from tmask_kernels.ops.roi_align.kernels import forward as kernels
from tmask_kernels.testing import assert_close, random_boxes

pytest_plugins = ["pytester"]


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> Iterator[None]:
    """A collection walks over all that torch has made, and every contest collects."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _known_roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "roofs", lambda: Roofs(1000.0, 100.0, 10.0))


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "device", lambda: torch.device("cpu"))


def ready(call: Callable[[Tensor], Any]) -> Callable[[Tensor], Callable[[], Any]]:
    return lambda x: lambda: call(x)


def key_of(provider: str) -> str:
    return f"double/w0/forward/fp32/-/{provider}"


def doubling(providers: Mapping[str, Callable[[Any], Callable[[], Any]]], **changes: Any) -> Contest:
    """A contest of twice a vector."""
    settings = {
        "inputs": lambda: torch.arange(4.0),
        "truth": lambda x: 2 * x.double(),
        "check": lambda out, truth, provider: assert_close(out, truth),
        "work": Work(bytes=32, flops=4),
    }
    return Contest(providers=providers, **{**settings, **changes})


def read_rows(path: Path) -> list[Row]:
    return [Row(**line) for line in Journal(path).settled.values()]


def rows_of(contest: Contest, journal: Journal | None = None) -> dict[str, Row]:
    found = compare(contest, [key_of(name) for name in contest.providers], journal or Journal(None))
    return {row.provider: row for row, _ in found.values()}


RIGHT = ready(lambda x: x * 2)


# ---- A broken kernel


def test_a_kernel_with_one_tap_broken_is_not_timed(device, tmp_path, monkeypatch):
    tap = ("high = tl.minimum(low + 1, length - 1)", "high = tl.minimum(low + 2, length - 1)")
    modules = {"triton": kernels, "triton-broken": mutant(roi_axis, *tap, tmp_path, seen_from=kernels)}
    clocked: list[str] = []

    def spy(calls: Mapping[str, Any], *args: Any) -> Any:
        clocked.extend(calls)
        return timing.time_in_turn(calls, *args)

    def inputs() -> tuple[list[Tensor], Tensor]:
        return [torch.randn(1, 5, 11, 13).to(device)], random_boxes(6, height=44, width=52)[None].to(device)

    def truth(given: tuple[list[Tensor], Tensor]) -> Tensor:
        features, boxes = given
        return multiscale_roi_align([x.double() for x in features], boxes, 3, [0.25], backend="reference")

    def pooling(module: Any) -> Callable[[Any], Callable[[], Tensor]]:
        """RoIAlign of one level by a copy of its kernels."""
        return lambda given: lambda: module.multiscale_roi_align(*given, None, 3, 3, [0.25], [], 2, True, None)

    monkeypatch.setattr(contest_module, "time_in_turn", spy)
    providers = {name: pooling(module) for name, module in modules.items()}
    rows = rows_of(doubling(providers, inputs=inputs, truth=truth))
    right = "timed" if device.type == "cuda" else "passed"
    assert [rows[name].status for name in modules] == [right, "wrong"]
    assert "max error" in rows["triton-broken"].reason
    assert rows["triton-broken"].median_us is None
    assert key_of("triton-broken") not in clocked


# ---- What may become of a provider


def raising(error: BaseException) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        raise error

    return call


def missing_package(x: Tensor) -> Callable[[], Tensor]:
    import a_package_that_does_not_exist

    return lambda: a_package_that_does_not_exist.double(x)


def lacking_backend(x: Tensor) -> Callable[[], Any]:
    return lambda: sigmoid_focal_loss(x, x, backend="torchvision")


def unable_backend(x: Tensor) -> Callable[[], Any]:
    return lambda: resolve("op", "triton", {"triton": ["it is Sunday"], "reference": []}, device=x.device)


OUTCOMES = {
    "throws": (ready(raising(RuntimeError("no such kernel"))), "failed", "RuntimeError: no such kernel"),
    "throws early": (raising(TypeError("no call")), "failed", "TypeError: no call"),
    "asserts": (ready(raising(AssertionError("its own"))), "failed", "AssertionError: its own"),
    "another shape": (ready(lambda x: x[:2] * 2), "wrong", "value: shape (2,), expected (4,)"),
    "nothing": (ready(lambda x: None), "failed", "AttributeError"),
    "NaN": (ready(lambda x: x * float("nan")), "wrong", "non-finite"),
    "missing package": (missing_package, "unavailable", "a_package_that_does_not_exist"),
    "unavailable": (raising(UnavailableError("needs CUDA")), "unavailable", "needs CUDA"),
    "lacking backend": (lacking_backend, "unavailable", "does not exist for this op"),
    "unable backend": (unable_backend, "unavailable", "cannot serve this call"),
    "no memory": (ready(raising(torch.OutOfMemoryError("CUDA out of memory."))), "out of memory", "CUDA out of memory"),
    "no host memory": (ready(raising(MemoryError())), "out of memory", "MemoryError"),
    "driver without memory": (ready(raising(RuntimeError("CUDA error: out of memory"))), "out of memory", "CUDA error"),
}


def test_every_outcome_is_a_row_and_the_others_are_timed(cpu):
    providers = {"before": RIGHT, **{name: provider for name, (provider, _, _) in OUTCOMES.items()}, "after": RIGHT}
    found = compare(doubling(providers), [key_of(name) for name in (*providers, "unknown")], Journal(None))
    rows = {row.provider: row for row, _ in found.values()}
    assert (rows["unknown"].status, rows["unknown"].reason) == ("unavailable", "unknown has no such op")
    for name, (_, status, reason) in OUTCOMES.items():
        assert rows[name].status == status, name
        assert reason in rows[name].reason
        assert (rows[name].rounds, rows[name].median_us) == (0, None)
        assert (rows[name].bytes, rows[name].flops) == (32, 4)
    assert rows["before"].status == rows["after"].status == "timed"


def test_triton_without_gpu_and_interpreter(cpu, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    calls = []
    rows = rows_of(doubling({"triton": ready(calls.append), "right": RIGHT}))
    assert (rows["triton"].status, calls) == ("unavailable", [])
    assert "TRITON_INTERPRET=1" in rows["triton"].reason


@pytest.mark.parametrize("part", ["inputs", "truth"])
def test_no_truth_no_times(cpu, part, tmp_path):
    calls: list[Any] = []
    contest = doubling({"a": ready(calls.append), "b": ready(calls.append)}, **{part: raising(ValueError("none"))})
    rows = rows_of(contest, Journal(tmp_path / "j"))
    assert [(row.status, row.reason) for row in rows.values()] == [("failed", f"{part}: ValueError: none")] * 2
    assert calls == []
    assert read_rows(tmp_path / "j") == list(rows.values())


def test_failed_results_and_inputs_are_freed(cpu):
    alive: list[weakref.ref[Tensor]] = []

    def tracked(x: Tensor) -> Tensor:
        alive.append(weakref.ref(x))
        return x

    def bad(x: Tensor) -> Tensor:
        held = tracked(torch.zeros(8))
        raise RuntimeError(f"gone with {len(held)}")

    def checks_memory(x: Tensor) -> Tensor:
        assert alive[1]() is None
        return x * 2

    providers = {"bad": ready(bad), "next": ready(checks_memory)}
    rows = rows_of(doubling(providers, inputs=lambda: tracked(torch.arange(4.0))))
    assert [row.status for row in rows.values()] == ["failed", "timed"]
    gc.collect()
    assert alive[0]() is None


# ---- Rows


def test_a_timed_row(monkeypatch):
    samples = timing.Samples(device=[2e-6, 1e-6, 4e-6, 3e-6, 5e-6], wall=[7e-6])
    monkeypatch.setattr(machine, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(contest_module, "synchronize", lambda device: None)
    monkeypatch.setattr(contest_module, "peak_mib", lambda call, device: 3.0)
    monkeypatch.setattr(contest_module, "time_in_turn", lambda calls, *args: dict.fromkeys(calls, samples))
    rows = rows_of(doubling({"triton": RIGHT, "triton-graph": RIGHT}, size="reduced"))
    row = rows["triton"]
    assert (row.median_us, row.p20_us, row.p80_us, row.wall_us) == pytest.approx((3.0, 1.8, 4.2, 7.0))
    assert (row.rounds, row.bytes, row.flops, row.size, row.peak_mib) == (5, 32, 4, "reduced", 3.0)
    # 32 bytes in 3 us; at the roof of 1,000 GB/s they take 32 ps.
    assert row.gbps == pytest.approx(32 / 3 / 1e3)
    assert row.roof_share == pytest.approx(32e-6 / 3)
    assert rows["triton-graph"].peak_mib is None


def test_a_compiled_backward_is_repeated(cpu):
    """Torch asks for donated buffers to be off where a graph is retained."""

    def compiled(x: Tensor) -> Callable[[], Any]:
        leaf = x.clone().requires_grad_()
        wave = torch.compile(lambda x: x.sin().exp().cos(), backend="aot_eager_decomp_partition")
        return gradients(wave(leaf), [leaf], torch.ones(4))

    def truth(x: Tensor) -> Tensor:
        leaf = x.double().requires_grad_()
        return torch.autograd.grad(leaf.sin().exp().cos().sum(), leaf)[0]

    contest = doubling({"compile": compiled}, truth=truth, check=lambda out, truth, _: assert_close(out[0], truth))
    assert rows_of(contest)["compile"].status == "timed"
    assert not torch._functorch.config.donated_buffer


def test_compilations_do_not_pile_up(cpu):
    """Over eight versions of one function the compiler gives up, and `compile` would be the reference."""
    torch._dynamo.reset()
    compilations: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compilations.append(str(inputs[0].dtype))
        return graph.forward

    def double(x: Tensor) -> Tensor:
        return x * 2

    for size in range(2, 14):
        provider = ready(torch.compile(double, backend=backend, dynamic=False))
        rows_of(doubling({"compile": provider}, inputs=lambda size=size: torch.arange(float(size))))
    assert len(compilations) == 12


# ---- The journal


def test_the_journal_names_what_is_running(cpu, tmp_path):
    def look(x: Tensor) -> Tensor:
        assert Journal(tmp_path / "j").begun == key_of("b")
        raise RuntimeError("seen")

    rows = rows_of(doubling({"a": RIGHT, "b": ready(look)}), Journal(tmp_path / "j"))
    assert rows["b"].reason == "RuntimeError: seen"


@pytest.mark.parametrize("at", ["gate", "rounds", "truth"])
def test_a_lost_context_ends_it_and_blames_no_other(cpu, tmp_path, monkeypatch, at):
    lost = []
    monkeypatch.setattr("bench.machine.lives", lambda: not lost)
    left = [4 if at == "rounds" else 1]

    def kills(x: Tensor) -> Tensor:
        left[0] -= 1
        if not left[0]:
            lost.append(True)
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return x * 2

    contest = doubling({"a": RIGHT, "b": ready(kills), "c": RIGHT}, **({"truth": kills} if at == "truth" else {}))
    with pytest.raises(ContextLostError):
        rows_of(contest, Journal(tmp_path / "j"))
    rows = read_rows(tmp_path / "j")
    assert {row.status for row in rows} == {"failed"}
    assert [row.provider for row in rows] == {"gate": ["b"], "rounds": ["b"], "truth": ["a", "b", "c"]}[at]


# ---- Under pytest-benchmark

BENCHMARK = """
from bench.contest import Contest, variants
from bench.machine import Work

@variants(cases=["w0"], providers=["a", "b", "broken"])
def test_double(case, mode, dtype, layout, provider, contest):
    def check(out, truth, provider):
        assert out == truth, "not the double"
    def by(factor):
        return lambda x: lambda: factor * x
    contest(lambda: Contest(
        inputs=lambda: 21, providers={"a": by(2), "b": by(2), "broken": by(3)}, truth=lambda x: 42, check=check,
        work=Work(bytes=8),
    ))
"""


@pytest.fixture
def benchmarks(pytester: pytest.Pytester, cpu: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run BENCHMARK in this process, its samples set."""
    pytester.makepyfile(test_it=BENCHMARK)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark times nothing in a worker
    monkeypatch.setattr("cpuinfo.get_cpu_info", dict)

    def run(samples: Mapping[str, list[float]], *arguments: str) -> Any:
        def known(calls: Mapping[str, Any], *args: Any) -> dict[str, timing.Samples]:
            return {key: timing.Samples(*[samples[key.rpartition("/")[2]]] * 2) for key in calls}

        monkeypatch.setattr(contest_module, "time_in_turn", known)
        return pytester.runpytest_inprocess("-p", "pytest_benchmark.plugin", "-p", "bench.conftest", *arguments)

    return run


SAMPLES = {"a": [1e-3, 3e-3, 2e-3], "b": [1 / 7, 1 / 3, 1 / 11, 1 / 13]}


def test_pytest_benchmark_gets_the_samples(benchmarks, pytester):
    result = benchmarks(SAMPLES, "--journal=j", "--benchmark-json=b.json")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*wrong: not the double*"])
    told = json.loads((pytester.path / "b.json").read_text())["benchmarks"]
    assert {b["params"]["provider"]: b["stats"]["data"] for b in told} == SAMPLES
    assert [b["stats"]["median"] for b in told] == [2e-3, pytest.approx((1 / 11 + 1 / 7) / 2)]
    assert {b["group"] for b in told} == {"double/w0/forward/fp32/-"}
    assert told[0]["extra_info"]["median_us"] == pytest.approx(2e3)
    assert told[0]["extra_info"]["status"] == "timed"
    rows = read_rows(pytester.path / "j")
    assert {row.provider: row.status for row in rows} == {"a": "timed", "b": "timed", "broken": "wrong"}
    plan, roofs = map(json.loads, (pytester.path / "j").read_text().split("\n\n")[:2])
    assert plan["plan"] == [f"double/w0/forward/fp32/-/{name}" for name in ("a", "b", "broken")]
    assert {"copy_gbps", "matmul_bf16_tflops", "matmul_fp32_tflops"} <= set(roofs["roofs"])

    benchmarks({}, "--journal=j").assert_outcomes(deselected=3)
    assert read_rows(pytester.path / "j") == rows


def test_a_sweep_by_its_name(benchmarks, pytester):
    name = "@variants(cases=['nms', 'nms-list'], providers=['a'], dtypes=['-'])\ndef test_sweep("
    source = BENCHMARK.replace('@variants(cases=["w0"], providers=["a", "b", "broken"])\ndef test_double(', name)
    pytester.makepyfile(test_it=source)
    benchmarks(SAMPLES, "--journal=j", "--sweep=nms").assert_outcomes(passed=1)
    assert [row.case for row in read_rows(pytester.path / "j")] == ["nms"]
    benchmarks(SAMPLES, "--sweep=nsm").stderr.fnmatch_lines(["*no sweep nsm: bench/cases has nms, nms-list"])


def test_a_lost_context_ends_the_process_with_70(benchmarks, pytester, monkeypatch):
    monkeypatch.setattr(machine, "lives", lambda: False)
    monkeypatch.setattr(os, "_exit", lambda code: pytest.exit("ended", returncode=code))
    assert benchmarks(SAMPLES, "--journal=j").ret == CONTEXT_LOST
    assert [(row.provider, row.status) for row in read_rows(pytester.path / "j")] == [("broken", "wrong")]
