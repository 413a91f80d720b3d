"""The machine a benchmark runs on: its device, what it is, and the roofs it reaches, measured on the spot."""

from __future__ import annotations

import contextlib
import datetime
import functools
import platform
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from bench.result import ROOT
from bench.timing import median, wall_seconds

CHANGES = ("git", "status", "--porcelain", "--untracked-files=no")
PACKAGES = ("torch", "triton", "torchvision", "numpy", "pycocotools", "detectron2", "mmcv")


@functools.cache
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


_given_up = False


def give_up() -> None:
    """Say that later work in this process would fail for what has happened, not for what it is."""
    global _given_up
    _given_up = True


def lives() -> bool:
    """Return whether CUDA, if this process has used it, still answers, and nothing gave it up."""
    if _given_up or not torch.cuda.is_initialized():
        return not _given_up
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").item()  # only a value that was read back is sure
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False
    return True


@dataclass(frozen=True)
class Work:
    """The least bytes a case moves through memory, and the floating-point operations of its definition."""

    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Roofs:
    """What a machine reaches: bytes read plus written by a large copy, and flops of a large square product."""

    copy_gbps: float
    matmul_bf16_tflops: float
    matmul_fp32_tflops: float
    matmul_tf32_tflops: float | None = None  # of a GPU

    def floor_us(self, work: Work, dtype: str) -> float:
        """Return the time that no version of this work can beat: bytes over copy or flops over product, the larger."""
        return max(work.bytes / (self.copy_gbps * 1e3), work.flops / (self.tflops(dtype) * 1e6))

    def tflops(self, dtype: str) -> float:
        """Return the roof of products in `dtype`; "tf32" is float32 work on TF32 units, half precision has bf16's."""
        tf32 = self.matmul_tf32_tflops or self.matmul_fp32_tflops
        return {"fp32": self.matmul_fp32_tflops, "tf32": tf32}.get(dtype, self.matmul_bf16_tflops)


# H100 SXM by data sheet, for floors where no GPU is at hand.
H100 = Roofs(3_350, 989, 67)


@functools.cache
def roofs() -> Roofs:
    """Measure the roofs, once a process. Random data: zeros can run faster than real data will."""
    where = device()
    big = where.type == "cuda"
    source = torch.randn(2**28 if big else 2**24, device=where)  # 1 GiB on a GPU, 64 MiB on a CPU
    target = torch.empty_like(source)
    copy = _seconds(lambda: target.copy_(source))
    side = 8192 if big else 1024

    def product(dtype: torch.dtype) -> float:
        a = source[: side * side].view(side, side).to(dtype)
        return 2 * side**3 / _seconds(lambda: a @ a) / 1e12

    found = Roofs(2 * source.numel() * 4 / copy / 1e9, product(torch.bfloat16), product(torch.float32))
    if not big:
        return found
    with tf32():
        return replace(found, matmul_tf32_tflops=product(torch.float32))


@contextlib.contextmanager
def tf32(allowed: bool = True) -> Iterator[None]:
    """float32 products and convolutions of a GPU in TF32, whose error is 1e-3; or, not allowed, in float32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def _seconds(call: Callable[[], Any], rounds: int = 10) -> float:
    return median([wall_seconds(call, device()) for _ in range(rounds + 2)][2:])


def describe() -> dict[str, Any]:
    """Return what a result file says of the machine: GPU or CPU, driver, versions, commit; no host name, no path."""
    now = datetime.datetime.now(datetime.UTC)
    where = device()
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU {platform.machine()}"
    return {
        "gpu": name if where.type == "cuda" else None,
        "device": name,
        "threads": torch.get_num_threads(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "commit": _output("git", "rev-parse", "HEAD"),
        "changed": bool(_output(*CHANGES)),
        "date": now.strftime("%Y-%m-%d"),
        "time": now.strftime("%H:%M"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def checkout() -> str:
    """Return the commit that runs here, in ten digits, and whether files differ from it; "unknown" without git."""
    found = _output("git", "rev-parse", "HEAD")
    return found[:10] + (" with changes" if _output(*CHANGES) else "") if found else "unknown"


def _output(*command: str) -> str | None:
    """Return the output of a command in the checkout; None where it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
