"""Workers that crash, hang, lose their context or run out of time: every key gets its row, and the run goes on."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench import result, run
from bench.__main__ import main
from bench.process import Ending, Journal, Line, survive
from bench.rows import ROOT, read_rows, row_of

# A worker without torch, so that a death costs nothing: it does to each key what the key's provider says.
WORKER = """
import json, os, signal, sys, time
journal, keys = sys.argv[1], sys.argv[2:]
def write(line, end="\\n"):
    with open(journal, "a") as file:
        file.write(json.dumps(line) + end)
def lines():
    for text in open(journal) if os.path.exists(journal) else ():
        try: yield json.loads(text)
        except ValueError: pass
done = {line["done"] for line in lines() if "done" in line}
write({"plan": keys})
for key in keys:
    if key in done:
        continue
    write({"begin": key})
    write({"ran": key})
    if "segfault" in key: os.kill(os.getpid(), signal.SIGSEGV)
    if "hang" in key: time.sleep(60)
    if "cut" in key:
        write({"done": key}, end="")
        with open(journal, "r+b") as file: file.truncate(os.path.getsize(journal) - 5)
        os.kill(os.getpid(), signal.SIGKILL)
    if "lost" in key: os._exit(70)
    if "told" in key:
        write({"begin": keys[-1]})
        write({"done": key})
        os._exit(70)
    if "leaves" in key: os._exit(3)
    write({"done": key})
"""


def outlive(
    tmp_path: Path, *keys: str, worker: str = WORKER, seconds: float = 30, hang: float = 1
) -> tuple[Ending, Journal, dict[str, str], list[Line]]:
    """How a worker's run ended, its journal, the keys that killed it with the reasons, and every line in order."""
    script = tmp_path / "worker.py"
    script.write_text(worker)
    journal = Journal(tmp_path / "journal.jsonl", lambda line: line.get("done"))
    reasons: dict[str, str] = {}
    heard: list[Line] = []

    def killed(key: str, reason: str) -> Line:
        reasons[key] = reason
        return {"done": key}

    command = [sys.executable, str(script), str(journal.path), *keys]
    ending = survive(command, journal, seconds=seconds, killed=killed, hear=heard.extend, hang=hang)
    return ending, journal, reasons, heard


def test_it_goes_on_behind_whatever_dies(tmp_path: Path) -> None:
    keys = ["a", "segfault", "b", "hang", "lost", "c", "cut", "leaves", "d"]
    ending, journal, reasons, heard = outlive(tmp_path, *keys)
    assert ending == Ending("done")
    assert reasons == {
        "segfault": "the process died of SIGSEGV",
        "hang": "no answer in 1 s",
        "lost": "the CUDA context was lost",
        "cut": "the process died of SIGKILL",
        "leaves": "the process ended with exit code 3",
    }
    assert journal.missing() == []
    assert [line["ran"] for line in heard if "ran" in line] == keys  # each once


def test_who_settles_a_key_before_it_leaves_takes_no_other_with_it(tmp_path: Path) -> None:
    """A timed contest has begun all its keys; the one that lost the context has its row already."""
    ending, journal, reasons, _ = outlive(tmp_path, "a", "told", "innocent")
    assert (ending.status, reasons, journal.missing()) == ("done", {}, [])


