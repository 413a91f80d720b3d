"""decode_boxes, forward and backward, against torchvision's BoxCoder and its own reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.cases._shared import Bench, Case, by_name, forward_or_backward
from bench.contest import Call
from bench.machine import Work, device
from tmask_kernels import decode_boxes
from tmask_kernels.testing import Tolerance, assert_close, random_boxes


@dataclass(frozen=True, kw_only=True)
class BoxCodingCase(Case):
    """Deltas of K anchors to decode."""

    dtype: str = "fp32"
    modes: tuple[str, ...] = ("forward", "backward")
    boxes: int

    def small(self) -> BoxCodingCase:
        return replace(self, boxes=640)

    def work(self, dtype: str, mode: str = "forward") -> Work:
        """Deltas and anchors are read and boxes written; the backward also reads the gradient of the output."""
        return Work(bytes=(4 if mode == "backward" else 3) * self.boxes * 16, flops=20 * self.boxes)


CASES = by_name(BoxCodingCase(name="box-coding", what="the 17,638 boxes that proposals-rpn decodes", boxes=17_638))


def inputs(case: BoxCodingCase, mode: str, dtype: str, layout: str) -> tuple[Tensor, Tensor]:
    """Return deltas and anchors, [K, 4] each."""
    deltas = torch.randn(case.boxes, 4, generator=torch.Generator().manual_seed(0)).mul(0.3).to(device())
    anchors = random_boxes(case.boxes, height=800, width=1344, min_size=16).to(device())
    return deltas.requires_grad_(mode == "backward"), anchors


def provider(decode: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any], Call]:
    return lambda given: forward_or_backward(lambda: decode(*given), given[:1] if given[0].requires_grad else ())


def ours(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda deltas, anchors: decode_boxes(deltas, anchors, backend=backend)


def torchvision(deltas: Tensor, anchors: Tensor) -> Tensor:
    from torchvision.models.detection._utils import BoxCoder

    return BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(deltas, anchors)


def truth(given: tuple[Tensor, Tensor]) -> Any:
    exact = given[0].detach().double().requires_grad_(given[0].requires_grad)
    return provider(ours("reference"))((exact, given[1]))()


def check(got: Any, expected: Any) -> None:
    for value, true in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, expected)), strict=True):
        assert_close(value, true, tolerance=Tolerance(max=1e-5, rms=1e-6))


PROVIDERS = {
    "triton": provider(ours("triton")),
    "torchvision": provider(torchvision),
    "compile": provider(torch.compile(ours("reference"))),
    "reference": provider(ours("reference")),
}
BENCH = Bench(cases=CASES, inputs=inputs, providers=PROVIDERS, truth=truth, check=check)
test_decode_boxes = BENCH.test(modes=["forward", "backward"])
