"""``python -m bench run | report | merge``: what ``tmask bench`` and ``make gpu-report`` call."""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import evidence, result, run
from bench.evidence import LOCAL, PARTS, RESULTS, Evidence, report, shown
from bench.process import HANG_SECONDS
from bench.rows import ROOT, clean

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit code."""
    options = parser().parse_args(arguments)
    try:
        code: int = options.command(options)
    except ValueError as error:
        print(f"python -m bench: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return code


def parser() -> argparse.ArgumentParser:
    """The options, which need nothing but Python."""
    top = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = top.add_subparsers(required=True)

    def command(name: str, function: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        sub.set_defaults(command=function)
        return sub

    def common(sub: argparse.ArgumentParser, budget: float | None) -> None:
        sub.add_argument("-k", dest="select", metavar="EXPRESSION", help="only what this pytest expression names")
        sub.add_argument("--budget", type=float, default=budget, metavar="SECONDS", help="of the whole call")
        sub.add_argument(
            "--hang", type=float, default=HANG_SECONDS, metavar="SECONDS", help="of silence: then it hangs"
        )

    sub = command("run", run_command)
    sub.add_argument("targets", nargs="*", help="op, model or all, or files of bench/ops by their names")
    sub.add_argument("--json", type=Path, default=LOCAL.parent / "bench" / "result.json", metavar="FILE")
    sub.add_argument("--charts", type=Path, metavar="DIR", help="draw charts into this folder")
    common(sub, None)

    sub = command("report", report_command)
    sub.add_argument("--only", type=_parts, default=list(PARTS), metavar="PART,..", help=f"of {', '.join(PARTS)}")
    sub.add_argument("--sweep", action="append", metavar="NAME", help="only this sweep; may be given again")
    sub.add_argument("--out", type=Path, metavar="DIR", help="where results are written; default: bench/results")
    sub.add_argument("--commit", metavar="SHA", help=f"of a copy without .git; or the variable {evidence.COMMIT}")
    sub.add_argument("--resume", type=Path, metavar="FILE", help="a result: what it has measured is not measured again")
    common(sub, 530)

    sub = command("merge", merge_command)
    sub.add_argument("files", nargs="+", type=Path, metavar="FILE")
    sub.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    return top


def run_command(options: argparse.Namespace) -> int:
    """Measure benchmark files and show a table."""
    machine = evidence.describe_machine(None)
    files = files_of(options.targets)
    print(f"{machine['device']}, torch {machine['versions']['torch']}, triton {machine['versions']['triton']}")
    if machine["gpu"] is None:
        print(
            "No GPU. Not measured here: times of Triton kernels (they are checked through Triton's interpreter), peak "
            "memory, and anything at full size. Times below are this CPU's, of smaller cases."
        )
    now = Evidence(
        now=result.empty(machine), path=options.json, work=LOCAL.parent / "bench", hang=options.hang,
        select=options.select,
    )  # fmt: skip
    whole = now.take("bench", options.budget or math.inf, lambda seconds: now.benches("bench", files, seconds))
    rows = result.rows(now.now)
    if whole and not rows:
        print(f"python -m bench: error: no benchmark is named by {options.select!r}", file=sys.stderr)
        return 2
    if machine["gpu"] is None:
        print(f"\nThe least that the work costs, counted; what a floor is: docs/performance.md\n{_attempt(_counted)}")
        print(f"\nKernels compiled for sm_90, found / target; others: docs/compile-budgets.md\n{_attempt(_budgets)}")
    print(f"\n{run.table(rows)}")
    if options.charts:
        evidence.draw(options.json, options.charts, print)
    print(f"\nresult: {shown(options.json)}")
    if not whole:
        return INTERRUPTED
    broken = [row for row in rows if row.status in ("wrong", "failed", "killed") and not run.is_peer(row)]
    for row in broken:
        print(f"{row.key}: {row.status}: {row.reason}", file=sys.stderr)
    return int(bool(broken))


def report_command(options: argparse.Namespace) -> int:
    """Everything that a GPU can prove of this commit, in parts, into one result file."""
    machine = evidence.describe_machine(options.commit)
    out = options.out or (RESULTS if machine["gpu"] else LOCAL)
    path = result.place(out, machine)
    now = result.empty(machine)
    for file in (options.resume, path):
        if file is not None and file.exists():
            now = result.merge(checked(file, machine), now)
    if machine["gpu"] is None:
        print("No GPU: this goes through the motions and says what it cannot measure.")
    work = LOCAL if out == RESULTS else out / "work"
    made = Evidence(
        now=now, path=path, work=work, hang=options.hang, resume=options.resume is not None, select=options.select
    )
    parts = ["sweep"] if options.sweep else options.only
    whole = report(made, parts, options.sweep or [], options.budget)
    evidence.publish(path, print)
    print(f"result: {shown(path)}")
    return 0 if whole else INTERRUPTED


def merge_command(options: argparse.Namespace) -> int:
    """Put result files of one commit and machine together, the later over the earlier."""
    first = result.load(options.files[0])
    path = result.place(options.out, first["machine"])
    merged = first
    for file in options.files[1:]:
        merged = result.merge(merged, checked(file, first["machine"]))
    if path.exists():
        merged = result.merge(checked(path, first["machine"]), merged)
    result.save(path, merged)
    evidence.publish(path, print)
    print(f"result: {shown(path)}")
    return 0


def checked(file: Path, machine: dict[str, Any]) -> result.Result:
    """A result to merge with one of `machine`. Errors: ValueError for another device or other code."""
    found = result.load(file)
    for name in ("device", "commit", "changed"):
        if found["machine"].get(name) != machine.get(name):
            raise ValueError(f"{file}: {name} is {found['machine'].get(name)!r}, expected {machine.get(name)!r}")
    return found


def files_of(targets: Sequence[str]) -> list[Path]:
    """The benchmark files of `targets`; of none, all. Errors: ValueError for an unknown one."""
    ops, model = run.files_of("ops"), run.files_of("model")
    known = {"all": [*ops, *model], "op": ops, "model": model, **{file.stem: [file] for file in ops}}
    for target in targets:
        if target not in known:
            raise ValueError(f"targets: expected some of {', '.join(known)}, got {target!r}")
    return list(dict.fromkeys(file for target in targets or ["all"] for file in known[target]))


def _parts(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if part not in PARTS:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(PARTS)}, got {part!r}")
    return parts


def _counted() -> str:
    from bench.counted import table

    return aligned(table())


def _budgets() -> str:
    lines = (ROOT / "docs" / "compile-budgets.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("|")]
    return aligned("\n".join([*rows[:2], *(row for row in rows if "| sm_90 |" in row)]))


def aligned(markdown: str) -> str:
    """A table of Markdown for a terminal: columns as wide as their cells, without bars."""
    lines = [line for line in markdown.splitlines() if line.startswith("|") and line.strip("|-: ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _attempt(make: Callable[[], str]) -> str:
    """A table, or why there is none."""
    try:
        return make()
    except Exception as error:
        return f"not shown: {type(error).__name__}: {clean(str(error))}"


def _stop(number: int, frame: Any) -> None:
    """End cleanly, with what was measured so far; a second signal does not interrupt that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr] - rows are to be seen as they come
    sys.exit(main())
