"""RoIAlign: worked answers, torchvision, levels, memory, what max alone does, and the gradient to the boxes.

What RoIAlign has in common with the other RoI ops is in test_rois.py.
"""

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.allocations import allocated
from tests.kernels.rois import (
    ADAPTIVE,
    EACH_BACKEND,
    EACH_GRID,
    FIXED,
    INTERPOLATIONS,
    KINDS,
    SLOW,
    Grid,
    brute_force,
    odd_boxes,
)
from tmask_kernels import pyramid_levels
from tmask_kernels import roi_align as any_roi_align
from tmask_kernels.common.pyramid import level_thresholds
from tmask_kernels.ops.roi_align import reference
from tmask_kernels.ops.roi_align.kernels import backward as kernels_backward
from tmask_kernels.ops.roi_align.kernels import forward as kernels_forward
from tmask_kernels.ops.roi_align.kernels import max as kernels_max
from tmask_kernels.testing import assert_close, random_boxes

CPU = torch.device("cpu")


def roi_align(feature: Tensor, *args: Any, **options: Any) -> Tensor:
    """The op; skips the test where the backend has no such samples."""
    if (options.get("backend"), options.get("interpolation")) == ("torchvision", "bicubic"):
        pytest.skip("torchvision has no bicubic samples")
    return any_roi_align(feature, *args, **options)


# Worked answers: the box reaches from 1 to 3 in both directions of f(y, x) = 5 y + x, so 4 bins of half a cell have
# their centres at 1.25, 1.75, 2.25, 2.75. Aligned, all lies half a cell further up and left: f is 3 less.


@EACH_BACKEND
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2])
@pytest.mark.parametrize("aligned", [False, True], ids=["not_aligned", "aligned"])
def test_the_5_x_5_table(backend: str, device: torch.device, aligned: bool, sampling_ratio: int) -> None:
    rows = [[7.5, 8.0, 8.5, 9.0], [10.0, 10.5, 11.0, 11.5], [12.5, 13.0, 13.5, 14.0], [15.0, 15.5, 16.0, 16.5]]
    table = torch.arange(25.0, device=device).view(1, 1, 5, 5)
    box = torch.tensor([[0.0, 1, 1, 3, 3]], device=device)
    out = roi_align(table, box, 4, 1.0, sampling_ratio, aligned, backend=backend)
    assert_close(out[0, 0], torch.tensor(rows, device=device) - (3 if aligned else 0))


@EACH_BACKEND
@pytest.mark.parametrize(
    ("at", "expected"), [(-1.0, 1.0), (-1.01, 0.0), (4.0, 4.0), (4.01, 0.0), (3.5, 4.0), (-0.5, 1.0)]
)
def test_in_and_out_of_the_map(backend: str, device: torch.device, at: float, expected: float) -> None:
    """Exactly -1 and exactly H are inside and take the border's value; beyond is 0."""
    column = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device)[None, None, :, None].expand(1, 1, 4, 4)
    point = torch.tensor([[0, 1.5, at + 0.5, 1.5, at + 0.5]], device=device)
    assert roi_align(column, point, 1, 1.0, 1, True, backend=backend).item() == expected


# The definition of bicubic samples where it has special cases


def check_maps_of_few_cells() -> None:
    """Every tap may be one of the border's."""
    for side in (1, 2, 3):
        feature = torch.randn(2, side, 3, dtype=torch.float64)
        box = [-0.4, -0.7, 2.6, side + 0.3]
        boxes = torch.tensor([[box]], dtype=torch.float64)
        out = roi_align(feature[None], boxes, 3, 1.0, 2, interpolation="bicubic", backend="reference")
        assert_close(out[0], brute_force(feature, box, (3, 3), FIXED, cubic=-0.5))


