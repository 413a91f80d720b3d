"""Counted work: the fewest bytes a case must move through memory and the operations it must do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Each input read once and each output written once, and the floating-point operations of the definition."""

    bytes: int
    flops: int = 0
