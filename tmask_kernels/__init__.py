"""GPU ops of object detection and instance segmentation, each with a plain PyTorch reference."""

from tmask_kernels.ops.mask_targets.op import mask_targets
from tmask_kernels.packed import pack_masks, unpack_masks

__all__ = [
    "mask_targets",
    "pack_masks",
    "unpack_masks",
]
