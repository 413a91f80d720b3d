"""Mask branch: RoIs in, the loss of their masks or their masks out. The layers themselves are mask_head.py.

Letters: N images, G ground-truth boxes, S RoIs an image, D detections an image, R rows (RoIs of all images), C mask
channels, M mask side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tmask.structures import ImageBatch, SampledRois, Targets
from tmask_kernels import mask_bce, mask_targets

# Boxes [N, S, 4], valid [N, S] and a side to features [N * S, channels, side, side]: a RoI extractor with its maps.
Pool = Callable[[Tensor, Tensor, int], Tensor]
Head = Callable[[Tensor], Tensor]  # pooled features [R, channels, side, side] to mask logits [R, C, M, M]


@dataclass(frozen=True, kw_only=True)
class MaskBranch:
    """What a mask head learns and how its masks are read. It holds no parameters: the head comes with each call.

    The head sees features of `pool_size` cells a side. `targets` names the convention of the M x M targets, M being the
    side of what it gives.
    """

    pool_size: int
    targets: str

    def loss(
        self, pool: Pool, head: Head, rois: SampledRois, images: ImageBatch, targets: Targets, *, compact: bool
    ) -> Tensor:
        """Loss of the positive RoIs [N, S] whose object has a mask; 0 with a graph if there is none."""
        if targets.masks is None:
            raise ValueError("targets.masks: expected packed masks [N, G, H, ceil(W / 32)], got None")
        valid = rois.positive & targets.has_mask.gather(1, rois.gt_index.clamp(min=0))  # [N, S]
        logits, rows = self._logits(pool, head, rois.boxes, valid, compact=compact)
        target = mask_targets(
            targets.masks,
            rois.boxes,
            torch.where(valid, rois.gt_index, -1),
            logits.shape[-1],
            image_sizes=images.sizes,
            convention=self.targets,
        )  # [N, S, M, M]
        return mask_bce(logits, rois.labels.flatten()[rows], target.flatten(0, 1)[rows], valid=valid.flatten()[rows])

    def masks(self, pool: Pool, head: Head, boxes: Tensor, labels: Tensor, valid: Tensor, *, compact: bool) -> Tensor:
        """The mask of each detection's own class: boxes [N, D, 4], labels and valid [N, D] to [N, D, M, M].

        Probabilities in float32, zeros where not valid.
        """
        logits, rows = self._logits(pool, head, boxes, valid, compact=compact)
        own = labels.flatten()[rows][:, None, None, None].expand(-1, 1, *logits.shape[-2:])
        masks = logits.gather(1, own).squeeze(1).float().sigmoid()  # [R, M, M]
        masks = torch.where(valid.flatten()[rows][:, None, None], masks, 0.0)
        if isinstance(rows, Tensor):
            masks = masks.new_zeros(valid.numel(), *masks.shape[1:]).index_copy(0, rows, masks)
        return masks.unflatten(0, valid.shape)

    def _logits(
        self, pool: Pool, head: Head, boxes: Tensor, valid: Tensor, *, compact: bool
    ) -> tuple[Tensor, Tensor | slice]:
        """Mask logits [R, C, M, M], and which of the flattened slots their rows are."""
        pooled = pool(boxes, valid, self.pool_size)
        # Data-dependent on purpose, and only where the caller asked for it: on a CPU empty slots cost real time.
        rows = valid.flatten().nonzero().squeeze(1) if compact else slice(None)
        return head(pooled[rows]), rows
