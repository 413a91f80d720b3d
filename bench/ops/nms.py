"""NMS of many segments (`padded_nms`: W5, W6, W7) and of one list (`nms`: W7), against torchvision.

Greedy NMS has one answer: a box is kept if and only if no kept box before it overlaps it by more than the threshold.
`check` holds every box against that definition, so it needs no second NMS to compare with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple, cast
from unittest import mock

import torch
import torchvision
from torch import Tensor

from bench.cases import CASES, NMSCase, Segments, sized
from bench.contest import Call, Contest
from bench.graph import captured
from bench.machine import device
from bench.timing import median, time_in_turn
from bench.variants import variants
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


class Given(NamedTuple):
    """The inputs of one case."""

    case: NMSCase
    segments: Segments


class Flat(NamedTuple):
    """What a peer kept of each of its calls, and the positions in the flattened [S * K] of all it was given."""

    kept: list[Tensor]
    rows: list[Tensor]
    moved: bool = False  # whether the peer may have moved the boxes


@variants(
    cases=["W5", "W6", "W7-1k", "W7-10k", "W7-10k-dense"],
    providers=["triton", "triton-graph", "torchvision", "reference"],
    where=lambda case, mode, dtype, layout, provider: provider != "reference" or case in ("W5", "W7-1k"),
)
def test_padded_nms(case: str, mode: str, dtype: str, layout: str, provider: str, contest: Any) -> None:
    contest(lambda: suppression(case, PADDED_PROVIDERS))


@variants(
    cases=["W7-1k", "W7-10k", "W7-10k-dense", "W7-100k", "W7-1M"],
    providers=["triton", "torchvision", "reference"],
    where=lambda case, mode, dtype, layout, provider: provider != "reference" or case == "W7-1k",
)
def test_nms(case: str, mode: str, dtype: str, layout: str, provider: str, contest: Any) -> None:
    contest(lambda: suppression(case, LIST_PROVIDERS))


def suppression(name: str, providers: dict[str, Callable[[Given], Call]]) -> Contest:
    case, size = sized(cast(NMSCase, CASES[name]))
    return Contest(
        inputs=lambda: Given(case, case.inputs(device())),
        providers=providers,
        truth=lambda given: given,
        check=check,
        work=case.work(),
        size=size,
    )


def check(out: Any, given: Given) -> None:
    """Of `padded_nms` (indices [S, M], counts [S]), of `nms` a list of indices, or a peer's `Flat`."""
    case, (boxes, scores, valid) = given
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


def ours(backend: str) -> Callable[[Given], Call]:
    def call(given: Given) -> Call:
        case, (boxes, scores, valid) = given
        return lambda: padded_nms(
            boxes, scores, case.threshold, valid=valid, max_output=case.keep, backend=backend
        )  # fmt: skip

    return call


def ours_list(backend: str) -> Callable[[Given], Call]:
    def call(given: Given) -> Call:
        boxes, scores = given.segments.boxes[0], given.segments.scores[0]
        return lambda: nms(boxes, scores, given.case.threshold, backend=backend)

    return call


def torchvision_nms(given: Given) -> Call:
    """The faster, on this machine, of `batched_nms` an image at a time and `nms` a segment at a time.

    Selecting the boxes that are valid is done before and not timed.
    """
    case, (boxes, scores, valid) = given
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


def graph(given: Given) -> Call:
    return captured(ours("triton")(given))


PADDED_PROVIDERS = {
    "triton": ours("triton"),
    "triton-graph": graph,
    "torchvision": torchvision_nms,
    "reference": ours("reference"),
}
LIST_PROVIDERS = {
    "triton": ours_list("triton"),
    "torchvision": torchvision_nms,
    "reference": ours_list("reference"),
}


def segments() -> Contest:
    """W6, a program a segment, with one provider a block size and number of warps; `triton` is the launch as it is."""
    from tmask_kernels.ops.nms.kernels import padded as kernels

    return suppression(
        "W6",
        {"triton": ours("triton")}
        | {
            f"triton[block={block},warps={warps}]": patched(kernels, BLOCK=block, NUM_WARPS=warps)
            for block in (16, 32, 64, 128, 256)
            for warps in (1, 2, 4, 8, 16, 32)
            if 1 <= block * block / (32 * warps) <= 128  # IoUs a thread: some work, and a compilation that ends
        },
    )


def steps(case: str) -> Callable[[], Contest]:
    """A case of long segments, with one provider a launch of its steps; `triton` is the launch as it is."""

    def contest() -> Contest:
        from tmask_kernels.ops.nms.kernels import blocks as kernels_blocks
        from tmask_kernels.ops.nms.kernels import padded as kernels

        def provider(launch: kernels_blocks.Launch) -> Callable[[Given], Call]:
            run = functools.partial(kernels_blocks.padded_nms_blocks, launch=launch)
            return patched(kernels, padded_nms_blocks=run)

        launches = [
            kernels_blocks.Launch(step=step, tile=tile, programs=programs, num_warps=warps)
            for step in (256, 512, 1024)
            for tile in (64, 128)
            for programs in (128, 256, 512)
            for warps in (4, 8, 16, 32)
            # IoUs of a thread, and words of bits in its registers.
            if 1 <= tile**2 / (32 * warps) <= 32 and step**2 / 32 / (32 * warps) <= 64
        ]
        return suppression(
            case, {"triton": ours("triton")} | {f"triton[{_words(one)}]": provider(one) for one in launches}
        )

    return contest


def _words(launch: Any) -> str:
    return ",".join(f"{name}={value}" for name, value in asdict(launch).items())


def patched(module: Any, **values: Any) -> Callable[[Given], Call]:
    """Our kernel with other values of what `module` holds."""

    def call(given: Given) -> Call:
        run = ours("triton")(given)

        def launched() -> Any:
            with mock.patch.multiple(module, **values):
                return run()

        return launched

    return call


SWEEPS: dict[str, Callable[[], Contest]] = {
    "nms": segments,
    "nms-levels": steps("W5"),
    "nms-list": steps("W7-10k"),
}
