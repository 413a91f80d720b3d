"""The parts of a run, one after another under a budget of time, written into the result file as they come.

Whatever a part meets is told in the result, and the next part begins.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import result, tables
from bench.process import HANG_SECONDS, Ending, Journal, survive
from bench.result import ROOT, Line, Result, Row, clean

RESULTS = ROOT / "bench" / "results"
LOCAL = ROOT / "runs" / "report"  # logs, and results of a machine without a GPU
COMMIT = "TMASK_COMMIT"  # names the commit of a copy without .git

# In this order; each part takes a share of the time that is left by its weight.
PARTS = {"ops": 4, "tests": 4, "model": 4, "sweep": 2}
SAVE_SECONDS = 5.0
END_SECONDS = 20.0  # of the budget, for tables and charts

# The first files of a folder: their kernels are furthest from their aims, and the time may be up before the end.
FIRST = ("roi_align", "nms", "proposals", "box_coding", "inference", "test_every_op", "test_roi_align", "test_nms")
PLACES = {
    "ops": ["bench/cases"],
    "tests": [
        "tests/test_validate.py",
        "tests/gpu",
        "tests/kernels",
        "tests/model/test_torchvision_parity.py",
        "tests/engine/test_resume.py",
    ],
    "model": ["bench/model"],
    "sweep": ["bench/sweep.py"],
}
# A mutant is a broken kernel: it proves the power of a test, which needs no GPU.
TEST_OPTIONS = ("-p", "bench.conftest", "-m", "not compile_only and not slow")


def files_of(part: str) -> list[Path]:
    """Return the pytest files of a part."""
    rank = {name: i for i, name in enumerate(FIRST)}
    files = []
    for place in PLACES[part]:
        pattern = "test_*.py" if part == "tests" else "[!_]*.py"
        found = [ROOT / place] if place.endswith(".py") else (ROOT / place).rglob(pattern)
        files += sorted(filter(Path.exists, found), key=lambda file: (rank.get(file.stem, len(FIRST)), file))
    return files


@dataclass(kw_only=True)
class Report:
    """A result in the making.

    `now`: the result so far; `path`: its file; `work`: the folder of journals and logs; `resume`: what `now` has
    measured is not measured again; `select`: a ``-k`` expression of pytest; `sweeps`: only these.
    """

    now: Result
    path: Path
    work: Path
    hang: float = HANG_SECONDS
    resume: bool = False
    select: str | None = None
    sweeps: Sequence[str] = ()
    say: Callable[[str], None] = print
    _saved: float = field(default=0.0, init=False)

    @property
    def gpu(self) -> bool:
        return self.now["machine"]["gpu"] is not None

    def run(self, parts: Sequence[str], budget: float) -> bool:
        """Take the named parts within `budget` seconds; return whether none was interrupted."""
        deadline = time.monotonic() + budget - min(END_SECONDS, budget / 10)
        left = [part for part in PARTS if part in parts]
        while left:
            seconds = max(0.0, deadline - time.monotonic()) * PARTS[left[0]] / sum(PARTS[part] for part in left)
            part = left.pop(0)
            if not self.part(part, files_of(part), seconds):
                for each in left:
                    self.end(each, Ending("stopped", "not reached: interrupted"), 0.0)
                return False
        return True

    def part(self, part: str, files: Sequence[Path], seconds: float) -> bool:
        """Run one part; return whether to go on with the next."""
        self.say(f"\n{part}" + (f": at most {seconds:.0f} s" if math.isfinite(seconds) else ""))
        start = time.monotonic()
        try:
            if part in ("tests", "sweep") and not self.gpu:
                ending = Ending("skipped", "no GPU: Triton's interpreter is no timing, and `make test` runs the tests")
            elif not files:
                ending = Ending("skipped", "there are no files")
            else:
                ending = self.measure(part, files, seconds)
        except KeyboardInterrupt:
            ending = Ending("interrupted", "interrupted")
        except Exception as error:
            traceback.print_exc()
            ending = Ending("failed", f"{type(error).__name__}: {error}")
        self.end(part, ending, time.monotonic() - start)
        return ending.status != "interrupted"

    def end(self, part: str, ending: Ending, seconds: float) -> None:
        """Note how a part ended."""
        status = "stopped" if ending.status == "interrupted" else ending.status
        reason = clean(ending.reason)
        result.add(self.now, "parts", [{"key": part, "status": status, "seconds": round(seconds, 1), "reason": reason}])
        self.say(f"{part}: {status} after {seconds:.0f} s" + (f": {reason}" if reason else ""))
        self.save()

    def save(self, *, every: float = 0.0) -> None:
        """Write the file, unless that was done less than `every` seconds ago."""
        if time.monotonic() - self._saved >= every:
            result.save(self.path, self.now)
            self._saved = time.monotonic()

    def measure(self, part: str, files: Sequence[Path], seconds: float) -> Ending:
        """Run the pytest files of a part in workers. Every planned key has a line in the end, which may say why not."""
        tests = part == "tests"
        name = "tests" if tests else "rows"
        path = self.work / f"{part}.jsonl"
        self.work.mkdir(parents=True, exist_ok=True)
        for old in (path, path.with_suffix(".log")):
            old.unlink(missing_ok=True)
        journal = Journal(path)
        for line in self.now[name] if self.resume else ():
            if line["status"] != "not reached":
                journal.write(line)
        journal.read()
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        command += ["--journal", str(path), *map(str, files)]
        command += TEST_OPTIONS if tests else [f"--sweep={sweep}" for sweep in self.sweeps]
        deadline = time.monotonic() + seconds
        ending = Ending("done")
        for select in ["not mutant"] if tests else ["not compile", "compile"]:  # last what takes most of the time
            if ending.status == "done":
                wanted = f"({self.select}) and {select}" if self.select else select
                ending = survive(
                    [*command, "-k", wanted],
                    journal,
                    seconds=deadline - time.monotonic(),
                    hear=lambda lines: self.hear(name, journal, lines),
                    env=environment(self.gpu),
                    hang=self.hang * (2 if tests else 1),  # a test may compile a whole model
                )
        self.settle(name, journal, ending)
        return ending

    def hear(self, name: str, journal: Journal, lines: Sequence[Line]) -> None:
        """Put the lines of a journal into the result; say complete contests and failed tests."""
        settled = [line for line in lines if "key" in line]
        for line in lines:
            self.now["roofs"] = line.get("roofs", self.now["roofs"])
        result.add(self.now, name, settled)
        for line in settled if name == "tests" else ():
            if line["status"] not in ("passed", "skipped"):
                self.say(f"{line['key']}  {line['status']}: {line['reason']}")
        for contest in dict.fromkeys(line["key"].rpartition("/")[0] for line in settled if name == "rows"):
            keys = [key for key in journal.planned or () if key.rpartition("/")[0] == contest]
            if keys and all(key in journal.settled for key in keys):
                self.say(tables.contest_line([Row(**journal.settled[key]) for key in keys]))
        self.save(every=SAVE_SECONDS)

    def settle(self, name: str, journal: Journal, ending: Ending) -> None:
        """Add a line for each planned key that has none, and for each file that could not be read."""
        rest = "" if name == "tests" else "/-/-/-/-/-"
        for file, error in journal.errors.items():
            key, reason = Path(file).name + rest, clean(f"the file cannot be read: {error}")
            result.add(self.now, name, [{"key": key, "status": "failed", "reason": reason}])
            self.say(f"{key}: {reason}")
        status, reason = "not reached", clean(ending.reason)
        if ending.status == "done":
            status, reason = "failed", "its process ended without a result; the log may say why"
        missing = journal.missing()
        result.add(self.now, name, [{"key": key, "status": status, "reason": reason} for key in missing])
        if missing:
            self.say(f"{len(missing)} {name} {status}: {reason}")


def environment(gpu: bool) -> dict[str, str]:
    """Return the variables of every worker: the checkout on its path, Triton compiled on a GPU alone."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "TRITON_INTERPRET": "0" if gpu else "1", "PYTHONFAULTHANDLER": "1"}


