"""Each norm layer: its places in the model and what it computes there; that models learn with it: test_variants.py."""

from typing import Any

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import tmask
from tests.model.conftest import small
from tmask.model.backbone import ResNet
from tmask.model.fpn import FPN
from tmask.model.mask_head import MaskHead
from tmask.model.norm import norm_layer

LAYERS = {"bn": nn.BatchNorm2d, "sync_bn": nn.SyncBatchNorm, "frozen_bn": FrozenBatchNorm2d, "gn": nn.GroupNorm}


@pytest.mark.parametrize("norm", LAYERS)
def test_where_it_stands(norm: str) -> None:
    model = small(norm=norm, norm_eps=1e-3, fpn_channels=32, mask_head_channels=32)  # for the 32 groups
    parts = {"backbone": model.backbone, "fpn": model.fpn, "mask": model.roi_heads.mask_head}
    found = {
        part: [m for m in module.modules() if isinstance(m, tuple(LAYERS.values()))] for part, module in parts.items()
    }
    # ResNet-10: the stem, two a block, and three shortcuts. The FPN has four lateral and four output convolutions.
    expected = {"backbone": 12, "fpn": 8, "mask": 1} if norm == "gn" else {"backbone": 12, "fpn": 0, "mask": 0}
    assert {part: len(layers) for part, layers in found.items()} == expected
    for layer in (layer for layers in found.values() for layer in layers):
        assert type(layer) is LAYERS[norm]
        assert layer.eps == 1e-3


def test_group_norm_of_fpn_and_mask_head_is_behind_each_convolution() -> None:
    norm = norm_layer("gn")
    maps = [torch.randn(2, c, s, s) for c, s in ((8, 9), (16, 5))]
    fpn = FPN((8, 16), 32, norm=norm)
    for layer in [*fpn.lateral_norm, *fpn.output_norm]:
        nn.init.normal_(layer.weight)
    coarse = fpn.lateral_norm[1](fpn.lateral[1](maps[1]))
    fine = fpn.lateral_norm[0](fpn.lateral[0](maps[0])) + nn.functional.interpolate(coarse, size=(9, 9))
    levels = fpn(maps)
    torch.testing.assert_close(levels[0], fpn.output_norm[0](fpn.output[0](fine)))
    torch.testing.assert_close(levels[1], fpn.output_norm[1](fpn.output[1](coarse)))
    head = MaskHead(in_channels=32, channels=32, num_layers=2, num_masks=3, norm=norm)
    x = torch.randn(2, 32, 5, 5)
    seen: list[torch.Tensor] = []
    for layer in head.norms:
        layer.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0], output)))
    head(x)
    torch.testing.assert_close(seen[0], head.convs[0](x))
    torch.testing.assert_close(seen[2], head.convs[1](seen[1].relu()))


def test_sync_bn_of_one_process_is_bn() -> None:
    x = torch.rand(2, 3, 64, 64)
    results = []
    for norm in ("bn", "sync_bn"):
        torch.manual_seed(0)
        backbone = ResNet("resnet10", norm=norm)
        out = backbone(x)["c5"]
        out.square().mean().backward()
        results.append((out, backbone.conv1.weight.grad, backbone.state_dict(), backbone.eval()(x)["c5"]))
    bn, sync = results
    for a, b in ((bn[0], sync[0]), (bn[1], sync[1]), (bn[3], sync[3])):
        assert torch.equal(a, b)
    assert bn[2].keys() == sync[2].keys()
    assert all(torch.equal(bn[2][name], sync[2][name]) for name in bn[2])


def test_group_norm_asks_nothing_of_a_width_that_it_does_not_stand_behind() -> None:
    tmask.ModelConfig(norm="gn", mask_head="mlp", mask_head_channels=48)
    bare: dict[str, Any] = {"norm": "gn", "mask_head_layers": 0, "mask_head_channels": 48}
    with torch.device("meta"):
        head = tmask.build_model("r50_fpn", 4, warn_if_untrained=False, **bare).roi_heads.mask_head
        assert head(torch.empty(2, 256, 14, 14)).shape == (2, 4, 28, 28)
