"""Bicubic RoIAlign: the definition by loops, grid_sample, ramps, the fp64 reference both ways, gradients, mutants."""

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.test_roi_align import (
    AXIS,
    BACKWARD,
    FORWARD,
    GRIDS,
    SCALES,
    SIDE,
    TOUCH,
    check_forward_and_backward,
    odd_boxes,
    pyramid,
    truth,
)
from tests.mutation import mutant
from tmask_kernels import multiscale_roi_align, roi_align
from tmask_kernels.ops.roi_align import reference
from tmask_kernels.ops.roi_align.kernels import forward as kernels
from tmask_kernels.testing import assert_close, guarded, random_boxes

BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])
BICUBIC: dict[str, Any] = {"interpolation": "bicubic"}


def keys(x: float, a: float) -> float:
    """Keys (1981), equation 8, term by term."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def sample(feature: Tensor, y: float, x: float, a: float) -> Tensor:
    """Feature [C, H, W] at a point, straight from the definition: [C]."""
    _, H, W = feature.shape
    if y < -1 or y > H or x < -1 or x > W:
        return torch.zeros_like(feature[:, 0, 0])
    y, x = min(max(y, 0.0), H - 1.0), min(max(x, 0.0), W - 1.0)
    total = torch.zeros_like(feature[:, 0, 0])
    for row in range(math.floor(y) - 1, math.floor(y) + 3):
        for column in range(math.floor(x) - 1, math.floor(x) + 3):
            cell = feature[:, min(max(row, 0), H - 1), min(max(column, 0), W - 1)]
            total += keys(y - row, a) * keys(x - column, a) * cell
    return total


def brute_force(feature: Tensor, box: list[float], bins: int, ratio: int, aligned: bool, a: float) -> Tensor:
    """One box in cells on [C, H, W] by loops: [C, bins, bins]."""
    x1, y1, x2, y2 = (c - (0.5 if aligned else 0.0) for c in box)
    h, w = y2 - y1, x2 - x1
    if not aligned:
        h, w = max(h, 1.0), max(w, 1.0)
    gh, gw = (ratio, ratio) if ratio > 0 else (math.ceil(h / bins), math.ceil(w / bins))
    out = torch.zeros(len(feature), bins, bins, dtype=feature.dtype)
    for ph in range(bins):
        for pw in range(bins):
            for i in range(gh):
                for j in range(gw):
                    y = y1 + (ph + (i + 0.5) / gh) * h / bins
                    x = x1 + (pw + (j + 0.5) / gw) * w / bins
                    out[:, ph, pw] += sample(feature, y, x, a) / (gh * gw)
    return out


@pytest.mark.parametrize(("sampling_ratio", "aligned"), GRIDS)
@pytest.mark.parametrize(
    "box",
    [[1.3, 2.1, 5.4, 7.9], [-4.3, -3.1, 14.2, 12.3], [3.2, 3.1, 3.9, 3.7], [-30.5, 2.0, 25.0, 4.0]],
    ids=["inside", "over", "small", "wide"],
)
def test_reference_follows_the_definition(box: list[float], sampling_ratio: int, aligned: bool) -> None:
    feature = torch.randn(3, 7, 9, dtype=torch.float64)
    boxes = torch.tensor([[box]], dtype=torch.float64)
    out = roi_align(
        feature[None], boxes, 2, 1.0, sampling_ratio, aligned, **BICUBIC, cubic_coeff=-0.6, backend="reference"
    )
    assert_close(out[0], brute_force(feature, box, 2, sampling_ratio, aligned, -0.6))


@pytest.mark.parametrize("side", [1, 2, 3])
def test_maps_of_few_cells(side: int) -> None:
    """Every tap may be one of the border's."""
    feature = torch.randn(2, side, 3, dtype=torch.float64)
    box = [-0.4, -0.7, 2.6, side + 0.3]
    out = roi_align(
        feature[None], torch.tensor([[box]], dtype=torch.float64), 3, 1.0, 2, **BICUBIC, backend="reference"
    )
    assert_close(out[0], brute_force(feature, box, 3, 2, False, -0.5))


