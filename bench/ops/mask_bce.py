"""mask_bce of a training step: 256 RoIs, 80 classes, 28 x 28, forward and backward, beside torchvision's form of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import CASES, MaskLossCase, sized
from bench.contest import DTYPES, Call, Contest, gradients
from bench.machine import device
from bench.variants import variants
from tmask_kernels import mask_bce
from tmask_kernels.testing import TOLERANCES, assert_close


class Given(NamedTuple):
    logits: Tensor  # [K, C, M, M]
    classes: Tensor  # [K] int64
    targets: Tensor  # [K, M, M] float32
    backward: bool


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@variants(
    cases=["W13-masks"],
    modes=["forward", "backward"],
    dtypes=["fp32", "bf16"],
    providers=["triton", "torchvision", "compile", "reference"],
    where=lambda case, mode, dtype, layout, provider: provider != "compile" or dtype == "fp32",
)
def test_mask_bce(case: str, mode: str, dtype: str, layout: str, provider: str, contest: Any) -> None:
    contest(lambda: losing(case, mode, dtype))


def losing(name: str, mode: str, dtype: str) -> Contest:
    case, size = sized(cast(MaskLossCase, CASES[name]))
    backward = mode == "backward"

    def inputs() -> Given:
        logits, classes, targets = case.logits(DTYPES[dtype], device())
        return Given(logits.requires_grad_(backward), classes, targets, backward)

    def truth(given: Given) -> Any:
        logits = given.logits.detach().double().requires_grad_(backward)
        return provider(ours("reference"))(given._replace(logits=logits, targets=given.targets.double()))()

    return Contest(
        inputs=inputs,
        providers={
            "triton": provider(ours("triton")),
            "torchvision": provider(torchvision),
            "compile": provider(torch.compile(ours("reference"))),
            "reference": provider(ours("reference")),
        },
        truth=truth,
        check=lambda got, expected: check(got, expected, DTYPES[dtype]),
        work=case.loss_work(dtype, mode),
        size=size,
    )


def ours(backend: str) -> Loss:
    def loss(logits: Tensor, classes: Tensor, targets: Tensor) -> Tensor:
        return mask_bce(logits, classes, targets, valid=torch.ones_like(classes, dtype=torch.bool), backend=backend)

    return loss


def torchvision(logits: Tensor, classes: Tensor, targets: Tensor) -> Tensor:
    """The last lines of its mask loss."""
    rows = torch.arange(len(classes), device=classes.device)
    return F.binary_cross_entropy_with_logits(logits[rows, classes], targets.to(logits.dtype))


def provider(loss: Loss) -> Callable[[Given], Call]:
    """The loss, or the backward of a loss that was taken before."""

    def prepare(given: Given) -> Call:
        logits, classes, targets, backward = given
        if not backward:
            return lambda: loss(logits, classes, targets)
        out = loss(logits, classes, targets)
        return gradients(out, [logits], torch.ones_like(out))

    return prepare


def check(got: Any, expected: Any, dtype: torch.dtype) -> None:
    """Relative to the largest value, which for a gradient is far below 1."""
    got, expected = (x[0] if isinstance(x, tuple) else x for x in (got, expected))
    scale = expected.abs().max()
    assert_close(got.double() / scale, expected / scale, tolerance=TOLERANCES[dtype])
