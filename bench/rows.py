"""What a benchmark writes down: one row a provider and variant, appended to a journal as it goes.

The journal is a file of JSON lines, so that whatever kills the process leaves everything before it. Lines are

    {"plan": [key, ...]}     what a process is about to do
    {"begin": key}           it starts on this one: if no row follows, this one killed the process
    {"row": {...}}           a `Row`
    {"roofs": {...}}         what the machine reached

No row holds a host name or an absolute path: `clean` takes them out of error messages.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# What can become of a provider. Only "timed" rows have times.
STATUSES = (
    "timed",
    "passed",  # its result is right, but it cannot be timed here
    "wrong",  # the gate refused it
    "failed",  # it raised
    "out of memory",
    "killed",  # it took the process with it, or hung
    "unavailable",  # a package or a backend is missing
    "not built",  # the project has no such op yet
    "not reached",  # the time was up
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One provider's result on one variant of one case. Times are microseconds, memory is MiB.

    `median_us`, `p20_us`, `p80_us`: of the work itself, its inputs not in the L2 cache (CUDA events; on a CPU the
    clock). `wall_us`: median from the call to the end of its work, nothing queued before it. `peak_mib`: most memory
    above the inputs, outputs included. `bytes` and `flops` are the least the case needs, `gbps` is `bytes` over
    `median_us`, `roof_share` the paper floor over `median_us`.
    """

    op: str
    case: str
    mode: str
    dtype: str
    layout: str
    provider: str
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
    roof: str | None = None  # dtype of the products that `roof_share` is of, where that is not `dtype`

    def __post_init__(self) -> None:
        assert self.status in STATUSES, self.status

    @property
    def key(self) -> str:
        """Names the row in a journal, on a command line and in a plan."""
        return "/".join((self.op, self.case, self.mode, self.dtype, self.layout, self.provider))

    @property
    def contest(self) -> str:
        """The key without the provider: rows that share it compare."""
        return self.key.rpartition("/")[0]


def row_of(key: str, status: str, reason: str, **fields: Any) -> Row:
    """The row of a `key` that was not timed."""
    op, case, mode, dtype, layout, provider = key.split("/")
    return Row(
        op=op, case=case, mode=mode, dtype=dtype, layout=layout, provider=provider,
        status=status, reason=clean(reason), **fields,
    )  # fmt: skip


# An absolute path, also behind a compiler's -I and -L; its last part may be a file's name, and a folder's is not kept.
_PATH = re.compile(r"(?:(?<![\w.])|(?<=-[IL]))/(?:[\w.~][\w.+~@=-]*/)*([\w.~][\w.+~@=-]*)/?")


def clean(text: str) -> str:
    """An error message on one line, without host name and absolute paths, at most 300 characters."""
    text = " ".join(line.strip() for line in str(text).splitlines() if line.strip())
    text = text.replace(f"{ROOT}{os.sep}", "")
    text = _PATH.sub(lambda path: path[1] if "." in path[1] else "(path)", text)
    host = platform.node()
    for name in (host, host.partition(".")[0]):
        if name:
            text = re.sub(rf"\b{re.escape(name)}\b", "this machine", text)
    return text if len(text) <= 300 else text[:297] + "..."


class Journal:
    """A file of JSON lines that is written as the work goes; without a path nothing is written."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        if path and path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
            with path.open("a") as file:
                file.write("\n")  # a kill has cut the last line: the next one must not be lost with it
        self.rows = {row.key: row for row in read_rows(path)} if path else {}

    def write(self, line: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def add(self, row: Row) -> None:
        self.rows[row.key] = row
        self.write({"row": dataclasses.asdict(row)})


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole line of a journal; a last line that a kill has cut is left out."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def read_rows(path: Path) -> list[Row]:
    return [Row(**line["row"]) for line in read_lines(path) if "row" in line]
