"""decode_boxes, forward and backward, against its reference and torchvision's BoxCoder."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder

from bench.conftest import skip_if_untimeable
from tmask_kernels import decode_boxes
from tmask_kernels.testing import Tolerance, assert_close, random_boxes

NUM_BOXES = 2 * 4_819  # what the RPN decodes for two 800 x 1344 images: the top 1,000 of each level, 819 on P6


def decode(provider: str, deltas: torch.Tensor, anchors: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Decoding by one provider: [K, 4]."""
    if provider == "torchvision":
        coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        return lambda: coder.decode_single(deltas, anchors)
    return lambda: decode_boxes(deltas, anchors, backend=provider)


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("provider", ["triton", "torchvision", "reference"])
def test_decode_boxes(provider: str, mode: str, device: torch.device, benchmark: Any, timed: Any) -> None:
    skip_if_untimeable(provider, device)
    benchmark.group = f"decode_boxes {mode}"
    anchors = random_boxes(NUM_BOXES, height=800, width=1344, min_size=16).to(device)
    deltas = torch.randn(NUM_BOXES, 4, generator=torch.Generator().manual_seed(0)).mul(0.3).to(device)
    call = decode(provider, deltas, anchors)
    assert_close(call(), decode("reference", deltas.double(), anchors)(), tolerance=Tolerance(max=1e-5, rms=1e-6))
    if mode == "forward":
        timed(call)
        return
    deltas.requires_grad_()
    upstream = torch.randn(NUM_BOXES, 4, device=device)
    timed(lambda: torch.autograd.grad(call(), deltas, upstream))
