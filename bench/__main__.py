"""``python -m bench run | report | merge | show | cases | host``: what ``tmask bench`` and ``make gpu-report`` call."""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import result, tables
from bench.process import HANG_SECONDS
from bench.report import COMMIT, LOCAL, PARTS, RESULTS, Report, describe_machine, draw, files_of, publish, shown

INTERRUPTED = 130
PEERS = (
    "torchvision",
    "torchvision-compile",
    "compile",
    "detectron2",
    "mmcv",
    "pycocotools",
)  # their failure is not ours


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    options = parser().parse_args(arguments)
    try:
        code: int = options.command(options)
    except (OSError, ValueError) as error:
        print(f"python -m bench: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return code


def parser() -> argparse.ArgumentParser:
    """Return the options, which need nothing but Python."""
    top = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = top.add_subparsers(required=True)

    def command(function: Callable[[argparse.Namespace], int], budget: float | None = None) -> argparse.ArgumentParser:
        name = function.__name__.removesuffix("_command")
        sub = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        sub.set_defaults(command=function)
        if budget is not None:
            sub.add_argument("-k", dest="select", metavar="EXPRESSION", help="only what this pytest expression names")
            sub.add_argument("--budget", type=float, default=budget, metavar="SECONDS", help="of the whole call")
            sub.add_argument("--hang", type=float, default=HANG_SECONDS, metavar="SECONDS", help="of silence")
        return sub

    sub = command(run_command, math.inf)
    sub.add_argument("targets", nargs="*", help="op, model or all, or files of bench/cases by their names")
    sub.add_argument("--json", type=Path, default=LOCAL.parent / "bench" / "result.json", metavar="FILE")
    sub.add_argument("--charts", type=Path, metavar="DIR", help="draw charts into this folder")

    sub = command(report_command, 530)
    sub.add_argument("--only", type=_parts, default=list(PARTS), metavar="PART,..", help=f"of {', '.join(PARTS)}")
    sub.add_argument("--sweep", action="append", default=[], metavar="NAME", help="only this sweep; repeatable")
    sub.add_argument("--out", type=Path, metavar="DIR", help="where results are written; default: bench/results")
    sub.add_argument("--commit", metavar="SHA", help=f"of a copy without .git; or the variable {COMMIT}")
    sub.add_argument("--resume", type=Path, metavar="FILE", help="a result: what it has measured is not measured again")

    sub = command(merge_command)
    sub.add_argument("files", nargs="+", type=Path, metavar="FILE")
    sub.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")

    sub = command(show_command)
    sub.add_argument("file", nargs="?", type=Path, help="a result file; by default the newest of a GPU")
    sub.add_argument("--write-readme", action="store_true", help="put its table into README.md")
    sub.add_argument("--charts", type=Path, metavar="DIR", help="draw charts into this folder")

    command(cases_command)
    command(host_command)
    return top


def run_command(options: argparse.Namespace) -> int:
    """Measure benchmark files and print their rows."""
    machine = describe_machine(None)
    ops, model = files_of("ops"), files_of("model")
    known = {"all": [*ops, *model], "op": ops, "model": model, **{file.stem: [file] for file in ops}}
    for target in options.targets:
        if target not in known:
            raise ValueError(f"targets: expected some of {', '.join(known)}, got {target!r}")
    files = list(dict.fromkeys(file for target in options.targets or ["all"] for file in known[target]))
    print(f"{machine['device']}, torch {machine['versions']['torch']}, triton {machine['versions']['triton']}")
    work = LOCAL.parent / "bench"
    made = Report(now=result.empty(machine), path=options.json, work=work, hang=options.hang, select=options.select)
    whole = made.part("bench", files, options.budget)
    rows = result.rows(made.now)
    if whole and not rows:
        print(f"python -m bench: error: no benchmark is named by {options.select!r}", file=sys.stderr)
        return 2
    print("\n".join(tables.meaning(rows)))
    if options.charts:
        draw(options.json, options.charts)
    print(f"result: {shown(options.json)}")
    if not whole:
        return INTERRUPTED
    return int(any(row.status in ("wrong", "failed", "killed") and row.provider not in PEERS for row in rows))


def report_command(options: argparse.Namespace) -> int:
    """Prove everything that a GPU can prove of this commit, in parts, into one result file."""
    machine = describe_machine(options.commit)
    out = options.out or (RESULTS if machine["gpu"] else LOCAL)
    path = result.place(out, machine)
    now = result.empty(machine)
    for file in (options.resume, path):
        if file is not None and file.exists():
            now = result.merge(result.load(file), now)
    if machine["gpu"] is None:
        print("No GPU: this rehearses the report and says what it cannot measure.")
    work = LOCAL if out == RESULTS else out / "work"
    made = Report(now=now, path=path, work=work, hang=options.hang, select=options.select, sweeps=options.sweep)
    made.resume = options.resume is not None
    whole = made.run(["sweep"] if options.sweep else options.only, options.budget)
    publish(path)
    return 0 if whole else INTERRUPTED


def host_command(options: argparse.Namespace) -> int:
    """Print what a call of each op costs on the host, without a GPU."""
    from bench import host

    for line in host.report():
        print(line)
    return 0


def merge_command(options: argparse.Namespace) -> int:
    """Put result files of one commit and machine together, the later over the earlier."""
    merged, *others = map(result.load, options.files)
    path = result.place(options.out, merged["machine"])
    for other in others:
        merged = result.merge(merged, other)
    result.save(path, result.merge(result.load(path), merged) if path.exists() else merged)
    publish(path)
    return 0


def show_command(options: argparse.Namespace) -> int:
    """Print a result file as Markdown."""
    path = options.file or tables.newest(RESULTS)
    found = None if path is None else result.load(path)
    if options.write_readme:
        block = tables.readme_block(found, path)
        tables.README.write_text(tables.replace_table(tables.README.read_text(), "bench", block))
    print(tables.readme_block(None) if found is None else tables.markdown(found), end="")
    if options.charts and path is not None:
        draw(path, options.charts, lambda text: print(text, file=sys.stderr))
    return 0


def cases_command(options: argparse.Namespace) -> int:
    """Print every case: the work, its least bytes and flops in bf16, its floor on an H100, and the aim."""
    from bench.cases import CASES

    print("\n".join(line for case in CASES.values() for line in tables.case_lines(case)))
    return 0


def _parts(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if part not in PARTS:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(PARTS)}, got {part!r}")
    return parts


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
