"""Results whose number depends on values: the one place where the host waits for a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..namespace import custom_op

# Why such an op refuses function transforms.
RAGGED = "the number of its results depends on values; padded_nms takes many lists of boxes"


def first_rows(count: Tensor, *rows: Tensor) -> list[Tensor]:
    """The first `count` [1] of each of `rows`. The host waits, since the length is asked for."""
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
