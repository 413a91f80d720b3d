"""Launches and waits are counted as they would fall on a GPU, and docs/performance.md shows them."""

import pytest
import torch

from bench import counted, launches
from bench.contest import Call, Contest
from bench.launches import Count, count_call, count_provider
from bench.work import Work
from tmask_kernels import decode_boxes, multiscale_roi_align, padded_nms
from tmask_kernels.backend import interpreter_enabled

pytestmark = pytest.mark.skipif(not interpreter_enabled(), reason="counts through Triton's interpreter")

BOXES, SCORES = torch.rand(2, 5, 4), torch.rand(2, 5)


def test_views_and_allocations_are_free() -> None:
    assert count_call(lambda: torch.empty(4, 4).t()[1:].reshape(-1)) == Count(ops=1)  # a copy of what is transposed
    assert count_call(lambda: BOXES[0].view(20).expand(3, 20)) == Count()


def test_waits_are_seen() -> None:
    assert count_call(lambda: SCORES.sum().item()).waits == 1
    assert count_call(lambda: SCORES[SCORES > 0.5]).waits == 1
    assert count_call(lambda: SCORES[torch.tensor([0, 1])]).waits == 0
    assert count_call(lambda: torch.nonzero(SCORES)).waits == 1
    assert count_call(lambda: (SCORES.cpu(), SCORES.tolist())) == Count(waits=2)


def test_kernels_are_counted_and_do_not_run() -> None:
    assert count_call(lambda: decode_boxes(BOXES, BOXES, backend="triton")) == Count(kernels=1)
    with launches.counting():
        out = decode_boxes(BOXES, BOXES, backend="triton")
    assert not out.any()


def test_operators_inside_our_own_are_counted() -> None:
    count = count_call(lambda: padded_nms(BOXES, SCORES, 0.5, max_output=3, backend="triton"))
    assert count.kernels == 2  # the gather and the suppression
    assert count.ops >= 2  # a sort and what it sorts at least
    assert count.waits == 0


def test_operators_made_of_others_are_counted_inside_our_own() -> None:
    @torch.library.custom_op("tmask_counted::waits", mutates_args=())
    def waits(x: torch.Tensor) -> torch.Tensor:
        torch.where(x > 0.5)  # arrives as `where` and is a `nonzero`
        return x + 1

    assert count_call(lambda: waits(SCORES)).waits == 1


def test_a_backward_is_counted() -> None:
    """RoIAlign's: one launch marks the tiles that each box touches, one gathers."""
    maps = [torch.zeros(1, 16, 8, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    out = multiscale_roi_align(maps, BOXES[:1], 2, [0.25, 0.125], backend="triton")
    assert count_call(lambda: torch.autograd.grad(out, maps, out, retain_graph=True)) == Count(kernels=2)


def test_a_kernel_that_is_missing_and_one_that_breaks() -> None:
    def missing(given: object) -> Call:
        raise ValueError("x: backend='triton' does not exist for this op; it has reference")

    def broken(given: object) -> Call:
        raise ValueError("x: wrong")

    contest = Contest(
        inputs=lambda: None,
        providers={"one": lambda given: lambda: SCORES + 1, "missing": missing, "broken": broken},
        truth=lambda given: None,
        check=lambda got, truth: None,
        work=Work(1),
    )
    assert count_provider(contest, "one") == Count(ops=1)
    assert count_provider(contest, "missing") is None
    with pytest.raises(ValueError, match="wrong"):
        count_provider(contest, "broken")


def test_the_page_is_current() -> None:
    text = counted.PAGE.read_text()
    now = counted.replace_table(text, "launches", launches.table())
    assert now == text, "run TRITON_INTERPRET=1 python -m bench.launches --write"
