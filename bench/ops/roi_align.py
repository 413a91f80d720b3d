"""RoIAlign of a pyramid (W1 to W3) and of one map (W4), forward and backward, against the peers.

torchvision has no bfloat16 kernel: its bf16 rows run under autocast, which computes in float32. Its half kernel
computes coordinates in half too, so its fp16 rows get RoIs that half precision holds (all providers get the same) and a
loose tolerance. In nhwc it copies the maps to nchw first, within its time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast
from unittest import mock

import torch
import torchvision
from torch import Tensor

from bench.cases import CASES, RoICase, sized
from bench.contest import DTYPES, LAYOUTS, Call, Contest, gradients
from bench.machine import device
from bench.variants import variants
from tmask_kernels import multiscale_roi_align, roi_align
from tmask_kernels.ops.roi_align import reference
from tmask_kernels.testing import TOLERANCES, Tolerance, assert_close

# Between neighbouring cells of random features a coordinate off by a tenth of a cell, as half precision has it at 300
# cells, is an error of a few tenths; only gross mistakes are beyond these bounds.
HALF_COORDINATES = Tolerance(max=0.5, rms=0.1)
# float32 coordinates of up to 336 cells are off by 3e-5 cells, and so are values between cells that differ by several:
# the reference itself differs by 2e-5 between float32 and float64 at full size.
FLOAT_COORDINATES = Tolerance(max=1e-4, rms=1e-5)


class Loose(NamedTuple):
    """A peer's result and the tolerance that its arithmetic needs."""

    value: Any
    tolerance: Tolerance


class Given(NamedTuple):
    """The inputs of one variant."""

    case: RoICase
    features: list[Tensor]  # [N, C, H, W] a level
    boxes: Tensor  # [N, P, 4] float32
    upstream: Tensor | None  # [N * P, C, PH, PW] for a backward

    @property
    def dtype(self) -> torch.dtype:
        return self.features[0].dtype


Pool = Callable[[], Tensor]


def _wanted(case: str, mode: str, dtype: str, layout: str, provider: str) -> bool:
    """Every dtype and layout for W1, the two common ones for the rest; slow or rare providers where they say most."""
    common = (dtype, layout) in (("fp32", "nchw"), ("bf16", "nhwc"))
    if case == "W1":
        fits = mode == "forward"
    elif case == "W1b":
        fits = mode == "backward" and dtype != "fp16"
    else:
        fits = common and (mode == "forward" or case == "W2")
    variant_case = case in ("W3-bicubic", "W3-max")  # of these the peers have neither
    return (
        fits
        and {
            "triton": True,
            "torchvision": not variant_case,
            "detectron2": not variant_case and (dtype, layout) == ("fp32", "nchw"),
            "compile": case in ("W1", "W1b") and (dtype, layout) == ("bf16", "nhwc"),
            "reference": common,
        }[provider]
    )


@variants(
    cases=["W1", "W1b", "W2", "W3", "W3-bicubic", "W3-max"],
    modes=["forward", "backward"],
    dtypes=["fp32", "bf16", "fp16"],
    layouts=["nchw", "nhwc"],
    providers=["triton", "torchvision", "detectron2", "compile", "reference"],
    where=_wanted,
)
def test_multiscale_roi_align(case: str, mode: str, dtype: str, layout: str, provider: str, contest: Any) -> None:
    contest(lambda: pooling(case, mode, dtype, layout, PYRAMID_PROVIDERS))


@variants(
    cases=["W4-ratio2", "W4-ratio0"],
    dtypes=["fp32", "bf16", "fp16"],
    layouts=["nchw", "nhwc"],
    providers=["triton", "torchvision", "detectron2", "mmcv", "reference"],
    where=lambda case, mode, dtype, layout, provider: (
        (dtype, layout) in (("fp32", "nchw"), ("fp32", "nhwc"), ("bf16", "nhwc"), ("fp16", "nchw"))
        and (provider in ("triton", "torchvision") or (dtype, layout) == ("fp32", "nchw"))
    ),
)
def test_roi_align(case: str, mode: str, dtype: str, layout: str, provider: str, contest: Any) -> None:
    contest(lambda: pooling(case, mode, dtype, layout, MAP_PROVIDERS))


