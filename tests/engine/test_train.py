"""The training loop on a model small enough to know what it must do."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tmask.config import TrainConfig
from tmask.engine.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from tmask.engine.device import autocast, pick_device
from tmask.engine.log import JsonLines, LossBuffer, read_log
from tmask.engine.train import NonFiniteLossError, train
from tmask.structures import ImageBatch, Targets

CONFIG = TrainConfig(
    steps=12,
    batch_size=2,
    optimizer="adamw",
    lr=0.05,
    schedule="constant",
    warmup_steps=0,
    precision="fp32",
    log_every=4,
    checkpoint_every=5,
)


class Model(nn.Module):
    """Learns the mean of its images, with noise from the random state; `poison_at` breaks one loss at that step."""

    def __init__(self, poison_at: int | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1)
        self.poison_at, self.calls = poison_at, 0
        self.seen: list[float] = []
        self.formats: list[bool] = []
        self.dtypes: list[torch.dtype] = []

    def forward_padded(self, images: ImageBatch, targets: Targets, *, compact: bool) -> dict[str, Tensor]:
        self.seen.append(float(images.tensor[0, 0, 0, 0]))
        self.formats.append(images.tensor.is_contiguous(memory_format=torch.channels_last))
        out = self.conv(images.tensor)
        self.dtypes.append(out.dtype)
        noise = 0.01 * torch.rand(())
        loss = (out.float().mean() - 1 + noise) ** 2
        extra = self.conv.bias.sum() ** 2
        if self.calls == self.poison_at:
            extra = extra * float("nan")
        self.calls += 1
        return {"loss_a": loss, "loss_b": extra}


class Loader:
    """Five batches an epoch in an order of (epoch); each batch also draws from the random state, as a flip would."""

    def __init__(self) -> None:
        self.batch_sampler = self
        self.epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        torch.randint(0, 100, ())  # a DataLoader draws its base seed here
        for index in torch.randperm(5, generator=torch.Generator().manual_seed(self.epoch)).tolist():
            value = index + torch.rand(())
            yield SimpleNamespace(
                images=ImageBatch(value.expand(2, 3, 4, 6).contiguous(), torch.tensor([[4, 6], [4, 6]])),
                targets=Targets(*[torch.zeros(2, 1)] * 4, None, torch.zeros(2, 1)),
            )


def run(out: Path, model: Model, config: TrainConfig = CONFIG, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return train(model, Loader(), config, out_dir=out, device="cpu", **kwargs)


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


@pytest.mark.parametrize("stop", [5, 7], ids=["epoch-end", "mid-epoch"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, stop: int) -> None:
    config = dataclasses.replace(CONFIG, checkpoint_every=stop)
    whole, first, second = Model(), Model(), Model()
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    first.load_state_dict(start)
    run(tmp_path / "whole", whole, config)
    run(tmp_path / "parts", first, dataclasses.replace(config, steps=stop))
    torch.manual_seed(99)
    train(
        second, Loader(), config, out_dir=tmp_path / "parts", device="cpu", resume=tmp_path / "parts" / "checkpoint.pt"
    )
    assert first.seen + second.seen == whole.seen
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    steps = [row["step"] for row in read_log(tmp_path / "parts" / "log.jsonl")]
    assert steps == [row["step"] for row in read_log(tmp_path / "whole" / "log.jsonl")]


def test_resume_refuses_other_settings(tmp_path: Path) -> None:
    run(tmp_path, Model())
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(CheckpointError, match="the run differs: batch_size: 2 -> 4"):
        run(tmp_path, Model(), dataclasses.replace(CONFIG, batch_size=4), resume=path)
    for categories in ([{"id": 1, "name": "disc"}], [{"id": 2, "name": "star"}, {"id": 1, "name": "disc"}]):
        own = tmp_path / str(len(categories))
        run(own, Model(), categories=categories)
        model = Model()
        before = model.state_dict()["conv.weight"].clone()
        label = len(categories)
        with pytest.raises(CheckpointError, match=rf"the category of label {label}: .*'disc'.* -> .*'ring'"):
            run(own, model, resume=own / "checkpoint.pt", categories=[*categories[:-1], {"id": 1, "name": "ring"}])
        with pytest.raises(CheckpointError, match=rf"the category of label {label}: .*'disc'.* -> None"):
            run(own, model, resume=own / "checkpoint.pt", categories=categories[:-1])
        assert torch.equal(model.state_dict()["conv.weight"], before)
        run(own, Model(), resume=own / "checkpoint.pt", categories=categories)
    saved = load_checkpoint(path)
    save_checkpoint(path, saved | {"model_config": {"min_size": 800}})
    with pytest.raises(CheckpointError, match="the model differs: min_size: 800 -> None"):
        run(tmp_path, Model(), resume=path)


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


def test_on_start_comes_after_the_checks_and_before_the_first_step(tmp_path: Path) -> None:
    calls = []
    model = Model()
    run(tmp_path, model, on_start=lambda: calls.append((model.calls, (tmp_path / "log.jsonl").exists())))
    assert calls == [(0, False)]
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
