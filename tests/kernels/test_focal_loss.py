"""sigmoid_focal_loss against torchvision's and the closed form of its gradient."""

import pytest
import torch
import torch.nn.functional as F
import torchvision

from tmask_kernels import sigmoid_focal_loss
from tmask_kernels.testing import assert_close

SETTINGS = [(0.25, 2.0), (-1.0, 2.0), (0.5, 0.0), (-1.0, 0.0), (0.9, 0.5), (0.0, 1.0)]


def logits_and_targets(device, kind: str, shape=(37, 5)):
    x = (torch.randn(*shape, dtype=torch.float64) * 4).to(device)
    t = torch.rand(*shape, dtype=torch.float64).to(device)
    return x, t if kind == "soft" else (t > 0.7).double()


def closed_form_gradient(x, t, alpha, gamma):
    """d FL / dx for p_t in (0, 1), as derived in the op's README."""
    p = x.sigmoid()
    pt = p * t + (1 - p) * (1 - t)
    ce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    weight = alpha * t + (1 - alpha) * (1 - t) if alpha >= 0 else torch.ones_like(t)
    return weight * ((p - t) * (1 - pt) ** gamma - gamma * (1 - pt) ** (gamma - 1) * ce * (2 * t - 1) * p * (1 - p))


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("alpha", "gamma"), SETTINGS, ids=str)
def test_equals_torchvision(device, kind, reduction, alpha, gamma):
    x, t = logits_and_targets(device, kind)
    theirs = torchvision.ops.sigmoid_focal_loss(x, t, alpha, gamma, reduction)
    assert_close(sigmoid_focal_loss(x, t, alpha, gamma, reduction), theirs)
    single = sigmoid_focal_loss(x.float(), t.float(), alpha, gamma, reduction)
    assert single.dtype == torch.float32
    assert_close(
        single, torchvision.ops.sigmoid_focal_loss(x.float().double(), t.float().double(), alpha, gamma, reduction)
    )


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize(("alpha", "gamma"), SETTINGS, ids=str)
def test_gradient_equals_the_closed_form(device, kind, alpha, gamma):
    x, t = logits_and_targets(device, kind)
    x.requires_grad_()
    sigmoid_focal_loss(x, t, alpha, gamma, "sum").backward()
    assert_close(x.grad, closed_form_gradient(x.detach(), t, alpha, gamma))
    assert torch.autograd.gradcheck(
        lambda a, b: sigmoid_focal_loss(a, b, alpha, gamma), (x[:3], t[:3].requires_grad_())
    )


def test_no_weight_and_no_focus_is_cross_entropy(device):
    x, t = logits_and_targets(device, "soft")
    assert_close(sigmoid_focal_loss(x, t, -1, 0), F.binary_cross_entropy_with_logits(x, t, reduction="none"))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_extreme_logits_stay_finite(device, dtype, gamma):
    x = torch.tensor([-1e4, -100.0, -30.0, 0.0, 30.0, 100.0, 1e4], dtype=dtype, device=device)
    x = x.repeat(3, 1).requires_grad_()
    t = torch.tensor([0.0, 0.4, 1.0], device=device)[:, None].expand(3, 7)
    loss = sigmoid_focal_loss(x, t, gamma=gamma)
    loss.float().sum().backward()
    assert loss.dtype == dtype
    assert loss.isfinite().all()
    assert x.grad.isfinite().all()
    # A logit far on the wrong side costs its distance, far on the right side nothing.
    assert loss[2, 0].item() == pytest.approx(2500, rel=5e-3)
    assert loss[0, 0].item() == 0


def test_a_confident_positive_keeps_its_small_loss(device):
    """1 - sigmoid(x) would round to 0 in float32 at x = 20; the loss is exp(-3 x), as e^-60 is still a float32."""
    x = torch.tensor([20.0], device=device)
    expected = torchvision.ops.sigmoid_focal_loss(x.double(), torch.ones_like(x).double(), -1, 2.0)
    got = sigmoid_focal_loss(x, torch.ones_like(x), -1, 2.0)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    assert got.item() > 0


def test_halves_reduce_in_float32(device):
    x = torch.zeros(100_000, dtype=torch.float16, device=device)
    total = sigmoid_focal_loss(x, torch.ones_like(x), -1, 0, "sum")
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(100_000 * 0.6931472, rel=1e-5)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_empty_input_keeps_the_graph(device, reduction):
    x = torch.zeros(0, 4, device=device, requires_grad=True)
    loss = sigmoid_focal_loss(x, torch.zeros(0, 4, device=device), reduction=reduction)
    loss.sum().backward()
    assert not loss.any()
    assert x.grad.shape == (0, 4)


def test_traces_without_a_graph_break(device):
    x, t = logits_and_targets(device, "hard")
    compiled = torch.compile(
        lambda a, b: sigmoid_focal_loss(a, b, reduction="mean"), fullgraph=True, backend="aot_eager"
    )
    assert_close(compiled(x, t), sigmoid_focal_loss(x, t, reduction="mean"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.zeros(2, 3, dtype=torch.int64)}, "inputs: expected a floating point dtype"),
        ({"targets": torch.zeros(3)}, r"targets: expected the shape of inputs \(2, 3\), got \(3,\)"),
        ({"alpha": 1.5}, "alpha: expected 0..1"),
        ({"gamma": -1.0}, "gamma: expected at least 0, got -1.0"),
        ({"reduction": "max"}, "reduction: expected 'none', 'mean' or 'sum', got 'max'"),
        ({"backend": "triton"}, "backend='triton' does not exist"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        sigmoid_focal_loss(**{"inputs": torch.zeros(2, 3), "targets": torch.zeros(2, 3), **change})
