"""What must hold of RoIAlign whatever the input: symmetries, exactness, the rounding of half precision, memory."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.cases import CASES, RoICase
from tests.kernels.test_roi_align import BACKENDS
from tmask_kernels import roi_align
from tmask_kernels.ops.roi_align.kernels import backward as kernels_backward
from tmask_kernels.testing import assert_close

H, W = 8, 16  # one tile of the backward: the interpreter is slow
BINS = (2, 3)

EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
# Shrinking a failure through the interpreter would take minutes.
few_examples = settings(max_examples=5, deadline=None, derandomize=True, phases=[Phase.generate])


@st.composite
def boxes_inside(draw: st.DrawFn) -> Tensor:
    """[1, 2, 4] aligned boxes in cells: bicubic samples in them have no tap beyond a border.

    Multiples of 1/64: coordinates are exact in float32, and moving a box moves no sample over an edge.
    """
    rows = []
    for _ in range(2):
        x, y = draw(st.integers(2 * 64, (W - 4) * 64)), draw(st.integers(2 * 64, (H - 4) * 64))
        w, h = draw(st.integers(1, min(5 * 64, (W - 2) * 64 - x))), draw(st.integers(1, (H - 2) * 64 - y))
        rows.append([x, y, x + w, y + h])
    return torch.tensor([rows]) / 64


@st.composite
def grids(draw: st.DrawFn, backend: str) -> dict[str, Any]:
    kinds = ["bilinear"] if backend == "torchvision" else ["bilinear", "bicubic"]
    ratio, interpolation = draw(st.sampled_from([0, 1, 2, 3])), draw(st.sampled_from(kinds))
    return {"sampling_ratio": ratio, "aligned": True, "interpolation": interpolation, "backend": backend}


def need_cpu(backend: str, device: torch.device) -> None:
    if backend == "torchvision" and device.type != "cpu":
        pytest.skip("the torchvision backend serves the CPU only")


@EACH_BACKEND
@few_examples
@given(data=st.data(), dy=st.integers(-3, 3), dx=st.integers(-3, 3))
def test_moving_map_and_box_by_whole_cells_changes_nothing(
    backend: str, device: torch.device, data: st.DataObject, dy: int, dx: int
) -> None:
    need_cpu(backend, device)
    boxes, grid = data.draw(boxes_inside()).to(device), data.draw(grids(backend))
    feature = torch.randn(1, 2, H, W, generator=torch.Generator().manual_seed(1)).to(device)
    out = roi_align(feature, boxes, BINS, **grid)
    moved = F.pad(feature, (3 + dx, 3 - dx, 3 + dy, 3 - dy))
    shift = torch.tensor([3 + dx, 3 + dy] * 2, device=device)
    assert_close(roi_align(moved, boxes + shift, BINS, **grid), out.double())


@EACH_BACKEND
@few_examples
@given(data=st.data(), slopes=st.tuples(*[st.integers(-8, 8)] * 3))
def test_bins_of_a_ramp_are_its_values_at_their_centres(
    backend: str, device: torch.device, data: st.DataObject, slopes: tuple[int, int, int]
) -> None:
    need_cpu(backend, device)
    boxes, grid = data.draw(boxes_inside()), data.draw(grids(backend))
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    a, b, c = slopes
    ramp = (a * y + b * x + c).float().to(device)[None, None]
    x1, y1, x2, y2 = (boxes[0].double() - 0.5)[..., None].unbind(1)  # [2, 1]
    centres_y = y1 + (y2 - y1) * (torch.arange(2).double() + 0.5) / 2  # [2, 2]
    centres_x = x1 + (x2 - x1) * (torch.arange(3).double() + 0.5) / 3  # [2, 3]
    expected = a * centres_y[:, :, None] + b * centres_x[:, None, :] + c
    assert_close(roi_align(ramp, boxes.to(device), BINS, **grid)[:, 0], expected.to(device))


@EACH_BACKEND
@few_examples
@given(data=st.data())
def test_a_box_inside_hands_on_its_whole_gradient(backend: str, device: torch.device, data: st.DataObject) -> None:
    """The weights of a bin add up to 1."""
    need_cpu(backend, device)
    boxes, grid = data.draw(boxes_inside()).to(device), data.draw(grids(backend))
    feature = torch.zeros(1, 2, H, W, device=device, requires_grad=True)
    out = roi_align(feature, boxes, BINS, **grid)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device)
    (gradient,) = torch.autograd.grad(out, feature, upstream)
    assert_close(gradient.sum((0, 2, 3)), upstream.double().sum((0, 2, 3)))


# Half precision


def assert_one_ulp(got: Tensor, exact: Tensor) -> None:
    """Each value within a unit in its last place, plus 1e-6, of `exact` (float64)."""
    unit = torch.finfo(got.dtype).eps * 2.0 ** (torch.frexp(exact).exponent - 1)
    excess = (got.double() - exact).abs() - unit - 1e-6
    assert excess.max() <= 0, f"{int((excess > 0).sum())} of {excess.numel()} err more; by {excess.max():.2e} at most"


@EACH_BACKEND
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("interpolation", "sampling_ratio"),
    [("bilinear", 0), ("bilinear", 2), ("bicubic", 2), pytest.param("bicubic", 0, marks=pytest.mark.slow)],
)
def test_half_precision_errs_by_one_unit_at_most(
    backend: str, device: torch.device, dtype: torch.dtype, interpolation: str, sampling_ratio: int
) -> None:
    """Forward and gradient, boxes of up to 1,000 pixels: their coordinates and sums are float32 throughout."""
    need_cpu(backend, device)
    if (backend, interpolation) == ("torchvision", "bicubic"):
        pytest.skip("torchvision has no bicubic samples")
    feature = torch.randn(1, 2, 32, 32).to(device, dtype).requires_grad_()  # drawn on the CPU: the same everywhere
    rows = [[7.3, 11.9, 1009.4, 1013.8], [-31.0, 401.7, 990.2, 1100.6]]
    boxes = torch.tensor([rows], device=device)
    options: dict[str, Any] = {"aligned": True, "sampling_ratio": sampling_ratio, "interpolation": interpolation}
    exact_feature = feature.detach().double().requires_grad_()
    exact = roi_align(exact_feature, boxes, 7, 1 / 32, **options, backend="reference")
    out = roi_align(feature, boxes, 7, 1 / 32, **options, backend=backend)
    assert_one_ulp(out, exact)
    upstream = torch.randn(out.shape).to(out)
    (gradient,) = torch.autograd.grad(out, feature, upstream)
    (expected,) = torch.autograd.grad(exact, exact_feature, upstream.double())
    assert_one_ulp(gradient, expected)


# Memory


class Allocations(TorchDispatchMode):
    """Bytes of every tensor made; of none freed, so that they bound the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and (out._base is None and not any(out is a for a in args)):
            self.bytes += out.untyped_storage().nbytes()
        return out


