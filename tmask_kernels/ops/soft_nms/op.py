"""Soft-NMS: overlapping boxes are not removed, their scores are lowered. Letters: K boxes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...backend import check_no_transform, resolve, triton_reasons
from ...common.boxes import check_scored_boxes
from ...common.checks import check_choice, check_number, check_values
from ...common.ragged import RAGGED, first_rows
from ...namespace import custom_op
from .reference import soft_nms_reference


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    method: Literal["linear", "gaussian"] = "linear",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 1e-3,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Take boxes by falling score; each lowers the scores of those that are left by its IoU with them.

    boxes [K, 4] xyxy, scores [K] -> indices int64 [n], new scores float32 [n], both falling by new score. A score is
    multiplied by 1 - IoU where the IoU is strictly over `iou_threshold` ("linear"), or by exp(-IoU^2 / sigma)
    ("gaussian"). Taking ends at `score_threshold`: less is dropped, and so is NaN. Equal scores are taken by rising
    index; boxes that neither remove nor are removed in `nms` neither lower nor are lowered. The host waits once, for n.

    Errors: ValueError for a wrong shape, dtype or method, an iou_threshold outside 0..1, a sigma that is not positive,
    a score_threshold that is negative. Backends: triton, one program: for up to some thousand boxes; reference.
    Source: Bodla et al. 2017, equations 2 and 3, with its threshold strict.
    """
    check_no_transform("soft_nms", RAGGED)
    check_scored_boxes("soft_nms", boxes, scores, ("K",))
    check_values("soft_nms", "boxes", boxes)
    check_choice("soft_nms", "method", method, ("linear", "gaussian"))
    iou_threshold = check_number("soft_nms", "iou_threshold", iou_threshold, 0, 1)
    sigma = check_number("soft_nms", "sigma", sigma, above=0)
    score_threshold = check_number("soft_nms", "score_threshold", score_threshold, 0)
    reasons = {"triton": triton_reasons(boxes), "reference": []}
    args = boxes.detach(), scores.detach(), method == "gaussian", iou_threshold, sigma, score_threshold
    if resolve("soft_nms", backend, reasons, device=boxes.device) == "triton":
        from . import kernels

        indices, taken, count = kernels.soft_nms(*args)
    else:
        reference = _soft_nms_traced if torch.compiler.is_compiling() else soft_nms_reference
        indices, taken, count = reference(*args)
    indices, taken = first_rows(count, indices, taken)
    return indices, taken


@custom_op("soft_nms_reference")
def _soft_nms_traced(
    boxes: Tensor, scores: Tensor, gaussian: bool, iou_threshold: float, sigma: float, score_threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    return soft_nms_reference(boxes, scores, gaussian, iou_threshold, sigma, score_threshold)


@_soft_nms_traced.register_fake
def _(
    boxes: Tensor, scores: Tensor, gaussian: bool, iou_threshold: float, sigma: float, score_threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    indices = scores.new_empty(scores.shape, dtype=torch.int64)
    return indices, scores.new_empty(scores.shape, dtype=torch.float32), indices.new_empty(1)
