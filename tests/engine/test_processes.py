"""What users rely on, shown on whole runs in processes of their own: a training can be repeated bit for bit, and no way
of ending it, a kill and a full disk among them, costs more than the steps since the last checkpoint. A prediction that
was killed goes on."""

import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.predictions import pictures
from tests.engine.toy import assert_same, logged, saved
from tmask.data.shapes import write_shapes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STEPS = 30
# 18 images: nine batches an epoch, so that updates of two batches stand across the borders of epochs.
OPTIONS = [
    *("--preset=tiny", "--model.min_size=64", "--model.max_size=64", "--model.fpn_channels=16", "--data.vflip=0.5"),
    *("--model.box_head_dim=16", "--model.mask_head_channels=16", "--model.box_batch_size=16"),
    *(f"--train.steps={STEPS}", "--train.batch_size=2", "--train.accumulate=2", "--train.ema_decay=0.9"),
    *("--train.optimizer=adamw", "--train.schedule=cosine", "--train.warmup_steps=5", "--train.precision=fp32"),
    *("--train.log_every=1", "--train.checkpoint_every=7"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    images, annotations = write_shapes(tmp_path_factory.mktemp("data"), num_images=18, seed=1, size=64)
    return [f"--data.train_images={images}", f"--data.train_annotations={annotations}"]


def start(argv: list[str]) -> subprocess.Popen[str]:
    """`tmask train` in a process group of its own, with the usual handling of Ctrl-C."""
    return subprocess.Popen(
        [sys.executable, "-m", "tmask", *argv],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )


def train_options(data: list[str], out: Path, num_workers: int) -> list[str]:
    return ["train", *data, *OPTIONS, f"--data.num_workers={num_workers}", "--out", str(out)]


def finish(argv: list[str]) -> None:
    process = start(argv)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


def steps_logged(out: Path) -> int:
    return max((row["step"] for row in logged(out)), default=0) if (out / "log.jsonl").is_file() else 0


def losses(out: Path) -> list[tuple[Any, ...]]:
    """All that a log says of each step but for times and memory."""
    changing = ("seconds_per_step", "images_per_second", "peak_memory_gib")
    return [tuple((k, v) for k, v in row.items() if k not in changing) for row in logged(out)]


def assert_same_run(out: Path, whole: Path) -> None:
    assert losses(out) == losses(whole)
    ours, theirs = (saved(folder) for folder in (out, whole))
    assert ours["step"] == STEPS
    assert_same(ours, theirs)


@pytest.fixture(scope="module")
def whole(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    finish(train_options(data, out, num_workers=0))
    return out


@pytest.mark.parametrize("num_workers", [0, 2])
def test_two_runs_are_the_same_bit_for_bit(data: list[str], whole: Path, tmp_path: Path, num_workers: int) -> None:
    finish(train_options(data, tmp_path / "again", num_workers))
    assert len(losses(whole)) == STEPS
    assert len(set(losses(whole))) == STEPS
    assert_same_run(tmp_path / "again", whole)
    average = saved(whole)
    assert not torch.equal(average["ema"]["fpn.lateral.0.weight"], average["model"]["fpn.lateral.0.weight"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_killed_run_goes_on_as_the_uninterrupted_one(
    data: list[str], whole: Path, tmp_path: Path, num_workers: int
) -> None:
    out = tmp_path / "killed"
    process = start(train_options(data, out, num_workers))
    wait_for(lambda: steps_logged(out) >= 17, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    kept = saved(out)
    assert kept["step"] == 14, "too slow to kill: the next checkpoint was already written"
    assert (kept["epoch"], kept["position"]) == (3, 1)  # in mid-epoch
    assert steps_logged(out) > 14
    finish(["train", "--config", str(out / "config.yaml"), "--out", str(out), "--resume", str(out / "checkpoint.pt")])
    assert losses(out)[14:24] == losses(whole)[14:24]  # the next ten
    assert_same_run(out, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_stopped_run_says_how_to_go_on(data: list[str], whole: Path, tmp_path: Path, number: signal.Signals) -> None:
    """The signal reaches the data workers too, as a terminal's Ctrl-C does."""
    out = tmp_path / "my run"
    process = start(train_options(data, out, num_workers=2))
    wait_for(lambda: steps_logged(out) >= 9, process)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    step = saved(out)["step"]
    assert step == steps_logged(out) >= 9
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    start_of_line, command = last.split(": tmask ", maxsplit=1)
    assert start_of_line == f"tmask train: interrupted by {number.name}; to go on from step {step}"
    words = shlex.split(command)
    assert words == ["train", "--config", f"{out}/config.yaml", "--out", str(out), "--resume", f"{out}/checkpoint.pt"]
    finish(words)
    assert_same_run(out, whole)


def test_a_full_disk_ends_the_run_and_not_the_checkpoint(data: list[str], whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "full"
    process = start(train_options(data, out, num_workers=0))
    wait_for(lambda: steps_logged(out) >= 8, process)  # the checkpoint of step 7 is there
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    path = out / "checkpoint.pt"
    reason = f"checkpoint {path}: cannot be written: File too large"
    lines = err.splitlines()
    again = ["train", "--config", str(out / "config.yaml"), "--out", str(out), "--resume", str(path)]
    failed = f"tmask train: error: step 14: {reason}; the last good one is of step 7"
    assert lines[-1] == f"{failed}; to go on from step 7: {shlex.join(['tmask', *again])}"
    assert "Traceback" not in err
    assert saved(out)["step"] == 7
    assert sorted(item.name for item in out.iterdir()) == ["checkpoint.pt", "config.yaml", "log.jsonl"]
    assert logged(out)[-1] == {"step": 14, "error": reason, "checkpoint_step": 7}
    finish(again)
    assert_same_run(out, whole)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_worker_that_is_killed_costs_no_step(data: list[str], whole: Path, tmp_path: Path, num_workers: int) -> None:
    """As the system kills one where memory is short."""
    out = tmp_path / "starved"
    process = start(train_options(data, out, num_workers))
    wait_for(lambda: steps_logged(out) >= 9, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in map(int, children) if b"tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    last = err.splitlines()[-1]
    assert "a data worker died, most likely as memory" in last
    assert f"the most effective first: --data.num_workers (now {num_workers}), --train.batch_size (now 2)" in last
    step, command = last.split("; to go on from step ")[1].split(": tmask ")
    assert int(step) == saved(out)["step"] >= 9
    finish(shlex.split(command))
    assert_same_run(out, whole)


def test_a_killed_prediction_goes_on(checkpoint: Path, images: list[Path], tmp_path: Path) -> None:
    folder, out, whole = images[0].parent, tmp_path / "out", tmp_path / "whole"
    for i in range(20):
        (folder / f"z{i}.png").write_bytes(images[0].read_bytes())
    command = ["predict", "--device=cpu", "--checkpoint", str(checkpoint), "--images", str(folder), "--out"]
    record = out / "predictions.jsonl"
    process = start([*command, str(out)])
    wait_for(lambda: record.exists() and record.read_bytes().count(b"\n") > 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert record.read_bytes().count(b"\n") < 24
    assert not (out / "predictions.json").exists()
    for place in (out, whole):
        finish([*command, str(place)])
    for name in ("predictions.json", "images.json", *(f"pictures/{name}" for name in pictures(whole))):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert not list(out.rglob(".*"))
