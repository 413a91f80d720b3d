"""The pytest plugin of all workers: it writes the journal, and it runs the benchmarks under pytest-benchmark.

A benchmark names one variant and one provider. The first test of a variant measures every provider that this run
selected, in turn with one another (`bench.contest`); each test then reports its own samples through pytest-benchmark,
so `--benchmark-json` and `pytest-benchmark compare` work as ever. The plugin also records any other test
(``-p bench.conftest``), and ends the process as soon as a failed one has lost the CUDA context.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import machine
from bench.contest import Contest, ContextLostError, compare
from bench.process import CONTEXT_LOST, Journal
from bench.result import VARIANT, Row, clean
from bench.timing import REPLAY, Samples

# So many are timed in turn with one another. A provider that died with its process is timed again, so not all at once.
TOGETHER = 16


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--journal", type=Path, help="append a JSON line for every row or test as it ends")
    parser.addoption("--sweep", action="append", default=[], help="only this sweep of launch configurations")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder(Journal(config.getoption("journal"))), "bench-recorder")


def key_of(item: Any) -> str:
    """Return the key of the row that a benchmark reports, op/case/mode/dtype/layout/provider, or the id of a test."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    if not set(VARIANT) <= set(params):
        return str(item.nodeid)
    return "/".join([item.originalname.removeprefix("test_"), *(str(params[name]) for name in VARIANT)])


class Recorder:
    """What this process selected, has measured, and writes into its journal."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.planned: list[str] = []
        self.selected: dict[str, list[str]] = defaultdict(list)  # keys of a contest
        self.tests: set[str] = set()  # all that are no benchmarks
        self.measured: dict[str, tuple[Row, Samples]] = {}
        self.test: dict[str, Any] = {}

    @pytest.hookimpl(trylast=True)  # behind -m and -k
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        keys = {item: key_of(item) for item in items}
        if wanted := config.getoption("sweep"):
            known = {key.split("/")[1] for key in keys.values() if key.startswith("sweep/")}
            if not known.issuperset(wanted):
                raise pytest.UsageError(f"no sweep {', '.join(wanted)}: bench/cases has {', '.join(sorted(known))}")
            keys = {item: key for item, key in keys.items() if key.startswith(tuple(f"sweep/{one}/" for one in wanted))}
        self.planned = list(keys.values())
        left = {item: key for item, key in keys.items() if key not in self.journal.settled}
        if gone := [item for item in items if item not in left]:
            config.hook.pytest_deselected(items=gone)
        items[:] = left
        for item, key in left.items():
            if key == item.nodeid:
                self.tests.add(key)
            else:
                contest = key.rpartition("/")[0]
                self.selected[contest].append(key)
                item.add_marker(pytest.mark.benchmark(timer=REPLAY, group=contest))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
        reports = reporter.stats.get("error", []) if reporter else []
        errors = {report.nodeid: first_error(report) for report in reports if isinstance(report, pytest.CollectReport)}
        self.journal.write({"plan": self.planned, "errors": errors})

    def row(self, key: str, make: Callable[[], Contest]) -> tuple[Row, Samples]:
        """Return a row; the first of a contest measures the others with it."""
        if key not in self.measured:
            if not self.measured:
                self.journal.write({"roofs": asdict(machine.roofs())})
            keys = [one for one in self.selected[key.rpartition("/")[0]] if one not in self.measured]
            self.measured |= compare(make(), keys[:TOGETHER], self.journal)
        return self.measured[key]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if nodeid in self.tests:
            self.test = {"key": nodeid, "status": "passed", "reason": "", "seconds": 0.0}
            self.journal.write({"begin": nodeid})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid in self.tests:
            self.test["seconds"] = round(self.test["seconds"] + report.duration, 3)
            if report.outcome != "passed" and self.test["status"] != "failed":
                self.test["status"] = report.outcome
                self.test["reason"] = first_error(report) if report.failed else ""

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if nodeid in self.tests:
            self.journal.write(self.test)
            if self.test["status"] == "failed" and not machine.lives():
                os._exit(CONTEXT_LOST)


def first_error(report: Any) -> str:
    """Return the first line of the error of a pytest report."""
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash else str(report.longrepr)).splitlines()
    marked = [line[1:].strip() for line in lines if line.startswith("E ")]
    return clean(next(filter(str.strip, marked or lines), "no message"))


@pytest.fixture
def contest(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[Callable[[], Contest]], None]:
    """Return a function to call with one that makes this variant's `Contest`: the test then reports its row."""
    key = key_of(request.node)
    recorder: Any = request.config.pluginmanager.get_plugin("bench-recorder")

    def report(make: Callable[[], Contest]) -> None:
        torch.manual_seed(0)
        try:
            row, samples = recorder.row(key, make)
        except ContextLostError:
            os._exit(CONTEXT_LOST)
        except Exception as error:  # its case could not even be made
            row, samples = Row(key=key, status="failed", reason=f"{type(error).__name__}: {error}"), Samples()
            recorder.journal.write(row.line())
        if row.status in ("wrong", "failed", "out of memory"):
            pytest.fail(f"{row.status}: {row.reason}", pytrace=False)
        if row.status != "timed":
            pytest.skip(f"{row.status}: {row.reason}")
        benchmark.extra_info.update({name: value for name, value in row.line().items() if name != "reason"})
        REPLAY.samples = list(samples.device)
        benchmark.pedantic(lambda: None, rounds=len(samples.device))

    return report