def check_taps_of_the_border() -> None:
    test_maps_of_few_cells(2)


def close_samples(bins: int, device: torch.device) -> Tensor:
    """Boxes [4, 4] in cells with bins a little over 5 cells long: of their 6 samples 5 lie within 2 cells of a cell."""
    corner = torch.arange(4.0, device=device)[:, None] * 0.25 + 0.3
    return torch.cat([corner, corner, corner + bins * 5.01, corner + bins * 5.01], 1)


def test_the_adaptive_grid_misses_no_sample() -> None:
    check_close_samples()


def check_close_samples() -> None:
    feature = torch.randn(1, 7, 8, dtype=torch.float64)
    boxes = close_samples(1, torch.device("cpu")).double()
    out = roi_align(feature[None], boxes[None], 1, 1.0, 0, True, **BICUBIC, backend="reference")
    for got, box in zip(out, boxes.tolist(), strict=True):
        assert_close(got, brute_force(feature, box, 1, 0, True, -0.5))


# Samples at given points: an aligned box of size 0 with a fixed grid is the point's value


def at_points(feature: Tensor, points: Tensor, backend: str, **options: Any) -> Tensor:
    """Feature [1, C, H, W] at points [K, 2], y x in cells: [K, C]."""
    corner = points.flip(1) + 0.5
    return roi_align(feature, torch.cat([corner, corner], 1)[None], 1, 1.0, 1, True, **options, backend=backend)[
        ..., 0, 0
    ]


def random_points(low: float, height: float, width: float, device: torch.device) -> Tensor:
    return low + torch.rand(16, 2, device=device) * (torch.tensor([height, width], device=device) - 2 * low)


@BACKENDS
def test_equals_grid_sample(backend: str, device: torch.device) -> None:
    """Its coefficient is -0.75; it leaves the coordinate as it is, so the points lie between the border's cells."""
    feature = torch.randn(1, 4, 11, 9, device=device)
    points = random_points(0, 10, 8, device)
    grid = points.flip(1) / torch.tensor([8, 10], device=device) * 2 - 1  # [K, 2] x, y in -1..1
    expected = F.grid_sample(
        feature.double(), grid.double()[None, None], mode="bicubic", padding_mode="border", align_corners=True
    )
    assert_close(at_points(feature, points, backend, **BICUBIC, cubic_coeff=-0.75), expected[0, :, 0].T)


@BACKENDS
def test_ramps_are_exact_at_one_half_alone(backend: str, device: torch.device) -> None:
    """Away from the border Keys' kernel of -0.5 reproduces quadratic functions; one of -0.75 no linear one."""
    y, x = torch.meshgrid(torch.arange(13.0, device=device), torch.arange(12.0, device=device), indexing="ij")

    def linear(y: Tensor, x: Tensor) -> Tensor:
        return 0.5 * y - 0.25 * x + 1

    def quadratic(y: Tensor, x: Tensor) -> Tensor:
        return 0.1 * y**2 - 0.2 * x * y + 0.05 * x**2 + x

    maps = torch.stack([linear(y, x), quadratic(y, x)])[None]
    points = random_points(1, 12, 11, device)
    expected = torch.stack([f(*points.double().unbind(1)) for f in (linear, quadratic)], 1)
    assert_close(at_points(maps, points, backend, **BICUBIC), expected)
    off = at_points(maps, points, backend, **BICUBIC, cubic_coeff=-0.75) - expected
    assert off[:, 0].abs().max() > 0.01


# Against the reference in float64


