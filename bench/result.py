"""The result file of one commit on one machine: JSON that several calls of the report fill and readers build on.

    {
      "schema": 1,
      "machine": {...},            # bench.machine.describe()
      "roofs": {...} | null,       # bench.machine.Roofs, of the last process that measured them
      "rows": [{...}],             # bench.rows.Row of ops and model; one row for each key
      "sweeps": [{...}],           # Row with op "sweep NAME", a launch configuration as the provider
      "tests": [{"file", "select", "passed", "failed", "skipped", "seconds", "status",
                 "failures": [{"test", "reason"}]}],   # "select": the -k expression, null for the whole file
      "validation": [{...}],       # tmask.validate.Row
      "parts": {name: {"status", "seconds", "reason"}}
    }

`status` of a part is "done", "stopped" (its time was up, or it was interrupted), "skipped" (it cannot run here) or
"failed"; of a test file "done", "killed" (a test took the process with it), "not collected" or "not reached". Where the
status is not "done" a `reason` says why. Nothing in the file names a host or an absolute path.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.rows import Row

SCHEMA = 1
Result = dict[str, Any]


def empty(machine: dict[str, Any]) -> Result:
    """A result without anything measured."""
    return {
        "schema": SCHEMA,
        "machine": machine,
        "roofs": None,
        "rows": [],
        "sweeps": [],
        "tests": [],
        "validation": [],
        "parts": {},
    }


def load(path: Path) -> Result:
    """Errors: ValueError for a file that is no result of this schema."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: no JSON: {error}") from None
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected a result of schema {SCHEMA}")
    return result


def save(path: Path, result: Result) -> None:
    """Write it whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def rows(result: Result, kind: str = "rows") -> list[Row]:
    """The rows (or `kind` "sweeps") as `Row`."""
    return [Row(**row) for row in result[kind]]


def merge(old: Result, new: Result) -> Result:
    """Both: what `new` has measured replaces what `old` has of it. What it did not reach replaces nothing."""
    return {
        **new,
        "roofs": new["roofs"] or old["roofs"],
        "rows": _replace(old["rows"], new["rows"], _row_key),
        "sweeps": _replace(old["sweeps"], new["sweeps"], _row_key),
        "tests": _replace(old["tests"], new["tests"], lambda test: test["file"]),
        "validation": _replace(
            old["validation"],
            new["validation"],
            lambda row: (row["op"], row["direction"], row["backend"], row["dtype"]),
        ),
        "parts": {**old["parts"], **new["parts"]},
    }


def place(folder: Path, machine: dict[str, Any]) -> Path:
    """Where the result of this machine and commit stands in `folder`: the file that is there, or a new one's name."""
    folder = folder / slug(machine["device"])
    sha = (machine["commit"] or "unknown")[:7]
    there = sorted(folder.glob(f"*-{sha}.json"))
    return there[-1] if there else folder / f"{machine['date']}-{sha}.json"


def slug(device: str) -> str:
    """A device's name as a folder: "NVIDIA H200" is "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _row_key(row: dict[str, Any]) -> str:
    return Row(**row).key


def _replace(
    old: list[dict[str, Any]], new: list[dict[str, Any]], key: Callable[[dict[str, Any]], Any]
) -> list[dict[str, Any]]:
    merged = {key(item): item for item in old}
    for item in new:
        before = merged.get(key(item))
        if before is None or _reached(item) >= _reached(before):
            merged[key(item)] = item
    return list(merged.values())


def _reached(item: dict[str, Any]) -> float:
    """How far it was measured: of a file of tests that time cut short, so many of them."""
    if item.get("status") != "not reached":
        return math.inf
    return sum(item.get(name, 0) for name in ("passed", "failed", "skipped"))
