"""Anchors of two images matched to their ground truth, crowds and padding among it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...common.spec import Inputs, OpSpec, square_boxes
from .op import match_anchors


def _match_inputs() -> Inputs:
    gt = torch.stack([square_boxes(5, 100.0, seed=s, min_size=10.0) for s in (3, 4)])  # [2, 5, 4]
    kind = torch.tensor([[0, 0, 0, 1, 2], [0, 2, 2, 2, 2]])  # real, crowd, padding
    return {"anchors": square_boxes(150, 100.0, min_size=8.0), "gt": gt, "valid": kind == 0, "crowd": kind == 1}


def _match_anchors(x: Inputs, backend: str, crowds: bool = True, low_quality: bool = True) -> tuple[Tensor, ...]:
    return match_anchors(
        x["anchors"],
        x["gt"],
        x["valid"],
        gt_crowd=x["crowd"] if crowds else None,
        high=0.6,
        low=0.3,
        allow_low_quality=low_quality,
        backend=backend,
    )


SPECS = (OpSpec(name="match_anchors", make=_match_inputs, call=_match_anchors),)

BUDGETS = (
    OpSpec(name="match_anchors (crowds)", make=_match_inputs, call=_match_anchors),
    OpSpec(name="match_anchors", make=_match_inputs, call=partial(_match_anchors, crowds=False)),
    OpSpec(
        name="match_anchors (no low quality)",
        make=_match_inputs,
        call=partial(_match_anchors, crowds=False, low_quality=False),
    ),
)
