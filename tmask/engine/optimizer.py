"""The optimiser, its parameter groups and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from tmask.config import TrainConfig


def lr_factor(config: TrainConfig, step: int) -> float:
    """What multiplies ``config.lr`` at `step` (counted from 0): warm-up times schedule.

    Warm-up is linear from ``warmup_start`` and reaches 1 at ``warmup_steps`` (Goyal et al. 2017, section 2.2); the
    schedule runs over all of ``steps``, so the two overlap at the start.
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


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD or AdamW over the parameters that take gradients. Its rate is set before each step by `set_lr`.

    With ``decay_norm_and_bias=False`` biases and all parameters of norm layers stand in a second group without weight
    decay. Errors: ValueError if the model has nothing to train.
    """
    groups = parameter_groups(model, config)
    if not groups:
        raise ValueError("model: expected parameters that take gradients, got none (is everything frozen?)")
    # Fused: an update that fp16 skips is then skipped on the device; the others ask the host whether to.
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    sgd = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True)
    if config.momentum:  # fused SGD leaves a new buffer as it finds it in memory if the first update is skipped
        for parameter in (parameter for group in sgd.param_groups for parameter in group["params"]):
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, object]]:
    """Trainable parameters, each once, in groups by weight decay; empty groups are left out."""
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


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
