"""A report of benchmarks and tests that die, hang and lose their context; results that are merged and resumed."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench import report as report_module
from bench import result
from bench.__main__ import main
from bench.process import Ending, Journal
from bench.report import Report, files_of
from bench.rows import ROOT, row_of

CONFTEST = """
import bench.machine
from bench.machine import Roofs
bench.machine.roofs = lambda: Roofs(10.0, 1.0, 1.0)
# The process that has seen the illegal access cannot go on; the next one can.
lost = []
bench.machine.lives = lambda: not lost
def pytest_runtest_makereport(item, call):
    if call.excinfo is not None and "illegal" in str(call.excinfo.value):
        lost.append(item)
"""
BENCH = """
import os, signal
import torch
from bench.contest import Contest
from bench.machine import Work
from bench.variants import of_rows, variants

def dies(x):
    os.kill(os.getpid(), signal.SIGSEGV)

def throws(x):
    raise RuntimeError("no such kernel")

@variants(cases=["toy", "none"], providers=["ours", "torchvision", "dies", "throws", "wrong", "compile"])
def test_add(case, mode, dtype, layout, provider, contest):
    contest(lambda: adding(case))

@of_rows([("toy", "-", "-", "-", "triton"), ("toy", "-", "-", "-", "wrong"), ("other", "-", "-", "-", "triton")])
def test_sweep(case, mode, dtype, layout, provider, contest):
    contest(lambda: adding(case))

def adding(case):
    if case == "none":
        raise FileNotFoundError("no data")
    def check(out, truth):
        assert torch.equal(out, truth), "1 of 4 differ"
    return Contest(
        inputs=lambda: torch.ones(4),
        providers={
            "ours": lambda x: lambda: x + 1,
            "triton": lambda x: lambda: x + 1,
            "torchvision": lambda x: lambda: 1 + x,
            "dies": lambda x: lambda: dies(x),
            "throws": lambda x: lambda: throws(x),
            "wrong": lambda x: lambda: x + 2,
            "compile": lambda x: lambda: x + 1,
        },
        truth=lambda x: x + 1, check=check, work=Work(bytes=32, flops=4), size="reduced",
    )
"""
TESTS = """
import os, signal, time
import pytest
def test_passes(): pass
def test_is_wrong(): assert 1 + 1 == 3, "sum at [0, 1]"
@pytest.mark.skip(reason="no such thing")
def test_is_left_out(): pass
def test_loses_the_context(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
@pytest.mark.parametrize("how", ["segfault", "hang"])
def test_dies(how):
    if how == "segfault": os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60)
def test_validates(record_property):
    record_property("validation", [{"op": "nms", "verdict": "pass"}])
