"""The training loop on a model small enough to know what it must do."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.toy import CONFIG, CPU, Model, copies, logged, run, saved, toy
from tmask import cli
from tmask.engine.checkpoint import CheckpointError
from tmask.engine.device import autocast
from tmask.engine.log import JsonLines, NonFiniteLossError, StepTimer, progress, read_log
from tmask.engine.loop import fit


def test_loss_falls_and_the_log_tells(tmp_path: Path) -> None:
    result = run(tmp_path, Model(), toy(steps=60))
    rows = logged(tmp_path)
    names = "step epoch lr loss loss_a loss_b seconds_per_step images_per_second peak_memory_gib"
    assert set(rows[0]) == set(names.split())
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert rows[-1]["loss"] == pytest.approx(rows[-1]["loss_a"] + rows[-1]["loss_b"])
    assert rows[-1]["step"] == result.step == 60
    assert result.losses == {name: rows[-1][name] for name in ("loss_a", "loss_b")}
    assert min(row["images_per_second"] for row in rows) > 0


def test_every_step_is_in_one_log_row_and_epochs_are_shuffled_anew(tmp_path: Path) -> None:
    model = Model()
    run(tmp_path, model)
    # Log points: every 4 steps, the checkpoints at 5 and 10, the end.
    assert [row["step"] for row in logged(tmp_path)] == [4, 5, 8, 10, 12]
    assert model.calls == 12
    orders = [[int(value) for value in model.seen[i : i + 5]] for i in (0, 5)]
    assert orders == [torch.randperm(5, generator=torch.Generator().manual_seed(e)).tolist() for e in (0, 1)]
    end = saved(tmp_path)
    assert (end["step"], end["epoch"], end["position"]) == (12, 2, 2)


@pytest.mark.parametrize(("step", "kept"), [(0, None), (5, 5), (6, 5), (11, 10)])
def test_a_loss_that_is_not_finite_names_step_and_term(tmp_path: Path, step: int, kept: int | None) -> None:
    """And never reaches a checkpoint."""
    with pytest.raises(NonFiniteLossError, match=rf"step {step + 1}: the loss is not finite: loss_b = nan\."):
        run(tmp_path, Model(poison_at=step))
    assert (saved(tmp_path)["step"] if (tmp_path / "checkpoint.pt").exists() else None) == kept


def test_evaluation_is_logged_and_disturbs_nothing(tmp_path: Path) -> None:
    calls = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        model.eval()
        calls.append(float(torch.rand(())))
        return {"segm/AP": 0.25}

    plain, measured = copies(2)
    run(tmp_path / "plain", plain)
    result = run(tmp_path / "measured", measured, toy(eval_every=5), evaluate_fn=evaluate)
    assert len(calls) == 3
    assert result.metrics == {"segm/AP": 0.25}
    assert measured.training
    assert measured.seen == plain.seen
    assert [row["step"] for row in logged(tmp_path / "measured") if "segm/AP" in row] == [5, 10, 12]


def test_on_start_comes_after_the_first_step_and_before_any_file(tmp_path: Path) -> None:
    calls = []
    model = Model()
    run(tmp_path, model, on_start=lambda: calls.append((model.calls, (tmp_path / "log.jsonl").exists())))
    assert calls == [(1, False)]
    with pytest.raises(CheckpointError):
        run(tmp_path, resume=tmp_path / "none.pt", on_start=lambda: calls.append((0, False)))
    assert len(calls) == 1


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_precision_and_memory_format_reach_the_model(
    tmp_path: Path, precision: Any, dtype: torch.dtype, channels_last: bool
) -> None:
    model = Model()
    run(tmp_path, model, toy(precision=precision, channels_last=channels_last))
    assert set(model.dtypes) == {dtype}
    assert set(model.formats) == {channels_last}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_an_unknown_precision_and_an_empty_loader_are_refused(tmp_path: Path) -> None:
    """A precision or a device that is not there: docs/bad-input.md."""
    with pytest.raises(ValueError, match="precision: expected one of fp32"):
        autocast(CPU, "fp8")
    with pytest.raises(ValueError, match="train_loader: expected at least one batch"):
        fit(Model(), [], CONFIG, out_dir=tmp_path, device="cpu")


def test_log_survives_a_half_written_line(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log.jsonl")
    log.write({"step": 1})
    log.write({"step": 2})
    with log.path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert [row["step"] for row in read_log(log.path)] == [1, 2]
    JsonLines(log.path, resume_step=1).write({"step": 2, "again": True})
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == [{"step": 1}, {"step": 2, "again": True}]


def test_the_timer_marks_the_work_of_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the work of the current GPU, which is idle."""
    marked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: device)
    monkeypatch.setattr(torch.cuda, "Event", lambda **kwargs: SimpleNamespace(record=marked.append))
    StepTimer(torch.device("cuda:1")).mark()
    assert marked == [torch.device("cuda:1")]


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert list(progress([7, 8], "prediction", "image")) == [7, 8]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("tmask.engine.log._LINE_SECONDS", 0.0)
    assert list(progress([7, 8], "prediction", "image")) == [7, 8]
    assert list(progress(iter([9]), "prediction", "image")) == [9]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"prediction: image {count}" for count in ("1/2", "2/2", "1")]


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("tmask.engine.log._LINE_SECONDS", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress(["a", "b"], "prediction", "image")) == ["a", "b"]
    err = capsys.readouterr().err
    assert "| 2/2 [" in err
    assert "image 2/2" not in err
    assert list(progress([], "prediction", "image")) == []
    assert capsys.readouterr().err == ""


# The log as TensorBoard's events.

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
