"""Heat maps to keypoints."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.spec import FEATURE_DTYPES, Inputs, OpSpec, normal
from .op import decode_keypoints


def _keypoint_inputs() -> Inputs:
    """A box larger than its map, a smaller one, one beyond every corner, and a slot that is not valid."""
    rows = [[3.2, 1.1, 30.7, 19.4], [5.0, 3.5, 9.3, 8.0], [-20.0, -7.0, 1.5, 6.0], [0.0, 0.0, 9.0, 9.0]]
    valid = torch.tensor([[True, True], [True, False]])
    return {"heatmaps": 3 * normal(2, 2, 2, 6, 7), "boxes": torch.tensor(rows).view(2, 2, 4), "valid": valid}


def _decode_keypoints(x: Inputs, backend: str) -> tuple[Tensor, Tensor]:
    return decode_keypoints(x["heatmaps"], x["boxes"], x["valid"], backend=backend)


def _detector_inputs() -> Inputs:
    """The 17 keypoints of COCO in maps of 56 x 56 cells."""
    return {"heatmaps": normal(2, 3, 17, 56, 56), "boxes": torch.rand(2, 3, 4), "valid": torch.ones(2, 3) > 0}


def _channels_last_inputs() -> Inputs:
    inputs = _detector_inputs()
    maps = inputs["heatmaps"].flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return {**inputs, "heatmaps": maps.view(2, 3, 17, 56, 56)}


SPECS = (
    OpSpec(
        name="decode_keypoints",
        make=_keypoint_inputs,
        call=_decode_keypoints,
        features=("heatmaps",),
        dtypes=FEATURE_DTYPES,
    ),
)

BUDGETS = (
    OpSpec(
        name="decode_keypoints (contiguous)",
        make=_detector_inputs,
        call=_decode_keypoints,
        features=("heatmaps",),
        dtypes=FEATURE_DTYPES,
        wide={"_decode_keypoints_kernel": "load"},
    ),
    OpSpec(
        name="decode_keypoints (channels_last)",
        make=_channels_last_inputs,
        call=_decode_keypoints,
        features=("heatmaps",),
        dtypes=(torch.bfloat16,),
    ),
)
