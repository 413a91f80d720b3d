"""Keypoints from the heat maps of a keypoint head. Letters as in reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backend import resolve, triton_reasons
from ...common.checks import check_tensor, wrong
from ...namespace import custom_op
from .reference import decode_keypoints_reference

MAX_COLUMNS = 1023  # of a heat map in the kernel, which holds a row of it in registers


def decode_keypoints(
    heatmaps: Tensor, boxes: Tensor, valid: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Resize each heat map to its box and find the largest pixel. Not differentiable.

    A box of w x h pixels, each side at least 1, has a grid of ceil(w) x ceil(h) pixels. The map is resized to the grid
    as by `F.interpolate(mode="bicubic", align_corners=False)`. The keypoint is the centre of the largest pixel; among
    equal pixels the first in row-major order.

    Args:
        heatmaps: [N, D, K, H, W] logits, float16, bfloat16, float32 or float64: K keypoints of each of D boxes.
        boxes: [N, D, 4], xyxy in pixels.
        valid: [N, D] bool, the slots that hold a box. None: all slots.
        backend: triton, or reference, which serves float64 maps and then waits for the device.

    Returns:
        xy [N, D, K, 2] float32, in x (i + 0.5) w / ceil(w) + x1; and scores [N, D, K], the values there, float32
        (float64 for float64 maps). torchvision's `heatmaps_to_keypoints` returns the same. detectron2's score is
        relative to the softmax of the map: ``(scores - heatmaps.flatten(3).logsumexp(3)).exp()``. A side above 16,384
        pixels has a grid of 16,384 larger pixels. A box that is not valid, or has a coordinate or side that is NaN or
        infinite, gives zeros. A map with a cell that is NaN, infinite or beyond 1e37 gives xy 0 and the score NaN.

    Raises:
        ValueError: a shape, dtype or device is wrong.

    Sources: He et al., Mask R-CNN, 2017, section 5; Keys, 1981.
    """
    hint = " with H, W >= 1"
    check_tensor("decode_keypoints", "heatmaps", heatmaps, ("N", "D", "K", "H", "W"), "float", hint=hint)
    if min(heatmaps.shape[3:]) < 1:
        raise wrong("decode_keypoints", "heatmaps", f"float [N, D, K, H, W]{hint}", heatmaps)
    slots, device = heatmaps.shape[:2], heatmaps.device
    check_tensor("decode_keypoints", "boxes", boxes, (*slots, 4), "float", device=device)
    if valid is not None:
        check_tensor("decode_keypoints", "valid", valid, slots, "bool", device=device)
    heatmaps, boxes = heatmaps.detach(), boxes.detach().float()
    reasons: dict[str, list[str]] = {"triton": _triton_reasons(heatmaps, boxes), "reference": []}
    if resolve("decode_keypoints", backend, reasons, device=heatmaps.device) == "triton":
        from . import kernels

        return kernels.decode_keypoints(heatmaps, boxes, valid)
    return _decode_keypoints(heatmaps, boxes, valid)


def _triton_reasons(heatmaps: Tensor, boxes: Tensor) -> list[str]:
    reasons = triton_reasons(heatmaps, boxes)
    if heatmaps.dtype == torch.float64:
        reasons.append("computes in float32, not float64")
    if heatmaps.shape[4] > MAX_COLUMNS or heatmaps.shape[3] * heatmaps.shape[4] >= 2**31:
        reasons.append(f"serves heat maps of up to {MAX_COLUMNS} columns and 2^31 - 1 cells")
    return reasons


# One node of a compiled graph: the reference reads the size of each box.
@custom_op("decode_keypoints_reference")
def _decode_keypoints(heatmaps: Tensor, boxes: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    return decode_keypoints_reference(heatmaps, boxes, valid)


@_decode_keypoints.register_fake
def _(heatmaps: Tensor, boxes: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(heatmaps.dtype, torch.float32)
    return boxes.new_empty((*heatmaps.shape[:3], 2)), heatmaps.new_empty(heatmaps.shape[:3], dtype=dtype)
