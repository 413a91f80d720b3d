"""Mask^X R-CNN against its definition: the transfer of weights, the fusion, and what learns from which loss."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tmask
from tests.model.conftest import Batch, assert_same_gradients, detected, losses_of, padded, small
from tests.mutation import mutant
from tmask.model import mask_transfer
from tmask.model.mask_fusion import MaskFusion
from tmask.model.mask_head import MaskHead
from tmask.model.mask_transfer import MaskTransfer
from tmask_kernels.testing import assert_close


def weights_of_boxes(num_classes: int = 5, features: int = 3) -> tuple[Tensor, Tensor]:
    """A classifier's weights [C, D] and a regressor's [4C, D]."""
    generator = torch.Generator().manual_seed(1)
    classifier = torch.randn(num_classes, features, generator=generator, dtype=torch.float64)
    regressor = torch.randn(4 * num_classes, features, generator=generator, dtype=torch.float64)
    return classifier.requires_grad_(), regressor.requires_grad_()


def by_definition(function: MaskTransfer, inputs: str, slope: float, classifier: Tensor, regressor: Tensor) -> Tensor:
    """Class by class: its row of the classifier, then its four of the regressor."""
    rows = [torch.zeros(6, dtype=torch.float64)]
    for k in range(1, len(classifier)):
        box = [regressor[4 * k + i] for i in range(4)]
        x = torch.cat({"cls": [classifier[k]], "box": box, "cls_box": [classifier[k], *box]}[inputs])
        for i, layer in enumerate(function.layers[::2]):
            x = layer.weight @ (torch.where(x > 0, x, slope * x) if i else x) + layer.bias
        rows.append(x)
    return torch.stack(rows)


def check_definition(module: Any, inputs: str, num_layers: int, activation: str) -> None:
    torch.manual_seed(0)
    function = module.MaskTransfer(
        features=3, channels=6, inputs=inputs, num_layers=num_layers, activation=activation, stop_grad=True
    ).double()
    for layer in function.layers[::2]:
        torch.nn.init.normal_(layer.bias)
    classifier, regressor = weights_of_boxes()
    expected = by_definition(function, inputs, {"leaky_relu": 0.1, "relu": 0.0}[activation], classifier, regressor)
    assert_close(function(classifier, regressor), expected)
    assert_close(function(classifier[1:], regressor), expected)  # a classifier without background
    # Every class by the same function: other places, the same rows.
    order = torch.tensor([0, 3, 1, 4, 2])
    shuffled = function(classifier[order], regressor.unflatten(0, (-1, 4))[order].flatten(0, 1))
    assert_close(shuffled, expected[order])


@pytest.mark.parametrize("inputs", ["cls", "box", "cls_box"])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("activation", ["leaky_relu", "relu"])
def test_equals_its_definition(inputs: str, num_layers: int, activation: str) -> None:
    check_definition(mask_transfer, inputs, num_layers, activation)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # Classifier and regressor on the wrong axis: all rows of the one before all of the other.
        ("[parts[name] for name in self.inputs], dim=1)", "[parts[n].flatten() for n in self.inputs]).view(4, -1)"),
        ('("cls", "box")', '("box", "cls")'),
        ("unflatten(0, (-1, 4))[1:]", "unflatten(0, (4, -1)).transpose(0, 1)[1:]"),  # a row of each class, four times
        ("classifier[-len(regressor) :]", "classifier[: len(regressor)]"),  # the background's row for class 1
        ("LeakyReLU(0.1)", "LeakyReLU()"),
        ("layers[:-1]", "layers"),  # no linear output
        ("(0, 0, 1, 0)", "(0, 0, 0, 1)"),
    ],
)
def test_mutants_are_found(old: str, new: str, tmp_path: Path) -> None:
    broken = mutant(mask_transfer, old, new, tmp_path)
    with pytest.raises(AssertionError):
        check_definition(broken, "cls_box", 2, "leaky_relu")


# The whole model.


def build(**settings: Any) -> tmask.MaskRCNN:
    return small(**{"mask_transfer": {}, **settings})


def batch_of(model: tmask.MaskRCNN, boxes_only: tuple[int, ...] = ()) -> Batch:
    """The first image has objects of classes 1 and 2, the second of class 1. Those of `boxes_only` have no mask."""
    images, targets = padded(model)
    has_mask = targets.has_mask & ~torch.isin(targets.labels, torch.tensor(boxes_only))
    return images, targets._replace(has_mask=has_mask)


def test_every_option_reaches_the_model() -> None:
    """Of a box head of 32 features and a mask head of 16 channels."""

    def described(**settings: Any) -> tuple[list[str], bool]:
        with torch.device("meta"):
            built = build(mask_transfer=settings).roi_heads.mask_transfer
        return [str(layer) for layer in built.layers], built.stop_grad

    widths = {"cls": 32, "box": 128, "cls_box": 160}
    for inputs, layers, activation in itertools.product(widths, (1, 2, 3), ("leaky_relu", "relu")):
        between = {"leaky_relu": "LeakyReLU(negative_slope=0.1)", "relu": "ReLU()"}[activation]
        expected = [f"Linear(in_features={widths[inputs]}, out_features=16, bias=True)"]
        expected += [between, "Linear(in_features=16, out_features=16, bias=True)"] * (layers - 1)
        settings = {"inputs": inputs, "layers": layers, "activation": activation}
        assert described(**settings) == (expected, True)
        if settings == {"inputs": "cls_box", "layers": 2, "activation": "leaky_relu"}:
            assert described() == (expected, True), "the published choice is the default"


def mask_loss(model: tmask.MaskRCNN, batch: Batch | None = None) -> Tensor:
    return losses_of(model, batch)["loss_mask"]


BOX_HEAD = ("roi_heads.box_head.classifier.weight", "roi_heads.box_head.regressor.weight")


@pytest.mark.parametrize(
    ("settings", "learns"),
    [
        ({}, set()),
        ({"stop_grad": False}, {*BOX_HEAD}),
        ({"stop_grad": False, "inputs": "cls"}, {BOX_HEAD[0]}),
        ({"stop_grad": False, "inputs": "box"}, {BOX_HEAD[1]}),
    ],
    ids=["default", "cls_box", "cls", "box"],
)
def test_what_learns_from_the_mask_loss(settings: dict[str, Any], learns: set[str]) -> None:
    model = build(mask_transfer=settings)
    mask_loss(model).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert ({*BOX_HEAD} & moved) == learns
    assert not any(name.startswith("roi_heads.box_head.") for name in moved - {*BOX_HEAD})
    for part in ("roi_heads.mask_transfer.layers.0.", "roi_heads.mask_transfer.layers.2.", "roi_heads.mask_head."):
        parameters = {name for name, _ in model.named_parameters() if name.startswith(part)}
        assert parameters <= moved
    assert {"backbone.conv1.weight", "fpn.output.0.weight"} <= moved


def captured(model: tmask.MaskRCNN) -> list[Tensor]:
    """Collects the kernels [C, O] that the transfer returns from now on, with their gradients."""
    seen: list[Tensor] = []

    def keep(module: torch.nn.Module, args: object, out: Tensor) -> None:
        if out.requires_grad:
            out.retain_grad()
        seen.append(out)

    model.roi_heads.mask_transfer.register_forward_hook(keep)
    return seen


def test_classes_without_masks_stay_out_of_the_loss() -> None:
    """Neither the kernel of such a class nor the pixels of its ground truth change the loss. With masks they do."""
    model = build()
    model.rpn.post_nms_top_n = type(model.rpn.post_nms_top_n)(1, 1)  # the ground truth is what is positive
    seen = captured(model)
    everything, without = padded(model), batch_of(model, boxes_only=(2,))
    mask_loss(model, everything).backward()
    assert [bool(row.any()) for row in seen[-1].grad] == [False, True, True, False]
    loss = mask_loss(model, without)
    loss.backward()
    assert [bool(row.any()) for row in seen[-1].grad] == [False, True, False, False]
    other = without[1].masks.clone()
    other[0, 1] = -1
    assert mask_loss(model, (without[0], without[1]._replace(masks=other))) == loss
    assert mask_loss(model, (everything[0], everything[1]._replace(masks=other))) != mask_loss(model, everything)


@pytest.mark.parametrize("boxes_only", [(1,), (1, 2, 3)], ids=["of one image", "at all"])
def test_images_without_any_mask(boxes_only: tuple[int, ...]) -> None:
    model = build()
    loss = mask_loss(model, batch_of(model, boxes_only))
    loss.backward()
    assert loss.isfinite()
    assert (loss == 0) == (boxes_only == (1, 2, 3))
    gradients = [p.grad for name, p in model.named_parameters() if ".mask_" in name]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_masks_follow_the_box_head() -> None:
    """The transfer reads the present weights of the box head, as after an update."""
    heads, x = build().roi_heads, torch.rand(2, 16, 14, 14)
    with torch.no_grad():
        before = heads._predicting(heads.mask_head)(x)
        heads.box_head.classifier.weight[2] += 1.0
        after = heads._predicting(heads.mask_head)(x)
    assert [bool(change.any()) for change in (after - before).unbind(1)] == [False, False, True, False]


def test_a_detection_gets_the_mask_of_its_class() -> None:
    """Made so that a class's kernel is its first weight in the classifier times 10, and the features are ones."""
    model = build(mask_transfer={"inputs": "cls", "layers": 1})
    (linear,), deconv = model.roi_heads.mask_transfer.layers, model.roi_heads.mask_head.deconv
    for weight in (linear.weight, linear.bias, deconv.weight):
        torch.nn.init.zeros_(weight)
    torch.nn.init.constant_(linear.weight[:, 0], 10.0)
    torch.nn.init.ones_(deconv.bias)
    found = detected(model)
    assert {1, 2, 3} <= {*found.labels.flatten().tolist()}
    of_class = (16 * 10 * model.roi_heads.box_head.classifier.weight[:, 0]).double().sigmoid()
    expected = torch.where(found.valid(), of_class[found.labels], 0.0)[..., None, None]
    assert_close(found.masks, expected.expand_as(found.masks))


