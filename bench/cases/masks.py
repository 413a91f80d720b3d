"""W10, and the mask losses of W13: masks to paste, to crop and to learn. Letters as in `bench.cases`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.cases.case import ITEM
from bench.cases.roi_align import rois
from bench.work import Work
from tmask_kernels.testing import random_boxes


@dataclass(frozen=True, kw_only=True)
class PasteCase:
    """K masks of M x M pasted into one image by the rule of a library."""

    name: str
    masks: int = 100
    side: int = 28
    height: int = 800
    width: int = 1333
    convention: str = "torchvision"

    def small(self) -> PasteCase:
        return replace(self, masks=12, height=120, width=161)

    def inputs(self, where: torch.device) -> tuple[Tensor, Tensor]:
        """Probabilities [K, M, M], soft blobs with rough outlines, and boxes [K, 4].

        Boxes are no smaller than a detector leaves them, and their outlines, once torchvision has grown them by two
        cells, are not so near an integer that float32 could cut them to another one.
        """
        boxes = rois(1, 4 * self.masks, self.height, self.width, seed=11)[0].double()
        grown = (boxes[:, 2:] - boxes[:, :2]) * (1 / self.side)
        edges = torch.cat([boxes[:, :2] - grown, boxes[:, 2:] + grown], dim=1)
        clear = ((edges - edges.round()).abs() > 1e-3).all(1) & ((boxes[:, 2:] - boxes[:, :2]) >= 4).all(1)
        boxes = boxes[clear][: self.masks].float()
        assert len(boxes) == self.masks
        generator = torch.Generator().manual_seed(12)
        at = (torch.arange(self.side) + 0.5) / self.side - 0.5
        radii = 0.3 + 0.15 * torch.rand(self.masks, 2, 1, 1, generator=generator)
        distance = (at[:, None] / radii[:, 0]).square() + (at / radii[:, 1]).square()  # [K, M, M]
        logits = 6 * (1 - distance) + torch.randn(distance.shape, generator=generator)
        return logits.sigmoid().to(where), boxes.to(where)

    def work(self, mode: str) -> Work:
        """Masks and boxes read, the output written once: a byte a pixel, a bit a pixel, or runs. A blob has a run of
        ones and one of zeros in each column of its box, four bytes each.

        Operations: 4 taps of each pixel of a box.
        """
        _, boxes = self.inputs(torch.device("cpu"))
        sides = (boxes[:, 2:] - boxes[:, :2]).double()
        words = -(-self.width // 32)
        out = {
            "bool": self.masks * self.height * self.width,
            "packed": self.masks * self.height * words * 4,
            "rle": int(sides[:, 0].sum()) * 8,
        }[mode]
        return Work(bytes=self.masks * (self.side**2 * 4 + 16) + out, flops=8 * int(sides.prod(1).sum()))


@dataclass(frozen=True, kw_only=True)
class MaskLossCase:
    """The mask head's targets and loss in a training step: S positive RoIs of each of N images."""

    name: str
    images: int = 2
    rois: int = 128  # of an image, S
    gt: int = 20  # masks of an image, G
    height: int = 800
    width: int = 1344
    side: int = 28
    classes: int = 80

    def small(self) -> MaskLossCase:
        return replace(self, rois=8, gt=3, height=120, width=160, classes=5)

    def ground_truth(self, where: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Masks [N, G, H, W] bool, ellipses; RoIs [N, S, 4] float32 around them; the mask of each RoI [N, S]."""
        boxes = random_boxes(
            self.images * self.gt, height=self.height, width=self.width, min_size=24, max_size=500, seed=14
        ).view(self.images, self.gt, 4)
        centre, half = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]) / 2
        y, x = torch.arange(self.height) + 0.5, torch.arange(self.width) + 0.5
        high = ((y - centre[..., 1:]) / half[..., 1:]).square()  # [N, G, H]
        wide = ((x - centre[..., :1]) / half[..., :1]).square()  # [N, G, W]
        masks = high[..., None] + wide[..., None, :] < 1
        generator = torch.Generator().manual_seed(15)
        owner = torch.randint(self.gt, (self.images, self.rois), generator=generator)
        near = boxes.gather(1, owner[..., None].expand(-1, -1, 4))
        near = near + torch.randn(near.shape, generator=generator) * 0.1 * half.gather(
            1, owner[..., None].expand(-1, -1, 2)
        ).repeat(1, 1, 2)
        limit = torch.tensor([self.width, self.height] * 2, dtype=torch.float32)
        return masks.to(where), near.clamp(min=0).minimum(limit).to(where), owner.to(where)

    def logits(self, dtype: torch.dtype, where: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [K, C, M, M], the channel of each RoI [K] and targets [K, M, M] float32, K = N * S."""
        generator = torch.Generator().manual_seed(16)
        K = self.images * self.rois
        logits = torch.randn(K, self.classes, self.side, self.side, generator=generator)
        classes = torch.randint(self.classes, (K,), generator=generator)
        targets = torch.rand(K, self.side, self.side, generator=generator)
        return logits.to(where, dtype), classes.to(where), targets.to(where)

    def target_work(self) -> Work:
        """The bits under each RoI and its box read, float32 targets written. Each pixel under a RoI is sampled about
        once: 4 taps, each a product and a sum."""
        _, boxes, _ = self.ground_truth(torch.device("cpu"))
        pixels = int((boxes[..., 2:] - boxes[..., :2]).double().prod(-1).sum())
        K = self.images * self.rois
        return Work(bytes=pixels // 8 + K * (16 + 8 + self.side**2 * 4), flops=8 * pixels)

    def loss_work(self, dtype: str, mode: str) -> Work:
        """One channel of each RoI and its targets read; backward writes the gradient of every channel."""
        K = self.images * self.rois
        read = K * self.side**2 * (ITEM[dtype] + 4)
        written = K * self.classes * self.side**2 * ITEM[dtype] if mode == "backward" else 4
        return Work(bytes=read + written, flops=10 * K * self.side**2)
