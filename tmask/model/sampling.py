"""Which anchors or RoIs the losses see: a random, fixed-size sample with a bounded share of positives.

Letters: N images, P candidates (anchors or proposals) of an image, S sampled slots.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Sample(NamedTuple):
    """Chosen candidates: positives in the first slots, then negatives, then empty slots."""

    rows: Tensor  # [N, S] int64 into the P candidates; 0 in an empty slot
    positive: Tensor  # [N, S] bool
    valid: Tensor  # [N, S] bool: not empty


class Sampler(Protocol):
    """A function that draws candidates: `sample`, or in tests one that repeats another library's draw."""

    def __call__(self, positive: Tensor, negative: Tensor, *, size: int, positive_fraction: float) -> Sample:
        """See `sample`."""
        ...


def sample(
    positive: Tensor,
    negative: Tensor,
    *,
    size: int,
    positive_fraction: float,
    generator: torch.Generator | None = None,
) -> Sample:
    """Draw `size` of the candidates of each image, at most ``int(size * positive_fraction)`` of them positive.

    `positive` and `negative` are [N, P] bool and disjoint. Every set of positives of the number drawn is as likely as
    any other, but for ties of float32 keys, and so are those of negatives. Too few positives are made up for by
    negatives; too few of both leave slots empty. The draw follows from the state of `generator`, one of the masks'
    device (None: the default one); no host synchronisation.
    Source: Ren et al. 2015, "Faster R-CNN", section 3.1.3.
    """
    keys = torch.rand(positive.shape, device=positive.device, generator=generator)
    max_positive = int(size * positive_fraction)
    positive_index, is_positive = _random_subset(positive, keys, max_positive)  # [N, max_positive]
    negative_index, is_negative = _random_subset(negative, keys, size)  # [N, size]
    index = torch.cat([positive_index, negative_index], dim=1)
    chosen = torch.cat([is_positive, is_negative], dim=1)
    missing = max(0, size - index.shape[1])  # few candidates: a static shape
    index, chosen = F.pad(index, (0, missing)), F.pad(chosen, (0, missing))
    # A stable sort moves the chosen to the front and keeps positives before negatives; those beyond `size` fall off.
    front = torch.argsort(chosen.to(torch.uint8), dim=1, descending=True, stable=True)[:, :size]
    slot = torch.arange(size, device=positive.device)
    valid = slot < chosen.sum(dim=1, keepdim=True)
    is_positive_slot = slot < is_positive.sum(dim=1, keepdim=True)
    return Sample(torch.where(valid, index.gather(1, front), 0), is_positive_slot, valid)


def take_rows(values: Tensor, index: Tensor) -> Tensor:
    """Return the rows `index` [N, S] of each image of `values` [N, P, fields]: [N, S, fields]."""
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))


def _random_subset(mask: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Draw up to `count` random True positions of `mask` [N, P]. Return indices and which slots are used, the first."""
    order = torch.where(mask, keys, -1.0).topk(min(count, mask.shape[1]), dim=1)
    return order.indices, order.values >= 0
