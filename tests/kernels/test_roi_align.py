"""roi_align and multiscale_roi_align: hand-made answers, torchvision, the fp64 reference, gradients, edges, mutants."""

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.mutation import mutant
from tmask_kernels import multiscale_roi_align, pyramid_levels, roi_align
from tmask_kernels.common.kernels import boxes as boxes_kernels
from tmask_kernels.common.kernels import numbers, roi_axis
from tmask_kernels.common.kernels import pyramid as pyramid_kernels
from tmask_kernels.common.pyramid import LEVEL_FACTOR, level_thresholds
from tmask_kernels.ops.roi_align import reference
from tmask_kernels.ops.roi_align.kernels import backward as kernels_backward
from tmask_kernels.ops.roi_align.kernels import forward as kernels
from tmask_kernels.ops.roi_align.kernels import touch as kernels_touch
from tmask_kernels.testing import assert_close, guarded, poisoned_empty, random_boxes

BACKENDS = ("reference", "torchvision", "triton")
SCALES = [1 / 4, 1 / 8, 1 / 16]
SIDE = 150.0  # pixels; its levels are 37 x 41, 18 x 20 and 9 x 10 cells

# (sampling_ratio, aligned): the two published conventions, then the other two, which interpreted kernels leave to the
# slow tests.
ALL_GRIDS = {"fixed": (2, False), "adaptive-aligned": (0, True), "fixed3-aligned": (3, True), "adaptive": (-1, False)}
EACH_GRID = [pytest.param(*grid, id=name) for name, grid in ALL_GRIDS.items()]
GRIDS = EACH_GRID[:2] + [
    pytest.param(*grid, id=name, marks=pytest.mark.slow) for name, grid in list(ALL_GRIDS.items())[2:]
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    if request.param == "torchvision" and device.type != "cpu":
        pytest.skip("the torchvision backend serves the CPU only")
    return str(request.param)


def pyramid(
    device: torch.device, *, C: int = 21, dtype: torch.dtype = torch.float32, channels_last: bool = False
) -> list[Tensor]:
    """Three levels [2, C, H, W] with odd sizes, between guard bands of NaN."""
    levels = [torch.randn(2, C, 37 >> i, 41 >> i).to(device, dtype) for i in range(3)]
    if channels_last:
        levels = [x.contiguous(memory_format=torch.channels_last) for x in levels]
    return [guarded(x).requires_grad_() for x in levels]


def odd_boxes(device: torch.device) -> Tensor:
    """[13, 4]: one on each level, one with samples in the border's last half cell, then the degenerate ones."""
    inf, nan = math.inf, math.nan
    rows = [
        [10.3, 12.1, 30.2, 41.7],
        [20.6, 5.2, 90.9, 100.4],
        [1.5, 2.5, 140.25, 149.5],
        [60.0, 60.0, 165.0, 165.0],
        [50.0, 60.0, 50.0, 60.0],  # zero size
        [80.2, 90.1, 40.3, 30.4],  # inverted on both axes
        [80.2, 30.1, 40.3, 90.4],  # inverted on one
        [-900.0, -900.0, -700.0, -800.0],  # wholly outside
        [-31.3, -22.2, 200.7, 190.1],  # larger than the image
        [-3e4, -2e4, 5e4, 3e4],  # an adaptive grid of thousands of samples a bin
        [nan, 10.0, 20.0, 30.0],
        [10.0, 10.0, inf, 30.0],
        [-inf, 10.0, 20.0, nan],
    ]
    return torch.tensor(rows, device=device)


def truth(features: list[Tensor], *args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
    """The reference in float64, and its inputs to read gradients from."""
    exact = [x.detach().double().requires_grad_() for x in features]
    return multiscale_roi_align(exact, *args, **kwargs, backend="reference"), exact


# Hand-made answers


def test_ramp_gives_bin_centres(backend: str, device: torch.device) -> None:
    """On f(y, x) = 10 y + x a mean of bilinear samples is f at the bin's centre: no misalignment is left."""
    y, x = torch.meshgrid(torch.arange(20.0, device=device), torch.arange(30.0, device=device), indexing="ij")
    ramp = (10 * y + x)[None, None]
    box = torch.tensor([[0, 8.0, 4.0, 48.0, 28.0]], device=device)
    out = roi_align(ramp, box, (2, 4), 0.5, 2, True, backend=backend)
    # In cells: x from 4 - 0.5 in steps of 5, y from 2 - 0.5 in steps of 6.
    centres_y, centres_x = torch.tensor([4.5, 10.5]), torch.tensor([6.0, 11.0, 16.0, 21.0])
    assert_close(out[0, 0], (10 * centres_y[:, None] + centres_x).to(device))


def test_one_sample_between_four_cells(backend: str, device: torch.device) -> None:
    cells = torch.tensor([[1.0, 2.0], [3.0, 5.0]], device=device)[None, None]
    # One bin, one sample, at y = 0.25, x = 0.5: 0.75 * (1 + 2) / 2 + 0.25 * (3 + 5) / 2 = 2.125.
    box = torch.tensor([[0, 0.0, 0.0, 1.0, 0.5]], device=device)
    assert_close(roi_align(cells, box, 1, 1.0, 1, True, backend=backend).flatten(), torch.zeros(1, device=device) + 1.0)
    shifted = box + torch.tensor([0, 0.5, 0.5, 0.5, 0.5], device=device)
    out = roi_align(cells, shifted, 1, 1.0, 1, True, backend=backend)
    assert_close(out.flatten(), torch.tensor([2.125], device=device))


@pytest.mark.parametrize(
    ("at", "expected"), [(-1.0, 1.0), (-1.01, 0.0), (4.0, 4.0), (4.01, 0.0), (3.5, 4.0), (-0.5, 1.0)]
)
def test_in_and_out_of_the_map(backend: str, device: torch.device, at: float, expected: float) -> None:
    """Exactly -1 and exactly H are inside and take the border's value; beyond is 0."""
    column = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device)[None, None, :, None].expand(1, 1, 4, 4)
    point = torch.tensor([[0, 1.0, at, 1.0, at]], device=device) + torch.tensor([0, 0.5, 0.5, 0.5, 0.5], device=device)
    out = roi_align(column, point, 1, 1.0, 1, True, backend=backend)
    assert out.item() == expected


def test_zero_size_and_inverted_boxes(backend: str, device: torch.device) -> None:
    ramp = torch.arange(40.0, device=device).expand(1, 1, 40, 40)
    boxes = torch.tensor([[[10.5, 10.5, 10.5, 10.5], [20.5, 10.5, 12.5, 18.5]]], device=device)
    fixed = roi_align(ramp, boxes, 2, 1.0, 2, True, backend=backend)
    assert_close(fixed[0, 0], torch.full((2, 2), 10.0, device=device))  # the point's value
    assert_close(fixed[1, 0], torch.tensor([[18.0, 14.0]] * 2, device=device))  # the crop, mirrored
    adaptive = roi_align(ramp, boxes, 2, 1.0, 0, True, backend=backend)
    assert not adaptive.any()


def brute_force(
    feature: Tensor, box: list[float], size: tuple[int, int], scale: float, ratio: int, aligned: bool
) -> Tensor:
    """One box on [C, H, W] by loops, straight from the definition."""
    C, H, W = feature.shape
    shift = 0.5 if aligned else 0.0
    x1, y1, x2, y2 = (c * scale - shift for c in box)
    h, w = y2 - y1, x2 - x1
    if not aligned:
        h, w = max(h, 1.0), max(w, 1.0)
    gh = ratio if ratio > 0 else math.ceil(h / size[0])
    gw = ratio if ratio > 0 else math.ceil(w / size[1])
    out = torch.zeros(C, *size, dtype=feature.dtype)
    for ph in range(size[0]):
        for pw in range(size[1]):
            for iy in range(gh):
                for ix in range(gw):
                    y = y1 + (ph + (iy + 0.5) / gh) * h / size[0]
                    x = x1 + (pw + (ix + 0.5) / gw) * w / size[1]
                    if y < -1 or y > H or x < -1 or x > W:
                        continue
                    y, x = min(max(y, 0.0), H - 1.0), min(max(x, 0.0), W - 1.0)
                    t, l = int(y), int(x)  # noqa: E741
                    b, r, fy, fx = min(t + 1, H - 1), min(l + 1, W - 1), y - int(y), x - int(x)
                    top = (1 - fx) * feature[:, t, l] + fx * feature[:, t, r]
                    bottom = (1 - fx) * feature[:, b, l] + fx * feature[:, b, r]
                    out[:, ph, pw] += (1 - fy) * top + fy * bottom
    return out / max(gh * gw, 1)


@pytest.mark.parametrize(("sampling_ratio", "aligned"), EACH_GRID)
@pytest.mark.parametrize(
    "box",
    [[1.3, 2.1, 9.4, 11.9], [-9.3, -7.1, 40.2, 33.3], [3.2, 3.1, 3.9, 3.7], [-300.5, 2.0, 251.0, 14.0]],
    ids=["inside", "over", "small", "wide"],
)
def test_reference_follows_the_definition(box: list[float], sampling_ratio: int, aligned: bool) -> None:
    feature = torch.randn(3, 11, 13, dtype=torch.float64)
    boxes = torch.tensor([[0.0, *box]], dtype=torch.float64)
    out = roi_align(feature[None], boxes, (3, 2), 0.5, sampling_ratio, aligned, backend="reference")
    assert_close(out[0], brute_force(feature, box, (3, 2), 0.5, sampling_ratio, aligned))


# Against torchvision, and against the reference in float64


@pytest.mark.parametrize(("sampling_ratio", "aligned"), EACH_GRID)
@pytest.mark.parametrize("size", [(7, 7), (3, 5), (1, 1)], ids=str)
def test_reference_equals_torchvision(sampling_ratio: int, aligned: bool, size: tuple[int, int]) -> None:
    feature = torch.randn(2, 5, 37, 41, dtype=torch.float64, requires_grad=True)
    boxes = random_boxes(60, height=SIDE, width=SIDE, min_size=0.5).double()
    boxes += torch.randn(60, 1) * 30  # many hang over the border
    rois = torch.cat([torch.arange(60.0)[:, None] % 2, boxes], 1)
    expected = torchvision.ops.roi_align(feature, rois, size, 0.25, sampling_ratio, aligned)
    out = roi_align(feature, rois, size, 0.25, sampling_ratio, aligned, backend="reference")
    assert_close(out, expected)
    weights = torch.randn_like(out)
    (gradient,) = torch.autograd.grad((out * weights).sum(), feature)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), feature)
    assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("sampling_ratio", "aligned"), GRIDS)
