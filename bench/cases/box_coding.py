"""decode_boxes, forward and backward, against torchvision's BoxCoder and its own reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.cases._shared import Case, bench_of_function, by_name
from bench.machine import Work
from tmask_kernels import decode_boxes
from tmask_kernels.testing import Tolerance, random_boxes


@dataclass(frozen=True, kw_only=True)
class BoxCodingCase(Case):
    """Deltas of K anchors to decode."""

    dtype: str = "fp32"
    modes: tuple[str, ...] = ("forward", "backward")
    boxes: int

    def small(self) -> BoxCodingCase:
        return replace(self, boxes=640)

    def inputs(self, dtype: torch.dtype, where: torch.device) -> tuple[Tensor, Tensor]:
        """Return deltas and anchors, [K, 4] each."""
        deltas = torch.randn(self.boxes, 4, generator=torch.Generator().manual_seed(0)).mul(0.3)
        return deltas.to(where), random_boxes(self.boxes, height=800, width=1344, min_size=16).to(where)

    def work(self, dtype: str, mode: str = "forward") -> Work:
        """Deltas and anchors are read and boxes written; the backward also reads the gradient of the output."""
        return Work(bytes=(4 if mode == "backward" else 3) * self.boxes * 16, flops=20 * self.boxes)


CASES = by_name(BoxCodingCase(name="box-coding", what="the 17,638 boxes that proposals-rpn decodes", boxes=17_638))


def torchvision(deltas: Tensor, anchors: Tensor) -> Tensor:
    from torchvision.models.detection._utils import BoxCoder

    return BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(deltas, anchors)


ALLOWED = {torch.float32: Tolerance(max=1e-5, rms=1e-6)}
BENCH = bench_of_function(CASES, decode_boxes, ALLOWED, {"torchvision": torchvision})
test_decode_boxes = BENCH.test(modes=["forward", "backward"])
