"""roi_pool: worked answers, torchvision. What it has in common with RoIAlign is in test_rois.py."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision

from tests.kernels.rois import EACH_BACKEND, KINDS, check, odd_boxes
from tmask_kernels import roi_pool
from tmask_kernels.ops.roi_pool.kernels import forward as kernels
from tmask_kernels.testing import assert_close, random_boxes

# Hand-made answers


@EACH_BACKEND
def test_bins_share_cells_and_the_first_of_equals_takes_the_gradient(backend: str, device: torch.device) -> None:
    rows = [[1, 2, 9, 9, 0], [3, 7, 7, 5, 0], [6, 8, 8, 4, 0], [0, 0, 0, 0, 0.0]]
    cells = torch.tensor(rows, device=device)[None, None].requires_grad_()
    # 3 x 4 cells in 2 x 2 bins: rows 0-1 and 1-2, columns 0-1 and 2-3.
    box = torch.tensor([[0, 0.0, 0.0, 3.0, 2.0]], device=device)
    out = roi_pool(cells, box, 2, backend=backend)
    assert out[0, 0].tolist() == [[7, 9], [8, 8]]
    (gradient,) = torch.autograd.grad(out, cells, torch.tensor([[[[1.0, 2.0], [4.0, 8.0]]]], device=device))
    expected = torch.zeros(4, 5, device=device)
    expected[1, 1], expected[0, 2], expected[2, 1], expected[2, 2] = 1, 2, 4, 8
    assert_close(gradient[0, 0], expected)


@EACH_BACKEND
@pytest.mark.parametrize(("x", "cell"), [(0.5, 1), (1.5, 2), (2.5, 3), (2.4999, 2), (0.49999997, 0), (-0.5, None)])
def test_coordinates_round_half_away_from_zero(backend: str, device: torch.device, x: float, cell: int | None) -> None:
    """A point is one cell: torch.round would take 0.5 and 2.5 to the even number, and floor(x + 0.5) the last to 1."""
    cells = torch.arange(1.0, 7.0, device=device).expand(1, 1, 6, 6)
    out = roi_pool(cells, torch.tensor([[0, x, 0.0, x, 0.0]], device=device), 1, backend=backend)
    assert out.item() == (0 if cell is None else cell + 1)


# Against torchvision, and against the reference in float64


@EACH_BACKEND
@pytest.mark.parametrize("size", [(7, 7), (3, 5), (1, 1)], ids=str)
def test_equals_torchvision(backend: str, device: torch.device, size: tuple[int, int]) -> None:
    """Bit for bit, also where float32 gives the last of 7 bins a cell more: boxes of 57 cells are among these."""
    count = 5 if backend == "triton" and device.type == "cpu" else 40
    feature = torch.randn(2, 3, 15, 64, device=device, requires_grad=True)
    boxes = random_boxes(count, height=30, width=130, min_size=0.5, max_size=20)
    boxes += torch.randn(count, 1) * 10  # some hang over the border
    boxes[0] = torch.tensor([0.0, 2.0, 112.0, 2.0])
    rois = torch.cat([torch.arange(count)[:, None] % 2, boxes], 1).to(device)
    expected = torchvision.ops.roi_pool(feature, rois, size, 0.5)
    out = roi_pool(feature, rois, size, 0.5, backend=backend)
    assert torch.equal(out, expected)
    weights = torch.randn_like(out)
    (got,), (want,) = (torch.autograd.grad(x, feature, weights) for x in (out, expected))
    assert_close(got, want.double())


@pytest.mark.parametrize("size", [(3, 2), (1, 1), (4, 5)], ids=str)
def test_the_reference_equals_torchvision_on_odd_boxes(size: tuple[int, int]) -> None:
    feature, rois = torch.randn(1, 3, 11, 13), F.pad(odd_boxes(torch.device("cpu"))[:9], (1, 0))
    out = roi_pool(feature, rois, size, 0.25, backend="reference")
    assert torch.equal(out, torchvision.ops.roi_pool(feature, rois, size, 0.25))


def test_float64_takes_the_cells_of_float32(device: torch.device) -> None:
    """29 cells in 7 bins: float64 would give the last bin one more."""
    feature = torch.zeros(1, 1, 40, 40, device=device)
    feature[..., 29] = 1
    box = torch.tensor([[0, 0.0, 0.0, 28.0, 28.0]], device=device)
    assert torchvision.ops.roi_pool(feature.double(), box.double(), 7).any()
    for backend in ("reference", "triton"):
        assert not roi_pool(feature, box, 7, backend=backend).any()
        if device.type == "cpu" or backend == "reference":
            assert not roi_pool(feature.double(), box.double(), 7, backend=backend).any()


@EACH_BACKEND
@pytest.mark.parametrize("cells", [(9, 11), (1, 1)], ids=str)
def test_huge_boxes(backend: str, device: torch.device, cells: tuple[int, int]) -> None:
    """The second has more cells than float32 counts."""
    boxes = torch.tensor([[[-3e4, -2e4, 5e4, 3e4], [-1e9, -1e9, 2e9, 2e9]]], device=device)
    feature = torch.randn(1, 4, *cells, device=device, requires_grad=True)
    check(KINDS["pool"], [feature], boxes, 2, backend=backend, scale=0.25)


@EACH_BACKEND
def test_nan_is_passed_over_and_nothing_above_minus_inf_is_minus_inf(backend: str, device: torch.device) -> None:
    feature = torch.ones(1, 2, 4, 6, device=device)
    feature[:, 0, :, :3], feature[:, 0, 1, 1] = -math.inf, math.nan
    feature[:, 1, 0, 0] = math.nan
    feature.requires_grad_()
    out = roi_pool(feature, torch.tensor([[0, 0.0, 0.0, 5.0, 3.0]], device=device), (1, 2), backend=backend)
    assert out.flatten(1).tolist() == [[-math.inf, 1, 1, 1]]
    (gradient,) = torch.autograd.grad(out, feature, torch.ones_like(out))
    expected = torch.zeros_like(gradient)
    expected[0, 0, 0, 3] = expected[0, 1, 0, 1] = expected[0, 1, 0, 3] = 1
    assert_close(gradient, expected)


def test_the_index_is_kept_only_for_a_gradient(device: torch.device) -> None:
    feature, boxes = torch.randn(1, 3, 8, 8, device=device), torch.tensor([[[0.0, 0.0, 5.0, 5.0]]], device=device)
    out, index = kernels.roi_pool(feature, boxes, None, 2, 2, 1.0, False)
    kept, cells = kernels.roi_pool(feature, boxes, None, 2, 2, 1.0, True)
    assert not index.numel()
    assert cells.dtype == torch.int32
    assert torch.equal(out, kept)
    assert torch.equal(feature.flatten(2).gather(2, cells.long().flatten(2)).view_as(out), out)
