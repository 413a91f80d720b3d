"""The log as TensorBoard's events."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from tests.engine.toy import logged, run, toy
from tmask import cli

LOGGED = {"tensorboard": True, "log_every": 1}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each tag, as TensorBoard shows them."""
    module: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_events_hold_the_rows_of_the_log(tmp_path: Path) -> None:
    """And a fresh run hides the events of an earlier one."""
    pytest.importorskip("tensorboard")
    run(tmp_path, config=toy(eval_every=6, **LOGGED), evaluate_fn=lambda model: {"segm/AP": 0.25})
    found = scalars(tmp_path)
    rows = [row for row in logged(tmp_path) if "loss" in row]
    assert set(found) == {f"train/{name}" for name in rows[0] if name != "step"} | {"segm/AP"}
    for name in ("loss", "loss_a", "lr", "peak_memory_gib"):
        assert found[f"train/{name}"] == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows]
    assert found["segm/AP"] == [(6, 0.25), (12, 0.25)]
    run(tmp_path, config=toy(steps=3, **LOGGED))
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [1, 2, 3]


def test_a_resumed_run_doubles_no_event(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(tmp_path, config=toy(steps=7, checkpoint_every=7, **LOGGED))
    kept = (tmp_path / "checkpoint.pt").read_bytes()
    run(tmp_path, config=toy(steps=10, **LOGGED), resume=True)
    (tmp_path / "checkpoint.pt").write_bytes(kept)  # the run was killed at 10, with 7 on disk
    run(tmp_path, config=toy(**LOGGED), resume=True)
    rows = logged(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 13))
    expected = [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in rows]
    assert scalars(tmp_path)["train/loss"] == expected


def test_off_by_default(tmp_path: Path) -> None:
    run(tmp_path)
    assert not (tmp_path / "tensorboard").exists()


def test_without_the_package_nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The command says so before it reads the data."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = "train.tensorboard: tensorboard is not installed; pip install 'tmask[tensorboard]'"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        run(tmp_path / "out", config=toy(**LOGGED))
    assert cli.main(["train", "--out", str(tmp_path / "out"), "--train.tensorboard=true"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "out").exists()
