"""RoIAlign's gradient to the boxes: ramps, the fp64 reference, kinks, gradcheck, memory, tracing, mutants."""

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_roi_align import GRIDS, odd_boxes
from tests.mutation import mutant
from tmask_kernels import multiscale_roi_align, roi_align
from tmask_kernels.common.kernels import roi_axis
from tmask_kernels.ops.roi_align.kernels import backward as kernels_backward
from tmask_kernels.ops.roi_align.kernels import boxes as kernels_boxes
from tmask_kernels.ops.roi_align.kernels import forward as kernels
from tmask_kernels.testing import assert_close, guarded, poisoned_empty, random_boxes

BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])
INTERPOLATIONS = pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
SCALES = [1 / 2, 1 / 4]
HEIGHT, WIDTH = 22.0, 30.0  # pixels; its levels are 11 x 15 and 5 x 7 cells
PYRAMID: dict[str, Any] = {"canonical_scale": 12, "canonical_level": 2}  # boxes of 12 px and more: the second level


def maps(
    device: torch.device, *, N: int = 2, C: int = 3, dtype: torch.dtype = torch.float32, channels_last: bool = True
) -> list[Tensor]:
    """Two levels [N, C, H, W] with odd sizes, between guard bands of NaN."""
    levels = [torch.randn(N, C, 11 >> i, 15 >> i, device=device).to(dtype) for i in range(2)]
    if channels_last:
        levels = [x.contiguous(memory_format=torch.channels_last) for x in levels]
    return [guarded(x).requires_grad_() for x in levels]


def some_boxes(device: torch.device, P: int = 2) -> Tensor:
    """[2, P, 4] on both levels, some over the border."""
    boxes = random_boxes(2 * P, height=HEIGHT, width=WIDTH, min_size=3, max_size=25, device=device)
    return (boxes + 4 * torch.randn(2 * P, 1, device=device)).view(2, P, 4).requires_grad_()


Pool = Callable[[list[Tensor], Tensor], Tensor]


def check(run: Pool, truth: Pool, features: list[Tensor], boxes: Tensor) -> Tensor:
    """Gradients to the features and the boxes together, `truth` on the same numbers in float64. Returns the latter."""
    out = run(features, boxes)
    weights = torch.randn_like(out)
    with poisoned_empty():
        *gradients, to_boxes = torch.autograd.grad(out, [*features, boxes], weights)
    exact = [x.detach().double().requires_grad_() for x in [*features, boxes]]
    *expected, boxes_expected = torch.autograd.grad(truth(exact[:-1], exact[-1]), exact, weights.double())
    for i, (got, want) in enumerate(zip(gradients, expected, strict=True)):
        assert_close(got, want, name=f"gradient of level {i}")
    assert (to_boxes.dtype, to_boxes.shape) == (boxes.dtype, boxes.shape)
    # Of float64 boxes it was computed in float32, unless the features are float64 too.
    computed = to_boxes.float() if features[0].dtype != torch.float64 and boxes.dtype == torch.float64 else to_boxes
    assert_close(computed, boxes_expected, name="gradient of the boxes")
    return to_boxes


def check_pyramid(backend: str, features: list[Tensor], boxes: Tensor, size: tuple[int, int], **options: Any) -> Tensor:
    options = PYRAMID | options

    def pool(backend: str) -> Pool:
        return lambda f, b: multiscale_roi_align(f, b, size, SCALES, **options, backend=backend)

    return check(pool(backend), pool("reference"), features, boxes)


# Hand-made answers


@BACKENDS
@INTERPOLATIONS
def test_on_a_ramp_the_mean_follows_the_centre(backend: str, interpolation: Any, device: torch.device) -> None:
    """Of a plane the mean of a box is its value at the centre, which moves half a cell with a cell of either side."""
    y, x = torch.meshgrid(torch.arange(9.0, device=device), torch.arange(11.0, device=device), indexing="ij")
    ramp = (3 * y - 5 * x)[None, None]
    boxes = torch.tensor([[[5.3, 6.1, 14.2, 12.9]]], device=device, requires_grad=True)
    out = roi_align(ramp, boxes, (1, 3), 0.5, 2, True, interpolation=interpolation, backend=backend)
    (gradient,) = torch.autograd.grad(out.mean(), boxes)
    assert_close(gradient, torch.tensor([[[-1.25, 0.75, -1.25, 0.75]]], device=device))


