"""sigmoid_focal_loss of an RPN's logits and of a box head's, summed, forward and backward, beside the peers.

A detector needs the sum, and a fused kernel need not write the loss of each element.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import torchvision
from torch import Tensor

from bench.cases._shared import ITEM, Case, bench_of_function, by_name
from bench.contest import Call, UnavailableError
from bench.machine import Work
from bench.standings import Aim
from tmask_kernels import sigmoid_focal_loss
from tmask_kernels.testing import TOLERANCES, Tolerance

# Relative to the largest value. torchvision rounds each of its ten steps to bfloat16, and its gradient is off by 1 %.
ALLOWED = {torch.float32: TOLERANCES[torch.float32], torch.bfloat16: Tolerance(max=2.0**-6, rms=2.0**-8)}


@dataclass(frozen=True, kw_only=True)
class FocalCase(Case):
    """The focal loss of a detector's logits, summed."""

    modes: tuple[str, ...] = ("forward", "backward")
    rows: int
    columns: int
    positives: float  # share of ones among the targets

    def small(self) -> FocalCase:
        return replace(self, rows=min(self.rows, 64), columns=min(self.columns, 999))

    def inputs(self, dtype: torch.dtype, where: torch.device) -> tuple[Tensor, Tensor]:
        """Return logits around RetinaNet's prior of 0.01, and targets of 0 and 1: [rows, columns] each."""
        generator = torch.Generator().manual_seed(13)
        logits = torch.randn(self.rows, self.columns, generator=generator) * 2 - 4.6
        targets = (torch.rand(self.rows, self.columns, generator=generator) < self.positives).float()
        return logits.to(where, dtype), targets.to(where, dtype)

    def work(self, dtype: str, mode: str = "forward") -> Work:
        """Logits and targets are read; the backward reads them again and writes the gradient. The loss takes about 20
        operations an element and its gradient 30, exponentials and logarithms counted once."""
        moved, flops = (2, 20) if mode == "forward" else (3, 30)
        elements = self.rows * self.columns
        return Work(bytes=moved * elements * ITEM[dtype], flops=flops * elements)


AIMS = {"": Aim(times=5)}
RPN = "logits of 268,569 anchors of 2 images"
CASES = by_name(
    FocalCase(name="focal-rpn", what=RPN, aims=AIMS, rows=2, columns=268_569, positives=0.001),
    FocalCase(
        name="focal-box-head", what="logits of 1,024 RoIs x 80", aims=AIMS, rows=1024, columns=80, positives=1 / 80
    ),
)


def mmcv(given: tuple[Tensor, Tensor]) -> Call:
    """mmcv takes the class of each row, so the RPN's logits are rows of one class; the class past the last is none."""
    from mmcv.ops import sigmoid_focal_loss as mmcv_focal_loss

    logits, targets = given
    if not logits.is_cuda:
        raise UnavailableError("mmcv has it on CUDA only")
    columns = 1 if len(logits) == 2 else logits.shape[1]
    hot = targets.reshape(-1, columns)
    if (hot.sum(1) > 1).any():
        raise UnavailableError("mmcv has one class a row")
    classes = torch.where(hot.any(1), hot.argmax(1), columns)
    return lambda: mmcv_focal_loss(logits.reshape(-1, columns), classes, 2.0, 0.25, None, "sum")


BENCH = bench_of_function(
    CASES,
    functools.partial(sigmoid_focal_loss, reduction="sum"),
    ALLOWED,
    {"torchvision": functools.partial(torchvision.ops.sigmoid_focal_loss, reduction="sum")},
    mmcv=mmcv,
)
test_sigmoid_focal_loss = BENCH.test(
    modes=["forward", "backward"],
    dtypes=["fp32", "bf16"],
    where=lambda case, mode, dtype, layout, provider: {
        "mmcv": dtype == "fp32",
        "compile": (case, dtype) == ("focal-rpn", "fp32"),
    }.get(provider, True),
)
