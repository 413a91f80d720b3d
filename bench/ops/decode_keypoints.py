"""decode_keypoints (W14): 17 heat maps of each of 100 people, beside torchvision's and detectron2's loops over boxes.

Both of those resize the maps of one box after another and read its size on the host. Their scores differ by rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

from torch import Tensor
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints

from bench.cases import CASES, KeypointCase, sized
from bench.contest import DTYPES, Call, Contest
from bench.machine import device
from bench.variants import variants
from tmask_kernels import decode_keypoints
from tmask_kernels.testing import assert_close

# Two pixels beside a peak's top may be equal up to rounding: so many of the points may fall to the neighbour.
UNSURE = 0.01


class Given(NamedTuple):
    heatmaps: Tensor  # [1, D, K, H, W]
    boxes: Tensor  # [1, D, 4]


class Points(NamedTuple):
    """A peer's answer without scores, or with those of torchvision's rule."""

    xy: Tensor  # [1, D, K, 2]
    scores: Tensor | None


@variants(
    cases=["W14"],
    dtypes=["fp32", "bf16"],
    providers=["triton", "torchvision", "detectron2", "reference"],
    # Half precision would round the peers' resized maps, to many equal pixels.
    where=lambda case, mode, dtype, layout, provider: dtype == "fp32" or provider in ("triton", "reference"),
)
def test_decode_keypoints(case: str, mode: str, dtype: str, layout: str, provider: str, contest: Any) -> None:
    contest(lambda: decoding(case, dtype))


def decoding(name: str, dtype: str) -> Contest:
    case, size = sized(cast(KeypointCase, CASES[name]))
    return Contest(
        inputs=lambda: Given(*case.inputs(DTYPES[dtype], device())),
        providers={
            "triton": ours("triton"),
            "torchvision": torchvision,
            "detectron2": detectron2,
            "reference": ours("reference"),
        },
        truth=truth,
        check=check,
        work=case.work(dtype),
        size=size,
    )


def ours(backend: str) -> Callable[[Given], Call]:
    return lambda given: lambda: Points(*decode_keypoints(given.heatmaps, given.boxes, backend=backend))


def torchvision(given: Given) -> Call:
    def call() -> Points:
        points, scores = heatmaps_to_keypoints(given.heatmaps[0], given.boxes[0])
        return Points(points[None, ..., :2], scores[None])

    return call


def detectron2(given: Given) -> Call:
    from detectron2.structures.keypoints import heatmaps_to_keypoints as detectron2_decode

    def call() -> Points:
        points = detectron2_decode(given.heatmaps[0], given.boxes[0])  # [D, K, 4]: x, y, logit, score
        return Points(points[None, ..., :2], points[None, ..., 2])

    return call


class Truth(NamedTuple):
    xy: Tensor
    scores: Tensor  # float64
    pixel: Tensor  # [1, D, 1, 2]: sides of a pixel, at most 1


def truth(given: Given) -> Truth:
    xy, scores = decode_keypoints(given.heatmaps.double(), given.boxes, backend="reference")
    sides = (given.boxes[..., 2:] - given.boxes[..., :2]).clamp(min=1)
    return Truth(xy, scores, (sides / sides.ceil())[:, :, None])


def check(got: Points, expected: Truth) -> None:
    if got.scores is not None:
        assert_close(got.scores, expected.scores)
    away = (got.xy - expected.xy).abs() / expected.pixel
    assert away.max() < 1.01, f"a point is {away.max():.3g} pixels off"
    moved = (away.amax(-1) > 0.01).double().mean().item()
    assert moved <= UNSURE, f"{moved:.1%} of the points are in another pixel"
