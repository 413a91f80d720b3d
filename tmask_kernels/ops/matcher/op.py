"""Matching anchors or proposals to ground truth. Letters: N images, A anchors, G ground-truth boxes (padded)."""

from __future__ import annotations

import torch
from torch import Tensor

from tmask_kernels.backend import resolve, triton_reasons
from tmask_kernels.ops._checks import check_device
from tmask_kernels.ops.matcher.reference import match_anchors_reference


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
    if not 0 <= low <= high <= 1:
        raise ValueError(f"match_anchors: low, high: expected 0 <= low <= high <= 1, got {low}, {high}")
    reasons: dict[str, list[str]] = {"triton": triton_reasons(anchors, gt_boxes), "reference": []}
    chosen = resolve("match_anchors", backend, reasons, device=gt_boxes.device)
    if anchors.ndim == 2:
        anchors = anchors[None]
    anchors, gt_boxes = anchors.detach().float(), gt_boxes.detach().float()
    if chosen == "triton":
        from tmask_kernels.ops.matcher import kernels

        return kernels.match_anchors(anchors, gt_boxes, gt_valid, gt_crowd, high, low, allow_low_quality)
    if torch.compiler.is_compiling():
        return _match_anchors_traced(anchors, gt_boxes, gt_valid, gt_crowd, high, low, allow_low_quality)
    return match_anchors_reference(anchors, gt_boxes, gt_valid, gt_crowd, high, low, allow_low_quality)


# One node in a traced graph, where the reference's loop over ground truth would be unrolled.
@torch.library.custom_op("tmask::match_anchors_reference", mutates_args=())
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
    if gt_boxes.ndim != 3 or gt_boxes.shape[2] != 4:
        raise ValueError(f"match_anchors: gt_boxes: expected [N, G, 4], got {list(gt_boxes.shape)}")
    N, G, _ = gt_boxes.shape
    if anchors.ndim not in (2, 3) or anchors.shape[-1] != 4 or (anchors.ndim == 3 and len(anchors) != N):
        raise ValueError(f"match_anchors: anchors: expected [A, 4] or [{N}, A, 4], got {list(anchors.shape)}")
    for name, boxes in (("anchors", anchors), ("gt_boxes", gt_boxes)):
        if not boxes.dtype.is_floating_point:
            raise ValueError(f"match_anchors: {name}: expected a floating point dtype, got {boxes.dtype}")
    check_device("match_anchors", gt_boxes.device, anchors=anchors, gt_valid=gt_valid, gt_crowd=gt_crowd)
    for name, mask in (("gt_valid", gt_valid), ("gt_crowd", gt_crowd)):
        if mask is not None and (mask.shape != (N, G) or mask.dtype != torch.bool):
            raise ValueError(f"match_anchors: {name}: expected bool {[N, G]}, got {mask.dtype} {list(mask.shape)}")
