"""Normalisation layers by the names of the config. Letters: C channels."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn
from torchvision.ops import FrozenBatchNorm2d

NormLayer = Callable[[int], nn.Module]  # C to a layer that maps [N, C, H, W] to the same shape


def _group_norm(channels: int, eps: float) -> nn.Module:
    return nn.GroupNorm(32, channels, eps=eps)  # 32 groups: Wu & He, "Group Normalization", 2018


_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "bn": nn.BatchNorm2d,
    "sync_bn": nn.SyncBatchNorm,
    "frozen_bn": FrozenBatchNorm2d,
    "gn": _group_norm,
}


def norm_layer(name: str, eps: float = 1e-5) -> NormLayer:
    """The layer `name`; `eps` is added to its variance.

    ``bn`` takes its statistics from the batch of one process, ``sync_bn`` from all of them once torch.distributed runs;
    without it the two are the same, on a CPU too. ``frozen_bn`` keeps statistics and scale as loaded. ``gn`` has
    statistics of each image alone, so that it trains from scratch at any batch size; C must be a multiple of 32.
    """
    return functools.partial(_LAYERS[name], eps=eps)


def head_norm_layer(name: str, eps: float = 1e-5) -> NormLayer:
    """What stands behind the convolutions of neck and mask head: GroupNorm if the backbone has it, else nothing.

    Source: Wu & He 2018, section 4.2, and He et al. 2019, "Rethinking ImageNet Pre-training", section 3.
    """
    return norm_layer(name, eps) if name == "gn" else nn.Identity