def test_a_journal_that_a_kill_has_cut_takes_more_lines(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text('{"done": "a"}\n{"done": "b')
    ending, journal, _, heard = outlive(tmp_path, "a", "b")
    assert (ending.status, journal.missing()) == ("done", [])
    assert [line["ran"] for line in heard if "ran" in line] == ["b"]


def test_the_time_is_up(tmp_path: Path) -> None:
    start = time.monotonic()
    ending, journal, reasons, _ = outlive(tmp_path, "a", "hang", "b", seconds=1, hang=60)
    assert time.monotonic() - start < 10
    assert (ending, reasons) == (Ending("stopped", "the time was up"), {})  # it hung for all we know, but was not told
    assert journal.missing() == ["hang", "b"]


def test_an_interrupt_ends_the_worker_and_keeps_what_it_has(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.replace("import json", "print(__import__('os').getpid(), flush=True)\nimport json", 1))
    journal = Journal(tmp_path / "journal.jsonl", lambda line: line.get("done"))

    def hear(lines: list[Line]) -> None:
        if {"ran": "hang"} in lines:
            raise KeyboardInterrupt  # as a signal's handler does

    command = [sys.executable, str(script), str(journal.path), "a", "hang"]
    ending = survive(command, journal, seconds=30, killed=lambda *_: {}, hear=hear, hang=30)
    assert ending == Ending("interrupted", "interrupted")
    assert (journal.settled, journal.missing()) == ({"a"}, ["hang"])
    with pytest.raises(ProcessLookupError):
        os.kill(int(journal.path.with_suffix(".log").read_text()), 0)


def test_a_worker_that_cannot_begin_is_not_tried_for_ever(tmp_path: Path) -> None:
    ending, _, _, _ = outlive(tmp_path, "a", worker="import sys; sys.exit('no such thing: /a/b/thing.so')")
    # Exit code 1 is also pytest's "a test failed".
    assert ending == Ending("failed", "the process ended before it had a plan: no such thing: thing.so")
    worker = "import os; print('bad driver at /a/b/thing.so', flush=True); os.abort()"
    ending, _, _, _ = outlive(tmp_path, "a", worker=worker)
    assert ending.status == "failed"
    assert ending.reason.startswith("the process died of SIGABRT before anything was measured: bad driver at ")
    assert "/a/b" not in ending.reason


# ---- benchmark files

CONFTEST = """
import bench.conftest, bench.machine
from bench.conftest import *
from bench.machine import Roofs
bench.machine.roofs = lambda: Roofs(10.0, 1.0, 1.0)
bench.conftest.roofs_json = lambda: vars(bench.machine.roofs())
"""
BENCH = """
import os, signal
import torch
from bench.contest import Contest
from bench.variants import variants
from bench.work import Work

def dies(x):
    os.kill(os.getpid(), signal.SIGSEGV)

def throws(x):
    raise RuntimeError("no such kernel")

@variants(cases=["W0", "none"], providers=["ours", "torchvision", "dies", "throws", "wrong"])
def test_add(case, mode, dtype, layout, provider, contest):
    contest(lambda: adding(case))

def adding(case):
    if case == "none":
        raise FileNotFoundError("no data")
    def check(out, truth):
        assert torch.equal(out, truth), "1 of 4 differ"
    return Contest(
        inputs=lambda: torch.ones(4),
        providers={
            "ours": lambda x: lambda: x + 1,
            "torchvision": lambda x: lambda: 1 + x,
            "dies": lambda x: lambda: dies(x),
            "throws": lambda x: lambda: throws(x),
            "wrong": lambda x: lambda: x + 2,
        },
        truth=lambda x: x + 1, check=check, work=Work(bytes=32, flops=4), size="reduced",
    )
"""


@dataclass
class Report:
    """What a report of the fake benchmarks left."""

    code: int
    path: Path
    journal: Path
    said: str

    @property
    def found(self) -> result.Result:
        return result.load(self.path)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """`report` without a GPU, of a file with a provider that dies and of one that cannot be imported."""
    folder = tmp_path_factory.mktemp("benches")
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "adding.py").write_text(BENCH)
    (folder / "broken.py").write_text("import no_such_package\n")
    files = [folder / "adding.py", folder / "broken.py"]
    out = folder / "out"
    words = ["report", "--only", "tests,ops,sweep", "--out", str(out), "--commit", "f" * 40, "--budget", "300"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(run, "files_of", lambda _: files)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        code = main(words)
    (path,) = out.glob("cpu-*/*.json")
    return Report(code, path, out / "work" / "ops.jsonl", said.getvalue())


def test_every_provider_has_its_row(reported: Report) -> None:
    log = reported.journal.with_suffix(".log").read_text()
    assert reported.code == 0, log
    rows = result.rows(reported.found)
    status = {row.key: (row.status, row.reason.partition(" assert")[0]) for row in rows}
    add = "add/W0/forward/fp32/-"
    assert status[f"{add}/ours"] == ("timed", ""), log
    assert status[f"{add}/torchvision"] == ("timed", "")
    assert status[f"{add}/dies"] == ("killed", "the process died of SIGSEGV")
    assert status[f"{add}/throws"] == ("failed", "RuntimeError: no such kernel")
    assert status[f"{add}/wrong"] == ("wrong", "1 of 4 differ")
    for provider in ("ours", "torchvision", "dies", "throws", "wrong"):
        assert status[f"add/none/forward/fp32/-/{provider}"] == ("failed", "FileNotFoundError: no data")
    assert status["broken.py/-/-/-/-/-"] == (
        "failed",
        "the file cannot be read: ModuleNotFoundError: No module named 'no_such_package'",
    )
    assert len(status) == 11
    assert reported.found["roofs"]["copy_gbps"] == 10.0
    keys = [row.key for row in read_rows(reported.journal)]
    assert len(keys) == len(set(keys)) == 10  # nothing twice
    for key, (how, _) in status.items():
        assert sum(line.startswith(f"{key}  ") for line in reported.said.splitlines()) == 1, (key, how)
    assert reported.said.count("x torchvision") == 1


def test_without_a_gpu_the_report_comes_to_its_honest_end(reported: Report) -> None:
    parts = reported.found["parts"]
    assert {part: entry["status"] for part, entry in parts.items()} == {
        "ops": "done",
        "tests": "skipped",
        "sweep": "skipped",
    }
    assert parts["tests"]["reason"].startswith("no GPU")
    assert reported.found["machine"]["gpu"] is None
    assert reported.path.parent.name.startswith("cpu-")
    assert reported.path.name.endswith("-fffffff.json")
    assert reported.path.with_suffix(".md").read_text().count("add") > 1


def test_a_result_names_neither_host_nor_path(reported: Report) -> None:
    for text in strings(reported.found):
        assert os.uname().nodename not in text
        assert not re.search(r"(^|[\s'\"(:=])/\w", text), text
        assert not any(str(path) in text for path in (ROOT, Path.home(), reported.path.parents[1]))


def test_the_table_shows_times_ratios_and_reasons(reported: Report) -> None:
    lines = run.table(result.rows(reported.found)).splitlines()
    first = lines.index("add/W0/forward/fp32/-")
    shown = {line.split()[0]: line for line in lines[first + 1 : first + 6]}
    assert shown["ours"].endswith("x")
    assert not shown["torchvision"].endswith("x")
    assert shown["dies"].endswith("killed: the process died of SIGSEGV")


def test_what_was_not_reached_says_so(tmp_path: Path) -> None:
    book = Journal(tmp_path / "j", run.settled_row)
    book.write({"plan": ["op/W1/forward/fp32/-/triton", "op/W1/forward/fp32/-/torchvision"]})
    book.write({"row": vars(row_of("op/W1/forward/fp32/-/triton", "failed", "broken"))})
    book.read()
    found = run.Measured(say=lambda _: None)
    run.settle(book, Ending("stopped", "the time was up"), found)
    assert [(row.provider, row.status, row.reason) for row in found.rows.values()] == [
        ("torchvision", "not reached", "the time was up")
    ]


# ---- result files


def timed(key: str, us: float) -> dict[str, Any]:
    return vars(row_of(key, "timed", "", median_us=us, p20_us=us, p80_us=us))


def described(**changed: Any) -> dict[str, Any]:
    return {"device": "NVIDIA H200", "gpu": "NVIDIA H200", "commit": "0123456789", "date": "2026-01-02"} | changed


def strings(value: Any) -> list[str]:
    """Every string in a JSON value, keys included."""
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in (key, *strings(item))]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


