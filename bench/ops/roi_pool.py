"""RoIPool of one map (W4-pool), forward and backward, against the peers.

torchvision has no bfloat16 kernel: its bf16 rows cast to float32 and back, as its autocast does on CUDA alone. mmcv's
RoIPool does not round its boxes: it gets them rounded, in cells, so that the bins are the same up to the rounding of
their ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torchvision
from torch import Tensor

from bench.cases import CASES, RoIPoolCase, sized
from bench.contest import DTYPES, LAYOUTS, Call, Contest
from bench.machine import device
from bench.ops.roi_align import Given, Loose, Pool, check, provider
from bench.variants import variants
from tmask_kernels import roi_pool
from tmask_kernels.ops.roi_pool.reference import round_half_away
from tmask_kernels.testing import Tolerance

# A bin of mmcv lacks a row or column of cells where float32 gives torchvision's last bin one more: in one box of forty.
ROUNDED_BINS = Tolerance(max=2.0, rms=0.05)


@variants(
    cases=["W4-pool"],
    modes=["forward", "backward"],
    dtypes=["fp32", "bf16"],
    layouts=["nchw", "nhwc"],
    providers=["triton", "torchvision", "mmcv", "reference"],
    where=lambda case, mode, dtype, layout, provider: (
        (dtype, layout) in (("fp32", "nchw"), ("fp32", "nhwc"), ("bf16", "nhwc"))
        and (provider in ("triton", "torchvision") or (dtype, layout) == ("fp32", "nchw"))
    ),
)
def test_roi_pool(case: str, mode: str, dtype: str, layout: str, provider: str, contest: Any) -> None:
    contest(lambda: pooling(case, mode, dtype, layout))


def pooling(name: str, mode: str, dtype: str, layout: str) -> Contest:
    """One variant of a case; the truth is the reference in float64 on the same rounded inputs."""
    case, size = sized(cast(RoIPoolCase, CASES[name]))
    backward = mode == "backward"

    def inputs() -> Given:
        features = case.features(DTYPES[dtype], LAYOUTS[layout], device())
        boxes = case.boxes().to(device())
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
        out = provider(ours("reference"))(exact)()
        return [out] if isinstance(out, Tensor) else list(out)

    return Contest(
        inputs=inputs, providers=PROVIDERS, truth=truth, check=check, work=case.work(dtype, mode), size=size
    )  # fmt: skip


def ours(backend: str) -> Callable[[Given], Pool]:
    """`roi_pool` by a backend."""

    def prepare(given: Given) -> Pool:
        case = given.case
        return lambda: roi_pool(given.features[0], given.boxes, case.pooled, case.scales[0], backend=backend)

    return prepare


def torchvision_pool(given: Given) -> Pool:
    case, boxes = given.case, torchvision.ops._utils.convert_boxes_to_roi_format(list(given.boxes))

    return lambda: torchvision.ops.roi_pool(given.features[0].float(), boxes, case.pooled, case.scales[0]).to(
        given.dtype
    )


def mmcv(given: Given) -> Call:
    from mmcv.ops import roi_pool as mmcv_roi_pool

    cells = round_half_away(given.boxes * given.case.scales[0])
    boxes = torchvision.ops._utils.convert_boxes_to_roi_format(list(cells))
    run = provider(lambda given: lambda: mmcv_roi_pool(given.features[0], boxes, given.case.pooled, 1.0))(given)
    return lambda: Loose(run(), ROUNDED_BINS)


PROVIDERS = {
    "triton": provider(ours("triton")),
    "torchvision": provider(torchvision_pool),
    "mmcv": mmcv,
    "reference": provider(ours("reference")),
}
