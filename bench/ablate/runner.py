"""Trains the runs of a table one after another, and writes the table again after each."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from bench.ablate import report
from bench.ablate.runs import BEGUN, BROKEN, DONE, FAILED, SETTINGS, TRAIN_LOG, TRAINED_BY, Plan, Run, prepare
from bench.machine import checkout
from bench.process import last_words
from tmask.engine.files import CHECKPOINT_NAME, held, replace_text

ROOT = Path(__file__).parents[2]
TRAIN = (sys.executable, "-m", "tmask", "train")
PROGRESS_SECONDS = 60.0  # between two lines about one run

Say = Callable[[str], object]


def run_table(plan: Plan, *, command: Sequence[str] = TRAIN, say: Say = print) -> int:
    """Train every run that is not done yet with `command`, whose options are those of ``tmask train``.

    Returns:
        The exit code: 0, 1 if a run failed, or 128 plus the number of the signal that stopped the table.

    Raises:
        ValueError: Another process works in the folder.
    """
    runs = plan.runs()
    with held(plan.out, "ablate"), noted_signals() as signals:
        say(f"{plan.table.title}: {len(runs)} runs in {plan.out}")
        prepare(plan)
        report.write(plan)
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


def duration(seconds: float) -> str:
    """Hours and minutes in words."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def _left(plan: Plan) -> str:
    """The time left for the whole table, from the pace so far; "" before the first step. Failed runs do not count."""
    made = missing = seconds = 0.0
    for run in plan.runs():
        steps, took = run.clock()
        made, seconds = made + steps, seconds + took
        missing += _steps(plan, run) - steps if run.state not in (DONE, BROKEN) else 0
    return f", about {duration(seconds / made * missing)} left in all" if made else ""


def _steps(plan: Plan, run: Run) -> int:
    return int(plan.configs(run.variant)["train"]["steps"])


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
    start = told = time.monotonic()
    with (run.folder / TRAIN_LOG).open("ab") as log:
        # In its own session, so that Ctrl-C in a terminal reaches the training once: through this process.
        process = subprocess.Popen(
            words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            preexec_fn=end_with_parent,
        )  # fmt: skip
    stopped = False
    while process.poll() is None:
        time.sleep(0.1)
        if signals and not stopped:
            say("stopping after this step")
            process.terminate()
            stopped = True
        if not stopped and time.monotonic() - told >= PROGRESS_SECONDS and (steps := run.clock()[0]):
            told = time.monotonic()
            say(f"step {steps} of {_steps(plan, run)}{_left(plan)}")
    if run.state == DONE:
        metric = plan.table.metrics[0]
        value = 100 * plan.metrics(run).get(metric, -1)
        say(f"{metric} {f'{value:.1f}' if value >= 0 else '-'} in {duration(time.monotonic() - start)}{_left(plan)}")
    elif not stopped:
        code = process.returncode
        cause = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        reason = f"{cause}: {last_words(run.folder / TRAIN_LOG)}"
        replace_text(run.folder / FAILED, reason + "\n")
        say(f"failed: {reason} ({run.folder / TRAIN_LOG})")
