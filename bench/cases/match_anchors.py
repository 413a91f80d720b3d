"""match_anchors: the RPN's anchors against the ground truth of two images, beside torchvision's and detectron2's.

The peers' matchers take a matrix of IoUs [G, A], and its time is a part of theirs. The peers differ by rule on a ground
truth that no anchor overlaps, so the case has no such box. An answer that depends on the last bits of an IoU is not
compared.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou

from bench.cases._shared import IOU_FLOPS, Bench, Case, by_name
from bench.cases.proposals import RPNCase
from bench.contest import Call, Contest
from bench.machine import Work, device
from bench.standings import Aim
from tmask_kernels import make_anchors, match_anchors
from tmask_kernels.ops.match_anchors.reference import match_anchors_reference
from tmask_kernels.testing import Tolerance, assert_close, random_boxes

# Two IoUs that differ by less than this may come out in either order in float32.
CLOSE = 1e-6
# At most this share of the anchors may hang on the last bits.
UNSURE = 0.05


@dataclass(frozen=True, kw_only=True)
class MatchCase(Case):
    """The anchors of the RPN against the ground truth of N images."""

    dtype: str = "fp32"
    images: int = 2
    height: int = 800
    width: int = 1344
    gt: int = 100  # boxes of an image, G
    high: float = 0.7
    low: float = 0.3

    def small(self) -> MatchCase:
        return replace(self, height=128, width=160, gt=12)

    @property
    def rpn(self) -> RPNCase:
        return RPNCase(name=self.name, what=self.what, images=self.images, height=self.height, width=self.width)

    def inputs(self, where: torch.device) -> tuple[Tensor, Tensor]:
        """Return anchors [A, 4] and boxes [N, G, 4]. Each box overlaps an anchor: for other boxes libraries differ."""
        rpn = self.rpn
        anchors = make_anchors(rpn.spec, rpn.sizes, (self.height, self.width))
        boxes = random_boxes(
            self.images * self.gt, height=self.height, width=self.width, min_size=20, max_size=600, seed=10
        )
        return anchors.to(where), boxes.view(self.images, self.gt, 4).to(where)

    def work(self, dtype: str = "fp32", mode: str = "forward") -> Work:
        """Anchors and boxes are read, four bytes an anchor and image written; each anchor meets each box."""
        answers = self.images * self.rpn.anchors
        moved = self.rpn.anchors * 16 + self.images * self.gt * 16 + answers * 4
        return Work(bytes=moved, flops=answers * self.gt * IOU_FLOPS)


CASES = by_name(
    MatchCase(name="match-anchors", what="268,569 anchors against 100 boxes, 2 images", aims={"": Aim(times=5)})
)


class Given(NamedTuple):
    case: MatchCase
    anchors: Tensor  # [A, 4]
    boxes: Tensor  # [N, G, 4]
    valid: Tensor  # [N, G] bool: all


class Truth(NamedTuple):
    matches: Tensor  # [N, A] int64; -1 background, -2 ignored
    ious: Tensor  # [N, A] float64
    sure: Tensor  # [N, A] bool


def inputs(case: MatchCase, mode: str, dtype: str, layout: str) -> Given:
    anchors, boxes = case.inputs(device())
    return Given(case, anchors, boxes, torch.ones_like(boxes[..., 0], dtype=torch.bool))


def ours(given: Given, backend: str) -> tuple[Tensor, Tensor]:
    case, *tensors = given
    return match_anchors(*tensors, high=case.high, low=case.low, allow_low_quality=True, backend=backend)


def compiled(given: Given) -> Call:
    """The reference itself: the op hands it to the compiler as one closed node."""
    case, anchors, boxes, valid = given
    match = torch.compile(match_anchors_reference)
    return lambda: match(anchors[None], boxes, valid, None, case.high, case.low, True)


def torchvision(given: Given) -> Call:
    from torchvision.models.detection._utils import Matcher

    match = Matcher(given.case.high, given.case.low, allow_low_quality_matches=True)
    return lambda: [match(box_iou(one, given.anchors)) for one in given.boxes]


def detectron2(given: Given) -> Call:
    from detectron2.modeling.matcher import Matcher as Detectron2Matcher
    from detectron2.structures import Boxes, pairwise_iou

    case, anchors, boxes, _ = given
    match = Detectron2Matcher([case.low, case.high], [0, -1, 1], allow_low_quality_matches=True)
    return lambda: [match(pairwise_iou(Boxes(one), Boxes(anchors))) for one in boxes]


def check(got: Any, truth: Truth, provider: str) -> None:
    """Ours is (matches, ious), a peer's a list of each image's matches."""
    matches = got[0] if isinstance(got, tuple) else torch.stack([matches_of(one) for one in got])
    assert_close(torch.where(truth.sure, matches, 0), torch.where(truth.sure, truth.matches, 0), name="matches")
    if isinstance(got, tuple):
        assert_close(got[1], truth.ious, tolerance=Tolerance(max=CLOSE, rms=CLOSE), name="ious")


def matches_of(answer: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Return [A]. detectron2 gives the best box of each anchor, and a label: 1 match, 0 background, -1 ignored."""
    if isinstance(answer, Tensor):
        return answer
    best, label = answer
    return torch.where(label == 1, best, torch.where(label == 0, -1, -2))


def truth(given: Given) -> Truth:
    """The rule in float64, an image after another: 215 MB for each array of G x A."""
    case, anchors, boxes, _ = given
    return Truth(*map(torch.stack, zip(*(_truth(case, anchors.double(), one.double()) for one in boxes), strict=True)))


def _truth(case: MatchCase, anchors: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    iou = box_iou(boxes, anchors)  # [G, A]
    (best, second), (index, _) = iou.topk(2, dim=0)  # [A] each
    near = iou >= iou.amax(dim=1, keepdim=True) - CLOSE  # [G, A]; a maximum reaches itself
    lifted = near.any(dim=0)
    # Of several anchors near a box's best any may reach it; the only one does. One over `high` is matched anyway.
    unsure = (near & (near.sum(dim=1, keepdim=True) > 1)).any(dim=0) & (best < case.high)
    for threshold in (case.high, case.low):
        unsure |= (best - threshold).abs() < CLOSE
    positive = (best >= case.high) | lifted
    unsure |= positive & (best - second < CLOSE)
    unmatched = torch.where(best < case.low, -1, -2)
    assert unsure.float().mean() < UNSURE, "the case has too many ties to compare"
    return torch.where(positive, index, unmatched), best, ~unsure


BENCH = Bench(
    cases=CASES,
    inputs=inputs,
    ours=ours,
    peers={"torchvision": torchvision, "detectron2": detectron2, "compile": compiled},
    truth=truth,
    check=check,
)
test_match_anchors = BENCH.test()


def blocks() -> Contest:
    """One provider for each number of anchors and warps of a program."""
    from tmask_kernels.ops.match_anchors import kernels

    blocks = {
        f"anchors={anchors},warps={warps}": kernels.Block(anchors, warps)
        for anchors, warps in itertools.product((32, 64, 128, 256, 512, 1024), (1, 2, 4, 8))
        if 1 <= anchors / (32 * warps) <= 8  # anchors a thread: some work, and no spills
    }
    launches = {name: {"pick_block": lambda *_, block=block: block} for name, block in blocks.items()}
    return BENCH.sweep(["match-anchors"], kernels, launches)


SWEEPS = {"match_anchors": blocks}
