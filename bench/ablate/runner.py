"""One training after another, until all runs of a table are done, and the table anew after each."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from bench.ablate.outcome import (
    BEGUN,
    BROKEN,
    DONE,
    FAILED,
    TRAIN_LOG,
    TRAINED_BY,
    log_rows,
    machine,
    result,
    run_result,
    state,
    trained_by,
)
from bench.ablate.plan import LOCK, SETTINGS, Plan, Run, prepare
from bench.ablate.report import MARKDOWN, percent, write
from bench.process import last_words
from bench.rows import ROOT
from tmask.engine.files import replace_text
from tmask.engine.train import CHECKPOINT_NAME

TRAIN = (sys.executable, "-m", "tmask", "train")
PROGRESS_SECONDS = 60.0  # between lines about a run
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)

Say = Callable[[str], object]


def run_table(plan: Plan, *, command: Sequence[str] = TRAIN, say: Say = print) -> int:
    """Train what is not done yet; gives the exit code: 1 if a run failed, 128 + its number after a signal.

    `command` trains: it takes --config, --out and --resume as ``tmask train`` does.
    Errors: ValueError if another process is at work on the folder.
    """
    with held(plan.out, say) as lock, Stop() as stop:
        say(f"{plan.table.title}: {len(plan.runs())} runs in {plan.out}")
        prepare(plan)
        left = [run for run in plan.runs() if state(run) != DONE]
        clock = Clock(plan, left)
        write(plan, result(plan))
        for run in left:
            if stop.number is not None:
                break
            say(f"{_name(plan, run)}: {'goes on from its checkpoint' if state(run) == BEGUN else 'begins'}")
            _train(plan, run, command, lock=lock, stop=stop, clock=clock, say=say)
            write(plan, result(plan))
        found = [state(run) for run in plan.runs()]
    say(f"{found.count(DONE)} of {len(found)} runs done, {found.count(BROKEN)} failed: {plan.out / MARKDOWN}")
    if stop.number is not None:
        say("stopped; the same command goes on")
        return 128 + stop.number
    return int(BROKEN in found)


class Stop:
    """Within ``with``: the first SIGINT or SIGTERM is noted in ``.number``; others change nothing."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = self.number or number


@contextlib.contextmanager
def held(out: Path, say: Say) -> Iterator[int]:
    """Nobody else works on the folder in here. The file handle it gives keeps that up in whoever inherits it.

    So a training that outlived its table, which was killed, is waited for: two would write to one checkpoint.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = int(os.pread(lock, 20, 0) or 0)
            if owner and _alive(owner):
                raise ValueError(f"--out {out}: process {owner} is at work on it; kill {owner} stops it") from None
            say("waiting for the training of a table that was killed to save and end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield lock
    finally:
        os.close(lock)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def end_with_parent() -> None:
    """Let this process get SIGTERM when the one that started it is gone, be it by SIGKILL (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


class Clock:
    """What is left of the time, from the steps made since the table was started."""

    def __init__(self, plan: Plan, runs: Sequence[Run]) -> None:
        self.steps = {run: int(plan.configs(run.variant)["train"]["steps"]) for run in runs}
        self.before = {run: steps_of(run) for run in runs}
        self.start = time.monotonic()
        self.skipped: set[Run] = set()  # failed ones

    def left(self) -> str:
        """In words; empty before the first step."""
        now = {run: self.steps[run] if state(run) == DONE else steps_of(run) for run in self.steps}
        made = sum(now[run] - self.before[run] for run in now)
        rest = sum(self.steps[run] - now[run] for run in now if run not in self.skipped)
        return f", about {duration((time.monotonic() - self.start) / made * rest)} left in all" if made > 0 else ""


def steps_of(run: Run) -> int:
    """Steps that its log tells of."""
    return max((int(row["step"]) for row in log_rows(run.folder)), default=0)


def duration(seconds: float) -> str:
    """In hours and minutes."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def _train(plan: Plan, run: Run, command: Sequence[str], *, lock: int, stop: Stop, clock: Clock, say: Say) -> None:
    """One run to its end, good or bad; a signal lets its step end and its checkpoint be written."""
    name, start = _name(plan, run), time.monotonic()
    words = [*command, "--config", str(run.folder / SETTINGS), "--out", str(run.folder)]
    if (run.folder / CHECKPOINT_NAME).is_file():
        words += ["--resume", str(run.folder / CHECKPOINT_NAME)]
    (run.folder / FAILED).unlink(missing_ok=True)
    _note_machine(run)
    with (run.folder / TRAIN_LOG).open("ab") as log:
        # A session of its own: of Ctrl-C in a terminal it hears from here alone, once.
        process = subprocess.Popen(
            words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            pass_fds=(lock,), preexec_fn=end_with_parent,
        )  # fmt: skip
    told, stopped = time.monotonic(), False
    while process.poll() is None:
        time.sleep(0.1)
        if stop.number is not None and not stopped:
            say("stopping after this step")
            process.terminate()
            stopped = True
        if not stopped and time.monotonic() - told >= PROGRESS_SECONDS and (step := steps_of(run)):
            told = time.monotonic()
            say(f"{name}: step {step} of {clock.steps[run]}{clock.left()}")
    if state(run) == DONE:
        metric = plan.table.metrics[0]
        value = percent(run_result(run, plan)["metrics"].get(metric))
        say(f"{name}: {metric} {value} in {duration(time.monotonic() - start)}{clock.left()}")
    elif not stopped:
        reason = _reason(process.returncode, run.folder / TRAIN_LOG)
        replace_text(run.folder / FAILED, reason + "\n")
        clock.skipped.add(run)
        say(f"{name}: failed: {reason} ({run.folder / TRAIN_LOG})")


def _note_machine(run: Run) -> None:
    """Put down what trains it from here on."""
    before, now = trained_by(run), machine()
    if now not in before[-1:]:
        replace_text(run.folder / TRAINED_BY, "\n".join([*before, now]) + "\n")


def _reason(code: int, log: Path) -> str:
    cause = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"{cause}: {last_words(log)}"


def _name(plan: Plan, run: Run) -> str:
    number = plan.runs().index(run) + 1
    return f"[{number}/{len(plan.runs())}] {plan.table.variants[run.variant].label}, seed {run.seed}"
