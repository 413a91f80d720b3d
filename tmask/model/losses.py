"""The losses of RPN, box head and mask head. Each loss is a float32 scalar.

The samples have a fixed size and a validity mask, so no shape depends on data. Letters: N images, S slots (sampled,
or all anchors), Cls foreground classes; for masks R RoIs of all images, C mask channels, M mask side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tmask_kernels import decode_boxes, encode_boxes, mask_bce, sigmoid_focal_loss, softmax_focal_loss

SMOOTH_L1_BETA = 1 / 9  # where the box loss turns from quadratic to linear, as in torchvision and py-faster-rcnn
IOU_EPSILON = 1e-7  # in the denominators, as in torchvision
FAR_NEGATIVE = -1e4  # a logit whose focal loss is exactly 0 beside a target of 0, and so is its gradient

Weights = tuple[float, float, float, float]
BoxLoss = Literal["smooth_l1", "giou", "diou", "ciou"]
ClassLoss = Literal["softmax", "softmax_focal", "sigmoid_focal"]
MaskLoss = Literal["sigmoid", "softmax"]


@dataclass(frozen=True, kw_only=True)
class Focal:
    """Settings of the focal loss (Lin et al. 2017).

    Attributes:
        alpha: Weight of positives; negatives have the weight 1 - alpha. Below 0 both have the weight 1.
        gamma: Exponent that lowers the loss of easy examples.
        prior: Probability of an object that a sigmoid classifier predicts before training.
    """

    alpha: float
    gamma: float
    prior: float

    @property
    def bias(self) -> float:
        """The classifier's initial bias, at which it predicts the prior.

        With a bias of 0 the loss of the many negatives would dominate the first steps.
        """
        return -math.log((1 - self.prior) / self.prior)


def rpn_losses(
    objectness: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    matched: Tensor,
    positive: Tensor,
    valid: Tensor,
    *,
    focal: Focal | None,
    box_loss: BoxLoss,
) -> tuple[Tensor, Tensor]:
    """Return the objectness loss and the box loss of the RPN.

    Without `focal` the objectness loss is binary cross-entropy, and both losses are divided by the number of valid
    anchors (Ren et al. 2015, equation 1). With `focal` both are divided by the number of positive anchors (Lin et al.
    2017, section 4.1).

    Args:
        objectness: Logits [N, S].
        deltas: Box deltas [N, S, 4].
        anchors: Anchors [N, S, 4].
        matched: Ground-truth box of each anchor [N, S, 4].
        positive: [N, S] bool, anchors that learn a box. All of them are valid.
        valid: [N, S] bool, anchors that count.
        focal: The focal loss; None: binary cross-entropy.
        box_loss: Name of the box loss.
    """
    count = (valid if focal is None else positive).sum().clamp(min=1)
    if focal is None:
        entropy = F.binary_cross_entropy_with_logits(objectness.float(), positive.float(), reduction="none")
        loss = _masked_sum(entropy, valid)
    else:
        loss = _focal_sum(objectness, positive, valid, focal)
    box = _box_regression(box_loss, deltas, anchors, matched, positive, (1.0, 1.0, 1.0, 1.0))
    return loss / count, _masked_sum(box, positive) / count


def box_losses(
    class_logits: Tensor,
    deltas: Tensor,
    labels: Tensor,
    rois: Tensor,
    matched: Tensor,
    positive: Tensor,
    valid: Tensor,
    *,
    class_loss: ClassLoss,
    focal: Focal | None,
    box_loss: BoxLoss,
    weights: Weights,
) -> tuple[Tensor, Tensor]:
    """Return the classification loss and the box loss of the sampled RoIs.

    Only the four deltas of the RoI's own class enter the box loss. Both losses are divided by the number of sampled
    RoIs of the batch, sigmoid_focal by the number of positives.
    Source: Girshick 2015, "Fast R-CNN", equations 1-3.

    Args:
        class_logits: [N, S, Cls + 1]; [N, S, Cls], without the background, for sigmoid_focal.
        deltas: Box deltas of each class [N, S, Cls + 1, 4].
        labels: [N, S] int64, 0 for the background.
        rois: [N, S, 4].
        matched: Ground-truth box of each RoI [N, S, 4].
        positive: [N, S] bool, RoIs that learn a box.
        valid: [N, S] bool, slots that hold a RoI.
        class_loss: Name of the classification loss.
        focal: The focal loss, for a `class_loss` that needs it.
        box_loss: Name of the box loss.
        weights: Factors of the encoded deltas, as in `encode_boxes`.
    """
    sampled = valid.sum().clamp(min=1)
    if class_loss == "sigmoid_focal":
        assert focal is not None
        classes = torch.arange(1, class_logits.shape[-1] + 1, device=labels.device)
        of_class = labels[..., None] == classes  # [N, S, Cls]
        loss = _focal_sum(class_logits, of_class, valid[..., None], focal) / positive.sum().clamp(min=1)
    elif class_loss == "softmax_focal":
        assert focal is not None
        loss = _masked_sum(softmax_focal_loss(class_logits.float(), labels, gamma=focal.gamma), valid) / sampled
    else:
        entropy = F.cross_entropy(class_logits.float().flatten(0, 1), labels.flatten(), reduction="none")
        loss = _masked_sum(entropy, valid.flatten()) / sampled
    own = deltas.gather(2, labels[:, :, None, None].expand(-1, -1, 1, 4)).squeeze(2)  # [N, S, 4]
    box = _box_regression(box_loss, own, rois, matched, positive, weights)
    return loss, _masked_sum(box, positive) / sampled


def mask_loss(logits: Tensor, channels: Tensor, targets: Tensor, valid: Tensor, *, loss: MaskLoss) -> Tensor:
    """Return the mean mask loss over the pixels of the valid RoIs; 0, with a graph, if no RoI is valid.

    Source: He et al. 2017, "Mask R-CNN", section 3 and table 2b.

    Args:
        logits: [R, C, M, M].
        channels: [R] int64, the channel of each RoI's class.
        targets: [R, M, M] in 0..1.
        valid: [R] bool.
        loss: ``sigmoid``: binary cross-entropy of the RoI's own channel. Classes do not compete, and the other channels
            have a gradient of exactly 0. ``softmax``: cross-entropy over the channels of each pixel. Channel 0 is the
            background; a pixel is of the RoI's class if its target is at least 0.5.
    """
    if loss == "sigmoid":
        return mask_bce(logits, channels, targets, valid=valid)
    keep = valid[:, None, None]
    classes = torch.where(keep & (targets >= 0.5), channels[:, None, None], 0)  # [R, M, M]
    # Zeros go in where a RoI is not valid, so that even a NaN there has no gradient.
    pixels = torch.where(keep[:, None], logits, 0.0).movedim(1, -1).flatten(0, 2)  # [R * M * M, C]
    entropy = F.cross_entropy(pixels.float(), classes.flatten(), reduction="none").view_as(targets)
    return _masked_sum(entropy, keep) / (valid.sum().clamp(min=1) * logits.shape[-1] ** 2)


def _focal_sum(logits: Tensor, targets: Tensor, valid: Tensor, focal: Focal) -> Tensor:
    logits = torch.where(valid, logits, FAR_NEGATIVE)
    return sigmoid_focal_loss(logits, targets & valid, focal.alpha, focal.gamma, "sum")


def _box_regression(
    kind: BoxLoss, deltas: Tensor, anchors: Tensor, matched: Tensor, positive: Tensor, weights: Weights
) -> Tensor:
    """Return the loss of each box [N, S]: smooth L1 of the deltas, or `iou_loss` of the decoded boxes."""
    if kind == "smooth_l1":
        target = encode_boxes(matched, anchors, weights)
        return F.smooth_l1_loss(deltas.float(), target, beta=SMOOTH_L1_BETA, reduction="none").sum(dim=-1)
    boxes = decode_boxes(deltas.float(), anchors, weights=weights)
    # A box without area has sides of the ratio 0 / 0. Its gradient is NaN, which a later mask would not remove.
    unit = (torch.arange(4, device=boxes.device) >= 2).to(boxes.dtype)
    own = positive[..., None]
    return iou_loss(kind, torch.where(own, boxes, unit), torch.where(own, matched, unit))


def iou_loss(kind: BoxLoss, boxes: Tensor, target: Tensor) -> Tensor:
    """Return 1 - IoU plus a penalty, which has a gradient even if the boxes do not overlap.

    The values are those of torchvision. torchvision's own functions select boxes by value, and so the host must wait.
    Ties: boxes that touch have the gradient of boxes that overlap. An edge on the target's edge gets the mean of the
    gradients on its two sides, so equal boxes have the gradient 0.

    Args:
        kind: The penalty. Let E be the smallest box that encloses both boxes. ``giou``: the share of E that neither box
            fills (Rezatofighi et al. 2019). ``diou``: the squared distance of the centres over the squared diagonal of
            E. ``ciou``: as ``diou``, plus the difference of the aspect ratios (Zheng et al. 2020, whose factor alpha
            has no gradient).
        boxes: [..., 4].
        target: [..., 4].

    Returns:
        The loss of each box [...].
    """
    low, high = torch.minimum(boxes, target), torch.maximum(boxes, target)
    overlap = _area(_at_least(low[..., 2:] - high[..., :2], 0.0))
    side, target_side = boxes[..., 2:] - boxes[..., :2], target[..., 2:] - target[..., :2]
    union = _area(side) + _area(target_side) - overlap
    iou = overlap / (union + IOU_EPSILON)
    around = high[..., 2:] - low[..., :2]  # sides of the enclosing box E
    if kind == "giou":
        area = _area(around)
        return 1 - iou + (area - union) / (area + IOU_EPSILON)
    apart = (boxes[..., :2] + boxes[..., 2:] - target[..., :2] - target[..., 2:]) / 2
    loss = 1 - iou + apart.square().sum(-1) / (around.square().sum(-1) + IOU_EPSILON)
    if kind == "diou":
        return loss
    # A side may round to 0, where the ratio has no gradient.
    angles = [torch.atan(w / h) for w, h in (_at_least(s, IOU_EPSILON).unbind(-1) for s in (target_side, side))]
    ratio = 4 / math.pi**2 * (angles[0] - angles[1]).square()
    return loss + (ratio / (1 - iou + ratio + IOU_EPSILON)).detach() * ratio


def _at_least(sides: Tensor, limit: float) -> Tensor:
    """Return the larger of sides and limit. The gradient of `clamp` at the limit depends on the version of torch."""
    return torch.where(sides < limit, limit, sides)


def _area(sides: Tensor) -> Tensor:
    """Return the areas [...] of sides [..., 2]. The gradient of `prod` counts zeros on the host."""
    w, h = sides.unbind(-1)
    return w * h


def _masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    # torch.where, not a product: an overflowed value in an empty slot must not turn into NaN.
    return torch.where(mask, values, 0.0).sum()
