"""Training targets of a mask head: ground-truth bit masks cropped to RoIs. `reference` defines the letters."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backend import resolve, triton_reasons
from ...common.checks import check_choice, check_tensor, check_whole
from ...namespace import custom_op
from ...packed import WORD, check_packed
from .reference import mask_targets_reference

# The kernel holds two numbers as int32: positions in 1 / UNIT pixels, and the sum of up to W + 4 samples in a row.
MAX_SIDE = 8160


def mask_targets(
    packed: Tensor,
    boxes: Tensor,
    gt_index: Tensor,
    size: int,
    *,
    convention: str,
    image_sizes: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Crop the ground-truth mask of each RoI and resample it to size x size.

    The op is not differentiable and makes no host synchronisation. Boxes become float32, under autocast too; float64
    boxes stay float64.

    Args:
        packed: bit masks [N, G, H, ceil(W / 32)] int32, see `pack_masks`.
        boxes: RoIs [N, S, 4] xyxy in pixels of those masks.
        gt_index: [N, S] int64, the row of `packed` in the same image. -1, or any row that does not exist, gives zeros.
        size: side of the targets.
        convention: "detectron2" is RoIAlign with aligned=True and an adaptive grid, then 1 where the mean is >= 0.5 and
            0 elsewhere. "torchvision" is RoIAlign with aligned=False and an adaptive grid: means in 0..1.
        image_sizes: [N, 2] height and width of each mask without its padding. RoIAlign repeats the last pixel of an
            image at its border, instead of the zeros of the padding. None means no padding: H and 32 * ceil(W / 32),
            the largest sizes.
        backend: "triton", "reference", "auto", or None for the default.

    Returns:
        [N, S, size, size] float32, or float64 for float64 boxes. A RoI with a NaN or infinite coordinate gives zeros,
        and so does an aligned RoI without area. Means are the same bits from all backends on all devices, for the sizes
        that the README names. They equal `torchvision.ops.roi_align` of the float mask up to float32 rounding, so a
        mean of exactly 0.5 in torchvision may fall to either side.

    Raises:
        ValueError: wrong shape, dtype, device or option.

    Source: Mask R-CNN (He et al. 2017), section 3.
    """
    check_packed("mask_targets", packed, "N", "G", "H")
    n, device = packed.shape[0], packed.device
    check_tensor("mask_targets", "boxes", boxes, (n, "S", 4), "float", device=device)
    check_tensor("mask_targets", "gt_index", gt_index, boxes.shape[:2], "int64", device=device)
    size = check_whole("mask_targets", "size", size, 1)
    check_choice("mask_targets", "convention", convention, ("detectron2", "torchvision"))
    if image_sizes is not None:
        check_tensor("mask_targets", "image_sizes", image_sizes, (n, 2), device=device)
    reasons: dict[str, list[str]] = {"triton": _triton_reasons(packed, boxes), "reference": []}
    chosen = resolve("mask_targets", backend, reasons, device=packed.device)
    boxes = boxes.detach().to(torch.promote_types(boxes.dtype, torch.float32))
    if chosen == "triton":
        from . import kernels

        return kernels.mask_targets(packed, boxes, gt_index, size, convention == "detectron2", image_sizes)
    return _mask_targets(packed, boxes, gt_index, size, convention == "detectron2", image_sizes)


def _triton_reasons(packed: Tensor, boxes: Tensor) -> list[str]:
    reasons = triton_reasons(packed, boxes)
    if boxes.dtype == torch.float64:
        reasons.append("computes in float32, not float64")
    if max(packed.shape[2], packed.shape[3] * WORD) > MAX_SIDE:
        reasons.append(f"serves masks of up to {MAX_SIDE:,} pixels a side")
    return reasons


# A custom op is one node of a compiled graph. The reference's loop over chunks of RoIs would unroll into thousands.
@custom_op("mask_targets_reference")
def _mask_targets(
    packed: Tensor, boxes: Tensor, gt_index: Tensor, size: int, detectron2: bool, image_sizes: Tensor | None
) -> Tensor:
    home = packed.device
    if home.type == "mps":  # MPS has no float64, which makes the sums exact
        packed, boxes, gt_index = packed.cpu(), boxes.cpu(), gt_index.cpu()
        image_sizes = None if image_sizes is None else image_sizes.cpu()
    with torch.autocast(packed.device.type, enabled=False):
        sums = mask_targets_reference(packed, boxes, gt_index, size, image_sizes, aligned=detectron2, binary=detectron2)
    return sums.to(home)


@_mask_targets.register_fake
def _(
    packed: Tensor, boxes: Tensor, gt_index: Tensor, size: int, detectron2: bool, image_sizes: Tensor | None
) -> Tensor:
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    return packed.new_empty((*boxes.shape[:2], size, size), dtype=dtype)
