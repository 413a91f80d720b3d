"""Launches and waits are counted as they would fall on a GPU."""

import pytest
import torch

from tests.launches import Count, count_call
from tmask_kernels import multiscale_roi_align, padded_nms
from tmask_kernels.backend import interpreter_enabled
from tmask_kernels.namespace import custom_op

pytestmark = pytest.mark.skipif(not interpreter_enabled(), reason="counts through Triton's interpreter")

BOXES, SCORES = torch.rand(2, 5, 4), torch.rand(2, 5)


def test_waits_are_seen() -> None:
    assert count_call(lambda: SCORES.sum().item()).waits == 1
    assert count_call(lambda: SCORES[SCORES > 0.5]).waits == 1
    assert count_call(lambda: SCORES[torch.tensor([0, 1])]).waits == 0
    assert count_call(lambda: torch.nonzero(SCORES)).waits == 1
    assert count_call(lambda: (SCORES.cpu(), SCORES.tolist())) == Count(waits=2)


def test_operators_inside_our_own_are_counted() -> None:
    """A threshold that is a number, and one launch that sorts and suppresses."""
    assert count_call(lambda: padded_nms(BOXES, SCORES, 0.5, max_output=3, backend="triton")) == Count(1, 1, 0)

    @custom_op("counted_waits")
    def waits(x: torch.Tensor) -> torch.Tensor:
        torch.where(x > 0.5)  # arrives as `where` and is a `nonzero`
        return x + 1

    count = count_call(lambda: waits(SCORES))
    assert (count.ops, count.waits) == (3, 1)


def test_a_backward_is_counted() -> None:
    """RoIAlign's: one launch marks the tiles that each box touches, one gathers."""
    maps = [torch.zeros(1, 16, 8, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    out = multiscale_roi_align(maps, BOXES[:1], 2, [0.25, 0.125], backend="triton")
    assert count_call(lambda: torch.autograd.grad(out, maps, out, retain_graph=True)) == Count(kernels=2)
