"""The cases of an op, which its `example.py` lists for `tmask validate`, the compile budgets and the tests."""

from __future__ import annotations

import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Inputs = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """A seeded case of an op: `make` returns its inputs, `call(inputs, backend)` its outputs.

    `make` works on the CPU in float32, so that every backend, dtype and machine sees the same numbers. Outputs are a
    tensor, a tuple or a list. An `example.py` lists such cases twice:

    - `SPECS` are computed. Their sizes are odd and small: Triton's interpreter runs one program after another.
    - `BUDGETS` are compiled, never computed: a row of docs/compile-budgets.md for each kernel variant that they launch.
      They have the channels, bins and levels of a detector, and as few boxes and cells as possible.
    """

    name: str  # the public function, and in brackets what sets this case apart
    make: Callable[[], Inputs]
    call: Callable[[Inputs, str], Any]
    features: tuple[str, ...] = ()  # inputs that take the dtype under test, and are float64 in the truth
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    gradients: tuple[str, ...] = ()  # inputs that take gradients
    ragged: bool = False  # the length of the result depends on values: the host waits for the device
    # Of BUDGETS: kernel to "load", "store" or "load store", the accesses that must be 512 bytes a warp.
    wide: Mapping[str, str] = field(default_factory=dict)


def op_specs(which: str = "SPECS") -> tuple[OpSpec, ...]:
    """Return the SPECS, or the BUDGETS, of every op folder that has an `example.py`, sorted by folder."""
    from .. import ops

    found: list[OpSpec] = []
    for folder in pkgutil.iter_modules(ops.__path__, f"{ops.__name__}."):
        if importlib.util.find_spec(f"{folder.name}.example"):
            found += getattr(importlib.import_module(f"{folder.name}.example"), which, ())
    return tuple(found)


def random_boxes(
    count: int,
    *,
    height: float,
    width: float,
    min_size: float = 1.0,
    max_size: float | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """`count` xyxy boxes [count, 4] float32 inside height x width, sides log-uniform in min_size..max_size pixels."""
    generator = torch.Generator().manual_seed(seed)
    top = torch.tensor([width, height]) if max_size is None else torch.full((2,), float(max_size))
    top = torch.minimum(top, torch.tensor([width, height], dtype=torch.float32))
    low = torch.full((2,), float(min_size))
    sides = low * (top / low) ** torch.rand(count, 2, generator=generator)
    corner = torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) - sides)
    return torch.cat([corner, corner + sides], dim=1).to(device)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Seeded normal numbers, float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    """Seeded numbers in 0..1, float32."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def square_boxes(count: int, side: float, *, seed: int = 0, min_size: float = 2.0) -> Tensor:
    """Seeded boxes [count, 4] in a square image."""
    return random_boxes(count, height=side, width=side, min_size=min_size, seed=seed)


def roi_inputs() -> Inputs:
    """Two maps of stride 4, and seven boxes [K, 5] in them."""
    index = torch.tensor([0, 1, 0, 1, 1, 0, 0.0])
    rois = torch.cat([index[:, None], square_boxes(7, 90.0, min_size=8.0)], dim=1)
    return {"features": normal(2, 5, 25, 23), "rois": rois}
