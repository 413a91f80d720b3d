"""decode_keypoints beside torchvision's and detectron2's loops over boxes.

Both peers resize the maps of one box after another and read the box's size on the host. Their scores differ by rule.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases._shared import ITEM, Bench, Case, by_name
from bench.contest import DTYPES, Call
from bench.machine import Work, device
from tmask_kernels import decode_keypoints
from tmask_kernels.testing import assert_close

BLURRED = 2  # a keypoint head's last step doubles its map
# Two pixels beside a peak's top may be equal up to rounding: so many of the points may fall to the neighbour.
UNSURE = 0.01


@dataclass(frozen=True, kw_only=True)
class KeypointCase(Case):
    """D boxes of people in one image, with K heat maps each."""

    boxes: int = 100
    keypoints: int = 17
    side: int = 56
    height: int = 800
    width: int = 1333

    def small(self) -> KeypointCase:
        return replace(self, boxes=2, keypoints=2, side=10, height=60, width=90)

    def inputs(self, dtype: torch.dtype, where: torch.device) -> tuple[Tensor, Tensor]:
        """Return heat maps [1, D, K, H, W], a peak each over rough ground, and upright boxes [1, D, 4] of all sizes."""
        generator = torch.Generator().manual_seed(21)
        high = self.height * 0.04 * 24 ** torch.rand(self.boxes, generator=generator)  # 4 to 96 % of the image
        wide = high * (0.25 + 0.4 * torch.rand(self.boxes, generator=generator))
        sides = torch.stack([wide, high], 1)
        low = torch.rand(self.boxes, 2, generator=generator) * (torch.tensor([self.width, self.height]) - sides)
        boxes = torch.cat([low, low + sides], 1)[None]
        coarse = self.side // BLURRED
        count = self.boxes * self.keypoints
        centre = torch.rand(count, 2, 1, 1, generator=generator) * coarse
        at = torch.arange(coarse) + 0.5
        square = (at[:, None] - centre[:, 0]).square() + (at - centre[:, 1]).square()  # [D K, H / 2, W / 2]
        rough = torch.randn(square.shape, generator=generator)
        maps = 18 * (-square / 4).exp() - 6 + rough
        maps = F.interpolate(maps[:, None], scale_factor=float(BLURRED), mode="bilinear")[:, 0]
        maps = maps.view(1, self.boxes, self.keypoints, self.side, self.side)
        return maps.to(where, dtype), boxes.to(where)

    def work(self, dtype: str, mode: str = "forward") -> Work:
        """Maps and boxes are read, a point and a score written; one comparison a cell. Few pixels must be computed."""
        maps = self.boxes * self.keypoints
        return Work(bytes=maps * (self.side**2 * ITEM[dtype] + 12) + self.boxes * 16, flops=maps * self.side**2)


CASES = by_name(KeypointCase(name="keypoints", what="17 heat maps of 56 x 56 for each of 100 people"))


class Given(NamedTuple):
    heatmaps: Tensor  # [1, D, K, H, W]
    boxes: Tensor  # [1, D, 4]


Points = tuple[Tensor, Tensor]  # [1, D, K, 2], and scores


class Truth(NamedTuple):
    xy: Tensor
    scores: Tensor  # float64
    pixel: Tensor  # [1, D, 1, 2]: sides of a pixel, at most 1


def torchvision(given: Given) -> Call:
    from torchvision.models.detection.roi_heads import heatmaps_to_keypoints

    def call() -> Points:
        points, scores = heatmaps_to_keypoints(given.heatmaps[0], given.boxes[0])
        return points[None, ..., :2], scores[None]

    return call


def detectron2(given: Given) -> Call:
    from detectron2.structures.keypoints import heatmaps_to_keypoints as detectron2_decode

    def call() -> Points:
        points = detectron2_decode(given.heatmaps[0], given.boxes[0])  # [D, K, 4]: x, y, logit, score
        return points[None, ..., :2], points[None, ..., 2]

    return call


def truth(given: Given) -> Truth:
    xy, scores = decode_keypoints(given.heatmaps.double(), given.boxes, backend="reference")
    sides = (given.boxes[..., 2:] - given.boxes[..., :2]).clamp(min=1)
    return Truth(xy, scores, (sides / sides.ceil())[:, :, None])


def check(got: Points, truth: Truth, provider: str) -> None:
    assert_close(got[1], truth.scores)
    away = (got[0] - truth.xy).abs() / truth.pixel
    assert away.max() < 1.01, f"a point is {away.max():.3g} pixels off"
    moved = (away.amax(-1) > 0.01).double().mean().item()
    assert moved <= UNSURE, f"{moved:.1%} of the points are in another pixel"


BENCH = Bench(
    cases=CASES,
    inputs=lambda case, mode, dtype, layout: Given(*case.inputs(DTYPES[dtype], device())),
    ours=lambda given, backend: decode_keypoints(*given, backend=backend),
    peers={"torchvision": torchvision, "detectron2": detectron2},
    truth=truth,
    check=check,
)
# Half precision would round the peers' resized maps, to many equal pixels.
test_decode_keypoints = BENCH.test(
    dtypes=["fp32", "bf16"],
    where=lambda case, mode, dtype, layout, provider: dtype == "fp32" or provider in ("triton", "reference"),
)
