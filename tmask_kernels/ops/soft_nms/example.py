"""Soft-NMS of one list."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from ...common.spec import Inputs, OpSpec, square_boxes, uniform
from .op import soft_nms


def _soft_nms_inputs() -> Inputs:
    return {"boxes": square_boxes(70, 60.0, min_size=12.0), "scores": uniform(70)}


def _soft_nms(x: Inputs, backend: str, **settings: Any) -> tuple[Tensor, ...]:
    return soft_nms(x["boxes"], x["scores"], backend=backend, **settings)


SPECS = (OpSpec(name="soft_nms", make=_soft_nms_inputs, call=_soft_nms, ragged=True),)

BUDGETS = tuple(
    OpSpec(name=f"soft_nms ({method})", make=_soft_nms_inputs, call=partial(_soft_nms, method=method))
    for method in ("linear", "gaussian")
)
