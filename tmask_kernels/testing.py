"""What a user needs to check a kernel: closeness, guarded buffers, seeded boxes, and a case of every op.

Truth is an op's reference in float64 on the same (already rounded) inputs. A kernel passes when both its largest and
its root-mean-square error stay under the tolerance of its output dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .common.spec import Inputs, OpSpec, op_specs, random_boxes

__all__ = [
    "GUARD",
    "TOLERANCES",
    "Inputs",
    "OpSpec",
    "Tolerance",
    "assert_close",
    "guarded",
    "op_specs",
    "poison",
    "poisoned_empty",
    "random_boxes",
]


@dataclass(frozen=True)
class Tolerance:
    """Bounds relative to the largest magnitude of the expected values (at least 1)."""

    max: float
    rms: float


# The one tolerance table. Half precision: one unit in the last place of the output, since accumulation is float32.
TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(max=1e-11, rms=1e-12),
    torch.float32: Tolerance(max=1e-5, rms=1e-6),
    torch.float16: Tolerance(max=2.0**-10, rms=2.0**-11),
    torch.bfloat16: Tolerance(max=2.0**-7, rms=2.0**-8),
}

GUARD = 256  # elements on either side of a guarded buffer; a multiple keeps 16-byte alignment for every dtype


def assert_close(actual: Tensor, expected: Tensor, *, tolerance: Tolerance | None = None, name: str = "value") -> None:
    """Assert that `actual` equals `expected` (any float dtype; float64 is best) within `tolerance`.

    The default tolerance is that of ``actual.dtype``; integer and bool tensors must be equal. NaN and inf must stand
    at the same places. Errors: AssertionError that names the worst coordinates.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.device == expected.device, f"{name}: device {actual.device}, expected {expected.device}"
    if not actual.dtype.is_floating_point:
        different = (actual != expected).nonzero()
        where = different[:5].tolist()
        assert not len(different), f"{name}: {len(different)} of {actual.numel()} differ, first at {where}"
        return
    if tolerance is None:
        tolerance = TOLERANCES[actual.dtype]
    a, e = actual.detach().double(), expected.detach().double()
    odd = ~(torch.isfinite(a) & torch.isfinite(e))
    same = (a == e) | (torch.isnan(a) & torch.isnan(e))
    wrong = (odd & ~same).nonzero()
    assert not len(wrong), f"{name}: {len(wrong)} non-finite values differ, first at {wrong[:5].tolist()}"
    error = torch.where(odd, 0.0, a - e).abs()
    if not error.numel():
        return
    scale = max(1.0, float(torch.where(odd, 0.0, e).abs().max()))
    worst, rms = float(error.max()), float(error.square().mean().sqrt())
    if worst <= tolerance.max * scale and rms <= tolerance.rms * scale:
        return
    top = error.flatten().topk(min(5, error.numel())).indices
    lines = [f"  at {tuple(int(i) for i in torch.unravel_index(j, error.shape))}: got {a.flatten()[j]:.8g}, "
             f"expected {e.flatten()[j]:.8g}" for j in top]  # fmt: skip
    bounds = f"max {tolerance.max * scale:.3g}, rms {tolerance.rms * scale:.3g}"
    raise AssertionError(f"{name}: max error {worst:.3g}, rms {rms:.3g} exceed {bounds}\n" + "\n".join(lines))


def poison(dtype: torch.dtype) -> float | int | bool:
    """The value an unwritten element holds: NaN for floats, the largest value for integers, True for bool."""
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max


def guarded(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """A copy of `tensor` (same strides, same requires_grad) on `device`, or its own, between poison in memory.

    A kernel that reads outside its bounds meets NaN, which the interpreter would not report by itself.
    """
    if not tensor.numel():
        return tensor.to(device)
    view, _ = _guarded_buffer(tuple(tensor.shape), tensor.stride(), tensor.dtype, device or tensor.device)
    view.copy_(tensor.detach())
    return view.requires_grad_(tensor.requires_grad)


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Inside the block `torch.empty` and `torch.empty_like` give poisoned memory between guard bands.

    On leaving it, a band that a kernel wrote to is an AssertionError. Outputs that a kernel did not fill keep the
    poison, so that any comparison finds them.
    """
    buffers: list[tuple[Tensor, int]] = []
    real_empty, real_empty_like = torch.empty, torch.empty_like

    def make(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        with mock.patch.object(torch, "empty", real_empty):
            view, buffer = _guarded_buffer(shape, strides, dtype, device)
        buffers.append((buffer, buffer.numel() - 2 * GUARD))
        return view

    def empty(*size: Any, **kwargs: Any) -> Tensor:
        like = real_empty(*size, **{**kwargs, "device": "meta"})
        device = torch.device(kwargs.get("device") or "cpu")
        if not like.numel() or device.type == "meta":
            return real_empty(*size, **kwargs)
        return make(tuple(like.shape), like.stride(), like.dtype, device)

    def empty_like(source: Tensor, **kwargs: Any) -> Tensor:
        like = real_empty_like(source, **{**kwargs, "device": "meta"})
        if not like.numel() or source.device.type == "meta":
            return real_empty_like(source, **kwargs)
        return make(tuple(like.shape), like.stride(), like.dtype, torch.device(kwargs.get("device") or source.device))

    with mock.patch.object(torch, "empty", empty), mock.patch.object(torch, "empty_like", empty_like):
        yield
    for buffer, inner in buffers:
        bad = torch.full((GUARD,), poison(buffer.dtype), dtype=buffer.dtype, device=buffer.device)
        for side, band in (("before", buffer[:GUARD]), ("after", buffer[GUARD + inner :])):
            clean = torch.equal(torch.nan_to_num(band, nan=-1.0), torch.nan_to_num(bad, nan=-1.0))
            assert clean, f"a kernel wrote outside its output: {side} a buffer of {inner} {buffer.dtype} elements"


def _guarded_buffer(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    inner = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    buffer = torch.full((inner + 2 * GUARD,), poison(dtype), dtype=dtype, device=device)
    return buffer.as_strided(shape, strides, storage_offset=GUARD), buffer
