"""Match anchors or proposals to ground truth. Letters: N images, A anchors, G ground-truth boxes (padded)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backend import resolve, triton_reasons, under_vmap
from ...common.checks import check_flag, check_number, check_tensor
from ...namespace import custom_op
from .reference import match_anchors_reference


def match_anchors(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    *,
    gt_crowd: Tensor | None = None,
    high: float,
    low: float,
    allow_low_quality: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the ground-truth box of each anchor. Not differentiable; float32; no host synchronisation.

    An anchor matches the valid box of highest IoU (the lowest index among equals) if that IoU is at least `high`. With
    `allow_low_quality`, an anchor that reaches the best IoU of any ground-truth box also matches its own best box. An
    IoU of 0 never matches; torchvision lets it match. An unmatched anchor with more than 0.7 of its area inside one
    crowd region is ignored. An IoU of 0 / 0 counts as 0.

    Args:
        anchors: [A, 4], or [N, A, 4] if each image has its own, xyxy.
        gt_boxes: [N, G, 4], xyxy.
        gt_valid: [N, G] bool, the real boxes.
        gt_crowd: [N, G] bool, the crowd regions, which are not valid boxes. None: no crowd rule.
        high: lowest IoU of a match.
        low: an anchor whose best IoU is below it is background.
        allow_low_quality: whether the best anchors of each ground-truth box match too.
        backend: triton or reference. Both need O(N (A + G)) memory.

    Returns:
        matches [N, A] int64: the index of the box, -1 for background (also without ground truth), -2 for ignored; and
        the best IoU [N, A] float32, 0 without ground truth.

    Raises:
        ValueError: shapes or dtypes do not fit, or not 0 <= low <= high <= 1.

    Source: Faster R-CNN (Ren et al. 2015), section 3.1.2.
    """
    _check(anchors, gt_boxes, gt_valid, gt_crowd)
    low, high = check_number("match_anchors", "low", low, 0, 1), check_number("match_anchors", "high", high, 0, 1)
    if not low <= high:
        raise ValueError(f"match_anchors: low, high: expected 0 <= low <= high <= 1, got {low}, {high}")
    allow_low_quality = check_flag("match_anchors", "allow_low_quality", allow_low_quality)
    reasons: dict[str, list[str]] = {"triton": triton_reasons(anchors, gt_boxes), "reference": []}
    chosen = resolve("match_anchors", backend, reasons, device=gt_boxes.device)
    if anchors.ndim == 2:
        anchors = anchors[None]
    anchors, gt_boxes = anchors.detach().float(), gt_boxes.detach().float()
    if chosen == "triton":
        from . import kernels

        return kernels.match_anchors(anchors, gt_boxes, gt_valid, gt_crowd, high, low, allow_low_quality)
    if torch.compiler.is_compiling() or under_vmap():
        return _match_anchors_traced(anchors, gt_boxes, gt_valid, gt_crowd, high, low, allow_low_quality)
    return match_anchors_reference(anchors, gt_boxes, gt_valid, gt_crowd, high, low, allow_low_quality)


# One node in a traced graph, where the reference's loop over ground truth would be unrolled, and one op for vmap, which
# refuses the reference's writes.
@custom_op("match_anchors_reference")
def _match_anchors_traced(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    gt_crowd: Tensor | None,
    high: float,
    low: float,
    allow_low_quality: bool,
) -> tuple[Tensor, Tensor]:
    return match_anchors_reference(anchors, gt_boxes, gt_valid, gt_crowd, high, low, allow_low_quality)


@_match_anchors_traced.register_fake
def _(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    gt_crowd: Tensor | None,
    high: float,
    low: float,
    allow_low_quality: bool,
) -> tuple[Tensor, Tensor]:
    N, A = gt_boxes.shape[0], anchors.shape[1]
    return anchors.new_empty(N, A, dtype=torch.int64), anchors.new_empty(N, A)


def _check(anchors: Tensor, gt_boxes: Tensor, gt_valid: Tensor, gt_crowd: Tensor | None) -> None:
    check_tensor("match_anchors", "gt_boxes", gt_boxes, ("N", "G", 4), "float")
    N, G, _ = gt_boxes.shape
    device, shared = gt_boxes.device, isinstance(anchors, Tensor) and anchors.ndim != 3
    hint = f" or [{N}, A, 4]" if shared else ""
    check_tensor(
        "match_anchors", "anchors", anchors, ("A", 4) if shared else (N, "A", 4), "float", device=device, hint=hint
    )
    check_tensor("match_anchors", "gt_valid", gt_valid, (N, G), "bool", device=device)
    if gt_crowd is not None:
        check_tensor("match_anchors", "gt_crowd", gt_crowd, (N, G), "bool", device=device)