def pooling(name: str, mode: str, dtype: str, layout: str, providers: Mapping[str, Callable[[Given], Call]]) -> Contest:
    """One variant of a case; the truth is the reference in float64 on the same rounded inputs."""
    case, size = sized(cast(RoICase, CASES[name]))
    backward = mode == "backward"

    def inputs() -> Given:
        boxes = case.boxes().to(device())
        if dtype == "fp16":
            boxes = boxes.half().float()
        features = case.features(DTYPES[dtype], LAYOUTS[layout], device())
        if not backward:
            return Given(case, features, boxes, None)
        shape = (case.rois, case.channels, case.pooled, case.pooled)
        upstream = torch.randn(shape, generator=torch.Generator(device()).manual_seed(2), device=device())
        upstream = upstream.to(DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])
        return Given(case, [x.requires_grad_() for x in features], boxes, upstream)

    def truth(given: Given) -> list[Tensor]:
        exact = given._replace(
            features=[x.detach().double().requires_grad_(backward) for x in given.features],
            upstream=None if given.upstream is None else given.upstream.double(),
        )
        return _listed(provider(ours("reference"))(exact)())

    return Contest(
        inputs=inputs, providers=providers, truth=truth, check=check, work=case.work(dtype, mode), size=size
    )  # fmt: skip


def check(out: Any, truth: list[Tensor]) -> None:
    """The output, or the gradient of each level."""
    value, tolerance = out if isinstance(out, Loose) else (out, None)
    for i, (got, expected) in enumerate(zip(_listed(value), truth, strict=True)):
        allowed = tolerance or (FLOAT_COORDINATES if got.dtype == torch.float32 else TOLERANCES[got.dtype])
        assert_close(got, expected, tolerance=allowed, name=f"value {i}")


