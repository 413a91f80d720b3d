"""The five losses of Mask R-CNN: L = L_rpn_cls + L_rpn_box + L_cls + L_box + L_mask. Each gives a float32 scalar.

All work on fixed-size samples with a validity mask, so no shape depends on data. Letters: N images, S sampled slots,
R RoIs (N * S), C classes with background.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMOOTH_L1_BETA = 1 / 9  # where the box loss turns from quadratic to linear, as in torchvision and py-faster-rcnn


def rpn_losses(
    objectness: Tensor, deltas: Tensor, target_deltas: Tensor, positive: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """Objectness and box loss of the sampled anchors.

    objectness [N, S] logits, deltas and target_deltas [N, S, 4], positive and valid [N, S] bool. Both losses are
    divided by the number of sampled anchors of the batch. Source: Ren et al. 2015, equation 1.
    """
    num_sampled = valid.sum().clamp(min=1)
    entropy = F.binary_cross_entropy_with_logits(objectness.float(), positive.float(), reduction="none")
    box = _smooth_l1(deltas, target_deltas)
    return _masked_sum(entropy, valid) / num_sampled, _masked_sum(box, positive) / num_sampled


def box_losses(
    class_logits: Tensor, deltas: Tensor, labels: Tensor, target_deltas: Tensor, positive: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """Classification and box loss of the sampled RoIs.

    class_logits [N, S, C], deltas [N, S, C, 4], labels [N, S] (0 background), target_deltas [N, S, 4]. Only the four
    deltas of the RoI's own class enter the box loss. Both are divided by the number of sampled RoIs of the batch.
    Source: Girshick 2015, "Fast R-CNN", equations 1-3.
    """
    num_sampled = valid.sum().clamp(min=1)
    entropy = F.cross_entropy(class_logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    own = deltas.gather(2, labels[:, :, None, None].expand(-1, -1, 1, 4)).squeeze(2)  # [N, S, 4]
    box = _smooth_l1(own, target_deltas)
    return _masked_sum(entropy, valid.flatten()) / num_sampled, _masked_sum(box, positive) / num_sampled


def _smooth_l1(deltas: Tensor, target: Tensor) -> Tensor:
    """Smooth L1 summed over the four deltas: [N, S, 4] to [N, S]."""
    return F.smooth_l1_loss(deltas.float(), target, beta=SMOOTH_L1_BETA, reduction="none").sum(dim=-1)


def _masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    # torch.where, not a product: an overflowed value in an empty slot must not turn into NaN.
    return torch.where(mask, values, 0.0).sum()
