"""Mask losses and their activations in inference; the model executes the loss and the head that its config names."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.model.conftest import MLP, assert_same_gradients, padded, small
from tmask.model import mask_branch
from tmask.model.losses import MaskLoss, mask_loss
from tmask.model.mask_branch import MaskBranch
from tmask.model.mask_head import MaskHead, MLPMaskHead
from tmask.structures import SampledRois
from tmask_kernels.testing import assert_close

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "mlp": MLP,
    "softmax": {"losses": {"mask": "softmax"}},
    "agnostic": {"mask_class_agnostic": True},
    "mlp-softmax-agnostic": {**MLP, "losses": {"mask": "softmax"}, "mask_class_agnostic": True},
}


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
    assert_same_gradients(got, expected, x["logits"])


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_which_channels_learn(loss: MaskLoss) -> None:
    """A sigmoid teaches the RoI's own channel alone, a softmax teaches all. A RoI that is not valid teaches none."""
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


# The branch


@pytest.mark.parametrize(
    ("loss", "class_agnostic", "channels"),
    [("sigmoid", False, 4), ("softmax", False, 4), ("sigmoid", True, 1), ("softmax", True, 2)],
)
def test_channels(loss: MaskLoss, class_agnostic: bool, channels: int) -> None:
    """A mask a class with the background's, or one for all; each detection gets that of its own class, no other's."""
    branch = MaskBranch(pool_size=2, targets="detectron2", mask_loss=loss, class_agnostic=class_agnostic)
    assert branch.num_channels(4) == channels
    # Channel c of the head's output is c everywhere, so the mask of a detection shows its channel.
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
        model = small(**VARIANTS[name], **settings)
        self.branch, self.head = model.roi_heads.mask_branch, model.roi_heads.mask_head
        self.images, self.targets = padded(model)
        index = torch.tensor([[0, 1, 0, -1], [0, 0, -1, -1]])
        boxes = self.targets.boxes.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, 4))
        labels = torch.where(index >= 0, self.targets.labels.gather(1, index.clamp(min=0)), 0)
        moved = boxes + torch.tensor([3.3, -2.1, -4.2, 1.7])
        self.rois = SampledRois(moved, labels, index, index >= 0, index >= 0)
        self.features = torch.randn(8, 16, 14, 14).to(memory_format=torch.channels_last)

    def pool(self, boxes: Tensor, valid: Tensor, side: int) -> Tensor:
        assert side == 14
        return self.features

    def loss(self) -> Tensor:
        return self.branch.loss(self.pool, self.head, self.rois, self.images, self.targets, compact=False)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_layer_of_every_variant_learns(name: str) -> None:
    """Every layer of the head learns. The predictor learns the classes of the batch; with a softmax it learns all."""
    part = Branch(name)
    assert type(part.head) is (MLPMaskHead if "mlp" in name else MaskHead)
    part.loss().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in part.head.parameters())
    classes = part.head.predictor.weight.grad.unflatten(0, (part.branch.num_channels(4), -1)).flatten(1).any(1)
    present = [False, True, True, False]
    expected = {"softmax": [True] * 4, "agnostic": [True], "mlp-softmax-agnostic": [True] * 2}.get(name, present)
    assert classes.tolist() == expected
    boxes, labels, _, _, valid = part.rois
    masks = part.branch.masks(part.pool, part.head, boxes, labels, valid, compact=False)
    assert masks.shape == (2, 4, 28, 28)
    # Probabilities until they are pasted: cut once, and there alone.
    assert ((masks[valid] > 0) & (masks[valid] < 1)).all()
    assert not masks[~valid].any()


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
    """RoIs of objects without a mask add nothing to the loss and nothing to its divisor."""
    part = Branch("softmax")
    some = part.targets._replace(has_mask=torch.tensor([[True, False], [False, False]]))
    whole, part.targets = part.targets, some
    loss = part.loss()
    part.targets = whole
    part.rois = part.rois._replace(positive=torch.tensor([[True, False, True, False], [False] * 4]))
    assert_close(loss, part.loss().double())