def close_samples(bins: int, device: torch.device) -> Tensor:
    """Boxes [4, 4] in cells with bins a little over 5 cells long: of their 6 samples 5 lie within 2 cells of a cell."""
    corner = torch.arange(4.0, device=device)[:, None] * 0.25 + 0.3
    return torch.cat([corner, corner, corner + bins * 5.01, corner + bins * 5.01], 1)


def check_close_samples() -> None:
    """The adaptive grid misses no sample."""
    feature = torch.randn(1, 7, 8, dtype=torch.float64)
    boxes = close_samples(1, CPU).double()
    out = roi_align(feature[None], boxes[None], 1, 1.0, 0, True, interpolation="bicubic", backend="reference")
    for got, box in zip(out, boxes.tolist(), strict=True):
        assert_close(got, brute_force(feature, box, (1, 1), ADAPTIVE, cubic=-0.5))


# Other libraries


@EACH_GRID
@pytest.mark.parametrize("size", [(7, 7), (3, 5), (1, 1)], ids=str)
def test_reference_equals_torchvision(grid: Grid, size: tuple[int, int]) -> None:
    feature = torch.randn(2, 5, 37, 41, dtype=torch.float64, requires_grad=True)
    boxes = random_boxes(60, height=150, width=150, min_size=0.5).double()
    boxes += torch.randn(60, 1) * 30  # many hang over the border
    rois = torch.cat([torch.arange(60.0)[:, None] % 2, boxes], 1)
    expected = torchvision.ops.roi_align(feature, rois, size, 0.25, *grid)
    out = roi_align(feature, rois, size, 0.25, *grid, backend="reference")
    assert_close(out, expected)
    weights = torch.randn_like(out)
    (gradient,), (wanted,) = (torch.autograd.grad(x, feature, weights) for x in (out, expected))
    assert_close(gradient, wanted)


def by_grid_sample(feature: Tensor, boxes: Tensor, bins: int, ratio: int, mode: str) -> Tensor:
    """Aligned RoIAlign of [C, H, W], boxes [K, 4] in cells and inside, as a mean over grid_sample's points."""
    _, H, W = feature.shape
    x1, y1, x2, y2 = boxes.unbind(1)  # [K]
    steps = (torch.arange(bins * ratio, dtype=boxes.dtype, device=boxes.device) + 0.5) / (bins * ratio)
    # grid_sample without align_corners: -1 and 1 are the outer edges of the border's cells, as 0 and W are of a box.
    x = 2 * (x1[:, None] + (x2 - x1)[:, None] * steps) / W - 1  # [K, bins * ratio]
    y = 2 * (y1[:, None] + (y2 - y1)[:, None] * steps) / H - 1
    grid = torch.stack([x[:, None, :].expand(-1, len(steps), -1), y[:, :, None].expand(-1, -1, len(steps))], 3)
    samples = F.grid_sample(feature.expand(len(boxes), -1, -1, -1), grid, mode, "border", align_corners=False)
    return F.avg_pool2d(samples, ratio)


@EACH_BACKEND
@INTERPOLATIONS
@pytest.mark.parametrize("ratio", [1, 2])
def test_is_the_mean_of_grid_samples_points(backend: str, device: torch.device, interpolation: str, ratio: int) -> None:
    feature = torch.randn(2, 17, 23, device=device)
    boxes = random_boxes(3, height=17, width=23, min_size=2, max_size=16, device=device)
    boxes = boxes.clamp(0.5, 16.5)  # samples between cell centres, where no library clamps a coordinate
    # grid_sample's cubic kernel has the coefficient -0.75.
    options: dict[str, Any] = {"interpolation": interpolation, "cubic_coeff": -0.75, "backend": backend}
    out = roi_align(feature[None], boxes[None], 2, 1.0, ratio, True, **options)
    assert_close(out, by_grid_sample(feature.double(), boxes.double(), 2, ratio, interpolation))


