"""What all cases share. Letters as in `bench.cases`."""

from __future__ import annotations

from typing import Protocol, TypeVar

from bench.machine import device

STRIDES = (4, 8, 16, 32, 64)  # P2 to P6
ITEM = {"fp32": 4, "bf16": 2, "fp16": 2, "-": 4}  # bytes of an element; "-": the op takes float32 only
IOU_FLOPS = 13  # two minima, two maxima, two differences, two clamps, three of the union, a division, a comparison


class Case(Protocol):
    """What all cases share."""

    @property
    def name(self) -> str:
        """As in the table of workloads."""

    def small(self: Self) -> Self:
        """The same work at a reduced size."""


Self = TypeVar("Self", bound=Case)


def sized(case: Self) -> tuple[Self, str]:
    """The case at the size for this machine, and which that is: "full" on a GPU, "reduced" on a CPU."""
    return (case, "full") if device().type == "cuda" else (case.small(), "reduced")
