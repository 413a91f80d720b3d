"""sigmoid_focal_loss and softmax_focal_loss: torchvision's values and gradients, edges, mutants."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from tests.kernels.tools import (
    HALVES,
    INF,
    LAYOUTS,
    assert_close_gradient,
    each_mutant,
    needs_the_interpreter,
)
from tests.mutation import mutant
from tmask_kernels import sigmoid_focal_loss, softmax_focal_loss
from tmask_kernels.common.kernels import numbers
from tmask_kernels.ops.focal_loss import kernels
from tmask_kernels.testing import assert_close, guarded, poisoned_empty

# Off, on, and at both ends; gammas with a kernel of their own and without. All are float32 numbers.
SETTINGS = [(0.25, 2.0), (-1.0, 2.0), (0.5, 0.0), (-1.0, 0.0), (0.75, 0.5), (0.0, 1.0), (1.0, 3.75)]
REDUCTIONS = ("none", "mean", "sum")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three programs that each walk several blocks of 16, the last of them not whole."""
    monkeypatch.setattr(kernels, "BLOCK", 16)
    monkeypatch.setattr(kernels, "MAX_PROGRAMS", 3)


def logits_and_targets(
    device: torch.device, shape: tuple[int, ...] = (37, 5), dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Logits, and targets of which a third are 0, a third 1 and the others between."""
    x = (torch.randn(shape, dtype=torch.float64) * 4).to(device, dtype)
    t = (torch.rand(shape, device=device) * 3 - 1).clamp(0, 1)
    return guarded(x).requires_grad_(), guarded(t)


def torchvisions(x: Tensor, t: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    """torchvision's loss in float64 on the same rounded inputs, and the leaf to read its gradient from."""
    exact = x.detach().double().requires_grad_()
    return torchvision.ops.sigmoid_focal_loss(exact, t.double(), *settings), exact


def check(loss: Callable[..., Tensor], x: Tensor, t: Tensor, *settings: Any) -> None:
    """Value and gradient of `loss` are torchvision's."""
    expected, exact = torchvisions(x, t, *settings)
    with poisoned_empty():
        got = loss(x, t, *settings)
    assert got.dtype == (x.dtype if settings[2] == "none" else torch.float32)
    assert_close(got, expected)
    upstream = torch.randn_like(got)
    with poisoned_empty():
        (gradient,) = torch.autograd.grad(got, x, upstream)
    (want,) = torch.autograd.grad(expected, exact, upstream.double())
    assert gradient.dtype == x.dtype
    assert_close_gradient(gradient, want)


# Against torchvision


CASES = [(torch.float32, *setting, reduction) for setting in SETTINGS for reduction in REDUCTIONS]
CASES += [(dtype, 0.25, 2.0, reduction) for dtype in HALVES for reduction in ("none", "sum")]


@pytest.mark.parametrize(("dtype", "alpha", "gamma", "reduction"), CASES, ids=str)
def test_equals_torchvision(backend, device, dtype, alpha, gamma, reduction):
    """In half precision to a unit of rounding."""
    x, t = logits_and_targets(device, dtype=dtype)
    check(lambda *args: sigmoid_focal_loss(*args, backend=backend), x, t, alpha, gamma, reduction)


def test_the_reference_gives_a_gradient_to_targets(device):
    x, t = logits_and_targets(device, (3, 5), dtype=torch.float64)
    assert torch.autograd.gradcheck(sigmoid_focal_loss, (x, t.double().requires_grad_()))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(), (1,), (16,), (97,), (3, 5, 7), (48, 2)], ids=str)
