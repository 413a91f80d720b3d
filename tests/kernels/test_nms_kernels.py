"""The two strategies of NMS in Triton: against the reference behind guard bands, mutants, launches, waits, memory."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.test_nms import NAN, UNIT, crowded, distinct_scores
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

# The interpreter's numpy warns where the rules for NaN and inf are at work.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
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
    cases = [  # name, boxes, threshold, max_output without groups, boxes with a score
        ("tied", torch.stack([tied, tied.view(2, 70, 4).transpose(0, 1).reshape(140, 4)]), 0.5, 150, 131),
        ("crowded", torch.stack([crowded(170), crowded(170, seed=1)]), 0.5, 40, 161),
        ("without scores", torch.stack([repeated, repeated + 1]), 0.5, 150, 3),
        ("chain", torch.stack([chain, chain.flip(0)]), 0.4, 150, 141),
    ]
    for name, boxes, threshold, most, scored in cases:
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
                indices, counts = function(*given, limit)
            args = [None if a is None else a.cpu() for a in given]
            expected, expected_counts = reference.padded_nms_reference(*args, limit)
            assert indices.cpu().equal(expected), name
            assert counts.cpu().equal(expected_counts), name


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES.keys())
def test_strategies_equal_the_reference_behind_guard_bands(strategy: Function, device: torch.device) -> None:
    check_padded(strategy, device)


# What is broken, and the two texts. Those of `SLOW` are left to `make test-slow`, beside like ones that are not.
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


def named(mutants: dict[str, tuple[str, str]]) -> pytest.MarkDecorator:
    """Parametrise a test ``(old, new)``."""
    rows = [pytest.param(*texts, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, texts in mutants.items()]
    return pytest.mark.parametrize(("old", "new"), rows)


@named(SEGMENT_MUTANTS)
def test_broken_segments_fail(device: torch.device, tmp_path: Path, old: str, new: str) -> None:
    broken: Any = mutant(kernels, old, new, tmp_path)
    with pytest.raises(AssertionError):
        check_padded(sorting(broken.padded_nms_segments), device)


@named(BLOCK_MUTANTS)
def test_broken_blocks_fail(device: torch.device, tmp_path: Path, old: str, new: str) -> None:
    broken: Any = mutant(kernels_blocks, old, new, tmp_path)
    with pytest.raises(AssertionError):
        check_padded(sorting(functools.partial(broken.padded_nms_blocks, launch=SMALL)), device)


@named(SORT_MUTANTS)
def test_a_broken_gather_fails(device: torch.device, tmp_path: Path, old: str, new: str) -> None:
    broken: Any = mutant(kernels_sort, old, new, tmp_path, seen_from=kernels)
    with pytest.raises(AssertionError):
        check_padded(sorting(broken.padded_nms_segments, broken.sort_boxes), device)


# --- launches, waits, memory -----------------------------------------------------------------------------------------


def test_the_strategy_follows_from_the_shape() -> None:
    few_and_long, many_or_short = kernels.padded_nms_blocks, kernels.padded_nms_segments
    for S, K, expected in [
        (10, 2000, few_and_long),  # levels of two images
        (1, 1000, few_and_long),
        (1, 1_000_000, few_and_long),
        (1, 100, many_or_short),
        (80, 1000, many_or_short),  # classes
        (20_000, 1000, many_or_short),
    ]:
        assert kernels.strategy(S, K) is expected, (S, K)


def test_the_launch_as_it_is_equals_the_reference(device: torch.device) -> None:
    """In its first step only; what follows, `test_several_steps_of_the_launch_as_it_is` does slowly."""
    boxes, scores = crowded(150).to(device), distinct_scores(150).to(device)
    assert nms(boxes, scores, 0.5, backend="triton").tolist() == nms(boxes, scores, 0.5, backend="reference").tolist()


@pytest.mark.slow
@pytest.mark.parametrize("grouped", [False, True])
def test_several_steps_of_the_launch_as_it_is(device: torch.device, grouped: bool) -> None:
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
def test_launches_follow_from_the_shape_and_nothing_waits(S: int, K: int, steps: int, grouped: bool) -> None:
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


def test_steps_behind_max_output_touch_nothing(device: torch.device) -> None:
    assert not later_states(kernels_blocks, 3, device).any()
    assert later_states(kernels_blocks, 2, device).all()


def test_a_step_too_many_is_seen(device: torch.device, tmp_path: Path) -> None:
    broken = mutant(kernels_blocks, "if total < M:", "if total <= M:", tmp_path)
    assert not later_states(broken, 2, device).all()


class LiveBytes(TorchDispatchMode):
    """`peak`: the most bytes that tensors made inside the block held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        self.storages = {key: row for key, row in self.storages.items() if not row[0].expired()}
        for tensor in pytree.tree_leaves(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return out


@interpreted
@pytest.mark.parametrize("K", [10_000, 100_000, 1_000_000])
def test_memory_is_linear(K: int) -> None:
    """By the formula of the README, and under a tenth of a matrix of K^2 bits."""
    args = torch.rand(1, K, 4), torch.rand(1, K), torch.full((1,), 0.5), None, None, K
    with LiveBytes() as live, counting():
        kernels.padded_nms(*args)
    assert live.peak <= BYTES_A_BOX * K + LAUNCH.step**2 / 8 + 4096
    assert live.peak <= 0.1 * K**2 / 8
