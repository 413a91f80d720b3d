"""The training loop on a model small enough to know what it must do."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.toy import CONFIG, Model, run
from tmask.engine.checkpoint import CheckpointError, load_checkpoint
from tmask.engine.device import autocast, pick_device
from tmask.engine.log import JsonLines, LossBuffer, StepTimer, read_log
from tmask.engine.report import NonFiniteLossError
from tmask.engine.train import train


def test_loss_falls_and_the_log_tells(tmp_path: Path) -> None:
    result = run(tmp_path, Model(), dataclasses.replace(CONFIG, steps=60))
    rows = read_log(tmp_path / "log.jsonl")
    assert set(rows[0]) == {
        "step",
        "epoch",
        "lr",
        "loss",
        "loss_a",
        "loss_b",
        "seconds_per_step",
        "images_per_second",
        "peak_memory_gib",
    }
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert rows[-1]["loss"] == pytest.approx(rows[-1]["loss_a"] + rows[-1]["loss_b"])
    assert rows[-1]["step"] == result.step == 60
    assert result.losses == {name: rows[-1][name] for name in ("loss_a", "loss_b")}
    assert min(row["images_per_second"] for row in rows) > 0


def test_every_step_is_in_exactly_one_log_row(tmp_path: Path) -> None:
    model = Model()
    run(tmp_path, model)
    # Log points: every 4 steps, the checkpoints at 5 and 10, the end.
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl")] == [4, 5, 8, 10, 12]
    assert model.calls == 12


def test_epochs_reshuffle_through_set_epoch(tmp_path: Path) -> None:
    model = Model()
    run(tmp_path, model)
    orders = [[int(value) for value in model.seen[i : i + 5]] for i in (0, 5)]
    assert orders == [torch.randperm(5, generator=torch.Generator().manual_seed(e)).tolist() for e in (0, 1)]
    saved = load_checkpoint(tmp_path / "checkpoint.pt")
    assert (saved["step"], saved["epoch"], saved["position"]) == (12, 2, 2)


@pytest.mark.parametrize("step", [0, 5, 11])
def test_a_loss_that_is_not_finite_names_step_and_term(tmp_path: Path, step: int) -> None:
    with pytest.raises(NonFiniteLossError, match=rf"step {step + 1}: the loss is not finite: loss_b = nan\."):
        run(tmp_path, Model(poison_at=step))


def test_a_poisoned_step_never_reaches_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError):
        run(tmp_path, Model(poison_at=6))
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 5


def test_evaluation_is_logged_and_disturbs_nothing(tmp_path: Path) -> None:
    calls = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        model.eval()
        calls.append(float(torch.rand(())))
        return {"segm/AP": 0.25}

    plain, measured = Model(), Model()
    measured.load_state_dict(plain.state_dict())
    run(tmp_path / "plain", plain)
    result = run(tmp_path / "measured", measured, dataclasses.replace(CONFIG, eval_every=5), evaluate_fn=evaluate)
    assert len(calls) == 3
    assert result.metrics == {"segm/AP": 0.25}
    assert measured.training
    assert measured.seen == plain.seen
    rows = read_log(tmp_path / "measured" / "log.jsonl")
    assert [row["step"] for row in rows if "segm/AP" in row] == [5, 10, 12]


def test_a_finished_run_is_evaluated_on_resume(tmp_path: Path) -> None:
    run(tmp_path, Model())
    path, seen = tmp_path / "checkpoint.pt", []

    def evaluate(model: Model) -> dict[str, float]:
        seen.append(model.conv.weight.detach().clone())
        return {"segm/AP": 0.5}

    model = Model()
    result = run(tmp_path, model, resume=path, evaluate_fn=evaluate)
    assert (result.step, result.metrics, model.calls) == (12, {"segm/AP": 0.5}, 0)
    assert torch.equal(seen[0], load_checkpoint(path)["model"]["conv.weight"])
    assert read_log(tmp_path / "log.jsonl")[-1] == {"step": 12, "segm/AP": 0.5}


def test_on_start_comes_after_the_first_step_and_before_any_file(tmp_path: Path) -> None:
    calls = []
    model = Model()
    run(tmp_path, model, on_start=lambda: calls.append((model.calls, (tmp_path / "log.jsonl").exists())))
    assert calls == [(1, False)]
    with pytest.raises(CheckpointError):
        run(tmp_path, Model(), resume=tmp_path / "none.pt", on_start=lambda: calls.append((0, False)))
    assert len(calls) == 1


def test_clipping_bounds_the_update(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=1, optimizer="sgd", momentum=0.0, weight_decay=0.0, lr=1.0)
    for clip, bound in ((None, 0.0), (0.01, 0.01)):
        model = Model()
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        run(tmp_path / str(clip), model, dataclasses.replace(config, clip_norm=clip))
        moved = (torch.cat([p.detach().flatten() for p in model.parameters()]) - before).norm()
        assert moved > 0.05 if clip is None else moved == pytest.approx(bound, rel=1e-3)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_reaches_the_convolutions(tmp_path: Path, precision: Any, dtype: torch.dtype) -> None:
    model = Model()
    run(tmp_path, model, dataclasses.replace(CONFIG, precision=precision))
    assert set(model.dtypes) == {dtype}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("channels_last", [True, False])
def test_channels_last_reaches_the_images(tmp_path: Path, channels_last: bool) -> None:
    model = Model()
    run(tmp_path, model, dataclasses.replace(CONFIG, channels_last=channels_last))
    assert set(model.formats) == {channels_last}


def test_fp16_and_unknown_devices_are_refused_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision: fp16 needs a CUDA device, got cpu"):
        run(tmp_path, Model(), dataclasses.replace(CONFIG, precision="fp16"))
    with pytest.raises(ValueError, match="precision: expected one of fp32"):
        autocast(torch.device("cpu"), "fp8")
    with pytest.raises(ValueError, match="device: expected auto, cpu, cuda"):
        pick_device("gpu")
    with pytest.raises(ValueError, match="device: expected one of this machine's, got 'cuda:99'"):
        pick_device("cuda:99")


def test_an_empty_loader_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_loader: expected at least one batch"):
        train(Model(), [], CONFIG, out_dir=tmp_path, device="cpu")


def test_log_survives_a_half_written_line(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log.jsonl")
    log.write({"step": 1})
    log.write({"step": 2})
    with log.path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert [row["step"] for row in read_log(log.path)] == [1, 2]
    JsonLines(log.path, resume_step=1).write({"step": 2, "again": True})
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == [{"step": 1}, {"step": 2, "again": True}]


def test_loss_buffer_gives_each_step_once() -> None:
    buffer = LossBuffer(3)
    assert buffer.read() == []
    for value in (1.0, 2.0):
        buffer.add({"a": torch.tensor(value), "b": torch.tensor(-value, dtype=torch.bfloat16)})
    assert buffer.read() == [{"a": 1.0, "b": -1.0}, {"a": 2.0, "b": -2.0}]
    buffer.add({"a": torch.tensor(5.0), "b": torch.tensor(6.0)})
    assert buffer.read() == [{"a": 5.0, "b": 6.0}]


def test_the_timer_marks_the_work_of_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the current one, which stands idle."""
    marked = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: device)
    event = SimpleNamespace(record=marked.append)
    monkeypatch.setattr(torch.cuda, "Event", lambda **kwargs: event)
    StepTimer(torch.device("cuda:1")).mark()
    assert marked == [torch.device("cuda:1")]
