"""Runs benchmark files through pytest, in processes that may die, and says what came out, a line a row."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.process import HANG_SECONDS, Ending, Journal, Line, survive
from bench.rows import ROOT, Row, row_of
from bench.standings import duration

BASELINE = "torchvision"


@dataclass
class Measured:
    """What a run has so far. `hear` takes new lines of the journal, says the rows among them, and calls `changed`."""

    say: Callable[[str], None] = print
    changed: Callable[[Measured], None] = lambda measured: None
    rows: dict[str, Row] = field(default_factory=dict)
    roofs: dict[str, float] | None = None
    known: frozenset[str] = frozenset()  # keys whose rows were there before: not said again

    def hear(self, lines: list[Line]) -> None:
        new = [Row(**line["row"]) for line in lines if "row" in line]
        for line in lines:
            self.roofs = line.get("roofs", self.roofs)
        self.rows |= {row.key: row for row in new}
        for row in new:  # after all of them are known: a contest's rows come together
            if row.key not in self.known:
                self.say(progress_line(row, self.rows))
        self.changed(self)

    def add(self, row: Row) -> None:
        self.rows[row.key] = row
        if row.key not in self.known:
            self.say(progress_line(row, self.rows))


def files_of(folder: str, names: Sequence[str] = ()) -> list[Path]:
    """The benchmark files of ``ops`` or ``model``; only the named ones if any is named."""
    files = sorted((ROOT / "bench" / folder).glob("[!_]*.py"), key=lambda file: (_rank(file.stem), file.stem))
    return [file for file in files if not names or file.stem in names]


def _rank(name: str) -> int:
    """The ops whose kernels are furthest from their aims come first: the time may be up before the end."""
    first = ("roi_align", "nms", "proposals", "boxes", "inference", "training")
    return first.index(name) if name in first else len(first)


def environment(gpu: bool) -> dict[str, str]:
    """What every worker runs with: the checkout on its path, Triton compiled on a GPU and interpreted elsewhere."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "TRITON_INTERPRET": "0" if gpu else "1", "PYTHONFAULTHANDLER": "1"}


def command_of_pytest(*more: str) -> list[str]:
    """pytest as the workers use it: nothing is kept between runs, and a file that cannot be read stops no other."""
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", *more]


def run_benches(
    files: Sequence[Path],
    journal: Path,
    measured: Measured,
    *,
    seconds: float,
    gpu: bool,
    select: str | None = None,
    hang: float = HANG_SECONDS,
) -> Ending:
    """Measure what `files` hold (of it what pytest's ``-k`` expression `select` names), into `measured`.

    Every planned key has a row in the end: what was not measured says why.
    """
    # Files named one by one are collected whatever their names; python_files=*.py would make pytest rewrite the
    # assertions of every module that is imported, torch's too, which takes half a minute.
    command = command_of_pytest("--journal", str(journal))
    command += ["-k", select] if select else []
    book = Journal(journal, settled_row)
    deadline = time.monotonic() + seconds

    def killed(key: str, reason: str) -> Line:
        return {"row": asdict(row_of(key, "killed", reason))}

    def work(files: Sequence[Path]) -> Ending:
        return survive(
            [*command, *map(str, files)], book,
            seconds=deadline - time.monotonic(), killed=killed, hear=measured.hear, env=environment(gpu), hang=hang,
        )  # fmt: skip

    if not files:
        return Ending("done")
    ending = work(files)
    if book.planned is None and ending.status == "failed":  # one of the files kills whoever reads it: which?
        for file in files:
            before, book.planned = book.planned, None
            ending = work([file])
            if book.planned is None:
                book.errors[file.name] = ending.reason
            book.planned = {**(before or {}), **(book.planned or {})}
    settle(book, ending, measured)
    return ending


def settle(book: Journal, ending: Ending, measured: Measured) -> None:
    """A row for each planned key that has none, and for each file that could not be read."""
    for name, reason in book.errors.items():
        measured.add(row_of(f"{Path(name).name}/-/-/-/-/-", "failed", f"the file cannot be read: {reason}"))
    status, reason = "not reached", ending.reason
    if ending.status == "done":
        status, reason = "failed", "its process ended without a row; the log may say why"
    missing = [row_of(key, status, reason) for key in book.missing()]
    measured.rows |= {row.key: row for row in missing}
    if missing:
        measured.say(f"{len(missing)} rows {status}: {reason}")


def settled_row(line: Mapping[str, Any]) -> str | None:
    """The key that a line of a benchmark's journal settles."""
    return Row(**line["row"]).key if "row" in line else None


def progress_line(row: Row, rows: Mapping[str, Row]) -> str:
    """What the terminal says of a row: key, status, median and the ratio to torchvision, or the reason."""
    size = "" if row.size == "full" else f" ({row.size} size)"
    if row.median_us is None:
        return f"{row.key}  {row.status}{size}" + (f": {row.reason}" if row.reason else "")
    ratio = ratio_to_baseline(row, rows)
    return f"{row.key}  {duration(row.median_us)}{size}" + (f"  {ratio:.2f}x {BASELINE}" if ratio else "")


def ratio_to_baseline(row: Row, rows: Mapping[str, Row]) -> float | None:
    """How many times as fast as torchvision; None for torchvision itself or where one has no time."""
    base = rows.get(f"{row.contest}/{BASELINE}")
    if base is None or base.key == row.key or not base.median_us or not row.median_us:
        return None
    return base.median_us / row.median_us


def is_peer(row: Row) -> bool:
    """Whether the provider is somebody else's, whose failure is not ours."""
    return row.provider in ("torchvision", "torchvision-compile", "compile", "detectron2", "mmcv")


def table(rows: Sequence[Row]) -> str:
    """The rows as text, contest by contest, with the ratio to torchvision."""
    by_key = {row.key: row for row in rows}
    lines = []
    for contest in dict.fromkeys(row.contest for row in rows):
        lines.append(contest)
        for row in rows:
            if row.contest == contest:
                lines.append(f"  {row.provider:<14} {_result(row)}{_ratio(row, by_key)}")
    return "\n".join(lines)


def _result(row: Row) -> str:
    if row.median_us is None or row.p20_us is None or row.p80_us is None:
        return row.status + (f": {row.reason}" if row.reason else "")
    text = f"{duration(row.median_us):>9}  ({duration(row.p20_us)} to {duration(row.p80_us)})"
    if row.peak_mib is not None:
        text += f"  {row.peak_mib:.1f} MiB"
    return text


def _ratio(row: Row, rows: Mapping[str, Row]) -> str:
    ratio = ratio_to_baseline(row, rows)
    return f"  {ratio:.2f}x" if ratio else ""
