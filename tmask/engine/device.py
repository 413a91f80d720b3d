"""Devices, precisions, batches to the device, and what ran out of memory."""

from __future__ import annotations

import ctypes
import platform
import re
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from tmask_kernels.machine import cuda_fault

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("fp32", *AUTOCAST_DTYPES)
# Words of CUDA, its libraries, torch's CPU allocator and the system.
_NO_MEMORY = r"out of memory|(can't|cannot) allocate memory|not enough memory|alloc_failed"


def pick_device(name: str | torch.device) -> torch.device:
    """The device ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.

    Warns if ``"auto"`` takes the CPU of a machine with an NVIDIA GPU. Raises ValueError for any other device.
    """
    if name == "auto":
        if fault := cuda_fault():
            warnings.warn(f"running on the CPU: {fault}", stacklevel=2)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {str(name)!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        why = cuda_fault() or f"{torch.cuda.device_count()} GPUs"
        raise ValueError(f"device: expected one of this machine's, got {name!r} ({why})")
    return device


def keep_freed_memory() -> None:
    """Let this process keep freed memory for its next allocation. Does nothing without glibc.

    By default glibc returns large blocks to the system at once. A training step on a CPU then spends much of its time
    on page faults.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # mallopt(3): M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_max, 0)  # large blocks come from the heap too
    libc.mallopt(trim_threshold, 2**31 - 1)  # the heap does not shrink
    libc.mallopt(top_pad, 64 * 2**20)  # the heap grows in steps of 64 MiB


def memory_fault(error: BaseException) -> Literal["process", "worker"] | None:
    """What ran out of memory: this process (on the CPU or a GPU), a data worker, or None for another error.

    The type and the words of `error` and its causes decide. A worker that the system killed, or that met a full
    /dev/shm, has no reason of its own.
    """
    errors = [error]
    while errors[-1].__cause__ is not None:
        errors.append(errors[-1].__cause__)
    texts = " ".join(str(item) for item in errors if isinstance(item, RuntimeError | OSError))
    killed = re.search(r"DataLoader worker .* killed by signal: (Killed|Bus error)?", texts)
    if killed is not None:
        return "worker" if killed[1] else None
    if re.search(r"DataLoader worker .* exited unexpectedly|shared memory|</torch_\d+", texts):
        return "worker"
    if any(isinstance(item, MemoryError | torch.OutOfMemoryError) for item in errors):
        return "process"
    return "process" if re.search(_NO_MEMORY, texts, re.IGNORECASE) else None


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The autocast context of a precision; fp32 needs none. Raises ValueError if the device lacks the precision."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "fp16" and device.type != "cuda":
        raise ValueError(f"precision: fp16 needs a CUDA device, got {device}; use bf16 or fp32")
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, AUTOCAST_DTYPES[precision])


def to_device(batch: Any, device: torch.device, *, channels_last: bool = False) -> Any:
    """Copy every tensor of a (named) tuple to `device` without a wait; `channels_last` applies to 4-d floats."""
    if isinstance(batch, Tensor):
        if channels_last and batch.dim() == 4 and batch.is_floating_point():
            return batch.to(device, non_blocking=True, memory_format=torch.channels_last)
        return batch.to(device, non_blocking=True)
    if isinstance(batch, tuple):
        items = [to_device(item, device, channels_last=channels_last) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else tuple(items)
    return batch
