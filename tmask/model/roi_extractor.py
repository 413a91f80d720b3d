"""RoI extractors: feature maps and boxes in, the features of each box out, of one size.

Letters: N images, C channels, H W size of a level, P boxes of an image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tmask_kernels import multiscale_roi_align, pyramid_levels, roi_pool

# Levels, boxes, valid and the side of the output, to the features of the boxes: see `RoIExtractor`.
Extractor = Callable[[Sequence[Tensor], Tensor, Tensor, int], Tensor]
# Boxes [N, S, 4], valid [N, S] and a side to features [N * S, C, side, side]: an extractor with its maps.
Pool = Callable[[Tensor, Tensor, int], Tensor]
Head = Callable[[Tensor], Tensor]  # features [R, C, side, side] of R boxes to maps [R, ..., M, M]


@dataclass(frozen=True, kw_only=True)
class RoIExtractor:
    """How RoI features are read from the pyramid: arguments of `multiscale_roi_align`, or `roi_pool` of each level."""

    strides: tuple[int, ...]  # pixels per cell of each level, finest first
    op: Literal["roi_align", "roi_pool"] = "roi_align"
    aligned: bool  # as the next three, of roi_align alone
    sampling_ratio: int
    reduction: Literal["mean", "max"] = "mean"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    level_convention: str

    def __call__(self, features: Sequence[Tensor], boxes: Tensor, valid: Tensor, output_size: int) -> Tensor:
        """Read levels [N, C, H, W] at boxes [N, P, 4], valid [N, P]: [N * P, C, output_size, output_size]."""
        features = features[: len(self.strides)]  # P6 serves the RPN alone
        scales = [1 / stride for stride in self.strides]
        if self.op == "roi_pool":
            # Every box is pooled from its own level and is 0 from the others.
            levels = pyramid_levels(boxes, scales, level_convention=self.level_convention)  # [N, P]
            pooled = [
                roi_pool(feature, boxes, output_size, scale, valid=valid & (levels == level))
                for level, (feature, scale) in enumerate(zip(features, scales, strict=True))
            ]
            return functools.reduce(torch.add, pooled)
        return multiscale_roi_align(
            features,
            boxes,
            output_size,
            scales,
            valid=valid,
            sampling_ratio=self.sampling_ratio,
            aligned=self.aligned,
            level_convention=self.level_convention,
            reduction=self.reduction,
            interpolation=self.interpolation,
        )


class StageExtractor(nn.Module):
    """`pool`, then a stage of the backbone on what it read: conv5 on RoIs of C4, which every head shares.

    `stage` halves the side, so `pool` reads twice as many bins: 14 x 14 for an output of 7 x 7. Empty slots are read as
    zeros and go through the stage as all others. Source: He et al. 2017, "Mask R-CNN", figure 4 left.
    """

    def __init__(self, pool: Extractor, stage: nn.Module) -> None:
        super().__init__()
        self.pool, self.stage = pool, stage

    def forward(self, features: Sequence[Tensor], boxes: Tensor, valid: Tensor, output_size: int) -> Tensor:
        """Read levels [N, C, H, W] at boxes [N, P, 4], valid [N, P]: [N * P, C', output_size, output_size]."""
        out: Tensor = self.stage(self.pool(features, boxes, valid, 2 * output_size))
        return out


def run_head(
    head: Head, pool: Pool, boxes: Tensor, valid: Tensor, side: int, *, compact: bool
) -> tuple[Tensor, Tensor | slice]:
    """Run `head` on the features of boxes [N, S, 4]. Return its rows and their flattened slots: all, or the valid ones.

    `compact`: see `MaskRCNN.forward_padded`.
    """
    pooled = pool(boxes, valid, side)
    # Data-dependent on purpose, and only where the caller asked for it: on a CPU empty slots cost real time.
    rows = valid.flatten().nonzero().squeeze(1) if compact else slice(None)
    return head(pooled[rows]), rows


def to_slots(values: Tensor, rows: Tensor | slice, valid: Tensor) -> Tensor:
    """Put the rows of `run_head` [R, ...] into the slots of valid [N, S]: [N, S, ...], zeros in slots without a row."""
    if isinstance(rows, Tensor):
        values = values.new_zeros(valid.numel(), *values.shape[1:]).index_copy(0, rows, values)
    return values.unflatten(0, valid.shape)
