"""Trains the runs of a table one after another, and writes the table again after each."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from bench.ablate import report
from bench.ablate.runs import (
    BEGUN,
    BROKEN,
    DONE,
    FAILED,
    LOG,
    SETTINGS,
    TRAIN_LOG,
    TRAINED_BY,
    Plan,
    Run,
    check,
    prepare,
)
from bench.ablate.table import tables
from bench.machine import checkout
from bench.process import how_it_ended, last_words, start
from tmask.engine.files import CHECKPOINT_NAME, held, replace_text

TRAIN = (sys.executable, "-m", "tmask", "train")

Say = Callable[[str], object]
say = functools.partial(print, flush=True)


def main(words: Sequence[str]) -> int:
    """Run a table, or start it in the background, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.ablate")
    parser.add_argument("table", choices=tables())
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
    plan = Plan(**options | {"table": tables()[options["table"]]})
    try:
        check(plan)
        if not in_background:
            return run_table(plan)
        with held(plan.out, "ablate"):  # no other process works there
            (plan.out / LOG).touch()
        words = [sys.executable, "-m", "bench.ablate", *(word for word in words if word != "--background")]
        process = start(words, plan.out / LOG)  # in a session of its own, which outlives this terminal
    except ValueError as error:
        say(f"tmask ablate: error: {error} (see tmask ablate --help)", file=sys.stderr)
        return 2
    except OSError as error:
        say(f"tmask ablate: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    say(f"in the background, process {process.pid}")
    say(f"follow: tail -f {plan.out / LOG}")
    say(f"stop:   kill {process.pid}    what is done stays, and the same command goes on")
    say(f"table:  {plan.out / report.MARKDOWN}    after each run")
    return 0


def run_table(plan: Plan, *, command: Sequence[str] = TRAIN, say: Say = say) -> int:
    """Train every run that is not done yet with `command`, whose options are those of ``tmask train``.

    Returns:
        The exit code: 0, 1 if a run failed, or 128 plus the number of the signal that stopped the table.

    Raises:
        ValueError: Another process works in the folder.
    """
    runs = plan.runs()
    with held(plan.out, "ablate"), noted_signals() as signals:
        say(f"{plan.table.title}: {len(runs)} runs in {plan.out}")
        report.write(plan)  # first: from now on the folder is one of this table
        prepare(plan)
        for number, run in enumerate(runs, 1):
            wait_for(run.folder, signals, say)
            if run.state != DONE and not signals:
                name = f"[{number}/{len(runs)}] {plan.table.variants[run.variant].label}, seed {run.seed}"
                _train(plan, run, command, signals, lambda line, name=name: say(f"{name}: {line}"))
                report.write(plan)
    states = [run.state for run in runs]
    say(f"{states.count(DONE)} of {len(runs)} runs done, {states.count(BROKEN)} failed: {plan.out / report.MARKDOWN}")
    if signals:
        say("stopped; the same command goes on")
        return 128 + signals[0]
    return int(BROKEN in states)


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Within ``with``, SIGINT and SIGTERM only add their number to the list."""
    numbers: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, lambda number, _: numbers.append(number)) for kind in kinds]
    try:
        yield numbers
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


def wait_for(folder: Path, signals: Sequence[int], say: Say) -> None:
    """Wait until no training works in `folder`. A killed table leaves one that saves its last step before it ends."""
    told = False
    while not signals:
        with contextlib.suppress(ValueError), held(folder, "ablate"):
            return
        told = told or say("waiting for the training of a table that was killed to save and end") is None
        time.sleep(0.1)


def end_with_parent() -> None:
    """Linux sends this process SIGTERM as soon as its parent is gone, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def machine() -> str:
    """Device, torch and the commit of this checkout."""
    cpu = f"CPU, {len(os.sched_getaffinity(0))} cores"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return f"{device}, torch {torch.__version__}, commit {checkout()}"


def _train(plan: Plan, run: Run, command: Sequence[str], signals: Sequence[int], say: Say) -> None:
    """Train one run until it is done, fails, or has saved its checkpoint after a signal."""
    say("goes on from its checkpoint" if run.state == BEGUN else "begins")
    words = [*command, "--config", str(run.folder / SETTINGS), "--out", str(run.folder)]
    if (run.folder / CHECKPOINT_NAME).is_file():
        words += ["--resume", str(run.folder / CHECKPOINT_NAME)]
    (run.folder / FAILED).unlink(missing_ok=True)
    before, now = run.trained_by(), machine()
    if now not in before[-1:]:
        replace_text(run.folder / TRAINED_BY, "\n".join([*before, now]) + "\n")
    # In its own session, so that Ctrl-C in a terminal reaches the training once: through this process.
    process = start(words, run.folder / TRAIN_LOG, preexec_fn=end_with_parent)
    stopped = False
    while process.poll() is None:
        time.sleep(0.1)
        if signals and not stopped:
            say("stopping after this step")
            process.terminate()
            stopped = True
    if run.state == DONE:
        metric = plan.table.metrics[0]
        value = 100 * plan.metrics(run).get(metric, -1)
        say(f"{metric} {f'{value:.1f}' if value >= 0 else '-'} in {run.minutes() or 0:.0f} min")
    elif not stopped:
        reason = f"{how_it_ended(process.returncode)}: {last_words(run.folder / TRAIN_LOG)}"
        replace_text(run.folder / FAILED, reason + "\n")
        say(f"failed: {reason} ({run.folder / TRAIN_LOG})")
