"""`tmask validate` as tests of pytest, an op each: every backend against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from bench.machine import device
from bench.rows import clean
from tmask.validate import validate_op
from tmask_kernels.testing import op_specs

SPECS = {spec.name: spec for spec in op_specs()}


@pytest.mark.parametrize("name", SPECS)
def test_validate(name: str, record_property: Callable[[str, Any], None]) -> None:
    rows = [{**asdict(row), "note": clean(row.note)} for row in validate_op(SPECS[name], device())]
    record_property("validation", rows)
    failed = [row for row in rows if row["verdict"] == "fail"]
    words = [
        f"{row['backend']} {row['direction']} {row['dtype']}: {row['note'] or 'over tolerance'}"
        f" (error {row['max_error']}, tolerance {row['tolerance']})"
        for row in failed
    ]
    assert not failed, "; ".join(words)
