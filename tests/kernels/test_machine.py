"""What a machine can lack: each fault is named with the way out, `auto` goes on, and an explicit Triton is refused."""

import importlib
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import tmask_kernels
from tmask.engine.device import pick_device
from tmask_kernels import backend, machine
from tmask_kernels.namespace import OPS
from tmask_kernels.testing import OpSpec, op_specs

ROOT = Path(__file__).parents[2]
CUDA = torch.device("cuda", 0)
CACHED = [value for value in vars(machine).values() if hasattr(value, "cache_clear")] + [backend._find_reasons]


@pytest.fixture(autouse=True)
def _look_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for function in CACHED:
        function.cache_clear()
    yield
    for function in CACHED:
        function.cache_clear()


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Makes the process believe in another machine, whose PATH is `tmp_path` and whose Triton has built no launcher."""

    def become(
        *,
        triton: str | None = "3.8.0",
        platform: str = "linux",
        capability: tuple[int, int] | None = None,
        compiler: str | None = None,
        headers: bool = True,
    ) -> None:
        """`triton` is a version, "broken", or None. Without `capability` torch sees what it saw."""
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CC", raising=False)
        if compiler:
            monkeypatch.setenv("CC", compiler)
        if not headers:
            monkeypatch.delenv("CPATH", raising=False)
            monkeypatch.delenv("C_INCLUDE_PATH", raising=False)
            monkeypatch.setattr("sysconfig.get_paths", lambda scheme: {"include": str(tmp_path)})
        if capability:
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A GPU")
            monkeypatch.setattr(torch.version, "hip", None)
        knobs = SimpleNamespace(build=SimpleNamespace(impl=None), cache=SimpleNamespace(dir=str(tmp_path)))
        if triton == "broken":
            (tmp_path / "triton").mkdir()
            (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('libtriton.so:\\n undefined symbol')")
            monkeypatch.syspath_prepend(str(tmp_path))
            monkeypatch.delitem(sys.modules, "triton")
        else:
            fake = SimpleNamespace(__version__=triton, knobs=knobs) if triton else None
            monkeypatch.setitem(sys.modules, "triton", fake)
            monkeypatch.setitem(sys.modules, "triton.language", SimpleNamespace())

    return become


def reasons() -> list[str]:
    """Why Triton cannot serve a CUDA tensor. test_backend.py shows what a call makes of them."""
    return backend.triton_reasons(SimpleNamespace(device=CUDA))  # type: ignore[arg-type]


Machine = dict[str, Any]
NO_TRITON: list[Machine] = [
    {"triton": None},
    {"triton": None, "platform": "win32"},
    {"triton": None, "platform": "darwin"},
    {"triton": "broken"},
]
AMPERE = {"capability": (8, 0)}
BARE = AMPERE | {"compiler": sys.executable, "headers": False}  # any program is a compiler here
FAULTS: list[tuple[Machine, str, str]] = [
    (NO_TRITON[0], "triton is not installed", "pip install 'triton>=3.6'"),
    (NO_TRITON[1], "triton is not installed: it has no package for Windows", "backend='auto'"),
    (NO_TRITON[2], "triton is not installed: it has no package for macOS", "backend='auto'"),
    (NO_TRITON[3], "its import fails (ImportError: libtriton.so: undefined symbol)", "--force-reinstall triton"),
    ({"triton": "3.5.1"}, "triton 3.5.1 is older than 3.6", "pip install --upgrade torch torchvision triton"),
    ({"capability": (7, 5)}, "A GPU is sm_75, and Triton needs sm_80", "backend='auto'"),
    (AMPERE, "no C compiler for Triton's launcher (found neither gcc nor clang)", "apt install gcc, or set CC"),
    (AMPERE | {"compiler": "gcc-0"}, "no C compiler for Triton's launcher (CC='gcc-0' is no program)", "set CC"),
    (BARE, "Python.h is missing", f"apt install python{sys.version_info[0]}.{sys.version_info[1]}-dev"),
]


@pytest.mark.parametrize(("machine", "says", "way_out"), FAULTS, ids=lambda value: str(value)[:40])
def test_a_fault_is_named_with_the_way_out(
    machine: Machine, says: str, way_out: str, become: Callable[..., None]
) -> None:
    become(**machine)
    (reason,) = reasons()
    assert says in reason
    assert way_out in reason


def test_a_whole_machine_has_no_fault(become: Callable[..., None], tmp_path: Path) -> None:
    """And a launcher that is built already needs no compiler."""
    become(**AMPERE)
    (tmp_path / "key").mkdir()
    (tmp_path / "key" / "cuda_utils.cpython.so").touch()
    assert reasons() == []


@pytest.mark.parametrize("machine", NO_TRITON, ids=str)
def test_auto_serves_without_triton(machine: Machine, become: Callable[..., None]) -> None:
    become(**machine)
    boxes, scores = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8]]), torch.tensor([0.5, 0.7])
    assert tmask_kernels.nms(boxes, scores, 0.5).tolist() == [1]
    with pytest.raises(ValueError, match="nms: backend='triton' cannot serve this call: triton is"):
        tmask_kernels.nms(boxes, scores, 0.5, backend="triton")


NO_DRIVER = "Found no NVIDIA driver on your system. Please install one"


@pytest.mark.parametrize(
    ("cuda", "present", "says"),
    [
        (None, True, "is built without CUDA, and this machine has an NVIDIA GPU: pip install --force-reinstall torch"),
        ("13.0", True, NO_DRIVER),
        (None, False, None),
        ("13.0", False, None),
    ],
)
def test_a_gpu_that_torch_does_not_see(
    cuda: str | None, present: bool, says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init() -> None:
        raise RuntimeError(NO_DRIVER)

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(machine, "_has_nvidia_gpu", lambda: present)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="expected one of this machine's, got 'cuda'") as error:
        pick_device("cuda")
    (reason, *build) = backend.triton_reasons(torch.zeros(1))
    assert "CPU tensor without the Triton interpreter" in reason
    if says is None:
        assert not caught
        assert "0 GPUs" in str(error.value)
    else:
        assert says in str(caught[0].message)
        assert says in str(error.value)
    assert bool(build) == (cuda is None and present)


def test_a_gpu_is_found_with_and_without_its_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for vendor, kind, expected in (
        ("0x10de", "0x030000", True),
        ("0x10de", "0x040300", False),
        ("0x8086", "0x03", False),
    ):
        (tmp_path / "vendor").write_text(vendor)
        (tmp_path / "class").write_text(kind)
        assert machine._is_nvidia_gpu(tmp_path) == expected
    assert not machine._is_nvidia_gpu(tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "nvidia-smi").touch(0o755)
    assert machine._has_nvidia_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not machine._has_nvidia_gpu(), "the user hides it"


def test_tested_versions_are_the_rows_of_the_tests() -> None:
    rows = {
        line.removeprefix("triton==").rpartition(".")[0]
        for path in (ROOT / ".ci" / "rows").glob("*.txt")
        for line in path.read_text().splitlines()
        if line.startswith("triton==")
    }
    assert rows == set(machine.TESTED_TRITON)
    if importlib.util.find_spec("triton"):
        assert machine.triton_version().startswith("triton ")


def test_an_untested_triton_says_so(become: Callable[..., None]) -> None:
    for version, note in (("3.6.0", ""), ("3.60.0", " (not tested; tested are 3.6, 3.8)")):
        become(triton=version)
        assert machine.triton_version() == f"triton {version}{note}"


class OnMps(Tensor):
    """A tensor that says it is on MPS."""


class Mps(TorchFunctionMode):
    """Lets the CPU play MPS, which has no float64. Tensors that are made inside stay there until `cpu` is called."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:
            return torch.device("mps" if isinstance(args[0], OnMps) else "cpu")
        if getattr(func, "namespace", "") == "tmask":  # a custom op: what is inside it
            with self:
                return OPS[func.name()].body(*args, **kwargs)
        named = any(isinstance(d, torch.device) and d.type == "mps" for d in (*args, *kwargs.values()))
        there = named or any(isinstance(t, OnMps) for t in pytree.tree_leaves((args, kwargs)))
        args, kwargs = pytree.tree_map_only(torch.device, lambda device: torch.device("cpu"), (tuple(args), kwargs))
        out = func(*args, **kwargs)
        there &= func not in (Tensor.cpu, Tensor.tolist)

        def place(tensor: Tensor) -> Tensor:
            if there and tensor.dtype == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
            return tensor.as_subclass(OnMps if there else Tensor)

        return out if isinstance(out, torch.Size) else pytree.tree_map_only(Tensor, place, out)


@pytest.mark.parametrize("check", op_specs(), ids=lambda check: check.name)
def test_auto_serves_mps_tensors(check: OpSpec) -> None:
    inputs = check.make()
    expected = check.call(inputs, "reference")
    there = {name: tensor.as_subclass(OnMps) for name, tensor in inputs.items()}
    with Mps():
        got = check.call(there, "auto")
        with pytest.raises(ValueError, match="no Triton kernels for device type 'mps'; backend='auto' takes the"):
            check.call(there, "triton")
    for value, true in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
        assert isinstance(value, OnMps) or not isinstance(true, Tensor)
        assert torch.equal(value, true) if isinstance(true, Tensor) else value == true


def test_imports_without_what_windows_lacks() -> None:
    code = "import sys, torch, torchvision\n"
    code += "for name in ('triton', 'fcntl', 'resource', 'termios', 'pwd'): sys.modules[name] = None\n"
    code += "sys.platform = 'win32'\n"
    code += "import tmask, tmask_kernels, tmask.cli, tmask.engine.train, tmask.validate\n"
    code += "print(tmask_kernels.nms(torch.tensor([[0., 0., 1., 1.]]), torch.ones(1), 0.5).tolist())\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout == "[0]\n", done.stderr
