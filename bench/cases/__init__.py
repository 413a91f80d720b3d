"""The standard work: one file an op, with sizes, inputs, least bytes and flops, aims, peers and the check.

`pytest bench/cases/nms.py` measures one op. Letters: N images, K boxes of an image, C channels, S segments, H W sides
in pixels.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from bench.cases._model import CASES as MODEL_CASES
from bench.cases._model import ModelCase
from bench.cases._shared import Case, rois, sized
from bench.cases.decode_keypoints import KeypointCase
from bench.cases.focal_loss import FocalCase
from bench.cases.mask_bce import MaskLossCase
from bench.cases.match_anchors import MatchCase
from bench.cases.nms import NMSCase
from bench.cases.paste_masks import PasteCase
from bench.cases.proposals import RPNCase
from bench.cases.roi_align import RoICase

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
    "rois",
    "sized",
]

CASES: dict[str, Case] = {}
for _file in sorted(Path(__file__).parent.glob("[!_]*.py")):
    CASES |= getattr(importlib.import_module(f"{__name__}.{_file.stem}"), "CASES", {})
CASES |= MODEL_CASES
