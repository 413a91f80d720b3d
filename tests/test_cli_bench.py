"""`tmask bench`: what it passes on to the benchmarks, and how it ends with them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tmask import cli
from tmask.cli import bench as bench_cli

ROOT = Path(__file__).parents[1]

# In place of the benchmarks: says how it was called, and ends as it is told to. "slow" interrupts its caller.
STAND_IN = """
import json, os, signal, sys, time
print(json.dumps([sys.argv[1:], os.environ.get("CUDA_VISIBLE_DEVICES")]), flush=True)
if "slow" in sys.argv:
    signal.signal(signal.SIGINT, lambda *_: (print("so far: 3 rows", flush=True), os._exit(130)))
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(30)
sys.exit(1 if "wrong" in sys.argv else 0)
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose benchmarks are the stand-in, with the ops nms, slow and wrong."""
    (tmp_path / "bench" / "cases").mkdir(parents=True)
    (tmp_path / "bench" / "__init__.py").touch()  # without it any other `bench` on the path would come first
    (tmp_path / "bench" / "__main__.py").write_text(STAND_IN)
    for name in ("nms", "slow", "wrong", "_shared"):
        (tmp_path / "bench" / "cases" / f"{name}.py").touch()
    monkeypatch.setattr(bench_cli, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_passes_on_what_it_is_given(checkout: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["-k", "nms-1k and forward", "--json", "a.json", "--charts", "c", "--budget", "9", "--device", "cpu"]
    assert cli.main(["bench", "nms", "model", *options]) == 0
    words = ["run", "nms", "model", "--json", str(checkout / "a.json"), "--charts", str(checkout / "c")]
    words += ["-k", "nms-1k and forward", "--budget", "9.0"]
    assert capfd.readouterr().out == f"{[words, '']}\n".replace("'", '"')


def test_its_exit_code_is_theirs(checkout: Path) -> None:
    assert cli.main(["bench", "wrong", "--device", "cpu"]) == 1


def test_an_unknown_op_is_told_the_names(checkout: Path, capsys: Any) -> None:
    assert cli.main(["bench", "_shared", "--device", "cpu"]) == 2
    message = "unknown op '_shared': expected one of all, model, nms, op, slow, wrong (see tmask bench --help)\n"
    assert capsys.readouterr().err == f"tmask bench: error: {message}"


def test_an_interrupt_waits_for_what_was_measured(checkout: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "slow", "--device", "cpu"]) == 130
    out, err = capfd.readouterr()
    assert out.endswith("so far: 3 rows\n")
    assert err == "tmask bench: interrupted by SIGINT\n"


def test_without_a_checkout_it_says_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(bench_cli, "ROOT", tmp_path)
    assert cli.main(["bench"]) == 1
    message = "the benchmarks are in tmask's source, not in the installed package: run it in a checkout\n"
    assert capsys.readouterr().err == f"tmask bench: error: {message}"


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


@pytest.mark.slow
def test_an_op_without_a_gpu(tmp_path: Path) -> None:
    """The real thing: rows with their ratios, what the rows mean, JSON and charts, in less than 40 lines."""
    words = ["bench", "box_coding", "-k", "forward and not compile", "--json", "a.json", "--charts", "c"]
    words += ["--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "tmask", *words], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Reduced sizes, no GPU" in done.stdout
    assert "decode_boxes box-coding forward fp32 (reduced): triton right, torchvision " in done.stdout
    assert "  box-coding forward: the 17,638 boxes" in done.stdout
    assert len(done.stdout.splitlines()) < 40
    assert (tmp_path / "a.json").is_file()
    assert list((tmp_path / "c").glob("*.png"))
