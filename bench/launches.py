"""How many operations a call hands to the device, and how often it makes the host wait: counted on a CPU.

At batch 1 the number of launches decides the time of small ops, and a wait keeps a call out of a CUDA graph.
``TRITON_INTERPRET=1 python -m bench.launches`` prints the table of the reduced cases; with ``--write`` it goes into
docs/performance.md.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.contest import Call, Contest, NotBuiltError
from bench.counted import PAGE, replace_table
from bench.run import files_of
from tmask_kernels.backend import interpreter_enabled

PROVIDERS = ("triton", "torchvision")
# Of the variants of an op and mode only one case, dtype and layout is counted: the others launch much the same.
PREFERRED = ("bf16", "nhwc")

_ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_FREE = {"_unsafe_view", "lift_fresh"}  # views that do not say so
_INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_"}


@dataclass
class Count:
    """`ops`: operators of PyTorch that fill a tensor, each at least one kernel; `kernels`: launches of Triton.

    `waits`: operators whose result the host reads, or whose output has a size that depends on data.
    """

    ops: int = 0
    kernels: int = 0
    waits: int = 0

    def __str__(self) -> str:
        waits = {0: "", 1: ", 1 wait"}.get(self.waits, f", {self.waits} waits")
        return f"{self.ops + self.kernels}{waits}"


class _Counter(TorchDispatchMode):
    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        ours = torch._library.custom_ops.OPDEFS.get(f"{func.namespace}::{name}")
        if ours is not None:  # a mode is off while it handles an op: on again for the body of ours
            with self:
                return ours._init_fn(*args, **kwargs)
        with self:  # below autograd operators made of others, such as `to`, arrive whole
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        if name in _ALLOCATES:
            return func(*args, **kwargs).zero_()  # kernels do not run: zero is an index that exists everywhere
        aliases = [one.alias_info for one in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        self.count.ops += not is_view and name not in _FREE
        self.count.waits += _waits(func, name, args)
        return func(*args, **kwargs)


def _waits(func: Any, name: str, args: Any) -> bool:
    if name in _INDEXES:  # tagged for the sake of masks
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    shapes = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return bool(shapes & set(func.tags)) or str(func) == "torchvision.nms.default"


@contextlib.contextmanager
def counting() -> Iterator[Count]:
    """Count what is dispatched and launched inside the block. Kernels do not run: their outputs hold zeros."""
    from triton.runtime.interpreter import GridExecutor

    count = Count()

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        count.kernels += 1

    def waiting(read: Callable[..., Any]) -> Callable[..., Any]:
        def counted(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            count.waits += 1
            return read(self, *args, **kwargs)

        return counted

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(GridExecutor, "__call__", launch))
        for name in ("cpu", "tolist"):  # no operator shows them on a CPU, where they copy nothing
            stack.enter_context(mock.patch.object(torch.Tensor, name, waiting(getattr(torch.Tensor, name))))
        stack.enter_context(_Counter(count))
        yield count


def count_call(call: Call) -> Count:
    """Count a warm call: what is made once, anchors for one, is no launch of later calls."""
    with counting():
        call()
    with counting() as count:
        call()
    return count


def contests() -> Iterator[tuple[str, Contest]]:
    """Each op and mode of bench/ops by its name, with the contest of its first case."""
    for path in files_of("ops"):
        module = importlib.import_module(f"bench.ops.{path.stem}")
        for name, test in vars(module).items():
            if not name.startswith("test_"):
                continue
            rows = test.pytestmark[0].args[1]  # (case, mode, dtype, layout, provider)
            for mode in dict.fromkeys(row[1] for row in rows):
                of_mode = [row for row in rows if row[1] == mode]
                first = [row for row in of_mode if row[0] == of_mode[0][0]]
                best = max(first, key=lambda row: sum(word in PREFERRED for word in row))
                made: list[Contest] = []
                test(*best, contest=lambda make, made=made: made.append(make()))
                yield f"{name.removeprefix('test_')} {mode} ({best[0]})", made[0]


def count_provider(contest: Contest, provider: str) -> Count | None:
    """What a call takes; None if the project has no such kernel yet."""
    try:
        with counting():
            call = contest.providers[provider](contest.inputs())
        return count_call(call)
    except NotBuiltError:
        return None
    except ValueError as error:
        if "does not exist for this op" in str(error):
            return None
        raise


def table() -> str:
    """Launches and waits of one call by each provider, as a Markdown table."""
    lines = ["| op, mode and case | " + " | ".join(PROVIDERS) + " |", "|" + "---|" * (1 + len(PROVIDERS))]
    for name, contest in contests():
        counts = [count_provider(contest, provider) for provider in PROVIDERS]
        lines.append(f"| {name} | " + " | ".join("not built" if c is None else str(c) for c in counts) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if not interpreter_enabled() or sys.argv[1:] not in ([], ["--write"]):
        raise SystemExit("usage: TRITON_INTERPRET=1 python -m bench.launches [--write]")
    if sys.argv[1:]:
        PAGE.write_text(replace_table(PAGE.read_text(), "launches", table()))
    else:
        print(table(), end="")
