"""The heads: against the layers that define them, published sizes and initial weights."""

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tmask
from tests.model.conftest import assert_same_gradients, small
from tmask.model.box_head import BoxHead
from tmask.model.keypoint_head import KeypointHead
from tmask.model.mask_fusion import MaskFusion
from tmask.model.mask_head import MaskHead, MLPMaskHead
from tmask.model.mask_transfer import MaskTransfer
from tmask_kernels.testing import assert_close


@pytest.mark.parametrize("num_rois", [0, 1, 5])
@pytest.mark.parametrize("side", [14, 7], ids="side{}".format)
def test_mask_head_equals_its_layers(num_rois: int, side: int) -> None:
    head = MaskHead(in_channels=6, channels=5, num_layers=2, num_masks=4).double()
    torch.nn.init.normal_(head.predictor.weight)
    for bias in (head.deconv.bias, head.predictor.bias):
        torch.nn.init.normal_(bias)
    x = torch.randn(num_rois, 6, side, side, dtype=torch.float64, requires_grad=True)
    expected = x
    for conv in head.convs:
        expected = F.relu(conv(expected))
    expected = head.predictor(F.relu(head.deconv(expected)))
    actual = head(x)
    assert actual.shape == (num_rois, 4, 2 * side, 2 * side)
    assert_close(actual, expected)
    assert_same_gradients(actual, expected, [x, *head.parameters()], torch.randn_like(actual))


@pytest.mark.parametrize("num_rois", [0, 3])
def test_keypoint_head_equals_its_layers(num_rois: int) -> None:
    head = KeypointHead(in_channels=6, channels=5, num_layers=2, num_keypoints=4).double()
    x = torch.randn(num_rois, 6, 14, 14, dtype=torch.float64)
    expected = x
    for conv in head.convs:
        expected = F.relu(F.conv2d(expected, conv.weight, conv.bias, padding=1))
    expected = F.conv_transpose2d(expected, head.deconv.weight, head.deconv.bias, stride=2, padding=1)
    assert expected.shape[-2:] == (28, 28)
    expected = F.interpolate(expected.float(), scale_factor=2, mode="bilinear", align_corners=False)
    actual = head(x)
    assert actual.shape == (num_rois, 4, 56, 56)
    assert actual.dtype == torch.float32
    assert_close(actual, expected)


@pytest.mark.parametrize("num_rois", [0, 1, 5])
@pytest.mark.parametrize("num_layers", [2, 3], ids="layers{}".format)
def test_mlp_mask_head_equals_its_layers(num_rois: int, num_layers: int) -> None:
    head = MLPMaskHead(in_channels=6, pool_size=14, hidden=8, num_layers=num_layers, num_masks=4)
    torch.nn.init.normal_(head.predictor.bias)
    x = torch.randn(num_rois, 6, 14, 14)
    hidden = x.reshape(num_rois, 6 * 14 * 14)
    assert len(head.fcs) == num_layers
    for fc in head.fcs:
        hidden = (hidden @ fc.weight.T + fc.bias).clamp(min=0)
    logits = head(x)
    assert logits.shape == (num_rois, 4, 28, 28)
    for channel, y, x_ in ((0, 0, 0), (2, 5, 27), (3, 27, 1)):
        row = (channel * 28 + y) * 28 + x_
        expected = hidden @ head.predictor.weight[row] + head.predictor.bias[row]
        assert_close(logits[:, channel, y, x_], expected.double())
    assert_close(head(x.contiguous(memory_format=torch.channels_last)), logits.double())


def shapes(layers: Iterable[nn.Module]) -> list[tuple[int, ...]]:
    return [tuple(layer.weight.shape) for layer in layers]


def test_published_sizes_of_the_mask_heads() -> None:
    """As `build_model` makes them, on tensors without memory; a third layer of the MLP is a setting."""
    with torch.device("meta"):
        fcn, mlp, deep = (
            tmask.build_model("r50_fpn", 80, **settings, warn_if_untrained=False).roi_heads.mask_head
            for settings in ({}, {"mask_head": "mlp"}, {"mask_head": "mlp", "mask_mlp_dim": 64, "mask_mlp_layers": 3})
        )
        rois = torch.empty(3, 256, 14, 14)
    assert shapes(fcn.convs) == [(256, 256, 3, 3)] * 4
    assert shapes(mlp.fcs) == [(1024, 14 * 14 * 256), (1024, 1024)]
    assert shapes(deep.fcs) == [(64, 14 * 14 * 256), (64, 64), (64, 64)]
    assert mlp.predictor.weight.shape == (80 * 28 * 28, 1024)
    assert fcn(rois).shape == mlp(rois).shape == (3, 80, 28, 28)
    sizes = [sum(p.numel() for p in head.parameters()) for head in (fcn, mlp)]
    assert 40 * sizes[0] < sizes[1]