def test_two_calls_make_one_result(tmp_path: Path, capsys: Any) -> None:
    keys = [f"op/W{i}/forward/fp32/-/triton" for i in range(3)]
    first, second = result.empty(described()), result.empty(described(date="2026-01-03"))
    first["rows"] = [timed(keys[0], 1.0), timed(keys[1], 2.0)]
    first["roofs"] = {"copy_gbps": 4000.0}
    first["tests"] = [{"file": "a.py", "passed": 1, "status": "done"}]
    first["parts"] = {"ops": {"status": "stopped"}}
    second["rows"] = [timed(keys[0], 3.0), vars(row_of(keys[1], "not reached", "")), timed(keys[2], 4.0)]
    second["tests"] = [{"file": "a.py", "passed": 0, "status": "not reached"}]
    second["parts"] = {"tests": {"status": "done"}}
    for name, each in (("one.json", first), ("two.json", second)):
        result.save(tmp_path / name, each)
    assert main(["merge", str(tmp_path / "one.json"), str(tmp_path / "two.json"), "--out", str(tmp_path)]) == 0
    merged = result.load(tmp_path / "nvidia-h200" / "2026-01-02-0123456.json")
    assert {row.key: row.median_us for row in result.rows(merged)} == dict(zip(keys, (3.0, 2.0, 4.0), strict=True))
    assert merged["roofs"] == {"copy_gbps": 4000.0}
    assert [test["passed"] for test in merged["tests"]] == [1]
    assert set(merged["parts"]) == {"ops", "tests"}
    # The next call of this commit writes into the same file; another commit is refused.
    assert result.place(tmp_path, described(date="2026-02-01")).name == "2026-01-02-0123456.json"
    result.save(tmp_path / "other.json", result.empty(described(commit="fedcba9876")))
    assert main(["merge", str(tmp_path / "one.json"), str(tmp_path / "other.json"), "--out", str(tmp_path)]) == 2
    assert "commit is 'fedcba9876', expected '0123456789'" in capsys.readouterr().err


def test_a_file_that_is_no_result_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"schema": 0}')
    with pytest.raises(ValueError, match=r"a\.json: expected a result of schema 1"):
        result.load(tmp_path / "a.json")


def test_compiling_may_be_silent_for_longer(tmp_path: Path) -> None:
    from bench.contest import COMPILE_SECONDS, _begin

    book = Journal(tmp_path / "j", run.settled_row)
    for provider, patience in (("tmask-compile", COMPILE_SECONDS), ("triton", 0.0)):
        book.write(_begin(f"op/W0/forward/fp32/-/{provider}"))
        book.read()
        assert book.patience == patience
