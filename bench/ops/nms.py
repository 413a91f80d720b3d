"""padded_nms against its reference and a loop of torchvision's nms over the segments."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torchvision.ops import nms

from bench.cases import SMALL_NMS, W5, NMSCase, nms_inputs
from bench.conftest import skip_if_untimeable
from tmask_kernels import padded_nms

CASES = {"W5": W5, "small": SMALL_NMS}


def kept(provider: str, case: NMSCase, boxes: torch.Tensor, scores: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
    """Kept indices of each segment by one provider; the lengths are read by the checks only."""
    if provider == "torchvision":
        return lambda: [nms(b, s, case.threshold)[: case.keep] for b, s in zip(boxes, scores, strict=True)]
    return lambda: list(padded_nms(boxes, scores, case.threshold, max_output=case.keep, backend=provider)[0])


@pytest.mark.parametrize("provider", ["triton", "torchvision", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_nms(name: str, provider: str, device: torch.device, benchmark: Any, timed: Any) -> None:
    skip_if_untimeable(provider, device)
    case = CASES[name]
    if (name == "small") == (device.type == "cuda"):
        pytest.skip("full size on a GPU, reduced size on a CPU")
    benchmark.group = f"nms {name}"
    boxes, scores = nms_inputs(case, device=device)
    call, truth = kept(provider, case, boxes, scores), kept("reference", case, boxes, scores)()
    for got, expected in zip(call(), truth, strict=True):
        assert torch.equal(got[got >= 0], expected[expected >= 0])
    timed(call)
