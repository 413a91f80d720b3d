"""The model executes the losses that its config names, on the right anchors and RoIs, with the right divisor."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

import tmask
from tests.graph import recorded
from tests.model.conftest import NECKS, assert_same_gradients, detected, losses_of, small
from tmask.model import losses, roi_heads, rpn
from tmask.model.losses import FAR_NEGATIVE, Focal, box_losses, rpn_losses
from tmask.model.predictions import class_probabilities
from tmask_kernels import decode_boxes, sigmoid_focal_loss
from tmask_kernels.testing import assert_close, random_boxes

NAMES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg")
# Setting, the functions it must call (of tmask.model.losses or torch), and the loss that they make.
CHOICES = [
    ({}, F, "binary_cross_entropy_with_logits", "loss_objectness"),
    ({}, F, "cross_entropy", "loss_classifier"),
    ({"rpn_objectness": "focal"}, losses, "sigmoid_focal_loss", "loss_objectness"),
    ({"classifier": "sigmoid_focal"}, losses, "sigmoid_focal_loss", "loss_classifier"),
    ({"classifier": "softmax_focal"}, losses, "softmax_focal_loss", "loss_classifier"),
    *[
        ({field: name}, losses, "iou_loss", loss)
        for field, loss in (("rpn_box", "loss_rpn_box_reg"), ("box", "loss_box_reg"))
        for name in ("giou", "diou", "ciou")
    ],
]
THEIRS = {
    "giou": torchvision.ops.generalized_box_iou_loss,
    "diou": torchvision.ops.distance_box_iou_loss,
    "ciou": torchvision.ops.complete_box_iou_loss,
}
FOCAL = Focal(alpha=0.25, gamma=2.0, prior=0.01)
WEIGHTS = (10.0, 10.0, 5.0, 5.0)
# Alpha and gamma: the op's defaults, others, and those that leave cross-entropy.
PARAMETERS = [(0.25, 2.0), (0.7, 0.5), (-1.0, 0.0)]


def build(neck: str = "fpn", **chosen: Any) -> tmask.MaskRCNN:
    return small(**NECKS[neck], losses=chosen)


@contextmanager
def tripled(where: Any, name: str) -> Iterator[list[Any]]:
    """Triples the results of a function inside the block. Yields the first argument of each call."""
    real, seen = getattr(where, name), []

    def thrice(first: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(first)
        return 3 * real(first, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, thrice)
        yield seen


@pytest.mark.parametrize(
    ("chosen", "where", "function", "loss"), CHOICES, ids=[f"{c or 'default'}-{f}" for c, _, f, _ in CHOICES]
)
def test_the_chosen_loss_is_the_one_executed(chosen: dict[str, str], where: Any, function: str, loss: str) -> None:
    """Tripling the chosen function triples its loss and no other. The default model does not call the function."""
    model = build(**chosen)
    plain = losses_of(model)
    with tripled(where, function) as seen:
        changed = losses_of(model)
        calls = list(seen)
        default = losses_of(build())
    assert plain[loss] > 0
    for name in NAMES:  # the mask loss is binary cross-entropy too on a CPU
        assert_close(changed[name], plain[name].double() * (3 if name == loss else 1), name=name)
    if function == "iou_loss":
        assert calls == list(chosen.values())
    if chosen:
        assert all(torch.equal(default[name], value) for name, value in losses_of(build()).items())


# RPN


def rpn_inputs() -> dict[str, Tensor]:
    kind = torch.arange(40).view(2, 20) % 5  # 0 positive, 1 ignored, the others negative
    anchors = random_boxes(40, height=60, width=60, min_size=8).view(2, 20, 4)
    return {
        "objectness": torch.randn(2, 20).requires_grad_(),
        "deltas": (0.1 * torch.randn(2, 20, 4)).requires_grad_(),
        "anchors": anchors,
        "matched": anchors + torch.randn(2, 20, 4),
        "positive": kind == 0,
        "valid": kind != 1,
    }


@pytest.mark.parametrize(("alpha", "gamma"), PARAMETERS)
def test_focal_objectness_is_of_all_anchors_over_the_positives(alpha: float, gamma: float) -> None:
    x = rpn_inputs()
    x["objectness"].data[0, 1] = torch.inf  # ignored
    loss, box = rpn_losses(**x, focal=Focal(alpha=alpha, gamma=gamma, prior=0.01), box_loss="smooth_l1")
    used = x["valid"].nonzero(as_tuple=True)
    logits, positive = x["objectness"][used], x["positive"][used].float()
    expected = torchvision.ops.sigmoid_focal_loss(logits, positive, alpha, gamma, "sum")
    assert_close(loss, expected.double() / 8)
    assert_same_gradients(loss, expected / 8, x["objectness"])
    plain, plain_box = rpn_losses(**x, focal=None, box_loss="smooth_l1")
    entropy = F.binary_cross_entropy_with_logits(logits, positive)
    assert_close(plain, entropy.double())
    assert_close(box * 8, plain_box.double() * 32)


def test_far_negatives_have_no_loss_and_no_gradient() -> None:
    for gamma in (0.0, 0.5, 2.0):
        x = torch.full((3,), FAR_NEGATIVE, requires_grad=True)
        for backend in ("reference", "triton"):
            loss = sigmoid_focal_loss(x, torch.zeros(3), -1.0, gamma, "sum", backend=backend)
            assert loss == 0
            assert not torch.autograd.grad(loss, x)[0].any()


def test_focal_objectness_learns_from_every_anchor_but_the_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the model: the gradient of each logit says whether its anchor took part."""
    model, seen = build(rpn_objectness="focal"), []

    def watch(logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        logits.retain_grad()
        seen.extend((logits, *args))
        return rpn_losses(logits, *args, **kwargs)

    monkeypatch.setattr(rpn, "rpn_losses", watch)
    losses_of(model)["loss_objectness"].backward()
    logits, _, _, _, positive, valid = seen
    assert valid.sum() > 10 * model.rpn.batch_size
    assert not valid.all()
    assert positive.any()
    assert torch.equal(logits.grad != 0, valid)


# Box head


def head_inputs(columns: int = 4) -> dict[str, Tensor]:
    labels = torch.tensor([[1, 3, 0, 0, 2, 0]])
    rois = random_boxes(6, height=60, width=60, min_size=8)[None]
    return {
        "class_logits": torch.randn(1, 6, columns).requires_grad_(),
        "deltas": (0.1 * torch.randn(1, 6, 4, 4)).requires_grad_(),
        "labels": labels,
        "rois": rois,
        "matched": rois + torch.randn(1, 6, 4),
        "positive": labels > 0,
        "valid": torch.tensor([[True] * 5 + [False]]),
    }


@pytest.mark.parametrize(("alpha", "gamma"), PARAMETERS)
def test_sigmoid_focal_has_no_background_and_divides_by_positives(alpha: float, gamma: float) -> None:
    x, focal = head_inputs(columns=3), Focal(alpha=alpha, gamma=gamma, prior=0.01)
    loss, _ = box_losses(**x, class_loss="sigmoid_focal", focal=focal, box_loss="smooth_l1", weights=WEIGHTS)
    hot = F.one_hot(x["labels"][0, :5], 4)[:, 1:].float()
    expected = torchvision.ops.sigmoid_focal_loss(x["class_logits"][0, :5], hot, alpha, gamma, "sum") / 3
    assert_close(loss, expected.double())
    assert not torch.autograd.grad(loss, x["class_logits"])[0][0, 5].any()


def test_softmax_focal_is_a_mean_over_sampled_rois() -> None:
    x = head_inputs()

    def loss_of(kind: losses.ClassLoss, focal: Focal | None) -> Tensor:
        return box_losses(**x, class_loss=kind, focal=focal, box_loss="smooth_l1", weights=WEIGHTS)[0]

    p = x["class_logits"][0, :5].softmax(-1)[torch.arange(5), x["labels"][0, :5]]
    assert_close(loss_of("softmax_focal", FOCAL), (-((1 - p) ** 2) * p.log()).mean().double())
    entropy = loss_of("softmax_focal", Focal(alpha=-1, gamma=0, prior=0.01))
    assert_close(entropy, loss_of("softmax", None).double())


@pytest.mark.parametrize("kind", THEIRS)
def test_box_losses_are_torchvisions_of_the_decoded_boxes(kind: str) -> None:
    x = head_inputs()
    x["rois"][0, 5] = 0  # an empty slot
    x["matched"][0, 2:4] = 0  # background of an image without ground truth
    _, box = box_losses(**x, class_loss="softmax", focal=None, box_loss=kind, weights=WEIGHTS)
    theirs = THEIRS[kind]
    rows = [0, 1, 4]
    own = x["deltas"][0, rows, x["labels"][0, rows]]
    boxes = decode_boxes(own, x["rois"][0, rows], weights=WEIGHTS)
    expected = theirs(boxes, x["matched"][0, rows], reduction="sum") / 5
    assert_close(box, expected.double())
    (gradient,) = assert_same_gradients(box, expected, x["deltas"])
    assert torch.equal(gradient.flatten(3).any(-1)[0].nonzero()[:, 0], torch.tensor(rows))


def test_no_positives_give_finite_losses_with_a_graph() -> None:
    for kind in ("smooth_l1", "giou", "diou", "ciou"):
        x, y = rpn_inputs(), head_inputs(columns=3)
        for values in (x, y):
            values["positive"][:], values["matched"][:] = False, 0
        y["labels"][:] = 0
        found = [
            *rpn_losses(**x, focal=FOCAL, box_loss=kind),
            *box_losses(**y, class_loss="sigmoid_focal", focal=FOCAL, box_loss=kind, weights=WEIGHTS),
        ]
        assert found[0] > 0
        assert found[1] == found[3] == 0
        leaves = [x["objectness"], x["deltas"], y["class_logits"], y["deltas"]]
        for gradient in torch.autograd.grad(sum(found), leaves):
            assert gradient.isfinite().all()


# From the config


def test_focal_settings_of_the_config_reach_both_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Focal] = []
    for module, real in ((rpn, rpn_losses), (roi_heads, box_losses)):

        def watch(*args: Any, real: Any = real, **kwargs: Any) -> Any:
            seen.append(kwargs["focal"])
            return real(*args, **kwargs)

        monkeypatch.setattr(module, real.__name__, watch)
    settings = {"alpha": 0.7, "gamma": 0.5, "prior": 0.02}
    chosen = {f"focal_{name}": value for name, value in settings.items()}
    losses_of(build(rpn_objectness="focal", classifier="sigmoid_focal", **chosen))
    assert seen == [Focal(**settings)] * 2