def test_any_shape(device, shape, reduction):
    x, t = logits_and_targets(device, shape)
    check(lambda *args: sigmoid_focal_loss(*args, backend="triton"), x, t, 0.25, 0.5, reduction)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(
    ("layout", "targets"),
    [("channels_last", "alike"), ("permuted", "otherwise"), ("sliced", "spread"), ("expanded", "alike")],
)
def test_any_strides(device, layout, targets, reduction):
    def lay(x: Tensor) -> Tensor:  # [2, 3, 4, 6]
        return {
            "channels_last": lambda: x.contiguous(memory_format=torch.channels_last),
            "permuted": lambda: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
            "sliced": lambda: x.repeat(1, 2, 1, 3)[:, ::2, :, 1::3],
            "expanded": lambda: x[:1, :, :1].expand(2, -1, 4, -1),
        }[layout]()

    x, t = logits_and_targets(device, (2, 3, 4, 6))
    x, t = lay(x.detach()).requires_grad_(), {"alike": lay(t), "otherwise": t, "spread": t[:1].expand_as(t)}[targets]
    check(lambda *args: sigmoid_focal_loss(*args, backend="triton"), x, t, 0.25, 2.0, reduction)
    out = sigmoid_focal_loss(x, t, backend="triton")
    assert out.stride() == (x.stride() if layout in ("channels_last", "permuted") else (72, 24, 6, 1))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_lies_alike_is_not_copied(device, layout, monkeypatch):
    x, t = (v.contiguous(memory_format=layout) for v in logits_and_targets(device, (2, 3, 4, 6)))
    monkeypatch.setattr(Tensor, "copy_", None)
    monkeypatch.setattr(Tensor, "contiguous", None)
    # A loss that is summed afterwards hands back one number spread over all losses, which is read as one.
    loss = sigmoid_focal_loss(x, t, backend="triton").sum()
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64, torch.bfloat16], ids=str)
def test_targets_of_any_dtype(backend, device, dtype):
    x, t = logits_and_targets(device)
    t = t.round()
    expected = sigmoid_focal_loss(x, t, backend="reference")
    assert_close(sigmoid_focal_loss(x, t.to(dtype), backend=backend), expected.double())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_extreme_logits_stay_finite(backend, device, dtype, gamma):
    x = torch.tensor([-1e4, -100.0, -30.0, 0.0, 30.0, 100.0, 1e4], dtype=dtype, device=device)
    x = x.repeat(3, 1).requires_grad_()
    t = torch.tensor([0.0, 0.4, 1.0], device=device)[:, None].expand(3, 7)
    loss = sigmoid_focal_loss(x, t, gamma=gamma, backend=backend)
    (gradient,) = torch.autograd.grad(loss.float().sum(), x)
    assert loss.dtype == dtype
    exact = x.detach().double().requires_grad_()
    expected = sigmoid_focal_loss(exact, t.to(dtype=torch.float64), gamma=gamma, backend="reference")
    assert_close(loss, expected)
    assert_close(gradient, torch.autograd.grad(expected.sum(), exact)[0], name="gradient")
    # A logit far on the wrong side costs its distance, far on the right side nothing.
    assert loss[2, 0].item() == pytest.approx(2500, rel=5e-3)
    assert loss[0, 0].item() == 0


@pytest.mark.parametrize("gamma", [2.0, 2.5])
def test_a_confident_positive_keeps_its_small_loss(backend, device, gamma):
    """1 - sigmoid(x) would round to 0 in float32 at x = 20; the loss is exp(-3 x), as e^-60 is still a float32."""
    x = torch.tensor([20.0], device=device, requires_grad=True)
    expected, exact = torchvisions(x, torch.ones_like(x), -1, gamma)
    got = sigmoid_focal_loss(x, torch.ones_like(x), -1, gamma, backend=backend)
    assert got.item() == pytest.approx(expected.item(), rel=3e-5, abs=0)
    if backend == "triton":  # PyTorch's sigmoid(x) - 1 rounds to 0
        (gradient,), (want,) = torch.autograd.grad(got, x), torch.autograd.grad(expected, exact)
        assert gradient.item() == pytest.approx(want.item(), rel=3e-5, abs=0)


