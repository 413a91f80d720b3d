"""Which implementation serves a call: Triton kernel, torchvision op or the PyTorch reference.

Every public op takes ``backend=None | "auto" | "triton" | "torchvision" | "reference"``. ``None`` means the default:
the innermost `use_backend`, else the environment variable ``TMASK_BACKEND``, else ``"auto"``. An op lists, for each
backend it has, the reasons why that backend cannot serve this call; `resolve` picks from those lists. Nothing is
patched and nothing falls back in silence.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import machine

BACKENDS = ("auto", "triton", "torchvision", "reference")

# A plain global, not a ContextVar: torch.compile guards on it and retraces when it changes.
_default_backend: str | None = None


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Make `backend` the default of every op inside the ``with`` block.

    Errors: ValueError if `backend` is none of ``BACKENDS``.
    """
    global _default_backend
    _check_name("use_backend: backend", backend)
    before, _default_backend = _default_backend, backend
    try:
        yield
    finally:
        _default_backend = before


def default_backend() -> str:
    """The backend an op uses when it is called with ``backend=None``."""
    if _default_backend is not None:
        return _default_backend
    name = _environment_backend()
    _check_name("environment variable TMASK_BACKEND", name)
    return name


def interpreter_enabled() -> bool:
    """Whether ``TRITON_INTERPRET=1`` runs Triton kernels on the CPU, one program after another."""
    return _environment_interpreter() in ("1", "true", "True")


def triton_reasons(*tensors: Tensor) -> list[str]:
    """Why the Triton kernels cannot run on these tensors, apart from what a single op adds. Empty if they can."""
    devices = dict.fromkeys((t.device.type, t.device.index or 0) for t in tensors)
    return [reason for device, index in devices for reason in _device_reasons(device, index)]


# How ``auto`` tries backends on a CUDA device, and elsewhere: torchvision's kernels wait for the host on the one, and
# Triton's are interpreted on the other.
_ON_CUDA, _ELSEWHERE = ("triton", "reference", "torchvision"), ("torchvision", "reference", "triton")


def resolve(
    op: str,
    backend: str | None,
    reasons: Mapping[str, Sequence[str]],
    *,
    device: torch.device,
    differentiable: bool = False,
) -> str:
    """Name the backend that serves this call of `op`.

    `reasons` maps each backend the op has to the reasons why it cannot serve this call. ``auto`` takes the first with
    none, in the order of `device`; on a CUDA device it warns once when that is not Triton. An explicit backend that the
    op lacks, or that has reasons, is a ValueError that lists them. A default from `use_backend` or the environment
    holds for many ops, so one that lacks it says so once and goes on as ``auto``.

    differentiable: whether the op has derivatives. Under PyTorch's function transforms the reference alone has them: a
    custom op drops the tangents of forward mode. There another explicit backend is a NotImplementedError.
    """
    order = _ON_CUDA if device.type == "cuda" else _ELSEWHERE
    reasons = {candidate: reasons[candidate] for candidate in order if candidate in reasons}
    name = default_backend() if backend is None else backend
    _check_name(f"{op}: backend", name)
    if backend is None and name != "auto" and name not in reasons:
        _warn_lacking(op, name)
        name = "auto"
    if differentiable and (active := active_transforms()):
        why = f"it has no rule for {' of '.join(active)}"
        if name not in ("auto", "reference"):
            raise NotImplementedError(f"{op}: backend={name!r} cannot serve this call: {why}; backend='reference' can")
        reasons = {key: why_not if key == "reference" else [*why_not, why] for key, why_not in reasons.items()}
    if name != "auto":
        if name not in reasons:
            raise ValueError(f"{op}: backend={name!r} does not exist for this op; it has {', '.join(reasons)}")
        if reasons[name]:
            raise ValueError(f"{op}: backend={name!r} cannot serve this call: {'; '.join(reasons[name])}")
        return name
    for candidate, why_not in reasons.items():
        if not why_not:
            if device.type == "cuda" and candidate != "triton":
                _warn_fallback(op, candidate, "; ".join(reasons.get("triton", ["it has no Triton kernel yet"])))
            return candidate
    listed = "; ".join(f"{candidate}: {', '.join(why_not)}" for candidate, why_not in reasons.items())
    raise ValueError(f"{op}: no backend can serve this call: {listed}")