@BACKENDS
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("sampling_ratio", "aligned"), GRIDS[:2])
def test_backends_equal_the_truth(
    backend: str, device: torch.device, channels_last: bool, sampling_ratio: int, aligned: bool
) -> None:
    features = pyramid(device, C=5, channels_last=channels_last)
    boxes = random_boxes(4, height=SIDE, width=SIDE, min_size=4, max_size=60, device=device).view(2, 2, 4)
    options = BICUBIC | {"sampling_ratio": sampling_ratio, "aligned": aligned, "canonical_scale": 100}
    check_forward_and_backward(
        lambda f: multiscale_roi_align(f, boxes, (2, 3), SCALES, **options, backend=backend),
        features,
        *truth(features, boxes, (2, 3), SCALES, **options),
    )


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and device.type == "cuda" and backend == "triton":
        pytest.skip("float64 runs in the interpreter only")
    features = pyramid(device, C=5, dtype=dtype, channels_last=True)
    boxes = random_boxes(2, height=SIDE, width=SIDE, min_size=4, max_size=60, device=device).view(2, 1, 4)
    check_forward_and_backward(
        lambda f: multiscale_roi_align(f, boxes, 2, SCALES, **BICUBIC, cubic_coeff=-0.7, backend=backend),
        features,
        *truth(features, boxes, 2, SCALES, **BICUBIC, cubic_coeff=-0.7),
    )


@BACKENDS
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN boxes in the interpreter
@pytest.mark.parametrize(
    ("sampling_ratio", "aligned"), [GRIDS[0], pytest.param(0, True, id="adaptive-aligned", marks=pytest.mark.slow)]
)
def test_odd_boxes(backend: str, device: torch.device, sampling_ratio: int, aligned: bool) -> None:
    features = [x.detach()[:1].requires_grad_() for x in pyramid(device, C=3)]
    boxes = odd_boxes(device)
    boxes = boxes[boxes[:, 0] != -3e4][None]  # it takes the interpreter long, and the loop is that of bilinear samples
    options = BICUBIC | {"sampling_ratio": sampling_ratio, "aligned": aligned, "canonical_scale": 100}
    expected, exact = truth(features, boxes, 2, SCALES, **options)
    out = multiscale_roi_align(features, boxes, 2, SCALES, **options, backend=backend)
    assert_close(out, expected)
    assert not out[~torch.isfinite(boxes).all(-1).flatten()].any()
    gradients = torch.autograd.grad(out.sum(), features)
    for got, want in zip(gradients, torch.autograd.grad(expected.sum(), exact), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize(("sampling_ratio", "aligned"), GRIDS[:2])
def test_reference_gradcheck(sampling_ratio: int, aligned: bool) -> None:
    feature = torch.randn(1, 2, 9, 8, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[[1.3, 2.1, 6.7, 7.2], [-5.2, 4.4, 5.9, 11.3]]], dtype=torch.float64, requires_grad=True)

    def run(feature: Tensor, boxes: Tensor) -> Tensor:
        return roi_align(feature, boxes, (2, 3), 1.0, sampling_ratio, aligned, **BICUBIC, backend="reference")

    assert torch.autograd.gradcheck(run, (feature, boxes))


# The choice of a backend, tracing


def test_on_a_cpu_the_reference_serves(device: torch.device) -> None:
    feature, boxes = torch.randn(1, 3, 8, 8, device=device), torch.tensor([[[1.0, 1, 6, 7]]], device=device)
    with pytest.raises(ValueError, match=r"torchvision.*has no bicubic interpolation"):
        roi_align(feature, boxes, 2, **BICUBIC, backend="torchvision")
    if device.type == "cpu":
        expected = roi_align(feature, boxes, 2, **BICUBIC, backend="reference")
        assert torch.equal(roi_align(feature, boxes, 2, **BICUBIC), expected)


@pytest.mark.parametrize("chosen", ["reference", "triton"])
def test_compiles_whole(device: torch.device, chosen: str) -> None:
    features = pyramid(device, C=3)[:1]
    boxes = random_boxes(2, height=SIDE, width=SIDE, min_size=4, max_size=60, device=device).view(2, 1, 4)

    def run(features: list[Tensor], boxes: Tensor) -> Tensor:
        return multiscale_roi_align(features, boxes, 2, SCALES[:1], **BICUBIC, backend=chosen)

    out = torch.compile(run, fullgraph=True, backend="aot_eager")(features, boxes)
    expected = run(features, boxes)
    assert_close(out, expected)
    weights = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad(out, features, weights), torch.autograd.grad(expected, features, weights), strict=True
    ):
        assert_close(got, want)


