"""``python -m bench.ablate NAME``: the process that ``tmask ablate`` starts."""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.ablate import table
from bench.ablate.report import MARKDOWN
from bench.ablate.runner import ROOT, end_with_parent, run_table
from bench.ablate.runs import LOG, Plan, check
from tmask.engine.files import held

say = functools.partial(print, flush=True)


def main(words: Sequence[str]) -> int:
    """Run a table, or start it in the background, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.ablate", description=__doc__)
    parser.add_argument("name", choices=table.names())
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--coco", type=Path)
    parser.add_argument("--backbone_weights", type=Path)
    parser.add_argument("--background", action="store_true", help="outlive this terminal")
    parser.add_argument("--with_parent", action="store_true", help="end as soon as the calling process is gone")
    options = vars(parser.parse_args(words))
    if options.pop("with_parent"):
        end_with_parent()
    in_background = options.pop("background")
    plan = Plan(table=table.load(options["name"]), **options)
    try:
        check(plan)
        if not in_background:
            return run_table(plan, say=say)
        with held(plan.out, "ablate"):  # no other process works there
            words = [sys.executable, "-m", "bench.ablate", *(word for word in words if word != "--background")]
            log = (plan.out / LOG).open("ab")
        with log:  # in a session of its own, which outlives this terminal
            process = subprocess.Popen(
                words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
    except ValueError as error:
        say(f"tmask ablate: error: {error} (see tmask ablate --help)", file=sys.stderr)
        return 2
    except OSError as error:
        say(f"tmask ablate: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    say(f"in the background, process {process.pid}")
    say(f"follow: tail -f {plan.out / LOG}")
    say(f"stop:   kill {process.pid}    what is done stays, and the same command goes on")
    say(f"table:  {plan.out / MARKDOWN}    after each run")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
