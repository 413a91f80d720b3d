"""Workers that may crash, hang or lose their GPU: each is watched, and after its end another goes on behind it.

A worker writes a journal, a file of JSON lines, so that a kill leaves everything before it:

    {"plan": [key, ...], "errors": {file: reason}}   what the worker is about to do, and the files it cannot read
    {"begin": key, "patience": seconds}              it starts on this key and may be silent for so long
    {"key": key, "status": ..., ...}                 it has settled the key
    {"roofs": {...}}                                 what the machine reached

A worker leaves out the keys that the journal has settled, so the same command goes on where the last worker died.
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

from bench.result import ROOT, Line, clean

CONTEXT_LOST = 70  # the exit code of a worker whose CUDA context is gone
CONTEXT_WORDS = "the CUDA context was lost"
ENDED = (0, 1, 5)  # pytest: all passed, something failed, nothing selected
HANG_SECONDS = 60.0
START_SECONDS = 120.0  # until a process says its first word: it imports torch, perhaps from a cold disk


class Journal:
    """A journal, written by a worker and read by its watcher while it grows; without a path nothing is written."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.planned: dict[str, None] | None = None  # in order; None until a worker has said its plan
        self.errors: dict[str, str] = {}
        self.begun: str | None = None
        self.patience = 0.0
        self.settled: dict[str, Line] = {}
        self.last_settles = False
        self._offset = 0
        self.read()

    def read(self) -> list[Line]:
        """Return the whole lines that were added since the last call."""
        if self.path is None or not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        lines = []
        for text in whole.splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # empty, or a kill has cut the line
                lines.append(json.loads(text))
        for line in lines:
            self._note(line)
        return lines

    def write(self, line: Line) -> None:
        """Add a line. It begins with a line break: a kill may have cut the line before it."""
        self._note(line)
        if self.path is not None:
            with self.path.open("ab") as file:
                file.write(f"\n{json.dumps(line)}\n".encode())

    def missing(self) -> list[str]:
        """Return the planned keys that nothing has settled."""
        return [key for key in self.planned or () if key not in self.settled]

    def _note(self, line: Line) -> None:
        self.last_settles = "key" in line
        if "plan" in line:
            self.planned = {**(self.planned or {}), **dict.fromkeys(line["plan"])}
            self.errors |= line.get("errors", {})
        elif "begin" in line:
            self.begun, self.patience = line["begin"], line.get("patience", 0.0)
        elif "key" in line:
            self.settled[line["key"]] = dict(line)

    def guilty(self, left: bool) -> str | None:
        """Return the key that took the process with it. `left`: the worker saw it and settled the key itself."""
        return None if self.begun in self.settled or (left and self.last_settles) else self.begun


@dataclass(frozen=True)
class Ending:
    """How the work ended: "done", "stopped" (no time left), "interrupted", "skipped" or "failed", and why."""

    status: str
    reason: str = ""


def survive(
    command: Sequence[str],
    journal: Journal,
    *,
    seconds: float,
    hear: Callable[[list[Line]], None],
    env: Mapping[str, str] | None = None,
    hang: float = HANG_SECONDS,
) -> Ending:
    """Run `command` again and again until it has ended by itself, or `seconds` are over.

    A key that took its process with it, or that said nothing for `hang` seconds, is settled as "killed". `hear` gets
    the new lines of the journal as they come. Output goes to a log beside the journal.
    """
    assert journal.path is not None
    deadline = time.monotonic() + seconds
    log = journal.path.with_suffix(".log")
    full = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}  # what is said last stands last in the log

    def watch() -> Ending:
        """Watch one process from its start to its end; "failed" if it crashed or hung."""
        process = start(command, log, env=full)
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
            _kill_group(process)
            hear(journal.read())
        if process.returncode in ENDED:
            return Ending("done")
        lost = process.returncode == CONTEXT_LOST
        return Ending("failed", CONTEXT_WORDS if lost else f"the process {how_it_ended(process.returncode)}")

    try:
        while time.monotonic() < deadline:
            before = len(journal.settled)
            end = watch()
            if end.status == "done" and journal.planned is None:
                return Ending("failed", f"the process ended before it had a plan: {last_words(log)}")
            if end.status != "failed":
                return end
            if (key := journal.guilty(end.reason == CONTEXT_WORDS)) is not None:
                journal.write({"key": key, "status": "killed", "reason": end.reason})
                hear(journal.read())
            elif len(journal.settled) == before:
                return Ending("failed", f"{end.reason} before anything was measured: {last_words(log)}")
    except KeyboardInterrupt:
        return Ending("interrupted", "interrupted")
    return Ending("stopped", "the time was up")


def start(command: Sequence[str], log: Path, **options: Any) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own that adds its output to `log`."""
    with log.open("ab") as out:
        return subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, **options
        )


def how_it_ended(code: int) -> str:
    """Return the exit code of a process in words."""
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a process, which leads its group, and whatever it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it; there is nothing more to do then
        process.wait(timeout=20)


def last_words(log: Path) -> str:
    """Return the last line of a log that says something, without names and paths of this machine."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip(" =-")] if log.exists() else []
    return clean(lines[-1]) if lines else "it said nothing"
