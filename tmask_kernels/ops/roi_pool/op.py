"""RoIPool of one feature map. Letters as in `reference`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...backend import first_derivative_only, resolve, triton_reasons
from ...common.boxes import boxes_as_tensor, check_features, check_image_indices, is_traced
from ...common.checks import check_number, check_size
from .reference import listed_boxes, roi_pool_reference

INT32_LIMIT = 2**31

# Cells on either side of 0 that torchvision, which counts them as int32, is asked for: float32 is exact up to here.
MAX_TORCHVISION_CELL = 2.0**23


def roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    *,
    valid: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Take the largest cell of a feature map in each bin of each box: [K, C, PH, PW].

    input [N, C, H, W], fp16, bf16, fp32 or fp64, contiguous or channels_last. boxes, xyxy in image pixels: [K, 5] with
    the image's index first, a list of N tensors [L, 4], or [N, P, 4] with `valid` [N, P] bool (then K = N * P).
    spatial_scale: feature cells per pixel.

    Corners are rounded to whole cells, halves away from zero, and both belong to the box, which has at least one cell
    along each axis. Bins reach from floor to ceil of their share, so neighbours may share a cell. They are cut at the
    map's border: a bin with no cell left is 0. NaN cells are passed over; a bin without a cell above -inf is -inf. A
    box that is not valid, has a coordinate that is NaN or infinite, or names an image that does not exist gives zeros;
    the last is a ValueError where it can be seen without a synchronisation (eager mode on the CPU).

    Boxes are fp32 for every input, so that all dtypes take the same cells; the result has the input's dtype and, on
    CUDA, its memory format. Differentiable in `input`: the gradient goes to the bin's largest cell, the first of equals
    in row-major order, and is summed in fp32 (fp64 for fp64 input). The boxes are rounded and take none.
    Errors: ValueError for a wrong shape, dtype, device or option. Source: Fast R-CNN (Girshick 2015), section 2.1.
    """
    size = check_size("roi_pool", "output_size", output_size, or_number=True)
    scale = check_number("roi_pool", "spatial_scale", spatial_scale, above=0)
    check_features("roi_pool", [input], "input")
    boxes = boxes_as_tensor("roi_pool", input, boxes, valid)
    traced = is_traced(input)
    if boxes.dim() == 2 and boxes.device.type == "cpu" and not traced:
        check_image_indices("roi_pool", boxes, input.shape[0])
    boxes = boxes.detach().float()

    torchvision, triton = _torchvision_reasons(input, traced), _triton_reasons(input, boxes)
    reasons: dict[str, list[str]] = {"triton": triton, "reference": [], "torchvision": torchvision}
    chosen = resolve("roi_pool", backend, reasons, device=input.device, differentiable=True)
    if chosen == "triton":
        from .kernels import forward as kernels

        keep_index = torch.is_grad_enabled() and input.requires_grad
        return kernels.roi_pool(input, boxes, valid, size[0], size[1], scale, keep_index)[0]
    pool = roi_pool_reference if chosen == "reference" else _roi_pool_torchvision
    return pool(input, boxes, valid, size, scale)


def _roi_pool_torchvision(
    feature: Tensor, boxes: Tensor, valid: Tensor | None, size: tuple[int, int], scale: float
) -> Tensor:
    """As `roi_pool_reference`, by torchvision's CPU op with our edges; boxes that give zeros cost nothing."""
    import torchvision  # noqa: F401 - registers the op

    images, corners, usable = listed_boxes(boxes, valid, feature.shape[0], scale)
    near = (corners * scale).abs().amax(1) < MAX_TORCHVISION_CELL
    rows, far = (usable & near).nonzero()[:, 0], (usable & ~near).nonzero()[:, 0]
    rois = torch.cat([images[:, None].float(), corners], 1)  # [K, 5]
    maps = first_derivative_only("roi_pool", "torchvision", feature.float())  # its CPU op has no half precision
    values, index = torch.ops.torchvision.roi_pool(maps, rois[rows], scale, *size)
    # It begins with the lowest finite number, and leaves it where nothing is above.
    values = torch.where((index < 0) & (values < 0), -torch.inf, values)
    if len(far):
        values = torch.cat([values, roi_pool_reference(maps, rois[far], None, size, scale)])
        rows = torch.cat([rows, far])
    if len(rows) < len(rois) or len(far):
        values = values.new_zeros(len(rois), *values.shape[1:]).index_copy(0, rows, values)
    return values.to(feature.dtype)


def _torchvision_reasons(feature: Tensor, traced: bool) -> list[str]:
    reasons = []
    if feature.device.type != "cpu":
        reasons.append("serves CPU tensors only")
    if feature.dtype == torch.float64:
        reasons.append("rounds the bins of float64 features in float64, which may be other cells")
    if not feature.numel() or feature.numel() >= INT32_LIMIT:
        reasons.append("serves maps of 1 to 2^31 - 1 elements")
    if traced:
        reasons.append("selects rows by value, which cannot be traced")
    return reasons


def _triton_reasons(feature: Tensor, boxes: Tensor) -> list[str]:
    reasons = triton_reasons(feature, boxes)
    if feature.dtype == torch.float64 and feature.device.type == "cuda":
        reasons.append("float64 features run in the interpreter only")
    if feature.shape[2] * feature.shape[3] >= INT32_LIMIT:
        reasons.append("serves maps of up to 2^31 - 1 cells")
    return reasons
