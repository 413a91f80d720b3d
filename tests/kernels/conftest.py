"""Fixtures of the tests of kernels."""

import pytest
import torch


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["torchvision", "reference", "triton"])
def nms_backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """A backend of an op that ends in NMS."""
    if request.param == "torchvision" and device.type == "cuda":
        pytest.skip("the torchvision backend serves CPU tensors")
    return str(request.param)
