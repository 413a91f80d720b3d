"""multiscale_roi_align against its reference and torchvision's MultiScaleRoIAlign."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign

from bench.cases import SMALL_PYRAMID, STRIDES, W1, W2, PyramidCase, pyramid, rois
from bench.conftest import skip_if_untimeable
from tmask_kernels import multiscale_roi_align
from tmask_kernels.testing import Tolerance, assert_close

CASES = {"W1": W1, "W2": W2, "small": SMALL_PYRAMID}


def provider_call(
    provider: str, case: PyramidCase, features: list[torch.Tensor], boxes: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """Pooling with torchvision's conventions by one provider."""
    if provider == "torchvision":
        pool = MultiScaleRoIAlign(["0", "1", "2", "3"], case.pooled, 2)
        named = {str(i): x for i, x in enumerate(features)}
        return lambda: pool(named, list(boxes), [(case.height, case.width)] * case.images)
    valid = torch.ones(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
    return lambda: multiscale_roi_align(
        features, boxes, case.pooled, [1 / s for s in STRIDES],
        valid=valid, aligned=False, level_convention="torchvision", backend=provider,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("provider", ["triton", "torchvision", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_roi_align(
    name: str, provider: str, layout: str, mode: str, device: torch.device, benchmark: Any, timed: Any
) -> None:
    skip_if_untimeable(provider, device)
    case = CASES[name]
    if (name == "small") == (device.type == "cuda"):
        pytest.skip("full size on a GPU, reduced size on a CPU")
    benchmark.group = f"roi_align {name} {mode}"
    features = pyramid(case, dtype=torch.float32, channels_last=layout == "nhwc", device=device)
    boxes = rois(case.images, case.rois // case.images, case.height, case.width).to(device)
    call = provider_call(provider, case, features, boxes)
    truth = provider_call("reference", case, [x.double() for x in features], boxes)()
    assert_close(call(), truth, tolerance=Tolerance(max=1e-4, rms=1e-5))
    if mode == "forward":
        timed(call)
        return
    for x in features:
        x.requires_grad_()
    upstream = torch.randn(truth.shape, device=device)
    timed(lambda: torch.autograd.grad(call(), features, upstream))
