"""``python -m bench.ablate NAME``: what ``tmask ablate`` calls."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.ablate import table
from bench.ablate.plan import LOG, Plan, check_data, check_folder
from bench.ablate.report import MARKDOWN
from bench.ablate.runner import end_with_parent, held, run_table
from bench.rows import ROOT
from tmask.checks import nearest

USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a table, or start that in the background; gives the exit code."""
    options = parser().parse_args(arguments)
    if options.with_parent:
        end_with_parent()
    try:
        plan = plan_of(options)
        check_data(plan)
        check_folder(plan)
        return background(plan, options) if options.background else run_table(plan, say=say)
    except ValueError as error:
        print(f"tmask ablate: error: {error} (see tmask ablate --help)", file=sys.stderr)
        return USAGE
    except OSError as error:
        print(f"tmask ablate: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """The options of ``tmask ablate``, and what that adds."""
    options = argparse.ArgumentParser(prog="python -m bench.ablate", description=__doc__)
    options.add_argument("name", help=f"one of {', '.join(table.names())}")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--out", type=Path)
    options.add_argument("--coco", type=Path)
    options.add_argument("--backbone_weights", type=Path)
    options.add_argument("--background", action="store_true")
    options.add_argument("--with_parent", action="store_true", help="end when the calling process is gone")
    return options


def plan_of(options: argparse.Namespace) -> Plan:
    """Errors: ValueError for an unknown table or no seeds."""
    if options.name not in table.names():
        raise ValueError(f"unknown table {options.name!r}: expected {nearest(options.name, table.names())}")
    if options.seeds < 1:
        raise ValueError(f"--seeds: expected at least 1, got {options.seeds}")
    return Plan(
        name=options.name,
        table=table.load(options.name),
        out=(options.out or ROOT / "runs" / "ablate" / options.name).resolve(),
        seeds=options.seeds,
        coco=options.coco.resolve() if options.coco else None,
        backbone_weights=options.backbone_weights.resolve() if options.backbone_weights else None,
    )


def background(plan: Plan, options: argparse.Namespace) -> int:
    """Start the table in a session of its own, which outlives this terminal, and say how to follow and stop it."""
    with held(plan.out, say):
        pass  # nobody is at work there
    log = plan.out / LOG
    words = [plan.name, "--seeds", str(plan.seeds), "--out", str(plan.out)]
    words += ["--coco", str(plan.coco)] if plan.coco else []
    words += ["--backbone_weights", str(plan.backbone_weights)] if plan.backbone_weights else []
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.ablate", *words], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output,
            stderr=output, start_new_session=True,
        )  # fmt: skip
    say(f"in the background, process {process.pid}")
    say(f"follow: tail -f {log}")
    say(f"stop:   kill {process.pid}    what is done stays, and the same command goes on")
    say(f"table:  {plan.out / MARKDOWN}    after each run")
    return 0


def say(line: str) -> None:
    """At once, also into a file."""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
