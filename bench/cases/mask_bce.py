"""mask_bce of a training step, forward and backward, beside torchvision's form of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases._shared import ITEM, Case, bench_of_function, by_name
from bench.machine import Work
from tmask_kernels import mask_bce
from tmask_kernels.testing import TOLERANCES, random_boxes


@dataclass(frozen=True, kw_only=True)
class MaskLossCase(Case):
    """The mask head's targets and loss in a training step: S positive RoIs of each of N images."""

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
        """Return masks [N, G, H, W] bool, ellipses; RoIs [N, S, 4] float32 around them; each RoI's mask [N, S]."""
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

    def inputs(self, dtype: torch.dtype, where: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [K, C, M, M], the channel of each RoI [K] and targets [K, M, M] float32, K = N * S."""
        generator = torch.Generator().manual_seed(16)
        K = self.images * self.rois
        logits = torch.randn(K, self.classes, self.side, self.side, generator=generator)
        classes = torch.randint(self.classes, (K,), generator=generator)
        targets = torch.rand(K, self.side, self.side, generator=generator)
        return logits.to(where, dtype), classes.to(where), targets.to(where)

    def work(self, dtype: str, mode: str = "forward") -> Work:
        """Targets: the bits under each RoI and its box are read, float32 targets written; each pixel under a RoI is
        sampled about once, with 4 taps, each a product and a sum. Loss: one channel of each RoI and its targets are
        read; the backward writes the gradient of every channel."""
        K, cells = self.images * self.rois, self.side**2
        if mode == "targets":
            _, boxes, _ = self.ground_truth(torch.device("cpu"))
            pixels = int((boxes[..., 2:] - boxes[..., :2]).double().prod(-1).sum())
            return Work(bytes=pixels // 8 + K * (16 + 8 + cells * 4), flops=8 * pixels)
        written = K * self.classes * cells * ITEM[dtype] if mode == "backward" else 4
        return Work(bytes=K * cells * (ITEM[dtype] + 4) + written, flops=10 * K * cells)


CASES = by_name(
    MaskLossCase(
        name="mask-loss",
        what="targets and loss of 28 x 28 masks of 2 x 128 RoIs, 80 classes",
        modes=("targets", "forward", "backward"),
    )
)


def ours(logits: Tensor, classes: Tensor, targets: Tensor, backend: str) -> Tensor:
    return mask_bce(logits, classes, targets, valid=torch.ones_like(classes, dtype=torch.bool), backend=backend)


def torchvision(logits: Tensor, classes: Tensor, targets: Tensor) -> Tensor:
    """The last lines of torchvision's mask loss."""
    rows = torch.arange(len(classes), device=classes.device)
    return F.binary_cross_entropy_with_logits(logits[rows, classes], targets.to(logits.dtype))


BENCH = bench_of_function(CASES, ours, TOLERANCES, {"torchvision": torchvision})
test_mask_bce = BENCH.test(
    modes=["forward", "backward"],
    dtypes=["fp32", "bf16"],
    where=lambda case, mode, dtype, layout, provider: provider != "compile" or dtype == "fp32",
)
