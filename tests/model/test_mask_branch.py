"""Mask losses, their activations in inference, and that the chosen ones and the chosen head are those executed."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tmask
from tests.model.conftest import SMALL, images_and_targets
from tests.model.sync import count_blocking
from tmask.config import ModelConfig, from_dict
from tmask.model import losses, mask_branch
from tmask.model.losses import MaskLoss, mask_loss
from tmask.model.mask_branch import MaskBranch
from tmask.model.mask_head import MaskHead, MLPMaskHead
from tmask.model.predictions import mask_probabilities
from tmask.structures import Detections, SampledRois
from tmask_kernels import use_backend
from tmask_kernels.testing import assert_close

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "mlp": {"mask_head": "mlp", "mask_mlp_dim": 32},
    "softmax": {"losses": {"mask": "softmax"}},
    "agnostic": {"mask_class_agnostic": True},
    "mlp-softmax-agnostic": {
        "mask_head": "mlp",
        "mask_mlp_dim": 32,
        "mask_mlp_layers": 3,
        "losses": {"mask": "softmax"},
        "mask_class_agnostic": True,
    },
}


# The last has all at once: the others need as much time each.
ALL_BUT_ONE_SLOW = [*(pytest.param(name, marks=pytest.mark.slow) for name in [*VARIANTS][1:-1]), [*VARIANTS][-1]]


def build(name: str = "default", **settings: Any) -> tmask.MaskRCNN:
    torch.manual_seed(0)
    return tmask.build_model("tiny", num_classes=4, **SMALL | VARIANTS[name] | settings)


def training_losses(model: tmask.MaskRCNN) -> dict[str, Tensor]:
    images, targets = model.transform(*images_and_targets())
    torch.manual_seed(1)  # the draws
    return model.train().forward_padded(images, targets)


def detections(model: tmask.MaskRCNN) -> Detections:
    images, _ = model.transform(images_and_targets()[0], None)
    with torch.no_grad():
        found = model.eval().forward_padded(images)
    assert isinstance(found, Detections)
    return found


# The losses


def rois(*, soft: bool = True) -> dict[str, Tensor]:
    """Five RoIs of 4 channels, one not valid. Logits reach beyond 1, where a second sigmoid would show."""
    targets = torch.rand(5, 6, 6)
    targets[0, 0, :2] = torch.tensor([0.5, 0.4999])
    return {
        "logits": (5 * torch.randn(5, 4, 6, 6)).requires_grad_(),
        "channels": torch.tensor([1, 3, 2, 3, 1]),
        "targets": targets if soft else targets.round(),
        "valid": torch.tensor([True, True, False, True, True]),
    }


def rows_by_hand(x: dict[str, Tensor], loss: str) -> Tensor:
    """The definition, RoI by RoI and in float64: the sum over the pixels of the valid ones, by their number."""
    total = torch.zeros((), dtype=torch.float64)
    for logits, k, target, valid in zip(*(x[name] for name in ("logits", "channels", "targets", "valid")), strict=True):
        z, t = logits.double(), target.double()
        if valid and loss == "sigmoid":
            total = total - (t * F.logsigmoid(z[k]) + (1 - t) * F.logsigmoid(-z[k])).sum()
        elif valid:
            total = total - torch.where(t >= 0.5, z.log_softmax(0)[k], z.log_softmax(0)[0]).sum()
    return total / (x["valid"].sum() * 36)


@pytest.mark.parametrize("soft", [True, False], ids=["soft", "binary"])
@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_the_loss_is_its_definition(loss: MaskLoss, soft: bool) -> None:
    x = rois(soft=soft)
    got, expected = mask_loss(**x, loss=loss), rows_by_hand(x, loss)
    assert got.dtype == torch.float32
    assert_close(got, expected)
    (gradient,), (want,) = (torch.autograd.grad(value, x["logits"]) for value in (got, expected))
    assert_close(gradient, want.double())


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_which_channels_learn(loss: MaskLoss) -> None:
    """Of a sigmoid the own channel alone, of a softmax all; of a RoI that is not valid none, whatever it holds."""
    x = rois()
    x["logits"].data[2] = torch.nan
    (gradient,) = torch.autograd.grad(mask_loss(**x, loss=loss), x["logits"])
    own = F.one_hot(x["channels"], 4).bool() if loss == "sigmoid" else torch.ones(5, 4, dtype=torch.bool)
    learns = own & x["valid"][:, None]
    assert torch.equal(gradient.ne(0).all((2, 3)), learns)
    assert torch.equal(gradient.ne(0).any(3).any(2), learns)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_without_positives_the_loss_is_zero_with_a_graph(loss: MaskLoss) -> None:
    for rows in (5, 0):
        x = {name: value[:rows] for name, value in rois().items()}
        value = mask_loss(**x | {"valid": torch.zeros(rows, dtype=torch.bool)}, loss=loss)
        assert value == 0
        (gradient,) = torch.autograd.grad(value, x["logits"])
        assert not gradient.any()


def test_two_channels_of_a_softmax_are_one_of_a_sigmoid() -> None:
    """Class-agnostic: object against background is the sigmoid of the difference of their logits."""
    x = rois(soft=False)
    pair = x["logits"][:, :2]
    one = mask_loss(pair[:, 1:] - pair[:, :1], x["channels"] * 0, x["targets"], x["valid"], loss="sigmoid")
    two = mask_loss(pair, torch.ones_like(x["channels"]), x["targets"], x["valid"], loss="softmax")
    assert_close(two, one.double())


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_probabilities_are_of_the_activation_that_was_trained(loss: MaskLoss) -> None:
    logits = rois()["logits"].detach()[:1].expand(4, -1, -1, -1)
    found = mask_probabilities(logits.bfloat16(), torch.arange(4), loss)
    z = logits[0].bfloat16().double()
    assert found.dtype == torch.float32
    assert_close(found, z.sigmoid() if loss == "sigmoid" else z.softmax(0))


@pytest.mark.slow
def test_losses_compile_whole() -> None:
    x, head = rois(), MLPMaskHead(in_channels=4, pool_size=3, hidden=8, num_layers=2, num_masks=4)
    pooled = torch.randn(5, 4, 3, 3)

    def run() -> list[Tensor]:
        logits = head(pooled)
        loss = mask_loss(logits, x["channels"], x["targets"], x["valid"], loss="softmax")
        return [loss, mask_probabilities(logits, x["channels"], "softmax")]

    def with_gradients(found: list[Tensor]) -> list[Tensor]:
        return [*found, *torch.autograd.grad(found[0], list(head.parameters()))]

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, expected in zip(with_gradients(compiled()), with_gradients(run()), strict=True):
        assert_close(got, expected.double())


# The branch


@pytest.mark.parametrize(
    ("loss", "class_agnostic", "channels"),
    [("sigmoid", False, 4), ("softmax", False, 4), ("sigmoid", True, 1), ("softmax", True, 2)],
)
def test_channels(loss: MaskLoss, class_agnostic: bool, channels: int) -> None:
    """A mask a class with the background's, or one for all; each detection gets that of its own class, no other's."""
    branch = MaskBranch(pool_size=2, targets="detectron2", mask_loss=loss, class_agnostic=class_agnostic)
    assert branch.num_channels(4) == channels
    # A head of which channel c is c everywhere: of four detections in one place every class has its own mask.
    logits = torch.arange(channels).float()
    labels, valid = torch.tensor([[1, 2, 3, 0]]), torch.tensor([[True, True, True, False]])
    for compact in (False, True):
        masks = branch.masks(
            lambda boxes, valid, side: torch.zeros(4, 1, side, side),
            lambda x: logits[:, None, None].expand(len(x), -1, 4, 4),
            torch.zeros(1, 4, 4),
            labels,
            valid,
            compact=compact,
        )
        own = torch.full((3,), channels - 1) if class_agnostic else labels[0, :3]
        expected = (logits.sigmoid() if loss == "sigmoid" else logits.softmax(0))[own]
        assert_close(masks[0, :3], expected.double()[:, None, None].expand(3, 4, 4))
        assert not masks[0, 3].any()


class Branch:
    """The mask branch of a variant on features that stay: two images, RoIs on their objects and beside them."""

    def __init__(self, name: str, **settings: Any) -> None:
        model = build(name, **settings)
        self.branch, self.head = model.roi_heads.mask_branch, model.roi_heads.mask_head
        self.images, self.targets = model.transform(*images_and_targets())
        index = torch.tensor([[0, 1, 0, -1], [0, 0, -1, -1]])
        boxes = self.targets.boxes.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, 4))
        labels = torch.where(index >= 0, self.targets.labels.gather(1, index.clamp(min=0)), 0)
        moved = boxes + torch.tensor([3.3, -2.1, -4.2, 1.7])
        self.rois = SampledRois(moved, labels, index, index >= 0, index >= 0)
        self.features = torch.randn(8, 16, 14, 14).to(memory_format=torch.channels_last)

    def pool(self, boxes: Tensor, valid: Tensor, side: int) -> Tensor:
        assert side == 14
        return self.features

    def loss(self, *, compact: bool = False) -> Tensor:
        return self.branch.loss(self.pool, self.head, self.rois, self.images, self.targets, compact=compact)

    def masks(self, *, compact: bool = False) -> Tensor:
        return self.branch.masks(
            self.pool, self.head, self.rois.boxes, self.rois.labels, self.rois.valid, compact=compact
        )


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns_its_targets(name: str) -> None:
    """All of the chosen head learns, of the classes that are there or, by a softmax, of all; the host never waits."""
    part = Branch(name)
    assert type(part.head) is (MLPMaskHead if "mlp" in name else MaskHead)
    optimizer = torch.optim.AdamW(part.head.parameters(), lr=0.002 if "mlp" in name else 0.02)
    totals = []
    for _ in range(4):
        loss = part.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
    assert totals[-1] < 0.9 * totals[0]
    optimizer.zero_grad()
    with use_backend("reference"), count_blocking() as blocking:
        part.loss().backward()
        masks = part.masks()
    assert not blocking
    assert all(p.grad.isfinite().all() and p.grad.any() for p in part.head.parameters())
    classes = part.head.predictor.weight.grad.unflatten(0, (part.branch.num_channels(4), -1)).flatten(1).any(1)
    present = [False, True, True, False]
    expected = {"softmax": [True] * 4, "agnostic": [True], "mlp-softmax-agnostic": [True] * 2}.get(name, present)
    assert classes.tolist() == expected
    assert masks.shape == (2, 4, 28, 28)
    # Probabilities until they are pasted: cut once, and there alone.
    inner = masks[part.rois.valid]
    assert ((inner > 0) & (inner < 1)).all()
    assert not masks[~part.rois.valid].any()


@pytest.mark.parametrize("name", VARIANTS)
def test_dropping_empty_rows_changes_nothing(name: str) -> None:
    part = Branch(name)
    assert_close(part.loss(compact=True), part.loss().double())
    assert_close(part.masks(compact=True), part.masks().double())


@pytest.mark.parametrize("name", VARIANTS)
def test_bf16_keeps_losses_and_masks_in_fp32(name: str) -> None:
    part = Branch(name)
    part.head.to(memory_format=torch.channels_last)
    expected = part.loss()
    with torch.autocast("cpu", torch.bfloat16):
        loss, masks = part.loss(), part.masks()
    assert loss.dtype == masks.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.0)


@pytest.mark.parametrize("convention", ["torchvision", "detectron2"])
@pytest.mark.parametrize("name", ["default", "softmax"])
def test_logits_and_targets_reach_the_loss_as_they_are(
    name: str, convention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits, not probabilities; soft targets where the convention keeps them, not cut a second time."""
    part, seen = Branch(name, convention=convention), {}

    def watch(logits: Tensor, channels: Tensor, targets: Tensor, valid: Tensor, **kwargs: Any) -> Tensor:
        seen.update(logits=logits, targets=targets)
        return mask_loss(logits, channels, targets, valid, **kwargs)

    monkeypatch.setattr(mask_branch, "mask_loss", watch)
    part.head.register_forward_hook(lambda layer, x, out: seen.update(given=out))
    part.loss()
    assert seen["logits"] is seen["given"]
    assert (seen["logits"] < 0).any()
    assert (seen["targets"] == 1).any()
    between = ((seen["targets"] > 0) & (seen["targets"] < 1)).any()
    assert between == (convention == "torchvision")


