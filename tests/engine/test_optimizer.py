"""Learning rates and parameter groups."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from tmask.config import TrainConfig
from tmask.engine.optimizer import build_optimizer, lr_factor, parameter_groups, set_lr
from tmask.presets import TRAIN_PRESETS


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
