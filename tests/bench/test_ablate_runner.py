"""The runs of a table, one after another: what is repeated, what goes on, what fails, and what stops it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from bench import machine
from bench.ablate import chart, runner
from bench.ablate.outcome import result, state, trained_by
from bench.ablate.plan import Plan, Run
from bench.ablate.runner import duration, held, run_table
from bench.ablate.table import Drawn, Setting, Table, Variant
from tests.bench.test_ablate import TABLE

ROOT = Path(__file__).parents[2]

# In place of the trainer: notes how it was called, makes a checkpoint of 2 steps, waits as the test wants, and ends.
# It would outlive a table that is killed neither for long, as it is told of that end, nor unseen, as it has the lock.
STAND_IN = """
import ctypes, json, os, pathlib, signal, sys, time
if sys.platform == "linux":
    told = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(told))  # PR_GET_PDEATHSIG
    assert told.value == signal.SIGTERM
    handles = [pathlib.Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    assert any(os.readlink(handle).endswith("/lock") for handle in handles if handle.is_symlink())
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = pathlib.Path(arguments["--out"])
with (out / "calls").open("a") as file:
    file.write(("resume" if "--resume" in arguments else "fresh") + "\\n")
def save():
    (out / "checkpoint.pt").write_text("2")
    (out / "log.jsonl").write_text(json.dumps({"step": 2, "seconds_per_step": 3.0}) + "\\n")
def stop(*_):
    save()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
assert "seed:" in pathlib.Path(arguments["--config"]).read_text()
wish = out.parent / "wish"  # of the test, for all seeds of a variant
if wish.exists() and wish.read_text() == "fail":
    print("tmask train: error: no memory", file=sys.stderr)
    sys.exit(1)
while wish.exists() and wish.read_text() == "wait":
    (out / "waits").touch()
    time.sleep(0.01)
save()
figure = 0.4 if "align" in str(out) else 0.3
(out / "metrics.json").write_text(json.dumps({"segm/AP75": figure, "bbox/AP": 0.5, "bbox/AP/disc": 0.1}))
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN)
    return [sys.executable, "-S", str(path)]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr(chart, "draw", lambda table, result, file: file.write(b"a chart"))  # which takes its time
    monkeypatch.setattr(runner, "machine", lambda: "CPU, 2 cores, torch 2.11.0, commit 0123456789")
    return Plan(name="pooling", table=TABLE, out=tmp_path / "out", seeds=2)


def wish(plan: Plan, variant: str, text: str | None) -> None:
    path = plan.out / variant / "wish"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text) if text else path.unlink()


def calls(plan: Plan) -> dict[str, list[str]]:
    files = {f"{run.variant}{run.seed}": run.folder / "calls" for run in plan.runs()}
    return {name: path.read_text().split() for name, path in files.items() if path.exists()}


def test_all_runs_are_done_once_and_the_table_is_written(plan: Plan, command: list[str]) -> None:
    said: list[str] = []
    assert run_table(plan, command=command, say=said.append) == 0
    assert calls(plan) == {name: ["fresh"] for name in ("pool0", "align0", "pool1", "align1")}
    begun = [line for line in said if line.endswith("begins")]
    assert [line.split(":")[0] for line in begun] == [
        "[1/4] RoIPool, seed 0", "[2/4] RoIAlign, seed 0", "[3/4] RoIPool, seed 1", "[4/4] RoIAlign, seed 1",
    ]  # fmt: skip
    assert "[2/4] RoIAlign, seed 0: segm/AP75 40.0 in 0 min, about 0 min left in all" in said
    text = (plan.out / "table.md").read_text()
    assert text.startswith("# Pool or align\n")
    assert "at least 2 standard errors" in text
    assert "| RoIAlign over RoIPool, segm/AP75 | +10.5 | +10.0 | 0.0 | came out |" in text
    assert (plan.out / "chart.png").is_file()
    found = json.loads((plan.out / "result.json").read_text())
    assert found["runs"][0] == {
        "variant": "pool", "seed": 0, "state": "done", "metrics": {"segm/AP75": 0.3, "bbox/AP": 0.5}, "minutes": 0.1,
        "trained_by": ["CPU, 2 cores, torch 2.11.0, commit 0123456789"],
    }  # fmt: skip

    assert run_table(plan, command=command, say=said.append) == 0
    assert set(map(tuple, calls(plan).values())) == {("fresh",)}, "a run was repeated"
    assert run_table(dataclasses.replace(plan, seeds=3), command=command, say=said.append) == 0
    assert (plan.out / "pool" / "seed-2" / "metrics.json").is_file()
    assert calls(plan)["pool0"] == ["fresh"]


