"""The tests on a GPU, in a process that may lose its CUDA context: a pytest plugin, and what becomes of its journal.

The plugin (``-p bench.gpu_tests --journal FILE``) writes `plan`, `begin` and a `test` line for each test, leaves out
those that the journal has, and ends the process as soon as a failed test has lost the context: every later test of
that process would fail with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import context
from bench.process import CONTEXT_LOST, Ending, Journal, Line, survive
from bench.rows import ROOT, clean, read_lines
from bench.run import command_of_pytest, environment

# What has its device from a fixture, the youngest kernels first: the time may be up before the end. Paths that do not
# exist are left out. pytest itself would leave out a file that a folder behind it holds, so it gets files alone.
PATHS = (
    "tests/gpu/test_roi_align.py",
    "tests/gpu/test_nms.py",
    "tests/gpu/test_boxes.py",
    "tests/gpu",
    "tests/kernels/test_roi_align.py",
    "tests/kernels",
    "tests/engine/test_resume.py",
    "tests/test_validate.py",
)
SELECTED = "not compile_only and not slow"
UNWANTED = "mutant"  # a broken kernel proves something of its tests, which no GPU is needed for


def run_tests(
    files: Sequence[Path],
    journal: Path,
    *,
    seconds: float,
    gpu: bool,
    hang: float,
    select: str | None = None,
    say: Callable[[str], None] = print,
    store: Callable[[list[dict[str, Any]]], None] = lambda entries: None,
) -> tuple[Ending, list[dict[str, Any]]]:
    """Run the tests of `files`; how it ended, and an entry of the result file for each file.

    `store` gets the entries so far whenever there are more.
    """
    command = command_of_pytest("-p", "bench.gpu_tests", "--journal", str(journal), "-m", SELECTED)
    command += ["-k", f"({select}) and not {UNWANTED}" if select else f"not {UNWANTED}"]
    book = Journal(journal, settled_test)
    tests: dict[str, Line] = {}

    def hear(lines: list[Line]) -> None:
        new = [line["test"] for line in lines if "test" in line]
        tests.update({test["id"]: test for test in new})
        for test in new:
            if test["outcome"] not in ("passed", "skipped"):
                say(f"{test['id']}  {test['outcome']}: {test['reason']}")
        if new:
            store(by_file(book, tests, Ending("stopped", "the report was ended meanwhile")))

    def killed(key: str, reason: str) -> Line:
        return {"test": {"id": key, "outcome": "killed", "seconds": 0.0, "reason": reason}}

    ending = survive(
        [*command, *map(str, files)], book,
        seconds=seconds, killed=killed, hear=hear, env=environment(gpu), hang=hang,
    )  # fmt: skip
    entries = by_file(book, tests, ending)
    counts = {name: sum(entry[name] for entry in entries) for name in ("passed", "failed", "skipped")}
    say(f"tests: {', '.join(f'{count} {name}' for name, count in counts.items())} in {len(entries)} files")
    return ending, entries


def by_file(book: Journal, tests: dict[str, Line], ending: Ending) -> list[dict[str, Any]]:
    """The tests counted by their files, failures by name. A file with a planned test that did not run is not done."""
    entries: dict[str, dict[str, Any]] = {}

    def entry(key: str) -> dict[str, Any]:
        file = key.partition("::")[0]
        blank = {"file": file, "passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0, "failures": [], "status": "done"}
        return entries.setdefault(file, blank)

    for key in book.planned or ():
        test = tests.get(key)
        if test is None:
            entry(key).update(status="not reached", reason=ending.reason or "its process ended without its result")
            continue
        at = entry(key)
        outcome = test["outcome"]
        at["seconds"] = round(at["seconds"] + test["seconds"], 2)
        at["failed" if outcome == "killed" else outcome] += 1
        if outcome in ("failed", "killed"):
            at["failures"].append({"test": key.partition("::")[2], "reason": test["reason"]})
        if outcome == "killed" and at["status"] == "done":
            at.update(status="killed", reason=test["reason"])
    for file, reason in book.errors.items():
        entry(file).update(status="not collected", reason=reason)
    return list(entries.values())


def settled_test(line: Line) -> str | None:
    """The test that a line of the journal settles."""
    return line["test"]["id"] if "test" in line else None


def first_error(report: Any) -> str:
    """The first line of the error of a pytest report."""
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash else str(report.longrepr)).splitlines()
    marked = [line[1:].strip() for line in lines if line.startswith("E ")]
    return clean(next(filter(str.strip, marked or lines), "no message"))


def unreadable_files(config: pytest.Config) -> dict[str, str]:
    """The files that pytest could not collect, with the reasons."""
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    reports = reporter.stats.get("error", []) if reporter else []
    return {report.nodeid: first_error(report) for report in reports if isinstance(report, pytest.CollectReport)}


# ---- the plugin


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--journal", type=Path, required=True, help="append a JSON line for every test that has run")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Recorder(config.getoption("journal")), "journal-of-tests")


class _Recorder:
    """Writes the journal of one process."""

    def __init__(self, path: Path) -> None:
        self.book = Journal(path, settled_test)
        self.done = {line["test"]["id"] for line in read_lines(path) if "test" in line}
        self.planned: list[str] = []
        self.test: Line = {}

    @pytest.hookimpl(trylast=True)  # behind -m and -k
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        self.planned = [item.nodeid for item in items]
        done = [item for item in items if item.nodeid in self.done]
        items[:] = [item for item in items if item.nodeid not in self.done]
        if done:
            config.hook.pytest_deselected(items=done)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.book.write({"plan": self.planned, "errors": unreadable_files(session.config)})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.test = {"id": nodeid, "outcome": "passed", "seconds": 0.0, "reason": ""}
        self.book.write({"begin": nodeid})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.test["seconds"] = round(self.test["seconds"] + report.duration, 3)
        if report.outcome != "passed" and self.test["outcome"] != "failed":
            self.test["outcome"] = report.outcome
            self.test["reason"] = first_error(report) if report.failed else ""

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.book.write({"test": self.test})
        if self.test["outcome"] == "failed" and not context.lives():
            os._exit(CONTEXT_LOST)


def gpu_test_files(done: Collection[str] = ()) -> list[Path]:
    """The files of `PATHS` that this checkout has, each once, but for those `done`, as a result names them."""
    there = [ROOT / path for path in PATHS if (ROOT / path).exists()]
    files = [file for path in there for file in ([path] if path.is_file() else sorted(path.rglob("test_*.py")))]
    return [file for file in dict.fromkeys(files) if file.relative_to(ROOT).as_posix() not in done]
