"""NMS of one list, by class, and of padded segments, few long ones too."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.spec import Inputs, OpSpec, square_boxes, uniform
from .op import batched_nms, nms, padded_nms


def _nms_inputs() -> Inputs:
    boxes = torch.stack([square_boxes(70, 60.0, seed=s, min_size=12.0) for s in (0, 1)])  # [2, 70, 4]
    valid = torch.arange(70)[None].expand(2, 70) < torch.tensor([[70], [41]])
    return {"boxes": boxes, "scores": uniform(2, 70), "valid": valid, "classes": torch.arange(70) % 3}


def _padded_nms(x: Inputs, backend: str) -> tuple[Tensor, ...]:
    return padded_nms(x["boxes"], x["scores"], 0.5, valid=x["valid"], max_output=40, backend=backend)


def _long_nms_inputs() -> Inputs:
    boxes = square_boxes(300, 100.0, min_size=12.0).view(2, 150, 4)
    return {"boxes": boxes, "scores": uniform(2, 150), "classes": torch.arange(150) % 3}


def _long_nms(x: Inputs, backend: str) -> tuple[Tensor, ...]:
    return padded_nms(x["boxes"], x["scores"], 0.5, max_output=150, backend=backend)


def _nms(x: Inputs, backend: str) -> Tensor:
    return nms(x["boxes"][0], x["scores"][0], 0.5, backend=backend)


def _batched_nms(x: Inputs, backend: str) -> Tensor:
    return batched_nms(x["boxes"][0], x["scores"][0], x["classes"], 0.5, backend=backend)


SPECS = (
    OpSpec(name="nms", make=_nms_inputs, call=_nms, ragged=True),
    OpSpec(name="batched_nms", make=_nms_inputs, call=_batched_nms, ragged=True),
    OpSpec(name="padded_nms", make=_nms_inputs, call=_padded_nms),
    OpSpec(name="padded_nms (long segments)", make=_long_nms_inputs, call=_long_nms),
)

BUDGETS = (*SPECS, OpSpec(name="batched_nms (long segments)", make=_long_nms_inputs, call=_batched_nms))
