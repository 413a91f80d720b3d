"""Boxes to deltas and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.spec import Inputs, OpSpec, normal, square_boxes
from .op import decode_boxes, encode_boxes


def _coding_inputs() -> Inputs:
    anchors = square_boxes(2 * 33, 100.0, seed=1).view(2, 33, 4)
    return {"boxes": square_boxes(2 * 33, 100.0).view(2, 33, 4), "anchors": anchors, "deltas": 0.5 * normal(2, 33, 4)}


def _encode_boxes(x: Inputs, backend: str) -> Tensor:
    return encode_boxes(x["boxes"], x["anchors"], (10.0, 10.0, 5.0, 5.0), backend=backend)


def _decode_boxes(x: Inputs, backend: str) -> Tensor:
    return decode_boxes(x["deltas"], x["anchors"], image_size=(90, 80), backend=backend)


def _decode_into_images(x: Inputs, backend: str) -> Tensor:
    return decode_boxes(x["deltas"], x["anchors"], image_size=torch.tensor([[90, 80], [70, 80]]), backend=backend)


SPECS = (
    OpSpec(name="encode_boxes", make=_coding_inputs, call=_encode_boxes, features=("boxes", "anchors")),
    OpSpec(
        name="decode_boxes",
        make=_coding_inputs,
        call=_decode_boxes,
        features=("deltas", "anchors"),
        gradients=("deltas",),
    ),
)

BUDGETS = (
    SPECS[0],
    OpSpec(
        name="decode_boxes",
        make=_coding_inputs,
        call=_decode_into_images,
        features=("deltas",),
        dtypes=(torch.float32, torch.bfloat16),
        gradients=("deltas",),
    ),
)