def describe_machine(commit: str | None) -> dict[str, Any]:
    """Return `bench.machine.describe`, from a process of its own, so that this one holds no CUDA context.

    Without git the commit is `commit`, or the environment has it. Errors: ValueError if that process fails.
    """
    code = "import json; from bench.machine import describe; print(json.dumps(describe()))"
    env = {**os.environ, "PYTHONPATH": environment(gpu=False)["PYTHONPATH"]}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"torch does not work here: {clean((done.stderr.splitlines() or ['it said nothing'])[-1])}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if found["commit"] is None:
        found["changed"] = None  # nobody knows
    found["commit"] = commit or found["commit"] or os.environ.get(COMMIT) or "unknown"
    return found


def publish(path: Path) -> None:
    """Write the Markdown table and the chart beside a result file; a failure there is said and costs nothing else."""
    try:
        path.with_suffix(".md").write_text(tables.markdown(result.load(path)), encoding="utf-8")
        print(f"table: {shown(path.with_suffix('.md'))}")
    except Exception as error:
        print(f"no table: {type(error).__name__}: {clean(str(error))}")
    draw(path, path.with_suffix(""))
    print(f"result: {shown(path)}")


def draw(path: Path, folder: Path, say: Callable[[str], None] = print) -> None:
    """Draw the chart of a result file into `folder`."""
    try:
        from bench import charts

        if chart := charts.draw(result.load(path), folder):
            say(f"chart: {shown(chart)}")
    except Exception as error:
        say(f"no chart: {type(error).__name__}: {clean(str(error))}")


def shown(path: Path) -> Path:
    """Return a path as a reader in the checkout would write it."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
