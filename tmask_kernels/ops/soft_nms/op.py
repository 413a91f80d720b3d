"""Soft-NMS lowers the scores of overlapping boxes in place of removing the boxes. Letters: K boxes."""

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
    """Take boxes by falling score; each box that is taken lowers the scores of the remaining boxes by its IoU with
    them.

    The linear method multiplies a score by 1 - IoU if the IoU is above `iou_threshold`. The gaussian method multiplies
    each score by exp(-IoU^2 / sigma). Equal scores are taken by rising index. A box that neither removes boxes nor is
    removed in `nms` neither lowers scores nor has its score lowered. The host waits once, for the length of the output.

    Args:
        boxes: [K, 4] float, xyxy.
        scores: [K] float.
        method: linear or gaussian.
        iou_threshold: a number in 0..1, for the linear method.
        sigma: above 0, for the gaussian method.
        score_threshold: at least 0. Boxes whose lowered score is below it, or NaN, are dropped.
        backend: triton (one program, for up to some thousand boxes) or reference.

    Returns:
        indices [n] int64 and lowered scores [n] float32, both by falling lowered score.

    Raises:
        ValueError: a shape, dtype, method or number is wrong.

    Source: Bodla et al. 2017, equations 2 and 3, with a strict threshold.
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