def test_backends_equal_the_truth(
    backend: str, device: torch.device, channels_last: bool, sampling_ratio: int, aligned: bool
) -> None:
    features = pyramid(device, channels_last=channels_last)
    boxes = random_boxes(12, height=SIDE, width=SIDE, min_size=4, device=device).view(2, 6, 4)
    options: dict[str, Any] = {"sampling_ratio": sampling_ratio, "aligned": aligned, "canonical_scale": 100}
    check_forward_and_backward(
        lambda f: multiscale_roi_align(f, boxes, (2, 5), SCALES, **options, backend=backend),
        features,
        *truth(features, boxes, (2, 5), SCALES, **options),
    )


def test_a_single_map_equals_the_truth_both_ways(backend: str, device: torch.device) -> None:
    features = pyramid(device)[:1]
    boxes = random_boxes(12, height=SIDE, width=SIDE, min_size=4, device=device).view(2, 6, 4)
    check_forward_and_backward(
        lambda f: multiscale_roi_align(f, boxes, 3, SCALES[:1], backend=backend),
        features,
        *truth(features, boxes, 3, SCALES[:1]),
    )


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float16, marks=pytest.mark.slow),
        torch.bfloat16,
        pytest.param(torch.float64, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_dtypes(backend: str, device: torch.device, dtype: torch.dtype, channels_last: bool) -> None:
    if dtype == torch.float64 and device.type == "cuda" and backend == "triton":
        pytest.skip("float64 runs in the interpreter only")
    features = pyramid(device, dtype=dtype, channels_last=channels_last)
    boxes = random_boxes(12, height=SIDE, width=SIDE, min_size=4, device=device).view(2, 6, 4)
    check_forward_and_backward(
        lambda f: multiscale_roi_align(f, boxes, 3, SCALES, backend=backend),
        features,
        *truth(features, boxes, 3, SCALES),
    )


def check_forward_and_backward(
    run: Callable[[list[Tensor]], Tensor], features: list[Tensor], expected: Tensor, exact: list[Tensor]
) -> None:
    with poisoned_empty():
        out = run(features)
    assert_close(out, expected)
    weights = torch.randn_like(out)
    with poisoned_empty():
        gradients = torch.autograd.grad(out, features, weights)
    for i, (got, want) in enumerate(
        zip(gradients, torch.autograd.grad(expected, exact, weights.double()), strict=True)
    ):
        assert got.dtype == features[i].dtype
        assert_close(got, want, name=f"gradient of level {i}")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN boxes in the interpreter
@pytest.mark.parametrize(("sampling_ratio", "aligned"), GRIDS)
def test_odd_boxes(backend: str, device: torch.device, sampling_ratio: int, aligned: bool) -> None:
    features = pyramid(device, C=4)
    boxes = odd_boxes(device)
    boxes = boxes.expand(2, -1, -1)
    options: dict[str, Any] = {"sampling_ratio": sampling_ratio, "aligned": aligned, "canonical_scale": 100}
    expected, exact = truth(features, boxes, 2, SCALES, **options)
    # fp32 coordinates of the huge box are rounded to 1/500 of a cell.
    huge = (boxes[..., 2] > 1e4).flatten()
    out = multiscale_roi_align(features, boxes, 2, SCALES, **options, backend=backend)
    assert_close(out[~huge], expected[~huge])
    assert (out[huge] - expected[huge]).abs().max() < 0.02
    assert not out[~torch.isfinite(boxes).all(-1).flatten()].any()
    gradients = torch.autograd.grad(out[~huge].sum(), features)
    for got, want in zip(gradients, torch.autograd.grad(expected[~huge].sum(), exact), strict=True):
        assert_close(got, want)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflows in the interpreter
@pytest.mark.parametrize(("sampling_ratio", "aligned"), EACH_GRID)
def test_boxes_that_overflow_once_scaled_give_zeros(
    backend: str, device: torch.device, sampling_ratio: int, aligned: bool
) -> None:
    feature = torch.ones(1, 3, 8, 8, device=device, requires_grad=True)
    rows = [[1e30, 1e30, 2e30, 2e30], [-1e30, 0.0, 1e30, 2e-10], [0.0, -3e28, 2e-10, 3e28], [0.0, 0.0, 4e-10, 4e-10]]
    boxes = torch.tensor([rows], device=device)
    out = roi_align(feature, boxes, 2, 1e10, sampling_ratio, aligned, backend=backend)
    assert_close(out, torch.tensor([0.0, 0, 0, 1], device=device)[:, None, None, None].expand(4, 3, 2, 2))
    (gradient,) = torch.autograd.grad(out.sum(), feature)
    assert_close(gradient.sum(), torch.tensor(12.0, device=device))


def test_nan_features_stay_in_their_image_and_level(backend: str, device: torch.device) -> None:
    features = [x.detach() for x in pyramid(device, C=3)]
    boxes = odd_boxes(device)[:3].expand(2, -1, -1)
    clean = multiscale_roi_align(features, boxes, 2, SCALES, canonical_scale=100, backend=backend).view(2, 3, -1)
    features[0][1, :, 5, 5] = math.nan
    out = multiscale_roi_align(features, boxes, 2, SCALES, canonical_scale=100, backend=backend).view(2, 3, -1)
    assert torch.equal(out[0], clean[0])
    assert torch.equal(out[1, 1:], clean[1, 1:])
    assert out[1, 0].isnan().any()


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


# Levels


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


def test_conventions_differ_just_under_a_boundary() -> None:
    box = torch.tensor([0.0, 0.0, 224.0, 224.0 * (1 - 1e-6)], dtype=torch.float64)
    levels = {c: int(reference.box_levels(box, level_thresholds([1 / 8, 1 / 16], 224.0, 4, c))) for c in LEVEL_FACTOR}
    assert levels == {"torchvision": 1, "detectron2": 0}


def test_multiscale_equals_torchvision(backend: str, device: torch.device) -> None:
    features = [x.detach() for x in pyramid(device, C=4)]
    boxes = random_boxes(24, height=SIDE, width=SIDE, min_size=8, device=device).view(2, 12, 4)
    pooler = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2"], 3, 2, canonical_scale=56)
    pooler.scales, pooler.map_levels = SCALES, torchvision.ops.poolers.initLevelMapper(2, 4, 56)
    expected = pooler({str(i): x for i, x in enumerate(features)}, list(boxes), [(150, 150)] * 2)
    out = multiscale_roi_align(
        features, boxes, 3, SCALES, aligned=False, canonical_scale=56, level_convention="torchvision", backend=backend
    )
    assert_close(out, expected)


# Forms of the arguments, empty inputs, layouts


def test_forms_of_boxes_agree(backend: str, device: torch.device) -> None:
    features = [x.detach() for x in pyramid(device, C=3)]
    boxes = random_boxes(10, height=SIDE, width=SIDE, min_size=4, device=device).view(2, 5, 4)
    padded = multiscale_roi_align(features, boxes, 2, SCALES, backend=backend)
    as_list = multiscale_roi_align(features, list(boxes), 2, SCALES, backend=backend)
    index = torch.tensor([1.0] * 5 + [0.0] * 5, device=device)[:, None]
    flat = multiscale_roi_align(
        features, torch.cat([index, boxes.flip(0).flatten(0, 1)], 1), 2, SCALES, backend=backend
    )
    assert_close(as_list, padded)
    assert_close(flat, padded.view(2, 5, 3, 2, 2).flip(0).flatten(0, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_lists_name_their_image_exactly(device: torch.device, dtype: torch.dtype) -> None:
    """bfloat16 has no 257."""
    feature = torch.arange(260.0, device=device)[:, None, None, None].expand(-1, 1, 4, 4)
    boxes = [torch.tensor([[1.0, 1.0, 3.0, 3.0]], device=device, dtype=dtype)] * 260
    assert_close(roi_align(feature, boxes, 1).flatten(), torch.arange(260.0, device=device))


def test_invalid_rows_are_zero_and_take_no_gradient(backend: str, device: torch.device) -> None:
    features = pyramid(device, C=3)
    boxes = random_boxes(12, height=SIDE, width=SIDE, min_size=4, device=device).view(2, 6, 4)
    valid = torch.tensor([[True] * 4 + [False] * 2, [False] * 6], device=device)
    boxes[~valid] = math.nan
    out = multiscale_roi_align(features, boxes, 2, SCALES, valid=valid, backend=backend)
    assert_close(out[:4], multiscale_roi_align(features, [boxes[0, :4], boxes[1, :0]], 2, SCALES, backend=backend))
    assert not out[4:].any()
    for gradient in torch.autograd.grad(out[4:].sum(), features):
        assert not gradient.any()


@pytest.mark.parametrize("shape", [(2, 0, 4), (0, 5)], ids=str)
def test_no_boxes_keep_the_graph(backend: str, device: torch.device, shape: tuple[int, ...]) -> None:
    features = pyramid(device, C=3)
    out = multiscale_roi_align(features, torch.zeros(shape, device=device), (4, 2), SCALES, backend=backend)
    assert out.shape == (0, 3, 4, 2)
    for gradient, feature in zip(torch.autograd.grad(out.sum(), features), features, strict=True):
        assert gradient.shape == feature.shape
        assert not gradient.any()


def test_no_images(backend: str, device: torch.device) -> None:
    out = roi_align(torch.zeros(0, 3, 8, 8, device=device), torch.zeros(0, 5, device=device), 2, backend=backend)
    assert out.shape == (0, 3, 2, 2)


@pytest.mark.parametrize("empty", [(0, 8), (8, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_maps_without_cells_give_zeros(
    backend: str, device: torch.device, empty: tuple[int, int], sampling_ratio: int
) -> None:
    """Alone and below a level that has cells, whose boxes are pooled as ever."""
    boxes = torch.tensor([[[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 30.0, 30.0]]], device=device)
    none = torch.zeros(1, 3, *empty, device=device, requires_grad=True)
    out = roi_align(none, boxes, 2, sampling_ratio=sampling_ratio, backend=backend)
    assert out.tolist() == torch.zeros(2, 3, 2, 2).tolist()
    assert torch.autograd.grad(out.sum(), none)[0].shape == none.shape
    maps = [torch.ones(1, 3, 8, 8, device=device), none]
    options: dict[str, Any] = {"canonical_scale": 16, "canonical_level": 3, "sampling_ratio": sampling_ratio}
    out = multiscale_roi_align(maps, boxes, 2, SCALES[:2], **options, backend=backend)
    assert out.flatten(1).sum(1).tolist() == [12, 0]


def test_strided_features(backend: str, device: torch.device) -> None:
    """A view with odd strides is read where it lies."""
    feature = torch.randn(2, 40, 30, 8, device=device)[:, ::2, 3:, ::2].permute(0, 3, 1, 2)  # [2, 4, 20, 27]
    boxes = random_boxes(6, height=40, width=50, min_size=4, device=device).view(2, 3, 4)
    out = roi_align(feature, boxes, 3, 0.5, 2, True, backend=backend)
    assert_close(out, roi_align(feature.double(), boxes, 3, 0.5, 2, True, backend="reference"))


def test_more_channels_than_a_block(device: torch.device) -> None:
    assert kernels.pick_tile(300, 7, True).block_c < 300
    feature = torch.randn(1, 300, 9, 9, device=device).contiguous(memory_format=torch.channels_last)
    boxes = random_boxes(3, height=18, width=18, min_size=2, device=device)[None]
    out = roi_align(feature, boxes, 7, 0.5, 2, backend="triton")
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_close(out, roi_align(feature.double(), boxes, 7, 0.5, 2, backend="reference"))


def test_autocast_keeps_fp32(backend: str, device: torch.device) -> None:
    features = [x.detach() for x in pyramid(device, C=3)]
    boxes = random_boxes(6, height=SIDE, width=SIDE, min_size=4, device=device).view(2, 3, 4)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = multiscale_roi_align(features, boxes, 2, SCALES, backend=backend)
    assert_close(out, truth(features, boxes, 2, SCALES)[0])


# Gradients of the reference


@pytest.mark.parametrize(("sampling_ratio", "aligned"), EACH_GRID)
def test_reference_gradcheck(sampling_ratio: int, aligned: bool) -> None:
    features = [torch.randn(1, 2, 12 >> i, 10 >> i, dtype=torch.float64, requires_grad=True) for i in range(2)]
    boxes = torch.tensor([[[3.3, 4.1, 21.7, 17.2], [-5.2, 8.4, 15.9, 50.3]]], dtype=torch.float64, requires_grad=True)

    def run(boxes: Tensor, *features: Tensor) -> Tensor:
        return multiscale_roi_align(
            features, boxes, (2, 3), [0.5, 0.25], sampling_ratio=sampling_ratio, aligned=aligned,
            canonical_scale=100, backend="reference",
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, (boxes, *features))


def test_invalid_boxes_take_no_gradient() -> None:
    feature = torch.randn(1, 2, 9, 9)
    boxes = torch.tensor([[[1.0, 1, 7, 6], [math.nan, 1, 7, 6], [2, 2, 5, 5]]], requires_grad=True)
    valid = torch.tensor([[True, True, False]])
    roi_align(feature, boxes, 2, valid=valid).sum().backward()
    assert boxes.grad is not None
    assert boxes.grad[0, 0].any()
    assert not boxes.grad[0, 1:].any()


# The choice of a backend


def test_unknown_images_give_zeros_where_they_cannot_be_seen(device: torch.device) -> None:
    feature = torch.ones(2, 3, 8, 8, device=device)
    boxes = torch.tensor([[-1.0, 1, 1, 5, 5], [1, 1, 1, 5, 5], [2, 1, 1, 5, 5], [math.nan, 1, 1, 5, 5]], device=device)
    expected = torch.tensor([0.0, 1, 0, 0], device=device)[:, None, None, None].expand(4, 3, 2, 2)
    compiled = torch.compile(roi_align, fullgraph=True, backend="aot_eager")
    assert_close(compiled(feature, boxes, 2, backend="reference"), expected)
    assert_close(kernels.multiscale_roi_align([feature], boxes, None, 2, 2, [1.0], [], 2, False, None), expected)


def test_reasons(device: torch.device) -> None:
    feature = torch.zeros(1, 3, 8, 8, device=device)
    boxes = torch.zeros(1, 2, 4, device=device, requires_grad=True)
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"torchvision.*no gradient to the boxes"):
            roi_align(feature, boxes, 2, backend="torchvision")
        fake = torch.zeros(1, 3, 8, 8, device="meta")
        assert roi_align(fake, boxes.detach().to("meta"), 2, backend="reference").shape == (2, 3, 2, 2)


def test_gradient_is_deterministic(device: torch.device) -> None:
    """The same bits twice, and no refusal in deterministic mode; more boxes than one word of the mask holds."""
    boxes = torch.cat(
        [odd_boxes(device), random_boxes(20, height=SIDE, width=SIDE, min_size=4, max_size=30, device=device)]
    )[None]
    features = [x.detach()[:1].requires_grad_() for x in pyramid(device, C=3)]
    torch.use_deterministic_algorithms(True)
    try:
        out = multiscale_roi_align(features, boxes, 2, SCALES, canonical_scale=100, backend="triton")
        weights = torch.randn_like(out)
        first, second = (torch.autograd.grad(out, features, weights, retain_graph=True) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    _, exact = expected = truth(features, boxes, 2, SCALES, canonical_scale=100)
    for got, want in zip(first, torch.autograd.grad(expected[0], exact, weights.double()), strict=True):
        assert_close(got, want)


# Tracing


@pytest.mark.parametrize("chosen", ["reference", "triton", "auto"])
def test_compiles_whole(device: torch.device, chosen: str) -> None:
    features = pyramid(device, C=3)
    boxes = random_boxes(6, height=SIDE, width=SIDE, min_size=4, device=device).view(2, 3, 4)
    valid = torch.tensor([[True, True, False]] * 2, device=device)

    def run(features: list[Tensor], boxes: Tensor, valid: Tensor) -> Tensor:
        return multiscale_roi_align(features, boxes, 2, SCALES, valid=valid, backend=chosen)

    out = torch.compile(run, fullgraph=True, backend="aot_eager")(features, boxes, valid)
    expected = run(features, boxes, valid)
    assert_close(out, expected)
    weights = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad(out, features, weights), torch.autograd.grad(expected, features, weights), strict=True
    ):
        assert_close(got, want)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("cubic", [None, -0.5], ids=["bilinear", "bicubic"])
def test_opcheck(device: torch.device, channels_last: bool, cubic: float | None) -> None:
    features = [
        torch.randn(1, 3, 8 >> i, 6 >> i, device=device)
        .contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        .requires_grad_()
        for i in range(2)
    ]
    boxes = random_boxes(2, height=16, width=12, min_size=4, device=device)[None]
    valid = torch.tensor([[True, False]], device=device)
    torch.library.opcheck(
        kernels.multiscale_roi_align, (features, boxes, valid, 2, 3, [0.5, 0.25], [64.0], 2, True, cubic)
    )
    grad = torch.randn(2, 3, 2, 3, device=device)
    torch.library.opcheck(
        kernels_backward.multiscale_roi_align_backward,
        (grad, boxes, valid, 1, [8, 4], [6, 3], channels_last, [0.5, 0.25], [64.0], 2, True, cubic),
    )


# Mutants: each must turn the parity check red


def parity(kernels: ModuleType, device: torch.device) -> None:
    features = pyramid(device, C=5)
    boxes = odd_boxes(device)[:9].expand(2, -1, -1).contiguous()
    thresholds = level_thresholds(SCALES, 100.0, 4, "detectron2")
    expected, exact = truth(features, boxes, (2, 3), SCALES, sampling_ratio=2, canonical_scale=100)
    check_forward_and_backward(
        lambda f: kernels.multiscale_roi_align(f, boxes, None, 2, 3, SCALES, thresholds, 2, True, None),
        features,
        expected,
        exact,
    )


# The module to break.
FORWARD, BACKWARD, TOUCH, AXIS, BITS = kernels, kernels_backward, kernels_touch, roi_axis, numbers
MUTANTS = {
    "tap off by one": (AXIS, "tl.minimum(low + 1, length - 1)", "tl.minimum(low + 2, length - 1)"),
    "border not clamped": (AXIS, "high = tl.minimum(low + 1, length - 1)", "high = low + 1"),
    "border excluded": (AXIS, "(at >= -1.0) & (at <= length)", "(at >= 0.0) & (at <= length - 1)"),
    "wrong level": (pyramid_kernels, "(area >= thresholds[i - 1])", "(area >= 4 * thresholds[i - 1])"),
    "swapped sizes": (FORWARD, "H = tl.cast(of_level(level, heights,", "H = tl.cast(of_level(level, widths,"),
    "no half cell": (AXIS, "shift: tl.constexpr = 0.5 if ALIGNED else 0.0", "shift: tl.constexpr = 0.0"),
    "wrong image": (boxes_kernels, "image = k // boxes_an_image", "image = k * 0"),
    "non-finite read": (boxes_kernels, "usable = image < num_images", "usable = image < num_images - 1"),
    "gradient not shared": (BACKWARD, "(weights_y * share)", "(weights_y)"),
    "gradient to one tap alone": (AXIS, "1.0 - tl.abs(at - cells)", "1.0 * (tl.floor(at) == cells)"),
    "gradient without the border": (BACKWARD, "(at >= -1.0) & (at <= length)", "(at >= 0.0) & (at <= length)"),
    "last row of bins left out": (TOUCH, "+ 0.01) + 1.0", "+ 0.01)"),
    "tiles beside the box left out": (TOUCH, "tl.floor(high) + 1.0", "tl.floor(high) - 1.0"),
    "boxes of another level": (TOUCH, " & (tile_level[:, None] == level[None, :])", ""),
    "a box a word": (BITS, "bits ^ lowest", "bits * 0"),
}  # fmt: skip


def test_parity_is_green(device: torch.device) -> None:
    parity(kernels, device)


# One of each module; `make test-slow` breaks the rest.
FAST = {"wrong level", "swapped sizes", "gradient not shared", "tiles beside the box left out", "a box a word"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in MUTANTS]
)
def test_mutants_turn_parity_red(name: str, device: torch.device, tmp_path: Path) -> None:
    module, old, new = MUTANTS[name]
    broken = mutant(module, old, new, tmp_path, seen_from=kernels)
    with pytest.raises(AssertionError):
        parity(broken, device)
