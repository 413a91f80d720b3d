"""The two strategies of NMS in Triton: against the reference behind guard bands, mutants, launches, waits, memory."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.tools import NAN, UNIT, LiveBytes, assert_same, crowded, distinct_scores, each_mutant
from tests.launches import counting
from tests.model.sync import count_blocking
from tests.mutation import mutant
from tmask_kernels import batched_nms, nms
from tmask_kernels.backend import interpreter_enabled
from tmask_kernels.ops.nms import reference
from tmask_kernels.ops.nms.kernels import blocks as kernels_blocks
from tmask_kernels.ops.nms.kernels import padded as kernels
from tmask_kernels.ops.nms.kernels import sort as kernels_sort
from tmask_kernels.ops.nms.kernels.blocks import LAUNCH, Launch, padded_nms_blocks
from tmask_kernels.testing import guarded, poisoned_empty, random_boxes

interpreted = pytest.mark.skipif(not interpreter_enabled(), reason="counts through Triton's interpreter")

# Several steps, chunks and splits in a hundred boxes.
SMALL = Launch(step=64, tile=32, programs=4, num_warps=1)
BYTES_A_BOX = 49
Function = Callable[..., tuple[Tensor, Tensor]]


def sorting(strategy: Function, sort: Function = kernels_sort.sort_boxes) -> Function:
    """`strategy` with the reference's signature."""

    def function(
        boxes: Tensor, scores: Tensor, thresholds: Tensor, valid: Tensor | None, groups: Tensor | None, limit: int
    ) -> tuple[Tensor, Tensor]:
        return strategy(sort(boxes, scores, valid, groups), thresholds, limit)

    return function


STRATEGIES = {
    "segments": sorting(kernels.padded_nms_segments),
    "blocks": sorting(functools.partial(padded_nms_blocks, launch=SMALL)),
}


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


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES.keys())
def test_strategies_equal_the_reference_behind_guard_bands(strategy, device):
    check_padded(strategy, device)


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
    "last slot": ("mask = slot < slots", "mask = slot < slots - 20"),
    "segment": ("segment = slot // K", "segment = slot * 0"),
}
SLOW = {"list step", "block step", "tiles of the list", "list end", "removed", "group with list", "group in block",
        "neighbour", "past the end", "one round", "count", "step end"}  # fmt: skip
TABLES = {
    "segments": (kernels, SEGMENT_MUTANTS),
    "blocks": (kernels_blocks, BLOCK_MUTANTS),
    "sort": (kernels_sort, SORT_MUTANTS),
}
MUTANTS = {f"{part}: {name}": (m, *texts) for part, (m, table) in TABLES.items() for name, texts in table.items()}


@each_mutant(MUTANTS, [name for name in MUTANTS if name.split(": ")[1] not in SLOW])
def test_a_broken_kernel_fails(device, tmp_path, name):
    module, old, new = MUTANTS[name]
    broken = mutant(module, old, new, tmp_path, seen_from=kernels)
    strategy = broken.padded_nms_segments
    if module is kernels_blocks:
        strategy = functools.partial(broken.padded_nms_blocks, launch=SMALL)
    with pytest.raises(AssertionError):
        check_padded(sorting(strategy, broken.sort_boxes), device)


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
    assert found.kernels == 1 + steps  # the gather, and one a step
    assert found.ops <= 9  # a NaN where no score is, its sort, what outputs begin with
    assert not waits


def later_states(module: Any, limit: int, device: torch.device) -> Tensor:
    """Of two piles of boxes, the states behind the first step: two are kept, everything else is removed."""
    boxes, scores = torch.tensor(UNIT).repeat(1, 300, 1), distinct_scores(1, 300)
    boxes[:, ::2, ::2] += 50
    segments = kernels_sort.sort_boxes(boxes.to(device), scores.to(device), None, None)
    module.padded_nms_blocks(segments, torch.tensor([0.5], device=device), limit, SMALL)
    return segments.state[0, SMALL.step :]


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
    with LiveBytes() as live, counting():
        kernels.padded_nms(*args)
    assert live.peak <= BYTES_A_BOX * K + LAUNCH.step**2 / 8 + 4096
    assert live.peak <= 0.1 * K**2 / 8
