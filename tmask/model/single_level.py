"""A single feature map in place of a pyramid: C4 (stride 16) or C5 (stride 32) of the backbone.

Letters: N images, C channels, H W size of the map.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from tmask.model.init import xavier
from tmask.model.norm import NormLayer


class SingleLevel(nn.Module):
    """The backbone's coarsest map as the only level, for RPN and RoI heads alike.

    `out_channels`: the width that a 1x1 convolution gives it, for heads as light as those of an FPN; None leaves the
    map as it is, which conv5 in the RoI heads needs. `norm` makes the layer behind that convolution.
    Source: He et al. 2017, "Mask R-CNN", tables 2a (C4) and 2d (C5).
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: int | None = None, *, norm: NormLayer = nn.Identity
    ) -> None:
        super().__init__()
        self.out_channels = in_channels[-1] if out_channels is None else out_channels
        self.lateral = nn.Sequential()
        if out_channels is not None:
            conv = nn.Conv2d(in_channels[-1], out_channels, 1)
            xavier([conv])
            self.lateral.extend([conv, norm(out_channels)])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """[N, C_i, H_i, W_i] each, finest first, to one [N, C, H, W] of the last one's size."""
        return [self.lateral(maps[-1])]
