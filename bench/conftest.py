"""How the benchmarks run under pytest-benchmark.

A test names one variant and one provider. The first test of a variant measures every provider that this run selected,
in turn with one another (`bench.contest`); each test then reports its own through pytest-benchmark, whose JSON and
`compare` work as ever. Full size on a GPU, reduced size on a CPU, where a Triton kernel can only be checked.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.contest import Contest, ContextLostError, compare
from bench.gpu_tests import unreadable_files
from bench.machine import roofs_json
from bench.process import CONTEXT_LOST
from bench.rows import Journal, Row, row_of
from bench.timing import REPLAY, Samples

VARIANT = ("case", "mode", "dtype", "layout", "provider")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--journal", type=Path, help="append a JSON line for every row as it is measured")


def key_of(item: pytest.Item) -> str | None:
    """The row a test will report: op/case/mode/dtype/layout/provider. None for a test that is no benchmark."""
    callspec = getattr(item, "callspec", None)
    if callspec is None or not set(VARIANT) <= set(callspec.params):
        return None
    op = item.originalname.removeprefix("test_")  # type: ignore[attr-defined]
    return "/".join([op, *(str(callspec.params[name]) for name in VARIANT)])


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if (key := key_of(item)) is not None:
            item.add_marker(pytest.mark.benchmark(timer=REPLAY, group=key.rpartition("/")[0]))


def pytest_collection_finish(session: pytest.Session) -> None:
    keys = [key for item in session.items if (key := key_of(item)) is not None]
    session.config.stash[_ARENA] = Arena(keys, Journal(session.config.getoption("journal")))
    session.config.stash[_ARENA].journal.write({"plan": keys, "errors": unreadable_files(session.config)})


class Arena:
    """What this run selected and what it has measured."""

    def __init__(self, keys: list[str], journal: Journal) -> None:
        self.journal = journal
        self.selected: dict[str, list[str]] = defaultdict(list)
        for key in keys:
            self.selected[key.rpartition("/")[0]].append(key)
        self.measured: dict[str, tuple[Row, Samples]] = {}

    def row(self, key: str, make: Callable[[], Contest]) -> tuple[Row, Samples]:
        if key not in self.measured:
            keys = self.selected[key.rpartition("/")[0]]
            if all(k in self.journal.rows for k in keys):
                return self.journal.rows[key], Samples()
            if not self.measured:
                self.journal.write({"roofs": roofs_json()})
            self.measured |= compare(make(), keys, self.journal)
        return self.measured[key]


_ARENA = pytest.StashKey[Arena]()


@pytest.fixture
def contest(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[Callable[[], Contest]], None]:
    """Call it with a function that makes this variant's `Contest`: the test then reports its provider's row."""
    key = key_of(request.node)
    assert key is not None, f"a benchmark takes {', '.join(VARIANT)}"

    def report(make: Callable[[], Contest]) -> None:
        torch.manual_seed(0)
        try:
            row, samples = request.config.stash[_ARENA].row(key, make)
        except ContextLostError:
            os._exit(CONTEXT_LOST)
        except Exception as error:  # its case could not even be made
            row, samples = row_of(key, "failed", f"{type(error).__name__}: {error}"), Samples()
            request.config.stash[_ARENA].journal.add(row)
        if row.status in ("wrong", "failed", "killed", "out of memory"):
            pytest.fail(f"{row.status}: {row.reason}", pytrace=False)
        if row.status != "timed":
            pytest.skip(f"{row.status}: {row.reason}")
        if not samples.device:
            pytest.skip("timed before: its row is in the journal")
        benchmark.extra_info.update(
            {name: value for name, value in vars(row).items() if value is not None and name != "reason"}
        )
        REPLAY.load(samples.device)
        benchmark.pedantic(lambda: None, rounds=len(samples.device))

    return report