@pytest.mark.slow
def test_slow(): pass
def test_of_a_mutant(): assert False
@pytest.fixture
def broken(): raise OSError("no disk")
def test_of_a_fixture(broken): pass
"""


@dataclass
class Made:
    """What a report left."""

    code: int
    path: Path
    said: str

    @property
    def found(self) -> result.Result:
        return result.load(self.path)

    def status(self, name: str) -> dict[str, tuple[str, str]]:
        return {line["key"]: (line["status"], line["reason"].partition(" assert")[0]) for line in self.found[name]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benches")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  slow: of minutes\n  compile_only: no GPU\n")
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "adding.py").write_text(BENCH)
    (folder / "broken.py").write_text("import no_such_package\n")
    (folder / "test_a.py").write_text(TESTS)
    (folder / "test_b.py").write_text("def test_passes(): pass\n")
    return folder


Command = Callable[..., Made]


@pytest.fixture(scope="module")
def command(folder: Path) -> Command:
    """Run `python -m bench report`; without a GPU unless it is asked for."""

    def run(name: str, files: dict[str, list[str]], *words: str, gpu: str | None = None) -> Made:
        out = folder / name
        machine = {"device": gpu or "CPU x", "gpu": gpu, "commit": "f" * 40, "date": "2026-01-01", "changed": False}
        machine |= {"threads": 1, "python": "3", "versions": {"torch": "2", "triton": "3"}}
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
            patch.setattr(report_module, "files_of", lambda part: [folder / file for file in files.get(part, [])])
            patch.setattr("bench.__main__.describe_machine", lambda commit: machine)
            patch.setenv("PYTEST_ADDOPTS", "-p bench.conftest")
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            code = main(["report", "--out", str(out), "--budget", "300", "--hang", "30", *words])
        (path,) = out.glob("*/*.json")
        return Made(code, path, said.getvalue())

    return run


@pytest.fixture(scope="module")
def benches(command: Command) -> Made:
    """A report without a GPU of a file with a provider that dies and of one that cannot be imported."""
    return command("cpu", {"ops": ["adding.py", "broken.py"], "tests": ["test_a.py"]}, "--only", "tests,ops,sweep")


def test_every_provider_has_its_row(benches: Made, folder: Path) -> None:
    log = (folder / "cpu" / "work" / "ops.log").read_text()
    status = benches.status("rows")
    toy = "add/toy/forward/fp32/-"
    assert status == {
        f"{toy}/ours": ("timed", ""),
        f"{toy}/torchvision": ("timed", ""),
        f"{toy}/compile": ("timed", ""),
        f"{toy}/dies": ("killed", "the process died of SIGSEGV"),
        f"{toy}/throws": ("failed", "RuntimeError: no such kernel"),
        f"{toy}/wrong": ("wrong", "1 of 4 differ"),
        **{f"{toy.replace('toy', 'none')}/{name}": ("failed", "FileNotFoundError: no data")
           for name in ("ours", "torchvision", "dies", "throws", "wrong", "compile")},
        "sweep/toy/-/-/-/triton": ("passed", "right; Triton's interpreter is no timing"),
        "sweep/toy/-/-/-/wrong": ("wrong", "1 of 4 differ"),
        "sweep/other/-/-/-/triton": ("passed", "right; Triton's interpreter is no timing"),
        "broken.py/-/-/-/-/-": (
            "failed", "the file cannot be read: ModuleNotFoundError: No module named 'no_such_package'"
        ),
    }, log  # fmt: skip
    assert benches.found["roofs"]["copy_gbps"] == 10.0
    keys = list(Journal(folder / "cpu" / "work" / "ops.jsonl").settled)
    assert len(keys) == len(set(keys)) == 15  # nothing twice
    lines = [line for line in benches.said.splitlines() if line.startswith("add toy forward fp32 (reduced): ")]
    assert "dies killed" in lines[0]
    assert re.search(r"ours [\d.]+ us \([\d.]+x\)", lines[0])
    assert "compile" in lines[-1]


def test_without_a_gpu_the_report_comes_to_its_honest_end(benches: Made) -> None:
    parts = benches.status("parts")
    assert {part: status for part, (status, _) in parts.items()} == {
        "tests": "skipped",
        "ops": "done",
        "sweep": "skipped",
    }
    assert parts["tests"][1].startswith("no GPU")
    assert (benches.code, benches.path.parent.name, benches.path.name) == (0, "cpu-x", "2026-01-01-fffffff.json")
    text = benches.path.with_suffix(".md").read_text()
    assert "**Reduced sizes, no GPU" in text
    assert "| **triton** |" in text or "add" in text


def test_a_result_names_neither_host_nor_path(benches: Made) -> None:
    for text in re.findall(r'"([^"]*)"', benches.path.read_text()):
        assert os.uname().nodename not in text
        assert not re.search(r"(^|[\s'\"(:=])/\w", text), text
        assert not any(str(path) in text for path in (ROOT, Path.home(), benches.path.parents[1]))


def test_a_dead_test_takes_no_other_with_it(command: Command) -> None:
    """And a second call resumes: it runs the tests alone that have no result yet."""
    made = command("gpu", {"tests": ["test_a.py", "broken.py"]}, "--only", "tests", "--hang", "3", gpu="a GPU")
    tests = made.status("tests")
    assert tests == {
        "test_a.py::test_passes": ("passed", ""),
        "test_a.py::test_is_wrong": ("failed", "AssertionError: sum at [0, 1]"),
        "test_a.py::test_is_left_out": ("skipped", ""),
        "test_a.py::test_loses_the_context": (
            "failed", "RuntimeError: CUDA error: an illegal memory access was encountered"
        ),
        "test_a.py::test_dies[segfault]": ("killed", "the process died of SIGSEGV"),
        "test_a.py::test_dies[hang]": ("killed", "no answer in 6 s"),
        "test_a.py::test_validates": ("passed", ""),
        "test_a.py::test_of_a_fixture": ("failed", "OSError: no disk"),
        "broken.py": ("failed", "the file cannot be read: ModuleNotFoundError: No module named 'no_such_package'"),
    }  # fmt: skip
    (validates,) = [line for line in made.found["tests"] if "validation" in line]
    assert validates["validation"] == [{"op": "nms", "verdict": "pass"}]
    text = made.path.with_suffix(".md").read_text()
    assert "| test_a.py | 2 | 1 | 0 | 5 |" in text
    assert "- `test_a.py::test_dies[hang]` killed: no answer in 6 s" in text

    more = command(
        "gpu", {"tests": ["test_a.py", "test_b.py"]}, "--only", "tests", "--resume", str(made.path), gpu="a GPU"
    )
    assert more.status("tests") == tests | {"test_b.py::test_passes": ("passed", "")}
    journal = (more.path.parents[1] / "work" / "tests.jsonl").read_text()
    assert journal.count('"begin"') == 1


def test_a_sweep_by_its_name(command: Command) -> None:
    files = {"sweep": ["adding.py"]}
    made = command("sweep", files, "--sweep", "toy", gpu="a GPU")
    assert set(made.status("rows")) == {"sweep/toy/-/-/-/wrong", "sweep/toy/-/-/-/triton"}
    assert result.rows(made.found) == []
    assert len(result.rows(made.found, sweeps=True)) == 2
    unknown = command("sweep", files, "--sweep", "toi", gpu="a GPU")
    status, reason = unknown.status("parts")["sweep"]
    assert status == "failed"
    assert reason.endswith("no sweep toi: bench/cases has other, toy")


def test_the_rest_is_not_reached(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.write({"plan": ["op/case/forward/fp32/-/triton", "op/case/forward/fp32/-/torchvision"]})
    journal.write(row_of("op/case/forward/fp32/-/triton", "failed", "broken").line())
    made = Report(now=result.empty({"gpu": None}), path=tmp_path / "r", work=tmp_path, say=lambda text: None)
    made.settle("rows", journal, Ending("stopped", "the time was up"))
    made.settle("tests", Journal(None), Ending("done"))
    assert [(row.provider, row.status, row.reason) for row in result.rows(made.now)] == [
        ("torchvision", "not reached", "the time was up")
    ]


def test_the_time_is_shared_by_weight_and_an_interrupt_ends_the_rest(tmp_path: Path, monkeypatch: Any) -> None:
    made = Report(now=result.empty({"gpu": "x"}), path=tmp_path / "r.json", work=tmp_path, say=lambda text: None)
    monkeypatch.setattr(report_module.time, "monotonic", lambda: 0.0)
    given: dict[str, float] = {}

    def measure(part: str, files: Any, seconds: float) -> Ending:
        given[part] = seconds
        return Ending("interrupted" if part == "tests" else "done")

    monkeypatch.setattr(made, "measure", measure)
    assert not made.run(["sweep", "validate", "tests", "ops"], 120)
    assert given == pytest.approx({"validate": 10.8, "ops": 48.0, "tests": 64.8})
    assert [(part["key"], part["status"]) for part in result.load(tmp_path / "r.json")["parts"]] == [
        ("validate", "done"), ("ops", "done"), ("tests", "stopped"), ("sweep", "stopped"),
    ]  # fmt: skip


def test_every_test_of_a_kernel_is_in_the_report() -> None:
    files = [file.relative_to(ROOT).as_posix() for file in files_of("tests")]
    assert len(files) == len(set(files))
    for folder in ("gpu", "kernels"):
        assert {f"tests/{folder}/{path.name}" for path in (ROOT / "tests" / folder).glob("test_*.py")} < set(files)
    assert {"tests/engine/test_resume.py", "tests/test_validate.py"} < set(files)
    assert [file.stem for file in files_of("ops")][:2] == ["roi_align", "nms"]
    assert {file.stem for file in files_of("model")} == {"inference", "training"}


def described(**changed: Any) -> dict[str, Any]:
    return {"device": "NVIDIA H200", "gpu": "NVIDIA H200", "commit": "0123456789", "date": "2026-01-02"} | changed


def test_two_calls_make_one_result(tmp_path: Path, capsys: Any) -> None:
    keys = [f"op/{name}/forward/fp32/-/triton" for name in "abc"]
    first, second = result.empty(described()), result.empty(described(date="2026-01-03"))
    result.add(
        first, "rows", [row_of(keys[0], "timed", median_us=1.0).line(), row_of(keys[1], "timed", median_us=2.0).line()]
    )
    first["roofs"] = {"copy_gbps": 4000.0, "matmul_bf16_tflops": 1.0, "matmul_fp32_tflops": 1.0}
    result.add(first, "tests", [{"key": "a.py::x", "status": "passed", "reason": ""}])
    result.add(second, "rows", [row_of(keys[0], "timed", median_us=3.0).line(), row_of(keys[1], "not reached").line()])
    result.add(second, "tests", [{"key": "a.py::x", "status": "not reached", "reason": ""}])
    for name, each in (("one.json", first), ("two.json", second)):
        result.save(tmp_path / name, each)
    assert main(["merge", str(tmp_path / "one.json"), str(tmp_path / "two.json"), "--out", str(tmp_path)]) == 0
    merged = result.load(tmp_path / "nvidia-h200" / "2026-01-02-0123456.json")
    assert {row.key: row.median_us for row in result.rows(merged)} == {keys[0]: 3.0, keys[1]: 2.0}
    assert merged["roofs"]["copy_gbps"] == 4000.0
    assert [test["status"] for test in merged["tests"]] == ["passed"]
    # The next call of this commit writes into the same file; another commit or schema is refused.
    assert result.place(tmp_path, described(date="2026-02-01")).name == "2026-01-02-0123456.json"
    result.save(tmp_path / "other.json", result.empty(described(commit="fedcba9876")))
    assert main(["merge", str(tmp_path / "one.json"), str(tmp_path / "other.json"), "--out", str(tmp_path)]) == 2
    assert "commit is 'fedcba9876', expected '0123456789'" in capsys.readouterr().err
    (tmp_path / "a.json").write_text('{"schema": 0}')
    with pytest.raises(ValueError, match=r"a\.json: expected a result of schema 2"):
        result.load(tmp_path / "a.json")


def test_validation_is_a_test_an_op() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-k", "decode_boxes", "bench/validate.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "1 passed" in done.stdout, done.stdout


@pytest.mark.slow
def test_the_rows_of_nms_take_less_than_40_lines(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tmask", "bench", "nms", "--device", "cpu", "--json", str(tmp_path / "a.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) < 40
    rows = [line for line in lines if line.startswith(("padded_nms ", "nms "))]
    assert len(rows) == 10
    assert all("(reduced): triton right" in row for row in rows)
