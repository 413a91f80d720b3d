"""NMS of many segments (`padded_nms`) and of one list (`nms`), against torchvision.

Greedy NMS has one answer: a box is kept if and only if no kept box before it overlaps it by more than the threshold.
`check` compares every box with that definition, so it needs no second NMS.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor

from bench.cases._shared import IOU_FLOPS, STRIDES, Bench, Case, by_name, cluster, rois
from bench.contest import Call, Contest
from bench.machine import Work, device
from bench.standings import Aim
from bench.timing import median, time_in_turn
from tmask_kernels import nms, padded_nms
from tmask_kernels.common.reference import box_iou

# Ours is bit-equal to the definition in float32; a peer's compiler may fuse a product and a sum, which moves an IoU by
# a unit in the last place, over the threshold or under it.
FUSED = 1e-6
# On a GPU `batched_nms` moves the segments of an image apart before it compares, where they are up to 100,000 numbers.
# Thousands of pixels on, coordinates in float32 are coarser, and so it may be wrong in this part of the boxes.
MOVED = 1e-3
PAIRS = 2**25  # IoUs of one chunk: 128 MiB
ALL_PAIRS = 2**33  # beyond so many IoUs a seeded part of the boxes is checked: at a million boxes


@dataclass(frozen=True, kw_only=True)
class NMSCase(Case):
    """NMS of S segments of at most K boxes: RPN levels, classes, or one long list."""

    dtype: str = "fp32"
    kind: str  # "levels", "classes" or "list"
    lengths: tuple[int, ...]  # boxes of each segment; K is the largest
    threshold: float
    keep: int  # at most so many of a segment
    kept: float  # about so large a share of the boxes is kept

    def small(self) -> NMSCase:
        few = {"levels": 96, "classes": 64, "list": 256}[self.kind]
        lengths = tuple(min(n, few) - (few // 2 if n < max(self.lengths) else 0) for n in self.lengths)
        return replace(self, lengths=lengths[-12:], keep=min(self.keep, few))

    @property
    def boxes(self) -> int:
        """K, boxes of the longest segment."""
        return max(self.lengths)

    @property
    def segments_an_image(self) -> int:
        return 5 if self.kind == "levels" else len(self.lengths)

    def inputs(self, where: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes [S, K, 4], scores [S, K], no two of a segment equal, and which are valid, [S, K] bool."""
        make = {"levels": _level_segments, "classes": _class_segments, "list": _list_segment}[self.kind]
        boxes, scores, valid = make(self)
        return boxes.to(where), scores.to(where), valid.to(where)

    def work(self, dtype: str = "fp32", mode: str = "forward") -> Work:
        """Boxes and scores are read, indices and counts written; every kept box meets every box kept before it."""
        S, kept = len(self.lengths), [n * self.kept for n in self.lengths]
        moved = sum(self.lengths) * (16 + 4) + S * (min(self.keep, self.boxes) + 1) * 8
        return Work(bytes=moved, flops=int(sum(n * (n - 1) / 2 for n in kept) * IOU_FLOPS))


def scores_of(*shape: int, seed: int) -> Tensor:
    """Return scores in 0..1 [..., K], most of them low, no two of a row equal."""
    generator = torch.Generator().manual_seed(seed)
    rows, K = int(torch.tensor(shape[:-1]).prod()), shape[-1]
    ranks = torch.stack([torch.randperm(K, generator=generator) for _ in range(rows)]).view(shape)
    return ((ranks.double() + 0.5) / K).pow(4).float()


def _level_segments(case: NMSCase) -> tuple[Tensor, Tensor, Tensor]:
    """Five levels of each image in turn, a level's boxes as large as its anchors."""
    S, K = len(case.lengths), case.boxes
    boxes = [
        rois(1, K, 800, 1344, smallest=8 * STRIDES[s % 5] / 2, largest=8 * STRIDES[s % 5] * 2, seed=2 + s)[0]
        for s in range(S)
    ]
    valid = torch.arange(K) < torch.tensor(case.lengths)[:, None]
    return torch.stack(boxes), scores_of(S, K, seed=3), valid


def _class_segments(case: NMSCase) -> tuple[Tensor, Tensor, Tensor]:
    """The same RoIs in every class, moved a little; a RoI scores over 0.05 in few classes, a background RoI in none."""
    S, K = len(case.lengths), case.boxes
    generator = torch.Generator().manual_seed(4)
    boxes, owner = cluster(K, 800, 1344, generator)  # [K, 4], [K]
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)  # [K, 4]
    moved = boxes + torch.randn(S, K, 4, generator=generator) * 0.03 * sides
    logits = torch.randn(S + 1, K, generator=generator)  # the last row: background
    logits[-1] += 3
    likely = torch.randint(S, (2, 50), generator=generator)[:, owner]  # [2, K]: an object looks like two classes
    logits.scatter_add_(0, likely, torch.rand(2, K, generator=generator) * torch.tensor([[8.0], [4.0]]))
    scores = logits.softmax(0)[:-1]
    return moved, scores, scores > 0.05


