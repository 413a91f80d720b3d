"""Records what our launchers ask Triton to compile, on a driver that says it is an H100. Nothing is compiled or run.

Triton's interpreter goes around Triton's launcher, which turns Python arguments (tuples of tensors, strides, numbers
that specialise) into a signature. Here that launcher does so, for calls of the public ops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.host import FakeH100
from tmask_kernels import backend
from tmask_kernels.testing import OpSpec, op_specs

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Launch:
    """A variant of a kernel, as Triton's launcher hands it to the compiler.

    `signature` maps an argument to its type. `constants` and `attributes` map the path of an argument, or of a member
    of a tuple argument, to its constant value and to what is known of it. `options` are those that the launch names.
    """

    kernel: Any
    signature: Mapping[str, Any]
    constants: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    @property
    def key(self) -> str:
        """A text that two launches share only if they are of the same variant."""
        return str((self.kernel.fn.__module__, self.name, *list(vars(self).values())[1:]))

    def named_constants(self) -> dict[str, Any]:
        """The constant arguments by name."""
        return {self.kernel.arg_names[path[0]]: value for path, value in self.constants.items() if len(path) == 1}


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect the launches in the block, in order. CPU tensors pass for tensors of a GPU.

    No kernel writes its output, so an uninitialised tensor holds ones: indices and counts that stay in bounds.
    """
    launches: list[Launch] = []
    options: dict[str, Any] = {}
    run, empty = JITFunction.run, torch.empty

    def launch(self: JITFunction, *args: Any, warmup: bool = False, **kwargs: Any) -> None:
        options.clear()
        options.update({k: v for k, v in kwargs.items() if k not in self.arg_names and k != "grid" and v is not None})
        run(self, *args, warmup=True, **kwargs)

    def note(*, fn: Any, compile: Mapping[str, Any], **_: Any) -> bool:
        kernel, (attributes,) = fn.jit_function, compile["configs"]
        launches.append(Launch(kernel, compile["signature"], compile["constants"], attributes, dict(options)))
        return True  # for Triton: the kernel is compiled elsewhere, and nothing is to be launched

    with (
        mock.patch.object(JITFunction, "run", launch),
        mock.patch.object(knobs.runtime, "jit_cache_hook", note),
        mock.patch.object(driver, "_active", FakeH100()),
        mock.patch.object(backend, "_find_reasons", return_value=[]),
        mock.patch.object(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(1)),
    ):
        yield launches


def variants(run: Callable[[], object]) -> list[Launch]:
    """The different launches of `run`, each once, in order."""
    with recording() as launches:
        run()
    return list({launch.key: launch for launch in launches}.values())


def variants_of(spec: OpSpec, dtype: torch.dtype) -> list[Launch]:
    """The different launches of an op's case: its forward and, if it has gradients, its backward."""
    inputs = {k: v.to(dtype) if k in spec.features else v for k, v in spec.make().items()}
    for name in spec.gradients:
        inputs[name].requires_grad_()

    def run() -> None:
        out = spec.call(inputs, "triton")
        if spec.gradients:
            first = next(leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor))
            first.backward(torch.ones_like(first))

    return variants(run)


@dataclass(frozen=True)
class Case:
    """A recorded variant. `wide` names the accesses ("load", "store" or both) that must move 512 bytes a warp."""

    name: str
    launch: Launch
    wide: str = ""


@functools.cache
def cases(which: str = "BUDGETS") -> tuple[Case, ...]:
    """Every variant that the BUDGETS, or the SPECS, of the ops launch, named after the first case that launches it.

    Empty in a process with Triton's interpreter, where kernels cannot be compiled.
    """
    if backend.interpreter_enabled():
        return ()
    found: dict[str, Case] = {}
    for spec in op_specs(which):
        for dtype in spec.dtypes:
            launches = variants_of(spec, dtype)
            prefix = f"{spec.name} {DTYPES[dtype]}" if spec.features else spec.name
            for launch in launches:
                twins = [other for other in launches if other.name == launch.name]
                name = f"{prefix}: {launch.name.strip('_').removesuffix('_kernel')}{_difference(launch, twins)}"
                found.setdefault(launch.key, Case(name, launch, spec.wide.get(launch.name, "")))
    return tuple(found.values())


def _difference(launch: Launch, twins: Sequence[Launch]) -> str:
    """The constants by which a launch differs from other launches of its kernel in the same call."""
    constants = [twin.named_constants() for twin in twins]
    mine = {k: v for k, v in launch.named_constants().items() if any(other.get(k) != v for other in constants)}
    return "".join(f", {name}={value}" for name, value in mine.items())
