"""W11: logits of an RPN and of a box head. Letters as in `bench.cases`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.cases.case import ITEM
from bench.work import Work


@dataclass(frozen=True, kw_only=True)
class FocalCase:
    """The focal loss of a detector's logits, summed."""

    name: str
    rows: int
    columns: int
    positives: float  # share of ones among the targets

    def small(self) -> FocalCase:
        return replace(self, rows=min(self.rows, 64), columns=min(self.columns, 999))

    def inputs(self, dtype: torch.dtype, where: torch.device) -> tuple[Tensor, Tensor]:
        """Logits around the prior of 0.01 that RetinaNet begins with, and targets of 0 and 1: [rows, columns] each."""
        generator = torch.Generator().manual_seed(13)
        logits = torch.randn(self.rows, self.columns, generator=generator) * 2 - 4.6
        targets = (torch.rand(self.rows, self.columns, generator=generator) < self.positives).float()
        return logits.to(where, dtype), targets.to(where, dtype)

    def work(self, dtype: str, mode: str) -> Work:
        """Logits and targets read; backward reads them again and writes the gradient. About 20 operations of the loss
        and 30 of its gradient, exponentials and logarithms counted once."""
        moved, flops = (2, 20) if mode == "forward" else (3, 30)
        elements = self.rows * self.columns
        return Work(bytes=moved * elements * ITEM[dtype], flops=flops * elements)
