"""Workers that may crash, hang or lose their GPU: each is watched, and after its end another goes on behind it.

A worker is a command that writes a journal (`bench.rows`): `plan` first, `begin` before each key, then a line that
settles it. Keys that the journal has settled it leaves out, so the same command again goes on where the last one died.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.rows import ROOT, clean

Line = dict[str, Any]

CONTEXT_LOST = 70  # the exit code of a worker whose CUDA context is gone: it can do nothing more
CONTEXT_WORDS = "the CUDA context was lost"
ENDED = (0, 1, 5)  # by itself: all passed, something failed, nothing selected (as pytest has it)
HANG_SECONDS = 60.0
START_SECONDS = 120.0  # until a process says its first word: it imports torch, perhaps from a cold disk


class Journal:
    """A worker's journal, read while it grows."""

    def __init__(self, path: Path, settles: Callable[[Line], str | None]) -> None:
        """`settles` gives the key that a line settles, None for other lines."""
        self.path = path
        self.settles = settles
        self.planned: dict[str, None] | None = None  # in order; None until a worker has said its plan
        self.errors: dict[str, str] = {}  # files that cannot even be read by a worker, and why
        self.known: list[str] = []  # what a worker could have planned, if it says so
        self.begun: str | None = None
        self.patience = 0.0  # seconds that what was begun may be silent for, if it says so
        self.settled: set[str] = set()
        self.last_settles = False
        self._offset = 0

    def read(self) -> list[Line]:
        """The whole lines that were added since the last call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        lines = []
        for text in whole.splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # cut by a kill
                lines.append(json.loads(text))
        for line in lines:
            self._note(line)
        return lines

    def write(self, line: Line) -> None:
        """Add a line of our own."""
        self.mend()
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def mend(self) -> None:
        """Close a last line that a kill has cut, so that the next one stands alone."""
        if not self.path.exists() or not self.path.stat().st_size:
            return
        with self.path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")

    def missing(self) -> list[str]:
        """Planned keys that nothing has settled."""
        return [key for key in self.planned or () if key not in self.settled]

    def _note(self, line: Line) -> None:
        if "plan" in line:
            self.planned = {**(self.planned or {}), **dict.fromkeys(line["plan"])}
            self.errors |= line.get("errors", {})
            self.known = line.get("known", [])
        elif "begin" in line:
            self.begun = line["begin"]
            self.patience = line.get("patience", 0.0)
        elif (key := self.settles(line)) is not None:
            self.settled.add(key)
        self.last_settles = self.settles(line) is not None

    def guilty(self, left: bool) -> str | None:
        """The key that took the process with it. `left`: the worker has seen it and settled it itself."""
        if self.begun in self.settled or (left and self.last_settles):
            return None
        return self.begun


@dataclass(frozen=True)
class Ending:
    """How the work came to its end: "done", "stopped" (no time left), "interrupted" or "failed", and why."""

    status: str
    reason: str = ""


def survive(
    command: Sequence[str],
    journal: Journal,
    *,
    seconds: float,
    killed: Callable[[str, str], Line],
    hear: Callable[[list[Line]], None],
    env: Mapping[str, str] | None = None,
    hang: float = HANG_SECONDS,
) -> Ending:
    """Run `command` again and again until it has ended by itself, or `seconds` are over.

    A key that took its process with it, or that said nothing for `hang` seconds, is settled with the line that
    `killed(key, reason)` gives. `hear` gets the new lines of the journal as they come. Output goes to a log beside the
    journal.
    """
    deadline = time.monotonic() + seconds
    log = journal.path.with_suffix(".log")
    journal.path.parent.mkdir(parents=True, exist_ok=True)
    try:
        hear(journal.read())  # what was settled before this call
        while True:
            if time.monotonic() >= deadline:
                return Ending("stopped", "the time was up")
            before = len(journal.settled)
            journal.mend()
            end = _watch(command, journal, log=log, env=env or {}, hang=hang, deadline=deadline, hear=hear)
            if end.status == "done" and journal.planned is None:
                return Ending("failed", f"the process ended before it had a plan: {last_words(log)}")
            if end.status != "failed":
                return end
            if (key := journal.guilty(end.reason == CONTEXT_WORDS)) is not None:
                journal.write(killed(key, end.reason))
                hear(journal.read())
            elif len(journal.settled) == before:
                return Ending("failed", f"{end.reason} before anything was measured: {last_words(log)}")
    except KeyboardInterrupt:
        return Ending("interrupted", "interrupted")


def _watch(
    command: Sequence[str],
    journal: Journal,
    *,
    log: Path,
    env: Mapping[str, str],
    hang: float,
    deadline: float,
    hear: Callable[[list[Line]], None],
) -> Ending:
    """One process, from its start to its end; "failed" if it crashed or hung."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **env}, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    heard, patience = time.monotonic(), max(hang, START_SECONDS)
    try:
        while process.poll() is None:
            if lines := journal.read():
                heard, patience = time.monotonic(), max(hang, journal.patience)
                hear(lines)
            if time.monotonic() >= deadline:
                return Ending("stopped", "the time was up")
            if time.monotonic() - heard > patience:
                return Ending("failed", f"no answer in {patience:g} s")
            time.sleep(0.05)
    finally:
        kill_group(process)
        hear(journal.read())
    return Ending("done") if process.returncode in ENDED else Ending("failed", _cause(process.returncode))


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and whatever it has started; it must lead its group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it; there is nothing more to do then
        process.wait(timeout=20)


def _cause(code: int) -> str:
    if code == CONTEXT_LOST:
        return CONTEXT_WORDS
    if code < 0:
        return f"the process died of {signal.Signals(-code).name}"
    return f"the process ended with exit code {code}"


def last_words(log: Path) -> str:
    """The last line of a log that says something, without names and paths of this machine."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip(" =-")] if log.exists() else []
    return clean(lines[-1]) if lines else "it said nothing"
