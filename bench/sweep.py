"""Launch configurations of one kernel beside each other: the ``SWEEPS`` of bench/cases, as benchmarks of pytest.

The providers of such a contest are launch configurations. They pass the same gate and the same clock as everything
else, and one that does not compile, is wrong or kills its process is a row.
"""

from __future__ import annotations

import importlib
from typing import Any

from bench.report import files_of
from bench.variants import of_rows

MODULES = [importlib.import_module(f"bench.cases.{file.stem}") for file in files_of("cases")]
CONTESTS = {name: make() for module in MODULES for name, make in getattr(module, "SWEEPS", {}).items()}


@of_rows([(name, "-", "-", "-", launch) for name, contest in CONTESTS.items() for launch in contest.providers])
def test_sweep(case: str, mode: str, dtype: str, layout: str, provider: str, contest: Any) -> None:
    contest(lambda: CONTESTS[case])
