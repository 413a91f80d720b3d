"""Many launch configurations of one kernel, beside each other: ``python -m bench.sweep [NAME ..]`` is the worker.

A file of ``bench/ops`` may hold ``SWEEPS: dict[str, Callable[[], Contest]]``; the providers of such a contest are
launch configurations. They pass the same gate and the same clock as everything else, and one that does not compile, is
wrong or kills its process is a row.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from bench.process import CONTEXT_LOST, Ending, survive
from bench.process import Journal as Book
from bench.rows import ROOT, Journal, clean, row_of
from bench.run import Measured, environment, settle, settled_row

if TYPE_CHECKING:
    from bench.contest import Contest

# So many are timed in turn with one another. What died with its process is timed again, hence not all of them at once.
TOGETHER = 16


def run_sweeps(
    names: Sequence[str], journal: Path, measured: Measured, *, seconds: float, gpu: bool, hang: float
) -> Ending:
    """Sweep the named kernels, all of them if none is named, into `measured`."""
    book = Book(journal, settled_row)
    ending = survive(
        [sys.executable, "-m", "bench.sweep", *names, "--journal", str(journal)], book,
        seconds=seconds, killed=lambda key, reason: {"row": asdict(row_of(key, "killed", reason))},
        hear=measured.hear, env=environment(gpu), hang=hang,
    )  # fmt: skip
    settle(book, ending, measured)
    if book.planned is not None and not book.planned:
        known = ", ".join(book.known) or "none yet"
        return Ending("failed", f"no sweep {' '.join(names)}: the files of bench/ops hold {known}")
    return ending


def find_sweeps(folder: Path = ROOT / "bench" / "ops") -> tuple[dict[str, Callable[[], Contest]], dict[str, str]]:
    """The sweeps of all files by name, and the files that cannot be imported with the reasons."""
    sweeps: dict[str, Callable[[], Contest]] = {}
    errors = {}
    for file in sorted(folder.glob("[!_]*.py")):
        try:
            sweeps |= getattr(importlib.import_module(f"bench.ops.{file.stem}"), "SWEEPS", {})
        except Exception as error:
            errors[file.name] = clean(f"{type(error).__name__}: {error}")
    return sweeps, errors


def sweep(name: str, contest: Contest, journal: Journal) -> None:
    """Gate and time every configuration of one contest. Errors: ContextLostError."""
    from bench.contest import compare

    keys = [key_of(name, configuration) for configuration in contest.providers]
    left = [key for key in keys if key not in journal.rows]
    for first in range(0, len(left), TOGETHER):
        compare(contest, left[first : first + TOGETHER], journal)


def key_of(name: str, configuration: str) -> str:
    """The row of one configuration. Errors: ValueError for a name with a slash, which parts a key."""
    if "/" in name + configuration:
        raise ValueError(f"a sweep's name and its configurations hold no slash, got {name!r}, {configuration!r}")
    return f"sweep {name}/-/-/-/-/{configuration}"


def main() -> None:
    """The worker."""
    parser = argparse.ArgumentParser(prog="python -m bench.sweep", description=run_sweeps.__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--journal", type=Path, required=True)
    options = parser.parse_args()

    from bench.contest import ContextLostError
    from bench.machine import roofs_json

    journal = Journal(options.journal)
    sweeps, errors = find_sweeps()
    contests = {}
    for name in options.names or sweeps:
        if name in sweeps:
            try:
                contests[name] = sweeps[name]()
            except Exception as error:
                errors[name] = clean(f"{type(error).__name__}: {error}")
    plan = [key_of(name, each) for name, contest in contests.items() for each in contest.providers]
    journal.write({"plan": plan, "errors": errors, "known": sorted(sweeps)})
    if plan:
        journal.write({"roofs": roofs_json()})
    for name, contest in contests.items():
        try:
            sweep(name, contest, journal)
        except ContextLostError:
            os._exit(CONTEXT_LOST)


if __name__ == "__main__":
    main()
