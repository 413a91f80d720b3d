"""RPN proposals and detections. Letters: N images, A anchors of a cell, P proposals, Cls foreground classes, D
detections, H W sides of a map.

Boxes are xyxy in continuous pixels, float32, whatever the dtype of the maps. Everything is ordered by falling score,
then by rising index. No function waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...backend import check_no_transform, resolve
from ...common.checks import check_list, check_number, check_size, check_tensor, check_whole
from ..anchors.op import check_spec
from ..anchors.reference import AnchorSpec, level_strides
from ..box_coding.op import SCALE_CLAMP
from ..nms.op import backend_reasons, padded_nms
from .reference import class_candidates_reference, rpn_candidates_reference, select_best_reference


def rpn_proposals(
    objectness: Sequence[Tensor],
    deltas: Sequence[Tensor],
    image_sizes: Tensor,
    spec: AnchorSpec,
    *,
    padded_size: tuple[int, int],
    pre_nms_top_n: int,
    post_nms_top_n: int,
    nms_threshold: float,
    min_size: float,
    score_threshold: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn the maps of the RPN into proposals. No gradient passes.

    Each level keeps its `pre_nms_top_n` best logits, decodes their boxes and clips them to the image. The function
    drops boxes with a side under `min_size`, a probability under `score_threshold`, or NaN. NMS runs level by level.
    Each image keeps its best P boxes.

    Args:
        objectness: logits [N, A, H, W] of each level, any float dtype and layout.
        deltas: [N, 4A, H, W] of each level, anchor by anchor.
        image_sizes: [N, 2], height and width of each image without padding.
        spec: the anchors.
        padded_size: (height, width) with padding. It decides the strides if `spec` has none.
        pre_nms_top_n: logits that a level keeps before NMS.
        post_nms_top_n: P.
        nms_threshold: IoU in 0..1.
        min_size: smallest side in pixels.
        score_threshold: lowest probability.
        backend: triton, torchvision (its NMS on the CPU) or reference.

    Returns:
        boxes [N, P, 4], probabilities [N, P] float32 and counts [N] int64. Zeros follow the last proposal.

    Raises:
        ValueError: the levels do not fit `spec` or one another.

    Source: Faster R-CNN (Ren et al. 2015).
    """
    check_no_transform("rpn_proposals", "it takes a batch of images itself")
    objectness, deltas = _check_levels(objectness, deltas, image_sizes, spec)
    padded_size = check_size("rpn_proposals", "padded_size", padded_size)
    pre_nms_top_n = check_whole("rpn_proposals", "pre_nms_top_n", pre_nms_top_n, 1)
    post_nms_top_n = check_whole("rpn_proposals", "post_nms_top_n", post_nms_top_n, 1)
    nms_threshold = check_number("rpn_proposals", "nms_threshold", nms_threshold, 0, 1)
    min_size = check_number("rpn_proposals", "min_size", min_size, 0)
    score_threshold = check_number("rpn_proposals", "score_threshold", score_threshold)
    objectness, deltas = [x.detach() for x in objectness], [x.detach() for x in deltas]  # no_grad keeps tangents
    chosen = resolve("rpn_proposals", backend, backend_reasons(objectness[0]), device=objectness[0].device)
    strides = level_strides(spec, [(x.shape[2], x.shape[3]) for x in objectness], padded_size)
    limits = {"scale_clamp": SCALE_CLAMP, "min_size": min_size, "score_threshold": score_threshold}
    with torch.no_grad():
        if chosen == "triton":
            from .kernels import candidates as kernels_candidates

            half_sides = [side for level in spec.half_sides for pair in level for side in pair]
            steps = [float(step) for pair in strides for step in pair]
            candidates = kernels_candidates.rpn_candidates(
                objectness, deltas, image_sizes, half_sides, steps, spec.offset, pre_nms_top_n, **limits
            )
        else:
            candidates = rpn_candidates_reference(
                objectness, deltas, image_sizes, spec, strides, top_n=pre_nms_top_n, **limits
            )
        boxes, scores, _, counts = _suppress_and_select(
            candidates, len(image_sizes), nms_threshold, post_nms_top_n, box_first=False, backend=chosen
        )
        return boxes, scores, counts


