"""The mask head's loss, one mask of it not valid."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.spec import FEATURE_DTYPES, Inputs, OpSpec, normal, uniform
from .op import mask_bce


def _mask_bce_inputs() -> Inputs:
    classes, valid = torch.tensor([0, 2, 1, 2, 0]), torch.tensor([True, True, False, True, True])
    return {"logits": 3 * normal(5, 3, 14, 14), "targets": uniform(5, 14, 14), "classes": classes, "valid": valid}


def _mask_bce(x: Inputs, backend: str) -> Tensor:
    return mask_bce(x["logits"], x["classes"], x["targets"], valid=x["valid"], backend=backend)


SPECS = (
    OpSpec(
        name="mask_bce",
        make=_mask_bce_inputs,
        call=_mask_bce,
        features=("logits",),
        dtypes=FEATURE_DTYPES,
        gradients=("logits",),
    ),
)
