"""W5 to W7: NMS of many small segments and of one long list. Letters as in `bench.cases`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from bench.cases.case import IOU_FLOPS, STRIDES
from bench.cases.roi_align import cluster, rois
from bench.work import Work


class Segments(NamedTuple):
    """Input of `padded_nms`."""

    boxes: Tensor  # [S, K, 4] float32
    scores: Tensor  # [S, K] float32, no two of a segment equal
    valid: Tensor  # [S, K] bool


@dataclass(frozen=True, kw_only=True)
class NMSCase:
    """NMS of S segments of at most K boxes: RPN levels, classes, or one long list."""

    name: str
    kind: str  # "levels", "classes" or "list"
    lengths: tuple[int, ...]  # boxes of each segment; K is the largest
    threshold: float
    keep: int  # at most so many of a segment
    kept: float  # about so large a share of the boxes is kept

    def small(self) -> NMSCase:
        few = {"levels": 96, "classes": 64, "list": 256}[self.kind]
        lengths = tuple(min(n, few) - (few // 2 if n < max(self.lengths) else 0) for n in self.lengths)
        return replace(self, lengths=lengths[-12:], keep=min(self.keep, few))

    @property
    def boxes(self) -> int:
        """K, boxes of the longest segment."""
        return max(self.lengths)

    @property
    def segments_an_image(self) -> int:
        return 5 if self.kind == "levels" else len(self.lengths)

    def inputs(self, where: torch.device) -> Segments:
        make = {"levels": _level_segments, "classes": _class_segments, "list": _list_segment}[self.kind]
        return Segments(*(t.to(where) for t in make(self)))

    def work(self) -> Work:
        """Boxes and scores read, indices and counts written; every kept box is held against every one kept before."""
        S, kept = len(self.lengths), [n * self.kept for n in self.lengths]
        moved = sum(self.lengths) * (16 + 4) + S * (min(self.keep, self.boxes) + 1) * 8
        return Work(bytes=moved, flops=int(sum(n * (n - 1) / 2 for n in kept) * IOU_FLOPS))


def scores_of(*shape: int, seed: int) -> Tensor:
    """Scores in 0..1 [..., K], most of them low, no two of a row equal."""
    generator = torch.Generator().manual_seed(seed)
    rows, K = int(torch.tensor(shape[:-1]).prod()), shape[-1]
    ranks = torch.stack([torch.randperm(K, generator=generator) for _ in range(rows)]).view(shape)
    return ((ranks.double() + 0.5) / K).pow(4).float()


def _level_segments(case: NMSCase) -> tuple[Tensor, Tensor, Tensor]:
    """Five levels of each image in turn, a level's boxes as large as its anchors."""
    S, K = len(case.lengths), case.boxes
    boxes = [
        rois(1, K, 800, 1344, smallest=8 * STRIDES[s % 5] / 2, largest=8 * STRIDES[s % 5] * 2, seed=2 + s)[0]
        for s in range(S)
    ]
    valid = torch.arange(K) < torch.tensor(case.lengths)[:, None]
    return torch.stack(boxes), scores_of(S, K, seed=3), valid


def _class_segments(case: NMSCase) -> tuple[Tensor, Tensor, Tensor]:
    """The same RoIs in every class, moved a little; a RoI scores over 0.05 in few classes, a background RoI in none."""
    S, K = len(case.lengths), case.boxes
    generator = torch.Generator().manual_seed(4)
    boxes, owner = cluster(K, 800, 1344, (16, 800), (10, 50), 1.0, generator)  # [K, 4], [K]
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)  # [K, 4]
    moved = boxes + torch.randn(S, K, 4, generator=generator) * 0.03 * sides
    logits = torch.randn(S + 1, K, generator=generator)  # the last row: background
    logits[-1] += 3
    likely = torch.randint(S, (2, 50), generator=generator)[:, owner]  # [2, K]: an object looks like two classes
    logits.scatter_add_(0, likely, torch.rand(2, K, generator=generator) * torch.tensor([[8.0], [4.0]]))
    scores = logits.softmax(0)[:-1]
    return moved, scores, scores > 0.05


def _list_segment(case: NMSCase) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes around so many objects that about the wanted share is kept, in an image that grows with their number."""
    K = case.boxes
    objects = max(1, round(K * case.kept))
    side = round(200 * objects**0.5)
    boxes = rois(1, K, side, side, smallest=16, largest=128, objects=(objects, objects), spread=0.4, seed=6)
    return boxes, scores_of(1, K, seed=7), torch.ones(1, K, dtype=torch.bool)