# Mutants: each must turn the parity check red


def parity(kernels: ModuleType, device: torch.device, ratio: int) -> None:
    """Small boxes all over a map of 2 x 2 tiles of the backward, 8 x 16 cells each; and the closest samples.

    One box's second row of bins begins more than a cell below row 7, the last of the upper tiles.
    """
    features = [guarded(torch.randn(1, 3, 11, 19, device=device)).requires_grad_()]
    boxes = random_boxes(6, height=11, width=19, min_size=2, max_size=6, device=device)
    boxes = torch.cat(
        [boxes, boxes.new_tensor([[-1.5, -1.2, 3.0, 2.5], [3.0, 7.7, 8.0, 9.9]]), close_samples(2, device)[::2]]
    )[None]
    check_forward_and_backward(
        lambda f: kernels.multiscale_roi_align(f, boxes, None, 2, 2, [1.0], [], ratio, True, -0.6),
        features,
        *truth(features, boxes, 2, [1.0], sampling_ratio=ratio, **BICUBIC, cubic_coeff=-0.6),
    )


FIXED, ADAPTIVE = 2, 0
MUTANTS = {
    "tap off by one": (FIXED, AXIS, "tl.floor(at) + (tap - 1)", "tl.floor(at) + tap"),
    "taps not clamped": (FIXED, AXIS, "tl.minimum(tl.maximum(cell, 0.0), length - 1.0).to", "cell.to"),
    "three rows of taps": (FIXED, FORWARD, "for row in range(4)", "for row in range(3)"),
    "weights of one axis": (FIXED, FORWARD, "(weight_y * weight_x)", "(weight_x)"),
    "another kernel near": (FIXED, AXIS, "(CUBIC + 2.0)", "(CUBIC + 2.1)"),
    "another kernel far": (FIXED, AXIS, "CUBIC * (distance", "-0.5 * (distance"),
    "gradient without the first border": (FIXED, AXIS, "cells == 0,", "cells == -1,"),
    "gradient without the last border": (FIXED, AXIS, "cells == length - 1.0", "cells == length + 1.0"),
    "tiles a tap away left out": (FIXED, TOUCH, "0.0 if CUBIC is None else 1.0", "0.0"),
    "bins a tap above left out": (FIXED, TOUCH, "(low - reach", "(low - 1.0"),
    "bins a tap below left out": (FIXED, TOUCH, "(high + reach", "(high + 1.0"),
    "samples a tap away left out": (ADAPTIVE, BACKWARD, "(cells - reach", "(cells - 1.0"),
    "a sample too few": (ADAPTIVE, BACKWARD, "5 if CUBIC is None else 6", "5"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [FIXED, ADAPTIVE], ids=["fixed", "adaptive"])
def test_parity_is_green(device: torch.device, ratio: int) -> None:
    parity(kernels, device, ratio)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_turn_parity_red(name: str, device: torch.device, tmp_path: Path) -> None:
    ratio, module, old, new = MUTANTS[name]
    broken = mutant(module, old, new, tmp_path, seen_from=kernels)
    with pytest.raises(AssertionError):
        parity(broken, device, ratio)


@pytest.mark.parametrize(
    ("definition", "old", "new"),
    [
        (check_close_samples, "NEARBY_CUBIC_SAMPLES = 6", "NEARBY_CUBIC_SAMPLES = 5"),
        (check_close_samples, "reach = 1 if cubic is None else 2", "reach = 1"),
        (check_taps_of_the_border, "(low + tap).clamp(0, last)", "(low + tap).clamp(max=last)"),
        (check_taps_of_the_border, "for tap in (-1, 0, 1, 2)", "for tap in (0, 1, 2)"),
        (check_taps_of_the_border, "far = coefficient *", "far = -0.75 *"),
    ],
    ids=["a sample too few", "samples a tap away", "border not clamped", "a tap too few", "coefficient"],
)
def test_mutants_of_the_reference(
    definition: Callable[[], None], old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "axis_weights", mutant(reference, old, new, tmp_path).axis_weights)
    with pytest.raises(AssertionError):
        definition()