def test_a_run_that_was_broken_off_goes_on(plan: Plan, command: list[str]) -> None:
    folder = plan.runs()[1].folder
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").write_text("1")
    (plan.out / "ablation.json").write_text(json.dumps(plan.record()))
    assert state(plan.runs()[1]) == "begun"
    said: list[str] = []
    assert run_table(plan, command=command, say=said.append) == 0
    assert calls(plan)["align0"] == ["resume"]
    assert "[2/4] RoIAlign, seed 0: goes on from its checkpoint" in said


def test_a_failed_run_is_shown_with_its_log_and_tried_again(plan: Plan, command: list[str]) -> None:
    wish(plan, "pool", "fail")
    said: list[str] = []
    assert run_table(plan, command=command, say=said.append) == 1
    assert [run["state"] for run in result(plan)["runs"]] == ["failed", "done", "failed", "done"]
    reason = "ended with exit code 1: tmask train: error: no memory"
    assert f"Failed**: RoIPool, seed 0: {reason} (`pool/seed-0/train.log`)" in (plan.out / "table.md").read_text()
    assert any(line.startswith(f"[1/4] RoIPool, seed 0: failed: {reason}") for line in said)
    wish(plan, "pool", None)
    assert run_table(plan, command=command, say=said.append) == 0
    assert calls(plan) == {"pool0": ["fresh"] * 2, "align0": ["fresh"], "pool1": ["fresh"] * 2, "align1": ["fresh"]}
    assert "Failed" not in (plan.out / "table.md").read_text()


def send(number: int, run: Run) -> None:
    """Send a signal to this process once a run is waiting."""

    def wait() -> None:
        end = time.monotonic() + 60
        while not (run.folder / "waits").exists():
            if time.monotonic() > end:
                return
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait, daemon=True).start()


