"""Fusion of a fully connected mask with the convolutional ones: the wide features of a RoI in, one mask out.

Each pixel of it sees the whole RoI, where the convolutions see a neighbourhood. Source: Hu et al. 2018, "Learning to
Segment Every Thing", section 3.4. Letters: R RoIs, M mask side.
"""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from tmask.model.init import xavier

HIDDEN = 1024  # of the variant with two layers


class MaskFusion(nn.Module):
    """`num_layers` (1 or 2) fully connected layers over all `channels` of M x M pixels, M = `size`, with ReLU between.

    At 256 channels and M = 28 one layer has 157 million weights.
    """

    def __init__(self, *, channels: int, size: int, num_layers: int) -> None:
        super().__init__()
        self.size = size
        widths = [channels * size**2] + [HIDDEN] * (num_layers - 1) + [size**2]
        layers = [nn.Linear(before, after) for before, after in itertools.pairwise(widths)]
        xavier(layers[:-1])
        nn.init.normal_(layers[-1].weight, std=0.001)
        nn.init.zeros_(layers[-1].bias)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Features [R, ...], of each RoI channels * M * M in any one order, to logits [R, 1, M, M]."""
        x = x.flatten(1)
        for i, layer in enumerate(self.layers):
            x = layer(F.relu(x) if i else x)
        return x.view(-1, 1, self.size, self.size)
