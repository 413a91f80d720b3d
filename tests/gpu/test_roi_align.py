"""RoIAlign at full size on a GPU: the reference in float64, torchvision's CUDA op, memory, more than 2^31 elements."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from bench.cases import CASES, RoICase
from tests.gpu.tools import (
    FULL_SIZE_FP32,
    MEBIBYTE,
    assert_same_bits,
    deterministic_algorithms,
    need_cuda,
    need_memory,
    peak_bytes,
    recorded,
    waiting_is_an_error,
)
from tmask_kernels import multiscale_roi_align, roi_align
from tmask_kernels.testing import TOLERANCES, Tolerance, assert_close, random_boxes

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
FULL_TOLERANCES = TOLERANCES | {torch.float32: Tolerance(**FULL_SIZE_FP32)}


def case_of(name: str, full: bool) -> RoICase:
    case = CASES[name]
    assert isinstance(case, RoICase)
    # Smaller still than the benchmark's: the interpreter runs one program after another.
    return case if full else replace(case.small(), rois=2 * case.images, channels=6)


def pool(case: RoICase, features: list[Tensor], boxes: Tensor, backend: str = "triton") -> Tensor:
    return multiscale_roi_align(
        features, boxes, case.pooled, case.scales, sampling_ratio=case.sampling_ratio, aligned=case.aligned,
        level_convention="torchvision", interpolation=case.interpolation, reduction=case.reduction, backend=backend,
    )  # fmt: skip


def make(case: RoICase, dtype: torch.dtype, layout: str, device: torch.device) -> tuple[list[Tensor], Tensor]:
    features = case.features(dtype, LAYOUTS[layout], device)
    return [f.requires_grad_() for f in features], case.boxes().to(device)


def random_like(out: Tensor) -> Tensor:
    return torch.randn(out.shape, device=out.device, generator=torch.Generator(out.device).manual_seed(2)).to(out.dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "roi-align-box-head",
        "roi-align-mask-head",
        "roi-align-bicubic",
        "roi-align-max",
        "roi-align-map",
        "roi-align-map-adaptive",
    ],
)
def test_equals_the_reference(name: str, dtype: torch.dtype, layout: str, full: bool, device: torch.device) -> None:
    case = case_of(name, full)
    features, boxes = make(case, dtype, layout, device)
    out = pool(case, features, boxes)
    upstream = random_like(out)
    gradients = torch.autograd.grad(out, features, upstream)
    exact = [f.detach().double().requires_grad_() for f in features]
    expected = pool(case, exact, boxes, "reference")
    assert_close(out, expected, tolerance=FULL_TOLERANCES[dtype])
    assert out.is_contiguous(memory_format=LAYOUTS[layout])
    for level, (got, want) in enumerate(
        zip(gradients, torch.autograd.grad(expected, exact, upstream.double()), strict=True)
    ):
        assert got.dtype == dtype
        # Of two samples that differ by less than float32 tells apart either may be the largest: a few in a million.
        tolerance = FULL_TOLERANCES[dtype] if case.reduction == "mean" else Tolerance(max=math.inf, rms=0.01)
        assert_close(got, want, tolerance=tolerance, name=f"gradient of level {level}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # torchvision's op has no bfloat16
@pytest.mark.parametrize(
    "name", ["roi-align-box-head", "roi-align-mask-head", "roi-align-map", "roi-align-map-adaptive"]
)
def test_equals_torchvision(name: str, dtype: torch.dtype, full: bool, device: torch.device) -> None:
    if dtype == torch.float16 and device.type != "cuda":
        pytest.skip("torchvision's float16 kernel is a GPU's")
    case = case_of(name, full)
    features, boxes = make(case, dtype, "nchw", device)
    out = pool(case, features, boxes)
    flat = list(boxes.to(dtype) if dtype == torch.float16 else boxes)  # it takes boxes of the features' dtype only
    if dtype == torch.float16:
        out = pool(case, features, boxes.to(dtype).float())
    if len(features) > 1:
        pooler = torchvision.ops.MultiScaleRoIAlign([str(i) for i in range(len(features))], case.pooled, 2)
        theirs = pooler({str(i): f for i, f in enumerate(features)}, flat, [(case.height, case.width)] * case.images)
    else:
        theirs = torchvision.ops.roi_align(
            features[0], flat, case.pooled, case.scales[0], case.sampling_ratio, case.aligned
        )
    # Its float16 kernel also computes coordinates and sums in float16.
    tolerance = Tolerance(**FULL_SIZE_FP32) if dtype == torch.float32 else Tolerance(max=2.0, rms=0.1)
    assert_close(out, theirs, tolerance=tolerance)
    if dtype == torch.float16:
        return
    upstream = random_like(out)
    ours = torch.autograd.grad(out, features, upstream)
    for got, want in zip(ours, torch.autograd.grad(theirs, features, upstream), strict=True):
        assert_close(got, want, tolerance=tolerance)


@pytest.mark.parametrize(("dtype", "layout"), [(torch.float32, "nchw"), (torch.bfloat16, "nhwc")], ids=str)
@pytest.mark.parametrize("name", ["roi-align-box-head", "roi-align-mask-head", "roi-align-bicubic", "roi-align-map"])
def test_gradient_to_the_boxes(name: str, dtype: torch.dtype, layout: str, full: bool, device: torch.device) -> None:
    """Against the reference in float64, 64 boxes; the same bits again.

    At a cell's centre the gradient of a bilinear sample jumps, so no sample may be a rounding away from one. Of boxes
    in 1/8 pixel the samples of 14 bins of 2 are multiples of 1/448 pixel away from the start; 1/896 keeps them clear.
    """
    case = replace(case_of(name, full), rois=64) if full else case_of(name, full)
    features, boxes = make(case, dtype, layout, device)
    features = [f.detach() for f in features]
    boxes = (boxes * 8).round() / 8 + 1 / 896
    out = pool(case, features, boxes.requires_grad_())
    upstream = random_like(out)
    first, second = (torch.autograd.grad(out, boxes, upstream, retain_graph=True) for _ in range(2))
    assert_same_bits(first, second)
    exact = boxes.detach().double().requires_grad_()
    expected = pool(case, [f.double() for f in features], exact, "reference")
    (want,) = torch.autograd.grad(expected, exact, upstream.double())
    assert_close(first[0], want, tolerance=Tolerance(**FULL_SIZE_FP32))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_replays_from_a_graph(layout: str, full: bool, device: torch.device) -> None:
    """Forward and backward in one graph, to the bit."""
    case = case_of("roi-align-box-head", full)
    features, boxes = make(case, torch.bfloat16, layout, device)
    upstream = random_like(pool(case, features, boxes))

    def step() -> list[Tensor]:
        out = pool(case, features, boxes)
        return [out, *torch.autograd.grad(out, features, upstream)]

    replay = recorded(step, device)
    with torch.no_grad():
        boxes.copy_(boxes.flip(1))
        for feature in features:
            feature.copy_(feature.flip(0))
    expected = step()
    got = replay()
    assert_same_bits(got, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward_are_deterministic(
    dtype: torch.dtype, layout: str, full: bool, device: torch.device
) -> None:
    case = case_of("roi-align-box-head", full)
    features, boxes = make(case, dtype, layout, device)
    with deterministic_algorithms():
        first = pool(case, features, boxes)
        upstream = torch.randn_like(first)
        gradients = torch.autograd.grad(first, features, upstream)
        for _ in range(3 if full else 1):
            out = pool(case, features, boxes)
            assert_same_bits(out, first)
            assert_same_bits(torch.autograd.grad(out, features, upstream), gradients)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_copies_no_features(dtype: torch.dtype, layout: str, full: bool, device: torch.device) -> None:
    """Boxes stay float32: the result is that without autocast. Memory: the output, and no float32 features."""
    case = case_of("roi-align-box-head", full)
    features, boxes = make(case, dtype, layout, device)
    features = [f.detach() for f in features]
    expected = pool(case, features, boxes)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert_same_bits(pool(case, features, boxes), expected)
        assert pool(case, features, boxes).dtype == dtype
        peak = peak_bytes(lambda: pool(case, features, boxes), device)
    need_cuda(device, "memory statistics")
    assert peak is not None
    out_bytes = expected.numel() * expected.element_size()
    assert peak <= out_bytes + 2 * MEBIBYTE, f"{peak / MEBIBYTE:.1f} MiB for an output of {out_bytes / MEBIBYTE:.1f}"


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_memory_of_the_backward(interpolation: str, full: bool, device: torch.device) -> None:
    """Beyond the gradients a bit a box and tile: 92 kB, where 150 MB are allowed."""
    case = replace(case_of("roi-align-box-head", full), interpolation=interpolation)
    features, boxes = make(case, torch.bfloat16, "nhwc", device)
    out = pool(case, features, boxes)
    upstream = random_like(out)
    peak = peak_bytes(lambda: torch.autograd.grad(out, features, upstream, retain_graph=True), device)
    need_cuda(device, "memory statistics")
    assert peak is not None
    gradients = sum(f.numel() * f.element_size() for f in features)
    assert peak <= gradients + 2 * MEBIBYTE, f"{(peak - gradients) / MEBIBYTE:.1f} MiB beyond the gradients"


def test_never_waits_at_full_size(full: bool, device: torch.device) -> None:
    case = case_of("roi-align-box-head", full)
    features, boxes = make(case, torch.bfloat16, "nhwc", device)

    def step() -> None:
        out = pool(case, features, boxes)
        torch.autograd.grad(out, features, torch.ones_like(out))

    step()
    with waiting_is_an_error(device):
        step()


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "every second channel": lambda x: x[:, ::2],
    "every second column": lambda x: x[..., ::2],
    "a window": lambda x: x[:, 1:, 3:-2, 1:-5],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "one image for all": lambda x: x[:1].expand_as(x),
    "backwards in memory order": lambda x: x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_are_read_where_they_lie(view: str, layout: str, full: bool, device: torch.device) -> None:
    case = case_of("roi-align-map", full)
    (feature,), boxes = make(case, torch.float32, layout, device)
    size = 7 if full else 2
    strided = VIEWS[view](feature.detach()).requires_grad_()
    out = roi_align(strided, boxes, size, case.scales[0], 2, True, backend="triton")
    dense = strided.detach().contiguous().requires_grad_()
    expected = roi_align(dense, boxes, size, case.scales[0], 2, True, backend="triton")
    assert_same_bits(out, expected)
    upstream = random_like(out)
    (got,), (want,) = torch.autograd.grad(out, strided, upstream), torch.autograd.grad(expected, dense, upstream)
    assert_close(got, want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_past_2_to_the_31_elements(layout: str, full: bool, device: torch.device) -> None:
    """RoIs in the last image, whose first element lies past 2^31; as if that image were alone. Both ways."""
    need_memory(30, device)
    images, channels, side, count = (9, 256, 1024, 64) if full else (3, 8, 16, 3)
    feature = torch.zeros(images, channels, side, side, dtype=torch.bfloat16, device=device)
    feature = feature.contiguous(memory_format=LAYOUTS[layout])
    assert (images - 1) * channels * side**2 >= 2**31 or not full
    feature[-1].normal_(generator=torch.Generator(device).manual_seed(0))
    feature.requires_grad_()
    last = feature.detach()[-1:].requires_grad_()
    boxes = random_boxes(count, height=4 * side, width=4 * side, min_size=8, max_size=2 * side).to(device)
    index = torch.full((count, 1), images - 1.0, device=device)
    out = roi_align(feature, torch.cat([index, boxes], 1), 7, 0.25, 2, True, backend="triton")
    expected = roi_align(last, torch.cat([index * 0, boxes], 1), 7, 0.25, 2, True, backend="triton")
    assert expected.abs().max() > 0.1
    assert_same_bits(out, expected)
    upstream = random_like(out)
    (got,) = torch.autograd.grad(out, feature, upstream)
    (want,) = torch.autograd.grad(expected, last, upstream)
    assert_close(got[-1:], want.double())
    for image in range(images - 1):
        assert not got[image].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_past_2_to_the_31_elements(layout: str, full: bool, device: torch.device) -> None:
    need_memory(30, device)
    count, channels, last = (43_000, 256, 9) if full else (3, 8, 1)
    assert count * channels * 14 * 14 >= 2**31 or not full
    feature = torch.randn(1, channels, 64, 64, device=device, dtype=torch.bfloat16)
    feature = feature.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    boxes = random_boxes(count, height=256, width=256, min_size=8).to(device)[None]
    out = roi_align(feature, boxes, 14, 0.25, 2, True, backend="triton")
    tail = roi_align(feature, boxes[:, -last:].contiguous(), 14, 0.25, 2, True, backend="triton")
    assert_same_bits(out[-last:], tail)
    upstream = torch.zeros_like(out)
    upstream[-last:] = random_like(tail)
    (got,) = torch.autograd.grad(out, feature, upstream)
    (want,) = torch.autograd.grad(tail, feature, upstream[-last:])
    assert want.any()
    assert_close(got, want.double())


def test_compiles_with_inductor(full: bool, device: torch.device) -> None:
    need_cuda(device, "inductor backend for Triton kernels")
    case = case_of("roi-align-box-head", full)
    features, boxes = make(case, torch.float32, "nhwc", device)

    def run(features: list[Tensor], boxes: Tensor) -> Any:
        return pool(case, [f * 2 for f in features], boxes).relu()

    upstream = random_like(run(features, boxes))
    out = torch.compile(run, fullgraph=True)(features, boxes)
    assert_close(out, run(features, boxes))
    gradients = torch.autograd.grad(out, features, upstream)
    for got, want in zip(gradients, torch.autograd.grad(run(features, boxes), features, upstream), strict=True):
        assert_close(got, want, tolerance=FULL_TOLERANCES[torch.float32])
