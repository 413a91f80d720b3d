"""The parts of a report, one after another under a budget of time, written into the result file as they come.

Whatever a part meets, it is told in the result and the next part begins.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import gpu_tests, result, run, sweep, validation
from bench.process import Ending
from bench.result import Result
from bench.rows import ROOT, Journal, clean

RESULTS = ROOT / "bench" / "results"
LOCAL = ROOT / "runs" / "report"  # for what must not be committed: logs, and results of a machine without a GPU
COMMIT = "TMASK_COMMIT"  # names the commit of a copy without .git

# In this order, and of the time that is left each takes a share by its weight.
PARTS = {"validate": 1, "ops": 4, "tests": 3, "model": 4, "sweep": 2}
SAVE_SECONDS = 5.0
END_SECONDS = 20.0  # of the budget, for tables and charts


@dataclass(kw_only=True)
class Evidence:
    """A result in the making.

    `now`: the result so far; `path`: its file; `work`: the folder of journals and logs; `resume`: what `now` has
    measured already is not measured again; `select`: a ``-k`` expression of pytest.
    """

    now: Result
    path: Path
    work: Path
    hang: float
    resume: bool = False
    select: str | None = None
    say: Callable[[str], None] = print
    _saved: float = 0.0

    @property
    def gpu(self) -> bool:
        return self.now["machine"]["gpu"] is not None

    def take(self, part: str, seconds: float, measure: Callable[[float], Ending]) -> bool:
        """Run one part; whether to go on with the next."""
        self.say(f"\n{part}" + (f": at most {seconds:.0f} s" if math.isfinite(seconds) else ""))
        start = time.monotonic()
        try:
            ending = measure(seconds)
        except KeyboardInterrupt:
            ending = Ending("interrupted", "interrupted")
        except Exception as error:
            traceback.print_exc()
            ending = Ending("failed", f"{type(error).__name__}: {error}")
        self.close(part, ending, time.monotonic() - start)
        return ending.status != "interrupted"

    def close(self, part: str, ending: Ending, seconds: float = 0.0) -> None:
        """Note how a part ended."""
        status = "stopped" if ending.status == "interrupted" else ending.status
        reason = clean(ending.reason)
        self.now["parts"][part] = {"status": status, "seconds": round(seconds, 1), "reason": reason}
        self.say(f"{part}: {status} after {seconds:.0f} s" + (f": {reason}" if reason else ""))
        self.save()

    def save(self, *, every: float = 0.0) -> None:
        """Write the file, unless that was done less than `every` seconds ago."""
        if time.monotonic() - self._saved >= every:
            result.save(self.path, self.now)
            self._saved = time.monotonic()

    def journal(self, name: str) -> Path:
        """A fresh journal; the log that will stand beside it is fresh too."""
        journal = self.work / f"{name}.jsonl"
        self.work.mkdir(parents=True, exist_ok=True)
        for path in (journal, journal.with_suffix(".log")):
            path.unlink(missing_ok=True)
        return journal

    def add(self, **found: Any) -> None:
        """Put what was found into the result."""
        self.now = result.merge(self.now, {**result.empty(self.now["machine"]), **found})

    def rows(self, kind: str, name: str, measure: Callable[[Path, run.Measured], Ending]) -> Ending:
        """Measure rows of a `kind` ("rows" or "sweeps") of the result; `measure` gets a journal to fill."""
        path = self.journal(name)
        known = [row for row in result.rows(self.now, kind) if self.resume and row.status != "not reached"]
        journal = Journal(path)
        for row in known:
            journal.add(row)

        def store(measured: run.Measured, every: float = SAVE_SECONDS) -> None:
            self.add(**{"roofs": measured.roofs, kind: [asdict(row) for row in measured.rows.values()]})
            self.save(every=every)

        measured = run.Measured(say=self.say, changed=store, known=frozenset(row.key for row in known))
        try:
            return measure(path, measured)
        finally:
            store(measured, every=0.0)

    def benches(self, name: str, files: Sequence[Path], seconds: float) -> Ending:
        """Measure benchmark files."""
        if not files:
            return Ending("skipped", "there are no benchmark files")

        def measure(journal: Path, measured: run.Measured) -> Ending:
            deadline = time.monotonic() + seconds
            wanted = f"({self.select}) and " if self.select else ""
            ending = Ending("done")
            for select in (f"{wanted}not compile", f"{wanted}compile"):  # last what takes most of the time
                if ending.status == "done":
                    measured.known |= measured.rows.keys()  # said already
                    ending = run.run_benches(
                        files, journal, measured,
                        seconds=deadline - time.monotonic(), gpu=self.gpu, select=select, hang=self.hang,
                    )  # fmt: skip
            return ending

        return self.rows("rows", name, measure)

    def sweeps(self, names: Sequence[str], seconds: float) -> Ending:
        """Sweep launch configurations."""
        if not self.gpu:
            return Ending("skipped", "no GPU: a launch configuration has no time in Triton's interpreter")

        def measure(journal: Path, measured: run.Measured) -> Ending:
            return sweep.run_sweeps(names, journal, measured, seconds=seconds, gpu=self.gpu, hang=self.hang)

        return self.rows("sweeps", "sweep", measure)

    def tests(self, seconds: float) -> Ending:
        """Run the tests that can run on a GPU."""
        if not self.gpu:
            return Ending("skipped", "no GPU: `make test` runs these tests through Triton's interpreter")
        done = [
            test["file"] for test in self.now["tests"]
            if self.resume and test["status"] == "done" and test.get("select") in (None, self.select)
        ]  # fmt: skip
        files = gpu_tests.gpu_test_files(done)
        if not files:
            return Ending("done", "every file was done before")

        def store(tests: list[dict[str, Any]], every: float = SAVE_SECONDS) -> None:
            self.add(tests=[{**test, "select": self.select} for test in tests])
            self.save(every=every)

        # Twice the patience, as a test may compile a whole model.
        ending, tests = gpu_tests.run_tests(
            files, self.journal("tests"),
            seconds=seconds, gpu=True, hang=2 * self.hang, select=self.select, say=self.say, store=store,
        )  # fmt: skip
        store(tests, every=0.0)
        return ending

    def validate(self, seconds: float) -> Ending:
        """Compare every op with its float64 reference."""
        ending, rows = validation.run_validation(
            self.journal("validate"), seconds=seconds, gpu=self.gpu, hang=self.hang, say=self.say
        )
        self.add(validation=rows)
        return ending


def report(evidence: Evidence, parts: Sequence[str], sweeps: Sequence[str], budget: float) -> bool:
    """Take the named parts within `budget` seconds; whether none was interrupted."""
    deadline = time.monotonic() + budget - min(END_SECONDS, budget / 10)
    left = [part for part in PARTS if part in parts]
    measures: dict[str, Callable[[float], Ending]] = {
        "validate": evidence.validate,
        "ops": lambda seconds: evidence.benches("ops", run.files_of("ops"), seconds),
        "tests": evidence.tests,
        "model": lambda seconds: evidence.benches("model", run.files_of("model"), seconds),
        "sweep": lambda seconds: evidence.sweeps(sweeps, seconds),
    }
    while left:
        seconds = max(0.0, deadline - time.monotonic()) * PARTS[left[0]] / sum(PARTS[part] for part in left)
        part = left.pop(0)
        if not evidence.take(part, seconds, measures[part]):
            for each in left:
                evidence.close(each, Ending("stopped", "not reached: interrupted"))
            return False
    return True


def publish(path: Path, say: Callable[[str], None]) -> None:
    """The Markdown table and the charts beside a result file; what fails there is said and costs nothing else."""
    try:
        from bench.tables import markdown

        path.with_suffix(".md").write_text(markdown(result.load(path)), encoding="utf-8")
        say(f"table: {shown(path.with_suffix('.md'))}")
    except Exception as error:
        say(f"no table: {type(error).__name__}: {clean(str(error))}")
    draw(path, path.with_suffix(""), say)


def draw(path: Path, folder: Path, say: Callable[[str], None]) -> None:
    """The charts of a result file, into `folder`."""
    try:
        from bench.charts import charts

        for chart in charts(result.load(path), folder):
            say(f"chart: {shown(chart)}")
    except Exception as error:
        say(f"no charts: {type(error).__name__}: {clean(str(error))}")


def describe_machine(commit: str | None) -> dict[str, Any]:
    """`bench.machine.describe`, with the commit as given, or as the environment has it where there is no git.

    In a process of its own, so that this one holds no CUDA context. Errors: ValueError if that process fails.
    """
    code = "import json; from bench.machine import describe; print(json.dumps(describe()))"
    env = {**os.environ, "PYTHONPATH": run.environment(gpu=False)["PYTHONPATH"]}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"torch does not work here: {clean((done.stderr.splitlines() or ['it said nothing'])[-1])}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if found["commit"] is None:
        found["changed"] = None  # nobody knows
    found["commit"] = commit or found["commit"] or os.environ.get(COMMIT) or "unknown"
    return found


def shown(path: Path) -> Path:
    """A path as a reader in the checkout would write it."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
