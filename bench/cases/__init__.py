"""The standard work, W1 to W14, each a named, seeded case. Letters: N images, K boxes of an image, C channels,
S segments, H W sides in pixels.

A case says what the work is, makes inputs that look like a detector's, and counts the fewest bytes and the operations
of the definition; `small` is the same work at a size that a CPU, and Triton's interpreter, does in a moment. RoIs have
log-uniform scales, varied aspect and stand in clusters around a few objects, as proposals do: uniform boxes would
touch far more distinct feature cells, and NMS would remove almost none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bench.cases.case import Case, sized
from bench.cases.focal_loss import FocalCase
from bench.cases.keypoints import KeypointCase
from bench.cases.masks import MaskLossCase, PasteCase
from bench.cases.matcher import MatchCase
from bench.cases.model import ModelCase
from bench.cases.nms import NMSCase, Segments
from bench.cases.proposals import RPNCase
from bench.cases.roi_align import RoICase, count_touched, rois
from bench.cases.roi_pool import RoIPoolCase

__all__ = [
    "CASES",
    "Case",
    "FocalCase",
    "KeypointCase",
    "MaskLossCase",
    "MatchCase",
    "ModelCase",
    "NMSCase",
    "PasteCase",
    "RPNCase",
    "RoICase",
    "RoIPoolCase",
    "Segments",
    "count_touched",
    "rois",
    "sized",
]

_W1 = RoICase(name="W1", rois=1024)
_W3 = RoICase(name="W3", images=1, rois=1000)
_MAP: dict[str, Any] = {
    "images": 1, "height": 1024, "width": 1024, "strides": (4,), "channels": 512, "rois": 512, "clustered": False,
}  # fmt: skip
_W4 = RoICase(name="W4-ratio2", **_MAP)
_IMAGE_LEVELS = (2000, 2000, 2000, 2000, 819)  # P6 has 13 x 21 cells of 3 anchors


def _long_list(name: str, boxes: int, kept: float) -> NMSCase:
    return NMSCase(name=name, kind="list", lengths=(boxes,), threshold=0.5, keep=boxes, kept=kept)


_ALL: Sequence[Case] = (
    _W1,
    replace(_W1, name="W1b"),
    RoICase(name="W2", rois=256, pooled=14),
    _W3,
    replace(_W3, name="W3-bicubic", interpolation="bicubic"),
    replace(_W3, name="W3-max", reduction="max"),
    _W4,
    replace(_W4, name="W4-ratio0", sampling_ratio=0),
    RoIPoolCase(name="W4-pool", **_MAP),
    NMSCase(name="W5", kind="levels", lengths=_IMAGE_LEVELS * 2, threshold=0.7, keep=1000, kept=0.36),
    NMSCase(name="W6", kind="classes", lengths=(1000,) * 80, threshold=0.5, keep=100, kept=0.01),
    _long_list("W7-1k", 1_000, 0.3),
    _long_list("W7-10k", 10_000, 0.3),
    _long_list("W7-100k", 100_000, 0.3),
    _long_list("W7-1M", 1_000_000, 0.3),
    _long_list("W7-10k-dense", 10_000, 0.03),
    RPNCase(name="W8"),
    MatchCase(name="W9"),
    PasteCase(name="W10"),
    PasteCase(name="W10-detectron2", convention="detectron2"),
    FocalCase(name="W11", rows=2, columns=268_569, positives=0.001),
    FocalCase(name="W11-head", rows=1024, columns=80, positives=1 / 80),
    MaskLossCase(name="W13-masks"),
    ModelCase(name="W12-b1", images=1),
    ModelCase(name="W12-b8", images=8),
    ModelCase(name="W13-b2", images=2, training=True),
    ModelCase(name="W13-b16", images=16, training=True),
    KeypointCase(name="W14"),
)

CASES: dict[str, Case] = {case.name: case for case in _ALL}
