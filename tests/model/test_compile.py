"""torch.compile takes the padded model whole, forward and backward, and returns the results of eager mode."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tmask
from tests.model.conftest import VARIANTS, Batch, detected, padded, small, total
from tmask.structures import Detections
from tmask_kernels import use_backend


def compiled(model: tmask.MaskRCNN, backend: str) -> Callable[..., Any]:
    return torch.compile(model.forward_padded, fullgraph=True, backend=backend, dynamic=False)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("c4", "c5", "transfer")]


@pytest.mark.parametrize("variant", ["keypoints", *SLOW])
def test_inference(variant: str) -> None:
    model = small(**VARIANTS[variant])
    batch = padded(model)
    with torch.no_grad(), use_backend("reference"):
        eager, traced = detected(model, batch), compiled(model, "eager")(batch[0])
    assert eager.counts.sum() > 0
    for name, one, other in zip(Detections._fields, eager, traced, strict=True):
        assert one is other is None or torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5, msg=name) is None


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["keypoints", "softmax focal", "MLP", "transfer"])
def test_losses_and_gradients(variant: str) -> None:
    model = small(**VARIANTS[variant])
    batch = padded(model)
    with use_backend("reference"):
        eager = step(model, model.forward_padded, batch)
        traced = step(model, compiled(model, "aot_eager"), batch)
    assert traced.keys() == eager.keys()
    for name, value in eager.items():
        torch.testing.assert_close(traced[name], value, rtol=1e-4, atol=1e-6, msg=name)


def step(model: tmask.MaskRCNN, forward: Callable[..., Any], batch: Batch) -> dict[str, Tensor]:
    """Losses and gradients of one random sample. The norms' statistics move, and do not enter."""
    torch.manual_seed(3)
    model.zero_grad()
    losses = forward(*batch)
    total(losses).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {name: loss.detach() for name, loss in losses.items()} | gradients
