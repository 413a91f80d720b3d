"""paste_masks to bools, bits and runs, by the peers' rules.

The rules of torchvision and detectron2 differ, so each has a case of its own. The check draws the run lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.cases._shared import Bench, Case, by_name, rois
from bench.contest import Call
from bench.machine import Work, device
from bench.rle import decode_rle, encoder
from bench.standings import Aim
from tmask_kernels import paste_masks, unpack_masks
from tmask_kernels.ops.paste_masks.reference import is_inside, resample

THRESHOLD = 0.5
# A pixel whose exact value is so near the threshold may fall to either side in float32.
CLOSE = 1e-5


@dataclass(frozen=True, kw_only=True)
class PasteCase(Case):
    """K masks of M x M pasted into one image by the rule of a library."""

    dtype: str = "fp32"
    modes: tuple[str, ...] = ("bool", "packed", "rle")
    masks: int = 100
    side: int = 28
    height: int = 800
    width: int = 1333
    convention: str = "torchvision"

    def small(self) -> PasteCase:
        return replace(self, masks=12, height=120, width=161)

    def inputs(self, where: torch.device) -> tuple[Tensor, Tensor]:
        """Return probabilities [K, M, M], soft blobs with rough outlines, and boxes [K, 4].

        Boxes are no smaller than a detector leaves them, and their outlines, once torchvision has grown them by two
        cells, are not so near an integer that float32 could cut them to another one.
        """
        boxes = rois(1, 4 * self.masks, self.height, self.width, seed=11)[0].double()
        grown = (boxes[:, 2:] - boxes[:, :2]) * (1 / self.side)
        edges = torch.cat([boxes[:, :2] - grown, boxes[:, 2:] + grown], dim=1)
        clear = ((edges - edges.round()).abs() > 1e-3).all(1) & ((boxes[:, 2:] - boxes[:, :2]) >= 4).all(1)
        boxes = boxes[clear][: self.masks].float()
        assert len(boxes) == self.masks
        generator = torch.Generator().manual_seed(12)
        at = (torch.arange(self.side) + 0.5) / self.side - 0.5
        radii = 0.3 + 0.15 * torch.rand(self.masks, 2, 1, 1, generator=generator)
        distance = (at[:, None] / radii[:, 0]).square() + (at / radii[:, 1]).square()  # [K, M, M]
        logits = 6 * (1 - distance) + torch.randn(distance.shape, generator=generator)
        return logits.sigmoid().to(where), boxes.to(where)

    def work(self, dtype: str = "fp32", mode: str = "bool") -> Work:
        """Masks and boxes read, the output written once: a byte a pixel, a bit a pixel, or runs. A blob has a run of
        ones and one of zeros in each column of its box, four bytes each.

        Operations: 4 taps of each pixel of a box.
        """
        _, boxes = self.inputs(torch.device("cpu"))
        sides = (boxes[:, 2:] - boxes[:, :2]).double()
        words = -(-self.width // 32)
        out = {
            "bool": self.masks * self.height * self.width,
            "packed": self.masks * self.height * words * 4,
            "rle": int(sides[:, 0].sum()) * 8,
        }[mode]
        return Work(bytes=self.masks * (self.side**2 * 4 + 16) + out, flops=8 * int(sides.prod(1).sum()))


AIMS = {"": Aim(times=50, us=300), "rle": Aim(times=50, us=1_000, mib=32e6 / 2**20)}
WHAT = "100 masks of 28 x 28 into 800 x 1333 pixels"
CASES = by_name(
    PasteCase(name="paste-masks", what=WHAT, aims=AIMS),
    PasteCase(name="paste-masks-detectron2", what=f"{WHAT}, by detectron2's rule", aims=AIMS, convention="detectron2"),
)


class Given(NamedTuple):
    case: PasteCase
    masks: Tensor  # [K, M, M]
    boxes: Tensor  # [K, 4]
    output: str

    @property
    def size(self) -> tuple[int, int]:
        return self.case.height, self.case.width


def ours(given: Given, backend: str) -> Any:
    _, masks, boxes, output = given
    convention = given.case.convention
    return paste_masks(masks, boxes, given.size, output=output, convention=convention, backend=backend)


def compiled(given: Given) -> Call:
    """The reference without its chunks, which the compiler would unroll."""
    y, x = (torch.arange(length, dtype=torch.float32, device=given.masks.device) for length in given.size)
    convention = given.case.convention

    @torch.compile
    def paste() -> Tensor:
        return is_inside(resample(given.masks, given.boxes, y, x, convention), THRESHOLD, convention)

    return paste


def torchvision(given: Given) -> Call:
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    return encoded(given, lambda: paste_masks_in_image(given.masks[:, None], given.boxes, given.size)[:, 0] > THRESHOLD)


def detectron2(given: Given) -> Call:
    from detectron2.layers.mask_ops import paste_masks_in_image

    return encoded(given, lambda: paste_masks_in_image(given.masks, given.boxes, given.size, threshold=THRESHOLD))


def encoded(given: Given, paste: Callable[[], Tensor]) -> Call:
    """For run lengths as both libraries' users do: pycocotools encodes the masks on the host."""
    if given.output == "bool":
        return paste
    encode = encoder()
    return lambda: encode(paste())


class Truth(NamedTuple):
    given: Given
    inside: Tensor  # [K, H, W] bool
    sure: Tensor  # [K, H, W] bool


def truth(given: Given) -> Truth:
    """From the reference's values in float64, at coordinates in float64."""
    convention = given.case.convention
    masks, boxes = given.masks.double(), given.boxes.double()
    value = paste_masks(masks, boxes, given.size, output="probability", convention=convention, backend="reference")
    return Truth(given, is_inside(value, THRESHOLD, convention), (value - THRESHOLD).abs() > CLOSE)


def check(got: Any, truth: Truth, provider: str) -> None:
    if truth.given.output == "packed":
        got = unpack_masks(got, truth.given.case.width)
    elif truth.given.output == "rle":
        got = torch.stack([decode_rle(one) for one in got]).to(truth.inside.device)
    assert got.dtype == torch.bool
    assert got.shape == truth.inside.shape
    wrong = ((got != truth.inside) & truth.sure).sum().item()
    assert not wrong, f"{wrong} pixels are on the wrong side of the threshold"


def _wanted(case: str, mode: str, dtype: str, layout: str, provider: str) -> bool:
    """Peers by their own rule; neither gives bits."""
    return {
        "torchvision": case == "paste-masks" and mode != "packed",
        "detectron2": case == "paste-masks-detectron2" and mode != "packed",
        "compile": (case, mode) == ("paste-masks", "bool"),
    }.get(provider, True)


BENCH = Bench(
    cases=CASES,
    inputs=lambda case, mode, dtype, layout: Given(case, *case.inputs(device()), mode),
    ours=ours,
    peers={"torchvision": torchvision, "detectron2": detectron2, "compile": compiled},
    truth=truth,
    check=check,
)
test_paste_masks = BENCH.test(modes=["bool", "packed", "rle"], where=_wanted)
