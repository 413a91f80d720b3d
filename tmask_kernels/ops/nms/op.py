"""Non-maximum suppression (NMS). Letters: S segments, K boxes of a segment, M outputs of a segment.

All functions and all backends follow the same rules:

- Boxes are taken by falling score. Equal scores are taken by rising index. A NaN score sorts last.
- A kept box removes every later box whose IoU with it is above the threshold. An IoU equal to the threshold keeps both.
- IoU and threshold are float32, with IEEE division. The sides of the overlap are clamped at 0; the areas are not. No
  side gets `+ 1`.
- A box with a NaN score removes no other box. A box with a NaN or infinite coordinate, without area, or inverted,
  neither removes a box nor is removed.

No function is differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...backend import check_no_transform, resolve, triton_reasons, under_vmap
from ...common.boxes import check_scored_boxes
from ...common.checks import DTYPES, check_number, check_tensor, check_values, check_whole
from ...common.ragged import RAGGED, first_rows
from ...namespace import custom_op
from .cpu import padded_nms_torchvision
from .reference import padded_nms_reference


def padded_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float | Tensor,
    *,
    valid: Tensor | None = None,
    max_output: int,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """NMS of many segments at once. The output has a fixed shape, and the host never waits for the device.

    Args:
        boxes: [S, K, 4] float, xyxy.
        scores: [S, K] float.
        iou_threshold: a number in 0..1, or a tensor [S] with one threshold a segment. The values of a tensor are not
            checked.
        valid: [S, K] bool, the slots that hold a box. None: all slots.
        max_output: M, the largest number of boxes that a segment keeps.
        backend: triton, reference, or torchvision (its CPU kernel, segment by segment).

    Returns:
        indices [S, M] int64 into K, by falling score, padded with -1; and counts [S] int64.

    Raises:
        ValueError: a shape or dtype is wrong, or the threshold is outside 0..1.

    Source: the greedy algorithm of Felzenszwalb et al. 2010, section 7.2.
    """
    check_scored_boxes("padded_nms", boxes, scores, ("S", "K"))
    if valid is not None:
        check_tensor("padded_nms", "valid", valid, scores.shape, "bool", device=boxes.device)
    max_output = check_whole("padded_nms", "max_output", max_output, 0)
    return _padded_nms("padded_nms", boxes, scores, iou_threshold, valid, None, max_output, backend)


def nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    *,
    max_output: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """NMS of one list of boxes. The host waits once, for the length of the output.

    Args:
        boxes: [K, 4] float, xyxy. An empty tensor may have any dtype, as torchvision allows.
        scores: [K] float.
        iou_threshold: a number in 0..1.
        max_output: the largest number of boxes to keep. None: no limit.
        backend: as of `padded_nms`.

    Returns:
        Indices [kept] int64, by falling score.

    Raises:
        ValueError: as of `padded_nms`, and for tensors on the meta device.
    """
    check_no_transform("nms", RAGGED)
    boxes, scores = _any_if_empty(boxes, width=4), _any_if_empty(scores)
    check_scored_boxes("nms", boxes, scores, ("K",))
    check_values("nms", "boxes", boxes)
    limit = _limit("nms", max_output, len(scores))
    indices, counts = _padded_nms("nms", boxes[None], scores[None], iou_threshold, None, None, limit, backend)
    return first_rows(counts, indices[0])[0]


def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    iou_threshold: float,
    *,
    max_output: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """NMS in which two boxes compete only if their entries of `idxs` are equal. The host waits once.

    The entries are compared as integers. Shifting the coordinates of each class, as torchvision does, mixes classes at
    negative coordinates.

    Args:
        boxes: [K, 4] float, xyxy. An empty tensor may have any dtype, as torchvision allows.
        scores: [K] float.
        idxs: [K] integer, for example the class or the pyramid level of each box.
        iou_threshold: a number in 0..1.
        max_output: the largest number of boxes to keep in all. None: no limit.
        backend: as of `padded_nms`.

    Returns:
        Indices [kept] int64, by falling score.

    Raises:
        ValueError: as of `nms`.
    """
    check_no_transform("batched_nms", RAGGED)
    boxes, scores = _any_if_empty(boxes, width=4), _any_if_empty(scores)
    idxs = _any_if_empty(idxs, "integer", torch.int64)
    check_scored_boxes("batched_nms", boxes, scores, ("K",))
    check_values("batched_nms", "boxes", boxes)
    check_tensor("batched_nms", "idxs", idxs, scores.shape, "integer", device=boxes.device)
    limit = _limit("batched_nms", max_output, len(scores))
    groups = idxs.long()[None]  # [1, K]
    indices, counts = _padded_nms("batched_nms", boxes[None], scores[None], iou_threshold, None, groups, limit, backend)
    return first_rows(counts, indices[0])[0]


def _padded_nms(
    name: str,
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float | Tensor,
    valid: Tensor | None,
    groups: Tensor | None,
    max_output: int,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    backend = resolve(name, backend, backend_reasons(boxes), device=boxes.device)
    boxes, scores = boxes.detach(), scores.detach()
    thresholds = _thresholds(name, iou_threshold, boxes)  # [S]
    if backend == "triton":
        from .kernels import padded as kernels

        return kernels.padded_nms(boxes, scores, thresholds, valid, groups, max_output)
    if backend == "torchvision":
        return padded_nms_torchvision(boxes, scores, thresholds, valid, groups, max_output)
    if torch.compiler.is_compiling():
        return _padded_nms_traced(boxes, scores, thresholds, valid, groups, max_output)
    return padded_nms_reference(boxes, scores, thresholds, valid, groups, max_output)


# One node in a traced graph, where the reference's loop over K boxes would be unrolled.
@custom_op("padded_nms_reference")
def _padded_nms_traced(
    boxes: Tensor, scores: Tensor, thresholds: Tensor, valid: Tensor | None, groups: Tensor | None, max_output: int
) -> tuple[Tensor, Tensor]:
    return padded_nms_reference(boxes, scores, thresholds, valid, groups, max_output)


@_padded_nms_traced.register_fake
def _(
    boxes: Tensor, scores: Tensor, thresholds: Tensor, valid: Tensor | None, groups: Tensor | None, max_output: int
) -> tuple[Tensor, Tensor]:
    S = boxes.shape[0]
    return boxes.new_empty(S, max_output, dtype=torch.int64), boxes.new_empty(S, dtype=torch.int64)


def backend_reasons(boxes: Tensor) -> dict[str, list[str]]:
    """Map each backend to the reasons why it cannot serve these boxes."""
    return {"triton": triton_reasons(boxes), "reference": [], "torchvision": _torchvision_reasons(boxes)}


def _torchvision_reasons(boxes: Tensor) -> list[str]:
    from torch._subclasses.fake_tensor import FakeTensor

    if boxes.device.type != "cpu":
        return ["it serves CPU tensors only"]
    if torch.compiler.is_compiling() or isinstance(boxes, FakeTensor):
        return ["its per-segment loop reads values, which tracing has not"]
    if under_vmap():
        return ["its per-segment loop reads values, which torch.func.vmap hides; backend='reference' can"]
    return []


def _thresholds(name: str, iou_threshold: float | Tensor, boxes: Tensor) -> Tensor:
    """Return one float32 threshold a segment: [S]."""
    S = boxes.shape[0]
    if isinstance(iou_threshold, Tensor):
        shape = iou_threshold.shape and (S,)  # or no axis
        # To move it from another device would be a wait.
        check_tensor(name, "iou_threshold", iou_threshold, shape, device=boxes.device)
        return iou_threshold.detach().float().expand(S)
    threshold = check_number(name, "iou_threshold", iou_threshold, 0, 1)
    return torch.full((S,), threshold, dtype=torch.float32, device=boxes.device)


def _any_if_empty(
    tensor: Tensor, kind: str = "float", dtype: torch.dtype = torch.float32, width: int | None = None
) -> Tensor:
    """Return `tensor`, or an empty tensor that the checks accept if `tensor` has no rows.

    An empty tensor of a dtype outside `kind` becomes one of `dtype`. ``torch.tensor([])`` becomes 0 rows of `width`.
    """
    if isinstance(tensor, Tensor) and tensor.ndim > 0:
        # Ask for the dtype first: in a traced graph the question for the length would be a guard.
        if tensor.dtype not in DTYPES[kind] and len(tensor) == 0:
            tensor = tensor.new_empty(tensor.shape, dtype=dtype)
        if width is not None and tensor.ndim == 1 and len(tensor) == 0:
            tensor = tensor.new_empty(0, width)
    return tensor


def _limit(name: str, max_output: int | None, count: int) -> int:
    if max_output is None:
        return count
    return min(check_whole(name, "max_output", max_output, 0), count)