# Prior and inference


@pytest.mark.parametrize("neck", ["fpn", "c4"])  # which have a box head each
def test_the_prior_is_where_a_sigmoid_classifier_begins(neck: str) -> None:
    model = build(neck, rpn_objectness="focal", classifier="sigmoid_focal", focal_prior=0.02)
    objectness, classifier = model.rpn.head.objectness.bias, model.roi_heads.box_head.classifier.bias
    assert_close(objectness.sigmoid(), torch.full_like(objectness, 0.02, dtype=torch.float64))
    assert_close(classifier.sigmoid(), torch.full((3,), 0.02, dtype=torch.float64))
    for other in (build(neck), build(neck, classifier="softmax_focal")):
        assert not other.rpn.head.objectness.bias.any()
        assert not other.roi_heads.box_head.classifier.bias.any()
        assert len(other.roi_heads.box_head.classifier.bias) == 4


@pytest.mark.parametrize("neck", ["fpn", "c4"])
@pytest.mark.parametrize("classifier", ["softmax", "softmax_focal", "sigmoid_focal"])
def test_scores_are_of_the_activation_that_was_trained(
    classifier: str, neck: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(neck, **({} if classifier == "softmax" else {"classifier": classifier})).eval()
    seen: dict[str, Tensor] = {}
    model.roi_heads.box_head.classifier.register_forward_hook(lambda layer, x, out: seen.update(logits=out))
    real = roi_heads.detections

    def detections(scores: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen["scores"] = scores
        return real(scores, *args, **kwargs)

    monkeypatch.setattr(roi_heads, "detections", detections)
    found = detected(model)
    logits = seen["logits"].double()
    expected = logits.sigmoid() if classifier == "sigmoid_focal" else logits.softmax(-1)[:, 1:]
    assert_close(seen["scores"].flatten(0, 1), expected)
    assert found.counts.sum() > 0
    assert set(found.labels[found.scores > 0].tolist()) <= {1, 2, 3}
    assert class_probabilities(seen["logits"], classifier).shape[-1] == 3


@pytest.mark.parametrize("kind", THEIRS)
def test_iou_losses_are_torchvisions_wherever_boxes_lie(kind: losses.BoxLoss) -> None:
    """Apart, touching, one in the other, equal: values and gradients, which are finite of boxes without area too."""
    boxes = random_boxes(60, height=40, width=40, min_size=2, max_size=25).double()
    target = random_boxes(60, height=40, width=40, min_size=2, max_size=25, seed=1).double()
    boxes[0] = target[0]
    boxes[1] = target[1] + 0.25 * (target[1, 2:] - target[1, :2]).min() * torch.tensor([1, 1, -1, -1])
    boxes.requires_grad_()
    got, expected = losses.iou_loss(kind, boxes, target), THEIRS[kind](boxes, target)
    assert_close(got, expected)
    assert_same_gradients(got[1:].sum(), expected[1:].sum(), boxes)
    # The gradient of a product over a dimension would ask for values: its zeros are counted on the host.
    names = recorded(got)
    assert "MulBackward0" in names
    assert not {name for name in names if name.startswith("Prod")}
    flat = torch.tensor([[0.0, 5, 10, 5], [5, 0, 5, 10], [5, 5, 5, 5]], requires_grad=True)
    loss = losses.iou_loss(kind, flat, torch.tensor([[0.0, 0, 10, 10]]).expand(3, 4))
    (gradient,) = torch.autograd.grad(loss.sum(), flat)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        # As x1 falls it meets the target: overlap 4, union 180, of the box around 300.
        ([10.0, 2, 30, 6], [4 / 180, 20 / 300, 180 * 10 / 300**2 - 4 / 300, -20 / 300]),
        # As y2 rises or y1 falls the overlap grows by 5, the union by 20 - 5, from 100; the box around is 250.
        ([5.0, 4, 25, 4], [0.0, 5 / 100 + 15 / 250, 100 * 10 / 250**2, -5 / 100 - 15 / 250]),
        ([0.0, 0, 10, 10], [0.0, 0, 0, 0]),  # a move either way costs the same
    ],
    ids=["touching", "no height", "equal"],
)
def test_the_gradient_of_giou_at_ties(box: list[float], expected: list[float]) -> None:
    boxes, target = torch.tensor([box], requires_grad=True), torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    (gradient,) = torch.autograd.grad(losses.iou_loss("giou", boxes, target).sum(), boxes)
    torch.testing.assert_close(gradient, torch.tensor([expected]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("box", "classifier"),
    [("smooth_l1", "softmax"), ("giou", "sigmoid_focal"), ("diou", "softmax_focal"), ("ciou", "sigmoid_focal")],
)
def test_no_loss_hands_a_gradient_to_torchs_clamp(box: str, classifier: str) -> None:
    """The gradient of torch.clamp at a bound depends on the version of torch."""
    model = build(rpn_box=box, box=box, classifier=classifier, rpn_objectness="focal")
    nodes = recorded(*losses_of(model).values())
    assert "ConvolutionBackward0" in nodes
    assert not {node for node in nodes if "Clamp" in node}
