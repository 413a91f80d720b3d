"""Mask^X R-CNN's weight transfer: a class's weights in the box head in, the weights of its mask predictor out.

So a class that has boxes alone gets masks too: it learns its rows of the box head, and the function that makes mask
weights of such rows is learnt from the classes that have masks. Source: Hu et al. 2018, "Learning to Segment Every
Thing", section 3. Letters: Cls foreground classes, F features of the box head, C channels of the masks' features.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmask.model.init import msra

_INPUTS = {"cls": ("cls",), "box": ("box",), "cls_box": ("cls", "box")}
_ROWS = {"cls": 1, "box": 4}  # of F weights, that a class has

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"leaky_relu": lambda: nn.LeakyReLU(0.1), "relu": nn.ReLU}


class MaskTransfer(nn.Module):
    """``w_seg = T(w_det)``, equation 1: one function T for all classes.

    `inputs` says what of the box head ``w_det`` is for a class: ``cls``, its row of the classifier; ``box``, its four
    rows of the regressor; ``cls_box``, all five, side by side. Biases have no part. T is `num_layers` fully connected
    layers, each of `channels` outputs (the channels that the predictor sees), with `activation` between them,
    ``leaky_relu`` of slope 0.1 or ``relu``. `features` is F. With `stop_grad` the mask loss moves T but not the box
    head's weights.
    """

    def __init__(
        self, *, features: int, channels: int, inputs: str, num_layers: int, activation: str, stop_grad: bool
    ) -> None:
        super().__init__()
        self.inputs, self.stop_grad = _INPUTS[inputs], stop_grad
        width = features * sum(_ROWS[name] for name in self.inputs)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise([width] + [channels] * num_layers):
            linear = nn.Linear(before, after)
            msra([linear])
            layers += [linear, _ACTIVATIONS[activation]()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, classifier: Tensor, regressor: Tensor) -> Tensor:
        """Map weights of the classifier [Cls + 1, F], or [Cls, F], and the regressor [4(Cls + 1), F] to [Cls + 1, C].

        Row k is the 1x1 kernel of class k over C channels, without bias. Row 0 is zeros: the background has no mask,
        and its weights do not enter.
        """
        regressor = regressor.unflatten(0, (-1, 4))[1:]  # [Cls, 4, F]
        parts = {"cls": classifier[-len(regressor) :], "box": regressor.flatten(1)}  # [Cls, F], [Cls, 4F]
        weights = torch.cat([parts[name] for name in self.inputs], dim=1)
        if self.stop_grad:
            weights = weights.detach()
        out: Tensor = self.layers(weights)
        return F.pad(out, (0, 0, 1, 0))
