"""Where the benchmarks run: full size on a GPU, reduced size on a CPU, where Triton kernels cannot be timed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def timed(benchmark: Any, device: torch.device) -> Callable[[Callable[[], Any]], None]:
    """Time a call, the device's work included. The call has been checked before it comes here."""

    def run(call: Callable[[], Any]) -> None:
        def synchronised() -> None:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(synchronised, rounds=10, warmup_rounds=2)

    return run


def skip_if_untimeable(provider: str, device: torch.device) -> None:
    """The interpreter runs a kernel's Python source: its time says nothing about the kernel."""
    if provider == "triton" and device.type != "cuda":
        pytest.skip("needs a CUDA device: Triton's interpreter is no timing")
