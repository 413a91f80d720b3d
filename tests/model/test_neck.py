"""Necks: a pyramid, conv5 on RoIs of C4, or C5 alone. What each head sees, at any size, trained without a wait."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torchvision.models import resnet

import tmask
from tests.model.conftest import NECKS, SMALL, images_and_targets
from tests.model.sync import count_blocking
from tmask.model.box_head import MeanBoxHead
from tmask.model.fpn import FPN
from tmask.model.single_level import SingleLevel
from tmask.structures import Detections, ImageBatch
from tmask_kernels import roi_align, use_backend
from tmask_kernels.testing import random_boxes


def model_of(neck: str, **settings: Any) -> tmask.MaskRCNN:
    torch.manual_seed(0)
    return tmask.build_model("tiny", num_classes=4, **SMALL | NECKS[neck] | settings)


def batch_of(model: tmask.MaskRCNN) -> tuple[ImageBatch, Any]:
    return model.transform(*images_and_targets())


@pytest.mark.parametrize("size", [(64, 96), (61, 83), (33, 100)], ids=str)
@pytest.mark.parametrize(("neck", "strides"), [("fpn", (4, 8, 16, 32, 64)), ("c4", (16,)), ("c5", (32,))])
def test_strides_of_maps_anchors_and_rois(neck: str, strides: tuple[int, ...], size: tuple[int, int]) -> None:
    model = model_of(neck)
    levels = model.fpn(list(model.backbone(torch.rand(1, 3, *size)).values()))
    assert [level.shape[-2:] for level in levels] == [(-(-size[0] // s), -(-size[1] // s)) for s in strides]
    assert {level.shape[1] for level in levels} == {256 if neck == "c4" else 16}
    assert model.rpn.anchors.strides == strides
    extractor = model.roi_heads.extractor.pool if neck == "c4" else model.roi_heads.extractor
    assert extractor.strides == strides[:4]


@pytest.mark.parametrize("convention", ["detectron2", pytest.param("torchvision", marks=pytest.mark.slow)])
@pytest.mark.parametrize("neck", ["c4", "c5"])
def test_a_neck_trains_at_odd_sizes_without_waiting(neck: str, convention: str) -> None:
    model = model_of(neck, size_divisible=1, convention=convention)
    images, targets = batch_of(model)
    assert all(side % 32 for side in images.tensor.shape[-2:])
    with use_backend("reference"), count_blocking() as found:
        losses = model.forward_padded(images, targets)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[union-attr]
        with torch.no_grad():
            result = model.eval().forward_padded(images)
    assert not found
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing, f"no gradient reaches {missing}"
    assert isinstance(result, Detections)
    assert result.counts.sum() > 0
    assert result.masks is not None
    assert result.masks.shape == (2, 10, *([14, 14] if neck == "c4" else [28, 28]))


def seen_by_heads(model: tmask.MaskRCNN) -> dict[str, tuple[Any, Any]]:
    """What goes into and comes out of each part in inference, and the result."""
    seen: dict[str, tuple[Any, Any]] = {}
    parts = {"fpn": model.fpn, "rpn": model.rpn, "box": model.roi_heads.box_head, "mask": model.roi_heads.mask_head}
    for part, module in parts.items():
        module.register_forward_hook(lambda _, inputs, output, part=part: seen.update({part: (inputs, output)}))
    images, _ = batch_of(model)
    with torch.no_grad():
        seen["result"] = (images, model.eval().forward_padded(images))
    return seen


def test_c4_pools_14_bins_and_both_heads_share_conv5() -> None:
    model = model_of("c4")
    seen = seen_by_heads(model)
    (c4,), (proposals, _) = seen["fpn"][1], seen["rpn"][1]
    assert torch.equal(c4, list(seen["fpn"][0][0])[-1]), "the map as the backbone gives it"
    found = seen["result"][1]
    for part, boxes, valid in (
        ("box", proposals.boxes, proposals.valid()),
        ("mask", found.boxes, found.valid()),
    ):
        with torch.no_grad():
            pooled = roi_align(c4, boxes, 14, 1 / 16, valid=valid, sampling_ratio=0, aligned=True)
            expected = model.roi_heads.extractor.stage(pooled)
        assert expected.shape[1:] == (512, 7, 7)
        torch.testing.assert_close(seen[part][0][0], expected, rtol=1e-5, atol=1e-5)
    # conv5 is a part of the RoI heads, once, and no longer of the backbone.
    names = [name for name, _ in model.named_parameters() if "layer4" in name or "stage" in name]
    assert {name.split(".0.")[0] for name in names} == {"roi_heads.extractor.stage"}
    assert len(list(model.parameters())) == len({id(p) for p in model.parameters()})
    twin = copy.deepcopy(model)
    assert twin.roi_heads.extractor.stage is not model.roi_heads.extractor.stage


def test_both_losses_of_c4_teach_conv5() -> None:
    model = model_of("c4")
    gradients = {}
    for name in ("loss_classifier", "loss_mask"):
        torch.manual_seed(1)
        model.zero_grad()
        model.forward_padded(*batch_of(model))[name].backward()  # type: ignore[index]
        gradients[name] = [p.grad.clone() for p in model.roi_heads.extractor.parameters()]  # type: ignore[union-attr]
        assert all(g.any() for g in gradients[name])
    assert not any(torch.equal(a, b) for a, b in zip(*gradients.values(), strict=True))


def test_the_box_head_of_c4_is_a_mean_and_two_products() -> None:
    head = MeanBoxHead(channels=6, num_classes=4, class_bias=0.5)
    x = torch.randn(5, 6, 7, 7)
    logits, deltas = head(x)
    mean = x.flatten(2).mean(2)
    torch.testing.assert_close(logits, mean @ head.classifier.weight.T + 0.5)
    torch.testing.assert_close(deltas, (mean @ head.regressor.weight.T).view(5, 4, 4))
    assert MeanBoxHead(channels=6, num_classes=4, background=False)(x)[0].shape == (5, 3)


@pytest.mark.parametrize("op", ["roi_align", "roi_pool"])
def test_c5_reads_every_roi_at_stride_32(op: str) -> None:
    model = model_of("c5", roi_extractor={"op": op})
    features = [torch.randn(2, 16, 9, 13, requires_grad=True)]
    boxes = torch.cat([random_boxes(6, height=288, width=416, min_size=s, seed=s).view(2, 3, 4) for s in (4, 150)], 1)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, 4:] = False
    out = model.roi_heads.extractor(features, boxes, valid, 7)
    rois = torch.cat([torch.arange(2.0).repeat_interleave(6)[:, None], boxes.flatten(0, 1)], 1)
    if op == "roi_pool":
        expected = torchvision.ops.roi_pool(features[0], rois, 7, 1 / 32)
    else:
        expected = torchvision.ops.roi_align(features[0], rois, 7, 1 / 32, 0, True)
    expected = expected * valid.flatten()[:, None, None, None]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(out.shape)
    (got,) = torch.autograd.grad(out, features, upstream)
    (want,) = torch.autograd.grad(expected, features, upstream)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_c5_has_the_heads_of_the_pyramid_on_one_projected_map() -> None:
    model = model_of("c5")
    assert isinstance(model.fpn, SingleLevel)
    seen = seen_by_heads(model)
    (level,) = seen["fpn"][1]
    conv = model.fpn.lateral[0]
    expected = torch.nn.functional.conv2d(list(seen["fpn"][0][0])[-1], conv.weight, conv.bias)
    torch.testing.assert_close(level, expected)
    pyramid = model_of("fpn")
    for part in ("box_head", "mask_head"):
        shapes = [{k: v.shape for k, v in getattr(m.roi_heads, part).state_dict().items()} for m in (model, pyramid)]
        assert shapes[0] == shapes[1]


@pytest.mark.slow
@pytest.mark.parametrize("neck", ["c4", "c5"])
def test_a_neck_is_traced_whole(neck: str) -> None:
    model = model_of(neck).eval()
    images, _ = batch_of(model)
    with torch.no_grad(), use_backend("reference"):
        eager = model.forward_padded(images)
        traced = torch.compile(model.forward_padded, fullgraph=True, backend="eager", dynamic=False)(images)
    assert isinstance(eager, Detections)
    assert eager.counts.sum() > 0
    for name in ("boxes", "scores", "labels", "counts", "masks"):
        torch.testing.assert_close(getattr(traced, name), getattr(eager, name), rtol=1e-5, atol=1e-5, msg=name)


def test_imagenet_weights_reach_conv5_of_c4(tmp_path: Path) -> None:
    theirs = resnet.resnet18()
    torch.save(theirs.state_dict(), tmp_path / "r18.pth")
    settings = {"backbone": "resnet18", "norm": "frozen_bn", "trainable_layers": 3}
    model = model_of("c4", **settings, backbone_weights=str(tmp_path / "r18.pth"))
    ours = model.roi_heads.extractor.stage.state_dict()
    for name, value in theirs.layer4.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(ours[name], value), name
    frozen = {name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "layer1"}
    assert not hasattr(model.backbone, "layer4")


def parameters(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def test_presets_are_the_published_networks() -> None:
    """Widths and parameters, on tensors without memory."""
    with torch.device("meta"):
        c4 = tmask.build_model("r50_c4", 81, warn_if_untrained=False)
        x101 = tmask.build_model("x101_fpn", 81, warn_if_untrained=False)
        r50, next101 = resnet.resnet50(), resnet.resnext101_32x8d()
        out = c4.roi_heads.mask_head(torch.empty(3, 2048, 7, 7))
    assert out.shape == (3, 81, 14, 14)
    assert parameters(x101.backbone) == parameters(next101) - parameters(next101.fc) - norms(next101)
    conv5 = c4.roi_heads.extractor
    assert parameters(c4.backbone) + parameters(conv5) == parameters(r50) - parameters(r50.fc) - norms(r50)
    assert parameters(c4.fpn) == 0
    assert c4.rpn.head.conv.weight.shape == (1024, 1024, 3, 3)
    assert c4.rpn.head.objectness.weight.shape == (15, 1024, 1, 1)
    assert c4.roi_heads.box_head.classifier.weight.shape == (81, 2048)
    assert c4.roi_heads.mask_head.deconv.weight.shape == (2048, 256, 2, 2)
    assert isinstance(x101.fpn, FPN)


def test_every_head_takes_what_conv5_gives() -> None:
    with torch.device("meta"):
        other = tmask.build_model("r50_c4", 81, mask_transfer={}, keypoints={}, warn_if_untrained=False).roi_heads
        mlp = tmask.build_model("r50_c4", 81, mask_head="mlp", warn_if_untrained=False).roi_heads
    assert other.mask_transfer.layers[0].in_features == 5 * 2048
    assert other.keypoint_head.convs[0].in_channels == 2048
    assert mlp.mask_head.fcs[0].in_features == 49 * 2048


def norms(module: Any) -> int:
    """The parameters of its batch norms, which are buffers where they are frozen."""
    return sum(parameters(m) for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_tiny_c5_is_tiny_but_for_its_one_level() -> None:
    tiny, c5 = tmask.PRESETS["tiny"], tmask.PRESETS["tiny_c5"]
    other = {name for name, value in vars(c5).items() if value != vars(tiny)[name]}
    assert other == {"neck", "anchor_sizes"}
    assert c5.anchor_sizes == (tuple(size for level in tiny.anchor_sizes for size in level),)


def test_names_of_the_weights_are_a_contract() -> None:
    def outside_backbone(neck: str) -> set[str]:
        names = model_of(neck, backbone="resnet10").state_dict()
        return {name for name in names if name.startswith(("fpn.", "roi_heads.")) and ".stage." not in name}

    box = {f"roi_heads.box_head.{layer}.{kind}" for layer in ("classifier", "regressor") for kind in ("weight", "bias")}
    mask = {f"roi_heads.mask_head.{layer}.{kind}" for layer in ("deconv", "predictor") for kind in ("weight", "bias")}
    assert outside_backbone("c4") == box | mask
    fc = {f"roi_heads.box_head.{layer}.{kind}" for layer in ("fc6", "fc7") for kind in ("weight", "bias")}
    convs = {f"roi_heads.mask_head.convs.0.{kind}" for kind in ("weight", "bias")}
    assert outside_backbone("c5") == box | mask | fc | convs | {"fpn.lateral.0.weight", "fpn.lateral.0.bias"}
