"""torch.compile takes the padded model whole, forward and backward, and gives what eager mode gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tmask
from tmask.structures import ImageBatch, Targets
from tmask_kernels import use_backend


def compiled(model: tmask.MaskRCNN, backend: str) -> Callable[..., Any]:
    return torch.compile(model.forward_padded, fullgraph=True, backend=backend, dynamic=False)


def test_inference(keypoint_model: tmask.MaskRCNN, keypoint_batch: tuple[ImageBatch, Targets]) -> None:
    model, images = keypoint_model.eval(), keypoint_batch[0]
    with torch.no_grad(), use_backend("reference"):
        eager, traced = model.forward_padded(images), compiled(model, "eager")(images)
    assert eager.counts.sum() > 0
    for name in ("boxes", "scores", "labels", "counts", "masks", "keypoints"):
        torch.testing.assert_close(getattr(traced, name), getattr(eager, name), rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.slow
def test_losses_and_gradients(keypoint_model: tmask.MaskRCNN, keypoint_batch: tuple[ImageBatch, Targets]) -> None:
    with use_backend("reference"):
        eager = step(keypoint_model, keypoint_model.forward_padded, keypoint_batch)
        traced = step(keypoint_model, compiled(keypoint_model, "aot_eager"), keypoint_batch)
    assert traced.keys() == eager.keys()
    for name, value in eager.items():
        torch.testing.assert_close(traced[name], value, rtol=1e-4, atol=1e-6, msg=name)


def step(model: tmask.MaskRCNN, forward: Callable[..., Any], batch: tuple[ImageBatch, Targets]) -> dict[str, Tensor]:
    """Losses and gradients of one random sample. The norms' statistics move, and do not enter."""
    torch.manual_seed(3)
    model.zero_grad()
    losses = forward(*batch)
    torch.stack(list(losses.values())).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {name: loss.detach() for name, loss in losses.items()} | gradients
