"""nms, batched_nms and padded_nms: every backend against torchvision where it agrees, edge rules, and the two
strategies of the kernels: against the reference behind guard bands, mutants, launches, waits, memory."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from tests.allocations import peak_allocated
from tests.kernels.tools import INF, NAN, UNIT, assert_same, crowded, distinct_scores, each_mutant, slow
from tests.launches import counting
from tests.model.sync import count_blocking
from tests.mutation import mutant
from tmask_kernels import batched_nms, nms, padded_nms
from tmask_kernels.backend import interpreter_enabled
from tmask_kernels.common import reference as common
from tmask_kernels.ops.nms import op, reference
from tmask_kernels.ops.nms.kernels import blocks as kernels_blocks
from tmask_kernels.ops.nms.kernels import padded as kernels
from tmask_kernels.ops.nms.kernels import sort as kernels_sort
from tmask_kernels.ops.nms.kernels.blocks import LAUNCH, Launch, padded_nms_blocks
from tmask_kernels.testing import guarded, poisoned_empty, random_boxes

# The kernels' strategies by name, the launches of the second small: through the interpreter a program takes its time.
STRATEGIES: dict[str, kernels.Strategy] = {
    "segments": kernels.padded_nms_segments,
    "blocks": functools.partial(padded_nms_blocks, launch=Launch(step=64, tile=64, programs=2)),
}
BACKENDS = ["torchvision", "reference", "triton-segments", "triton-blocks"]


@pytest.fixture(params=BACKENDS)
def backend(request, device, monkeypatch) -> str:
    if request.param == "torchvision" and device.type == "cuda":
        pytest.skip("the torchvision backend serves CPU tensors")
    name, _, strategy = request.param.partition("-")
    if strategy:
        monkeypatch.setattr(kernels, "strategy", lambda S, K: STRATEGIES[strategy])
    return name


def next_to(threshold: float) -> Tensor:
    """Two pairs of boxes [4, 4]: an IoU that is the next float32 above `threshold`, and the next below."""
    limit, pairs = torch.tensor(threshold), []
    for way in (torch.tensor(INF), torch.tensor(-INF)):
        iou, height = limit, limit
        while iou == limit or (iou > limit) != (way > limit):
            height = torch.nextafter(height, way)
            pair = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, float(height)]])
            iou = reference.box_iou(*pair)
        assert (iou - limit).abs() < 1e-6
        pairs.append(pair - torch.tensor([9.0, 0.0, 9.0, 0.0]) * (1 + len(pairs)))
    return torch.cat(pairs)


FEW, ALL = range(2), range(10)
THRESHOLDS = (0.2, 0.5, 0.7, 0.8)
SHORT = [(count, threshold, FEW) for count in (1, 63, 64, 65) for threshold in THRESHOLDS]
LONG = [slow(count, threshold, ALL) for count in (1, 63, 64, 65, 1000) for threshold in THRESHOLDS]


@pytest.mark.parametrize(
    ("count", "threshold", "seeds"),
    [*SHORT, (1000, 0.5, FEW), *LONG],
    ids=lambda value: f"{len(value)} seeds" if isinstance(value, range) else str(value),
)
def test_padded_nms_equals_torchvision(device, backend, count, threshold, seeds):
    boxes = torch.stack([torch.cat([next_to(threshold), crowded(count, seed)]) for seed in seeds])
    S, K = boxes.shape[:2]
    scores = torch.stack([distinct_scores(K, seed=seed) for seed in seeds])
    indices, counts = padded_nms(boxes.to(device), scores.to(device), threshold, max_output=K, backend=backend)
    assert indices.shape == (S, K)
    assert indices.dtype == counts.dtype == torch.int64
    for s in range(S):
        expected = torchvision.ops.nms(boxes[s], scores[s], threshold)
        assert counts[s] == len(expected)
        assert indices[s, : len(expected)].tolist() == expected.tolist()
        assert (indices[s, len(expected) :] == -1).all()
        assert 2 <= len(set(range(4)) & set(expected.tolist())) <= 3  # of the pairs next to the threshold
    assert counts.max() < K


@pytest.mark.parametrize("count", [3000, slow(20_000)])
@pytest.mark.parametrize("chosen", ["reference", "torchvision"])
def test_long_lists_equal_torchvision(chosen, count):
    boxes = random_boxes(count, height=2000, width=2000, min_size=15, max_size=200)
    scores = distinct_scores(count)
    kept = nms(boxes, scores, 0.5, backend=chosen)
    assert kept.tolist() == torchvision.ops.nms(boxes, scores, 0.5).tolist()
    assert count / 10 < len(kept) < count


def test_batched_nms_is_nms_of_each_class(device, backend):
    boxes, scores = crowded(300) - 50, distinct_scores(300)
    classes = torch.randint(-2, 5, (300,), generator=torch.Generator().manual_seed(1))
    args = boxes.to(device), scores.to(device), classes.to(device), 0.5
    kept = batched_nms(*args, backend=backend).cpu()
    expected = [rows[torchvision.ops.nms(boxes[rows], scores[rows], 0.5)]
                for rows in ((classes == c).nonzero()[:, 0] for c in range(-2, 5))]  # fmt: skip
    assert sorted(kept.tolist()) == sorted(torch.cat(expected).tolist())
    assert (scores[kept].diff() < 0).all()
    assert_same(batched_nms(*args, max_output=7, backend=backend), kept[:7])


EDGES = {
    # boxes, scores, threshold, kept
    "duplicates": ([UNIT, UNIT, UNIT], [0.1, 0.9, 0.5], 0.5, [1]),
    "duplicates at threshold 1": ([UNIT, UNIT], [0.1, 0.9], 1.0, [1, 0]),
    "any overlap at threshold 0": ([UNIT, [9.0, 9.0, 20.0, 20.0]], [0.9, 0.1], 0.0, [0]),
    "touching at threshold 0": ([UNIT, [10.0, 0.0, 20.0, 10.0]], [0.9, 0.1], 0.0, [0, 1]),
    "tie with 0.5 keeps": ([UNIT, [0.0, 0.0, 10.0, 5.0]], [0.9, 0.1], 0.5, [0, 1]),
    # As float32, 0.1 is above 0.1: a threshold in double would remove.
    "tie with 0.1 keeps": ([UNIT, [0.0, 0.0, 10.0, 1.0]], [0.9, 0.1], 0.1, [0, 1]),
    "just above removes": ([UNIT, [0.0, 0.0, 10.0, 5.00001]], [0.9, 0.1], 0.5, [0]),
    "no plus one on sides": ([UNIT, [0.0, 0.0, 10.0, 4.9]], [0.9, 0.1], 0.495, [0, 1]),
    "equal scores by rising index": ([UNIT, [50.0, 0.0, 60.0, 10.0], UNIT], [0.5, 0.5, 0.5], 0.5, [0, 1]),
    "removed boxes remove nothing": (
        [[0.0, 0.0, 10.0, 10.0], [4.0, 0.0, 14.0, 10.0], [8.0, 0.0, 18.0, 10.0]], [0.9, 0.8, 0.7], 0.4, [0, 2],
    ),
    "negative coordinates": ([[-20.0, -20.0, -10.0, -10.0], [-20.0, -20.0, -10.0, -11.0]], [0.9, 0.1], 0.5, [0]),
    "NaN coordinate": ([[0.0, NAN, 10.0, 10.0], UNIT, UNIT], [0.9, 0.5, 0.1], 0.5, [0, 1]),
    "NaN coordinate below": ([UNIT, [NAN, 0.0, 10.0, 10.0]], [0.9, 0.5], 0.0, [0, 1]),
    "all NaN": ([[NAN] * 4, [NAN] * 4], [0.9, 0.5], 0.0, [0, 1]),
    "inf coordinate": ([[0.0, 0.0, INF, 10.0], UNIT, UNIT], [0.9, 0.5, 0.1], 0.0, [0, 1]),
    "inf coordinate below": ([UNIT, [-INF, 0.0, 10.0, 10.0]], [0.9, 0.5], 0.0, [0, 1]),
    "all inf": ([[-INF, -INF, INF, INF]] * 2, [0.9, 0.5], 0.0, [0, 1]),
    "zero area": ([[5.0, 5.0, 5.0, 9.0], UNIT], [0.9, 0.5], 0.0, [0, 1]),
    "zero area twice": ([[5.0, 5.0, 5.0, 5.0]] * 2, [0.9, 0.5], 0.0, [0, 1]),
    "inverted": ([[10.0, 0.0, 0.0, 10.0], UNIT, [10.0, 0.0, 0.0, 10.0]], [0.9, 0.5, 0.1], 0.0, [0, 1, 2]),
    "inverted twice": ([[10.0, 10.0, 0.0, 0.0], UNIT, [10.0, 10.0, 0.0, 0.0]], [0.9, 0.5, 0.1], 0.0, [0, 1, 2]),
    "NaN score is last and removes nothing": (
        [UNIT, [50.0, 0.0, 60.0, 10.0], [50.0, 0.0, 60.0, 10.0], UNIT], [0.5, NAN, NAN, 0.4], 0.5, [0, 1, 2],
    ),
    "NaN score can be removed": ([UNIT, UNIT], [NAN, -5.0], 0.5, [1]),
    "NaN below minus inf": ([UNIT, [50.0, 0.0, 60.0, 10.0]], [NAN, -INF], 0.5, [1, 0]),
    "infinite scores": ([UNIT, [50.0, 0.0, 60.0, 10.0]], [-INF, INF], 0.5, [1, 0]),
}  # fmt: skip


@pytest.mark.parametrize("edge", EDGES.values(), ids=EDGES.keys())
def test_edges(device, backend, edge):
    boxes, scores, threshold, expected = edge
    boxes, scores = torch.tensor(boxes, device=device), torch.tensor(scores, device=device)
    assert nms(boxes, scores, threshold, backend=backend).tolist() == expected
    # The same with 70 boxes of higher score before them, so that another block of the kernel decides.
    far = torch.arange(70.0, device=device)[:, None] * 20 + torch.tensor([1e5, 1e5, 1e5 + 10, 1e5 + 10], device=device)
    lifted = torch.cat([torch.full((70,), INF, device=device), scores])
    kept = nms(torch.cat([far, boxes]), lifted, threshold, backend=backend)
    assert kept[:70].tolist() == list(range(70)) or INF in scores
    assert sorted((kept[kept >= 70] - 70).tolist()) == sorted(expected)
    same = torch.zeros(len(boxes), dtype=torch.int64, device=device)
    assert batched_nms(boxes, scores, same, threshold, backend=backend).tolist() == expected


def test_segments_are_alone_and_have_their_thresholds(device, backend):
    boxes = torch.tensor([UNIT, [0.0, 0.0, 10.0, 6.0]], device=device).expand(3, 2, 4)
    scores = torch.tensor([0.9, 0.1], device=device).expand(3, 2)
    thresholds = torch.tensor([0.5, 0.7, 0.6], device=device)
    indices, counts = padded_nms(boxes, scores, thresholds, max_output=3, backend=backend)
    assert indices.tolist() == [[0, -1, -1], [0, 1, -1], [0, 1, -1]]
    assert counts.tolist() == [1, 2, 2]


def test_invalid_slots_do_not_exist(device, backend):
    boxes, scores = crowded(130).to(device), distinct_scores(130).to(device)
    valid = torch.arange(130, device=device) % 3 != 0
    scores[::3] = torch.where(torch.arange(len(scores[::3]), device=device) % 2 == 0, NAN, 2.0)
    rows = valid.nonzero()[:, 0]
    expected = rows[nms(boxes[rows], scores[rows], 0.5, backend="reference")]
    none = torch.zeros_like(valid)
    indices, counts = padded_nms(
        boxes.expand(2, -1, -1), scores.expand(2, -1), 0.5, valid=torch.stack([valid, none]), max_output=130,
        backend=backend,
    )  # fmt: skip
    assert counts.tolist() == [len(expected), 0]
    assert indices[0, : len(expected)].tolist() == expected.tolist()
    assert (indices[1] == -1).all()


@pytest.mark.parametrize("limit", [0, 1, 63, 64, 65, 300])
def test_max_output_is_the_head_of_the_whole(device, backend, limit):
    boxes = random_boxes(200, height=300, width=300, min_size=30, max_size=80).to(device)
    scores = distinct_scores(200).to(device)
    whole = nms(boxes, scores, 0.5, backend=backend)
    assert 65 < len(whole) < 200
    assert nms(boxes, scores, 0.5, max_output=limit, backend=backend).tolist() == whole[:limit].tolist()
    indices, counts = padded_nms(boxes[None], scores[None], 0.5, max_output=limit, backend=backend)
    pad = [-1] * max(0, limit - len(whole))
    assert indices[0].tolist() == whole[:limit].tolist() + pad
    assert counts.item() == min(limit, len(whole))


@pytest.mark.parametrize(("segments", "count"), [(0, 5), (3, 0), (0, 0)])
def test_empty(device, backend, segments, count):
    boxes, scores = torch.empty(segments, count, 4, device=device), torch.empty(segments, count, device=device)
    indices, counts = padded_nms(boxes, scores, 0.5, max_output=4, backend=backend)
    assert indices.tolist() == [[-1] * 4] * segments
    assert counts.tolist() == [0] * segments
    none = torch.empty(0, dtype=torch.int64, device=device)
    assert nms(boxes.view(-1, 4), scores.view(-1), 0.5, backend=backend).tolist() == []
    assert batched_nms(boxes.view(-1, 4), scores.view(-1), none, 0.5, backend=backend).tolist() == []


# --- the reference ---------------------------------------------------------------------------------------------------


MUTANTS = {
    "tie": (reference, "> thresholds[:, None]", ">= thresholds[:, None]"),
    "removed removes": (reference, "takes = keep[:, i : i + 1] &", "takes ="),
    "NaN score removes": (reference, "& segments.suppresses[:, i : i + 1]", ""),
    "groups": (reference, "if sorted_groups is not None:", "if False:"),
    "valid": (reference, "keep = segments.alive.clone()", "keep = torch.ones_like(segments.alive)"),
    "overlap": (common, ".clamp(min=0)\n    height", "\n    height"),
    "union": (common, "- inter\n", "\n"),
    "NaN order": (reference, "torch.where(real, -scores, torch.nan)", "torch.where(real, -scores, -torch.inf)"),
    "output": (reference, "(rank < max_output)", "(rank < max_output - 1)"),
}


@each_mutant(MUTANTS)
def test_a_broken_reference_fails(tmp_path, monkeypatch, name):
    broken = mutant(*MUTANTS[name], tmp_path, seen_from=reference)
    monkeypatch.setattr(op, "padded_nms_reference", broken.padded_nms_reference)
    cpu = torch.device("cpu")
    with pytest.raises((AssertionError, RuntimeError)):  # noqa: PT012 - any of these checks may be the one that fails
        test_invalid_slots_do_not_exist(cpu, "reference")
        test_batched_nms_is_nms_of_each_class(cpu, "reference")
        test_max_output_is_the_head_of_the_whole(cpu, "reference", 63)
        for edge in EDGES.values():
            test_edges(cpu, "reference", edge)


def many_classes(classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """A box of each class at one place, half of them at negative coordinates; of each tenth class another like it, of
    lower score; and one box that reaches to infinity."""
    boxes = torch.tensor(UNIT).repeat(classes + classes // 10 + 1, 1)
    boxes[::2] -= 1000
    idxs = torch.arange(classes)
    idxs = torch.cat([idxs, idxs[::10][: classes // 10], idxs[:1]])
    boxes[classes:-1] = boxes[idxs[classes:-1]]
    boxes[-1, 2] = INF
    return boxes, torch.linspace(1, 0, len(boxes)), idxs


@pytest.mark.parametrize("classes", [90, slow(20_000)])
def test_classes_are_alone_however_many(device, backend, classes):
    boxes, scores, idxs = many_classes(classes)
    if backend == "triton" and device.type == "cpu" and classes > 90:
        pytest.skip("20,000 boxes are too many for the interpreter")
    kept = batched_nms(boxes.to(device), scores.to(device), idxs.to(device) * 2**33, 0.5, backend=backend)
    assert sorted(kept.tolist()) == [*range(classes), len(boxes) - 1]


# --- the kernels -----------------------------------------------------------------------------------------------------


interpreted = pytest.mark.skipif(not interpreter_enabled(), reason="counts through Triton's interpreter")

# Several steps, chunks and splits in a hundred boxes.
SMALL = Launch(step=64, tile=32, programs=4, num_warps=1)
BYTES_A_BOX = 49
Function = Callable[..., tuple[Tensor, Tensor]]


def check_padded(function: Function, device: torch.device) -> None:
    """`function` (the reference's signature) against the reference on what its blocks may get wrong."""
    chain = torch.arange(150.0)[:, None] * torch.tensor([4.0, 0.0, 4.0, 0.0]) + torch.tensor([0.0, 0.0, 10.0, 10.0])
    # Every box at the threshold with a box of its own block and with one of the next.
    tied = torch.tensor([UNIT, [0.0, 0.0, 10.0, 5.0]]).repeat_interleave(70, 0) + 0.0
    tied[:, [0, 2]] += (torch.arange(140) % 70)[:, None] * 20.0
    repeated = tied[:70].repeat(2, 1)
    cases = [  # boxes, threshold, max_output without groups, boxes with a score
        (torch.stack([tied, tied.view(2, 70, 4).transpose(0, 1).reshape(140, 4)]), 0.5, 150, 131),
        (torch.stack([crowded(170), crowded(170, seed=1)]), 0.5, 40, 161),
        (torch.stack([repeated, repeated + 1]), 0.5, 150, 3),
        (torch.stack([chain, chain.flip(0)]), 0.4, 150, 141),
    ]
    for boxes, threshold, most, scored in cases:
        count = boxes.shape[1]
        scores = torch.linspace(1, 0, count).expand(2, count).clone()
        scores[:, scored:] = NAN
        boxes[:, -1] = boxes[:, -2]
        valid = torch.arange(count).expand(2, count) % 11 != 5
        groups = (torch.arange(count) % 4 // 3).expand(2, count).contiguous()
        for group, limit in ((None, most), (groups, count)):
            args = [boxes, scores, torch.tensor([threshold, threshold]), valid, group]
            given = [None if a is None else guarded(a.to(device)) for a in args]
            with poisoned_empty():
                got = function(*given, limit)
            args = [None if a is None else a.cpu() for a in given]
            assert_same(got, reference.padded_nms_reference(*args, limit))


@pytest.mark.parametrize("short", [0, kernels.SHORT], ids=["sorted before", "sorting"])
def test_segments_equal_the_reference_behind_guard_bands(short, device, monkeypatch):
    monkeypatch.setattr(kernels, "SHORT", short)
    check_padded(kernels.padded_nms_segments, device)


def test_blocks_equal_the_reference_behind_guard_bands(device):
    check_padded(functools.partial(padded_nms_blocks, launch=SMALL), device)


@pytest.mark.parametrize("strategy", [kernels.padded_nms_segments, functools.partial(padded_nms_blocks, launch=SMALL)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K", [1, 64, 65, 300])
def test_the_order_is_that_of_the_reference(strategy, dtype, K, device):
    """Few values, of which many are equal; both zeros, infinities, NaN and empty slots; boxes that overlap nothing."""
    if dtype == torch.float64 and device.type == "cuda":
        pytest.skip("compiled kernels take float32 at most")
    values = torch.tensor([-INF, -1.0, -0.0, 0.0, 1.0, 1.0 + 2**-30, INF, NAN, -NAN], dtype=torch.float64).to(dtype)
    generator = torch.Generator().manual_seed(K)
    scores = values[torch.randint(len(values), (3, 2 * K), generator=generator)][:, ::2]  # of stride 2
    valid = torch.rand(3, K, generator=generator) > 0.2
    boxes = (20.0 * torch.arange(K)[:, None] + torch.tensor(UNIT)).expand(3, K, 4)
    args = boxes.to(device), scores.to(device), torch.full((3,), 0.5, device=device), valid.to(device), None
    got = strategy(*args, K)
    assert_same(got, reference.padded_nms_reference(*(None if a is None else a.cpu() for a in args), K))


# What is broken, and the two texts. What `QUICK` lacks is left to `make test-slow`, beside like ones that are not.
SEGMENT_MUTANTS = {
    "tie with list": ("over = iou > threshold\n", "over = iou >= threshold\n"),
    "tie in block": ("over = (iou > threshold) &", "over = (iou >= threshold) &"),
    "neighbour": ("(offs[:, None] < offs[None, :])", "(offs[:, None] + 1 < offs[None, :])"),
    "NaN score in block": ("& (state[:, None] == BOX)", "& (state[:, None] > 0)"),
    "last box": ("tl.where(holds, slots + 1, 0)", "tl.where(holds, slots, 0)"),
    "block step": ("start += BLOCK", "start += BLOCK + 1"),
    "list step": ("first += BLOCK\n        alive", "first += BLOCK + 1\n        alive"),
    "list end": ("mask_k = cols < total", "mask_k = cols < total - 1"),
    "one round": ("while changed > 0:", "if changed > 0:"),
    "past the end": ("(rank < M)", "(rank <= M)"),
    "group with list": ("k_group[:, None] == group[None, :]", "k_group[:, None] <= group[None, :]"),
    "group in block": ("(group[:, None] == group[None, :])", "(group[:, None] >= group[None, :])"),
    "padding": ("mask=cols < width)", "mask=cols < width - 1)"),
    "count": ("total = tl.minimum(total, M)", "total = total"),
}
BLOCK_MUTANTS = {
    "tie with list": ("over = iou > threshold\n", "over = iou >= threshold\n"),
    "tie in step": ("over = (iou > threshold) &", "over = (iou >= threshold) &"),
    "neighbour": ("bits & (0x7FFFFFFF >>", "bits & (0x3FFFFFFF >>"),
    "NaN score in step": ("& (state_i[None, :] == BOX)", "& (state_i[None, :] > 0)"),
    "own tile": ("while some & (first <= chunk):", "while some & (first < chunk):"),
    "tiles of a step": ("        first += splits\n", "        first += splits + 1\n"),
    "tiles of the list": ("first += splits * TILE", "first += (splits + 1) * TILE"),
    "list end": ("mask_k = cols < total", "mask_k = cols < total - 1"),
    "step end": ("first = split * TILE\n", "first = (split + 1) * TILE\n"),
    "bits of a word": ("<< tl.arange(0, 32)[None, None, :]", "<< (tl.arange(0, 32) // 2)[None, None, :]"),
    "word of a tile": ("word = first * (TILE // 32) + words", "word = first * 0 + words"),
    "removed": ("mask=mask & removed)", "mask=mask & removed & (offs > 0))"),
    "last program": ("arrived == chunks * splits - 1", "arrived == 0"),
    "counter": ("tl.store(arrived_ptr + segment, 0)", "tl.store(arrived_ptr + segment, 1)"),
    "own word": ("(words[None, :] <= place", "(words[None, :] < place"),
    "one round": ("while changed > 0:", "if changed > 0:"),
    "past the end": ("(rank < M)", "(rank <= M)"),
    "group in step": ("(group_i[None, :] == group[:, None])", "(group_i[None, :] <= group[:, None])"),
    "group with list": ("(group_k[None, :] == group[:, None])", "(group_k[None, :] <= group[:, None])"),
    "count": ("tl.minimum(total + tl.sum(keep, axis=0), M)", "total + tl.sum(keep, axis=0)"),
}
SORT_MUTANTS = {
    "x and y": ("tl.store(ptr + rows * 4 + 1, y1", "tl.store(ptr + rows * 4 + 1, x1"),
    "NaN score in list": ('tl.where(state == BOX, x1, float("nan"))', "x1"),
    "NaN score": ("tl.where(score == score, BOX, HARMLESS)", "tl.where(score == score, BOX, BOX)"),
    "valid": ("tl.where(valid != 0, state, NO_BOX)", "state"),
    "last slot": (
        "mask = slot < slots\n    segment = slot // K\n    row",
        "mask = slot < slots - 20\n    segment = slot // K\n    row",
    ),
    "segment": ("    segment = slot // K\n    row", "    segment = slot * 0\n    row"),
    "rising scores": ("rival[None, :] > score[:, None]", "rival[None, :] < score[:, None]"),
    "equals by falling index": ("other[None, :] < row[:, None]", "other[None, :] > row[:, None]"),
    "unscored among the rest": ("rival_scored & (~scored | higher)", "rival_scored & higher"),
}
SLOW = {"list step", "block step", "tiles of the list", "list end", "removed", "group with list", "group in block",
        "neighbour", "past the end", "one round", "count", "step end"}  # fmt: skip
KERNEL_MUTANTS = {
    "segments": (kernels, SEGMENT_MUTANTS),
    "blocks": (kernels_blocks, BLOCK_MUTANTS),
    "sort": (kernels_sort, SORT_MUTANTS),
}
BROKEN = {
    f"{part}: {name}": (m, *texts) for part, (m, table) in KERNEL_MUTANTS.items() for name, texts in table.items()
}


@each_mutant(BROKEN, [name for name in BROKEN if name.split(": ")[1] not in SLOW])
def test_a_broken_kernel_fails(device, tmp_path, name):
    module, old, new = BROKEN[name]
    broken = mutant(module, old, new, tmp_path, seen_from=kernels)
    with pytest.raises(AssertionError):  # noqa: PT012 - what sorts is used by both
        if module is not kernels:
            check_padded(functools.partial(broken.padded_nms_blocks, launch=SMALL), device)
        if module is not kernels_blocks:
            check_padded(broken.padded_nms_segments, device)


def test_the_strategy_follows_from_the_shape():
    for S, K in [(10, 2000), (1, 1000), (1, 1_000_000)]:  # the first are levels of two images
        assert kernels.strategy(S, K) is kernels.padded_nms_blocks, (S, K)
    for S, K in [(1, 100), (80, 1000), (20_000, 1000)]:  # the second are classes
        assert kernels.strategy(S, K) is kernels.padded_nms_segments, (S, K)


def test_the_launch_as_it_is_equals_the_reference(device):
    """In its first step only; what follows, `test_several_steps_of_the_launch_as_it_is` does slowly."""
    args = crowded(150).to(device), distinct_scores(150).to(device), 0.5
    assert_same(nms(*args, backend="triton"), nms(*args, backend="reference"))


@pytest.mark.slow
@pytest.mark.parametrize("grouped", [False, True])
def test_several_steps_of_the_launch_as_it_is(device, grouped):
    count = 2 * LAUNCH.step + 30
    boxes, scores = random_boxes(count, height=900, width=900, min_size=20, max_size=90), distinct_scores(count)
    classes = torch.arange(count) % (3 if grouped else 1)
    args = boxes.to(device), scores.to(device), classes.to(device), 0.3
    kept = batched_nms(*args, backend="triton")
    assert LAUNCH.tile < len(kept) < count
    assert kept.tolist() == batched_nms(*args, backend="reference").tolist()


@interpreted
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("S", "K", "steps"),
    [(80, 300, 1), (1, 200, 1), (3, LAUNCH.step, 1), (1, LAUNCH.step + 1, 2), (1, 100_000, 98)],
)
def test_launches_follow_from_the_shape_and_nothing_waits(S, K, steps, grouped):
    args = torch.rand(S, K, 4), torch.rand(S, K), torch.full((S,), 0.5), torch.rand(S, K) > 0.1
    groups = torch.ones(S, K, dtype=torch.int64) if grouped else None
    with counting() as found, count_blocking() as waits:
        kernels.padded_nms(*args, groups, 20)
    short = K <= kernels.SHORT and S >= kernels.MANY
    assert found.kernels == (1 if short else 2 + steps)  # else the keys, the gather, and one a step
    assert found.ops == (0 if short else 1)  # PyTorch's sort
    assert not waits


def later_states(module: Any, limit: int, device: torch.device) -> Tensor:
    """Of two piles of boxes, the states behind the first step: two are kept, everything else is removed."""
    boxes, scores = torch.tensor(UNIT).repeat(1, 300, 1), distinct_scores(1, 300)
    boxes[:, ::2, ::2] += 50
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "sort_boxes", lambda *args: seen.append(kernels_sort.sort_boxes(*args)) or seen[0])
        threshold = torch.tensor([0.5], device=device)
        module.padded_nms_blocks(boxes.to(device), scores.to(device), threshold, None, None, limit, SMALL)
    return seen[0].state[0, SMALL.step :]


def test_steps_behind_max_output_touch_nothing(device):
    assert not later_states(kernels_blocks, 3, device).any()
    assert later_states(kernels_blocks, 2, device).all()


def test_a_step_too_many_is_seen(device, tmp_path):
    broken = mutant(kernels_blocks, "if total < M:", "if total <= M:", tmp_path)
    assert not later_states(broken, 2, device).all()


@interpreted
@pytest.mark.parametrize("K", [10_000, 100_000, 1_000_000])
def test_memory_is_linear(K):
    """By the formula of the README, and under a tenth of a matrix of K^2 bits."""
    args = torch.rand(1, K, 4), torch.rand(1, K), torch.full((1,), 0.5), None, None, K
    with peak_allocated() as peak, counting():
        kernels.padded_nms(*args)
    assert peak.bytes <= BYTES_A_BOX * K + LAUNCH.step**2 / 8 + 4096
    assert peak.bytes <= 0.1 * K**2 / 8
