"""Both focal losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...common.spec import FEATURE_DTYPES, Inputs, OpSpec, normal, uniform
from .op import sigmoid_focal_loss, softmax_focal_loss


def focal_inputs() -> Inputs:
    """Logits of 7 classes, a fifth of whose targets are 1."""
    return {"logits": 4 * normal(53, 7), "targets": (uniform(53, 7) < 0.2).float()}


def _bool_inputs() -> Inputs:
    x = focal_inputs()
    return {**x, "targets": x["targets"] > 0}


def _sigmoid_focal_loss(x: Inputs, backend: str, **settings: Any) -> Tensor:
    return sigmoid_focal_loss(x["logits"], x["targets"], backend=backend, **settings)


def _softmax_focal_inputs() -> Inputs:
    return {"logits": 3 * normal(29, 7), "labels": torch.arange(29) % 7}


def _softmax_focal_loss(x: Inputs, backend: str) -> Tensor:
    return softmax_focal_loss(x["logits"], x["labels"], backend=backend)


SPECS = (
    OpSpec(
        name="sigmoid_focal_loss",
        make=focal_inputs,
        call=_sigmoid_focal_loss,
        features=("logits",),
        dtypes=FEATURE_DTYPES,
        gradients=("logits",),
    ),
    OpSpec(
        name="softmax_focal_loss",
        make=_softmax_focal_inputs,
        call=_softmax_focal_loss,
        features=("logits",),
        dtypes=FEATURE_DTYPES,
        gradients=("logits",),
    ),
)


def _budget(
    name: str,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    *,
    make: Callable[[], Inputs] = focal_inputs,
    features: tuple[str, ...] = ("logits",),
    reduction: str = "sum",
    gamma: float = 2.0,
) -> OpSpec:
    return OpSpec(
        name=f"sigmoid_focal_loss ({name})",
        make=make,
        call=partial(_sigmoid_focal_loss, reduction=reduction, gamma=gamma),
        features=features,
        dtypes=tuple(dtypes),
        gradients=("logits",),
        wide={"_focal_fwd_kernel": "load" if reduction == "sum" else "load store", "_focal_bwd_kernel": "load store"},
    )


BUDGETS = (
    _budget("sum", FEATURE_DTYPES, features=("logits", "targets")),
    _budget("sum, fp32 targets"),
    _budget("sum, bool targets", make=_bool_inputs),
    _budget("sum, any gamma", features=("logits", "targets"), gamma=1.5),
    _budget("none", features=("logits", "targets"), reduction="none"),
)
