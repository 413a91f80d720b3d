"""How many operations a call hands to the device, and how often the call makes the host wait: counted on a CPU.

At batch 1 the number of launches decides the time of small ops, and a wait keeps a call out of a CUDA graph. Needs
``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tmask_kernels.namespace import OPS

_ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_FREE = {"_unsafe_view", "lift_fresh"}  # views that do not say so
_INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_"}


@dataclass
class Count:
    """`ops`: operators of PyTorch that fill a tensor, each at least one kernel; `kernels`: launches of Triton;
    `waits`: operators whose result the host reads, or whose output has a size that depends on data."""

    ops: int = 0
    kernels: int = 0
    waits: int = 0


class _Counter(TorchDispatchMode):
    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        ours = OPS.get(f"{func.namespace}::{name}")
        if ours is not None:  # a mode is off while it handles an op: on again for the body of ours
            with self:
                return ours.body(*args, **kwargs)
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


def count_call(call: Callable[[], Any]) -> Count:
    """Count a warm call: a tensor that is made once, such as anchors, is no launch of later calls."""
    with counting():
        call()
    with counting() as count:
        call()
    return count
