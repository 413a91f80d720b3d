"""RoIAlign on a CPU: both of its backwards give the reference's gradient, and each is the one that runs."""

from unittest import mock

import pytest
import torch

from tests.mutation import mutant
from tmask_kernels import multiscale_roi_align
from tmask_kernels.ops.roi_align import cpu
from tmask_kernels.testing import assert_close, random_boxes

SCALES = [1 / 4, 1 / 8]
ALWAYS, NEVER = 10**12, 0


def gradients(backend: str, dtype: torch.dtype, sampling_ratio: int, aligned: bool) -> list[torch.Tensor]:
    """Of the features, with boxes over the border, on one point, invalid and alone in their image."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(3, 5, 17 // k, 23 // k, generator=generator).to(dtype).requires_grad_() for k in (1, 2)]
    boxes = torch.stack([random_boxes(9, height=90, width=110, min_size=3, seed=i) for i in range(3)]) - 10
    boxes[0, 0] = torch.tensor([20.0, 20.0, 20.0, 20.0])
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[1, 1:] = False
    pooled = multiscale_roi_align(
        features, boxes, (3, 4), SCALES, valid=valid, sampling_ratio=sampling_ratio, aligned=aligned,
        canonical_scale=40, canonical_level=3, backend=backend,
    )  # fmt: skip
    upstream = torch.randn(pooled.shape, generator=generator).to(dtype)
    return list(torch.autograd.grad(pooled, features, upstream))


@pytest.mark.parametrize("work", [ALWAYS, NEVER], ids=["matrix products", "taps"])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_gradient_equals_the_reference(work: int, aligned: bool, sampling_ratio: int) -> None:
    expected = gradients("reference", torch.float64, sampling_ratio, aligned)
    with mock.patch.object(cpu, "DENSE_WORK", work):
        for dtype in (torch.float32, torch.float64):
            for a, e in zip(gradients("torchvision", dtype, sampling_ratio, aligned), expected, strict=True):
                assert_close(a, e)


@pytest.mark.parametrize(("side", "dense"), [(40, True), (400, False)])
def test_large_maps_take_the_taps(side: int, dense: bool) -> None:
    feature = torch.randn(1, 1, side, side, requires_grad=True)
    boxes = torch.tensor([[[0.0, 0.0, 9.0, 9.0]]])
    pooled = multiscale_roi_align([feature], boxes, 7, [1.0], backend="torchvision")
    with mock.patch.object(cpu, "_dense_gradient", wraps=cpu._dense_gradient) as products:
        pooled.sum().backward()
    assert products.called == dense


def test_chunks_add_up() -> None:
    expected = gradients("torchvision", torch.float64, 2, True)
    with mock.patch.object(cpu, "CHUNK_ELEMENTS", 1):
        for a, e in zip(gradients("torchvision", torch.float64, 2, True), expected, strict=True):
            assert_close(a, e)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("start[:, 0], size[:, 0], PW, W,", "start[:, 1], size[:, 1], PW, W,"),
        ("- (0.5 if aligned else 0.0)\n    start", "- 0.5\n    start"),
        ("== image).nonzero()", ">= image).nonzero()"),
    ],
    ids=["swapped axes", "always shifted", "wrong image"],
)
def test_mutants_turn_red(old: str, new: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = mutant(cpu, old, new, tmp_path)
    monkeypatch.setattr(cpu, "_dense_gradient", broken._dense_gradient)
    with pytest.raises(AssertionError):
        test_gradient_equals_the_reference(ALWAYS, False, 2)
