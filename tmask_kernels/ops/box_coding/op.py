"""Box coding: a box relative to an anchor, and back. Boxes are xyxy in continuous pixels, float32."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...backend import resolve, triton_reasons
from ...common.checks import check_number, check_numbers, check_size, check_tensor, wrong
from .reference import Weights, decode_boxes_reference, encode_boxes_reference

SCALE_CLAMP = math.log(1000 / 16)  # a 16-pixel anchor grows to 1,000 pixels at most; Faster R-CNN's choice


def encode_boxes(
    boxes: Tensor, anchors: Tensor, weights: Weights = (1.0, 1.0, 1.0, 1.0), *, backend: str | None = None
) -> Tensor:
    """Return the deltas (dx, dy, dw, dh) that take anchors to boxes.

    Args:
        boxes: [..., 4] float, xyxy.
        anchors: [..., 4] float, xyxy; broadcasts with `boxes`.
        weights: four numbers above 0 that multiply dx, dy, dw and dh.
        backend: triton or reference. Triton has no backward and refuses inputs that need a gradient, since deltas are
            targets of training. The reference is differentiable.

    Returns:
        [..., 4] float32; float64 for float64 boxes (Triton still takes the weights in float32). A pair in which a side
        is not above 0, such as padding, gives zeros; torchvision gives NaN or inf.

    Raises:
        ValueError: a last dimension is not 4, or the tensors are on several devices.

    Source: R-CNN (2014), appendix C.
    """
    check_tensor("encode_boxes", "boxes", boxes, ("...", 4), "float")
    _check_pair("encode_boxes", "boxes", boxes, anchors)
    weights = check_numbers("encode_boxes", "weights", weights, 4, above=0)
    reasons = _coding_reasons(boxes, anchors)
    if torch.is_grad_enabled() and (boxes.requires_grad or anchors.requires_grad):
        reasons.append("encode_boxes has no Triton backward")
    dtype = _double_or_float(boxes)
    boxes, anchors = boxes.to(dtype), anchors.to(dtype)
    if _choose("encode_boxes", backend, reasons, boxes) == "triton":
        from . import kernels

        return kernels.encode_boxes(boxes, anchors, weights)
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
    """Return the boxes at given deltas from anchors; the inverse of `encode_boxes`.

    Args:
        deltas: [..., 4] float: dx, dy, dw, dh.
        anchors: [..., 4] float, xyxy; broadcasts with `deltas`.
        weights: four numbers above 0, as of `encode_boxes`.
        scale_clamp: the largest dw and dh. There is no lower bound.
        image_size: (height, width), or a tensor [N, 2] for boxes [N, ..., 4]: clips the boxes to the image. Clipping
            makes boxes of an infinite dx or dy finite. None: no clipping.
        backend: triton or reference. Only the reference gives a gradient to the anchors.

    Returns:
        [..., 4] float32; float64 for float64 deltas (Triton still takes weights and scale_clamp in float32). A NaN
        delta, or an infinite delta times a side of 0, gives the box 0, 0, 0, 0. A clipped coordinate and a clamped
        scale have gradient 0. A value equal to its bound passes its gradient.

    Raises:
        ValueError: a last dimension is not 4, `image_size` does not fit, or the tensors are on several devices.
    """
    check_tensor("decode_boxes", "deltas", deltas, ("...", 4), "float")
    shape = _check_pair("decode_boxes", "deltas", deltas, anchors)
    weights = check_numbers("decode_boxes", "weights", weights, 4, above=0)
    scale_clamp = check_number(
        "decode_boxes", "scale_clamp", scale_clamp, 0, math.inf, expected="a number of at least 0"
    )
    size, sizes = _split_image_size(image_size, shape, deltas.device)
    reasons = _coding_reasons(deltas, anchors)
    if torch.is_grad_enabled() and anchors.requires_grad:
        reasons.append("the Triton backward gives no gradient to anchors")
    anchors = anchors.to(_double_or_float(deltas))
    if _choose("decode_boxes", backend, reasons, deltas) == "triton":
        from . import kernels

        # The kernel reads half-precision deltas as they are.
        return kernels.decode_boxes(deltas, anchors, weights, scale_clamp, size, sizes)
    clip = size if sizes is None else sizes
    return decode_boxes_reference(deltas.to(anchors.dtype), anchors, weights, scale_clamp, clip)


def _choose(name: str, backend: str | None, reasons: list[str], tensor: Tensor) -> str:
    return resolve(name, backend, {"triton": reasons, "reference": []}, device=tensor.device, differentiable=True)


def _coding_reasons(coded: Tensor, anchors: Tensor) -> list[str]:
    """Return why the kernels cannot serve `coded`, the boxes or the deltas."""
    reasons = triton_reasons(coded, anchors)
    if coded.dtype == torch.float64 and coded.is_cuda:
        reasons.append("float64 runs in the interpreter only")
    return reasons


def _double_or_float(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _split_image_size(
    image_size: Sequence[int] | Tensor | None, shape: Sequence[int], device: torch.device
) -> tuple[tuple[int, int] | None, Tensor | None]:
    """Return one size (height, width), or the sizes [N, 2] for boxes of `shape` [N, ..., 4]."""
    if isinstance(image_size, Tensor):
        if len(shape) < 2:
            raise wrong("decode_boxes", "image_size", "(height, width) for a single box", image_size)
        check_tensor("decode_boxes", "image_size", image_size, (shape[0], 2), device=device)
        return None, image_size
    return None if image_size is None else check_size("decode_boxes", "image_size", image_size), None


def _check_pair(name: str, argument: str, coded: Tensor, anchors: Tensor) -> torch.Size:
    """Check `anchors` beside `coded`, the tensor of `argument`; return the shape that both broadcast to."""
    check_tensor(name, "anchors", anchors, ("...", 4), "float", device=coded.device)
    try:
        return torch.broadcast_shapes(coded.shape, anchors.shape)
    except RuntimeError:
        expected = f"a shape that broadcasts with the {argument} {list(coded.shape)}"
        raise wrong(name, "anchors", expected, anchors) from None