class DividesAsCuda(TorchDispatchMode):
    """CUDA divides a tensor by a number as a product with the number's inverse, which loses a bit."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.div.Tensor and (not isinstance(args[1], Tensor) or not args[1].dim()):
            return args[0] * torch.tensor(1.0, dtype=args[0].dtype).div(args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bins", [7, 14, 28])
def test_the_adaptive_grid_of_the_reference_is_the_same_on_cuda(bins: int) -> None:
    """Boxes a whole number of bins long: a bit more, and the grid of a bin has a sample more."""
    sizes = torch.arange(1.0, 40) * bins
    feature = torch.randn(1, 1, 1, 1200)
    boxes = torch.stack([sizes * 0 + 3.25, sizes * 0, sizes + 3.25, sizes * 0 + 1], 1)[None]
    expected = roi_align(feature, boxes, (1, bins), 1.0, 0, False, backend="reference")
    with DividesAsCuda():
        assert not torch.equal(sizes / bins, torch.arange(1.0, 40)), "the numbers are such that it shows"
        got = roi_align(feature, boxes, (1, bins), 1.0, 0, False, backend="reference")
    assert_close(got, expected.double())


# Levels, images


@pytest.mark.parametrize("convention", ["torchvision", "detectron2"])
def test_levels_follow_the_formula(convention: str) -> None:
    scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    boxes = random_boxes(2000, height=1e3, width=1e3, min_size=2).double()
    exact = torch.tensor([56.0, 112.0, 224.0, 448.0, 896.0], dtype=torch.float64)  # the boundaries themselves
    boxes = torch.cat([boxes, torch.stack([0 * exact, 0 * exact, exact, exact], 1), torch.zeros(1, 4)])
    size = torchvision.ops.box_area(boxes).sqrt() / 224
    level = torch.log2(size) + 1e-6 if convention == "torchvision" else torch.log2(size + 1e-8)
    expected = (4 + level).floor().clamp(2, 5).long() - 2
    thresholds = level_thresholds(scales, 224.0, 4, convention)
    assert_close(reference.box_levels(boxes, thresholds), expected)
    assert_close(pyramid_levels(boxes.view(-1, 2, 4), scales, level_convention=convention).flatten(), expected)
    assert expected.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_lists_name_their_image_exactly(device: torch.device, dtype: torch.dtype) -> None:
    """bfloat16 has no 257."""
    feature = torch.arange(260.0, device=device)[:, None, None, None].expand(-1, 1, 4, 4)
    boxes = [torch.tensor([[1.0, 1.0, 3.0, 3.0]], device=device, dtype=dtype)] * 260
    assert_close(roi_align(feature, boxes, 1).flatten(), torch.arange(260.0, device=device))


@EACH_BACKEND
def test_a_huge_box(backend: str, device: torch.device) -> None:
    """Thousands of samples a bin, whose float32 coordinates are rounded to 1/500 of a cell."""
    kind, boxes = KINDS["bilinear"], torch.tensor([[[-3e4, -2e4, 5e4, 3e4]]], device=device)
    features = [x.detach() for x in kind.maps(device, images=1)]
    for grid in (FIXED, ADAPTIVE):
        out = kind.pool(features, boxes, 2, backend=backend, grid=grid)
        expected = kind.pool([x.double() for x in features], boxes, 2, backend="reference", grid=grid)
        assert (out - expected).abs().max() < 0.02


# Memory


def assert_one_ulp(got: Tensor, exact: Tensor) -> None:
    """Each value within a unit in its last place, plus 1e-6, of `exact` (float64)."""
    unit = torch.finfo(got.dtype).eps * 2.0 ** (torch.frexp(exact).exponent - 1)
    excess = (got.double() - exact).abs() - unit - 1e-6
    assert excess.max() <= 0, f"{int((excess > 0).sum())} of {excess.numel()} err more; by {excess.max():.2e} at most"


@EACH_BACKEND
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("interpolation", "sampling_ratio"),
    [("bilinear", 0), ("bilinear", 2), ("bicubic", 2), pytest.param("bicubic", 0, marks=SLOW)],
)
def test_half_precision_errs_by_one_unit_at_most(
    backend: str, device: torch.device, dtype: torch.dtype, interpolation: str, sampling_ratio: int
) -> None:
    """Forward and gradient, boxes of up to 1,000 pixels: their coordinates and sums are float32 throughout."""
    feature = torch.randn(1, 2, 32, 32).to(device, dtype).requires_grad_()  # drawn on the CPU: the same everywhere
    boxes = torch.tensor([[[7.3, 11.9, 1009.4, 1013.8], [-31.0, 401.7, 990.2, 1100.6]]], device=device)
    options: dict[str, Any] = {"aligned": True, "sampling_ratio": sampling_ratio, "interpolation": interpolation}
    exact_feature = feature.detach().double().requires_grad_()
    out = roi_align(feature, boxes, 7, 1 / 32, **options, backend=backend)
    exact = roi_align(exact_feature, boxes, 7, 1 / 32, **options, backend="reference")
    assert_one_ulp(out, exact)
    upstream = torch.randn(out.shape).to(out)
    (gradient,) = torch.autograd.grad(out, feature, upstream)
    (expected,) = torch.autograd.grad(exact, exact_feature, upstream.double())
    assert_one_ulp(gradient, expected)


@EACH_BACKEND
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_small_weights_keep_their_bits(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """One of 300 x 300 samples weighs 1.1e-5, of which a float16 holds 8 bits."""
    feature = torch.zeros(1, 1, 16, 16, device=device, dtype=dtype, requires_grad=True)
    box = torch.tensor([[[-284.0, -284.0, 16.0, 16.0]]], device=device)
    out = roi_align(feature, box, 1, 1.0, sampling_ratio=0, aligned=True, backend=backend)
    (gradient,) = torch.autograd.grad(out, feature, torch.full_like(out, 100.0))
    assert_one_ulp(gradient[..., 1:, 1:], torch.full((1, 1, 15, 15), 100 / 300**2, device=device).double())


@pytest.mark.parametrize("levels", [4, 1], ids=["pyramid", "one map"])
def test_the_backward_needs_a_bit_a_box_and_tile(levels: int) -> None:
    """512 boxes in each of two 800 x 1344 images, launches left out: beyond the gradients just the mask of the boxes.

    The mask has 4 bytes for 32 boxes of each tile.
    """
    heights, widths = ([full >> i for i in range(levels)] for full in (200, 336))
    thresholds = [112.0**2 * 4**i for i in range(levels - 1)]
    out_grad = torch.empty(1024, 256, 7, 7, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    boxes = torch.zeros(2, 512, 4)
    geometry = ([0.25 / 2**i for i in range(levels)], thresholds, 2, True, None)
    launch = mock.patch.object(type(kernels_backward._gather_kernel), "run", autospec=True)
    with launch as launches, allocated(out_grad, boxes) as sizes:
        gradients = kernels_backward.multiscale_roi_align_backward.body(
            out_grad, boxes, None, 2, heights, widths, True, *geometry
        )
    assert launches.call_count == 2
    tiles = sum(-(-h // 4) * -(-w // 16) for h, w in zip(heights, widths, strict=True))
    assert sum(sizes) - sum(g.nbytes for g in gradients) == 4 * 2 * (512 // 32) * tiles
    assert tiles < 1427, "the README says 183 kB"


# The largest sample

MAX: dict[str, Any] = {"reduction": "max"}


def few_values(feature: Tensor) -> Tensor:
    """The same of whole numbers, so that equal samples are everywhere, most of them 0 as behind a ReLU."""
    return (feature.detach() * 2).round().clamp(min=-1, max=1).requires_grad_()


def whole_boxes(device: torch.device) -> Tensor:
    """[6, 4] in cells, for 2 x 2 bins: what follows from them is exact in float32, so equal samples stay equal."""
    rows = [
        [-6.0, -4.0, 10.0, 8.0],  # beyond all borders: the samples outside come first in some bins, last in others
        [-2.0, 1.0, 6.0, 3.0],
        [2.0, 3.0, 6.0, 7.0],
        [0.5, 0.25, 4.5, 4.25],
        [3.25, 1.5, 5.25, 3.5],
        [4.0, 3.0, 12.0, 11.0],
    ]
    return torch.tensor(rows, device=device)


def check_first_of_equals(device: torch.device = CPU, grid: Grid = ADAPTIVE) -> None:
    """The reference against the loops, where nothing is rounded; the mutants' check holds the kernels to it."""
    feature = few_values(torch.randn(1, 2, 5, 7, device=device))
    boxes = whole_boxes(device)
    out = roi_align(feature, boxes[None], 2, 1.0, *grid, **MAX, backend="reference")
    plain = feature.detach().cpu().requires_grad_()
    loops = [brute_force(plain[0], box, (2, 2), grid, cubic=None, largest=True) for box in boxes.tolist()]
    expected = torch.stack(loops)
    assert torch.equal(out.detach().cpu(), expected.detach())
    weights = torch.arange(1.0, 1 + out.numel()).view_as(expected)  # another number for each bin
    (got,) = torch.autograd.grad(out, feature, weights.to(device))
    assert_close(got.cpu(), torch.autograd.grad(expected, plain, weights)[0].double())


