"""Both focal losses."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.spec import FEATURE_DTYPES, Inputs, OpSpec, normal, uniform
from .op import sigmoid_focal_loss, softmax_focal_loss


def focal_inputs() -> Inputs:
    """Logits of 7 classes, a fifth of whose targets are 1."""
    return {"logits": 4 * normal(53, 7), "targets": (uniform(53, 7) < 0.2).float()}


def _sigmoid_focal_loss(x: Inputs, backend: str) -> Tensor:
    return sigmoid_focal_loss(x["logits"], x["targets"], backend=backend)


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