def test_objects_without_a_mask_are_not_learnt_from() -> None:
    """Nothing but what has a mask enters, and nothing of it is counted."""
    part = Branch("softmax")
    some = part.targets._replace(has_mask=torch.tensor([[True, False], [False, False]]))
    whole, part.targets = part.targets, some
    loss = part.loss()
    part.targets = whole
    part.rois = part.rois._replace(positive=torch.tensor([[True, False, True, False], [False] * 4]))
    assert_close(loss, part.loss().double())


@pytest.mark.parametrize("name", VARIANTS)
def test_the_chosen_loss_is_the_one_executed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times its function is three times the loss; the function of the other changes nothing."""
    part = Branch(name)
    plain = part.loss()
    real, entropy = losses.mask_bce, F.cross_entropy
    monkeypatch.setattr(losses, "mask_bce", lambda *args, **kwargs: 3 * real(*args, **kwargs))
    monkeypatch.setattr(F, "cross_entropy", lambda *args, **kwargs: 5 * entropy(*args, **kwargs))
    assert plain > 0
    assert_close(part.loss(), plain.double() * (5 if "softmax" in name else 3))


# The model


def test_a_class_agnostic_predictor_begins_as_published() -> None:
    """One channel, N(0, 0.001): Hu et al. 2018 found that MSRA's initial weights diverge there."""
    predictor = build("agnostic", mask_head_channels=256, mask_head_layers=0).roi_heads.mask_head.predictor
    assert predictor.weight.shape == (1, 256, 1, 1)
    assert predictor.weight.std().item() == pytest.approx(0.001, rel=0.15)
    assert not predictor.bias.any()