@pytest.mark.parametrize("grid", [FIXED, ADAPTIVE], ids=["fixed", "adaptive"])
def test_the_first_of_equals_takes_the_gradient(device: torch.device, grid: Grid) -> None:
    check_first_of_equals(device, grid)


def test_samples_of_a_constant_are_equal(backend: str, device: torch.device) -> None:
    """At any coordinates, and for a number that binary has not: the first sample has the whole gradient."""
    feature = torch.full((1, 1, 6, 6), 0.3, device=device, requires_grad=True)
    boxes = torch.tensor([[[0.71, 0.33, 5.17, 4.9]]], device=device)
    out = roi_align(feature, boxes, 1, 1.0, 3, True, **MAX, backend=backend)
    assert out.item() == feature[0, 0, 0, 0].item()
    (gradient,) = torch.autograd.grad(out.sum(), feature)
    # The first sample lies a sixth of the box from its corner: y 0.5917, x 0.9533.
    expected = torch.tensor([[0.0191, 0.3893], [0.0276, 0.5641]], device=device)
    assert (gradient[0, 0, :2, :2] - expected).abs().max() < 1e-4
    assert not gradient[0, 0, 2:].any()


def test_a_zero_size_box_on_the_border_takes_no_gradient(device: torch.device) -> None:
    feature = torch.randn(1, 2, 4, 4, device=device, requires_grad=True)
    box = torch.tensor([[0, 1.0, -0.5, 3.0, -0.5]], device=device)  # its samples are at y = -1
    out = roi_align(feature, box, 2, 1.0, -1, True, **MAX, backend="triton")
    assert not torch.autograd.grad(out.sum(), feature)[0].any()


