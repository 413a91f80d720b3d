"""The optimiser: parameter groups, the learning rate as a function of the step, and the average of the weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from tmask.config import TrainConfig

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def lr_factor(config: TrainConfig, step: int) -> float:
    """The factor of ``config.lr`` at `step` (counted from 0): warm-up times schedule.

    Warm-up is linear from ``warmup_start`` and reaches 1 at ``warmup_steps`` (Goyal et al. 2017, section 2.2). The
    schedule runs over all of ``steps``, so warm-up and schedule overlap at the start.
    """
    warmup = 1.0
    if step < config.warmup_steps:
        warmup = config.warmup_start + (1 - config.warmup_start) * step / config.warmup_steps
    if config.schedule == "constant":
        return warmup
    if config.schedule == "steps":
        # The tolerance keeps 2/3 of 90,000 at exactly 60,000 whatever the rounding of the fraction.
        return warmup * 0.1 ** sum(step >= fraction * config.steps - 1e-6 for fraction in config.milestones)
    return warmup * (0.5 * (1 + math.cos(math.pi * step / config.steps)) + config.lr_floor)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD or AdamW over the trainable parameters; the caller sets the rate before each step (`set_lr`).

    Raises:
        ValueError: The model has no trainable parameters.
    """
    groups = parameter_groups(model, config)
    if not groups:
        raise ValueError("model: expected parameters that take gradients, got none (is everything frozen?)")
    # Fused optimisers skip an fp16 update on the device; the others ask the host.
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    sgd = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True)
    if config.momentum:  # fused SGD does not clear a new buffer if the first update is skipped
        for parameter in (parameter for group in sgd.param_groups for parameter in group["params"]):
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, object]]:
    """Trainable parameters, each once, in one or two groups; empty groups are left out.

    With ``decay_norm_and_bias=False`` biases and the parameters of norm layers form a second group, without weight
    decay.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            exempt = isinstance(module, _NORMS) or name.endswith("bias")
            (plain if exempt and not config.decay_norm_and_bias else decayed).append(parameter)
    groups = [(decayed, config.weight_decay), (plain, 0.0)]
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]


class WeightAverage:
    """A copy of `model` whose weights follow it: ``average = decay * average + (1 - decay) * weights`` at each update.

    The first update copies, so that the random initial weights do not count. Floating-point buffers, such as batch-norm
    statistics, are averaged too, so that they fit the averaged weights. Integer buffers are copied.
    `torch.optim.swa_utils.AveragedModel` is not used: it sends its counter to the device at each update and waits.
    """

    def __init__(self, model: Any, decay: float) -> None:
        self.model, self.decay = copy.deepcopy(model), decay
        self.empty = True  # no update yet
        pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Average in the present weights of the model."""
        for average, now in self._copied:
            average.copy_(now)
        averages, weights = (list(tensors) for tensors in zip(*self._averaged, strict=True))
        if self.empty:
            torch._foreach_copy_(averages, weights)
        else:
            torch._foreach_lerp_(averages, weights, 1 - self.decay)
        self.empty = False


def _tensors(model: Any) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
