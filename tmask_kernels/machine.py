"""What a machine lacks for PyTorch's CUDA and for the Triton kernels, each fault with the way out.

A process looks for each fault once. No function here reads a tensor or waits for a GPU.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

OLDEST_TRITON = (3, 6)
TESTED_TRITON = ("3.6", "3.8")
OLDEST_GPU = (8, 0)  # Triton's own limit on NVIDIA: Ampere, compute capability 8.0


@functools.cache
def triton_fault() -> str | None:
    """Why this Python cannot use Triton; None if it can. Imports Triton."""
    try:
        triton = importlib.import_module("triton")
        importlib.import_module("triton.language")
    except ImportError as error:
        if error.name == "triton" and isinstance(error, ModuleNotFoundError):
            return f"triton is not installed: {_way_to_triton()}"
        return _broken(error)
    except Exception as error:  # the import of a damaged package fails in any way
        return _broken(error)
    found = re.match(r"(\d+)\.(\d+)", triton.__version__)
    if found and (int(found[1]), int(found[2])) < OLDEST_TRITON:
        return f"triton {triton.__version__} is older than 3.6: pip install --upgrade torch torchvision triton"
    return None


def triton_version() -> str:
    """The version of Triton, and whether it is one that the project is tested with."""
    version = importlib.import_module("triton").__version__
    tested = any(version.startswith(f"{row}.") for row in TESTED_TRITON)
    return f"triton {version}" + ("" if tested else f" (not tested; tested are {', '.join(TESTED_TRITON)})")


def _broken(error: Exception) -> str:
    says = " ".join(f"{type(error).__name__}: {error}".split())
    return f"triton is installed, but its import fails ({says}): pip install --force-reinstall triton"


def _way_to_triton() -> str:
    if sys.platform == "linux":
        return "pip install 'triton>=3.6'"
    system = {"win32": "Windows (WSL 2 is Linux)", "darwin": "macOS"}.get(sys.platform, sys.platform)
    return f"it has no package for {system}; backend='auto' takes torchvision or the reference"


def gpu_reason(index: int) -> str | None:
    """Why Triton cannot launch a compiled kernel on CUDA device `index`; None if it can."""
    if not torch.cuda.is_available():  # a fake tensor can name a GPU that is not there
        return None
    capability = torch.cuda.get_device_capability(index)
    if torch.version.hip is None and capability < OLDEST_GPU:
        name, number = torch.cuda.get_device_name(index), "".join(map(str, capability))
        return f"{name} is sm_{number}, and Triton needs sm_80 or newer; backend='auto' takes the reference"
    return launcher_fault()


@functools.cache
def launcher_fault() -> str | None:
    """Why Triton cannot build its launcher, a C extension of Python, at a first launch; None if it can."""
    if sys.platform != "linux":  # Triton for Windows brings a compiler
        return None
    knobs = importlib.import_module("triton").knobs
    if knobs.build.impl or any(Path(knobs.cache.dir).glob("*/*_utils*.so")):  # another builder, or already built
        return None
    named = os.environ.get("CC")
    if not (shutil.which(named) if named else shutil.which("gcc") or shutil.which("clang")):
        found = f"CC={named!r} is no program" if named else "found neither gcc nor clang"
        return f"no C compiler for Triton's launcher ({found}): apt install gcc, or set CC to one"
    scheme = sysconfig.get_default_scheme()
    # Debian's own scheme names a folder without headers; Triton looks here too.
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    header = Path(sysconfig.get_paths(scheme=scheme)["include"]) / "Python.h"
    elsewhere = os.environ.get("CPATH") or os.environ.get("C_INCLUDE_PATH")  # where a compiler looks too
    if not header.exists() and not elsewhere:
        python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        return f"no Python headers for Triton's launcher ({header} is missing): apt install {python}-dev"
    return None


@functools.cache
def torch_build_fault() -> str | None:
    """Says that torch has no CUDA although the machine has an NVIDIA GPU; None otherwise. Leaves CUDA alone."""
    if torch.version.cuda is not None or torch.version.hip is not None or not _has_nvidia_gpu():
        return None
    way = "pip install --force-reinstall torch torchvision"
    if sys.platform == "win32":
        way = "take the pip command for CUDA from pytorch.org/get-started/locally"
    return f"torch {torch.__version__} is built without CUDA, and this machine has an NVIDIA GPU: {way}"


@functools.cache
def cuda_fault() -> str | None:
    """Why torch sees no GPU on a machine that has one of NVIDIA; None if torch sees one or the machine has none."""
    build_fault = torch_build_fault()
    if build_fault or torch.cuda.is_available() or not _has_nvidia_gpu():
        return build_fault
    try:
        torch.cuda.init()
    except Exception as error:  # torch says whether the driver is missing or too old, and where to get another
        says = " ".join(str(error).split())
        return f"torch does not see this machine's NVIDIA GPU: {says} (a container needs --gpus all)"
    return None


def _has_nvidia_gpu() -> bool:
    """Whether an NVIDIA GPU is there, with its driver or without; False if the user hides every GPU."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists():
        return True
    return any(map(_is_nvidia_gpu, Path("/sys/bus/pci/devices").glob("*")))


def _is_nvidia_gpu(device: Path) -> bool:
    """Whether a PCI device is a display controller (class 0x03....) of NVIDIA (vendor 0x10de)."""
    try:
        vendor, kind = (device / "vendor").read_text(), (device / "class").read_text()
    except OSError:
        return False
    return vendor.startswith("0x10de") and kind.startswith("0x03")