def test_nan_wins(backend: str, device: torch.device) -> None:
    """As in torch.max, and the first of them; only in the bins that have a sample beside it."""
    feature = torch.zeros(1, 1, 4, 8, device=device)
    feature[0, 0, 1, 1], feature[0, 0, 0, 7], feature[0, 0, 2, 1] = math.nan, 5.0, math.nan
    feature.requires_grad_()
    boxes = torch.tensor([[[0.5, 0.5, 8.5, 4.5]]], device=device)
    out = roi_align(feature, boxes, (1, 2), 1.0, 4, True, **MAX, backend=backend)
    assert out.isnan().flatten().tolist() == [True, False]
    (gradient,) = torch.autograd.grad(out[..., 0].sum(), feature)
    # The first is the sample at (0.5, 0.5).
    assert gradient[0, 0, :2, :2].tolist() == [[0.25, 0.25], [0.25, 0.25]]
    assert gradient.sum().item() == 1


def check_huge_boxes_of_max(run: Callable[..., Tensor], device: torch.device) -> None:
    """As many samples as float32 counts and more: those outside are 0, all but a few are never looked at."""
    feature = torch.full((1, 1, 4, 4), -1.0, device=device)
    rows = [[-1e9, -1e9, 2e9, 2e9], [-3e4, 1.0, 5e4, 2.0], [-3e28, 0.0, 2e10, 3e28], [1e30, 1e30, 2e30, 2e30]]
    for scale in (1.0, 1e10):  # the second overflows
        assert not run([feature], torch.tensor([rows], device=device), scale=scale).any()