def softmax_inputs(device: torch.device, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    logits = (torch.randn(11, 3, 5, dtype=torch.float64) * 3).to(device, dtype).requires_grad_()
    return logits, torch.randint(5, (11, 3)).to(device)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("alpha", "gamma"), SETTINGS, ids=str)
def test_softmax_follows_the_definition(backend, device, alpha, gamma, reduction):
    if backend == "triton":
        needs_the_interpreter(device)
    x, y = softmax_inputs(device)
    p = x.softmax(-1).gather(-1, y[..., None])[..., 0]
    weight = torch.where(y > 0, alpha, 1 - alpha) if alpha >= 0 else 1.0
    expected = -weight * (1 - p) ** gamma * p.log()
    expected = {"none": expected, "mean": expected.mean(), "sum": expected.sum()}[reduction]
    got = softmax_focal_loss(x, y, alpha, gamma, reduction, backend=backend)
    assert_close(got, expected)
    (gradient,), (want,) = (torch.autograd.grad(loss.sum(), x) for loss in (got, expected))
    assert_close(gradient, want)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_softmax_of_extreme_logits_stays_finite(backend, device, dtype):
    x = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0.0, 0.0, 0.0]], dtype=dtype, device=device)
    x.requires_grad_()
    for label in range(3):
        y = torch.full((3,), label, device=device)
        loss = softmax_focal_loss(x, y, backend=backend)
        (gradient,) = torch.autograd.grad(loss.float().sum(), x)
        exact = x.detach().double().requires_grad_()
        expected = softmax_focal_loss(exact, y, backend="reference")
        assert_close(loss, expected)
        assert_close(gradient, torch.autograd.grad(expected.sum(), exact)[0])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.75])
def test_infinite_logits_have_the_limit(backend, device, gamma):
    """The loss and gradient at a logit of 1e4, to which infinity adds nothing but an infinite loss."""
    x = torch.tensor([-INF, -INF, INF, INF, -INF, INF, 0.5], device=device).requires_grad_()
    t = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.25, 0.25, 1.0], device=device)
    far = x.detach().clamp(-1e4, 1e4).double().requires_grad_()
    expected = torchvision.ops.sigmoid_focal_loss(far, t.double(), 0.25, gamma)
    loss = sigmoid_focal_loss(x, t, 0.25, gamma, backend=backend)
    assert loss.tolist()[:6] == [0, INF, INF, 0, INF, INF]
    torch.testing.assert_close(loss[6].double(), expected[6], rtol=1e-5, atol=0)
    upstream = torch.arange(1.0, 8.0, device=device)
    (gradient,) = torch.autograd.grad(loss, x, upstream)
    (slope,) = torch.autograd.grad(expected, far, upstream.double())
    torch.testing.assert_close(gradient.double(), slope.nan_to_num(0))  # 0 ** 0.5 has an infinite slope by torchvision


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.75])
def test_softmax_takes_masked_classes_as_cross_entropy_does(backend, device, gamma):
    rows = [[1.0, -INF, 2.0], [-INF, -INF, 2.0], [1.0, -INF, 0.5], [-INF, 0.5, 0.25], [-INF, -INF, -INF]]
    x = torch.tensor(rows, device=device).requires_grad_()
    y = torch.tensor([0, 2, 1, 0, 1], device=device)
    exact = x.detach().double().requires_grad_()
    entropy = F.cross_entropy(exact, y, reduction="none")
    expected = torch.where(entropy == 0, 0, entropy * (-torch.expm1(-entropy)) ** gamma)  # [5]
    loss = softmax_focal_loss(x, y, gamma=gamma, backend=backend)
    assert loss.tolist()[1:4] == [0, INF, INF]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0, equal_nan=True)
    (gradient,) = torch.autograd.grad(loss[:4].sum(), x)
    assert not gradient[x.isinf() & (torch.arange(3, device=device) != y[:, None])].any()
    torch.testing.assert_close(gradient[1:4].double(), torch.autograd.grad(entropy[1:4].sum(), exact)[0][1:4])
    two = torch.tensor([1.0, 2.0], device=device).requires_grad_()
    (unmasked,) = torch.autograd.grad(softmax_focal_loss(two, y[0], gamma=gamma, backend=backend), two)
    torch.testing.assert_close(gradient[0, [0, 2]], unmasked)  # as if the class were not there


