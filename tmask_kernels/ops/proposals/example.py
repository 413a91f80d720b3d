"""The RPN's proposals from two levels, and the detections of three classes."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.spec import FEATURE_DTYPES, Inputs, OpSpec, normal, square_boxes, uniform
from ..anchors.reference import AnchorSpec
from .op import detections, rpn_proposals

ANCHORS = AnchorSpec(sizes=((16.0,), (32.0,)), aspect_ratios=(0.5, 1.0, 2.0), strides=(8, 16))
MAPS = ("logits3", "logits4", "deltas3", "deltas4")


def _proposal_inputs() -> Inputs:
    return {
        "logits3": normal(2, 3, 9, 11),
        "logits4": normal(2, 3, 5, 6, seed=1),
        "deltas3": 0.3 * normal(2, 12, 9, 11, seed=2),
        "deltas4": 0.3 * normal(2, 12, 5, 6, seed=3),
        "sizes": torch.tensor([[70, 85], [64, 60]]),
    }


def _rpn_proposals(x: Inputs, backend: str) -> tuple[Tensor, ...]:
    return rpn_proposals(
        [x["logits3"], x["logits4"]],
        [x["deltas3"], x["deltas4"]],
        x["sizes"],
        ANCHORS,
        padded_size=(72, 88),
        pre_nms_top_n=60,
        post_nms_top_n=40,
        nms_threshold=0.7,
        min_size=1e-3,
        score_threshold=0.0,
        backend=backend,
    )


def _detection_inputs() -> Inputs:
    boxes = torch.stack([square_boxes(20 * 3, 60.0, seed=s, min_size=12.0).view(20, 3, 4) for s in (5, 6)])
    valid = torch.arange(20)[None].expand(2, 20) < torch.tensor([[20], [13]])
    return {"scores": uniform(2, 20, 3), "boxes": boxes, "valid": valid, "sizes": torch.tensor([[60, 60], [50, 55]])}


def _detections(x: Inputs, backend: str) -> tuple[Tensor, ...]:
    return detections(
        x["scores"],
        x["boxes"],
        valid=x["valid"],
        image_sizes=x["sizes"],
        score_threshold=0.1,
        nms_threshold=0.5,
        max_detections=25,
        backend=backend,
    )


SPECS = (
    OpSpec(name="rpn_proposals", make=_proposal_inputs, call=_rpn_proposals, features=MAPS, dtypes=FEATURE_DTYPES),
    OpSpec(name="detections", make=_detection_inputs, call=_detections),
)
