"""The workers of a report beside the benchmarks: the tests, the validation and the sweeps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_tests, result, sweep, validation
from bench.contest import Contest
from bench.evidence import Evidence
from bench.process import Ending, Journal
from bench.rows import ROOT, read_lines, read_rows
from bench.run import Measured, settled_row
from bench.work import Work

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
def test_passes_behind_all_that(): pass
@pytest.mark.slow
def test_slow(): pass
@pytest.fixture
def broken(): raise OSError("no disk")
def test_of_a_fixture(broken): pass
"""
CONFTEST = """
from pathlib import Path
import bench.gpu_tests
# The process that has seen the illegal access cannot go on; the next one can.
lost = []
bench.context.lives = lambda: not lost
def pytest_runtest_makereport(item, call):
    if call.excinfo is not None and "illegal" in str(call.excinfo.value):
        lost.append(item)
def pytest_configure(config):
    config.addinivalue_line("markers", "slow: of minutes")
    config.addinivalue_line("markers", "compile_only: no GPU")
"""


def test_a_dead_test_takes_no_other_with_it(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")  # names of tests begin here
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_a.py").write_text(TESTS)
    (tmp_path / "test_b.py").write_text("import no_such_package\n")
    (tmp_path / "test_c.py").write_text("def test_passes(): pass\n")
    journal, said = tmp_path / "work" / "tests.jsonl", []
    stored: list[Any] = []
    ending, entries = gpu_tests.run_tests(
        [tmp_path], journal, seconds=100, gpu=False, hang=2, say=said.append, store=stored.append
    )
    assert stored[-1] == entries, "what is kept if the report is killed"
    assert len(stored) > 1
    assert stored[0] != entries
    assert ending == Ending("done"), journal.with_suffix(".log").read_text()
    files = {entry["file"]: entry for entry in entries}
    counts = {name: [files[name][kind] for kind in ("passed", "failed", "skipped")] for name in files}
    assert counts == {"test_a.py": [2, 5, 1], "test_b.py": [0, 0, 0], "test_c.py": [1, 0, 0]}
    assert {entry["test"]: entry["reason"] for entry in files["test_a.py"]["failures"]} == {
        "test_is_wrong": "AssertionError: sum at [0, 1]",
        "test_loses_the_context": "RuntimeError: CUDA error: an illegal memory access was encountered",
        "test_dies[segfault]": "the process died of SIGSEGV",
        "test_dies[hang]": "no answer in 2 s",
        "test_of_a_fixture": "OSError: no disk",
    }
    status = {"test_a.py": "killed", "test_b.py": "not collected", "test_c.py": "done"}
    assert {name: entry["status"] for name, entry in files.items()} == status
    assert files["test_b.py"]["reason"] == "ModuleNotFoundError: No module named 'no_such_package'"
    started = [line["begin"] for line in read_lines(journal) if "begin" in line]
    assert len(started) == len(set(started)) == 9  # each once, and not the slow one
    assert said[-1] == "tests: 3 passed, 5 failed, 1 skipped in 3 files"


def test_tests_that_were_not_reached_are_told(tmp_path: Path) -> None:
    book = Journal(tmp_path / "j", gpu_tests.settled_test)
    book.write({"plan": ["a.py::x", "a.py::y", "b.py::z"]})
    book.read()
    tests = {"a.py::x": {"id": "a.py::x", "outcome": "passed", "seconds": 1.0, "reason": ""}}
    entries = gpu_tests.by_file(book, tests, Ending("stopped", "the time was up"))
    assert [(e["file"], e["passed"], e["status"], e.get("reason")) for e in entries] == [
        ("a.py", 1, "not reached", "the time was up"),
        ("b.py", 0, "not reached", "the time was up"),
    ]


def test_the_youngest_kernels_come_first_and_every_file_once() -> None:
    files = [file.relative_to(ROOT).as_posix() for file in gpu_tests.gpu_test_files()]
    assert files[:3] == ["tests/gpu/test_roi_align.py", "tests/gpu/test_nms.py", "tests/gpu/test_boxes.py"]
    assert len(files) == len(set(files))
    for folder in ("gpu", "kernels"):
        assert {f"tests/{folder}/{path.name}" for path in (ROOT / "tests" / folder).glob("test_*.py")} < set(files)
    assert {"tests/engine/test_resume.py", "tests/test_validate.py"} < set(files)


def test_a_resumed_report_tests_the_files_that_are_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the result file holds what there is, even if the report is killed between two tests."""
    machine = {"device": "a GPU", "gpu": {}, "commit": "0123456", "date": "2026-01-01", "changed": False}
    path = tmp_path / "r.json"
    made = Evidence(now=result.empty(machine), path=path, work=tmp_path, hang=60, resume=True, say=lambda text: None)
    file = {"seconds": 1.0, "failed": 0, "skipped": 0, "failures": []}
    done = {"file": "tests/gpu/test_nms.py", "passed": 9, "status": "done", **file}
    part = {"file": "tests/gpu/test_boxes.py", "passed": 1, "status": "done", "select": "decode", **file}
    begun = {"file": "tests/test_validate.py", "passed": 0, "status": "not reached", **file}
    made.add(tests=[done, part, begun])

    def run_tests(files: Any, journal: Path, *, store: Any, **options: Any) -> Any:
        assert ROOT / done["file"] not in files
        assert ROOT / part["file"] in files, "it was asked for some of its tests"
        assert len(files) == len(gpu_tests.gpu_test_files()) - 1
        parts = [[{"file": "tests/test_validate.py", "passed": n, "status": "not reached", **file}] for n in (1, 2)]
        store(parts[0])
        assert [test["passed"] for test in result.load(path)["tests"]] == [9, 1, 1]
        return Ending("stopped"), parts[1]

    monkeypatch.setattr(gpu_tests, "run_tests", run_tests)
    assert made.tests(100) == Ending("stopped")
    assert [(entry["file"], entry["passed"]) for entry in result.load(path)["tests"]] == [
        ("tests/gpu/test_nms.py", 9),
        ("tests/gpu/test_boxes.py", 1),
        ("tests/test_validate.py", 2),
    ]


def adding(*added: int) -> Contest:
    """Configurations named after what they add; only 1 is right."""

    def check(out: torch.Tensor, truth: torch.Tensor) -> None:
        assert torch.equal(out, truth), "differs"

    return Contest(
        inputs=lambda: torch.ones(4),
        providers={f"adds {number}": lambda x, number=number: lambda: x + number for number in added},
        truth=lambda x: x + 1, check=check, work=Work(bytes=32, flops=4),
    )  # fmt: skip


def test_a_sweep_is_rows_of_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    monkeypatch.setattr(sweep, "TOGETHER", 2)
    monkeypatch.setattr("bench.machine.roofs_json", lambda: {"copy_gbps": 1.0})
    monkeypatch.setattr("bench.machine.roofs", lambda: __import__("bench.machine").machine.Roofs(1.0, 1.0, 1.0))
    contests = {"adder": lambda: adding(1, 2, 3), "other": lambda: adding(1), "bad": lambda: 1 / 0}
    monkeypatch.setattr(sweep, "find_sweeps", lambda: (contests, {}))
    monkeypatch.setattr(sys, "argv", ["sweep", "adder", "bad", "--journal", str(path)])
    sweep.main()
    sweep.main()  # goes on behind what is there: with nothing
    rows = read_rows(path)
    assert [(row.op, row.provider, row.status) for row in rows] == [
        ("sweep adder", "adds 2", "wrong"),
        ("sweep adder", "adds 1", "timed"),
        ("sweep adder", "adds 3", "wrong"),
    ]
    plan = next(iter(read_lines(path)))
    assert plan["errors"] == {"bad": "ZeroDivisionError: division by zero"}
    assert plan["known"] == ["adder", "bad", "other"]
    # A sweep's rows go into a result like any others.
    book, measured = Journal(path, settled_row), Measured(say=lambda _: None)
    measured.hear(book.read())
    assert book.missing() == []
    assert len(measured.rows) == 3


def test_an_unknown_sweep_names_the_known_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(command: list[str], journal: Journal, **_: Any) -> Ending:
        journal.write({"plan": [], "errors": {}, "known": ["nms", "roi_align"]})
        journal.read()
        return Ending("done")

    monkeypatch.setattr(sweep, "survive", plan)
    found = Measured(say=lambda _: None)
    ending = sweep.run_sweeps(["nsm"], tmp_path / "j", found, seconds=1, gpu=True, hang=1)
    assert ending == Ending("failed", "no sweep nsm: the files of bench/ops hold nms, roi_align")


def test_a_configuration_with_a_slash_is_refused() -> None:
    with pytest.raises(ValueError, match="no slash"):
        sweep.key_of("nms", "64/4")


def test_an_op_that_kills_its_process_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(command: list[str], journal: Journal, *, killed: Any, hear: Any, **_: Any) -> Ending:
        journal.write({"plan": ["nms", "roi_align"]})
        right = {
            "op": "nms",
            "direction": "forward",
            "backend": "triton",
            "dtype": "fp32",
            "verdict": "pass",
            "note": "",
        }
        journal.write({"validation": "nms", "rows": [right]})
        journal.write(killed("roi_align", "the CUDA context was lost"))
        hear(journal.read())
        return Ending("done")

    monkeypatch.setattr(validation, "survive", dies)
    said: list[str] = []
    _, rows = validation.run_validation(tmp_path / "j", seconds=1, gpu=True, hang=1, say=said.append)
    assert said == ["nms  1 right", "roi_align  0 right, 1 WRONG: - - -: the CUDA context was lost"]
    assert [row["verdict"] for row in rows] == ["pass", "fail"]
    merged = result.merge(result.empty({}) | {"validation": rows[:1]}, result.empty({}) | {"validation": rows})
    assert json.dumps(merged["validation"]) == json.dumps(rows)