def test_a_given_predictor_is_a_convolution_without_bias() -> None:
    head = MaskHead(in_channels=6, channels=5, num_layers=1, num_masks=None).double()
    kernel = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 6, 7, 7, dtype=torch.float64)
    expected = F.conv2d(F.relu(head.deconv(F.relu(head.convs[0](x)))), kernel[:, :, None, None])
    assert_close(head(x, predictor=kernel), expected)
    assert not [name for name, _ in head.named_parameters() if "predictor" in name]


# The fusion.


@pytest.mark.parametrize(("num_layers", "count"), [(1, 157_352_720), (2, 206_325_520)])
def test_parameters_of_the_fusion(num_layers: int, count: int) -> None:
    with torch.device("meta"):
        fusion = MaskFusion(channels=256, size=28, num_layers=num_layers)
    assert sum(p.numel() for p in fusion.parameters()) == count


@pytest.mark.parametrize("num_layers", [1, 2])
def test_the_fusion_is_added_to_every_class(num_layers: int) -> None:
    """One mask, of the deconvolution's output: rows of pixels, then of their 2 x 2 outputs, then channels."""
    fusion = MaskFusion(channels=5, size=6, num_layers=num_layers).double()
    for layer in fusion.layers:
        torch.nn.init.normal_(layer.weight)
        torch.nn.init.normal_(layer.bias)
    head = MaskHead(in_channels=3, channels=5, num_layers=1, num_masks=4).double()
    x = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    wide = F.relu(head.deconv(F.relu(head.convs[0](x))))  # [R, channels, M, M]
    hidden = wide.unflatten(3, (3, 2)).unflatten(2, (3, 2)).permute(0, 2, 4, 3, 5, 1).flatten(1)
    for layer in fusion.layers[:-1]:
        hidden = F.relu(F.linear(hidden, layer.weight, layer.bias))
    mask = F.linear(hidden, fusion.layers[-1].weight, fusion.layers[-1].bias).view(2, 1, 6, 6)
    expected = head(x) + mask
    head.fusion = fusion
    actual = head(x)
    assert_close(actual, expected)
    assert_same_gradients(actual, expected, [x, *head.parameters()], torch.randn_like(actual))
    assert head(x[:0]).shape == (0, 4, 6, 6)
