"""`tmask bench` and `tmask ablate`: what they pass on to the checkout, and how they end with it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tmask import cli
from tmask.cli import bench as bench_cli

ROOT = Path(__file__).parents[1]

# In place of benchmarks and ablations: says how it was called, and ends as it is told. "slow" interrupts its caller.
STAND_IN = """
import json, os, signal, sys, time
print(json.dumps([sys.argv[1:], os.environ.get("CUDA_VISIBLE_DEVICES")]), flush=True)
if "slow" in sys.argv:
    signal.signal(signal.SIGINT, lambda *_: (print("so far: 3 rows", flush=True), os._exit(130)))
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(30)
sys.exit(3 if "wrong" in sys.argv else 0)
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of the stand-in, with the ops nms, slow and wrong and the tables pooling and wrong."""
    bench = tmp_path / "bench"
    names = ["__init__", "cases/nms", "cases/slow", "cases/wrong", "cases/_shared", "ablate/__init__"]
    for name in names:  # without __init__.py another `bench` on the path would come first
        (bench / f"{name}.py").parent.mkdir(parents=True, exist_ok=True)
        (bench / f"{name}.py").touch()
    (bench / "ablate" / "tables.yaml").write_text("tables: {pooling: {}, wrong: {}}")
    for folder in (bench, bench / "ablate"):
        (folder / "__main__.py").write_text(STAND_IN)
    monkeypatch.setattr(bench_cli, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


PASSED_ON = {
    "bench nms model --json a.json --charts c --budget 9 -k 'nms-1k and forward'": (
        "run nms model --json {here}/a.json --charts {here}/c -k 'nms-1k and forward' --budget 9.0"
    ),
    "ablate pooling": "pooling --seeds 3 --out {here}/runs/ablate/pooling --with_parent",
    "ablate pooling --seeds 2 --out o --coco . --backbone_weights w.pth --background": (
        "pooling --seeds 2 --out {here}/o --coco {here} --backbone_weights {here}/w.pth --background"
    ),
}


@pytest.mark.parametrize(("words", "passed"), PASSED_ON.items())
def test_it_passes_on_what_it_is_given(
    words: str, passed: str, checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*shlex.split(words), "--device", "cpu"]) == 0
    assert json.loads(capfd.readouterr().out) == [shlex.split(passed.format(here=checkout)), ""]


@pytest.mark.parametrize("command", ["bench", "ablate"])
def test_its_exit_code_is_theirs(command: str, checkout: Path) -> None:
    assert cli.main([command, "wrong", "--device", "cpu"]) == 3


def test_an_unknown_op_is_told_the_names(checkout: Path, capsys: Any) -> None:
    assert cli.main(["bench", "_shared", "--device", "cpu"]) == 2
    message = "unknown op '_shared': expected one of all, model, nms, op, slow, wrong (see tmask bench --help)\n"
    assert capsys.readouterr().err == f"tmask bench: error: {message}"


def test_an_interrupt_waits_for_what_was_measured(checkout: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "slow", "--device", "cpu"]) == 130
    out, err = capfd.readouterr()
    assert out.endswith("so far: 3 rows\n")
    assert err == "tmask bench: interrupted by SIGINT\n"


@pytest.mark.parametrize(("words", "what"), [(["bench"], "benchmarks"), (["ablate", "focal"], "ablations")])
def test_without_a_checkout_it_says_where_they_are(
    words: list[str], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(bench_cli, "ROOT", tmp_path)
    assert cli.main(words) == 1
    message = f"the {what} are in tmask's source, not in the installed package: run it in a checkout\n"
    assert capsys.readouterr().err == f"tmask {words[0]}: error: {message}"


def test_a_missing_package_is_named(checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(bench_cli.importlib.util, "find_spec", lambda name: None if name == "pytest" else name)
    assert cli.main(["bench", "--device", "cpu"]) == 1
    assert capsys.readouterr().err == "tmask bench: error: the benchmarks need pytest: pip install 'tmask[dev]'\n"


def test_one_device_of_several_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "CUDA_VISIBLE_DEVICES" not in bench_cli.environment(torch.device("cuda"))
    assert bench_cli.environment(torch.device("cuda:1"))["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert bench_cli.environment(torch.device("cuda:1"))["CUDA_VISIBLE_DEVICES"] == "6"


def tmask(words: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the real command on the CPU in `folder`."""
    command = [sys.executable, "-m", "tmask", *shlex.split(words), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_an_op_without_a_gpu(tmp_path: Path) -> None:
    """The real thing: rows with their ratios, what the rows mean, JSON and charts, in less than 40 lines."""
    done = tmask("bench box_coding -k 'forward and not compile' --json a.json --charts c", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Reduced sizes, no GPU" in done.stdout
    assert "decode_boxes box-coding forward fp32 (reduced): triton right, torchvision " in done.stdout
    assert "  box-coding forward: the 17,638 boxes" in done.stdout
    assert len(done.stdout.splitlines()) < 40
    assert (tmp_path / "a.json").is_file()
    assert list((tmp_path / "c").glob("*.png"))


@pytest.mark.slow
def test_a_table_in_the_background_outlives_its_caller_and_can_be_stopped(tmp_path: Path) -> None:
    """The real thing, stopped before its first step: it says what it does, and a second one is refused meanwhile."""
    words = "ablate focal --out t --background"
    done = tmask(words, tmp_path, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    process = int(done.stdout.split("process ")[1].split()[0])
    assert f"stop:   kill {process}" in done.stdout
    log = tmp_path / "t" / "ablate.log"
    try:
        wait_for(lambda: "cross-entropy, seed 0: begins" in log.read_text())
        second = tmask(words, tmp_path, TRITON_INTERPRET="0")
        assert second.returncode == 2
        assert f"another tmask ablate (process {process} on" in second.stderr
    finally:
        os.kill(process, 15)
    wait_for(lambda: "stopped; the same command goes on" in log.read_text())
    assert "**Partial: 0 of 12 runs.**" in (tmp_path / "t" / "table.md").read_text()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)
