"""The test tools themselves can fail: closeness, guards and poison."""

import pytest
import torch
from torch import Tensor

from tmask_kernels.testing import assert_close, guarded, poisoned_empty, random_boxes


def wrong_at(truth: Tensor, place: tuple[int, ...], value: float) -> Tensor:
    wrong = truth.clone()
    wrong[place] = value
    return wrong


TRUTH = torch.linspace(0, 1, 1000).view(40, 25)


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        (wrong_at(TRUTH, (2, 3), 1.1), TRUTH, r"at \(2, 3\)"),
        (TRUTH, wrong_at(TRUTH, (1, 1), float("nan")), "non-finite"),
        (TRUTH, wrong_at(TRUTH, (1, 1), float("inf")), "non-finite"),
        (TRUTH + 5e-6, TRUTH, "rms"),  # small and everywhere
        (torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4]), "1 of 3 differ"),
    ],
    ids=["worst place", "NaN", "inf", "rms", "integers"],
)
def test_assert_close_names_what_differs(actual: Tensor, expected: Tensor, message: str) -> None:
    assert_close(expected.clone(), expected.double() if expected.is_floating_point() else expected)
    with pytest.raises(AssertionError, match=message):
        assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_poisoned_empty_finds_a_write_outside(dtype: torch.dtype) -> None:
    with poisoned_empty():
        out = torch.empty(3, 5, dtype=dtype)
        assert (out.isnan() if dtype.is_floating_point else out == out.max()).all()
        out.fill_(0)
    overrun = pytest.raises(AssertionError, match="outside its output")
    with overrun, poisoned_empty():
        out = torch.empty(15, dtype=dtype)
        out.as_strided((16,), (1,)).fill_(0)


def test_guarded_keeps_values_strides_and_grad() -> None:
    x = torch.rand(2, 3, 5, 4).to(memory_format=torch.channels_last).requires_grad_()
    y = guarded(x)
    assert torch.equal(x, y)
    assert y.stride() == x.stride()
    assert y.requires_grad
    assert y.as_strided((1,), (1,), y.storage_offset() - 1).isnan().all()


def test_random_boxes_are_seeded_and_inside() -> None:
    boxes = random_boxes(100, height=40, width=60, min_size=2, max_size=50, seed=3)
    assert torch.equal(boxes, random_boxes(100, height=40, width=60, min_size=2, max_size=50, seed=3))
    assert (boxes[:, 2:] - boxes[:, :2] >= 2 - 1e-3).all()
    assert (boxes >= 0).all()
    assert (boxes[:, 2] <= 60 + 1e-3).all()
    assert (boxes[:, 3] <= 40 + 1e-3).all()
