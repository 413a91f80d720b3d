"""The test tools themselves can fail: closeness, guards and poison."""

import pytest
import torch

from tmask_kernels.testing import assert_close, guarded, poisoned_empty, random_boxes


def test_assert_close_passes_and_names_the_worst_place() -> None:
    truth = torch.rand(4, 5, dtype=torch.float64)
    assert_close(truth.float(), truth)
    wrong = truth.float()
    wrong[2, 3] += 0.1
    with pytest.raises(AssertionError, match=r"at \(2, 3\)"):
        assert_close(wrong, truth)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_assert_close_wants_non_finite_values_in_place(value: float) -> None:
    truth = torch.zeros(3)
    truth[1] = value
    assert_close(truth.clone(), truth)
    with pytest.raises(AssertionError, match="non-finite"):
        assert_close(torch.zeros(3), truth)


def test_assert_close_sees_a_small_error_everywhere() -> None:
    truth = torch.rand(1000, dtype=torch.float64)
    with pytest.raises(AssertionError, match="rms"):
        assert_close((truth + 5e-6).float(), truth)


def test_assert_close_wants_integers_equal() -> None:
    with pytest.raises(AssertionError, match="1 of 3 differ"):
        assert_close(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4]))


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
