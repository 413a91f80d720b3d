"""masks_to_rle of a segmenter's logits, beside pycocotools, which encodes them on the host."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases._shared import ITEM, Bench, Case, by_name
from bench.contest import DTYPES, Call
from bench.machine import Work, device
from bench.rle import decode_rle, encoder
from bench.standings import Aim
from tmask_kernels import masks_to_rle


@dataclass(frozen=True, kw_only=True)
class EncodeCase(Case):
    """K masks of whole images, resized from a segmenter's small logits."""

    masks: int = 100
    height: int = 800
    width: int = 1333
    side: int = 32  # of the small logits

    def small(self) -> EncodeCase:
        return replace(self, masks=6, height=90, width=131)

    def inputs(self, dtype: torch.dtype, where: torch.device) -> Tensor:
        """Return logits [K, H, W]: a blob of any size each over rough ground."""
        generator = torch.Generator().manual_seed(31)
        at = (torch.arange(self.side) + 0.5) / self.side
        centre = torch.rand(self.masks, 2, 1, 1, generator=generator)
        radius = 0.03 * 12 ** torch.rand(self.masks, 1, 1, generator=generator)
        square = ((at[:, None] - centre[:, 0]).square() + (at - centre[:, 1]).square()) / radius.square()  # [K, s, s]
        logits = 4 * (1 - square).clamp(min=-3) + torch.randn(square.shape, generator=generator)
        return F.interpolate(logits[None], (self.height, self.width), mode="bilinear")[0].to(where, dtype)

    def work(self, dtype: str, mode: str = "forward") -> Work:
        """The logits are read once, a comparison each; two runs in each column of a blob are little beside them."""
        cells = self.masks * self.height * self.width
        return Work(bytes=cells * ITEM[dtype], flops=cells)


CASES = by_name(
    EncodeCase(
        name="masks-to-rle",
        what="logits of 100 masks of 800 x 1333 pixels",
        aims={"": Aim(times=20, us=2_000)},  # with the strings, which the host writes
    )
)


def pycocotools(given: Tensor) -> Call:
    encode = encoder()
    return lambda: encode(given > 0)


def check(got: list[dict[str, Any]], truth: Tensor, provider: str) -> None:
    assert torch.equal(torch.stack([decode_rle(one) for one in got]), truth)


BENCH = Bench(
    cases=CASES,
    inputs=lambda case, mode, dtype, layout: case.inputs(DTYPES[dtype], device()),
    ours=lambda given, backend: masks_to_rle(given, 0.0, backend=backend),
    peers={"pycocotools": pycocotools},
    truth=lambda given: (given > 0).cpu(),
    check=check,
)
test_masks_to_rle = BENCH.test(dtypes=["fp32", "bf16"])
