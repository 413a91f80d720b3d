"""A row: what one provider did on one variant of one case."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

NAMES = ("op", "case", "mode", "dtype", "layout", "provider")  # of a key

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


@dataclass(frozen=True, kw_only=True)
class Row:
    """One provider's result on one variant of one case. Times are microseconds, memory is MiB.

    `median_us`, `p20_us`, `p80_us`: of the work itself, its inputs not in the L2 cache (CUDA events; on a CPU the
    clock). `wall_us`: median from the call to the end of its work, nothing queued before it. `peak_mib`: most memory
    above the inputs, outputs included. `bytes` and `flops` are the least the case needs, `gbps` is `bytes` over
    `median_us`, `roof_share` the floor that the measured roofs allow over `median_us`.
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
    roof: str | None = None  # dtype of the products that `roof_share` refers to, where that is not `dtype`

    def __post_init__(self) -> None:
        assert self.status in STATUSES, self.status

    @property
    def key(self) -> str:
        return "/".join(getattr(self, name) for name in NAMES)

    @property
    def contest(self) -> str:
        """The key without the provider: rows that share it compare."""
        return self.key.rpartition("/")[0]

    def line(self) -> dict[str, Any]:
        """Return the row as a journal and a result file hold it."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return {"key": self.key, **{name: fields[name] for name in list(fields)[6:]}}


def row_of(key: str, status: str, reason: str = "", **fields: Any) -> Row:
    """Return the row of a `key`, op/case/mode/dtype/layout/provider; `Row.line` names the fields."""
    return Row(**dict(zip(NAMES, key.split("/"), strict=True)), status=status, reason=clean(reason), **fields)


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
