"""Boxes: coding relative to anchors, RPN proposals, detections. Letters: N images, A anchors, P proposals,
Cls foreground classes, D detections, H W sides of a map.

Boxes are xyxy in continuous pixels, float32, whatever the dtype of the maps. Order everywhere: score falling, then
index rising. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tmask_kernels.backend import resolve, triton_reasons
from tmask_kernels.ops._checks import check_device
from tmask_kernels.ops.boxes.anchors import AnchorSpec, level_strides
from tmask_kernels.ops.boxes.proposals import (
    class_candidates_reference,
    rpn_candidates_reference,
    select_best_reference,
)
from tmask_kernels.ops.boxes.reference import Weights, decode_boxes_reference, encode_boxes_reference
from tmask_kernels.ops.nms.op import backend_reasons, padded_nms

SCALE_CLAMP = math.log(1000 / 16)  # a 16-pixel anchor grows to 1,000 pixels at most; Faster R-CNN's choice


def encode_boxes(
    boxes: Tensor, anchors: Tensor, weights: Weights = (1.0, 1.0, 1.0, 1.0), *, backend: str | None = None
) -> Tensor:
    """Deltas (dx, dy, dw, dh) [..., 4] float32 that take anchors [..., 4] to boxes [..., 4] (broadcast).

    A pair in which a side is not over 0, as in padding, gives zeros (torchvision: NaN or inf). float64 boxes give
    float64, though Triton takes the weights in float32. What is encoded is a target of training, so Triton has no
    backward and refuses inputs that need a gradient; the reference is differentiable.
    Errors: ValueError for a last dimension other than 4 or several devices. Source: R-CNN (2014), appendix C.
    """
    _check_last("encode_boxes", boxes=boxes, anchors=anchors)
    check_device("encode_boxes", boxes.device, anchors=anchors)
    reasons = _coding_reasons(boxes, anchors)
    if torch.is_grad_enabled() and (boxes.requires_grad or anchors.requires_grad):
        reasons.append("encode_boxes has no Triton backward")
    dtype = _double_or_float(boxes)
    boxes, anchors = boxes.to(dtype), anchors.to(dtype)
    if _choose("encode_boxes", backend, reasons, boxes) == "triton":
        from tmask_kernels.ops.boxes import kernels

        return kernels.encode_boxes(boxes, anchors, [float(w) for w in weights])
    return encode_boxes_reference(boxes, anchors, weights)


def decode_boxes(
    deltas: Tensor,
    anchors: Tensor,
    *,
    weights: Weights = (1.0, 1.0, 1.0, 1.0),
    scale_clamp: float = SCALE_CLAMP,
    image_size: Sequence[int] | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Boxes [..., 4] float32 at deltas [..., 4] from anchors [..., 4] (broadcast); the inverse of `encode_boxes`.

    dw and dh are clamped from above only, at `scale_clamp`. With image_size, (height, width) or a tensor [N, 2] for
    boxes [N, ..., 4], coordinates are clipped to the image, after which infinite dx or dy give finite boxes. A NaN
    delta, or an infinite one times a side of 0, gives the box 0, 0, 0, 0. float64 deltas give float64, though Triton
    takes weights and scale_clamp in float32. Differentiable in the deltas (in the anchors too by the reference); a
    clipped coordinate or clamped scale has gradient 0.
    Errors: ValueError for a last dimension other than 4, an image_size that does not fit, or several devices.
    """
    _check_last("decode_boxes", deltas=deltas, anchors=anchors)
    size, sizes = _split_image_size(image_size, torch.broadcast_shapes(deltas.shape, anchors.shape))
    check_device("decode_boxes", deltas.device, anchors=anchors, image_size=sizes)
    reasons = _coding_reasons(deltas, anchors)
    if torch.is_grad_enabled() and anchors.requires_grad:
        reasons.append("the Triton backward gives no gradient to anchors")
    anchors = anchors.to(_double_or_float(deltas))
    if _choose("decode_boxes", backend, reasons, deltas) == "triton":
        from tmask_kernels.ops.boxes import kernels

        # The kernel reads half-precision deltas as they are.
        return kernels.decode_boxes(deltas, anchors, [float(w) for w in weights], scale_clamp, size, sizes)
    clip = size if sizes is None else sizes
    return decode_boxes_reference(deltas.to(anchors.dtype), anchors, weights, scale_clamp, clip)


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
    """The RPN's proposals: boxes [N, P, 4], probabilities [N, P] float32, counts [N] int64; P = post_nms_top_n.

    objectness: logits [N, A, H, W] of each level, any float dtype and layout; deltas: [N, 4A, H, W], anchor by anchor.
    image_sizes [N, 2]: height and width of each image inside the padding; padded_size: (height, width) with it, which
    decides the stride if the spec has none. Each level gives its pre_nms_top_n best logits, decoded, clipped to the
    image, without those with a side under min_size, a probability under score_threshold, or NaN; they go through NMS
    by level, and the best P of the image remain, zeros behind them. No gradient passes.
    Errors: ValueError for levels that do not fit the spec or one another. Source: Faster R-CNN (Ren et al. 2015).
    """
    _check_levels(objectness, deltas, image_sizes, spec)
    _check_at_least("rpn_proposals", 1, pre_nms_top_n=pre_nms_top_n, post_nms_top_n=post_nms_top_n)
    chosen = resolve("rpn_proposals", backend, backend_reasons(objectness[0]), device=objectness[0].device)
    strides = level_strides(spec, [(x.shape[2], x.shape[3]) for x in objectness], padded_size)
    limits = {"scale_clamp": SCALE_CLAMP, "min_size": float(min_size), "score_threshold": float(score_threshold)}
    with torch.no_grad():
        if chosen == "triton":
            from tmask_kernels.ops.boxes import kernels_candidates

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
    """The final detections: boxes [N, D, 4], scores [N, D] float32, labels [N, D] int64, counts [N] int64.

    class_scores [N, P, Cls]: probabilities of the foreground classes only; a label is the column, 0..Cls-1. boxes
    [N, P, Cls, 4], or [N, P, 1, 4] if all classes share them. valid [N, P] bool. image_sizes [N, 2]: height, width.
    Boxes are clipped to the image; those scoring over score_threshold with no side under min_size go through NMS by
    class, and the best D = max_detections of the image remain, zeros behind them. No gradient passes.
    Errors: ValueError for shapes that do not fit.
    """
    _check_detections(class_scores, boxes, valid, image_sizes)
    _check_at_least("detections", 1, max_detections=max_detections)
    chosen = resolve("detections", backend, backend_reasons(boxes), device=boxes.device)
    limits = {"score_threshold": float(score_threshold), "min_size": float(min_size)}
    with torch.no_grad():
        if chosen == "triton":
            from tmask_kernels.ops.boxes import kernels_candidates

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
    """NMS of the candidates' segments, then the best `limit` of each image, as `select_best_reference` gives them."""
    boxes, scores, valid = candidates  # [S, K, 4], [S, K], [S, K]
    most = min(limit, boxes.shape[1])
    kept, _ = padded_nms(boxes, scores, nms_threshold, valid=valid, max_output=most, backend=backend)
    if backend == "triton":
        from tmask_kernels.ops.boxes import kernels_select

        return kernels_select.select_best(boxes, scores, kept, images, limit, box_first)
    return select_best_reference(boxes, scores, kept, images, limit, box_first)