@BACKENDS
def test_each_corner_moves_its_own_bins(backend: str, device: torch.device) -> None:
    """Along a ramp bin b of 2 has its middle at a + (b + 1/2) / 2 of the way to the other corner."""
    ramp = torch.arange(8.0, device=device).expand(1, 1, 5, 8)
    boxes = torch.tensor([[[1.2, 1.3, 5.4, 3.2]]], device=device, requires_grad=True)
    out = roi_align(ramp, boxes, (1, 2), 1.0, 2, backend=backend)
    for b, expected in enumerate([[0.75, 0, 0.25, 0], [0.25, 0, 0.75, 0]]):
        (gradient,) = torch.autograd.grad(out[0, 0, 0, b], boxes, retain_graph=True)
        assert_close(gradient, torch.tensor([[expected]], device=device))


# Against the reference in float64, with the gradient to the features


@pytest.mark.parametrize(("sampling_ratio", "aligned"), GRIDS)
def test_bilinear_equals_the_truth(device: torch.device, sampling_ratio: int, aligned: bool) -> None:
    features = maps(device, channels_last=aligned)
    check_pyramid("triton", features, some_boxes(device), (2, 3), sampling_ratio=sampling_ratio, aligned=aligned)


@pytest.mark.parametrize(("sampling_ratio", "aligned"), GRIDS[:2])
def test_bicubic_equals_the_truth(device: torch.device, sampling_ratio: int, aligned: bool) -> None:
    options: dict[str, Any] = {"interpolation": "bicubic", "cubic_coeff": -0.6}
    check_pyramid(
        "triton", maps(device, channels_last=aligned), some_boxes(device, P=1), (1, 2),
        sampling_ratio=sampling_ratio, aligned=aligned, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "channels_last"), [(torch.float16, True), (torch.bfloat16, True), (torch.float64, False)], ids=str
)
def test_dtypes_of_the_features(dtype: torch.dtype, channels_last: bool, device: torch.device) -> None:
    if dtype == torch.float64 and device.type == "cuda":
        pytest.skip("float64 runs in the interpreter only")
    boxes = some_boxes(device, P=1)
    check_pyramid("triton", maps(device, dtype=dtype, channels_last=channels_last), boxes, (2, 2))


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_of_the_boxes(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """The gradient comes back in the dtype of the boxes, which are cast to float32."""
    boxes = some_boxes(device, P=1).detach().to(dtype).float()
    boxes = boxes.to(dtype).requires_grad_()
    check_pyramid(backend, maps(device), boxes, (2, 2))


@BACKENDS
def test_more_channels_than_a_block(backend: str, device: torch.device) -> None:
    """And not a whole number of blocks, nor of the channels that a thread sums."""
    C = 261
    assert 2 * kernels_boxes.pick_slope_tile(C, 7, 4, True).block_c < C
    boxes = torch.tensor([[[1.3, 2.1, 6.7, 5.2]]], device=device, requires_grad=True)
    feature = guarded(torch.randn(1, C, 5, 7, device=device).contiguous(memory_format=torch.channels_last))

    def pool(backend: str) -> Pool:
        return lambda f, b: roi_align(f[0], b, (1, 7), 1.0, 1, backend=backend)

    check(pool(backend), pool("reference"), [feature.requires_grad_()], boxes)


@BACKENDS
def test_strided_features_and_gradients(backend: str, device: torch.device) -> None:
    """A view is read where it lies; so is a gradient that is one number for all."""
    feature = torch.randn(2, 14, 10, 6, device=device)[:, ::2, 3:, ::2].permute(0, 3, 1, 2)  # [2, 3, 7, 7]
    boxes = some_boxes(device, P=1)
    out = roi_align(feature, boxes, 2, 0.5, 2, True, backend=backend)
    exact = boxes.detach().double().requires_grad_()
    expected = roi_align(feature.double(), exact, 2, 0.5, 2, True, backend="reference")
    assert_close(torch.autograd.grad(out.sum(), boxes)[0], torch.autograd.grad(expected.sum(), exact)[0])


# Kinks and odd boxes


@INTERPOLATIONS
def test_kinks_are_those_of_the_reference(interpolation: Any, device: torch.device) -> None:
    """Samples on cells and on and around both borders, exactly: an aligned box of no size is a point."""
    H, W = 4, 5
    ys = [-1.5, -1.0, -0.5, 0.0, 1.0, 1.5, 2.0, H - 1.0, H - 0.5, float(H), H + 0.5]
    xs = [1.5, 0.0, W - 1.0, 2.0, -0.5, W - 0.5, -1.0, float(W), 1.0, 0.5, 2.5]
    points = torch.tensor([xs, ys], device=device).T + 0.5
    points = torch.cat([points, points.new_tensor([[0.25, 1.25], [W + 0.25, 2.25]])])  # one free axis each
    boxes = torch.cat([points, points], 1)[None].requires_grad_()
    features = [torch.randn(1, 3, H, W, device=device, requires_grad=True)]

    def pool(backend: str) -> Pool:
        return lambda f, b: roi_align(f[0], b, 1, 1.0, 1, True, interpolation=interpolation, backend=backend)

    gradient = check(pool("triton"), pool("reference"), features, boxes)
    assert gradient[0, 3].any(), "on the first cell the slope is that of the inside"
    assert not gradient[0, 0].any()
    assert gradient[0, -2:].ne(0).tolist() == [[False, True, False, True]] * 2


@pytest.mark.parametrize("sampling_ratio", [0, 2], ids=["adaptive", "fixed"])
def test_short_boxes_that_are_not_aligned(sampling_ratio: int, device: torch.device) -> None:
    """A box of less than a cell is a cell long wherever it ends: all moves with the start. One of a cell is free."""
    rows = [[1.3, 2.1, 1.9, 4.7], [2.2, 1.4, 4.9, 1.6], [3.7, 2.6, 3.1, 2.5], [1.25, 2.5, 2.25, 3.5]]
    boxes = torch.tensor([rows], device=device, requires_grad=True)
    features = [torch.randn(1, 3, 7, 8, device=device, requires_grad=True)]

    def pool(backend: str) -> Pool:
        return lambda f, b: roi_align(f[0], b, 2, 1.0, sampling_ratio, backend=backend)

    gradient = check(pool("triton"), pool("reference"), features, boxes)[0]
    assert gradient.ne(0).tolist() == [
        [True, True, False, True],
        [True, True, True, False],
        [True, True, False, False],
        [True] * 4,
    ]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN boxes in the interpreter
@pytest.mark.parametrize(
    ("sampling_ratio", "aligned"),
    [GRIDS[1], *(pytest.param(*g.values, id=g.id, marks=pytest.mark.slow) for g in (GRIDS[0], GRIDS[2], GRIDS[3]))],
)
def test_odd_boxes(sampling_ratio: int, aligned: bool, device: torch.device) -> None:
    """Outside, inverted, larger than the image: as the reference. Not finite: exactly 0, also beside a NaN upstream."""
    boxes = odd_boxes(device)
    boxes = (boxes[boxes[:, 0] != -3e4] / 5 + 0.013)[None].requires_grad_()  # in the interpreter that one takes long
    features = maps(device, N=1, C=2)
    gradient = check_pyramid("triton", features, boxes, (1, 2), sampling_ratio=sampling_ratio, aligned=aligned)[0]
    finite = torch.isfinite(boxes[0]).all(-1)
    assert gradient[0].all()
    assert not gradient[~finite].any()
    out = multiscale_roi_align(features, boxes[:, -3:], 1, SCALES, backend="triton")
    assert not torch.autograd.grad(out, boxes, torch.full_like(out, math.nan))[0].any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflows in the interpreter
def test_boxes_that_overflow_once_scaled_take_no_gradient(device: torch.device) -> None:
    rows = [[1e30, 1e30, 2e30, 2e30], [-1e30, 0.0, 1e30, 2e-10], [1.3e-10, 1.2e-10, 4e-10, 4e-10]]
    boxes = torch.tensor([rows], device=device, requires_grad=True)
    feature = torch.randn(1, 2, 6, 6, device=device)
    out = roi_align(feature, boxes, 2, 1e10, 2, backend="triton")
    (gradient,) = torch.autograd.grad(out.sum(), boxes)
    assert not gradient[0, :2].any()
    assert gradient[0, 2].isfinite().all()
    assert gradient[0, 2].all()


# Forms of the boxes, empty inputs


@BACKENDS
def test_forms_of_boxes_agree(backend: str, device: torch.device) -> None:
    features = [x.detach() for x in maps(device)]
    padded = some_boxes(device)
    valid = torch.tensor([[True, True], [False, True]], device=device)
    weights = torch.randn(4, 3, 1, 1, device=device)

    def gradient(boxes: Any, leaves: list[Tensor], **options: Any) -> list[Tensor]:
        out = multiscale_roi_align(features, boxes, 1, SCALES, **PYRAMID, **options, backend=backend)
        return list(torch.autograd.grad(out, leaves, weights))

    (expected,) = gradient(padded, [padded])
    (masked,) = gradient(padded, [padded], valid=valid)
    assert_close(masked, torch.where(valid[..., None], expected, 0.0))
    assert not masked[1, 0].any()
    listed = [x.detach().clone().requires_grad_() for x in padded]
    assert_close(torch.stack(gradient(listed, listed)), expected)
    index = torch.tensor([0.0, 0, 1, 1], device=device)[:, None]
    flat = torch.cat([index, padded.detach().flatten(0, 1)], 1).requires_grad_()
    assert_close(gradient(flat, [flat])[0], torch.cat([index * 0, expected.flatten(0, 1)], 1))
    strided = padded.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert_close(gradient(strided, [strided])[0], expected)


@BACKENDS
def test_nothing_to_pool(backend: str, device: torch.device) -> None:
    for feature, shape in (
        (torch.randn(2, 3, 5, 6), (2, 0, 4)),
        (torch.randn(2, 3, 5, 6), (0, 5)),
        (torch.randn(2, 3, 0, 6), (2, 1, 4)),
        (torch.randn(2, 0, 5, 6), (2, 1, 4)),
    ):
        boxes = torch.zeros(shape, device=device, requires_grad=True)
        out = roi_align(feature.to(device), boxes, 2, backend=backend)
        (gradient,) = torch.autograd.grad(out.sum(), boxes)
        assert gradient.shape == shape
        assert not gradient.any()


# Gradients, memory, determinism


@pytest.mark.parametrize(
    ("interpolation", "sampling_ratio", "aligned"),
    [("bilinear", 0, True), ("bilinear", 2, False), pytest.param("bicubic", 2, True, marks=pytest.mark.slow)],
)
def test_gradcheck(interpolation: Any, sampling_ratio: int, aligned: bool, device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("float64 runs in the interpreter only")
    feature = torch.randn(1, 1, 5, 4, dtype=torch.float64, requires_grad=True)
    # The second lies over two borders; no sample is near a cell's centre or a border, where it has no derivative.
    boxes = torch.tensor([[[0.83, 0.91, 3.37, 4.04], [-1.42, 2.33, 2.76, 5.68]]], dtype=torch.float64)
    size = (1, 2)
    if interpolation == "bicubic":  # takes the interpreter long
        boxes, size = boxes[:, 1:], (1, 1)

    def run(feature: Tensor, boxes: Tensor) -> Tensor:
        return roi_align(
            feature, boxes, size, 1.0, sampling_ratio, aligned, interpolation=interpolation, backend="triton"
        )

    # Along random directions, which takes a few calls in place of one for each number.
    assert torch.autograd.gradcheck(run, (feature, boxes.contiguous().requires_grad_()), fast_mode=True)


def test_features_are_kept_only_for_the_boxes(device: torch.device) -> None:
    features, boxes = maps(device), some_boxes(device, P=1)
    for needed in (False, True):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # noqa: B023
            multiscale_roi_align(features, boxes.detach().requires_grad_(needed), 2, SCALES, backend="triton")
        assert [x.shape for x in kept if x.dim() == 4] == [f.shape for f in features if needed]


@pytest.mark.parametrize("needed", ["features", "boxes"])
def test_only_what_is_needed_is_computed(needed: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("not needed")

    if needed == "boxes":
        monkeypatch.setattr(kernels_backward, "multiscale_roi_align_backward", refuse)
    else:
        monkeypatch.setattr(kernels, "multiscale_roi_align_backward_boxes", refuse)
    feature = torch.randn(1, 2, 5, 5, device=device, requires_grad=needed == "features")
    boxes = torch.tensor([[[1.2, 1.3, 3.4, 4.2]]], device=device, requires_grad=needed == "boxes")
    out = roi_align(feature, boxes, 1, backend="triton")
    assert torch.autograd.grad(out.sum(), boxes if needed == "boxes" else feature)[0].any()


def test_the_same_bits_twice(device: torch.device) -> None:
    """And no refusal in deterministic mode."""
    features, boxes = maps(device), some_boxes(device, P=1)
    torch.use_deterministic_algorithms(True)
    try:
        out = multiscale_roi_align(features, boxes, 3, SCALES, **PYRAMID, backend="triton")
        weights = torch.randn_like(out)
        first, second = (torch.autograd.grad(out, boxes, weights, retain_graph=True)[0] for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)
    assert first.any()


def test_a_cpu_takes_the_reference(device: torch.device) -> None:
    feature = torch.randn(1, 3, 8, 8, device=device)
    boxes = torch.tensor([[[1.0, 1, 6, 7]]], device=device, requires_grad=True)
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"torchvision.*no gradient to the boxes"):
            roi_align(feature, boxes, 2, backend="torchvision")
        expected = roi_align(feature, boxes, 2, backend="reference")
        assert torch.equal(roi_align(feature, boxes, 2), expected)


# Tracing


def test_compiles_whole(device: torch.device) -> None:
    features, boxes = maps(device), some_boxes(device, P=1)

    def run(features: list[Tensor], boxes: Tensor) -> Tensor:
        return multiscale_roi_align(features, boxes, 2, SCALES, **PYRAMID, backend="triton")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for leaves in ([*features, boxes], [boxes]):
        given = features if len(leaves) > 1 else [x.detach() for x in features]
        out, expected = compiled(given, boxes), run(given, boxes)
        weights = torch.randn_like(out)
        for got, want in zip(
            torch.autograd.grad(out, leaves, weights), torch.autograd.grad(expected, leaves, weights), strict=True
        ):
            assert_close(got, want)


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "indexed"])
def test_opcheck(padded: bool, device: torch.device) -> None:
    features = [torch.randn(1, 3, 6 >> i, 5 >> i, device=device, requires_grad=padded) for i in range(2)]
    boxes = torch.tensor([[1.2, 1.3, 5.4, 7.2]], device=device)
    boxes = boxes[None] if padded else torch.nn.functional.pad(boxes, (1, 0))
    valid = torch.ones(1, 1, dtype=torch.bool, device=device) if padded else None
    rest = ([0.5, 0.25], [64.0], 2, True, None)
    torch.library.opcheck(kernels.multiscale_roi_align, (features, boxes.clone().requires_grad_(), valid, 1, 2, *rest))
    grad = torch.randn(1, 3, 1, 2, device=device)
    torch.library.opcheck(
        kernels_boxes.multiscale_roi_align_backward_boxes, (grad, [x.detach() for x in features], boxes, valid, *rest)
    )


