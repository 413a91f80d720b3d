"""The mask head's loss, one mask of it not valid."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...common.spec import FEATURE_DTYPES, Inputs, OpSpec, normal, uniform
from .op import mask_bce


def _mask_bce_inputs() -> Inputs:
    classes, valid = torch.tensor([0, 2, 1, 2, 0]), torch.tensor([True, True, False, True, True])
    return {"logits": 3 * normal(5, 3, 14, 14), "targets": uniform(5, 14, 14), "classes": classes, "valid": valid}


def _detector_inputs(layout: torch.memory_format = torch.contiguous_format) -> Inputs:
    """Masks of 28 x 28 cells of COCO's 80 classes and the background."""
    logits = torch.zeros(5, 81, 28, 28).contiguous(memory_format=layout)
    return {**_mask_bce_inputs(), "logits": logits, "targets": torch.zeros(5, 28, 28)}


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

BUDGETS = (
    OpSpec(
        name="mask_bce (contiguous)",
        make=_detector_inputs,
        call=_mask_bce,
        features=("logits",),
        dtypes=FEATURE_DTYPES,
        gradients=("logits",),
        wide={"_mask_bce_fwd_kernel": "load", "_mask_bce_bwd_kernel": "load store"},
    ),
    OpSpec(
        name="mask_bce (channels_last)",
        make=partial(_detector_inputs, torch.channels_last),
        call=_mask_bce,
        features=("logits",),
        dtypes=(torch.bfloat16,),
        gradients=("logits",),
        # Neighbours in the gradient belong to other channels: each is a load of its own.
        wide={"_mask_bce_fwd_kernel": "load", "_mask_bce_bwd_kernel": "store"},
    ),
)
