"""RoIAlign on a CPU: both of its backwards have the reference's gradient, and each is the one that runs."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.kernels.rois import ADAPTIVE, FIXED, KINDS, Grid, check, odd_boxes
from tests.kernels.tools import each_mutant
from tests.mutation import mutant
from tmask_kernels import multiscale_roi_align
from tmask_kernels.ops.roi_align import cpu

ALWAYS, NEVER = {"DENSE_WORK": 10**12}, {"DENSE_WORK": 0}
CHUNKS = {"DENSE_WORK": 10**12, "CHUNK_ELEMENTS": 1}


@pytest.mark.parametrize("limits", [ALWAYS, NEVER, CHUNKS], ids=["matrix products", "taps", "chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("grid", [FIXED, ADAPTIVE, (0, False), (2, True)], ids=str)
def test_gradient_equals_the_reference(limits: dict[str, int], dtype: torch.dtype, grid: Grid) -> None:
    """Boxes over the border, on one point, invalid and alone in their image."""
    kind, device = KINDS["bilinear"], torch.device("cpu")
    boxes = odd_boxes(device).expand(3, -1, -1)
    valid = torch.ones(3, len(boxes[0]), dtype=torch.bool)
    valid[1, 1:] = False
    with mock.patch.multiple(cpu, **limits):
        features = kind.maps(device, images=3, dtype=dtype)
        check(kind, features, boxes, (3, 4), backend="torchvision", grid=grid, valid=valid)


@pytest.mark.parametrize(("side", "dense"), [(40, True), (400, False)])
def test_large_maps_take_the_taps(side: int, dense: bool) -> None:
    feature = torch.randn(1, 1, side, side, requires_grad=True)
    pooled = multiscale_roi_align([feature], torch.tensor([[[0.0, 0.0, 9.0, 9.0]]]), 7, [1.0], backend="torchvision")
    with mock.patch.object(cpu, "_dense_gradient", wraps=cpu._dense_gradient) as products:
        pooled.sum().backward()
    assert products.called == dense


MUTANTS = {
    "swapped axes": ("start[:, 0], size[:, 0], PW, W,", "start[:, 1], size[:, 1], PW, W,"),
    "always shifted": ("- (0.5 if aligned else 0.0)\n    start", "- 0.5\n    start"),
    "wrong image": ("== image).nonzero()", ">= image).nonzero()"),
}


@each_mutant(MUTANTS)
def test_mutants_turn_red(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = mutant(cpu, *MUTANTS[name], tmp_path)
    monkeypatch.setattr(cpu, "_dense_gradient", broken._dense_gradient)
    with pytest.raises(AssertionError):
        test_gradient_equals_the_reference(ALWAYS, torch.float32, FIXED)
