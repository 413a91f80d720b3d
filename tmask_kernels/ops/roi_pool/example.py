"""RoIPool of one map."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...common.spec import FEATURE_DTYPES, Inputs, OpSpec, normal, roi_inputs, square_boxes
from .op import roi_pool


def _roi_pool(x: Inputs, backend: str) -> Tensor:
    return roi_pool(x["features"], x["rois"], (7, 7), 0.25, valid=x.get("valid"), backend=backend)


def _map_inputs(layout: torch.memory_format = torch.channels_last) -> Inputs:
    """A map of 512 channels, and padded boxes [2, 7, 4]."""
    boxes = square_boxes(14, 90.0).view(2, 7, 4)
    maps = normal(2, 512, 25, 23).contiguous(memory_format=layout)
    return {"features": maps, "rois": boxes, "valid": torch.ones(2, 7, dtype=torch.bool)}


SPECS = (
    OpSpec(
        name="roi_pool",
        make=roi_inputs,
        call=_roi_pool,
        features=("features",),
        dtypes=FEATURE_DTYPES,
        gradients=("features",),
    ),
)

WIDE = {"_roi_pool_kernel": "load store", "_gather_kernel": "load store"}

BUDGETS = (
    OpSpec(
        name="roi_pool (channels_last)",
        make=_map_inputs,
        call=_roi_pool,
        features=("features",),
        dtypes=FEATURE_DTYPES,
        gradients=("features",),
        wide=WIDE,
    ),
    OpSpec(
        name="roi_pool (channels_last, no gradient)",
        make=_map_inputs,
        call=_roi_pool,
        features=("features",),
        dtypes=(torch.bfloat16,),
        wide=WIDE,
    ),
    OpSpec(
        name="roi_pool (contiguous)",
        make=partial(_map_inputs, torch.contiguous_format),
        call=_roi_pool,
        features=("features",),
        dtypes=(torch.float32, torch.bfloat16),
        gradients=("features",),
    ),
)