def test_published_sizes_of_box_and_keypoint_head_and_samples() -> None:
    with torch.device("meta"):
        model = tmask.build_model("r50_fpn", 81, keypoints={}, warn_if_untrained=False)
        keypoints = model.roi_heads.keypoint_head
        maps = keypoints(torch.empty(3, 256, 14, 14))
    assert shapes(keypoints.convs) == [(512, 256, 3, 3), *[(512, 512, 3, 3)] * 7]
    assert maps.shape == (3, 17, 56, 56)
    box = model.roi_heads.box_head
    assert shapes([box.fc6, box.fc7]) == [(1024, 256 * 7 * 7), (1024, 1024)]
    assert shapes([box.classifier, box.regressor]) == [(81, 1024), (4 * 81, 1024)]
    assert (model.rpn.batch_size, model.rpn.positive_fraction) == (256, 0.5)
    assert (model.roi_heads.batch_size, model.roi_heads.positive_fraction) == (512, 0.25)


def test_heads_begin_as_published() -> None:
    """Convolutions by MSRA's normal distribution of fan_out, fully connected layers as the box head's, by fan_in.

    Predictors N(0, 0.001), that of one channel too: Hu et al. 2018 found that MSRA's diverge there. No biases.
    """
    fcn = MaskHead(in_channels=32, channels=64, num_layers=2, num_masks=40)
    mlp = MLPMaskHead(in_channels=32, pool_size=7, hidden=128, num_layers=2, num_masks=20)
    keypoints = KeypointHead(in_channels=64, channels=128, num_layers=2, num_keypoints=17)
    transfer = MaskTransfer(
        features=256, channels=64, inputs="cls_box", num_layers=3, activation="relu", stop_grad=True
    )
    fusion = MaskFusion(channels=2, size=14, num_layers=2)
    agnostic = small(mask_class_agnostic=True, mask_head_channels=4096, mask_head_layers=0).roi_heads.mask_head
    assert agnostic.predictor.weight.shape == (1, 4096, 1, 1)
    stds = [(conv.weight, (2 / (9 * 64)) ** 0.5) for conv in fcn.convs]
    stds += [(fcn.deconv.weight, (2 / (4 * 64)) ** 0.5), (fcn.predictor.weight, 0.001)]
    stds += [(mlp.predictor.weight, 0.001), (agnostic.predictor.weight, 0.001)]
    # Of a transposed convolution torch counts in_channels x kernel as fan-out.
    stds += [(conv.weight, (2 / (9 * 128)) ** 0.5) for conv in keypoints.convs]
    stds += [(keypoints.deconv.weight, (2 / (16 * 128)) ** 0.5)]
    stds += [(layer.weight, (2 / 64) ** 0.5) for layer in transfer.layers[::2]]
    stds += [(fusion.layers[1].weight, 0.001)]
    for weight, std in stds:
        assert 0.95 < weight.std().item() / std < 1.05
        assert weight.abs().max() > 2.8 * std, "normal, not uniform"
        assert weight.mean().abs() < 0.1 * std
    for fc in (*mlp.fcs, fusion.layers[0]):
        bound = (3 / fc.in_features) ** 0.5
        assert 0.99 * bound < fc.weight.abs().max() <= bound, "uniform"
        assert fc.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    heads = (fcn, mlp, keypoints, transfer, fusion, agnostic)
    assert not any(p.any() for head in heads for name, p in head.named_parameters() if name.endswith("bias"))


def test_box_head_shapes_and_initial_near_uniform_classes() -> None:
    head = BoxHead(channels=8, pool_size=7, hidden=32, num_classes=5)
    logits, deltas = head(torch.randn(3, 8, 7, 7))
    assert logits.shape == (3, 5)
    assert deltas.shape == (3, 5, 4)
    assert logits.softmax(1).std() < 0.02
    assert deltas.abs().max() < 0.05
