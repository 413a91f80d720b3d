"""Losses at full size on a GPU: torchvision and the reference in float64, graphs, no waits, 2^31 logits."""

from collections.abc import Callable
from typing import get_args

import pytest
import torch
import torchvision
from torch import Tensor

from bench.cases import CASES, FocalCase, MaskLossCase
from tests.gpu.tools import (
    assert_same_bits,
    deterministic_algorithms,
    need_memory,
    peak_bytes,
    recorded,
    to,
    waiting_is_an_error,
)
from tmask.model import losses
from tmask_kernels import mask_bce, sigmoid_focal_loss
from tmask_kernels.testing import Tolerance, assert_close, random_boxes

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def assert_gradients_close(got: Tensor, want: Tensor, *, tolerance: Tolerance | None = None) -> None:
    """Both enlarged by the power of two that brings the largest above 1, which rounds nothing."""
    scale = 2.0 ** want.abs().max().log2().floor()
    assert_close((got.double() / scale).to(got.dtype), want / scale, name="gradient", tolerance=tolerance)


def focal_inputs(name: str, full: bool, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    case = CASES[name]
    assert isinstance(case, FocalCase)
    logits, targets = (case if full else case.small()).inputs(dtype, device)
    return logits.requires_grad_(), targets


@pytest.mark.parametrize("gamma", [2.0, 1.5])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["focal-rpn", "focal-box-head"])
def test_focal_loss_equals_torchvision(
    name: str, dtype: torch.dtype, reduction: str, gamma: float, full: bool, device: torch.device
) -> None:
    logits, targets = focal_inputs(name, full, dtype, device)
    exact = logits.detach().double().requires_grad_()
    expected = torchvision.ops.sigmoid_focal_loss(exact, targets.double(), 0.25, gamma, reduction)
    with deterministic_algorithms():
        got, again = (sigmoid_focal_loss(logits, targets, 0.25, gamma, reduction, backend="triton") for _ in range(2))
        assert_close(got, expected)
        # As a loss scale does, this keeps a mean's gradient among the normal numbers of float16.
        upstream = torch.randn_like(got) * (logits.numel() if reduction == "mean" else 1)
        (gradient,), (second,) = (torch.autograd.grad(loss, logits, upstream) for loss in (got, again))
    assert_same_bits([got, gradient], [again, second])
    assert_gradients_close(gradient, torch.autograd.grad(expected, exact, upstream.double())[0])


def mask_inputs(full: bool, dtype: torch.dtype, layout: str, device: torch.device) -> list[Tensor]:
    """Logits, classes, targets and which RoIs are valid: two of three."""
    case = CASES["mask-loss"]
    assert isinstance(case, MaskLossCase)
    logits, classes, targets = (case if full else case.small()).logits(dtype, device)
    valid = torch.arange(len(classes), device=device) % 3 > 0
    return [logits.contiguous(memory_format=LAYOUTS[layout]).requires_grad_(), classes, targets, valid]


