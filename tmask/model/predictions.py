"""Probabilities from logits, by the activation that each loss trains."""

from __future__ import annotations

from torch import Tensor

from tmask.model.losses import ClassLoss, MaskLoss


def class_probabilities(class_logits: Tensor, class_loss: ClassLoss) -> Tensor:
    """Probabilities of the Cls foreground classes, [..., Cls] float32.

    Args:
        class_logits: [..., Cls + 1] with the background first; [..., Cls] for ``sigmoid_focal``.
        class_loss: The loss that the logits are trained with.
    """
    if class_loss == "sigmoid_focal":
        return class_logits.float().sigmoid()
    return class_logits.float().softmax(dim=-1)[..., 1:]


def mask_probabilities(logits: Tensor, channels: Tensor, loss: MaskLoss) -> Tensor:
    """Probabilities of each RoI's own channel, [R, M, M] float32.

    Args:
        logits: [R, C, M, M].
        channels: [R] int64, the channel of each RoI's class.
        loss: The loss that the logits are trained with.
    """
    own = channels[:, None, None, None].expand(-1, 1, *logits.shape[-2:])
    if loss == "softmax":
        return logits.float().softmax(dim=1).gather(1, own).squeeze(1)
    return logits.gather(1, own).squeeze(1).float().sigmoid()