def _check_name(where: str, name: str) -> None:
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"{where}: expected one of {', '.join(BACKENDS)}, got {name!r}")


_TRANSFORMS = {"Vmap": "torch.func.vmap", "Grad": "torch.func.grad or vjp", "Jvp": "torch.func.jvp"}


def active_transforms() -> tuple[str, ...]:
    """PyTorch's function transforms around this call, outermost first; empty in nearly every call.

    Dual tensors count as one; torch.func.jvp, which is made of them, counts once.
    """
    # Read here and not in the constant below: torch.compile guards on it.
    dual = forward_ad._current_level >= 0
    names = _interpreters()
    return ("torch.autograd.forward_ad", *names) if dual and _TRANSFORMS["Jvp"] not in names else names


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _interpreters() -> tuple[str, ...]:
    stack = torch._C._functorch.get_interpreter_stack() or ()
    kinds = [interpreter.key().name for interpreter in stack]
    return tuple(_TRANSFORMS[kind] for kind in kinds if kind in _TRANSFORMS)


def under_vmap() -> bool:
    """Whether torch.func.vmap is active, inside which no value of a tensor can be read."""
    return _TRANSFORMS["Vmap"] in active_transforms()


def check_no_transform(op: str, why: str, *, vmap_alone: bool = True) -> None:
    """That no function transform, or not vmap, is active. Errors: NotImplementedError that says why `op` cannot serve.

    For ops that no backend can run inside a transform.
    """
    active = active_transforms()
    if active and (not vmap_alone or under_vmap()):
        raise NotImplementedError(f"{op}: no backend= has a rule for {' of '.join(active)}: {why}")


def no_second_derivative(op: str, backend: str = "triton") -> Callable[..., Any]:
    """The backward to register for the custom op that computes the first derivative of `op`: it raises."""

    def backward(ctx: object, *gradients: object) -> None:
        raise NotImplementedError(f"{op}: backend={backend!r} has no second derivative; backend='reference' has one")

    return backward


def first_derivative_only(op: str, backend: str, tensor: Tensor) -> Tensor:
    """`tensor`, whose gradient cannot be differentiated again: of ops that are not ours."""
    return _FirstDerivativeOnly.apply(tensor, op, backend, 1)


class _FirstDerivativeOnly(torch.autograd.Function):
    """The identity; its backward is the identity of order 2, whose backward raises."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, op: str, backend: str, order: int) -> Tensor:
        ctx.arguments, ctx.order = (op, backend), order
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.order == 2:
            no_second_derivative(*ctx.arguments)(ctx)
        return _FirstDerivativeOnly.apply(grad, *ctx.arguments, 2), None, None, None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _environment_backend() -> str:
    return os.environ.get("TMASK_BACKEND") or "auto"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _environment_interpreter() -> str:
    return os.environ.get("TRITON_INTERPRET", "")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _device_reasons(device: str, index: int) -> list[str]:
    return _find_reasons(device, index, interpreter_enabled())


@functools.cache
def _find_reasons(device: str, index: int, interpreted: bool) -> list[str]:
    """Why the Triton kernels cannot run on one device. Cached, so that a call of an op costs nothing."""
    if device not in ("cpu", "cuda"):
        return [f"no Triton kernels for device type {device!r}; backend='auto' takes the reference"]
    found = [machine.triton_fault()]
    if device == "cpu" and not interpreted and found == [None]:
        found = ["CPU tensor without the Triton interpreter (set TRITON_INTERPRET=1 before Python starts)"]
        found.append(machine.torch_build_fault())
    elif device == "cuda" and not interpreted and found == [None]:
        found = [machine.gpu_reason(index)]
    return [reason for reason in found if reason]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _warn_lacking(op: str, name: str) -> None:
    _warn_lacking_once(op, name)


@functools.cache
def _warn_lacking_once(op: str, name: str) -> None:
    warnings.warn(f"{op}: has no {name} backend, taking what auto takes", stacklevel=4)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _warn_fallback(op: str, candidate: str, why: str) -> None:
    _warn_once(op, candidate, why)


@functools.cache
def _warn_once(op: str, candidate: str, why: str) -> None:
    warnings.warn(f"{op}: using the {candidate} backend on CUDA, not triton: {why}", stacklevel=4)
