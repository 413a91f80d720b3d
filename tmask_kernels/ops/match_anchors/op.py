"""Matching anchors or proposals to ground truth. Letters: N images, A anchors, G ground-truth boxes (padded)."""

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
    """For each anchor its ground truth: matches [N, A] int64 and its best IoU [N, A] float32 (0 without any).

    anchors [A, 4], or [N, A, 4] if each image has its own; gt_boxes [N, G, 4]; gt_valid [N, G] bool marks real boxes;
    gt_crowd [N, G] bool marks crowd regions, which are not valid. A match is the index of the ground truth of highest
    IoU, the lowest of equals, if that IoU is at least `high`; -1, background, if it is under `low` or there is no
    ground truth; else -2, ignored. With allow_low_quality every anchor that reaches the best IoU of some ground truth
    is matched too, to its own best ground truth. A best of 0 never matches (torchvision lets it). An unmatched anchor
    with over 0.7 of its area inside one crowd is ignored. An IoU of 0 / 0 is 0. Float32; not differentiable; memory
    O(N (A + G)); no host synchronisation.

    Errors: ValueError for shapes or dtypes that do not fit, or unless 0 <= low <= high <= 1.
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
