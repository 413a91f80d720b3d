"""An exponential moving average of a model's weights: steadier than the weights of the last step."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


class WeightAverage:
    """A copy of `model` whose weights follow it: ``average = decay * average + (1 - decay) * weights`` an update.

    The first update copies, so that the random weights of the beginning have no part in it. Floating-point buffers,
    the batch-norm statistics, are averaged alike: copies of the present ones would belong to other weights than those
    they stand beside. Buffers of whole numbers are copied.

    `torch.optim.swa_utils.AveragedModel` does the same but sends its counter to the device at each update, and that
    waits for the device.
    """

    def __init__(self, model: Any, decay: float) -> None:
        self.model, self.decay = copy.deepcopy(model), decay
        self.empty = True  # no update yet
        pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present weights of the model."""
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
