"""The padded path never waits for the host: zero blocking operations, also inside our custom ops."""

import pytest
import torch

import tmask
from tests.model.sync import count_blocking
from tmask.structures import ImageBatch, Targets
from tmask_kernels.backend import use_backend


def train_step(model: tmask.MaskRCNN, batch: tuple[ImageBatch, Targets]) -> None:
    losses = model.forward_padded(*batch)
    assert isinstance(losses, dict)
    torch.stack(list(losses.values())).sum().backward()


# "auto" would take torchvision's ragged CPU ops; on a GPU auto is Triton, which the interpreter stands for here.
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_reference_backend_never_blocks(
    mode: str, small_model: tmask.MaskRCNN, batch: tuple[ImageBatch, Targets]
) -> None:
    with use_backend("reference"), count_blocking() as found:
        if mode == "train":
            train_step(small_model, batch)
        else:
            with torch.no_grad():
                small_model.eval().forward_padded(batch[0])
    assert not found
