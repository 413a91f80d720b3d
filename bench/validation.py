"""`tmask validate` op by op in a process that may die: ``python -m bench.validation --journal FILE`` is the worker."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import context
from bench.process import CONTEXT_LOST, Ending, Journal, Line, survive
from bench.rows import clean, read_lines
from bench.run import environment


def run_validation(
    journal: Path, *, seconds: float, gpu: bool, hang: float, say: Callable[[str], None] = print
) -> tuple[Ending, list[dict[str, Any]]]:
    """Compare every op with its float64 reference; how it ended, and the rows."""
    book = Journal(journal, settled_op)
    rows: list[dict[str, Any]] = []

    def hear(lines: list[Line]) -> None:
        for line in lines:
            if "validation" in line:
                rows.extend(line["rows"])
                say(_summary(line["validation"], line["rows"]))

    def killed(op: str, reason: str) -> Line:
        return {"validation": op, "rows": [_failed(op, reason)]}

    command = [sys.executable, "-m", "bench.validation", "--journal", str(journal)]
    ending = survive(command, book, seconds=seconds, killed=killed, hear=hear, env=environment(gpu), hang=hang)
    if ending.status != "done":
        say(f"{len(book.missing())} ops not validated: {ending.reason}")
    return ending, rows


def settled_op(line: Line) -> str | None:
    """The op that a line of the journal settles."""
    return line.get("validation")


def _summary(op: str, rows: list[dict[str, Any]]) -> str:
    failed = [row for row in rows if row["verdict"] == "fail"]
    words = [f"{row['backend']} {row['direction']} {row['dtype']}: {row['note'] or 'over tolerance'}" for row in failed]
    passed = sum(row["verdict"] == "pass" for row in rows)
    return f"{op}  {passed} right" + (f", {len(failed)} WRONG: {'; '.join(words)}" if failed else "")


def _failed(op: str, reason: str) -> dict[str, Any]:
    return {
        "op": op, "direction": "-", "backend": "-", "dtype": "-",
        "max_error": None, "tolerance": None, "verdict": "fail", "note": reason,
    }  # fmt: skip


def main() -> None:
    """The worker."""
    from bench.machine import device
    from tmask.validate import validate_op
    from tmask_kernels.testing import op_specs

    parser = argparse.ArgumentParser(prog="python -m bench.validation", description=run_validation.__doc__)
    parser.add_argument("--journal", type=Path, required=True)
    path = parser.parse_args().journal
    done = {line["validation"] for line in read_lines(path) if "validation" in line}
    book = Journal(path, settled_op)
    book.write({"plan": [check.name for check in op_specs()]})
    for check in op_specs():
        if check.name in done:
            continue
        book.write({"begin": check.name})
        try:
            rows = [dataclasses.asdict(row) for row in validate_op(check, device())]
        except Exception as error:  # the truth itself cannot be had; the other ops go on
            rows = [_failed(check.name, f"{type(error).__name__}: {error}")]
        for row in rows:
            row["note"] = clean(row["note"])
        book.write({"validation": check.name, "rows": rows})
        if any(row["verdict"] == "fail" for row in rows) and not context.lives():
            os._exit(CONTEXT_LOST)


if __name__ == "__main__":
    main()
