"""A report of benchmarks and tests that die, hang and lose their context, and one that goes on with another."""

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
from bench.report import FIRST, Report, files_of
from bench.result import ROOT, Row

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
import pytest
from bench.contest import Contest, variants
from bench.machine import Work
from bench.result import VARIANT

def dies(x):
    os.kill(os.getpid(), signal.SIGSEGV)

def throws(x):
    raise RuntimeError("no such kernel")

@variants(cases=["toy", "none"], providers=["ours", "torchvision", "dies", "throws", "wrong", "compile"])
def test_add(case, mode, dtype, layout, provider, contest):
    contest(lambda: adding(case))

@pytest.mark.parametrize(VARIANT, [("toy", "-", "-", "-", "triton")])
def test_sweep(case, mode, dtype, layout, provider, contest):
    contest(lambda: adding(case))

def adding(case):
    if case == "none":
        raise FileNotFoundError("no data")
    def check(out, truth, provider):
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
import os, signal
import pytest
def test_passes(): pass
def test_is_wrong(): assert 1 + 1 == 3, "sum at [0, 1]"
@pytest.mark.skip(reason="no such thing")
def test_is_left_out(): pass
def test_loses_the_context(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_dies(): os.kill(os.getpid(), signal.SIGSEGV)
@pytest.mark.slow
def test_slow(): pass
def test_of_a_mutant(): assert False
@pytest.fixture
def broken(): raise OSError("no disk")
def test_of_a_fixture(broken): pass
"""


PROVIDERS = ("ours", "torchvision", "dies", "throws", "wrong", "compile")


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
        machine |= {"threads": 1, "python": "3", "versions": {"torch": "2", "triton": "3"}, "driver": "1", "cuda": "13"}
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
            patch.setattr(report_module, "files_of", lambda part: [folder / file for file in files.get(part, [])])
            patch.setattr("bench.__main__.describe_machine", lambda commit: machine)
            patch.setenv("PYTEST_ADDOPTS", "-p bench.conftest")
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            code = main(["report", "--out", str(out), "--budget", "300", "--hang", "30", *words])
        (path,) = out.glob("*/*.json")
        return Made(code, path, said.getvalue())

    return run


def test_every_provider_has_its_row(command: Command, folder: Path) -> None:
    """A report without a GPU of a file with a provider that dies and of one that cannot be imported."""
    made = command("cpu", {"ops": ["adding.py", "broken.py"], "tests": ["test_a.py"]}, "--only", "tests,ops,sweep")
    toy, none = ({f"add/{case}/forward/fp32/-/{name}": name for name in PROVIDERS} for case in ("toy", "none"))
    said = {
        "dies": ("killed", "the process died of SIGSEGV"),
        "throws": ("failed", "RuntimeError: no such kernel"),
        "wrong": ("wrong", "1 of 4 differ"),
        "triton": ("passed", "right; Triton's interpreter is no timing"),
    }
    assert made.status("rows") == {
        **{key: said.get(name, ("timed", "")) for key, name in toy.items()},
        **dict.fromkeys(none, ("failed", "FileNotFoundError: no data")),
        "sweep/toy/-/-/-/triton": said["triton"],
        "broken.py/-/-/-/-/-": (
            "failed", "the file cannot be read: ModuleNotFoundError: No module named 'no_such_package'"
        ),
    }, (folder / "cpu" / "work" / "ops.log").read_text()  # fmt: skip
    assert made.found["roofs"]["copy_gbps"] == 10.0
    begun = (folder / "cpu" / "work" / "ops.jsonl").read_text().count('"key"')
    assert begun == len(toy) + len(none) + 1, "nothing twice"
    lines = [line for line in made.said.splitlines() if line.startswith("add toy forward fp32 (reduced): ")]
    assert "dies killed" in lines[0]
    assert re.search(r"ours [\d.]+ us \([\d.]+x\)", lines[0])
    assert "compile" in lines[-1]

    parts = made.status("parts")
    assert [(part, status) for part, (status, _) in parts.items()] == [
        ("ops", "done"), ("tests", "skipped"), ("sweep", "skipped"),
    ]  # fmt: skip
    assert parts["tests"][1].startswith("no GPU")
    assert (made.code, made.path.parent.name, made.path.name) == (0, "cpu-x", "2026-01-01-fffffff.json")
    assert "**Reduced sizes, no GPU" in made.path.with_suffix(".md").read_text()
    for text in re.findall(r'"([^"]*)"', made.path.read_text()):
        assert os.uname().nodename not in text
        assert not re.search(r"(^|[\s'\"(:=])/\w", text), text
        assert not any(str(path) in text for path in (ROOT, Path.home(), made.path.parents[1]))


def test_a_dead_test_takes_no_other_with_it(command: Command) -> None:
    """And a second call resumes: it runs the tests alone that have no result yet."""
    made = command("gpu", {"tests": ["test_a.py", "broken.py"]}, "--only", "tests", gpu="a GPU")
    tests = made.status("tests")
    assert tests == {
        "test_a.py::test_passes": ("passed", ""),
        "test_a.py::test_is_wrong": ("failed", "AssertionError: sum at [0, 1]"),
        "test_a.py::test_is_left_out": ("skipped", ""),
        "test_a.py::test_loses_the_context": (
            "failed", "RuntimeError: CUDA error: an illegal memory access was encountered"
        ),
        "test_a.py::test_dies": ("killed", "the process died of SIGSEGV"),
        "test_a.py::test_of_a_fixture": ("failed", "OSError: no disk"),
        "broken.py": ("failed", "the file cannot be read: ModuleNotFoundError: No module named 'no_such_package'"),
    }  # fmt: skip
    text = made.path.with_suffix(".md").read_text()
    assert "| test_a.py | 1 | 1 | 0 | 4 |" in text
    assert "- `test_a.py::test_dies` killed: the process died of SIGSEGV" in text

    files = {"tests": ["test_a.py", "test_b.py"]}
    more = command("gpu", files, "--only", "tests", "--resume", str(made.path), gpu="a GPU")
    assert more.status("tests") == tests | {"test_b.py::test_passes": ("passed", "")}
    journal = (more.path.parents[1] / "work" / "tests.jsonl").read_text()
    assert journal.count('"begin"') == 1


def test_what_a_worker_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def survive(command: list[str], *args: Any, **kwargs: Any) -> Ending:
        told.append(" ".join(command[command.index("--journal") + 2 :]))
        return Ending("done")

    monkeypatch.setattr(report_module, "survive", survive)
    made = Report(now=result.empty({"gpu": "x"}), path=tmp_path / "r", work=tmp_path, say=lambda text: None)
    made.measure("tests", [Path("a.py")], 1)
    made.select, made.sweeps = "nms or focal", ["nms", "nms-list"]
    made.measure("sweep", [Path("s.py")], 1)
    assert told == [
        "a.py -p bench.conftest -m not compile_only and not slow -k not mutant",
        "s.py --sweep=nms --sweep=nms-list -k (nms or focal) and not compile",
        "s.py --sweep=nms --sweep=nms-list -k (nms or focal) and compile",
    ]


def test_the_rest_is_not_reached(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.write({"plan": ["op/case/forward/fp32/-/triton", "op/case/forward/fp32/-/torchvision"]})
    journal.write(Row(key="op/case/forward/fp32/-/triton", status="failed", reason="broken").line())
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
    assert not made.run(["sweep", "tests", "ops"], 120)
    assert given == pytest.approx({"ops": 43.2, "tests": 72.0})
    assert [(part["key"], part["status"]) for part in result.load(tmp_path / "r.json")["parts"]] == [
        ("ops", "done"), ("tests", "stopped"), ("sweep", "stopped"),
    ]  # fmt: skip


def test_every_test_of_a_kernel_is_in_the_report() -> None:
    files = [file.relative_to(ROOT).as_posix() for file in files_of("tests")]
    assert len(files) == len(set(files))
    for folder in ("gpu", "kernels"):
        assert {f"tests/{folder}/{path.name}" for path in (ROOT / "tests" / folder).glob("test_*.py")} < set(files)
    assert {"tests/engine/test_resume.py", "tests/test_validate.py"} < set(files)
    assert [file.stem for file in files_of("ops")][:2] == ["roi_align", "nms"]
    assert {file.stem for file in files_of("model")} == {"inference", "training"}
    names = {file.stem for part in report_module.PARTS for file in files_of(part)}
    assert set(FIRST) - names == set(), "FIRST names a file that is not there"


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
