"""Counts what would make a GPU wait for the host or give a tensor a shape that depends on data.

Two nets: a dispatch mode sees ATen ops (also inside our custom ops, whose Python bodies it runs itself), and a
function mode sees the Python calls that read a CPU tensor without any dispatch, such as ``tolist``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tmask_kernels.namespace import OPS

# The host reads a value, or the output's shape depends on values.
BLOCKING_OPS = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "nonzero_static",
    "argwhere",
    "masked_select",
    "is_nonzero",
    "equal",
    "unique_dim",
    "_unique",
    "_unique2",
    "unique_consecutive",
    "unique_dim_consecutive",
    "repeat_interleave",
    "bincount",
    "histc",
    "allclose",
}
BLOCKING_CALLS = {"tolist", "item", "cpu", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__"}


class _DispatchCounter(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func.namespace == "aten":
            # Inside an op of ours, operators made of others (`to`, `where` of one argument) arrive whole.
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        # By a number, repeat_interleave is an expand; by a tensor its output length depends on values.
        if name in BLOCKING_OPS and str(func) != "aten.repeat_interleave.self_int":
            self.found[name] += 1
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = args[1]
            self.found["boolean index"] += sum(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        if name in ("_to_copy", "copy_") and self._leaves_the_device(name, args, kwargs):
            self.found["device-to-host copy"] += 1
        definition = OPS.get(f"{func.namespace}::{name}")
        if definition is not None:
            # Modes are off while one handles an op: turn them on again for the body of ours.
            with self, _CallCounter(self.found):
                return definition.body(*args, **kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _leaves_the_device(name: str, args: Any, kwargs: Any) -> bool:
        if name == "copy_":
            return args[1].is_cuda and not args[0].is_cuda
        target = kwargs.get("device")
        return args[0].is_cuda and target is not None and torch.device(target).type == "cpu"


class _CallCounter(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in BLOCKING_CALLS:
            self.found[f"Tensor.{name}"] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def count_blocking() -> Iterator[Counter[str]]:
    """Count blocking operations inside the block, by name; the counter is complete when the block ends."""
    found: Counter[str] = Counter()
    with _CallCounter(found), _DispatchCounter(found):
        yield found
    for name in [name for name, count in found.items() if not count]:
        del found[name]
