"""RoIPool of one map."""

from __future__ import annotations

from torch import Tensor

from ...common.spec import FEATURE_DTYPES, Inputs, OpSpec, roi_inputs
from .op import roi_pool


def _roi_pool(x: Inputs, backend: str) -> Tensor:
    return roi_pool(x["features"], x["rois"], (7, 7), 0.25, backend=backend)


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
