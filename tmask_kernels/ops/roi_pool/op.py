"""RoIPool of one feature map. `reference` defines the letters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...backend import first_derivative_only, resolve, triton_reasons
from ...common.boxes import boxes_as_tensor, check_features, check_image_indices, is_traced
from ...common.checks import check_number, check_size
from .reference import listed_boxes, roi_pool_reference

INT32_LIMIT = 2**31

# torchvision counts cells as int32. Boxes with a corner beyond this cell, up to which float32 is exact, go elsewhere.
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
    """Return the largest cell of the feature map in each bin of each box.

    The op rounds the corners of a box to whole cells, halves away from zero. Both corners belong to the box, so a box
    has at least one cell along each axis. A bin reaches from the floor to the ceiling of its share, so neighbouring
    bins may share a cell. The op cuts bins at the border of the map. Boxes are float32 for every input, so that all
    dtypes select the same cells.

    Args:
        input: features [N, C, H, W]: float16, bfloat16, float32 or float64, contiguous or channels_last.
        boxes: xyxy in image pixels: [K, 5] with the image's index first, a list of N tensors [L, 4], or [N, P, 4].
        output_size: number of bins (PH, PW), or one number for both.
        spatial_scale: feature cells per pixel.
        valid: bool [N, P], only with boxes [N, P, 4].
        backend: "triton", "torchvision", "reference", "auto", or None for the default.

    Returns:
        [K, C, PH, PW] in the dtype of `input` and, on CUDA, in its memory format; K = N * P for boxes [N, P, 4]. A bin
        without a cell is 0. The op ignores NaN cells; a bin without a cell above -inf is -inf. A box gives zeros if it
        is not valid, has a NaN or infinite coordinate, or names an image that does not exist.

        The result is differentiable in `input`, not in `boxes`. The gradient of a bin goes to its largest cell, the
        first among equals in row-major order. Sums of gradients are float32, or float64 for float64 input.

    Raises:
        ValueError: wrong shape, dtype, device or option. On a CPU in eager mode also for an image that does not exist.

    Source: Fast R-CNN (Girshick 2015), section 2.1.
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
    """Same as `roi_pool_reference`, by torchvision's CPU op. Boxes that give zeros never reach that op."""
    import torchvision  # noqa: F401 - registers the op

    images, corners, usable = listed_boxes(boxes, valid, feature.shape[0], scale)
    near = (corners * scale).abs().amax(1) < MAX_TORCHVISION_CELL
    rows, far = (usable & near).nonzero()[:, 0], (usable & ~near).nonzero()[:, 0]
    rois = torch.cat([images[:, None].float(), corners], 1)  # [K, 5]
    # torchvision's CPU op has no half precision.
    maps = first_derivative_only("roi_pool", "torchvision", feature.float())
    values, index = torch.ops.torchvision.roi_pool(maps, rois[rows], scale, *size)
    # torchvision's op starts from the lowest finite number and returns it where no cell is larger.
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
