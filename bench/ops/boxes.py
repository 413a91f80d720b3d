"""decode_boxes, forward and backward, against torchvision's BoxCoder and its own reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

from bench.cases import CASES, RPNCase, sized
from bench.contest import Call, Contest, gradients
from bench.machine import device
from bench.variants import variants
from bench.work import Work
from tmask_kernels import decode_boxes
from tmask_kernels.testing import Tolerance, assert_close, random_boxes


@variants(
    cases=["W8-decode"], modes=["forward", "backward"], providers=["triton", "torchvision", "compile", "reference"]
)
def test_decode_boxes(case: str, mode: str, dtype: str, layout: str, provider: str, contest: Any) -> None:
    contest(lambda: decoding(mode))


def decoding(mode: str) -> Contest:
    """The boxes that W8 decodes: the best of each level of each image."""
    case, size = sized(cast(RPNCase, CASES["W8"]))
    count = case.images * case.candidates
    backward = mode == "backward"

    def inputs() -> tuple[Tensor, Tensor]:
        deltas = torch.randn(count, 4, generator=torch.Generator().manual_seed(0)).mul(0.3).to(device())
        anchors = random_boxes(count, height=case.height, width=case.width, min_size=16).to(device())
        return deltas.requires_grad_(backward), anchors

    def provider(decode: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any], Call]:
        def call(given: tuple[Tensor, Tensor]) -> Call:
            if not backward:
                return lambda: decode(*given)
            return gradients(decode(*given), given[:1], torch.ones(count, 4, device=device()))

        return call

    def ours(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda deltas, anchors: decode_boxes(deltas, anchors, backend=backend)

    def truth(given: tuple[Tensor, Tensor]) -> Any:
        return provider(ours("reference"))((given[0].detach().double().requires_grad_(backward), given[1]))()

    def check(got: Any, expected: Any) -> None:
        for value, true in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, expected)), strict=True):
            assert_close(value, true, tolerance=Tolerance(max=1e-5, rms=1e-6))

    return Contest(
        inputs=inputs,
        providers={
            "triton": provider(ours("triton")),
            "torchvision": provider(BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single),
            "compile": provider(torch.compile(ours("reference"))),
            "reference": provider(ours("reference")),
        },
        truth=truth,
        check=check,
        work=Work(bytes=(3 + backward) * count * 16, flops=20 * count),
        size=size,
    )