# Mutants: each must turn the parity check red


def parity(kernels: ModuleType, device: torch.device, ratio: int, cubic: float | None, aligned: bool) -> None:
    """Boxes inside, over two borders, on the second level and, where that matters, of less than a cell."""
    features = maps(device, N=1, C=2)
    rows = [[3.3, 4.1, 9.2, 12.9], [-3.7, 11.2, 12.4, 24.9], [20.3, 3.2, 33.1, 13.6], [9.1, 8.2, 10.3, 9.1]]
    boxes = torch.tensor([rows], device=device, requires_grad=True)
    options: dict[str, Any] = {"interpolation": "bilinear" if cubic is None else "bicubic", "cubic_coeff": cubic or 0}

    def reference(features: list[Tensor], boxes: Tensor) -> Tensor:
        return multiscale_roi_align(
            features, boxes, 2, SCALES, sampling_ratio=ratio, aligned=aligned, **PYRAMID, **options, backend="reference"
        )

    check(
        lambda f, b: kernels.multiscale_roi_align(f, b, None, 2, 2, SCALES, [144.0], ratio, aligned, cubic),
        reference,
        features,
        boxes,
    )


LINEAR, ADAPTIVE, CUBIC = (2, None, False), (0, None, True), (2, -0.6, False)
MUTANTS = {
    "not free at the border": (LINEAR, kernels_boxes, "(at >= 0.0) & (at <= length - 1.0)", "at == at"),
    "the other corner": (LINEAR, kernels_boxes, "tl.where(free, 1.0 - t, 0.0)", "tl.where(free, t, 0.0)"),
    "samples at the bin's start": (LINEAR, kernels_boxes, "(offs + (sample + 0.5) / grid)", "(offs + 0.0 * grid)"),
    "weights of the other axis": (LINEAR, kernels_boxes, "(1.0 - lx) * (v10 - v00)", "(1.0 - ly) * (v10 - v00)"),
    "a tap of the wrong column": (LINEAR, kernels_boxes, "ly * (v11 - v10)", "ly * (v11 - v00)"),
    "short boxes follow their end": (LINEAR, kernels_boxes, "y2 * scale - y1 * scale < 1.0", "y2 < y1"),
    "pixels for cells": (LINEAR, kernels_boxes, "scale / tl.maximum(grid", "1.0 / tl.maximum(grid"),
    "a sum for a mean": (ADAPTIVE, kernels_boxes, "scale / tl.maximum(grid_h * grid_w, 1.0)", "scale"),
    "every second channel": (LINEAR, kernels_boxes, "_sum_groups(along_x", "_sum_groups(offs_c % 2 * along_x"),
    "a row of bins left out": (LINEAR, kernels_boxes, "return sums.sum(1)", "return sums[:, 1:].sum(1)"),
    "slope of another kernel near": (CUBIC, roi_axis, "3.0 * CUBIC + 6.0", "3.0 * CUBIC + 5.9"),
    "slope of another kernel far": (CUBIC, roi_axis, "(3.0 * distance - 4.0)", "(3.0 * distance - 4.1)"),
    "slope of the wrong sign": (CUBIC, roi_axis, "tl.where(offset < 0, -slope, slope)", "slope"),
    "slope of the wrong axis": (CUBIC, kernels_boxes, "tl.fma(slope_y, value", "tl.fma(weight_y, value"),
}  # fmt: skip
FAST = {"not free at the border", "the other corner", "short boxes follow their end"}


@pytest.mark.slow
@pytest.mark.parametrize("variant", [LINEAR, ADAPTIVE, CUBIC], ids=["linear", "adaptive", "cubic"])
def test_parity_is_green(variant: Any, device: torch.device) -> None:
    parity(kernels, device, *variant)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in MUTANTS]
)
def test_mutants_turn_parity_red(
    name: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant, module, old, new = MUTANTS[name]
    broken = mutant(module, old, new, tmp_path, seen_from=kernels_boxes)
    monkeypatch.setattr(kernels, "multiscale_roi_align_backward_boxes", broken.multiscale_roi_align_backward_boxes)
    with pytest.raises(AssertionError):
        parity(kernels, device, *variant)