def _list_segment(case: NMSCase) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes around so many objects that about the wanted share is kept, in an image that grows with their number."""
    K = case.boxes
    objects = max(1, round(K * case.kept))
    side = round(200 * objects**0.5)
    boxes = rois(1, K, side, side, smallest=16, largest=128, objects=(objects, objects), spread=0.4, seed=6)
    return boxes, scores_of(1, K, seed=7), torch.ones(1, K, dtype=torch.bool)


def _long_list(name: str, boxes: int, kept: float, us: float | None = None, matrix: bool = True) -> NMSCase:
    """One list; with `matrix` its memory may take a tenth of the K^2 bits that a matrix of all pairs would take."""
    what = f"one list of {boxes:,} boxes, {kept:.0%} of them kept"
    aims = {"": Aim(us=us, mib=0.1 * boxes**2 / 8 / 2**20 if matrix else None)}
    lengths = (boxes,)
    return NMSCase(name=name, what=what, aims=aims, kind="list", lengths=lengths, threshold=0.5, keep=boxes, kept=kept)


CLASSES: dict[str, Any] = {
    "name": "nms-classes",
    "what": "80 classes x 1,000 RoIs, scores over 0.05, top 100",
    "aims": {"": Aim(times=10)},
    "kind": "classes",
    "lengths": (1000,) * 80,
    "threshold": 0.5,
    "keep": 100,
    "kept": 0.01,
}
CASES = by_name(
    NMSCase(
        name="nms-rpn",
        what="5 levels of 2 images, at most 2,000 boxes a level, keep 1,000",
        aims={"": Aim(times=10)},
        kind="levels",
        lengths=(2000, 2000, 2000, 2000, 819) * 2,  # P6 has 13 x 21 cells of 3 anchors
        threshold=0.7,
        keep=1000,
        kept=0.36,
    ),
    NMSCase(**CLASSES),
    _long_list("nms-1k", 1_000, 0.3, us=100, matrix=False),
    _long_list("nms-10k", 10_000, 0.3, us=300),
    _long_list("nms-10k-dense", 10_000, 0.03, us=300),
    _long_list("nms-100k", 100_000, 0.3, us=5_000),
    _long_list("nms-1m", 1_000_000, 0.3),
)


class Given(NamedTuple):
    case: NMSCase
    boxes: Tensor  # [S, K, 4] float32
    scores: Tensor  # [S, K] float32
    valid: Tensor  # [S, K] bool


class Flat(NamedTuple):
    """What a peer kept of each of its calls, and the positions in the flattened [S * K] of all it was given."""

    kept: list[Tensor]
    rows: list[Tensor]
    moved: bool = False  # whether the peer may have moved the boxes


def check(out: Any, given: Given, provider: str) -> None:
    """Of `padded_nms` (indices [S, M], counts [S]), of `nms` a list of indices, or a peer's `Flat`."""
    case, boxes, scores, valid = given
    S, K = scores.shape
    limit, slack, wrong = case.keep, 0.0, 0.0
    if isinstance(out, Flat):
        limit, slack, wrong = K, FUSED, MOVED if out.moved else 0.0
        flat = torch.cat([rows[kept] for kept, rows in zip(out.kept, out.rows, strict=True)])
        kept = [flat[flat // K == s] % K for s in range(S)]
    elif isinstance(out, Tensor):
        kept = [out]
    else:
        kept = [row[:count] for row, count in zip(out[0], out[1].tolist(), strict=True)]
        for row, count in zip(out[0], out[1].tolist(), strict=True):
            assert bool((row[count:] == -1).all()), "what pads the output is not -1"
    too_many = too_few = held = 0
    for s, indices in enumerate(kept):
        counts = count_faults(boxes[s], scores[s], valid[s], indices, case.threshold, limit, slack)
        too_many, too_few, held = too_many + counts[0], too_few + counts[1], held + counts[2]
    if too_many + too_few > wrong * held:
        raise AssertionError(f"{too_many} boxes kept that a kept one removes, {too_few} dropped that none removes")


def count_faults(
    boxes: Tensor, scores: Tensor, valid: Tensor, kept: Tensor, threshold: float, limit: int, slack: float
) -> tuple[int, int, int]:
    """Hold the boxes [K, 4] of one segment, or a part of very many, against the definition of greedy NMS.

    kept [n] int64 are what a provider kept, by falling score, at most `limit`. IoUs within `slack` of the threshold may
    count as over it or under it. Gives the number of boxes kept that a kept one removes, of those dropped that none
    does, and of all that were held against it. Errors: AssertionError if what is kept is not valid, or not in order.
    """
    kept_boxes, kept_scores = boxes[kept], scores[kept]
    assert bool(valid[kept].all()), "an empty slot is kept"
    assert bool((kept_scores[:-1] > kept_scores[1:]).all()), "not by falling score, or a box twice"
    asked = valid.clone()
    if len(kept) == limit:  # boxes behind the last that fits were not asked for
        asked &= scores >= kept_scores.min() if limit else torch.zeros_like(valid)
    asked = asked.nonzero()[:, 0]
    if len(asked) * len(kept) > ALL_PAIRS:
        some = torch.randperm(len(asked), generator=torch.Generator().manual_seed(0))[: ALL_PAIRS // len(kept)]
        asked = asked[some.to(asked.device)]
    is_kept = torch.zeros_like(valid).index_fill(0, kept, True)
    too_many = too_few = 0
    for rows in asked.split(max(1, PAIRS // max(1, len(kept)))):
        iou = box_iou(boxes[rows, None], kept_boxes)  # [rows, n]
        before = kept_scores > scores[rows, None]
        removed = (before & (iou > threshold + slack)).any(1)
        perhaps = (before & (iou > threshold - slack)).any(1)
        too_many += int((is_kept[rows] & removed).sum())
        too_few += int((~is_kept[rows] & ~perhaps).sum())
    return too_many, too_few, len(asked)


def ours(given: Given, backend: str) -> tuple[Tensor, Tensor]:
    case, boxes, scores, valid = given
    return padded_nms(boxes, scores, case.threshold, valid=valid, max_output=case.keep, backend=backend)


def ours_list(given: Given, backend: str) -> Tensor:
    return nms(given.boxes[0], given.scores[0], given.case.threshold, backend=backend)


def torchvision_nms(given: Given) -> Call:
    """The faster, on this machine, of `batched_nms` an image at a time and `nms` a segment at a time.

    Selecting the boxes that are valid is done before and not timed.
    """
    case, boxes, scores, valid = given
    S, K = scores.shape
    positions = torch.arange(S * K, device=scores.device).view(S, K)

    def parts(segments: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        rows = [part[fits] for part, fits in zip(positions.split(segments), valid.split(segments), strict=True)]
        return [(boxes.view(-1, 4)[r], scores.view(-1)[r], r // K, r) for r in rows]

    images, singles = parts(case.segments_an_image), parts(1)

    def batched() -> Flat:
        kept = [torchvision.ops.batched_nms(b, s, segment, case.threshold) for b, s, segment, _ in images]
        return Flat(kept, [rows for *_, rows in images], moved=True)

    def one_by_one() -> Flat:
        kept = [torchvision.ops.nms(b, s, case.threshold) for b, s, _, _ in singles]
        return Flat(kept, [rows for *_, rows in singles])

    return one_by_one if S == 1 else faster(batched, one_by_one)


def faster(*calls: Call) -> Call:
    times = time_in_turn({str(i): call for i, call in enumerate(calls)}, device())
    return calls[min(range(len(calls)), key=lambda i: median(times[str(i)].device))]


PADDED = Bench(
    cases=CASES,
    inputs=lambda case, mode, dtype, layout: Given(case, *case.inputs(device())),
    ours=ours,
    peers={"torchvision": torchvision_nms},
    truth=lambda given: given,
    check=check,
    graph=True,
)
LIST = replace(PADDED, ours=ours_list, graph=False)
test_padded_nms = PADDED.test(
    cases=["nms-rpn", "nms-classes", "nms-1k", "nms-10k", "nms-10k-dense"],
    where=lambda case, mode, dtype, layout, provider: provider != "reference" or case in ("nms-rpn", "nms-1k"),
)
test_nms = LIST.test(
    cases=["nms-1k", "nms-10k", "nms-10k-dense", "nms-100k", "nms-1m"],
    where=lambda case, mode, dtype, layout, provider: provider != "reference" or case == "nms-1k",
)


def segments() -> Contest:
    """A program a segment: one provider for each block size and number of warps."""
    from tmask_kernels.ops.nms.kernels import padded as kernels

    launches = {
        f"block={block},warps={warps}": {"BLOCK": block, "NUM_WARPS": warps}
        for block, warps in itertools.product((16, 32, 64, 128, 256), (1, 2, 4, 8, 16, 32))
        if 1 <= block * block / (32 * warps) <= 128  # IoUs a thread: some work, and a compilation that ends
    }
    return PADDED.sweep(["nms-classes"], kernels, launches)


def steps(case: str) -> Contest:
    """Long segments: one provider for each launch of their steps."""
    from tmask_kernels.ops.nms.kernels import blocks
    from tmask_kernels.ops.nms.kernels import padded as kernels

    launches = {}
    for step, tile, programs, warps in itertools.product((256, 512, 1024), (64, 128), (128, 256, 512), (4, 8, 16, 32)):
        # IoUs of a thread, and words of bits in its registers.
        if 1 <= tile**2 / (32 * warps) <= 32 and step**2 / 32 / (32 * warps) <= 64:
            launch = blocks.Launch(step=step, tile=tile, programs=programs, num_warps=warps)
            words = ",".join(f"{name}={value}" for name, value in asdict(launch).items())
            launches[words] = {"padded_nms_blocks": functools.partial(blocks.padded_nms_blocks, launch=launch)}
    return PADDED.sweep([case], kernels, launches)


SWEEPS = {
    "nms": segments,
    "nms-levels": functools.partial(steps, "nms-rpn"),
    "nms-list": functools.partial(steps, "nms-10k"),
}