def mask_loss(inputs: list[Tensor], backend: str = "triton") -> Tensor:
    logits, classes, targets, valid = inputs
    return mask_bce(logits, classes, targets, valid=valid, backend=backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_loss_equals_the_reference(dtype: torch.dtype, layout: str, full: bool, device: torch.device) -> None:
    inputs = mask_inputs(full, dtype, layout, device)
    exact = [inputs[0].detach().double().requires_grad_(), *inputs[1:]]
    expected = mask_loss(exact, "reference")
    with deterministic_algorithms():
        got, again = mask_loss(inputs), mask_loss(inputs)
        upstream = torch.full_like(got, inputs[2].numel())  # the gradient is among the normal numbers of float16
        (gradient,), (second,) = (torch.autograd.grad(loss, inputs[0], upstream) for loss in (got, again))
    assert_close(got, expected)
    assert_same_bits([got, gradient], [again, second])
    assert gradient.stride() == inputs[0].stride()
    assert_gradients_close(gradient, torch.autograd.grad(expected, exact[0], upstream.double())[0])


def forward_and_backward(which: str, full: bool, device: torch.device) -> tuple[Callable[[], list[Tensor]], Tensor]:
    """A loss with its gradient, and the logits that it reads."""
    if which == "mask_bce":
        inputs = mask_inputs(full, torch.bfloat16, "nchw", device)
        logits = inputs[0]

        def loss() -> Tensor:
            return mask_loss(inputs)
    else:
        logits, targets = focal_inputs("focal-rpn", full, torch.bfloat16, device)

        def loss() -> Tensor:
            return sigmoid_focal_loss(logits, targets, reduction="sum", backend="triton")

    def run() -> list[Tensor]:
        value = loss()
        return [value.detach(), *torch.autograd.grad(value, logits)]

    return run, logits


@pytest.mark.parametrize("which", ["sigmoid_focal_loss", "mask_bce"])
def test_a_training_step_replays_from_a_graph(which: str, full: bool, device: torch.device) -> None:
    run, logits = forward_and_backward(which, full, device)
    run()
    with waiting_is_an_error(device):
        run()
    replay = recorded(run, device)
    with torch.no_grad():
        logits.copy_(logits.flip(0) * 0.5)
    expected = to(run(), device)
    assert_same_bits(replay(), expected)


@pytest.mark.parametrize("which", ["sigmoid_focal_loss", "mask_bce"])
def test_memory_is_that_of_the_gradient(which: str, full: bool, device: torch.device) -> None:
    """No loss of each element, no gathered channel: the gradient, partial sums and what an allocator rounds up."""
    run, logits = forward_and_backward(which, full, device)
    peak = peak_bytes(run, device)
    assert peak is None or peak < logits.nbytes + 2**20


def head_losses(
    box_loss: losses.BoxLoss, class_loss: losses.ClassLoss, full: bool, device: torch.device
) -> tuple[Callable[[], list[Tensor]], Tensor]:
    """Both losses of the box head for two images with their gradients, and the deltas, of which some boxes have no
    area. Half of the RoIs are positive, a few of them are empty slots.
    """
    S, C = (512, 81) if full else (9, 4)
    generator = torch.Generator().manual_seed(0)
    rois = random_boxes(2 * S, height=800, width=1300, min_size=8, max_size=300).view(2, S, 4)
    matched = rois + torch.randn(2, S, 4, generator=generator) * 2
    labels = torch.randint(1, C, (2, S), generator=generator) * (torch.arange(S) % 2)
    valid = torch.arange(S) < S - 3
    deltas = torch.randn(2, S, C, 4, generator=generator)
    deltas[0, 1] = -200.0  # sides that round to 0
    columns = C - (class_loss == "sigmoid_focal")
    logits, deltas = torch.randn(2, S, columns, generator=generator).to(device), deltas.to(device)
    given = [labels * valid, rois, matched, (labels > 0) & valid, valid.expand(2, S)]
    labels, rois, matched, positive, valid = (value.to(device) for value in given)
    focal = losses.Focal(alpha=0.25, gamma=2.0, prior=0.01)
    leaves = [logits.requires_grad_(), deltas.requires_grad_()]

    def run() -> list[Tensor]:
        both = losses.box_losses(
            *leaves, labels, rois, matched, positive, valid,
            class_loss=class_loss, focal=focal, box_loss=box_loss, weights=(10.0, 10.0, 5.0, 5.0),
        )  # fmt: skip
        return [*(one.detach() for one in both), *torch.autograd.grad(sum(both), leaves)]

    return run, deltas


@pytest.mark.parametrize("class_loss", get_args(losses.ClassLoss))
@pytest.mark.parametrize("box_loss", get_args(losses.BoxLoss))
def test_losses_of_the_box_head_never_wait(
    box_loss: losses.BoxLoss, class_loss: losses.ClassLoss, full: bool, device: torch.device
) -> None:
    """Both ways, as on the CPU, and again from a graph with other deltas."""
    run, deltas = head_losses(box_loss, class_loss, full, device)
    expected, _ = head_losses(box_loss, class_loss, full, torch.device("cpu"))
    run()  # kernels compile
    with waiting_is_an_error(device):
        got = run()
    for name, one, want in zip(("classes", "boxes", "to logits", "to deltas"), got, expected(), strict=True):
        assert one.isfinite().all(), name
        # Both sides are float32, with other exponentials and arc tangents.
        assert_gradients_close(one.cpu(), want, tolerance=Tolerance(max=1e-4, rms=1e-5))
    replay = recorded(run, device)
    with torch.no_grad():
        deltas.copy_(deltas.flip(1) * 0.5)
    again = to(run(), device)
    assert_same_bits(replay(), again)


def test_focal_loss_of_more_than_2_to_the_31_logits(full: bool, device: torch.device) -> None:
    need_memory(20, device)
    count = 2**31 + 5000 if full else 3000
    logits = torch.full((count,), -20.0, dtype=torch.bfloat16, device=device)
    targets = torch.zeros(count, dtype=torch.uint8, device=device)
    logits[-1000:].normal_(generator=torch.Generator(device).manual_seed(0))
    targets[-500:] = 1
    logits.requires_grad_()
    loss = sigmoid_focal_loss(logits, targets, reduction="sum", backend="triton")
    (gradient,) = torch.autograd.grad(loss, logits)
    end = logits.detach()[-1000:].double().requires_grad_()
    expected = sigmoid_focal_loss(end, targets[-1000:], reduction="sum", backend="reference")
    assert_close(loss, expected)  # the others' losses are of the order of 1e-26
    assert_gradients_close(gradient[-1000:], torch.autograd.grad(expected, end)[0])
    assert not gradient[:-1000].abs().amax() > 1e-12


def test_mask_loss_of_more_than_2_to_the_31_logits(full: bool, device: torch.device) -> None:
    need_memory(20, device)
    K, C = (2**31 // (80 * 784) + 2, 80) if full else (3, 4)
    logits = torch.zeros(K, C, 28, 28, dtype=torch.bfloat16, device=device)
    logits[-1].normal_(generator=torch.Generator(device).manual_seed(0))
    logits.requires_grad_()
    classes = torch.full((K,), C - 1, device=device)
    valid = torch.arange(K, device=device) >= K - 2
    targets = torch.ones(1, 28, 28, dtype=torch.bool, device=device).expand(K, -1, -1)
    loss = mask_loss([logits, classes, targets, valid])
    (gradient,) = torch.autograd.grad(loss, logits)
    exact = [logits.detach()[-2:].double().requires_grad_(), classes[-2:], targets[-2:], valid[-2:]]
    expected = mask_loss(exact, "reference")
    assert_close(loss, expected)
    assert_gradients_close(gradient[-2:], torch.autograd.grad(expected, exact[0])[0])
    assert not gradient[:-2].any()
