"""Mask heads: pooled RoI features in, one map of mask logits for each mask channel out.

Letters: R RoIs, C mask channels (see `MaskBranch.num_channels`), M mask side (twice the pooled side).
"""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from tmask.model.init import msra, xavier
from tmask.model.norm import NormLayer


class MaskHead(nn.Module):
    """Fully convolutional: `num_layers` 3x3 convolutions, a 2x2 deconvolution of stride 2, a 1x1 predictor.

    The predictor has `num_masks` channels, or with None its kernel comes with each call. The mask that `fusion` makes
    of what the predictor sees is added to every channel's. `norm` makes the layer behind each of the 3x3 convolutions.
    Source: He et al. 2017, "Mask R-CNN", figure 4 right.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        channels: int,
        num_layers: int,
        num_masks: int | None,
        fusion: nn.Module | None = None,
        norm: NormLayer = nn.Identity,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * num_layers
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(norm(channels) for _ in self.convs)
        self.deconv = nn.ConvTranspose2d(widths[-1], channels, 2, stride=2)
        self.predictor = nn.Conv2d(channels, num_masks, 1) if num_masks is not None else None
        msra([*self.convs, self.deconv])
        if self.predictor is not None:
            _init_predictor(self.predictor)
        self.fusion = fusion

    def forward(self, x: Tensor, predictor: Tensor | None = None) -> Tensor:
        """Pooled features [R, in_channels, M / 2, M / 2] to mask logits [R, C, M, M].

        `predictor` [C, channels]: a kernel in place of the head's own, without bias.
        """
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = F.relu(norm(conv(x)))
        hidden = _deconv(x, self.deconv)
        if predictor is None:
            assert self.predictor is not None, "made without a predictor: give one"
            logits = F.linear(hidden, self.predictor.weight.flatten(1), self.predictor.bias)
        else:
            logits = F.linear(hidden, predictor)  # [R, h, w, dy, dx, C]
        logits = logits.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return logits if self.fusion is None else logits + self.fusion(hidden)


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
        xavier(self.fcs)  # as the box head's: MSRA's fan_out would triple what the wide first layer is given
        _init_predictor(self.predictor)

    def forward(self, x: Tensor) -> Tensor:
        """Pooled features [R, in_channels, M / 2, M / 2] to mask logits [R, C, M, M]."""
        x = x.flatten(1)
        for fc in self.fcs:
            x = F.relu(fc(x))
        return self.predictor(x).unflatten(1, (-1, self.side, self.side))


def _init_predictor(predictor: nn.Conv2d | nn.Linear) -> None:
    """So that every pixel begins near 0.5."""
    nn.init.normal_(predictor.weight, std=0.001)
    assert predictor.bias is not None
    nn.init.zeros_(predictor.bias)


def _deconv(x: Tensor, deconv: nn.ConvTranspose2d) -> Tensor:
    """``relu(deconv(x))`` as a matrix product over channels: [R, in_channels, h, w] to [R, h, w, dy, dx, channels].

    A 2x2 deconvolution of stride 2 gives every pixel four outputs of its own, and the predictor looks at one pixel at
    a time. So only the few logits move to their 2 x 2 places, not the wide features: less traffic, and on a CPU about
    half the time of the deconvolution's own backward.
    """
    in_channels, channels = deconv.weight.shape[:2]
    weight = deconv.weight.permute(2, 3, 1, 0).reshape(4 * channels, in_channels)  # rows: dy, dx, output channel
    assert deconv.bias is not None
    pixels = x.permute(0, 2, 3, 1).contiguous()  # a strided bf16 product on the CPU takes 70 times as long
    hidden = F.relu(F.linear(pixels, weight, deconv.bias.repeat(4)))  # [R, h, w, 4 * channels]
    return hidden.unflatten(-1, (2, 2, channels))
