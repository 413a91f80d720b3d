"""Backbone: an image batch in, feature maps of strides 4, 8, 16, 32 out. The network is torchvision's ResNet.

Any module serves instead that maps [N, 3, H, W] to an ordered dict {name: [N, C_i, H_i, W_i]}, finest first, and has
``out_channels``, the tuple of the C_i. Letters: N images, C channels, H W size.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d

from tmask.model.state_dict import misfits, read_state_dict


class Depth(NamedTuple):
    """A member of the ResNet family."""

    bottleneck: bool  # blocks of three convolutions, else of two
    blocks: tuple[int, int, int, int]  # in each stage


RESNETS: dict[str, Depth] = {
    "resnet10": Depth(False, (1, 1, 1, 1)),
    "resnet18": Depth(False, (2, 2, 2, 2)),
    "resnet34": Depth(False, (3, 4, 6, 3)),
    "resnet50": Depth(True, (3, 4, 6, 3)),
    "resnet101": Depth(True, (3, 4, 23, 3)),
}


def _group_norm(channels: int, eps: float) -> nn.Module:
    return nn.GroupNorm(32, channels, eps=eps)  # 32 groups: Wu & He, "Group Normalization", 2018


_NORMS: dict[str, Callable[..., nn.Module]] = {
    "bn": nn.BatchNorm2d,
    "frozen_bn": FrozenBatchNorm2d,
    "gn": _group_norm,
}
_COUNTER = "num_batches_tracked"


class ResNet(nn.Module):
    """ResNet stages 2-5 (He et al. 2015) as {"c2", "c3", "c4", "c5"} of strides 4, 8, 16, 32; any H and W.

    `name` is a key of torchvision's family (``resnet10`` has one block a stage); `norm` one of ``bn``, ``frozen_bn``,
    ``gn``; `norm_eps` is added to its variance; `trainable_layers` of the five (stem and four stages) learn, counted
    from the top.
    """

    def __init__(self, name: str, *, norm: str = "bn", norm_eps: float = 1e-5, trainable_layers: int = 5) -> None:
        super().__init__()
        bottleneck, blocks = RESNETS[name]
        block = resnet.Bottleneck if bottleneck else resnet.BasicBlock
        body = resnet.ResNet(block, list(blocks), norm_layer=functools.partial(_NORMS[norm], eps=norm_eps))
        # Without the classifier's fc and avgpool; torchvision's names stay, so its state dicts load as they are.
        for stage in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            self.add_module(stage, getattr(body, stage))
        self.out_channels = tuple(width * block.expansion for width in (64, 128, 256, 512))
        frozen = [("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)][: 5 - trainable_layers]
        for stage in (stage for group in frozen for stage in group):
            self.get_submodule(stage).requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images [N, 3, H, W] to maps [N, C_i, ceil(H / stride), ceil(W / stride)]."""
        for stage in ("conv1", "bn1", "relu", "maxpool"):
            x = self.get_submodule(stage)(x)
        maps = {}
        for name, stage in (("c2", "layer1"), ("c3", "layer2"), ("c4", "layer3"), ("c5", "layer4")):
            x = self.get_submodule(stage)(x)
            maps[name] = x
        return maps


def load_backbone(backbone: nn.Module, path: str) -> None:
    """Load a torchvision ImageNet state dict (.pth or .safetensors) into `backbone`; classifier keys are left out.

    Errors: ValueError if the file does not exist or does not fit.
    """
    own = backbone.state_dict()
    # A file may lack the counters of the batch norms, as the older ones do, or have them for frozen ones.
    weights = {name: value for name, value in own.items() if name.endswith(_COUNTER)}
    for name, value in read_state_dict(path, "backbone_weights").items():
        if not name.startswith("fc.") and (name in own or not name.endswith(_COUNTER)):
            weights[name] = value
    problems = misfits(backbone, weights)
    if problems:
        raise ValueError(f"backbone_weights: {path} does not fit: {problems}")
    backbone.load_state_dict(weights)


def warn_if_random_and_frozen(backbone: nn.Module) -> None:
    """Warn that frozen layers hold random weights, which no training can mend."""
    frozen = [name for name, parameter in backbone.named_parameters() if not parameter.requires_grad]
    if frozen:
        warnings.warn(
            f"{len(frozen)} frozen backbone parameters hold random weights: give backbone_weights, load a checkpoint, "
            'or train from scratch with trainable_layers=5 and norm="bn"',
            stacklevel=3,
        )
