"""What a call of each op costs on the host, without a GPU: Triton's driver is a stand-in, and nothing is launched.

At batch 1 the host decides the time of small ops. The time is that of checks, dispatch, allocation and of Triton's
binding and look-up of a launch, on one thread. A real launch adds a few microseconds for each kernel.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torchvision
from torch import Tensor
from torch.utils import _pytree as pytree
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tmask_kernels import backend
from tmask_kernels.testing import op_specs

CALLS, REPEATS = 200, 5


class FakeH100:
    """As much of a Triton driver as binding and compiling ask for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled(CompiledKernel):
    """A kernel that is there already, and does nothing."""

    function, packed_metadata = 0, ()

    def __init__(self) -> None:
        """Have nothing to load."""

    def _init_handles(self) -> None:
        """Load nothing."""

    def run(self, *args: object) -> None:
        """Launch."""

    def launch_metadata(self, *args: object) -> None:
        """What a hook would be told."""


@contextmanager
def nothing_runs() -> Iterator[None]:
    """Let CPU tensors pass for a GPU's, and every kernel for compiled. New integers are 0: places that exist."""
    new = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        out = new(*args, **kwargs)
        return out if out.is_floating_point() else out.zero_()

    def compile_kernel(self: JITFunction, key: Any, signature: Any, device: int, *_: Any) -> Compiled:
        compiled = self.device_caches[device][0][key] = Compiled()
        return compiled

    with ExitStack() as stack:
        for owner, name, stand_in in (
            (JITFunction, "_do_compile", compile_kernel),
            (driver, "_active", FakeH100()),
            (backend, "_find_reasons", lambda *args: []),
            (torch, "empty", empty),
        ):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        yield


def microseconds(call: Callable[[], object]) -> float:
    """Return the least time of a warm call."""
    call()
    return min(timeit.repeat(call, number=CALLS, repeat=REPEATS)) / CALLS * 1e6


def rows() -> Iterator[tuple[str, float, float | None]]:
    """Yield each op of `op_specs`, its forward and, if it has gradients, its backward, in microseconds."""
    for spec in op_specs():
        inputs = spec.make()
        for name in spec.gradients:
            inputs[name].requires_grad_()
        with nothing_runs():
            out = spec.call(inputs, "triton")
            forward = microseconds(lambda: spec.call(inputs, "triton"))  # noqa: B023 - called at once
            backward = None
            if spec.gradients:
                first = next(leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor))
                given, leaves = torch.ones_like(first), [inputs[name] for name in spec.gradients]
                backward = microseconds(
                    lambda: torch.autograd.grad(first, leaves, given, retain_graph=True)  # noqa: B023
                )
        yield spec.name, forward, backward


def report() -> Iterator[str]:
    """Yield the lines of a table: ops, and beside them an addition of PyTorch's and torchvision's NMS of 70 boxes.

    Raises:
        ValueError: Triton's interpreter is on, which binds nothing.
    """
    if backend.interpreter_enabled():
        raise ValueError("TRITON_INTERPRET: expected 0, as the interpreter does not bind launches, got 1")
    torch.set_num_threads(1)
    yield "| op | forward, us | backward, us |"
    yield "|---|---|---|"
    boxes, scores = torch.rand(70, 4), torch.rand(70)
    boxes[:, 2:] += 1
    for name, call in (
        ("an addition of PyTorch's", lambda: scores + scores),
        ("torchvision's NMS of 70 boxes, on the CPU", lambda: torchvision.ops.nms(boxes, scores, 0.5)),
    ):
        yield f"| {name} | {microseconds(call):.1f} | |"
    for name, forward, backward in rows():
        yield f"| {name} | {forward:.0f} | {'' if backward is None else f'{backward:.0f}'} |"