def detections(
    class_scores: Tensor,
    boxes: Tensor,
    *,
    valid: Tensor,
    image_sizes: Tensor,
    score_threshold: float,
    nms_threshold: float,
    max_detections: int,
    min_size: float = 0.01,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Select the final detections. No gradient passes.

    The function clips boxes to the image and drops boxes that do not score above `score_threshold` or have a side under
    `min_size`. NMS runs class by class. Each image keeps its best D boxes.

    Args:
        class_scores: [N, P, Cls] probabilities of the foreground classes.
        boxes: [N, P, Cls, 4], or [N, P, 1, 4] if all classes share a box.
        valid: [N, P] bool, the slots that hold a proposal.
        image_sizes: [N, 2], height and width of each image.
        score_threshold: a detection scores above it.
        nms_threshold: IoU in 0..1.
        max_detections: D.
        min_size: smallest side in pixels.
        backend: as of `rpn_proposals`.

    Returns:
        boxes [N, D, 4], scores [N, D] float32, labels [N, D] int64 and counts [N] int64. A label is a column of
        `class_scores`. Zeros follow the last detection.

    Raises:
        ValueError: the shapes do not fit.
    """
    _check_detections(class_scores, boxes, valid, image_sizes)
    class_scores, boxes = class_scores.detach(), boxes.detach()  # no_grad keeps tangents
    max_detections = check_whole("detections", "max_detections", max_detections, 1)
    score_threshold = check_number("detections", "score_threshold", score_threshold)
    nms_threshold = check_number("detections", "nms_threshold", nms_threshold, 0, 1)
    min_size = check_number("detections", "min_size", min_size, 0)
    chosen = resolve("detections", backend, backend_reasons(boxes), device=boxes.device)
    limits = {"score_threshold": score_threshold, "min_size": min_size}
    with torch.no_grad():
        if chosen == "triton":
            from .kernels import candidates as kernels_candidates

            candidates = kernels_candidates.class_candidates(class_scores, boxes, valid, image_sizes, **limits)
        else:
            candidates = class_candidates_reference(class_scores, boxes, valid, image_sizes, **limits)
        return _suppress_and_select(
            candidates, len(image_sizes), nms_threshold, max_detections, box_first=True, backend=chosen
        )


def _suppress_and_select(
    candidates: tuple[Tensor, Tensor, Tensor],
    images: int,
    nms_threshold: float,
    limit: int,
    *,
    box_first: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run NMS on the segments of the candidates, then `select_best_reference` or its kernel."""
    boxes, scores, valid = candidates  # [S, K, 4], [S, K], [S, K]
    most = min(limit, boxes.shape[1])
    kept, _ = padded_nms(boxes, scores, nms_threshold, valid=valid, max_output=most, backend=backend)
    if backend == "triton":
        from .kernels import select as kernels_select

        return kernels_select.select_best(boxes, scores, kept, images, limit, box_first)
    return select_best_reference(boxes, scores, kept, images, limit, box_first)


def _check_levels(
    objectness: Sequence[Tensor], deltas: Sequence[Tensor], image_sizes: Tensor, spec: AnchorSpec
) -> tuple[list[Tensor], list[Tensor]]:
    """Check the maps of all levels and return them as lists."""
    check_spec("rpn_proposals", spec)
    expected = f"{len(spec.sizes)} levels (AnchorSpec.sizes) of tensors [N, A, H, W]"
    objectness = check_list("rpn_proposals", "objectness", objectness, expected, len(spec.sizes))
    deltas = check_list("rpn_proposals", "deltas", deltas, expected.replace(" A,", " 4A,"), len(spec.sizes))
    check_tensor("rpn_proposals", "objectness[0]", objectness[0], ("N", "A", "H", "W"), "float")
    N, device = objectness[0].shape[0], objectness[0].device
    check_tensor("rpn_proposals", "image_sizes", image_sizes, (N, 2), device=device)
    for level, (logits, delta, A) in enumerate(zip(objectness, deltas, spec.anchors_per_cell(), strict=True)):
        check_tensor("rpn_proposals", f"objectness[{level}]", logits, (N, A, "H", "W"), "float", device=device)
        cells = logits.shape[2:]
        check_tensor("rpn_proposals", f"deltas[{level}]", delta, (N, 4 * A, *cells), "float", device=device)
    return objectness, deltas


def _check_detections(class_scores: Tensor, boxes: Tensor, valid: Tensor, image_sizes: Tensor) -> None:
    check_tensor("detections", "class_scores", class_scores, ("N", "P", "Cls"), "float")
    (N, P, Cls), device = class_scores.shape, class_scores.device
    shared = isinstance(boxes, Tensor) and boxes.ndim == 4 and boxes.shape[2] == 1
    hint = "" if shared else f" or [{N}, {P}, 1, 4]"
    check_tensor("detections", "boxes", boxes, (N, P, 1 if shared else Cls, 4), "float", device=device, hint=hint)
    check_tensor("detections", "valid", valid, (N, P), "bool", device=device)
    check_tensor("detections", "image_sizes", image_sizes, (N, 2), device=device)
