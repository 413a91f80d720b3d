"""Folders that one command at a time writes to."""

import fcntl
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.engine.predictions import make_model
from tests.engine.toy import CPU, command, files
from tmask.config import DataConfig, TrainConfig
from tmask.data.coco import CocoDataset
from tmask.engine.files import held
from tmask.engine.train import train

WAY_OUT = "is at work in this folder; wait for its end or stop it, or choose another folder"


def holder(name: str) -> str:
    return f"another tmask {name} (process {os.getpid()} on {platform.node()}) {WAY_OUT}"


@pytest.mark.usefixtures("data")
def test_one_training_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither beside another, nor beside a prediction, and none that goes on or begins anew."""
    assert command("train") == 0
    before = files("out")
    for name in ("train", "predict"):
        for how in (["--overwrite"], ["--resume", "out/checkpoint.pt"]):
            capsys.readouterr()
            with held("out", name):
                assert command("train", *how) == 1
            assert capsys.readouterr().err == f"tmask train: error: out: {holder(name)}\n"
    with held("out", "train"):
        assert command("predict", "--checkpoint", "out/checkpoint.pt") == 1
        assert "another tmask train" in capsys.readouterr().err
    assert files("out") == before


def test_a_run_that_came_while_the_data_were_opened_is_not_removed(data: tuple[Path, Path]) -> None:
    Path("out").mkdir()
    Path("out/checkpoint.pt").write_bytes(b"a run")
    config, options = TrainConfig(steps=1, batch_size=2, precision="fp32"), DataConfig(num_workers=0)
    with pytest.raises(ValueError, match="--out out holds a checkpoint; go on with --resume"):
        train(
            make_model().config, config, options, CocoDataset(*data), None, out_dir="out", device=CPU, overwrite=False
        )
    assert Path("out/checkpoint.pt").read_bytes() == b"a run"


def test_a_folder_that_stays_empty_goes_again(tmp_path: Path) -> None:
    with held(tmp_path / "a" / "b", "train"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with held(tmp_path / "a" / "b", "train"):
        (tmp_path / "a" / "file").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]
    with held(tmp_path / "a", "train"):
        pass
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


def test_a_lock_ends_with_its_block_whatever_ends_that(tmp_path: Path) -> None:
    (tmp_path / ".tmask.lock").touch()  # a killed process leaves it, and it holds nobody up
    with pytest.raises(KeyError), held(tmp_path, "predict"):
        raise KeyError
    said = re.escape(f"{tmp_path}: {holder('predict')}")
    with held(tmp_path, "predict"), pytest.raises(ValueError, match=said), held(tmp_path, "predict"):
        pass
    with held(tmp_path, "predict"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_was_let_go_in_between_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file is gone, so a third process would make one of its own."""
    flock = fcntl.flock

    def late(file: Any, how: int) -> None:
        (tmp_path / ".tmask.lock").unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(ValueError, match="another tmask command is at work"), held(tmp_path, "predict"):
        pass


HOLDER = """
import os, sys, time
from tmask.engine.files import held
with held(sys.argv[1], "train"):
    child = os.fork()  # as a data worker, which ends seconds after its parent
    if child:
        print(child, flush=True)
    time.sleep(100)
"""


def test_a_kill_frees_the_folder_at_once(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    said = rf"another tmask train \(process {process.pid} on"
    try:
        time.sleep(0.2)  # in which the child gets to its sleep
        with pytest.raises(ValueError, match=said), held(tmp_path, "train"):
            pass
        process.kill()
        process.wait()
        os.kill(child, 0)  # lives
        with held(tmp_path, "train"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()
