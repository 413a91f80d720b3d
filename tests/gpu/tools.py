"""What the tests of this folder share. Each takes the device: a GPU, or the CPU in a rehearsal (``--rehearse``).

A rehearsal runs the body of every test at a reduced size through Triton's interpreter, so that a GPU meets no test for
the first time with a typing mistake in it. What CUDA alone has (graphs, streams, the sync debug mode, memory
statistics) it leaves out here, in one place.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bench.graph import captured
from tmask_kernels.testing import Tolerance, assert_close

MEBIBYTE = 2**20

# At the sizes of the standard work a coordinate of hundreds of cells is rounded to 2e-5 of a cell in float32, which
# moves a sample of random features by up to 1e-4; the reference in float64 has no such rounding.
FULL_SIZE_FP32 = {"max": 1e-4, "rms": 1e-5}


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a nested result, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def to(value: Any, device: torch.device) -> Any:
    """A nested value with its tensors copied to `device`."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().to(device, copy=True), value)


def assert_same_bits(got: Any, expected: Any) -> None:
    """Equal in every bit, NaN included."""
    for a, b in zip(tensors(got), tensors(expected), strict=True):
        assert a.shape == b.shape
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), f"{int((a != b).sum())} of {a.numel()} differ"
        assert torch.equal(a.isnan(), b.isnan())


def random_like(out: Tensor) -> Tensor:
    return torch.randn(out.shape, device=out.device, generator=torch.Generator(out.device).manual_seed(2)).to(out.dtype)


def assert_gradients_close(got: Tensor, want: Tensor, *, tolerance: Tolerance | None = None) -> None:
    """Both divided by the power of two that brings the largest above 1; that rounds nothing."""
    scale = 2.0 ** want.abs().max().log2().floor() if want.any() else 1.0
    assert_close((got.double() / scale).to(got.dtype), want / scale, name="gradient", tolerance=tolerance)


def recorded(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`call` as a CUDA graph, which replays on the memory it was captured with; in a rehearsal `call` itself."""
    return captured(call) if device.type == "cuda" else call


@contextmanager
def waiting_is_an_error(device: torch.device) -> Iterator[None]:
    """A host that waits for the device inside the block is a RuntimeError; nothing in a rehearsal."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def counting_waits(device: torch.device) -> Iterator[list[Any]]:
    """Where the host waited for the device inside the block, once it ends; nothing in a rehearsal."""
    waits: list[Any] = []
    if device.type != "cuda":
        yield waits
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            yield waits
    finally:
        torch.cuda.set_sync_debug_mode(before)
    waits += [one for one in found if "synchronizing" in str(one.message)]


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Memory that `call` takes at most beyond what is allocated before; None in a rehearsal."""
    if device.type != "cuda":
        call()
        return None
    call()  # compilation and library handles
    torch.cuda.synchronize(device)
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def need_memory(gibibytes: float, device: torch.device) -> None:
    """Skip unless the GPU has so much memory free; a rehearsal, which is small, goes on."""
    if device.type != "cuda":
        return
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    if free < gibibytes * 2**30:
        pytest.skip(f"needs {gibibytes} GiB of free GPU memory, {free / 2**30:.0f} GiB are")


def need_cuda(device: torch.device, what: str) -> None:
    """Skip the rest of a test in a rehearsal, `what` being what a CPU has not."""
    if device.type != "cuda":
        pytest.skip(f"rehearsed up to here: a CPU has no {what}")
