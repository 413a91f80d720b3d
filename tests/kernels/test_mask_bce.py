"""mask_bce against the plain statement: pick the channel, drop the rows, average."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.tools import HALVES, LAYOUTS, assert_close_gradient, each_mutant, needs_the_interpreter
from tests.mutation import mutant
from tmask_kernels import mask_bce
from tmask_kernels.common.kernels import numbers
from tmask_kernels.ops.mask_bce import kernels, reference
from tmask_kernels.testing import assert_close, guarded, poisoned_empty


def inputs(
    device: torch.device, k: int = 7, channels: int = 4, side: int = 5, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = (torch.randn(k, channels, side, side, dtype=torch.float64) * 3).to(device, dtype)
    classes = torch.randint(0, channels, (k,), device=device)
    targets = torch.rand(k, side, side, device=device)
    valid = torch.arange(k, device=device) % 3 != 1
    return guarded(logits), classes, guarded(targets), valid


def check(function: Callable[..., Tensor], logits: Tensor, classes: Tensor, targets: Tensor, valid: Tensor) -> None:
    """Value and gradient of `function` (called as mask_bce) are those of torch's loss on the rows that count."""
    logits = logits.detach().requires_grad_()
    with poisoned_empty():
        loss = function(logits, classes, targets, valid=valid)
    exact, rows = logits.detach().double().requires_grad_(), valid.nonzero()[:, 0]
    expected = F.binary_cross_entropy_with_logits(exact[rows, classes[rows]], targets[rows].double())
    assert loss.shape == ()
    assert loss.dtype == torch.promote_types(logits.dtype, torch.float32)
    assert_close(loss, expected)
    upstream = torch.tensor(-3.0, dtype=loss.dtype, device=loss.device)
    with poisoned_empty():
        (grad,) = torch.autograd.grad(loss, logits, upstream)
    (want,) = torch.autograd.grad(expected, exact, upstream.double())
    assert grad.dtype == logits.dtype
    assert_close_gradient(grad, want)
    own = F.one_hot(classes.where(valid, 0), logits.shape[1]).bool() & valid[:, None]
    assert (grad[~own] == 0).all()
    assert (grad[own] != 0).all()


def by(backend: str) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: mask_bce(*args, **kwargs, backend=backend)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, torch.float64], ids=str)
def test_equals_torch_on_the_valid_rows_and_channels(backend, device, dtype, layout):
    if dtype == torch.float64 and backend == "triton":
        needs_the_interpreter(device)
    logits, *others = inputs(device, dtype=dtype)
    check(by(backend), logits.contiguous(memory_format=layout), *others)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("k", "channels", "side"), [(1, 1, 1), (3, 2, 16), (2, 1, 28), (2, 3, 28), (1, 2, 40)], ids=str
)
def test_sizes(device, k, channels, side, layout):
    """Blocks that end within a channel, channels that end within a block, maps of more than one block."""
    logits, *others = inputs(device, k, channels, side)
    check(by("triton"), logits.contiguous(memory_format=layout), *others)


def test_one_map_one_target_and_one_flag_for_all(backend, device):
    logits, classes, targets, valid = inputs(device)
    check(by(backend), logits[:1].expand_as(logits), classes, targets[:1].expand(7, 5, 5), valid[:1].expand(7))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float64], ids=str)
def test_targets_of_any_dtype(backend, device, dtype):
    logits, classes, targets, valid = inputs(device)
    check(by(backend), logits, classes, targets.round().to(dtype), valid)


@pytest.mark.parametrize("k", [0, 4], ids=["no roi", "none valid"])
def test_nothing_valid_gives_zero_with_a_graph(backend, device, k):
    logits, classes, targets, _ = inputs(device, k=k)
    logits.requires_grad_()
    valid = torch.zeros(k, dtype=torch.bool, device=device)
    loss = mask_bce(logits, classes, targets, valid=valid, backend=backend)
    assert loss.item() == 0
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.shape == logits.shape
    assert not gradient.any()


def test_rows_that_are_not_valid_may_hold_anything(backend, device):
    logits, classes, targets, valid = inputs(device)
    expected = mask_bce(logits, classes, targets, valid=valid, backend=backend)
    logits[~valid], targets[~valid], classes[~valid] = float("nan"), float("inf"), -9
    check(by(backend), logits, classes, targets, valid)
    assert torch.equal(mask_bce(logits, classes, targets, valid=valid, backend=backend), expected)


@pytest.mark.parametrize("channel", [-1, 4, 2**40])
def test_a_channel_that_does_not_exist_gives_nan(backend, device, channel):
    logits, classes, targets, valid = inputs(device)
    classes[3] = channel
    logits.requires_grad_()
    loss = mask_bce(logits, classes, targets, valid=valid, backend=backend)
    assert loss.isnan()
    assert not torch.autograd.grad(loss, logits)[0][3].nan_to_num(0.0).any()


