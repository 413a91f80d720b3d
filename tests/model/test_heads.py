"""The heads: shapes, and the mask head against the layers it is defined by."""

import pytest
import torch
import torch.nn.functional as F

from tmask.model.box_head import BoxHead
from tmask.model.mask_head import MaskHead
from tmask_kernels.testing import assert_close


@pytest.mark.parametrize("num_rois", [0, 1, 5])
@pytest.mark.parametrize("side", [14, 7], ids="side{}".format)
def test_mask_head_equals_its_layers(num_rois: int, side: int) -> None:
    head = MaskHead(in_channels=6, channels=5, num_layers=2, num_classes=4).double()
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
    upstream = torch.randn_like(actual)
    inputs = [x, *head.parameters()]
    for a, e in zip(
        torch.autograd.grad(actual, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        assert_close(a, e)


def test_box_head_shapes_and_initial_near_uniform_classes() -> None:
    head = BoxHead(channels=8, pool_size=7, hidden=32, num_classes=5)
    logits, deltas = head(torch.randn(3, 8, 7, 7))
    assert logits.shape == (3, 5)
    assert deltas.shape == (3, 5, 4)
    assert logits.softmax(1).std() < 0.02
    assert deltas.abs().max() < 0.05
