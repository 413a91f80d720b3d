"""sigmoid_focal_loss (W11): an RPN's logits and a box head's, summed, forward and backward, beside the peers.

The sum is what a detector needs, and a fused kernel need not write the loss of each element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss as torchvision_focal_loss

from bench.cases import CASES, FocalCase, sized
from bench.contest import DTYPES, Call, Contest, UnavailableError, gradients
from bench.machine import device
from bench.variants import variants
from tmask_kernels import sigmoid_focal_loss
from tmask_kernels.testing import TOLERANCES, Tolerance, assert_close

# Relative to the largest value. torchvision rounds each of its ten steps to bfloat16, and its gradient is off by 1 %.
ALLOWED = {torch.float32: TOLERANCES[torch.float32], torch.bfloat16: Tolerance(max=2.0**-6, rms=2.0**-8)}

Loss = Callable[[Tensor, Tensor], Tensor]  # logits, targets -> their sum


class Given(NamedTuple):
    logits: Tensor  # [rows, columns]
    targets: Tensor  # the same shape and dtype, 0 or 1
    backward: bool


@variants(
    cases=["W11", "W11-head"],
    modes=["forward", "backward"],
    dtypes=["fp32", "bf16"],
    providers=["triton", "torchvision", "mmcv", "compile", "reference"],
    where=lambda case, mode, dtype, layout, provider: {
        "mmcv": dtype == "fp32",
        "compile": (case, dtype) == ("W11", "fp32"),
    }.get(provider, True),
)
def test_sigmoid_focal_loss(case: str, mode: str, dtype: str, layout: str, provider: str, contest: Any) -> None:
    contest(lambda: focusing(case, mode, dtype))


def focusing(name: str, mode: str, dtype: str) -> Contest:
    case, size = sized(cast(FocalCase, CASES[name]))
    backward = mode == "backward"

    def inputs() -> Given:
        logits, targets = case.inputs(DTYPES[dtype], device())
        return Given(logits.requires_grad_(backward), targets, backward)

    def truth(given: Given) -> Any:
        logits = given.logits.detach().double().requires_grad_(backward)
        return summed(ours("reference"))(Given(logits, given.targets.double(), backward))()

    return Contest(
        inputs=inputs,
        providers={
            "triton": summed(ours("triton")),
            "torchvision": summed(lambda x, t: torchvision_focal_loss(x, t, reduction="sum")),
            "mmcv": mmcv,
            "compile": summed(torch.compile(ours("reference"))),
            "reference": summed(ours("reference")),
        },
        truth=truth,
        check=lambda got, expected: check(got, expected, DTYPES[dtype]),
        work=case.work(dtype, mode),
        size=size,
    )


def ours(backend: str) -> Loss:
    return lambda x, t: sigmoid_focal_loss(x, t, reduction="sum", backend=backend)


def summed(loss: Loss) -> Callable[[Given], Call]:
    """The loss, or the backward of a loss that was taken before."""

    def provider(given: Given) -> Call:
        logits, targets, backward = given
        if not backward:
            return lambda: loss(logits, targets)
        out = loss(logits, targets)
        return gradients(out, [logits], torch.ones_like(out))

    return provider


def mmcv(given: Given) -> Call:
    """It takes the class of each row, so the RPN's logits are rows of one class; the class past the last is none."""
    from mmcv.ops import sigmoid_focal_loss as mmcv_focal_loss

    if not given.logits.is_cuda:
        raise UnavailableError("mmcv has it on CUDA only")
    columns = 1 if len(given.logits) == 2 else given.logits.shape[1]
    hot = given.targets.reshape(-1, columns)
    if (hot.sum(1) > 1).any():
        raise UnavailableError("mmcv has one class a row")
    classes = torch.where(hot.any(1), hot.argmax(1), columns)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return mmcv_focal_loss(logits.reshape(-1, columns), classes, 2.0, 0.25, None, "sum")

    return summed(loss)(given)


def check(got: Any, expected: Any, dtype: torch.dtype) -> None:
    """Relative to the largest value, which for a gradient is far below 1."""
    got, expected = (x[0] if isinstance(x, tuple) else x for x in (got, expected))
    scale = expected.abs().max()
    assert_close(got.double() / scale, expected / scale, tolerance=ALLOWED[dtype])
