"""mask_bce against the plain statement: pick the channel, drop the rows, average."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.mutation import mutant
from tmask_kernels import mask_bce
from tmask_kernels.ops.mask_bce import reference
from tmask_kernels.testing import assert_close


def inputs(device, k=7, channels=4, side=5):
    logits = torch.randn(k, channels, side, side, dtype=torch.float64, device=device) * 3
    classes = torch.randint(0, channels, (k,), device=device)
    targets = torch.rand(k, side, side, dtype=torch.float64, device=device)
    valid = torch.arange(k, device=device) % 3 != 1
    return logits, classes, targets, valid


def check(device, function):
    """Value and gradient of `function` (called as mask_bce) are those of torch's loss on the rows that count."""
    logits, classes, targets, valid = inputs(device)
    logits.requires_grad_()
    loss = function(logits, classes, targets, valid=valid)
    (grad,) = torch.autograd.grad(loss, logits)
    rows = valid.nonzero()[:, 0]
    expected = F.binary_cross_entropy_with_logits(logits[rows, classes[rows]], targets[rows])
    (expected_grad,) = torch.autograd.grad(expected, logits)
    assert loss.shape == ()
    assert_close(loss, expected)
    assert_close(grad, expected_grad)
    own = F.one_hot(classes, logits.shape[1]).bool() & valid[:, None]
    assert (grad[~own] == 0).all()
    assert (grad[own] != 0).all()


def test_equals_torch_on_the_valid_rows_and_channels(device):
    check(device, mask_bce)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("torch.where(valid, classes, 0)", "torch.zeros_like(classes)"),
        ("valid.sum()", "torch.tensor(len(valid))"),
        ("torch.where(keep, loss, 0)", "loss"),
    ],
    ids=["channel", "denominator", "invalid rows"],
)
def test_a_broken_reference_fails(tmp_path: Path, old, new):
    broken = mutant(reference, old, new, tmp_path).mask_bce_reference

    def function(logits, classes, targets, *, valid):
        return broken(logits, classes, targets, valid)

    with pytest.raises(AssertionError):
        check(torch.device("cpu"), function)


@pytest.mark.parametrize("k", [0, 4], ids=["no roi", "none valid"])
def test_nothing_valid_gives_zero_with_a_graph(device, k):
    logits, classes, targets, _ = inputs(device, k=k)
    logits.requires_grad_()
    loss = mask_bce(logits, classes, targets, valid=torch.zeros(k, dtype=torch.bool, device=device))
    assert loss.item() == 0
    loss.backward()
    assert logits.grad.shape == logits.shape
    assert not logits.grad.any()


def test_rows_that_are_not_valid_may_hold_anything(device):
    logits, classes, targets, valid = inputs(device)
    expected = mask_bce(logits, classes, targets, valid=valid)
    logits[~valid], targets[~valid], classes[~valid] = float("nan"), float("inf"), -9
    logits.requires_grad_()
    loss = mask_bce(logits, classes, targets, valid=valid)
    loss.backward()
    assert torch.equal(loss, expected)
    assert (logits.grad[~valid] == 0).all()
    assert logits.grad.isfinite().all()


def test_class_agnostic_masks_have_one_channel(device):
    logits, _, targets, valid = inputs(device, channels=1)
    loss = mask_bce(logits, torch.zeros(7, dtype=torch.int64, device=device), targets, valid=valid)
    assert_close(loss, F.binary_cross_entropy_with_logits(logits[valid][:, 0], targets[valid]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_computes_in_float32(device, dtype):
    logits, classes, targets, valid = inputs(device)
    logits = logits.to(dtype)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = mask_bce(logits, classes, targets.float(), valid=valid)
    assert loss.dtype == torch.float32
    assert_close(loss, mask_bce(logits.double(), classes, targets.float().double(), valid=valid))


def test_traces_without_a_graph_break(device):
    logits, classes, targets, valid = inputs(device)
    compiled = torch.compile(lambda *a: mask_bce(*a[:3], valid=a[3]), fullgraph=True, backend="aot_eager")
    assert_close(compiled(logits, classes, targets, valid), mask_bce(logits, classes, targets, valid=valid))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3, 5, 6)}, r"logits: expected floating point \[K, C, M, M\]"),
        ({"logits": torch.zeros(2, 0, 5, 5)}, "logits: expected at least one channel"),
        ({"classes": torch.zeros(2)}, r"classes: expected int64 \[2\], got torch.float32"),
        ({"targets": torch.zeros(2, 1, 5, 5)}, r"targets: expected shape \[2, 5, 5\]"),
        ({"valid": torch.zeros(2)}, r"valid: expected bool \[2\], got torch.float32"),
        ({"backend": "torchvision"}, "backend='torchvision' does not exist"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_wrong_arguments_are_named(change, message):
    arguments = {
        "logits": torch.zeros(2, 3, 5, 5),
        "classes": torch.zeros(2, dtype=torch.int64),
        "targets": torch.zeros(2, 5, 5),
        "valid": torch.ones(2, dtype=torch.bool),
    }
    with pytest.raises(ValueError, match=message):
        mask_bce(**{**arguments, **change})
