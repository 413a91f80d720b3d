"""Mask heads: pooled RoI features in, one map of mask logits for each mask channel out.

Letters: R RoIs, C mask channels (see `MaskBranch.num_channels`), M mask side (twice the pooled side).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn


class MaskHead(nn.Module):
    """Fully convolutional: `num_layers` 3x3 convolutions, a 2x2 deconvolution of stride 2, a 1x1 predictor.

    Source: He et al. 2017, "Mask R-CNN", figure 4 right.
    """

    def __init__(self, *, in_channels: int, channels: int, num_layers: int, num_masks: int) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * num_layers
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in itertools.pairwise(widths)
        )
        self.deconv = nn.ConvTranspose2d(widths[-1], channels, 2, stride=2)
        self.predictor = nn.Conv2d(channels, num_masks, 1)
        _init([*self.convs, self.deconv], self.predictor)

    def forward(self, x: Tensor) -> Tensor:
        """Pooled features [R, in_channels, M / 2, M / 2] to mask logits [R, C, M, M]."""
        for conv in self.convs:
            x = F.relu(conv(x))
        return _deconv_and_predict(x, self.deconv, self.predictor)


class MLPMaskHead(nn.Module):
    """Fully connected: `num_layers` hidden layers of `hidden` units, then a predictor of all pixels of all maps.

    It does not know which pixel lies beside which, and has many times the parameters of `MaskHead`. Source: He et al.
    2017, "Mask R-CNN", table 2e.
    """

    def __init__(self, *, in_channels: int, pool_size: int, hidden: int, num_layers: int, num_masks: int) -> None:
        super().__init__()
        self.side = 2 * pool_size
        widths = [in_channels * pool_size**2] + [hidden] * num_layers
        self.fcs = nn.ModuleList(nn.Linear(before, after) for before, after in itertools.pairwise(widths))
        self.predictor = nn.Linear(hidden, num_masks * self.side**2)
        _init(self.fcs, self.predictor)

    def forward(self, x: Tensor) -> Tensor:
        """Pooled features [R, in_channels, M / 2, M / 2] to mask logits [R, C, M, M]."""
        x = x.flatten(1)
        for fc in self.fcs:
            x = F.relu(fc(x))
        return self.predictor(x).unflatten(1, (-1, self.side, self.side))


def _init(layers: Iterable[nn.Module], predictor: nn.Module) -> None:
    """MSRA's normal distribution before each ReLU (std sqrt(2 / fan_out)), and a predictor that begins near 0.5."""
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
    nn.init.normal_(predictor.weight, std=0.001)  # type: ignore[arg-type]
    for layer in (*layers, predictor):
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


def _deconv_and_predict(x: Tensor, deconv: nn.ConvTranspose2d, predictor: nn.Conv2d) -> Tensor:
    """``predictor(relu(deconv(x)))`` as two matrix products over channels: [R, O, h, w] to [R, C, 2h, 2w].

    A 2x2 deconvolution of stride 2 gives every pixel four outputs of its own, and the predictor looks at one pixel at
    a time. So only the few logits move to their 2 x 2 places, not the wide features: less traffic, and on a CPU about
    half the time of the deconvolution's own backward.
    """
    num_rois, _, height, width = x.shape
    in_channels, channels = deconv.weight.shape[:2]
    weight = deconv.weight.permute(2, 3, 1, 0).reshape(4 * channels, in_channels)  # rows: dy, dx, output channel
    assert deconv.bias is not None
    pixels = x.permute(0, 2, 3, 1).contiguous()  # a strided bf16 product on the CPU takes 70 times as long
    hidden = F.relu(F.linear(pixels, weight, deconv.bias.repeat(4)))  # [R, h, w, 4 * channels]
    hidden = hidden.view(num_rois, height, width, 2, 2, channels)
    logits = F.linear(hidden, predictor.weight.flatten(1), predictor.bias)  # [R, h, w, dy, dx, C]
    return logits.permute(0, 5, 1, 3, 2, 4).reshape(num_rois, predictor.out_channels, 2 * height, 2 * width)
