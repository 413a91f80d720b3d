"""Mask branch: RoIs in, the loss of their masks or their masks out. The layers themselves are mask_head.py.

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
    """What a mask head learns and how its masks are read. It holds no parameters: the head comes with each call.

    The head sees features of `pool_size` cells a side. `targets` names the convention of the M x M targets, M being the
    side of what it gives. `mask_loss` names the loss, and so the activation of inference. With `class_agnostic` all
    classes share one mask.
    """

    pool_size: int
    targets: str
    mask_loss: MaskLoss = "sigmoid"
    class_agnostic: bool = False

    def num_channels(self, num_classes: int) -> int:
        """C, how many maps a head gives; `num_classes` counts the background.

        One for each class, of which the background's is that of a softmax, and nobody's of a sigmoid. Class-agnostic:
        the object's alone, and before it the background's for a softmax.
        """
        return self._agnostic_channel + 1 if self.class_agnostic else num_classes

    @property
    def _agnostic_channel(self) -> int:
        return int(self.mask_loss == "softmax")

    def _channels(self, labels: Tensor) -> Tensor:
        """The channel of each label."""
        return torch.full_like(labels, self._agnostic_channel) if self.class_agnostic else labels

    def loss(
        self, pool: Pool, head: Head, rois: SampledRois, images: ImageBatch, targets: Targets, *, compact: bool
    ) -> Tensor:
        """Loss of the positive RoIs [N, S] whose object has a mask; 0 with a graph if there is none."""
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
        """The mask of each detection's own class: boxes [N, D, 4], labels and valid [N, D] to [N, D, M, M].

        Probabilities in float32, zeros where not valid.
        """
        logits, rows = run_head(head, pool, boxes, valid, self.pool_size, compact=compact)
        masks = mask_probabilities(logits, self._channels(labels).flatten()[rows], self.mask_loss)  # [R, M, M]
        masks = torch.where(valid.flatten()[rows][:, None, None], masks, 0.0)
        return to_slots(masks, rows, valid)
