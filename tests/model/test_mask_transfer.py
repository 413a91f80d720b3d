"""Mask^X R-CNN against its definition: the transfer of weights, the fusion, and what learns from which loss."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tmask
from tests.model.conftest import SMALL, images_and_targets
from tests.model.sync import count_blocking
from tests.mutation import mutant
from tmask.model import mask_transfer
from tmask.model.mask_fusion import MaskFusion
from tmask.model.mask_head import MaskHead
from tmask.model.mask_transfer import MaskTransfer
from tmask.structures import ImageBatch, Targets
from tmask_kernels import use_backend
from tmask_kernels.testing import assert_close

WIDTHS = {"cls": 1024, "box": 4096, "cls_box": 5120}


def transfer(features: int = 3, channels: int = 6, **settings: Any) -> MaskTransfer:
    defaults = {"inputs": "cls_box", "num_layers": 2, "activation": "leaky_relu", "stop_grad": True}
    torch.manual_seed(0)
    return MaskTransfer(features=features, channels=channels, **defaults | settings)


def weights_of_boxes(num_classes: int = 5, features: int = 3) -> tuple[Tensor, Tensor]:
    """A classifier's weights [C, D] and a regressor's [4C, D]."""
    generator = torch.Generator().manual_seed(1)
    classifier = torch.randn(num_classes, features, generator=generator, dtype=torch.float64)
    regressor = torch.randn(4 * num_classes, features, generator=generator, dtype=torch.float64)
    return classifier.requires_grad_(), regressor.requires_grad_()


@pytest.mark.parametrize("inputs", WIDTHS)
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_widths(inputs: str, num_layers: int) -> None:
    with torch.device("meta"):
        function = transfer(1024, 256, inputs=inputs, num_layers=num_layers)
        out = function(torch.empty(81, 1024), torch.empty(324, 1024))
    linear = [layer for layer in function.layers if isinstance(layer, torch.nn.Linear)]
    expected = [WIDTHS[inputs]] + [256] * num_layers
    assert [(layer.in_features, layer.out_features) for layer in linear] == list(itertools.pairwise(expected))
    assert out.shape == (81, 256)


def test_initial_weights() -> None:
    for layer in transfer(256, 64, num_layers=3).layers[::2]:
        assert layer.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)
        assert abs(layer.weight.mean().item()) < 0.01
        assert not layer.bias.any()


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


@pytest.mark.parametrize("inputs", WIDTHS)
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

STRICT: dict[str, Any] = {"mask_transfer": {}, **SMALL}


def build(**settings: Any) -> tmask.MaskRCNN:
    torch.manual_seed(0)
    return tmask.build_model("tiny", num_classes=4, **{**STRICT, **settings})


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


def padded(model: tmask.MaskRCNN, boxes_only: tuple[int, ...] = ()) -> tuple[ImageBatch, Targets]:
    """The first image has objects of classes 1 and 2, the second of class 1. Those of `boxes_only` have no mask."""
    images, targets = images_and_targets()
    for target in targets:
        target["has_mask"] = torch.tensor([label not in boxes_only for label in target["labels"].tolist()])
    batch, padded_targets = model.transform(images, targets)
    assert padded_targets is not None
    return batch, padded_targets


def mask_loss(model: tmask.MaskRCNN, batch: tuple[ImageBatch, Targets]) -> Tensor:
    torch.manual_seed(3)  # the sampler draws
    losses = model.forward_padded(*batch)
    assert isinstance(losses, dict)
    return losses["loss_mask"]


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
    mask_loss(model, padded(model)).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert ({*BOX_HEAD} & moved) == learns
    assert not any(name.startswith("roi_heads.box_head.") for name in moved - {*BOX_HEAD})
    for part in ("roi_heads.mask_transfer.layers.0.", "roi_heads.mask_transfer.layers.2.", "roi_heads.mask_head."):
        parameters = {name for name, _ in model.named_parameters() if name.startswith(part)}
        assert parameters <= moved
    assert {"backbone.conv1.weight", "fpn.output.0.weight"} <= moved


def test_the_box_losses_still_reach_the_box_head() -> None:
    model = build()
    losses = model.forward_padded(*padded(model))
    (losses["loss_classifier"] + losses["loss_box_reg"]).backward()
    assert all(model.get_parameter(name).grad.any() for name in BOX_HEAD)


def captured(model: tmask.MaskRCNN) -> list[Tensor]:
    """The kernels [C, O] that the transfer gives from now on, with their gradients."""
    seen: list[Tensor] = []

    def keep(module: torch.nn.Module, args: object, out: Tensor) -> None:
        if out.requires_grad:
            out.retain_grad()
        seen.append(out)

    model.roi_heads.mask_transfer.register_forward_hook(keep)
    return seen


def test_classes_without_masks_stay_out_of_the_loss() -> None:
    """Not one RoI of theirs: neither their kernel nor their ground truth's pixels enter, and they do with masks."""
    model = build()
    model.rpn.post_nms_top_n = type(model.rpn.post_nms_top_n)(1, 1)  # the ground truth is what is positive
    seen = captured(model)
    everything, without = padded(model), padded(model, boxes_only=(2,))
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
    loss = mask_loss(model, padded(model, boxes_only))
    loss.backward()
    assert loss.isfinite()
    assert (loss == 0) == (boxes_only == (1, 2, 3))
    gradients = [p.grad for name, p in model.named_parameters() if ".mask_" in name]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@torch.no_grad()