def parity(kernels: ModuleType, device: torch.device) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "BLOCK", 32)
        patch.setattr(kernels, "MAX_PROGRAMS", 2)
        x, t = logits_and_targets(device, (10, 7))
        # Where log(1 + e) and e differ by the rounding of 1 + e alone, the entropy is small: it stands for itself.
        far = torch.full((1, 7), 12.0, device=device, requires_grad=True)
        for settings in ((0.25, 2.0, "none"), (0.25, 3.75, "sum"), (0.75, 1.0, "mean"), (-1.0, 0.0, "none")):
            check(kernels.sigmoid_focal_loss, x, t, *settings)
        got = kernels.sigmoid_focal_loss(far, torch.ones_like(far), -1.0, 0.0, "none")
        assert_close(got * 1e5, 1e5 * torchvisions(far, torch.ones_like(far), -1.0, 0.0)[0])


MUTANTS = {
    "a tail that is not masked": (kernels, "mask=offs < count, other=other", "mask=offs < count + 5, other=other"),
    "a loss of the padding": (kernels, "tl.constexpr(-1e4)", "tl.constexpr(-3.0)"),
    "a store past the end": (kernels, "values, mask=offs < count)", "values)"),
    "blocks left out": (kernels, "            total += loss\n", "            total = loss\n"),
    "a sum for a mean": (kernels, "partial /= count.to(ACC)", "partial /= 1.0"),
    "a gradient of the sum for the mean": (kernels, "upstream /= count.to(ACC)", "upstream /= 1.0"),
    "no weight": (kernels, "weight = alpha * t + (1.0 - alpha) * (1.0 - t)", "weight = t * 0 + alpha"),
    "a square for any gamma": (kernels, "power = tl.exp2(gamma * tl.log2(miss))", "power = miss * miss"),
    "slope of a square": (kernels, "miss * miss, 2.0 * miss", "miss * miss, miss"),
    "slope of any gamma": (kernels, "slope = gamma * (power / miss)", "slope = power / miss"),
    "soft targets as hard ones": (kernels, "too_low = p * (1.0 - t), q * t", "too_low = p * (t < 0.5), q * (t >= 0.5)"),
    "p_t for 1 - p_t": (kernels, "_power(p * (1.0 - t) + q * t,", "_power(p * t + q * (1.0 - t),"),
    "no focus in the gradient": (kernels, "* (2.0 * t - 1.0)", "* 0.0"),
    "p - t negated": (kernels, "(too_high - too_low)", "(too_low - too_high)"),
    "one upstream for all": (kernels, "not any(upstream.stride())", "True"),
    "sigmoids swapped": (numbers, "tl.where(x >= 0, larger, smaller), tl", "tl.where(x < 0, larger, smaller), tl"),
    "log of a rounded sum": (numbers, "tl.log(whole) * ratio)", "tl.log(whole))"),
    "no entropy of the far side": (numbers, "tl.where(x >= 0, 1.0 - t, t)", "t"),
}  # fmt: skip


# A few of each kind in the quick set.
QUICK = ("a loss of the padding", "blocks left out", "slope of any gamma", "p - t negated", "log of a rounded sum")


def test_parity_is_green(device):
    parity(kernels, device)


@each_mutant(MUTANTS, QUICK)
def test_mutants_turn_parity_red(name, device, tmp_path):
    broken = mutant(*MUTANTS[name], tmp_path, seen_from=kernels)
    with pytest.raises(AssertionError):
        parity(broken, device)
