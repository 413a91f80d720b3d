"""Feature pyramid: backbone maps in, P2-P6 of one width out (Lin et al. 2017, "Feature Pyramid Networks").

Letters: N images, C channels of every level, H W size of a level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from tmask.model.init import xavier
from tmask.model.norm import NormLayer


class FPN(nn.Module):
    """Lateral 1x1 convolutions, a top-down path of nearest upsampling, a 3x3 convolution a level, and P6.

    Takes the backbone's maps, finest first, and gives one level more: the last is the coarsest again at half size.
    `norm` makes the layer behind each convolution.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, *, norm: NormLayer = nn.Identity) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.lateral = nn.ModuleList(nn.Conv2d(channels, out_channels, 1) for channels in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in in_channels)
        xavier([*self.lateral, *self.output])
        self.lateral_norm = nn.ModuleList(norm(out_channels) for _ in in_channels)
        self.output_norm = nn.ModuleList(norm(out_channels) for _ in in_channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """[N, C_i, H_i, W_i] each, finest first, to [N, C, H_i, W_i] each and one level [N, C, ~H/2, ~W/2] more."""
        lateral = zip(self.lateral_norm, self.lateral, maps, strict=True)
        merged = [norm(conv(x)) for norm, conv, x in lateral]
        for level in range(len(merged) - 2, -1, -1):
            # To the exact size of the finer map, not by a factor of 2: odd sizes occur.
            merged[level] = merged[level] + F.interpolate(merged[level + 1], size=merged[level].shape[-2:])
        output = zip(self.output_norm, self.output, merged, strict=True)
        levels = [norm(conv(x)) for norm, conv, x in output]
        return [*levels, F.max_pool2d(levels[-1], kernel_size=1, stride=2)]
