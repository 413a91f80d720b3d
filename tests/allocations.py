"""What a piece of code allocates, counted below PyTorch's operators, on any device."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class _Allocations(TorchDispatchMode):
    def __init__(self, sizes: list[int], known: Sequence[Tensor]) -> None:
        super().__init__()
        self.sizes = sizes
        self.kept = list(known)  # so that no address is given twice
        self.seen = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if not isinstance(tensor, Tensor) or not tensor.numel():
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in given | self.seen:
                self.seen.add(storage.data_ptr())
                self.kept.append(tensor)
                self.sizes.append(storage.nbytes())
        return out


@contextmanager
def allocated(*known: Tensor) -> Iterator[list[int]]:
    """The bytes of each tensor that operators inside the block made; views and results written in place are none.

    `known` are tensors made before, which the interpreter wraps anew in a way that an operator does not show.
    """
    sizes: list[int] = []
    with _Allocations(sizes, known):
        yield sizes


class Peak:
    """Filled when its block ends."""

    bytes: int = 0


@contextmanager
def peak_allocated() -> Iterator[Peak]:
    """The most bytes of the CPU that PyTorch held at once for what is made inside the block, temporaries included."""
    peak = Peak()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
        yield peak
    changes, events = [], list(prof.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    peak.bytes = max(itertools.accumulate(size for _, size in sorted(changes)), default=0)
