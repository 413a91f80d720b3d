"""What the tests of this folder share. Each takes the device: a GPU, or the CPU in a rehearsal (``--rehearse``).

A rehearsal runs the body of every test at a reduced size through Triton's interpreter, so that a GPU meets no test for
the first time with a typing mistake in it. What CUDA alone has (graphs, streams, the sync debug mode, memory
statistics) it leaves out here, in one place.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bench.graph import captured


def to(value: Any, device: torch.device) -> Any:
    """A nested value with its tensors copied to `device`."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().to(device, copy=True), value)


def random_like(out: Tensor) -> Tensor:
    return torch.randn(out.shape, device=out.device, generator=torch.Generator(out.device).manual_seed(2)).to(out.dtype)


def recorded(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`call` as a CUDA graph, which replays on the memory it was captured with; in a rehearsal `call` itself."""
    return captured(call) if device.type == "cuda" else call


@contextmanager
def _sync_debug_mode(mode: str, device: torch.device) -> Iterator[None]:
    """What CUDA does inside the block where the host waits for the device; nothing in a rehearsal."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def waiting_is_an_error(device: torch.device) -> AbstractContextManager[None]:
    """A host that waits for the device inside the block is a RuntimeError."""
    return _sync_debug_mode("error", device)


@contextmanager
def counting_waits(device: torch.device) -> Iterator[list[Any]]:
    """Where the host waited for the device inside the block, once it ends."""
    waits: list[Any] = []
    with warnings.catch_warnings(record=True) as found, _sync_debug_mode("warn", device):
        warnings.simplefilter("always")
        yield waits
    waits += [one for one in found if "synchronizing" in str(one.message)]


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