def predicted(model: tmask.MaskRCNN, batch: tuple[ImageBatch, Targets]) -> Any:
    with use_backend("reference"):
        return model.eval().forward_padded(batch[0])


def test_masks_follow_the_box_head() -> None:
    """They are made of its present weights: after an update, and after a checkpoint is loaded."""
    model, other = build(), tmask.build_model("tiny", num_classes=4, **STRICT)
    x = torch.rand(2, 16, 14, 14)

    def logits(model: tmask.MaskRCNN) -> Tensor:
        with torch.no_grad():
            return model.roi_heads._predicting(model.roi_heads.mask_head)(x)

    before, _ = logits(model), logits(other)
    with torch.no_grad():
        model.roi_heads.box_head.classifier.weight[2] += 1.0
    after = logits(model)
    assert [bool(change.any()) for change in (after - before).unbind(1)] == [False, False, True, False]
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), after)


def test_a_detection_gets_the_mask_of_its_class() -> None:
    """Made so that a class's kernel is its first weight in the classifier times 10, and the features are ones."""
    model = build(mask_transfer={"inputs": "cls", "layers": 1})
    (linear,), deconv = model.roi_heads.mask_transfer.layers, model.roi_heads.mask_head.deconv
    for weight in (linear.weight, linear.bias, deconv.weight):
        torch.nn.init.zeros_(weight)
    torch.nn.init.constant_(linear.weight[:, 0], 10.0)
    torch.nn.init.ones_(deconv.bias)
    found = predicted(model, padded(model))
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
def test_initial_weights_of_the_fusion(num_layers: int) -> None:
    fusion = MaskFusion(channels=2, size=14, num_layers=num_layers)
    assert fusion.layers[-1].weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert not any(layer.bias.any() for layer in fusion.layers)
    if num_layers == 2:
        assert fusion.layers[0].weight.std().item() == pytest.approx((2 * 14 * 14) ** -0.5, rel=0.02)


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
    upstream, learn = torch.randn_like(actual), [x, *head.parameters()]
    gradients = (torch.autograd.grad(value, learn, upstream) for value in (actual, expected))
    for got, want in zip(*gradients, strict=True):
        assert_close(got, want)
    assert head(x[:0]).shape == (0, 4, 6, 6)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [{}, {"mask_transfer": None}, {"mask_transfer": None, "mask_class_agnostic": True}],
    ids=["transfer", "own predictors", "class-agnostic"],
)
def test_the_fusion_learns_and_comes_before_the_sigmoid(settings: dict[str, Any], num_layers: int) -> None:
    model = build(mask_fusion_layers=num_layers, mask_pool_size=7, **settings)
    batch = padded(model)
    fusion = [*model.roi_heads.mask_head.fusion.parameters()]
    assert len(fusion) == 2 * num_layers
    assert all(gradient.any() for gradient in torch.autograd.grad(mask_loss(model, batch), fusion))
    torch.nn.init.constant_(model.roi_heads.mask_head.fusion.layers[-1].bias, 30.0)
    found = predicted(model, batch)
    assert found.valid().any()
    assert (found.masks[found.valid()] > 0.99).all()
    assert (found.masks <= 1).all()


