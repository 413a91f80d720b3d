"""Folders that one command at a time writes to."""

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.bad_inputs import COMMANDS
from tests.engine.predictions import make_model
from tmask import cli
from tmask.config import DataConfig, TrainConfig
from tmask.data.coco import CocoDataset
from tmask.data.shapes import write_shapes
from tmask.engine.files import held
from tmask.engine.run import run_training


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CocoDataset:
    monkeypatch.chdir(tmp_path)
    return CocoDataset(*write_shapes("data", num_images=3, seed=1, size=32))


def test_one_training_at_a_time(data: CocoDataset, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither beside another, nor beside a prediction, and none that goes on or begins anew."""
    argv = ["train", *COMMANDS["train"].split()]
    assert cli.main(argv) == 0
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    for holder in ("train", "predict"):
        for how in (["--overwrite"], ["--resume", "out/checkpoint.pt"]):
            capsys.readouterr()
            with held("out", holder):
                assert cli.main([*argv, *how]) == 1
            who = f"another tmask {holder} (process {os.getpid()} on {platform.node()})"
            said = f"{who} is at work in this folder; wait for its end or stop it, or choose another folder"
            assert capsys.readouterr().err == f"tmask train: error: out: {said}\n"
    with held("out", "train"):
        assert cli.main(["predict", *COMMANDS["predict"].replace("run/", "out/").split()]) == 1
        assert "another tmask train" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before


def test_a_run_that_came_while_the_data_were_opened_is_not_removed(data: CocoDataset) -> None:
    Path("out").mkdir()
    Path("out/checkpoint.pt").write_bytes(b"a run")
    config, options = TrainConfig(steps=1, batch_size=2, precision="fp32"), DataConfig(num_workers=0)
    with pytest.raises(ValueError, match="--out out holds a checkpoint; go on with --resume"):
        run_training(
            make_model().config,
            config,
            options,
            data,
            None,
            out_dir="out",
            device=torch.device("cpu"),
            overwrite=False,
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
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        time.sleep(0.2)  # in which the child gets to its sleep
        with (
            pytest.raises(ValueError, match=rf"another tmask train \(process {holder.pid} on"),
            held(tmp_path, "train"),
        ):
            pass
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # lives
        with held(tmp_path, "train"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()
