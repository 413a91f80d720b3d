"""The log as TensorBoard's events."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.engine.toy import CONFIG, Model, run
from tmask import cli
from tmask.engine.log import read_log

LOGGED = dataclasses.replace(CONFIG, tensorboard=True, log_every=1)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each tag, as TensorBoard shows them."""
    module: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def evaluate(model: Model) -> dict[str, float]:
    return {"segm/AP": 0.25}


def test_events_hold_the_rows_of_the_log(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(tmp_path, Model(), dataclasses.replace(LOGGED, eval_every=6), evaluate_fn=evaluate)
    found = scalars(tmp_path)
    rows = [row for row in read_log(tmp_path / "log.jsonl") if "loss" in row]
    assert set(found) == {f"train/{name}" for name in rows[0] if name != "step"} | {"segm/AP"}
    for name in ("loss", "loss_a", "lr", "peak_memory_gib"):
        assert found[f"train/{name}"] == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows]
    assert found["segm/AP"] == [(6, 0.25), (12, 0.25)]


def test_a_resumed_run_doubles_no_event(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(tmp_path, Model(), dataclasses.replace(LOGGED, steps=7, checkpoint_every=7))
    kept = (tmp_path / "checkpoint.pt").read_bytes()
    run(tmp_path, Model(), dataclasses.replace(LOGGED, steps=10), resume=tmp_path / "checkpoint.pt")
    (tmp_path / "checkpoint.pt").write_bytes(kept)  # the run was killed at 10, with 7 on disk
    run(tmp_path, Model(), LOGGED, resume=tmp_path / "checkpoint.pt")
    rows = read_log(tmp_path / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    expected = [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in rows]
    assert scalars(tmp_path)["train/loss"] == expected


def test_a_fresh_run_hides_the_events_of_the_old_one(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(tmp_path, Model(), LOGGED)
    run(tmp_path, Model(), dataclasses.replace(LOGGED, steps=3))
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [1, 2, 3]


def test_off_by_default(tmp_path: Path) -> None:
    run(tmp_path, Model())
    assert not (tmp_path / "tensorboard").exists()


def test_without_the_package_nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'tmask\[tensorboard\]'"):
        run(tmp_path / "out", Model(), LOGGED)
    assert not (tmp_path / "out").exists()


def test_the_command_says_so_before_it_reads_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["train", "--out", str(tmp_path / "out"), "--train.tensorboard=true"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "train.tensorboard: tensorboard is not installed; pip install 'tmask[tensorboard]'" in line
    assert not (tmp_path / "out").exists()