def _listed(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def provider(prepare: Callable[[Given], Pool], *, peer: bool = False) -> Callable[[Given], Call]:
    """The call that is timed: a pooling, or the backward of a pooling that was done before."""

    def call(given: Given) -> Call:
        pool = prepare(given)
        run: Call = pool if given.upstream is None else gradients(pool(), given.features, given.upstream)
        return (lambda: Loose(run(), HALF_COORDINATES)) if peer and given.dtype == torch.float16 else run

    return call


def ours(backend: str) -> Callable[[Given], Pool]:
    """`multiscale_roi_align`, or `roi_align` where there is one map, by a backend."""

    def prepare(given: Given) -> Pool:
        case = given.case
        options: dict[str, Any] = {
            "sampling_ratio": case.sampling_ratio, "aligned": case.aligned, "interpolation": case.interpolation,
            "reduction": case.reduction, "backend": backend,
        }  # fmt: skip

        def pool() -> Tensor:
            if len(given.features) == 1:
                return roi_align(given.features[0], given.boxes, case.pooled, case.scales[0], **options)
            return multiscale_roi_align(
                given.features, given.boxes, case.pooled, case.scales, level_convention="torchvision", **options
            )

        return pool

    return prepare


def compiled(given: Given) -> Pool:
    """torch.compile of the reference, which works off its RoIs in one chunk then: a loop would be unrolled."""
    pool = torch.compile(ours("reference")(given))

    def whole() -> Tensor:
        # A backward that is called again and again may not give its buffers away.
        with (
            mock.patch.object(reference, "CHUNK_ELEMENTS", 1 << 62),
            torch._functorch.config.patch(donated_buffer=False),
        ):
            return pool()

    return whole


def _precision(given: Given) -> contextlib.AbstractContextManager[object]:
    """bfloat16 needs autocast: torchvision has no kernel of its own for it."""
    if given.dtype == torch.bfloat16:
        return torch.autocast(device().type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def _peer_boxes(given: Given) -> list[Tensor]:
    """A tensor an image; torchvision's kernels want them in the dtype of the features."""
    dtype = torch.float16 if given.dtype == torch.float16 else torch.float32
    return [boxes.to(dtype) for boxes in given.boxes]


def torchvision_pyramid(given: Given) -> Pool:
    case = given.case
    names = [str(i) for i in range(len(given.features))]
    module = torchvision.ops.MultiScaleRoIAlign(names, case.pooled, case.sampling_ratio)
    features = dict(zip(names, given.features, strict=True))
    boxes, sizes = _peer_boxes(given), [(case.height, case.width)] * case.images

    def pool() -> Tensor:
        with _precision(given):
            return module(features, boxes, sizes)

    return pool


def torchvision_map(given: Given) -> Pool:
    case, boxes = given.case, torchvision.ops._utils.convert_boxes_to_roi_format(_peer_boxes(given))

    def pool() -> Tensor:
        with _precision(given):
            return torchvision.ops.roi_align(
                given.features[0], boxes, case.pooled, case.scales[0], case.sampling_ratio, case.aligned
            )

    return pool


def detectron2(given: Given) -> Pool:
    from detectron2.modeling.poolers import ROIPooler
    from detectron2.structures import Boxes

    case = given.case
    kind = "ROIAlignV2" if case.aligned else "ROIAlign"
    pooler = ROIPooler(case.pooled, case.scales, case.sampling_ratio, kind)
    boxes = [Boxes(b) for b in _peer_boxes(given)]
    return lambda: pooler(given.features, boxes)


def mmcv(given: Given) -> Pool:
    from mmcv.ops import roi_align as mmcv_roi_align

    case, boxes = given.case, torchvision.ops._utils.convert_boxes_to_roi_format(_peer_boxes(given))
    return lambda: mmcv_roi_align(
        given.features[0], boxes, case.pooled, case.scales[0], case.sampling_ratio, "avg", case.aligned
    )


PYRAMID_PROVIDERS = {
    "triton": provider(ours("triton")),
    "torchvision": provider(torchvision_pyramid, peer=True),
    "detectron2": provider(detectron2, peer=True),
    "compile": provider(compiled),
    "reference": provider(ours("reference")),
}
MAP_PROVIDERS = {
    "triton": provider(ours("triton")),
    "torchvision": provider(torchvision_map, peer=True),
    "detectron2": provider(detectron2, peer=True),
    "mmcv": provider(mmcv, peer=True),
    "reference": provider(ours("reference")),
}


def patched(module: Any, name: str, value: Any) -> Callable[[Given], Call]:
    """The op with `name` of a kernel module replaced while it runs: that is how a sweep changes a launch."""

    def call(given: Given) -> Call:
        run = provider(ours("triton"))(given)

        def with_patch() -> Any:
            with mock.patch.object(module, name, value):
                return run()

        return with_patch

    return call


def always(value: Any) -> Callable[..., Any]:
    return lambda *_: value


def forward_launches() -> Contest:
    """W1 in bf16 nhwc with one provider a tile of the kernel; `triton` is the launch as it is now."""
    from tmask_kernels.ops.roi_align.kernels import forward as kernels

    block_pw = 8  # of 7 bins
    providers = {"triton": provider(ours("triton"))} | {
        f"triton[block_c={block_c},warps={warps}]": patched(
            kernels, "pick_tile", always(kernels.Tile(block_pw, block_c, warps))
        )
        for block_c in (16, 32, 64, 128, 256)
        for warps in (1, 2, 4, 8)
        if 1 <= block_pw * block_c / (32 * warps) <= 64  # elements a thread: some work, and no spills
    }
    return pooling("W1", "forward", "bf16", "nhwc", providers)


def backward_launches() -> Contest:
    """W1b in bf16 nhwc with one provider a tile of the gather; `triton` is the launch as it is now."""
    from tmask_kernels.ops.roi_align.kernels import backward as kernels_backward

    providers = {"triton": provider(ours("triton"))} | {
        f"triton[{height}x{width},block_c={block_c},warps={warps},registers={registers}]": patched(
            kernels_backward,
            "pick_gather_tile",
            always(kernels_backward.GatherTile(height, width, block_c, warps, registers)),
        )
        for height, width in ((4, 16), (8, 8), (8, 16), (16, 16), (8, 32))
        for block_c in (32, 64, 128)
        for warps, registers in ((2, 168), (4, 128), (4, 168), (8, 128))
        if 16 <= height * width * block_c / (32 * warps) <= 64  # sums a thread
    }
    return pooling("W1b", "backward", "bf16", "nhwc", providers)


SWEEPS: dict[str, Callable[[], Contest]] = {
    "roi_align-forward": forward_launches,
    "roi_align-backward": backward_launches,
}
