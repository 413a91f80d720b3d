"""Workers that crash, hang, lose their context or run out of time: every key is settled, and the run goes on.

The journal between a worker and its watcher survives a kill.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from bench.process import Ending, Journal, survive
from bench.result import Line

# A worker without torch, so that a death costs nothing: it does to each key what the key says.
WORKER = """
import json, os, signal, sys, time
journal, keys = sys.argv[1], sys.argv[2:]
print(os.getpid(), flush=True)
def write(line, end="\\n"):
    with open(journal, "a") as file:
        file.write(json.dumps(line) + end)
def lines():
    for text in open(journal) if os.path.exists(journal) else ():
        try: yield json.loads(text)
        except ValueError: pass
done = {line["key"] for line in lines() if "key" in line}
write({"plan": keys})
for key in keys:
    if key in done:
        continue
    write({"begin": key})
    write({"ran": key})
    if "segfault" in key: os.kill(os.getpid(), signal.SIGSEGV)
    if "hang" in key: time.sleep(60)
    if "cut" in key:
        write({"key": key}, end="")
        with open(journal, "r+b") as file: file.truncate(os.path.getsize(journal) - 5)
        os.kill(os.getpid(), signal.SIGKILL)
    if "lost" in key: os._exit(70)
    if "told" in key:
        write({"begin": keys[-1]})
        write({"key": key, "status": "failed", "reason": ""})
        os._exit(70)
    if "leaves" in key: os._exit(3)
    write({"key": key, "status": "passed", "reason": ""})
"""


class Outcome:
    """How a worker's run ended, its journal, and every line in order."""

    def __init__(self, folder: Path, *keys: str, worker: str = WORKER, stop: str = "", **limits: float) -> None:
        script = folder / "worker.py"
        script.write_text(worker)
        self.heard: list[Line] = []

        def hear(lines: list[Line]) -> None:
            self.heard += lines
            if {"ran": stop} in lines:
                raise KeyboardInterrupt  # as a signal's handler does

        self.journal = Journal(folder / "journal.jsonl")
        command = [sys.executable, str(script), str(self.journal.path), *keys]
        self.ending = survive(command, self.journal, hear=hear, **{"seconds": 30, "hang": 1} | limits)
        self.log = (folder / "journal.log").read_text()
        self.ran = [line["ran"] for line in self.heard if "ran" in line]
        killed = [line for line in self.journal.settled.values() if line["status"] == "killed"]
        self.killed = {line["key"]: line["reason"] for line in killed}


def test_it_goes_on_behind_whatever_dies(tmp_path: Path) -> None:
    keys = ["a", "segfault", "b", "hang", "lost", "c", "cut", "leaves", "d"]
    found = Outcome(tmp_path, *keys)
    assert found.ending == Ending("done")
    assert found.killed == {
        "segfault": "the process died of SIGSEGV",
        "hang": "no answer in 1 s",
        "lost": "the CUDA context was lost",
        "cut": "the process died of SIGKILL",
        "leaves": "the process ended with exit code 3",
    }
    assert found.journal.missing() == []
    assert found.ran == keys  # each once
    assert [line["key"] for line in found.heard if "key" in line] == keys


def test_a_worker_that_settles_a_key_before_it_leaves_takes_no_other_with_it(tmp_path: Path) -> None:
    """A timed contest has begun all its keys; the one that lost the context has its row already."""
    found = Outcome(tmp_path, "a", "told", "innocent")
    assert (found.ending.status, found.killed, found.journal.missing()) == ("done", {}, [])


def test_the_time_is_up(tmp_path: Path) -> None:
    start = time.monotonic()
    found = Outcome(tmp_path, "a", "hang", "b", seconds=1, hang=60)
    assert time.monotonic() - start < 10
    assert (found.ending, found.killed) == (Ending("stopped", "the time was up"), {})  # no proof that it hangs
    assert found.journal.missing() == ["hang", "b"]


def test_an_interrupt_ends_the_worker_and_keeps_what_it_has(tmp_path: Path) -> None:
    found = Outcome(tmp_path, "a", "hang", hang=30, stop="hang")
    assert found.ending == Ending("interrupted", "interrupted")
    assert (set(found.journal.settled), found.journal.missing()) == ({"a"}, ["hang"])
    with pytest.raises(ProcessLookupError):
        os.kill(int(found.log), 0)


LAST = "import sys; print('2 deselected'); print('no such thing: /a/b/thing.so', file=sys.stderr); sys.exit(1)"
WITHOUT_A_PLAN = {  # exit code 1 is also pytest's "a test failed"; what is said last stands last in the log
    LAST: "the process ended before it had a plan: no such thing",
    "import os; print('bad', flush=True); os.abort()": "the process died of SIGABRT before anything was measured: bad",
}


@pytest.mark.parametrize("worker", WITHOUT_A_PLAN)
def test_a_worker_that_cannot_begin_is_not_tried_for_ever(tmp_path: Path, worker: str) -> None:
    ending = Outcome(tmp_path, "a", worker=worker).ending
    assert ending.status == "failed"
    assert ending.reason.startswith(WITHOUT_A_PLAN[worker])
    assert "/a/b" not in ending.reason


def test_a_begun_key_may_ask_for_patience(tmp_path: Path) -> None:
    """Compiling a model is silent for minutes."""
    worker = WORKER.replace('write({"begin": key})', 'write({"begin": key, "patience": 9})').replace(
        "sleep(60)", "sleep(2)"
    )
    assert Outcome(tmp_path, "hang", worker=worker).killed == {}


@pytest.mark.parametrize("cut", [1, 20, 90])
def test_a_journal_cut_in_mid_line_is_read_and_goes_on(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "j"
    first, second, third = ({"key": str(i), "status": "wrong", "reason": "x" * 80} for i in range(3))
    Journal(path).write(first)
    Journal(path).write(second)
    path.write_bytes(path.read_bytes()[:-cut])
    # Without its newline alone the second line is whole as soon as another one follows.
    assert list(Journal(path).settled) == ["0"]
    Journal(path).write(third)
    assert list(Journal(path).settled.values()) == [first, *([second] if cut == 1 else []), third]


def test_a_journal_is_on_disk_at_once_and_read_as_it_grows(tmp_path: Path) -> None:
    journal, reader = Journal(tmp_path / "j"), Journal(tmp_path / "j")
    plan = {"plan": ["a", "b"], "errors": {"c": "no"}}
    for line in (plan, {"begin": "a", "patience": 400.0}, {"key": "a", "status": "failed"}):
        journal.write(line)
        assert reader.read() == [line]
    assert (reader.missing(), reader.errors, reader.patience) == (["b"], {"c": "no"}, 400.0)
    assert reader.guilty(left=False) is None


def test_without_a_path_nothing_is_written() -> None:
    journal = Journal(None)
    journal.write({"key": "a", "status": "wrong"})
    assert list(journal.settled) == ["a"]
