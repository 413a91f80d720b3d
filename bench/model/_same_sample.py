"""torchvision's losses and ours of one and the same random choice of anchors and RoIs.

Letters: N images, M candidates, S sampled slots, P proposals.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.model._models import Pair
from tmask.model.sampling import Sample
from tmask.structures import Proposals


class Recorder:
    """torchvision's sampler; keeps what it drew."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.positive: list[Tensor] = []  # of each image [M] of 0 and 1
        self.negative: list[Tensor] = []

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        self.positive, self.negative = self.sampler(labels)
        return self.positive, self.negative


class Replay:
    """Our sampler making the recorded choice.

    `counts`: of RoIs, how many proposals each image has; ours stand padded to the largest, ground truth behind them.
    """

    def __init__(self, record: Recorder, counts: list[int] | None = None) -> None:
        self.record, self.counts = record, counts

    def __call__(self, positive: Tensor, negative: Tensor, *, size: int, positive_fraction: float) -> Sample:
        slots = torch.arange(size, device=positive.device)
        samples = []
        for i, masks in enumerate(zip(self.record.positive, self.record.negative, strict=True)):
            drawn, others = (mask.nonzero()[:, 0] for mask in masks)
            rows = torch.cat([drawn, others])
            if self.counts is not None:
                rows = torch.where(rows >= self.counts[i], rows + max(self.counts) - self.counts[i], rows)
            assert (positive[i, rows[: len(drawn)]]).all(), "a RoI is positive in torchvision alone"
            assert (negative[i, rows[len(drawn) :]]).all(), "a RoI is negative in torchvision alone"
            samples.append((F.pad(rows, (0, size - len(rows))), slots < len(drawn), slots < len(rows)))
        return Sample(*(torch.stack(column) for column in zip(*samples, strict=True)))


@torch.no_grad()
def losses_of_one_sample(pair: Pair, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor] | str]:
    """Losses of torchvision, seeded, and ours: of its anchors, its proposals and its RoIs.

    Instead of ours, what differs before them, if the two libraries do not call the same candidates positive.
    """
    theirs, ours = pair.theirs, pair.ours
    heads = [(theirs.rpn, ours.rpn), (theirs.roi_heads, ours.roi_heads)]
    before = [(their.fg_bg_sampler, our.sampler) for their, our in heads]
    records = [Recorder(sampler) for sampler, _ in before]
    proposals: list[Tensor] = []

    def keep(module: Any, args: Any, out: Any) -> None:
        proposals.extend(out[0])

    def replace(module: Any, args: Any, out: Any) -> Any:
        most = max(len(boxes) for boxes in proposals)  # P
        boxes = torch.stack([F.pad(boxes, (0, 0, 0, most - len(boxes))) for boxes in proposals])  # [N, P, 4]
        counts = torch.tensor([len(boxes) for boxes in proposals], device=boxes.device)
        ours.roi_heads.sampler = Replay(records[1], [len(boxes) for boxes in proposals])
        return Proposals(boxes, boxes[..., 0], counts), out[1]

    hooks = [theirs.rpn.register_forward_hook(keep), ours.rpn.register_forward_hook(replace)]
    try:
        theirs.rpn.fg_bg_sampler, theirs.roi_heads.fg_bg_sampler = records
        ours.rpn.sampler = Replay(records[0])
        torch.manual_seed(seed)
        their_losses = theirs(pair.images, [dict(target) for target in pair.targets])
        try:
            our_losses = ours(pair.images, pair.targets)
        except AssertionError as error:
            return their_losses, str(error)
    finally:
        for hook in hooks:
            hook.remove()
        for (their, our), (their_sampler, our_sampler) in zip(heads, before, strict=True):
            their.fg_bg_sampler, our.sampler = their_sampler, our_sampler
    return their_losses, our_losses
