"""Keypoint head: pooled RoI features in, one heat map for each keypoint out.

Letters: R RoIs, Kp keypoints, M heat-map side (four times the pooled side).
"""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from tmask.model.init import msra


class KeypointHead(nn.Module):
    """`num_layers` 3x3 convolutions, a 4x4 deconvolution of stride 2 to the keypoints, bilinear upsampling by 2.

    Source: He et al. 2017, "Mask R-CNN", section 5.
    """

    def __init__(self, *, in_channels: int, channels: int, num_layers: int, num_keypoints: int) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * num_layers
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in itertools.pairwise(widths)
        )
        self.deconv = nn.ConvTranspose2d(channels, num_keypoints, 4, stride=2, padding=1)
        msra([*self.convs, self.deconv])

    def forward(self, x: Tensor) -> Tensor:
        """Pooled features [R, in_channels, M / 4, M / 4] to heat maps of logits [R, Kp, M, M], float32."""
        for conv in self.convs:
            x = F.relu(conv(x))
        # In float32, as the softmax over a heat map needs it.
        return F.interpolate(self.deconv(x).float(), scale_factor=2, mode="bilinear", align_corners=False)
