"""Rows, and the result file of one commit on one machine: JSON that several calls of the report fill.

    {
      "schema": 2,
      "machine": {...},            # bench.machine.describe()
      "roofs": {...} | null,       # bench.machine.Roofs
      "rows": [{"key", "status", "reason", ...}],   # Row; op "sweep" for launch configurations
      "tests": [{"key", "status", "reason", "seconds"}],
      "parts": [{"key", "status", "reason", "seconds"}]
    }

A test's status is "passed", "failed", "skipped", "killed" or "not reached"; a part's is "done", "stopped" (its time
was up, or it was interrupted), "skipped" or "failed". Nothing in the file names a host or an absolute path.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

SCHEMA = 2
LISTS = ("rows", "tests", "parts")
VARIANT = ("case", "mode", "dtype", "layout", "provider")  # of a key, behind the op

# The worst first. Only "timed" rows have times.
STATUSES = (
    "wrong",  # the gate refused the result
    "killed",  # the provider took the process with it, or hung
    "failed",  # the provider raised
    "out of memory",
    "not reached",  # the time was up
    "unavailable",  # a package or a backend is missing
    "passed",  # the result is right, and this machine cannot time it
    "timed",
)

Result = dict[str, Any]
Line = dict[str, Any]


@dataclass(kw_only=True)
class Row:
    """What one provider did on one variant of one case. Times are microseconds, memory is MiB.

    `key`: op/case/mode/dtype/layout/provider. `median_us`, `p20_us`, `p80_us`: of the work itself, its inputs not in
    the L2 cache (CUDA events; on a CPU the clock). `wall_us`: median from the call to the end of its work, nothing
    queued before it. `peak_mib`: most memory above the inputs, outputs included. `bytes` and `flops` are the least the
    case needs, `gbps` is `bytes` over `median_us`, `roof_share` the floor that the measured roofs allow over
    `median_us`.
    """

    key: str
    status: str
    reason: str = ""
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    wall_us: float | None = None
    rounds: int = 0
    peak_mib: float | None = None
    bytes: int = 0
    flops: int = 0
    gbps: float | None = None
    roof_share: float | None = None
    size: str = "full"  # "reduced" where a CPU did a smaller case
    roof: str | None = None  # dtype of the products that `roof_share` refers to, where that is not `dtype`

    def __post_init__(self) -> None:
        assert self.status in STATUSES, self.status
        self.reason = clean(self.reason)
        self.op, self.case, self.mode, self.dtype, self.layout, self.provider = self.key.split("/")

    @property
    def contest(self) -> str:
        """The key without the provider: rows that share it compare."""
        return self.key.rpartition("/")[0]

    def line(self) -> Line:
        """Return the row as a journal and a result file hold it."""
        return {name: getattr(self, name) for name in Row.__annotations__ if getattr(self, name) is not None}


# An absolute path, also behind a compiler's -I and -L; its last part may be a file's name, and a folder's is not kept.
_PATH = re.compile(r"(?:(?<![\w.])|(?<=-[IL]))/(?:[\w.~][\w.+~@=-]*/)*([\w.~][\w.+~@=-]*)/?")


def clean(text: str) -> str:
    """Return a message on one line, without host name and absolute paths, at most 300 characters."""
    text = " ".join(line.strip() for line in str(text).splitlines() if line.strip())
    text = text.replace(f"{ROOT}{os.sep}", "")
    text = _PATH.sub(lambda path: path[1] if "." in path[1] else "(path)", text)
    host = platform.node()
    for name in filter(None, (host, host.partition(".")[0])):
        text = re.sub(rf"\b{re.escape(name)}\b", "this machine", text)
    return text if len(text) <= 300 else text[:297] + "..."


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
            text = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
        parts.append(f"{json.dumps(name)}: {text}")
    part = path.with_name(f"{path.name}.part")
    part.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    os.replace(part, path)


def rows(result: Result, *, sweeps: bool = False) -> list[Row]:
    """Return the rows of ops and model, or those of sweeps."""
    return [Row(**line) for line in result["rows"] if line["key"].startswith("sweep/") == sweeps]


def add(result: Result, name: str, lines: Iterable[Line]) -> None:
    """Put lines into one of ``LISTS``: a new line replaces one of its key, but "not reached" replaces nothing."""
    merged = {line["key"]: line for line in result[name]}
    for line in lines:
        if line["key"] not in merged or line["status"] != "not reached":
            merged[line["key"]] = line
    result[name] = list(merged.values())


def merge(old: Result, new: Result) -> Result:
    """Return both: what `new` has measured replaces what `old` has of it.

    Errors: ValueError if the two are of different devices or different code.
    """
    for name in ("device", "commit", "changed"):
        was, now = old["machine"].get(name), new["machine"].get(name)
        if was != now:
            raise ValueError(f"results of one device and commit merge: {name} is {was!r} and {now!r}")
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