# Every mode, and the model's promises in it.

MODES: dict[str, dict[str, Any]] = {
    "cls_box": {},
    "box and fusion": {
        "mask_transfer": {"inputs": "box", "activation": "relu"},
        "mask_fusion_layers": 2,
        "mask_pool_size": 7,
    },
}
SLOW_MODES: dict[str, dict[str, Any]] = {
    "cls": {"mask_transfer": {"inputs": "cls", "layers": 1}},
    "without stop_grad": {"mask_transfer": {"layers": 3, "stop_grad": False}},
    "fusion": {"mask_fusion_layers": 1},
    "own predictors and fusion": {"mask_transfer": None, "mask_fusion_layers": 1},
    "class-agnostic and fusion": {"mask_transfer": None, "mask_class_agnostic": True, "mask_fusion_layers": 1},
    "sigmoid_focal": {"losses": {"classifier": "sigmoid_focal"}},
    "c4": {
        "neck": "c4",
        "norm": "gn",
        "anchor_sizes": ((12.0, 24.0, 48.0),),
        "mask_pool_size": 7,
        "mask_head_channels": 32,
        "mask_head_layers": 0,
        "mask_fusion_layers": 1,
    },
}


@pytest.mark.parametrize(
    "settings",
    [pytest.param(settings, id=name) for name, settings in MODES.items()]
    + [pytest.param(settings, id=name, marks=pytest.mark.slow) for name, settings in SLOW_MODES.items()],
)
def test_trains_and_predicts(settings: dict[str, Any]) -> None:
    model = build(**settings)
    batch = padded(model, boxes_only=(2,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        torch.manual_seed(3)
        found = model.forward_padded(*batch, compact=True)
        torch.stack(list(found.values())).sum().backward()
        optimizer.step()
        losses.append(found["loss_mask"].item())
    assert losses[-1] < losses[0]
    results = model.eval()(images_and_targets()[0])
    assert all(len(result["masks"]) == len(result["boxes"]) > 0 for result in results)


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_never_waits(mode: str) -> None:
    model = build(mask_fusion_layers=2, mask_pool_size=7)
    batch = padded(model, boxes_only=(2,))
    with use_backend("reference"), count_blocking() as found:
        if mode == "train":
            mask_loss(model, batch).backward()
        else:
            predicted(model, batch)
    assert not found


def compiled(model: tmask.MaskRCNN, backend: str) -> Callable[..., Any]:
    return torch.compile(model.forward_padded, fullgraph=True, backend=backend, dynamic=False)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_compiles_to_one_graph(mode: str) -> None:
    model = build(mask_fusion_layers=1)
    batch = padded(model, boxes_only=(2,))
    with use_backend("reference"):
        if mode == "inference":
            with torch.no_grad():
                traced = compiled(model.eval(), "eager")(batch[0])
            assert_close(traced.masks, predicted(model, batch).masks)
            return
        eager = mask_loss(model, batch)
        torch.manual_seed(3)
        traced = compiled(model, "aot_eager")(*batch)["loss_mask"]
        traced.backward()
    assert_close(traced, eager)
    assert all(p.grad is not None for p in model.roi_heads.mask_transfer.parameters())
