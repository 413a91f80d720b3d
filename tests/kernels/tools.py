"""What the tests of several ops share: odd numbers and boxes, tables of mutants, comparisons."""

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tmask_kernels.testing import Tolerance, assert_close, random_boxes

NAN, INF = math.nan, math.inf
UNIT = [0.0, 0.0, 10.0, 10.0]
HALVES = [torch.float16, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def each_mutant(mutants: Mapping[str, Any], quick: Collection[str] | None = None) -> pytest.MarkDecorator:
    """Parametrise a test by ``name`` of a mutant. `quick`: those that `make test` runs too, by default all."""
    slow = set() if quick is None else set(mutants) - set(quick)
    rows = [pytest.param(name, marks=[pytest.mark.slow] * (name in slow)) for name in mutants]
    return pytest.mark.parametrize("name", rows)


def slow(*values: Any) -> Any:
    """A row of parameters that `make test` leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow)


def needs_the_interpreter(device: torch.device) -> None:
    """Skip on a GPU, where kernels take no float64."""
    if device.type == "cuda":
        pytest.skip("float64 runs in the interpreter only")


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a nested result, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def assert_same(got: Any, expected: Any) -> None:
    """Nested results are equal in shape, dtype and every bit; any NaN equals any other."""
    ours, theirs = pytree.tree_leaves(got), pytree.tree_leaves(expected)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if isinstance(b, Tensor):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), i
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, check_device=False)
        else:
            assert a == b, i


def assert_close_gradient(gradient: Tensor, expected: Tensor, *, tolerance: Tolerance | None = None) -> None:
    """As `assert_close`, both scaled by the power of two that lifts the largest value above 1: that rounds nothing."""
    scale = 2.0 ** expected.abs().max().log2().floor() if expected.any() else 1.0
    assert_close((gradient.double() / scale).to(gradient.dtype), expected / scale, name="gradient", tolerance=tolerance)


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def crowded(count: int, seed: int = 0) -> Tensor:
    """Boxes [count, 4] of which NMS at 0.5 keeps about a third; some of them repeat."""
    boxes = random_boxes(count, height=100, width=120, min_size=15, max_size=60, seed=seed)
    boxes[count // 2 :: 10] = boxes[: len(boxes[count // 2 :: 10])].clone()
    return boxes


def distinct_scores(*shape: int, seed: int = 0) -> Tensor:
    count = torch.Size(shape).numel()
    return (torch.randperm(count, generator=torch.Generator().manual_seed(seed)) / count).view(shape)


def odd_boxes(height: int, device: torch.device) -> Tensor:
    """Boxes [11, 4] for an image of `height` x 37 pixels."""
    rows = [
        [NAN, 1, 5, 5],
        [1, 1, INF, 5],
        [-INF, -INF, INF, INF],
        [7, 7, 2, 2],  # inverted
        [7, 2, 7, 8],  # no width
        [5, 2, 5.001, 9],
        [-3e38, 0, 3e38, 9],  # its width overflows
        [36, height - 1, 37, height],  # the last pixel
        [-900, -900, -800, -800],
        [2.0**24, 0, 2.0**24 + 8, 5],
        [1e-40, 1e-40, 2e-40, 2e-40],
    ]
    return torch.tensor(rows, device=device)


def run_patterns(side: int, a: int, b: int, c: int) -> Tensor:
    """Masks [11, side, side] bool with runs of every kind; a, b and c are places below `side`."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    low, high = min(a, b), max(a, b)
    bits = [
        x < 0,
        x >= 0,
        (y == a) & (x == b),
        x == a,
        y == a,  # for the last row: every column ends with a one, the next begins with a zero
        (y == 0) | (y == side - 1),
        (x >= low) & (x <= high),  # full columns are one run
        (y >= low) & (x >= c),
        (y <= a) & (x <= b),
        (y + x) % (c + 1) == 0,
        (y + x * (a + 1)) % 2 == 1,
    ]
    return torch.stack(bits)
