"""RoI heads: proposals in, classified boxes, with masks unless left out (or, in training, their losses) out.

This file says which RoIs each head sees; the heads themselves are box_head.py and mask_head.py, and what is learnt of
masks is mask_branch.py. Letters: N images, P proposals, G ground-truth boxes, S sampled RoIs, D detections,
Cls foreground classes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tmask.model.keypoint_branch import KeypointBranch
from tmask.model.losses import BoxLoss, ClassLoss, Focal, box_losses
from tmask.model.mask_branch import MaskBranch
from tmask.model.mask_transfer import MaskTransfer
from tmask.model.predictions import class_probabilities
from tmask.model.roi_extractor import Extractor, Head
from tmask.model.sampling import Sampler, sample, take_rows
from tmask.structures import Detections, ImageBatch, Proposals, SampledRois, Targets
from tmask_kernels import decode_boxes, detections, match_anchors

BOX_CODE_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # bring the deltas to unit variance: Girshick 2015; the RPN uses ones


class RoIHeads(nn.Module):
    """The second stage of Mask R-CNN (He et al. 2017).

    `fg_iou`, `bg_iou`: a RoI is positive at or above the first, negative below the second. `batch_size` RoIs an image
    enter the losses, at most `positive_fraction` of them positive. `sampler` draws the RoIs. `class_loss` and
    `box_loss` name the box head's losses; `focal` has the parameters of a focal one. `mask_branch` says what
    `mask_head` learns; both are None without masks. With `mask_transfer` its predictor is made of the weights of
    `box_head`, at each call anew. `keypoint_branch` and `keypoint_head`, None without keypoints, are to one another as
    those of masks.
    """

    def __init__(
        self,
        *,
        extractor: Extractor,
        box_head: nn.Module,
        box_pool_size: int,
        fg_iou: float,
        bg_iou: float,
        batch_size: int,
        positive_fraction: float,
        score_threshold: float,
        nms_threshold: float,
        max_detections: int,
        sampler: Sampler = sample,
        class_loss: ClassLoss = "softmax",
        box_loss: BoxLoss = "smooth_l1",
        focal: Focal | None = None,
        mask_head: nn.Module | None = None,
        mask_branch: MaskBranch | None = None,
        mask_transfer: MaskTransfer | None = None,
        keypoint_head: nn.Module | None = None,
        keypoint_branch: KeypointBranch | None = None,
    ) -> None:
        super().__init__()
        self.extractor = extractor
        self.box_head, self.mask_head = box_head, mask_head
        self.mask_branch, self.mask_transfer = mask_branch, mask_transfer
        self.keypoint_head, self.keypoint_branch = keypoint_head, keypoint_branch
        self.box_pool_size = box_pool_size
        self.fg_iou, self.bg_iou = fg_iou, bg_iou
        self.batch_size, self.positive_fraction = batch_size, positive_fraction
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.max_detections = max_detections
        self.sampler = sampler
        self.class_loss, self.box_loss, self.focal = class_loss, box_loss, focal

    def losses(
        self, features: Sequence[Tensor], proposals: Proposals, images: ImageBatch, targets: Targets, *, compact: bool
    ) -> dict[str, Tensor]:
        """Classifier and box loss of a sample of the proposals and, with such branches, mask and keypoint loss.

        `compact`: see `MaskRCNN.forward_padded`.
        """
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
        slots = max(1, int(self.batch_size * self.positive_fraction))  # positives stand in the first slots
        positives = SampledRois(*(field[:, :slots] for field in rois))
        pool = functools.partial(self.extractor, features)
        losses = {"loss_classifier": classifier_loss, "loss_box_reg": box_loss}
        if self.mask_branch is not None and self.mask_head is not None:
            head = self._predicting(self.mask_head)
            losses["loss_mask"] = self.mask_branch.loss(pool, head, positives, images, targets, compact=compact)
        if self.keypoint_branch is not None and self.keypoint_head is not None:
            losses["loss_keypoint"] = self.keypoint_branch.loss(
                pool, self.keypoint_head, positives, targets, compact=compact
            )
        return losses

    def detect(
        self, features: Sequence[Tensor], proposals: Proposals, images: ImageBatch, *, compact: bool
    ) -> Detections:
        """Score and refine the proposals, apply NMS within each class, then add masks and keypoints."""
        valid = proposals.valid()
        class_logits, deltas = self._box_branch(features, proposals.boxes, valid)
        # [N, P, Cls + 1, 4]
        boxes = decode_boxes(deltas.float(), proposals.boxes[:, :, None], weights=BOX_CODE_WEIGHTS)
        boxes, scores, labels, counts = detections(
            class_probabilities(class_logits, self.class_loss),  # [N, P, Cls]
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
        pool = functools.partial(self.extractor, features)
        masks = keypoints = None
        if self.mask_branch is not None and self.mask_head is not None:
            head = self._predicting(self.mask_head)
            masks = self.mask_branch.masks(pool, head, boxes, labels, found, compact=compact)
        if self.keypoint_branch is not None and self.keypoint_head is not None:
            keypoints = self.keypoint_branch.keypoints(pool, self.keypoint_head, boxes, found, compact=compact)
        return Detections(boxes, scores, labels, counts, masks, keypoints)

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
        """Return class logits [N, S, Cls + 1] and deltas [N, S, Cls + 1, 4] of boxes [N, S, 4]."""
        pooled = self.extractor(features, boxes, valid, self.box_pool_size)
        logits, deltas = self.box_head(pooled)
        return logits.unflatten(0, valid.shape), deltas.unflatten(0, valid.shape)

    def mask_parts(self) -> list[nn.Module]:
        """Return the modules that serve masks alone; none in a model without masks."""
        return [part for part in (self.mask_head, self.mask_transfer) if part is not None]

    def _predicting(self, mask_head: nn.Module) -> Head:
        """Return the mask head. With a transfer, its predictor comes from the box head's present weights."""
        if self.mask_transfer is None:
            return mask_head
        weights = [self.box_head.get_parameter(f"{layer}.weight") for layer in ("classifier", "regressor")]
        predictor = self.mask_transfer(*weights)
        return functools.partial(mask_head, predictor=predictor)
