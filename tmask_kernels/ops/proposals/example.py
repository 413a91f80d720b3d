"""The RPN's proposals from two levels, and the detections of three classes."""

from __future__ import annotations

from functools import partial

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


def _rpn_proposals(x: Inputs, backend: str, anchors: AnchorSpec = ANCHORS) -> tuple[Tensor, ...]:
    return rpn_proposals(
        [x[name] for name in x if name.startswith("logits")],
        [x[name] for name in x if name.startswith("deltas")],
        x["sizes"],
        anchors,
        padded_size=(72, 88),
        pre_nms_top_n=60,
        post_nms_top_n=40,
        nms_threshold=0.7,
        min_size=1e-3,
        score_threshold=0.0,
        backend=backend,
    )


PYRAMID = AnchorSpec(
    sizes=((32.0,), (64.0,), (128.0,), (256.0,), (512.0,)), aspect_ratios=(0.5, 1.0, 2.0), strides=(4, 8, 16, 32, 64)
)


def _pyramid_inputs() -> Inputs:
    """The five levels of a detector."""
    sizes = [(18, 22), (9, 11), (5, 6), (3, 3), (2, 2)]
    logits = {f"logits{i}": normal(2, 3, *size) for i, size in enumerate(sizes)}
    deltas = {f"deltas{i}": normal(2, 12, *size) for i, size in enumerate(sizes)}
    return {**logits, **deltas, "sizes": torch.tensor([[70, 85], [64, 60]])}


def _detection_inputs() -> Inputs:
    boxes = torch.stack([square_boxes(20 * 3, 60.0, seed=s, min_size=12.0).view(20, 3, 4) for s in (5, 6)])
    valid = torch.arange(20)[None].expand(2, 20) < torch.tensor([[20], [13]])
    return {"scores": uniform(2, 20, 3), "boxes": boxes, "valid": valid, "sizes": torch.tensor([[60, 60], [50, 55]])}


def _detections(x: Inputs, backend: str, first: int = 0) -> tuple[Tensor, ...]:
    return detections(
        x["scores"][..., first:],
        x["boxes"][:, :, first:],
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

BUDGETS = (
    OpSpec(
        name="rpn_proposals",
        make=_pyramid_inputs,
        call=partial(_rpn_proposals, anchors=PYRAMID),
        features=tuple(f"{kind}{level}" for kind in ("logits", "deltas") for level in range(5)),
        dtypes=FEATURE_DTYPES[:2],
    ),
    OpSpec(
        name="detections",
        make=_detection_inputs,
        call=partial(_detections, first=1),  # the scores are a softmax without its first column
        features=("scores",),
        dtypes=FEATURE_DTYPES[:2],
    ),
)