def test_a_signal_lets_the_training_save_and_the_table_goes_on_later(
    plan: Plan, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wish(plan, "align", "wait")
    before = signal.getsignal(signal.SIGTERM)
    send(signal.SIGTERM, plan.runs()[1])
    said: list[str] = []
    assert run_table(plan, command=command, say=said.append) == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert [run["state"] for run in result(plan)["runs"]] == ["done", "begun", "waiting", "waiting"]
    assert "**Partial: 1 of 4 runs.**" in (plan.out / "table.md").read_text()
    assert said[-1] == "stopped; the same command goes on"
    wish(plan, "align", None)
    assert run_table(plan, command=command, say=said.append) == 0
    assert calls(plan)["align0"] == ["fresh", "resume"]
    assert all(len(run["trained_by"]) == 1 for run in result(plan)["runs"]), "the same, before and after a break"

    again = plan.runs()[1]
    (again.folder / "metrics.json").unlink()
    monkeypatch.setattr(runner, "machine", lambda: "a GPU")
    assert run_table(plan, command=command, say=said.append) == 0
    assert trained_by(again) == ["CPU, 2 cores, torch 2.11.0, commit 0123456789", "a GPU"]
    assert run_table(plan, command=command, say=said.append) == 0
    assert trained_by(plan.runs()[0]) == ["CPU, 2 cores, torch 2.11.0, commit 0123456789"], "who only looks trains not"


def test_two_at_work_on_a_folder_are_one_too_many(tmp_path: Path) -> None:
    at_work = pytest.raises(ValueError, match=rf"process {os.getpid()} is at work on it; kill {os.getpid()} stops it")
    with held(tmp_path, print), at_work, held(tmp_path, print):
        pass
    with held(tmp_path, print):  # free again
        pass


def test_the_training_of_a_killed_table_is_waited_for(tmp_path: Path) -> None:
    """It holds the lock that it has inherited, and the process whose number stands there is gone."""
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    with held(tmp_path, print) as lock:
        (tmp_path / "lock").write_text(str(gone.pid))
        training = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(0.3)"], pass_fds=(lock,))
    said: list[str] = []
    with held(tmp_path, said.append):
        assert training.poll() is not None or training.wait(0.1) == 0
    assert said == ["waiting for the training of a table that was killed to save and end"]


@pytest.mark.parametrize(
    ("head", "status", "words"),
    [
        ("0123456789abcdef", "", "0123456789"),
        ("0123456789abcdef", " M bench/rows.py", "0123456789 with changes"),
        (None, None, "unknown"),
    ],
)
def test_the_commit_in_words(head: str | None, status: str | None, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_git", lambda command, *_: {"rev-parse": head, "status": status}[command])
    assert machine.checkout() == words


def test_durations_in_words() -> None:
    assert [duration(seconds) for seconds in (29, 31, 3599, 7500)] == ["0 min", "1 min", "1 h 00 min", "2 h 05 min"]


# One table of a model so small that it learns nothing.
SMALL = {
    "min_size": 32, "max_size": 32, "fpn_channels": 8, "box_head_dim": 8, "mask_head_channels": 8,
    "mask_head_layers": 1, "box_batch_size": 8,
}  # fmt: skip
SCRIPT = """
import sys
from pathlib import Path
from bench.ablate.plan import Plan
from bench.ablate.runner import run_table
from tests.bench.test_ablate_runner import real_table
sys.exit(run_table(Plan(name="real", table=real_table(), out=Path(sys.argv[1]), seeds=1)))
"""


def real_table() -> Table:
    setting = Setting(
        preset="tiny",
        shapes=Drawn(variant="crossed", train_images=6, val_images=2, size=32),
        model=SMALL,
        train={"steps": 20, "batch_size": 2, "precision": "fp32", "log_every": 1, "checkpoint_every": 5},
        data={"num_workers": 0, "hflip": 0.0},
    )
    variants: dict[str, Any] = {
        "pool": Variant(label="pool", model={"roi_extractor": {"op": "roi_pool"}}),
        "align": Variant(label="align"),
    }
    return dataclasses.replace(TABLE, variants=variants, small=setting)


@pytest.mark.slow
def test_a_real_table_that_is_killed_ends_with_the_figures_of_one_that_is_not(tmp_path: Path) -> None:
    def start(name: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / name)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
        )  # fmt: skip

    whole = start("whole")
    said, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, said
    killed = start("killed")
    checkpoint = tmp_path / "killed" / "align" / "seed-0" / "checkpoint.pt"
    while killed.poll() is None and not checkpoint.exists():
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert not (checkpoint.parent / "metrics.json").exists(), "it was too late to kill it"
    again = start("killed")
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert "pool, seed 0: begins" not in said
    assert "align, seed 0: goes on from its checkpoint" in said
    for variant in ("pool", "align"):
        log, other = (
            [
                {name: value for name, value in json.loads(line).items() if name.startswith(("step", "loss"))}
                for line in (tmp_path / name / variant / "seed-0" / "log.jsonl").read_text().splitlines()
            ]
            for name in ("whole", "killed")
        )
        assert log == other
        metrics = [(tmp_path / name / variant / "seed-0" / "metrics.json").read_text() for name in ("whole", "killed")]
        assert metrics[0] == metrics[1]
