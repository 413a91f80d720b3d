"""Necks: a pyramid, conv5 on RoIs of C4, or C5 alone. What each head sees, at any size."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import resnet

import tmask
from tests.model.conftest import NECKS, losses_of, small, watched
from tmask.model.box_head import MeanBoxHead
from tmask.model.fpn import FPN
from tmask.model.single_level import SingleLevel
from tmask_kernels import roi_align


def neck_of(neck: str, **settings: Any) -> tmask.MaskRCNN:
    return small(**NECKS[neck] | settings)


@pytest.mark.parametrize("size", [(64, 96), (61, 83), (33, 100)], ids=str)
@pytest.mark.parametrize(
    ("neck", "backbone", "strides"),
    [
        ("fpn", "resnet10", (4, 8, 16, 32, 64)),
        ("fpn", "resnet50", (4, 8, 16, 32, 64)),
        ("fpn", "resnext50_32x4d", (4, 8, 16, 32, 64)),
        ("c4", "resnet18", (16,)),
        ("c5", "resnet10", (32,)),
    ],
)
def test_strides_of_maps_anchors_and_rois(
    neck: str, backbone: str, strides: tuple[int, ...], size: tuple[int, int]
) -> None:
    model = neck_of(neck, backbone=backbone)
    levels = model.fpn(list(model.backbone(torch.rand(1, 3, *size)).values()))
    assert [level.shape[-2:] for level in levels] == [(-(-size[0] // s), -(-size[1] // s)) for s in strides]
    assert {level.shape[1] for level in levels} == {256 if neck == "c4" else 16}
    assert model.rpn.anchors.strides == strides
    extractor = model.roi_heads.extractor.pool if neck == "c4" else model.roi_heads.extractor
    assert extractor.strides == strides[:4]


def test_c4_pools_14_bins_and_both_heads_share_conv5() -> None:
    model = neck_of("c4")
    seen, found = watched(model)
    (c4,), (proposals, _) = seen["fpn"][1], seen["rpn"][1]
    assert torch.equal(c4, list(seen["fpn"][0][0])[-1]), "the backbone's own map"
    for part, boxes, valid in (("box", proposals.boxes, proposals.valid()), ("mask", found.boxes, found.valid())):
        with torch.no_grad():
            pooled = roi_align(c4, boxes, 14, 1 / 16, valid=valid, sampling_ratio=0, aligned=True)
            expected = model.roi_heads.extractor.stage(pooled)
        assert expected.shape[1:] == (512, 7, 7)
        torch.testing.assert_close(seen[part][0][0], expected, rtol=1e-5, atol=1e-5)
    # conv5 is a part of the RoI heads, once, and no longer of the backbone.
    names = [name for name, _ in model.named_parameters() if "layer4" in name or "stage" in name]
    assert {name.split(".0.")[0] for name in names} == {"roi_heads.extractor.stage"}
    assert len(list(model.parameters())) == len({id(p) for p in model.parameters()})
    assert copy.deepcopy(model).roi_heads.extractor.stage is not model.roi_heads.extractor.stage


def test_both_losses_of_c4_teach_conv5() -> None:
    model, gradients = neck_of("c4"), []
    for name in ("loss_classifier", "loss_mask"):
        conv5 = list(model.roi_heads.extractor.parameters())
        gradients.append(torch.autograd.grad(losses_of(model)[name], conv5))
        assert all(gradient.any() for gradient in gradients[-1])
    assert not any(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_box_head_of_c4_is_a_mean_and_two_products() -> None:
    head = MeanBoxHead(channels=6, num_classes=4, class_bias=0.5)
    x = torch.randn(5, 6, 7, 7)
    logits, deltas = head(x)
    mean = x.flatten(2).mean(2)
    torch.testing.assert_close(logits, mean @ head.classifier.weight.T + 0.5)
    torch.testing.assert_close(deltas, (mean @ head.regressor.weight.T).view(5, 4, 4))
    assert MeanBoxHead(channels=6, num_classes=4, background=False)(x)[0].shape == (5, 3)


def test_c5_has_the_heads_of_the_pyramid_on_one_projected_map() -> None:
    model = neck_of("c5")
    assert isinstance(model.fpn, SingleLevel)
    seen, _ = watched(model)
    (level,) = seen["fpn"][1]
    conv = model.fpn.lateral[0]
    expected = torch.nn.functional.conv2d(list(seen["fpn"][0][0])[-1], conv.weight, conv.bias)
    torch.testing.assert_close(level, expected)
    pyramid = neck_of("fpn")
    for part in ("box_head", "mask_head"):
        shapes = [{k: v.shape for k, v in getattr(m.roi_heads, part).state_dict().items()} for m in (model, pyramid)]
        assert shapes[0] == shapes[1]


def test_imagenet_weights_reach_conv5_of_c4(tmp_path: Path) -> None:
    theirs = resnet.resnet18()
    torch.save(theirs.state_dict(), tmp_path / "r18.pth")
    settings = {"backbone": "resnet18", "norm": "frozen_bn", "trainable_layers": 3}
    model = neck_of("c4", **settings, backbone_weights=str(tmp_path / "r18.pth"))
    ours = model.roi_heads.extractor.stage.state_dict()
    for name, value in theirs.layer4.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(ours[name], value), name
    frozen = {name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "layer1"}
    assert not hasattr(model.backbone, "layer4")


def count(module: Any, kind: type = torch.nn.Module) -> int:
    """Parameters of its modules of a kind."""
    return sum(p.numel() for m in module.modules() if isinstance(m, kind) for p in m.parameters(recurse=False))


def test_presets_are_the_published_networks() -> None:
    """Widths and parameters, on tensors without memory; ours have frozen batch norms, without parameters."""
    with torch.device("meta"):
        c4, x101 = (tmask.build_model(name, 81, warn_if_untrained=False) for name in ("r50_c4", "x101_fpn"))
        r50, next101 = (
            count(theirs) - count(theirs.fc) - count(theirs, torch.nn.BatchNorm2d)
            for theirs in (resnet.resnet50(), resnet.resnext101_32x8d())
        )
        assert c4.roi_heads.mask_head(torch.empty(3, 2048, 7, 7)).shape == (3, 81, 14, 14)
        # Every other head takes the channels of conv5.
        more = tmask.build_model("r50_c4", 81, mask_transfer={}, keypoints={}, warn_if_untrained=False).roi_heads
        mlp = tmask.build_model("r50_c4", 81, mask_head="mlp", warn_if_untrained=False).roi_heads
    assert count(x101.backbone) == next101
    assert isinstance(x101.fpn, FPN)
    assert count(c4.backbone) + count(c4.roi_heads.extractor) == r50
    assert count(c4.fpn) == 0
    assert c4.rpn.head.conv.weight.shape == (1024, 1024, 3, 3)
    assert c4.rpn.head.objectness.weight.shape == (15, 1024, 1, 1)
    assert c4.roi_heads.box_head.classifier.weight.shape == (81, 2048)
    assert c4.roi_heads.mask_head.deconv.weight.shape == (2048, 256, 2, 2)
    assert more.mask_transfer.layers[0].in_features == 5 * 2048
    assert more.keypoint_head.convs[0].in_channels == 2048
    assert mlp.mask_head.fcs[0].in_features == 49 * 2048


def test_tiny_c5_is_tiny_but_for_its_one_level() -> None:
    tiny, c5 = tmask.PRESETS["tiny"], tmask.PRESETS["tiny_c5"]
    other = {name for name, value in vars(c5).items() if value != vars(tiny)[name]}
    assert other == {"neck", "anchor_sizes"}
    assert c5.anchor_sizes == (tuple(size for level in tiny.anchor_sizes for size in level),)


def test_names_of_the_weights_are_a_contract() -> None:
    names = {
        neck: {name for name in neck_of(neck).state_dict() if name.startswith(("fpn.", "roi_heads."))}
        for neck in ("c4", "c5")
    }
    layers = [
        f"roi_heads.{head}"
        for head in ("box_head.classifier", "box_head.regressor", "mask_head.deconv", "mask_head.predictor")
    ]
    more = ["roi_heads.box_head.fc6", "roi_heads.box_head.fc7", "roi_heads.mask_head.convs.0", "fpn.lateral.0"]
    kinds = ("weight", "bias")
    assert {name for name in names["c4"] if ".stage." not in name} == {f"{x}.{kind}" for x in layers for kind in kinds}
    assert names["c5"] == {f"{x}.{kind}" for x in layers + more for kind in kinds}