@pytest.mark.parametrize("name", ["roi-align-box-head", "roi-align-mask-head", "roi-align-map-adaptive"])
def test_the_backward_needs_a_bit_a_box_and_tile(name: str) -> None:
    """At full size, launches left out: beyond the gradients just the mask, 4 bytes for 32 boxes of each tile."""
    case = CASES[name]
    assert isinstance(case, RoICase)
    boxes = case.boxes()
    N, P = boxes.shape[:2]
    bins = case.pooled
    out_grad = torch.empty(N * P, case.channels, bins, bins, dtype=torch.bfloat16, memory_format=torch.channels_last)
    heights, widths = zip(*case.sizes, strict=True)
    with (
        mock.patch.object(type(kernels_backward._gather_kernel), "run", autospec=True) as launches,
        Allocations() as allocations,
    ):
        gradients = kernels_backward.multiscale_roi_align_backward._init_fn(
            out_grad, boxes, None, N, heights, widths, True, case.scales, case.thresholds, case.sampling_ratio, True,
            None,
        )  # fmt: skip
    assert launches.call_count == 2
    tile = kernels_backward.pick_gather_tile(case.channels, 2, True)
    tiles = sum(-(-h // tile.height) * -(-w // tile.width) for h, w in case.sizes)
    mask = 4 * N * -(-P // 32) * tiles
    beyond = allocations.bytes - sum(g.numel() * g.element_size() for g in gradients)
    assert beyond == mask
    assert mask < 0.15e6, "the mask of roi-align-box-head takes 92 kB"
