"""W14: heat maps of an image's people, to decode. Letters as in `tmask_kernels.ops.decode_keypoints.reference`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases.case import ITEM
from bench.work import Work

BLURRED = 2  # a keypoint head's last step doubles its map


@dataclass(frozen=True, kw_only=True)
class KeypointCase:
    """D boxes of people in one image, with K heat maps each."""

    name: str
    boxes: int = 100
    keypoints: int = 17
    side: int = 56
    height: int = 800
    width: int = 1333

    def small(self) -> KeypointCase:
        return replace(self, boxes=2, keypoints=2, side=10, height=60, width=90)

    def inputs(self, dtype: torch.dtype, where: torch.device) -> tuple[Tensor, Tensor]:
        """Heat maps [1, D, K, H, W], a peak each over a rough ground, and boxes [1, D, 4], upright, of all sizes."""
        generator = torch.Generator().manual_seed(21)
        high = self.height * 0.04 * 24 ** torch.rand(self.boxes, generator=generator)  # 4 to 96 % of the image
        wide = high * (0.25 + 0.4 * torch.rand(self.boxes, generator=generator))
        sides = torch.stack([wide, high], 1)
        low = torch.rand(self.boxes, 2, generator=generator) * (torch.tensor([self.width, self.height]) - sides)
        boxes = torch.cat([low, low + sides], 1)[None]
        coarse = self.side // BLURRED
        count = self.boxes * self.keypoints
        centre = torch.rand(count, 2, 1, 1, generator=generator) * coarse
        at = torch.arange(coarse) + 0.5
        square = (at[:, None] - centre[:, 0]).square() + (at - centre[:, 1]).square()  # [D K, H / 2, W / 2]
        rough = torch.randn(square.shape, generator=generator)
        maps = 18 * (-square / 4).exp() - 6 + rough
        maps = F.interpolate(maps[:, None], scale_factor=float(BLURRED), mode="bilinear")[:, 0]
        maps = maps.view(1, self.boxes, self.keypoints, self.side, self.side)
        return maps.to(where, dtype), boxes.to(where)

    def work(self, dtype: str) -> Work:
        """Maps and boxes read, a point and a score written.

        Operations: a comparison of each cell. Pixels are not counted: few of them have to be computed.
        """
        maps = self.boxes * self.keypoints
        return Work(bytes=maps * (self.side**2 * ITEM[dtype] + 12) + self.boxes * 16, flops=maps * self.side**2)
