"""GPU ops of object detection and instance segmentation, each with a plain PyTorch reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .backend import use_backend
from .common.pyramid import pyramid_levels
from .ops.anchors.op import make_anchors
from .ops.anchors.reference import AnchorSpec
from .ops.box_coding.op import decode_boxes, encode_boxes
from .ops.decode_keypoints.op import decode_keypoints
from .ops.focal_loss.op import sigmoid_focal_loss, softmax_focal_loss
from .ops.mask_bce.op import mask_bce
from .ops.mask_targets.op import mask_targets
from .ops.masks_to_rle.op import masks_to_rle
from .ops.match_anchors.op import match_anchors
from .ops.nms.op import batched_nms, nms, padded_nms
from .ops.paste_masks.op import paste_masks, paste_masks_batched
from .ops.proposals.op import detections, rpn_proposals
from .ops.roi_align.op import multiscale_roi_align, roi_align
from .ops.roi_pool.op import roi_pool
from .ops.soft_nms.op import soft_nms
from .packed import pack_masks, unpack_masks

if TYPE_CHECKING:
    from .modules import MultiScaleRoIAlign, RoIAlign, RoIPool

__all__ = [
    "AnchorSpec",
    "MultiScaleRoIAlign",
    "RoIAlign",
    "RoIPool",
    "batched_nms",
    "decode_boxes",
    "decode_keypoints",
    "detections",
    "encode_boxes",
    "make_anchors",
    "mask_bce",
    "mask_targets",
    "masks_to_rle",
    "match_anchors",
    "multiscale_roi_align",
    "nms",
    "pack_masks",
    "padded_nms",
    "paste_masks",
    "paste_masks_batched",
    "pyramid_levels",
    "roi_align",
    "roi_pool",
    "rpn_proposals",
    "sigmoid_focal_loss",
    "soft_nms",
    "softmax_focal_loss",
    "unpack_masks",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """The modules are torchvision's subclasses; the ops do without importing torchvision, which takes seconds."""
    if name in ("MultiScaleRoIAlign", "RoIAlign", "RoIPool"):
        from . import modules

        return getattr(modules, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