@pytest.mark.parametrize("name", ALL_BUT_ONE_SLOW)
def test_the_model_trains_and_detects(name: str) -> None:
    """Each detection has the mask of its own class, and a few steps bring the loss down."""
    model = build(name)
    assert from_dict(ModelConfig, dataclasses.asdict(model.config)) == model.config
    logits: list[Tensor] = []
    handle = model.roi_heads.mask_head.register_forward_hook(lambda layer, x, out: logits.append(out))
    found, branch = detections(model), model.roi_heads.mask_branch
    handle.remove()
    assert found.masks is not None
    assert found.masks.shape == (2, 10, 28, 28)
    assert len(found.labels.unique()) > 1
    (maps,) = logits
    values = maps.double().sigmoid() if branch.mask_loss == "sigmoid" else maps.double().softmax(1)
    channel = torch.full((20,), len(maps[0]) - 1) if branch.class_agnostic else found.labels.flatten()
    expected = values[torch.arange(20), channel] * found.valid().flatten()[:, None, None]
    assert_close(found.masks.flatten(0, 1), expected)

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    totals = []
    for _ in range(2):
        found_losses = training_losses(model)
        optimizer.zero_grad()
        torch.stack(list(found_losses.values())).sum().backward()
        optimizer.step()
        totals.append(found_losses["loss_mask"].item())
    assert totals[-1] < totals[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ALL_BUT_ONE_SLOW)
def test_boxes_do_not_depend_on_the_mask_branch(name: str) -> None:
    """The same detections and the same other losses, whatever the masks are."""
    plain, other = build(), build(name)
    rest = {key: value for key, value in plain.state_dict().items() if ".mask_head." not in key}
    missing, unexpected = other.load_state_dict(rest, strict=False)
    assert not unexpected
    assert all(".mask_head." in key for key in missing)
    ours, theirs = detections(other), detections(plain)
    assert theirs.counts.sum() > 0
    for field in ("boxes", "scores", "labels", "counts"):
        assert torch.equal(getattr(ours, field), getattr(theirs, field))
    their_losses = training_losses(plain)
    for key, value in training_losses(other).items():
        assert torch.equal(value, their_losses[key]) == (key != "loss_mask"), key
