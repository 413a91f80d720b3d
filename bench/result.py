"""The result file of one commit on one machine: JSON that several calls of the report fill.

    {
      "schema": 2,
      "machine": {...},            # bench.machine.describe()
      "roofs": {...} | null,       # bench.machine.Roofs
      "rows": [{"key", "status", "reason", ...}],   # bench.rows.Row; op "sweep" for launch configurations
      "tests": [{"key", "status", "reason", "seconds", "validation"}],
      "parts": [{"key", "status", "reason", "seconds"}]
    }

A test's status is "passed", "failed", "skipped", "killed" or "not reached"; a part's is "done", "stopped" (its time
was up, or it was interrupted), "skipped" or "failed". `validation` holds rows of `tmask.validate`. Nothing in the file
names a host or an absolute path.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.rows import Row, row_of

SCHEMA = 2
LISTS = ("rows", "tests", "parts")
Result = dict[str, Any]
Line = dict[str, Any]


def empty(machine: dict[str, Any]) -> Result:
    return {"schema": SCHEMA, "machine": machine, "roofs": None, **{name: [] for name in LISTS}}


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
    """Write the whole file or nothing, one row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for name, value in result.items():
        text = json.dumps(value)
        if name in LISTS and value:
            text = "[\n" + ",\n".join(json.dumps(line) for line in value) + "\n]"
        parts.append(f"{json.dumps(name)}: {text}")
    part = path.with_name(f"{path.name}.part")
    part.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    os.replace(part, path)


def rows(result: Result, *, sweeps: bool = False) -> list[Row]:
    """Return the rows of ops and model, or those of sweeps."""
    found = [row_of(**line) for line in result["rows"]]
    return [row for row in found if (row.op == "sweep") == sweeps]


def add(result: Result, name: str, lines: Iterable[Line]) -> None:
    """Put lines into one of ``LISTS``: a new line replaces one of its key, but "not reached" replaces nothing."""
    merged = {line["key"]: line for line in result[name]}
    for line in lines:
        if line["key"] not in merged or line["status"] != "not reached":
            merged[line["key"]] = line
    result[name] = list(merged.values())


def merge(old: Result, new: Result) -> Result:
    """Return both: what `new` has measured replaces what `old` has of it."""
    merged = {**old, **new, "roofs": new["roofs"] or old["roofs"]}
    for name in LISTS:
        merged[name] = old[name]
        add(merged, name, new[name])
    return merged


def place(folder: Path, machine: dict[str, Any]) -> Path:
    """Return the path of this machine's and commit's result in `folder`: the file that is there, or a new one's."""
    folder = folder / re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    sha = (machine["commit"] or "unknown")[:7]
    there = sorted(folder.glob(f"*-{sha}.json"))
    return there[-1] if there else folder / f"{machine['date']}-{sha}.json"