def test_huge_boxes_of_max(backend: str, device: torch.device) -> None:
    def run(features: list[Tensor], boxes: Tensor, scale: float) -> Tensor:
        return KINDS["max"].pool(features, boxes, 1, backend=backend, grid=ADAPTIVE, scale=scale)

    check_huge_boxes_of_max(run, device)


@pytest.mark.parametrize(
    ("ratio", "dtype"),
    [(2, torch.int8), pytest.param(11, torch.int8, marks=SLOW), (12, torch.int32), (0, torch.int32)],
    ids=str,
)
def test_the_index_is_kept_only_for_a_gradient(device: torch.device, ratio: int, dtype: torch.dtype) -> None:
    """A byte where the numbers of all samples fit; the last sample has the largest."""
    feature = torch.arange(9.0, device=device).view(1, 1, 3, 3)
    boxes, geometry = torch.tensor([[[0.5, 0.5, 2.5, 2.5]]], device=device), ([1.0], [], ratio, True, None)
    _, index = kernels_max.multiscale_roi_align_max([feature], boxes[:, :0], None, 2, 2, *geometry, False)
    _, sample = kernels_max.multiscale_roi_align_max([feature], boxes, None, 1, 1, *geometry, True)
    assert not index.numel()
    assert sample.dtype == dtype
    assert sample.item() == (ratio**2 - 1 if ratio else 65536 + 1)  # of 2 x 2 samples


# The gradient to the boxes; its kinks are in test_ties.py


BOXES = KINDS["boxes"]


def test_boxes_that_are_not_finite_take_no_gradient_of_nan(device: torch.device) -> None:
    boxes = odd_boxes(device)[None, -3:].requires_grad_()
    out = BOXES.pool(BOXES.maps(device, images=1), boxes, 1, backend="triton")
    assert not torch.autograd.grad(out, boxes, torch.full_like(out, math.nan))[0].any()


def test_features_are_kept_only_for_the_boxes(device: torch.device) -> None:
    features, boxes = BOXES.maps(device), BOXES.boxes(device, 1)
    for needed in (False, True):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # noqa: B023
            BOXES.pool(features, boxes.detach().requires_grad_(needed), 2, backend="triton")
        assert [x.shape for x in kept if x.dim() == 4] == [f.shape for f in features if needed]


@pytest.mark.parametrize("needed", ["features", "boxes"])
def test_only_what_is_needed_is_computed(needed: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("not needed")

    if needed == "boxes":
        monkeypatch.setattr(kernels_backward, "multiscale_roi_align_backward", refuse)
    else:
        monkeypatch.setattr(kernels_forward, "multiscale_roi_align_backward_boxes", refuse)
    feature = torch.randn(1, 2, 5, 5, device=device, requires_grad=needed == "features")
    boxes = torch.tensor([[[1.2, 1.3, 3.4, 4.2]]], device=device, requires_grad=needed == "boxes")
    out = roi_align(feature, boxes, 1, backend="triton")
    assert torch.autograd.grad(out.sum(), boxes if needed == "boxes" else feature)[0].any()
