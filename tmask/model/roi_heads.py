"""RoI heads: proposals in, classified boxes with masks (or, in training, three losses) out.

This file says which RoIs each head sees; the heads themselves are box_head.py and mask_head.py. Letters: N images,
P proposals, G ground-truth boxes, S sampled RoIs, D detections, C classes with background, M mask side.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tmask.model.losses import BoxLoss, ClassLoss, Focal, box_losses, class_probabilities
from tmask.model.sampling import Sampler, sample, take_rows
from tmask.structures import Detections, ImageBatch, Proposals, SampledRois, Targets
from tmask_kernels import (
    decode_boxes,
    detections,
    mask_bce,
    mask_targets,
    match_anchors,
    multiscale_roi_align,
    pyramid_levels,
    roi_pool,
)

BOX_CODE_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # bring the deltas to unit variance: Girshick 2015; the RPN uses ones


@dataclass(frozen=True, kw_only=True)
class RoIExtractor:
    """How RoI features are read from the pyramid: arguments of `multiscale_roi_align`, or `roi_pool` of each level."""

    strides: tuple[int, ...]  # pixels per cell of each level, finest first
    op: Literal["roi_align", "roi_pool"] = "roi_align"
    aligned: bool  # as the next three, of roi_align alone
    sampling_ratio: int
    reduction: Literal["mean", "max"] = "mean"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    level_convention: str

    def __call__(self, features: Sequence[Tensor], boxes: Tensor, valid: Tensor, output_size: int) -> Tensor:
        """Levels [N, C, H, W], boxes [N, P, 4], valid [N, P] to [N * P, C, output_size, output_size]."""
        scales = [1 / stride for stride in self.strides]
        if self.op == "roi_pool":
            # Every box is pooled from its own level and is 0 from the others.
            levels = pyramid_levels(boxes, scales, level_convention=self.level_convention)  # [N, P]
            pooled = [
                roi_pool(feature, boxes, output_size, scale, valid=valid & (levels == level))
                for level, (feature, scale) in enumerate(zip(features, scales, strict=True))
            ]
            return functools.reduce(torch.add, pooled)
        return multiscale_roi_align(
            features,
            boxes,
            output_size,
            scales,
            valid=valid,
            sampling_ratio=self.sampling_ratio,
            aligned=self.aligned,
            level_convention=self.level_convention,
            reduction=self.reduction,
            interpolation=self.interpolation,
        )


class RoIHeads(nn.Module):
    """The second stage of Mask R-CNN (He et al. 2017).

    `fg_iou`, `bg_iou`: a RoI is positive at or above the first, negative below the second. `batch_size` RoIs an image
    enter the losses, at most `positive_fraction` of them positive. `mask_targets` names the convention of the
    28 x 28 targets. `sampler` draws the RoIs. `class_loss` and `box_loss` name the box head's losses; `focal` has the
    parameters of a focal one.
    """

    def __init__(
        self,
        *,
        extractor: RoIExtractor,
        box_head: nn.Module,
        mask_head: nn.Module,
        box_pool_size: int,
        mask_pool_size: int,
        fg_iou: float,
        bg_iou: float,
        batch_size: int,
        positive_fraction: float,
        score_threshold: float,
        nms_threshold: float,
        max_detections: int,
        mask_targets: str,
        sampler: Sampler = sample,
        class_loss: ClassLoss = "softmax",
        box_loss: BoxLoss = "smooth_l1",
        focal: Focal | None = None,
    ) -> None:
        super().__init__()
        self.extractor = extractor
        self.box_head, self.mask_head = box_head, mask_head
        self.box_pool_size, self.mask_pool_size = box_pool_size, mask_pool_size
        self.fg_iou, self.bg_iou = fg_iou, bg_iou
        self.batch_size, self.positive_fraction = batch_size, positive_fraction
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.max_detections = max_detections
        self.mask_targets = mask_targets
        self.sampler = sampler
        self.class_loss, self.box_loss, self.focal = class_loss, box_loss, focal

    def losses(
        self, features: Sequence[Tensor], proposals: Proposals, images: ImageBatch, targets: Targets, *, compact: bool
    ) -> dict[str, Tensor]:
        """Classifier, box and mask loss of a sample of the proposals. `compact`: see `MaskRCNN.forward_padded`."""
        rois = self.sample_rois(proposals, targets)
        class_logits, deltas = self._box_branch(features, rois.boxes, rois.valid)
        matched = take_rows(targets.boxes, rois.gt_index.clamp(min=0))  # [N, S, 4]
        classifier_loss, box_loss = box_losses(
            class_logits,
            deltas,
            rois.labels,
            rois.boxes,
            matched,
            rois.positive,
            rois.valid,
            class_loss=self.class_loss,
            focal=self.focal,
            box_loss=self.box_loss,
            weights=BOX_CODE_WEIGHTS,
        )
        mask_loss = self._mask_loss(features, rois, images, targets, compact=compact)
        return {"loss_classifier": classifier_loss, "loss_box_reg": box_loss, "loss_mask": mask_loss}

    def detect(
        self, features: Sequence[Tensor], proposals: Proposals, images: ImageBatch, *, compact: bool
    ) -> Detections:
        """Class scores, refined boxes, NMS within each class, then masks of what is left."""
        valid = proposals.valid()
        class_logits, deltas = self._box_branch(features, proposals.boxes, valid)
        boxes = decode_boxes(deltas.float(), proposals.boxes[:, :, None], weights=BOX_CODE_WEIGHTS)  # [N, P, C, 4]
        boxes, scores, labels, counts = detections(
            class_probabilities(class_logits, self.class_loss),  # [N, P, C - 1]
            boxes[:, :, 1:],
            valid=valid,
            image_sizes=images.sizes,
            score_threshold=self.score_threshold,
            nms_threshold=self.nms_threshold,
            max_detections=self.max_detections,
        )
        found = torch.arange(boxes.shape[1], device=boxes.device) < counts[:, None]  # [N, D]
        # The scores have no column of the background: column 0 is label 1. Padding stays 0.
        labels = torch.where(found, labels + 1, 0)
        masks = self._mask_probabilities(features, boxes, labels, found, compact=compact)
        return Detections(boxes, scores, labels, counts, masks)

    def sample_rois(self, proposals: Proposals, targets: Targets) -> SampledRois:
        """Match proposals and the ground truth itself to the ground truth, and draw the RoIs of the losses.

        The ground truth is appended so that there are positives before the RPN has learnt to find any.
        """
        boxes = torch.cat([proposals.boxes, targets.boxes], dim=1)  # [N, P + G, 4]
        usable = torch.cat([proposals.valid(), targets.valid], dim=1)  # [N, P + G]
        matches, _ = match_anchors(
            boxes,
            targets.boxes,
            targets.valid,
            gt_crowd=targets.crowd,
            high=self.fg_iou,
            low=self.bg_iou,
            allow_low_quality=False,
        )  # [N, P + G]
        chosen = self.sampler(
            usable & (matches >= 0),
            usable & (matches == -1),
            size=self.batch_size,
            positive_fraction=self.positive_fraction,
        )
        gt_index = torch.where(chosen.positive, matches.gather(1, chosen.rows), -1)  # [N, S]
        labels = torch.where(chosen.positive, targets.labels.gather(1, gt_index.clamp(min=0)), 0)
        return SampledRois(take_rows(boxes, chosen.rows), labels, gt_index, chosen.positive, chosen.valid)

    def _box_branch(self, features: Sequence[Tensor], boxes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes [N, S, 4] to class logits [N, S, C] and deltas [N, S, C, 4]."""
        pooled = self.extractor(features, boxes, valid, self.box_pool_size)
        logits, deltas = self.box_head(pooled)
        return logits.unflatten(0, valid.shape), deltas.unflatten(0, valid.shape)

    def _mask_loss(
        self, features: Sequence[Tensor], rois: SampledRois, images: ImageBatch, targets: Targets, *, compact: bool
    ) -> Tensor:
        if targets.masks is None:
            raise ValueError("targets.masks: expected packed masks [N, G, H, ceil(W / 32)], got None")
        slots = max(1, int(self.batch_size * self.positive_fraction))  # positives stand in the first slots
        boxes, labels, gt_index = rois.boxes[:, :slots], rois.labels[:, :slots], rois.gt_index[:, :slots]
        has_mask = targets.has_mask.gather(1, gt_index.clamp(min=0))
        valid = rois.positive[:, :slots] & has_mask  # [N, slots]
        target = mask_targets(
            targets.masks,
            boxes,
            torch.where(valid, gt_index, -1),
            2 * self.mask_pool_size,
            image_sizes=images.sizes,
            convention=self.mask_targets,
        )  # [N, slots, M, M]
        pooled = self.extractor(features, boxes, valid, self.mask_pool_size)
        rows = _rows(valid, compact)
        logits = self.mask_head(pooled[rows])  # [R, C, M, M]
        return mask_bce(logits, labels.flatten()[rows], target.flatten(0, 1)[rows], valid=valid.flatten()[rows])

    def _mask_probabilities(
        self, features: Sequence[Tensor], boxes: Tensor, labels: Tensor, valid: Tensor, *, compact: bool
    ) -> Tensor:
        """The mask of each detection's own class: [N, D, M, M], zeros in padding."""
        pooled = self.extractor(features, boxes, valid, self.mask_pool_size)
        rows = _rows(valid, compact)
        logits = self.mask_head(pooled[rows])  # [R, C, M, M]
        own = labels.flatten()[rows][:, None, None, None].expand(-1, 1, *logits.shape[-2:])
        masks = logits.gather(1, own).squeeze(1).float().sigmoid()  # [R, M, M]
        masks = torch.where(valid.flatten()[rows][:, None, None], masks, 0.0)
        if isinstance(rows, Tensor):
            masks = masks.new_zeros(valid.numel(), *masks.shape[1:]).index_copy(0, rows, masks)
        return masks.unflatten(0, valid.shape)


def _rows(valid: Tensor, compact: bool) -> Tensor | slice:
    """Which of the flattened slots a head computes: all, or (`compact`) only those that hold something."""
    # Data-dependent on purpose, and only where the caller asked for it: on a CPU empty slots cost real time.
    return valid.flatten().nonzero().squeeze(1) if compact else slice(None)
