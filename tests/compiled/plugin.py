"""A pytest plug-in: Triton compiles every launch of the run to its TTIR, which ttsem executes on the CPU.

`make test-compiled` loads it (``pytest -p tests.compiled.plugin``). Tensors and torch.cuda say that there is a GPU, so
tests take the way that a GPU takes. An access outside a tensor, two programs of a launch that race, and an operation
without a defined result raise where the kernel was launched; memory that nobody wrote holds NaN or a large integer.
allowed.txt lists what the tool is wrong about, with the reason.
"""

import contextlib
import functools
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ttsem import harness, mlir, pidraces, sanitize

ALLOWED = Path(__file__).with_name("allowed.txt")


def _entries(text: str) -> dict[str, str]:
    """The lines `what: reason`."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return dict(line.split(": ", 1) for line in lines)  # a line without a reason is an error


_ALL = _entries(ALLOWED.read_text())
TESTS = {what: reason for what, reason in _ALL.items() if "::" in what}
RACES = {what: reason for what, reason in _ALL.items() if what not in TESTS}  # "kernel parameter"
raced: set[str] = set()  # of RACES, those seen in this run
_launch: Any = None  # the one being executed

_execute, _find_race = harness.execute, pidraces.find_race


def execute(record: Any, *args: Any, **kwargs: Any) -> Any:
    """ttsem's `execute`; notes the launch."""
    global _launch
    _launch = record
    return _execute(record, *args, **kwargs)


def find_race(log: list[Any] | None) -> Any:
    """ttsem's `find_race` of the launch, but for the tensors that allowed.txt names."""
    while race := _find_race(log):
        for what in RACES:
            kernel, parameter = what.split()
            tensor = _launch.bound.get(parameter) if kernel == _launch.fn_name else None
            if tensor is not None and 0 <= race.address - tensor.data_ptr() < tensor.nbytes:
                raced.add(what)
                log = list(_outside(log or [], tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes))
                break
        else:
            return race
    return None


def _outside(log: list[Any], start: int, end: int) -> Iterator[Any]:
    for agent, kind, op, addresses, itemsize, written in log:
        keep = (addresses < start) | (addresses >= end)
        if keep.any():
            yield agent, kind, op, addresses[keep], itemsize, None if written is None else written[keep]


_texts: dict[Any, str] = {}


def ir_for_launch(record: Any, stage: str, target: Any, *args: Any) -> str:
    """ttsem's `ir_for_launch`, once for each variant of a kernel, and no further than that stage: ptxas takes long."""
    options, *variant = harness._specialize(record.fn, record.args, record.kwargs, target)
    key = record.fn, str(options), str(variant)
    if key not in _texts:
        mlir.enable_generic_printing()
        _texts[key] = harness._stage_text(record, stage, target)
    return _texts[key]


harness.execute, harness.ir_for_launch, pidraces.find_race = execute, ir_for_launch, find_race
mlir.parse = functools.lru_cache(mlir.parse)
_open = contextlib.ExitStack()
_open.enter_context(  # before a conftest asks for a device
    sanitize.session(on_unchecked=lambda: warnings.warn("a launch too large to look for races in it", stacklevel=2))
)
torch.are_deterministic_algorithms_enabled = lambda: False  # where it is set, torchvision compiles its RoIAlign anew


def pytest_configure() -> None:
    """Pinned memory and events ask for a driver: tensors are copied to the host at once."""
    from tmask_kernels.common import rle

    rle._copy_to_host = lambda *tensors: ([t.cpu() for t in tensors], lambda: None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """`torch.empty` gives NaN in custom ops and backward passes too, where ttsem's own way does not reach."""
    torch.use_deterministic_algorithms(True, warn_only=True)


def pytest_unconfigure() -> None:
    _open.close()


def _matches(pattern: str, test: str) -> bool:
    """Whether this is the test; `*` is any text, and brackets are brackets."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), test) is not None


def _launches_none(item: pytest.Item) -> bool:
    """Whether the test is a parametrized one of another backend."""
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return any(params.get(name) in ("reference", "torchvision") for name in ("backend", "strategy"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is allowed to fail must fail; an entry without a test is an error where its whole file was asked for."""
    in_part = {arg.split("::")[0] for arg in config.args if "::" in arg}
    files = {item.nodeid.split("::")[0] for item in items} - in_part
    items[:] = [item for item in items if not _launches_none(item)]
    for pattern, reason in TESTS.items():
        found = [item for item in items if _matches(pattern, item.nodeid)]
        file = pattern.split("::")[0]
        if not found and (file in files or not (config.rootpath / file).exists()):
            raise pytest.UsageError(f"{ALLOWED}: no test is {pattern}")
        for item in found:
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
