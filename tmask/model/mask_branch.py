"""Mask branch: the loss of the masks of RoIs, or the masks of detections. mask_head.py has the layers.

Letters: N images, G ground-truth boxes, S RoIs an image, D detections an image, R rows (RoIs of all images), C mask
channels, M mask side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tmask.model.losses import MaskLoss, mask_loss
from tmask.model.predictions import mask_probabilities
from tmask.model.roi_extractor import Head, Pool, run_head, to_slots
from tmask.structures import ImageBatch, SampledRois, Targets
from tmask_kernels import mask_targets


@dataclass(frozen=True, kw_only=True)
class MaskBranch:
    """The loss and the activation of a mask head. It has no parameters: the caller passes the head to each call.

    Attributes:
        pool_size: Side of the pooled features that the head gets, in cells.
        targets: Convention of the M x M targets, where M is the side of the head's output.
        mask_loss: Name of the loss, which also decides the activation of inference.
        class_agnostic: True if all classes share one mask.
    """

    pool_size: int
    targets: str
    mask_loss: MaskLoss = "sigmoid"
    class_agnostic: bool = False

    def num_channels(self, num_classes: int) -> int:
        """Return C, the number of maps that a head must give.

        There is one map for each class. A softmax uses the background's map; a sigmoid ignores it. A class-agnostic
        head gives one map of the object, and for a softmax one of the background before it.

        Args:
            num_classes: Number of classes, the background included.
        """
        return self._agnostic_channel + 1 if self.class_agnostic else num_classes

    @property
    def _agnostic_channel(self) -> int:
        return int(self.mask_loss == "softmax")

    def _channels(self, labels: Tensor) -> Tensor:
        """Return the channel of each label."""
        return torch.full_like(labels, self._agnostic_channel) if self.class_agnostic else labels

    def loss(
        self, pool: Pool, head: Head, rois: SampledRois, images: ImageBatch, targets: Targets, *, compact: bool
    ) -> Tensor:
        """Return the mask loss of the positive RoIs [N, S] whose object has a mask; 0, with a graph, without any."""
        if targets.masks is None:
            raise ValueError("targets.masks: expected packed masks [N, G, H, ceil(W / 32)], got None")
        valid = rois.positive & targets.has_mask.gather(1, rois.gt_index.clamp(min=0))  # [N, S]
        logits, rows = run_head(head, pool, rois.boxes, valid, self.pool_size, compact=compact)
        target = mask_targets(
            targets.masks,
            rois.boxes,
            torch.where(valid, rois.gt_index, -1),
            logits.shape[-1],
            image_sizes=images.sizes,
            convention=self.targets,
        )  # [N, S, M, M]
        return mask_loss(
            logits,
            self._channels(rois.labels).flatten()[rows],
            target.flatten(0, 1)[rows],
            valid.flatten()[rows],
            loss=self.mask_loss,
        )

    def masks(self, pool: Pool, head: Head, boxes: Tensor, labels: Tensor, valid: Tensor, *, compact: bool) -> Tensor:
        """Return the mask of each detection's own class.

        Args:
            pool: Pools the features of boxes.
            head: The mask head.
            boxes: [N, D, 4].
            labels: [N, D] int64.
            valid: [N, D] bool.
            compact: True to run the head on the valid detections alone.

        Returns:
            Probabilities [N, D, M, M], float32, 0 for detections that are not valid.
        """
        logits, rows = run_head(head, pool, boxes, valid, self.pool_size, compact=compact)
        masks = mask_probabilities(logits, self._channels(labels).flatten()[rows], self.mask_loss)  # [R, M, M]
        masks = torch.where(valid.flatten()[rows][:, None, None], masks, 0.0)
        return to_slots(masks, rows, valid)
