"""One update: rates, parameter groups, gradients averaged, clipped and scaled, and the average of the weights."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from tests.engine.toy import CPU, Loader, Model, batch, copies, logged, run, saved, toy
from tests.model.sync import count_blocking
from tmask.config import TrainConfig
from tmask.engine.log import LossBuffer
from tmask.engine.loop import _update
from tmask.engine.optimizer import WeightAverage, build_optimizer, lr_factor, parameter_groups, set_lr
from tmask.engine.state import TrainState
from tmask.presets import TRAIN_PRESETS
from tmask.structures import ImageBatch, Targets


@pytest.mark.parametrize("steps", [120, 540])
def test_small_data_schedule_is_the_common_warm_up_and_cosine(steps: int) -> None:
    config = dataclasses.replace(TRAIN_PRESETS["r18_fpn"], steps=steps)
    for s in range(steps):
        expected = min(1, (s + 1) / 50) * (0.5 * (1 + math.cos(math.pi * s / steps)) + 0.01)
        assert lr_factor(config, s) == pytest.approx(expected, rel=1e-12), s


def test_published_schedule_warms_up_and_falls_at_its_milestones() -> None:
    expected = {0: 0.001, 500: (0.001 + 1) / 2, 60_000: 0.1, 79_999: 0.1, 80_000: 0.01}
    assert {s: lr_factor(TrainConfig(), s) for s in expected} == pytest.approx(expected)
    assert [lr_factor(TrainConfig(), s) for s in (1000, 59_999)] == [1, 1]


def test_constant_schedule_without_warm_up_is_one() -> None:
    config = TrainConfig(steps=10, schedule="constant", warmup_steps=0)
    assert [lr_factor(config, s) for s in (0, 9)] == [1, 1]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.group_norm = nn.GroupNorm(2, 4)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.tied = self.conv


def test_norm_and_bias_leave_weight_decay_on_request() -> None:
    """By default all trainable parameters decay; each is there once."""
    model = Small()
    names = {id(p): name for name, p in model.named_parameters()}
    plain = {"conv.bias", "norm.weight", "norm.bias", "group_norm.weight", "group_norm.bias"}
    for decay, expected in ((True, [(0.1, plain | {"conv.weight"})]), (False, [(0.1, {"conv.weight"}), (0.0, plain)])):
        groups: list[dict[str, object]] = parameter_groups(
            model, TrainConfig(weight_decay=0.1, decay_norm_and_bias=decay)
        )
        found = [(g["weight_decay"], [names[id(p)] for p in g["params"]]) for g in groups]  # type: ignore[attr-defined]
        assert [(value, set(group)) for value, group in found] == expected
        assert sum(len(group) for _, group in found) == 6


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_optimizer_kind_and_rate(name: str, kind: type) -> None:
    optimizer = build_optimizer(Small(), TrainConfig(optimizer=name, lr=0.5))  # type: ignore[arg-type]
    assert type(optimizer) is kind
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_that_of_the_textbook(momentum: float) -> None:
    model = Small()
    config = TrainConfig(optimizer="sgd", lr=0.5, momentum=momentum, weight_decay=0.1)
    optimizer = build_optimizer(model, config)
    weight, velocity = model.conv.weight.detach().clone(), torch.zeros_like(model.conv.weight)
    for step in range(3):
        model.conv.weight.grad = torch.full_like(weight, step + 1.0)
        velocity = momentum * velocity + model.conv.weight.grad + 0.1 * weight
        weight = weight - 0.5 * velocity
        optimizer.step()
        torch.testing.assert_close(model.conv.weight.detach(), weight)


def test_a_frozen_model_is_an_error() -> None:
    with pytest.raises(ValueError, match="model: expected parameters that take gradients"):
        build_optimizer(Small().requires_grad_(False), TrainConfig())


SGD: dict[str, Any] = {
    **{"steps": 1, "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "lr": 0.5, "log_every": 1},
    "channels_last": False,
}


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.conv.parameters()])  # type: ignore[operator]


def update(state: TrainState, *values: float) -> dict[str, Tensor]:
    """One update of a batch for each value; the loss terms."""
    return _update(state, iter([batch(value) for value in values]))[0]


def plain_and_scaled(**settings: Any) -> list[TrainState]:
    """Two states with the same weights; the second has a gradient scaler, as in fp16."""
    states = [TrainState(model, toy(**{**SGD, **settings}), CPU, ()) for model in copies(2)]
    states[1].scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    return states


def mean_gradient(model: Model, count: int) -> tuple[Tensor, list[float]]:
    """The gradient averaged over the first `count` batches by hand, and the loss of each."""
    model = copy.deepcopy(model)
    torch.manual_seed(0)
    loader = Loader()
    loader.set_epoch(0)
    gradients, losses = [], []
    for _, data in zip(range(count), loader, strict=False):
        model.zero_grad()
        loss = torch.stack(list(model.forward_padded(data.images, data.targets, compact=True).values())).sum()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.conv.parameters()]))  # type: ignore[union-attr]
        losses.append(loss.item())
    return torch.stack(gradients).mean(0), losses


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_the_gradient_is_the_mean_over_the_batches(tmp_path: Path, accumulate: int, clip: float | None) -> None:
    model = Model()
    gradient, losses = mean_gradient(model, accumulate)
    if clip is not None:
        assert gradient.norm() > clip
        gradient = gradient * clip / gradient.norm()
    before = flat(model)
    run(tmp_path, model, toy(**SGD, accumulate=accumulate, clip_norm=clip))
    torch.testing.assert_close(flat(model), before - SGD["lr"] * gradient, rtol=1e-5, atol=1e-6)
    (row,) = logged(tmp_path)
    assert row["loss"] == pytest.approx(sum(losses) / accumulate, rel=1e-6)
    assert model.calls == accumulate
    assert row["images_per_second"] * row["seconds_per_step"] == pytest.approx(2 * accumulate)


@pytest.mark.parametrize("clip", [None, 0.01])
def test_a_gradient_scaler_changes_nothing_and_skips_what_overflows(clip: float | None) -> None:
    plain, scaled = plain_and_scaled(accumulate=2, clip_norm=clip, ema_decay=0.5)
    for state in (plain, scaled):
        torch.manual_seed(0)
        update(state, 2.0, 3.0)
    torch.testing.assert_close(flat(scaled.model), flat(plain.model), rtol=1e-5, atol=1e-6)
    before = flat(scaled.model)
    update(scaled, 2.0, 1e30)  # its square is infinite
    assert torch.equal(flat(scaled.model), before)
    assert scaled.scaler is not None
    assert scaled.scaler.get_scale() == 512.0


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_skipped_first_update_leaves_no_trace(optimizer: Any) -> None:
    plain, skipping = plain_and_scaled(optimizer=optimizer, momentum=0.9)
    junk = [torch.full((1000,), torch.nan) for _ in range(100)]  # what new buffers would find in memory
    del junk
    update(skipping, 1e30)
    for state in (plain, skipping):
        torch.manual_seed(0)
        for value in (2.0, 3.0, 4.0):
            update(state, value)
    torch.testing.assert_close(flat(skipping.model), flat(plain.model), rtol=1e-5, atol=1e-6)


class Silent(Model):
    """The same loss, without what the other tests read of it on the host."""

    def forward_padded(self, images: ImageBatch, targets: Targets, *, compact: bool) -> dict[str, Tensor]:
        out = self.norm(self.conv(images.tensor))
        return {"loss_a": (out.float().mean() - 1) ** 2, "loss_b": self.conv.bias.sum() ** 2}


@pytest.mark.parametrize("scaled", [False, True], ids=["bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_update_never_waits_for_the_device(optimizer: Any, scaled: bool) -> None:
    settings = {**SGD, "optimizer": optimizer, "momentum": 0.9, "accumulate": 2, "clip_norm": 0.1, "ema_decay": 0.5}
    state = TrainState(Silent(), toy(**settings), CPU, ())
    state.scaler = GradScaler("cpu") if scaled else None
    buffer = LossBuffer()
    for _ in range(3):
        with count_blocking() as found:
            buffer.add(update(state, 2.0, 3.0))
        assert not found
    assert len(buffer.read()) == 3


def test_the_average_is_that_of_a_hand() -> None:
    model = Model()
    average = WeightAverage(model, 0.75)
    begin = model.conv.weight.detach().clone()
    expected, means = 0.0, []
    for step in range(4):
        with torch.no_grad():
            model.conv.weight.fill_(float(step + 1))
        model.norm(torch.full((2, 1, 2, 2), float(step)))
        means.append(float(model.norm.running_mean))  # type: ignore[arg-type]
        expected = means[-1] if step == 0 else 0.75 * expected + 0.25 * means[-1]
        average.update()
    # ((1 * .75 + 2 * .25) * .75 + 3 * .25) * .75 + 4 * .25; the first values have the rest of the weight.
    assert average.model.conv.weight.flatten().tolist() == [2.265625] * 3
    assert float(average.model.norm.running_mean) == pytest.approx(expected, rel=1e-6)
    assert 0 < expected < means[-1]
    assert average.model.norm.num_batches_tracked.tolist() == 4  # whole numbers are copied
    assert not torch.equal(begin, average.model.conv.weight)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_evaluation_and_checkpoint_have_the_average(tmp_path: Path, decay: float) -> None:
    measured: list[Tensor] = []
    history: list[Tensor] = []

    def evaluate(model: Model) -> dict[str, float]:
        measured.append(flat(model).clone())
        return {"segm/AP": 0.0}

    model = Model()
    real = model.forward_padded
    model.forward_padded = lambda *a, **k: (history.append(flat(model)), real(*a, **k))[1]  # type: ignore[method-assign]
    result = run(tmp_path, model, toy(steps=4, ema_decay=decay, eval_every=2), evaluate_fn=evaluate)
    weights = [*history[1:], flat(model)]  # after each update
    expected = [weights[0]]
    for now in weights[1:]:
        expected.append(decay * expected[-1] + (1 - decay) * now)
    assert len(measured) == 2
    torch.testing.assert_close(measured, [expected[1], expected[3]])
    end = saved(tmp_path)
    torch.testing.assert_close(end["model"]["conv.bias"], model.conv.bias.detach())
    assert torch.equal(flat(result.model), measured[-1])
    if decay:
        assert torch.equal(end["ema"]["conv.bias"], measured[-1][-1:])
        assert not torch.equal(end["ema"]["conv.bias"], end["model"]["conv.bias"])
        assert end["ema"].keys() == end["model"].keys()
    else:
        assert end["ema"] is None
        assert result.model is model
