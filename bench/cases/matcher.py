"""W9: anchors and ground truth. Letters as in `bench.cases`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.cases.case import IOU_FLOPS
from bench.cases.proposals import RPNCase
from bench.work import Work
from tmask_kernels import make_anchors
from tmask_kernels.testing import random_boxes


@dataclass(frozen=True, kw_only=True)
class MatchCase:
    """The anchors of the RPN against the ground truth of N images."""

    name: str
    images: int = 2
    height: int = 800
    width: int = 1344
    gt: int = 100  # boxes of an image, G
    high: float = 0.7
    low: float = 0.3

    def small(self) -> MatchCase:
        return replace(self, height=128, width=160, gt=12)

    @property
    def rpn(self) -> RPNCase:
        return RPNCase(name=self.name, images=self.images, height=self.height, width=self.width)

    def inputs(self, where: torch.device) -> tuple[Tensor, Tensor]:
        """Anchors [A, 4] and boxes [N, G, 4]. Each box overlaps an anchor: libraries differ on those that do not."""
        rpn = self.rpn
        anchors = make_anchors(rpn.spec, rpn.sizes, (self.height, self.width))
        boxes = random_boxes(
            self.images * self.gt, height=self.height, width=self.width, min_size=20, max_size=600, seed=10
        )
        return anchors.to(where), boxes.view(self.images, self.gt, 4).to(where)

    def work(self) -> Work:
        """Anchors and boxes read, four bytes an anchor and image written; each anchor against each box."""
        answers = self.images * self.rpn.anchors
        moved = self.rpn.anchors * 16 + self.images * self.gt * 16 + answers * 4
        return Work(bytes=moved, flops=answers * self.gt * IOU_FLOPS)
