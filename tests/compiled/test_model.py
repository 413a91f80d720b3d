"""The whole model by its compiled kernels: an inference and a training step, against the same by the references."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import tmask
from tests.kernels.tools import tensors
from tests.model.conftest import SMALL, images_and_targets
from tmask_kernels import use_backend
from tmask_kernels.testing import Tolerance, assert_close


def by_both(run: Callable[[tmask.MaskRCNN], Any], device: torch.device) -> list[Any]:
    """What `run` gives of the same model and the same random numbers by the kernels, and by the references."""
    found = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        model = tmask.build_model("tiny", num_classes=4, **SMALL).to(device)
        with use_backend(backend):
            found.append(run(model))
    return found


def test_inference(device: torch.device) -> None:
    images = [image.to(device) for image in images_and_targets()[0]]

    @torch.no_grad()
    def run(model: tmask.MaskRCNN) -> list[Tensor]:
        return tensors(model.eval()(images))

    for got, expected in zip(*by_both(run, device), strict=True):
        assert_close(got, expected, tolerance=Tolerance(max=1e-3, rms=1e-4))


def test_a_training_step(device: torch.device) -> None:
    images, targets = images_and_targets()

    def run(model: tmask.MaskRCNN) -> dict[str, Tensor]:
        losses = model.train()(images, targets)
        torch.stack(list(losses.values())).sum().backward()
        return {**losses, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}

    got, expected = by_both(run, device)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(got[name], value, tolerance=Tolerance(max=1e-3, rms=1e-4), name=name)