def _choose(name: str, backend: str | None, reasons: list[str], tensor: Tensor) -> str:
    return resolve(name, backend, {"triton": reasons, "reference": []}, device=tensor.device)


def _coding_reasons(coded: Tensor, anchors: Tensor) -> list[str]:
    """Why the coding kernels cannot serve boxes or deltas `coded`."""
    reasons = triton_reasons(coded, anchors)
    if coded.dtype == torch.float64 and coded.is_cuda:
        reasons.append("float64 runs in the interpreter only")
    return reasons


def _double_or_float(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _split_image_size(
    image_size: Sequence[int] | Tensor | None, shape: Sequence[int]
) -> tuple[tuple[int, int] | None, Tensor | None]:
    """One size (height, width) for boxes of `shape` [..., 4], or sizes [N, 2] for [N, ..., 4]."""
    if isinstance(image_size, Tensor):
        if len(shape) < 2 or image_size.shape != (shape[0], 2):
            expected = f"shape [{shape[0]}, 2]" if len(shape) > 1 else "(height, width) for a single box"
            raise ValueError(f"decode_boxes: image_size: expected {expected}, got a tensor {list(image_size.shape)}")
        return None, image_size
    if image_size is None:
        return None, None
    if not isinstance(image_size, Sequence) or len(image_size) != 2:
        raise ValueError(f"decode_boxes: image_size: expected (height, width) or a tensor [N, 2], got {image_size!r}")
    return (image_size[0], image_size[1]), None


def _check_last(name: str, **tensors: Tensor) -> None:
    for argument, tensor in tensors.items():
        if tensor.ndim == 0 or tensor.shape[-1] != 4 or not tensor.dtype.is_floating_point:
            raise ValueError(f"{name}: {argument}: expected float [..., 4], got {tensor.dtype} {list(tensor.shape)}")


def _check_at_least(name: str, least: int, **numbers: int) -> None:
    for argument, number in numbers.items():
        if number < least:
            raise ValueError(f"{name}: {argument}: expected at least {least}, got {number}")


def _check_levels(
    objectness: Sequence[Tensor], deltas: Sequence[Tensor], image_sizes: Tensor, spec: AnchorSpec
) -> None:
    L = len(spec.sizes)
    for argument, maps in (("objectness", objectness), ("deltas", deltas)):
        if len(maps) != L:
            raise ValueError(f"rpn_proposals: {argument}: expected {L} levels (AnchorSpec.sizes), got {len(maps)}")
    N = len(image_sizes)
    if image_sizes.shape != (N, 2):
        raise ValueError(f"rpn_proposals: image_sizes: expected shape [N, 2], got {list(image_sizes.shape)}")
    check_device("rpn_proposals", objectness[0].device, image_sizes=image_sizes)
    for level, (logits, delta, A) in enumerate(zip(objectness, deltas, spec.anchors_per_cell(), strict=True)):
        H, W = logits.shape[-2:]
        for argument, tensor, channels in (("objectness", logits, A), ("deltas", delta, 4 * A)):
            if tensor.shape != (N, channels, H, W):
                expected = f"shape {[N, channels, H, W]}"
                raise ValueError(f"rpn_proposals: {argument}[{level}]: expected {expected}, got {list(tensor.shape)}")
            check_device("rpn_proposals", objectness[0].device, **{f"{argument}[{level}]": tensor})


def _check_detections(class_scores: Tensor, boxes: Tensor, valid: Tensor, image_sizes: Tensor) -> None:
    if class_scores.ndim != 3:
        raise ValueError(f"detections: class_scores: expected [N, P, Cls], got {list(class_scores.shape)}")
    N, P, Cls = class_scores.shape
    if boxes.shape not in ((N, P, Cls, 4), (N, P, 1, 4)):
        raise ValueError(f"detections: boxes: expected {[N, P, Cls, 4]} or {[N, P, 1, 4]}, got {list(boxes.shape)}")
    if valid.shape != (N, P) or valid.dtype != torch.bool:
        raise ValueError(f"detections: valid: expected bool {[N, P]}, got {valid.dtype} {list(valid.shape)}")
    if image_sizes.shape != (N, 2):
        raise ValueError(f"detections: image_sizes: expected {[N, 2]}, got {list(image_sizes.shape)}")
    check_device("detections", boxes.device, class_scores=class_scores, valid=valid, image_sizes=image_sizes)
