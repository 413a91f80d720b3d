"""Launch configurations of one kernel beside each other: the ``SWEEPS`` of bench/cases, as benchmarks of pytest.

The providers of such a contest are launch configurations. They pass the same gate and the same clock as everything
else, and one that does not compile, is wrong or kills its process is a row.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.cases import SWEEPS
from bench.result import VARIANT

CONTESTS = {name: make() for name, make in SWEEPS.items()}
ROWS = [(name, "-", "-", "-", launch) for name, contest in CONTESTS.items() for launch in contest.providers]


@pytest.mark.parametrize(VARIANT, ROWS)
def test_sweep(case: str, mode: str, dtype: str, layout: str, provider: str, contest: Any) -> None:
    contest(lambda: CONTESTS[case])
