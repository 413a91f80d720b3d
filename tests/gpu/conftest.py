"""Fixtures of the tests that need a GPU."""

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def full(device: torch.device) -> bool:
    """Whether the work has its full size; a rehearsal's is reduced."""
    return device.type == "cuda"


@pytest.fixture(autouse=True)
def _exact_products_and_no_leftovers() -> Iterator[None]:
    """Products of float32 in float32, as the comparisons need, and memory handed back for the next large case."""
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