def test_extreme_logits_stay_finite(backend, device):
    logits, classes, targets, valid = inputs(device)
    check(by(backend), logits.sign() * 1e4, classes, targets.clamp(0.1, 0.9), valid)


def test_infinite_logits_have_the_limit(backend, device):
    logits, classes, targets, valid = inputs(device)
    sides = (2 * targets.round() - 1)[:, None].expand_as(logits)  # of each logit, that of its target
    for sign, value in ((1, 0.0), (-1, torch.inf)):
        x = (sign * torch.inf * sides).requires_grad_()
        far = x.detach().clamp(-1e4, 1e4).requires_grad_()
        loss = by(backend)(x, classes, targets.round(), valid=valid)
        assert loss == value
        (gradient,) = torch.autograd.grad(loss, x)
        (expected,) = torch.autograd.grad(by(backend)(far, classes, targets.round(), valid=valid), far)
        torch.testing.assert_close(gradient, expected)
        assert bool(gradient.any()) == (value > 0)


def parity(module: ModuleType, device: torch.device) -> None:
    """More RoIs than are counted at a time, runs that cut channels, both layouts, an unknown channel."""
    if hasattr(module, "mask_bce_reference"):
        check(lambda *args, valid: module.mask_bce_reference(*args, valid), *inputs(device))
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_K", 4)
        patch.setattr(module, "BLOCK_GRAD", 16)
        patch.setattr(module, "MAX_BLOCK", 16)

        def function(*args: Tensor, valid: Tensor) -> Tensor:
            return module.mask_bce(*args, valid)[0]  # type: ignore[no-any-return]

        logits, classes, targets, valid = inputs(device, channels=3)
        classes[:4] = torch.tensor([2, 7, 0, 1])
        check(function, logits, classes, targets, valid)
        check(function, logits.contiguous(memory_format=torch.channels_last).transpose(2, 3), classes, targets, valid)
        classes[0] = 3
        assert function(logits, classes, targets, valid=valid).isnan()


MUTANTS = {
    "reference: channel": (reference, "torch.where(valid & known, classes, 0)", "torch.zeros_like(classes)"),
    "reference: denominator": (reference, "valid.sum()", "torch.tensor(len(valid))"),
    "reference: invalid rows": (reference, "torch.where(keep, loss, 0)", "loss"),
    "all RoIs counted": (kernels, "other=0).to(tl.int32)", "other=0).to(tl.int32) * 0 + 1"),
    "the first RoIs counted": (kernels, "first += BLOCK_K", "first += K"),
    "first channel": (kernels, "tl.where(known, channel, 0) * logits_strides[1]", "0 * logits_strides[1]"),
    "invalid rows summed": (kernels, "(valid & known).to(tl.int32)", "known.to(tl.int32)"),
    "pixels past the map": (kernels, "mask = (offs < M * M)", "mask = (offs <= M * M)"),
    "no nan of an unknown channel": (kernels, 'float("nan")', "0.0"),
    "rows at the stride of columns": (kernels, "to(tl.int64) * stride_h", "to(tl.int64) * stride_w"),
    "gradient of invalid rows": (kernels, " & (tl.load(valid_ptr + k) != 0)", ""),
    "channels that end within a run": (kernels, "(start + BLOCK > channel * (M * M))", "(start >= channel * (M * M))"),
    "a run further": (kernels, "(start < (channel + 1) * (M * M))", "(start < channel * (M * M))"),
    "gradient of the next channel too": (kernels, "own = (pixel >= 0) & (pixel < M * M)", "own = pixel >= 0"),
    "channels_last as contiguous": (kernels, "offs % C == channel, offs // C", "offs // M // M == channel, offs"),
    "soft targets as hard ones": (kernels, "(p * (1.0 - t) - q * t)", "(p * (t < 0.5) - q * (t >= 0.5))"),
    "no upstream": (kernels, "tl.load(upstream_ptr).to(ACC) * tl.load(share_ptr)", "tl.load(share_ptr)"),
    "a run past the RoI": (kernels, "mask=offs < elements", "mask=offs <= elements"),
    "sigmoids swapped": (numbers, "tl.where(x >= 0, larger, smaller), tl", "tl.where(x < 0, larger, smaller), tl"),
}  # fmt: skip
# A few of each kind in the quick set.
QUICK = ("reference: denominator", "first channel", "channels that end within a run", "channels_last as contiguous")


def test_parity_is_green(device):
    parity(kernels, device)


@each_mutant(MUTANTS, QUICK)
def test_mutants_turn_parity_red(name, device, tmp_path):
    module, old, new = MUTANTS[name]
    broken = mutant(module, old, new, tmp_path, seen_from=kernels if module is numbers else None)
    with pytest.raises(AssertionError):
        parity(broken, device)
