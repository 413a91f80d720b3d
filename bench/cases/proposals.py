"""W8: the proposals of an RPN. Letters as in `bench.cases`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.cases.case import ITEM, STRIDES
from bench.cases.roi_align import rois
from bench.work import Work
from tmask_kernels import AnchorSpec, make_anchors
from tmask_kernels.common.reference import box_iou


@dataclass(frozen=True, kw_only=True)
class RPNCase:
    """From the RPN's maps of N images to proposals."""

    name: str
    images: int = 2
    height: int = 800
    width: int = 1344
    pre_nms_top_n: int = 2000
    post_nms_top_n: int = 1000
    nms_threshold: float = 0.7

    def small(self) -> RPNCase:
        return replace(self, height=128, width=160, pre_nms_top_n=64, post_nms_top_n=64)

    @property
    def spec(self) -> AnchorSpec:
        """torchvision's anchors."""
        return AnchorSpec(sizes=((32,), (64,), (128,), (256,), (512,)), aspect_ratios=(0.5, 1.0, 2.0), rounded=True)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of P2 to P6; P6 is every second cell of P5."""
        levels = [(self.height // s, self.width // s) for s in STRIDES[:4]]
        return [*levels, ((levels[-1][0] + 1) // 2, (levels[-1][1] + 1) // 2)]

    @property
    def anchors(self) -> int:
        """Of one image."""
        return 3 * sum(h * w for h, w in self.sizes)

    @property
    def candidates(self) -> int:
        """Of one image that enter the NMS."""
        return sum(min(self.pre_nms_top_n, 3 * h * w) for h, w in self.sizes)

    def inputs(self, dtype: torch.dtype, where: torch.device) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Logits [N, 3, H, W] and deltas [N, 12, H, W] of each level, sizes [N, 2]. An anchor near an object scores."""
        generator = torch.Generator().manual_seed(8)
        anchors = make_anchors(self.spec, self.sizes, (self.height, self.width))  # [A, 4]
        logits = torch.randn(self.images, self.anchors, generator=generator) - 6
        for image, objects in enumerate(rois(self.images, 30, self.height, self.width, objects=(30, 30), seed=9)):
            for one in objects:
                logits[image] = torch.maximum(logits[image], logits[image] + 9 * box_iou(anchors, one))
        objectness, deltas = [], []
        start = 0
        for h, w in self.sizes:
            level = logits[:, start : start + 3 * h * w].view(self.images, h, w, 3).permute(0, 3, 1, 2)
            objectness.append(level.to(where, dtype).contiguous())
            deltas.append((torch.randn(self.images, 12, h, w, generator=generator) * 0.2).to(where, dtype))
            start += 3 * h * w
        return objectness, deltas, torch.tensor([[self.height, self.width]] * self.images, device=where)

    def work(self, dtype: str) -> Work:
        """Every logit, the deltas of those that enter the NMS, and the proposals with their scores and counts."""
        item = ITEM[dtype]
        read = self.images * (self.anchors + 4 * self.candidates) * item
        return Work(bytes=read + self.images * (self.post_nms_top_n * 20 + 8), flops=20 * self.images * self.candidates)
