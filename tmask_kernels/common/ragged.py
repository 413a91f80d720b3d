"""Results whose length depends on values. Only here does the host wait for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..namespace import custom_op

# The reason that these ops give when they refuse a function transform.
RAGGED = "the number of its results depends on values; padded_nms takes many lists of boxes"


def first_rows(count: Tensor, *rows: Tensor) -> list[Tensor]:
    """Return the first `count` (int64 [1]) entries of each of `rows`. The host waits for `count`."""
    if torch.compiler.is_compiling():
        return _first_traced(count, rows)
    length = int(count)
    return [tensor[:length] for tensor in rows]


@custom_op("first_rows")
def _first_traced(count: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    length = int(count)
    return [tensor[:length].clone() for tensor in rows]


@_first_traced.register_fake
def _(count: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    length = torch.library.get_ctx().new_dynamic_size()
    return [tensor.new_empty(length) for tensor in rows]
