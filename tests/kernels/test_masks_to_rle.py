"""masks_to_rle against pycocotools' encoder: every size of word and row, dtypes, thresholds, mutants."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.allocations import allocated
from tests.kernels.tools import INF, NAN, each_mutant, run_patterns
from tests.model.sync import count_blocking
from tests.mutation import mutant
from tmask_kernels import masks_to_rle
from tmask_kernels.common.kernels import numbers
from tmask_kernels.ops.masks_to_rle import kernels, op, reference
from tmask_kernels.testing import guarded, poisoned_empty

coco_mask = pytest.importorskip("pycocotools.mask")


def encoded(inside: Tensor) -> list[dict[str, Any]]:
    """pycocotools' run lengths of masks [K, H, W] bool."""
    full = np.asfortranarray(inside.permute(1, 2, 0).cpu().numpy().astype(np.uint8))
    return [{"size": item["size"], "counts": item["counts"].decode()} for item in coco_mask.encode(full)]


def shapes(height: int, width: int) -> Tensor:
    """Masks [5, H, W] bool: noise, full, empty, full columns, and a bar that leaves the top and bottom rows alone."""
    masks = torch.rand(5, height, width) < 0.5
    masks[1], masks[2], masks[3] = True, False, torch.arange(width) < width // 2
    masks[4] = ((torch.arange(height) > 0) & (torch.arange(height) < height - 1))[:, None]
    return masks


SIZES = [(1, 1), (31, 5), (32, 3), (33, 37), (70, 2), (64, 65), (5, 200)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_pycocotools(device, backend, size):
    """Columns of part of a word, of whole words and of more; rows of several programs."""
    masks = guarded(shapes(*size).to(device))
    with poisoned_empty():
        got = masks_to_rle(masks, backend=backend)
    assert got == encoded(masks)


def test_runs_of_every_kind(device, backend):
    masks = torch.cat([run_patterns(34, 0, 33, 2), run_patterns(34, 33, 0, 1), run_patterns(34, 31, 32, 30)]).to(device)
    assert masks_to_rle(masks, backend=backend) == encoded(masks)


@pytest.mark.parametrize("threshold", [0.5, 0, -1.25])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_logits_and_probabilities_are_compared_with_the_threshold(device, backend, dtype, threshold):
    """The threshold itself, NaN and -inf are outside, infinity is inside; beyond the last row nothing is."""
    if dtype == torch.float64 and backend == "triton":
        with pytest.raises(ValueError, match="compares in float32, not float64"):
            masks_to_rle(torch.ones(1, 2, 2, dtype=dtype, device=device), backend=backend)
        return
    masks = torch.randn(2, 35, 9, device=device).to(dtype)
    masks[0, :5, 0] = torch.tensor([threshold, NAN, INF, -INF, 0.0])
    got = masks_to_rle(masks, threshold, backend=backend)
    assert got == encoded(masks.double() > threshold)


def test_a_threshold_that_half_precision_lacks(device, backend):
    masks = torch.full((1, 3, 3), 0.5, dtype=torch.bfloat16, device=device)
    assert masks_to_rle(masks, 0.5001, backend=backend) == encoded(masks < 0)
    assert masks_to_rle(masks, 0.4999, backend=backend) == encoded(masks > 0)


def test_strided_masks(device, backend):
    masks = shapes(40, 33).to(device)
    assert masks_to_rle(masks.mT[::2], backend=backend) == encoded(masks.mT[::2])
    assert masks_to_rle(masks[:0], backend=backend) == []


def test_chunks_do_not_change_the_result(device, monkeypatch):
    masks = shapes(20, 30).to(device)
    monkeypatch.setattr(reference, "_CHUNK_PIXELS", 1300)
    assert masks_to_rle(masks, backend="reference") == encoded(masks)


def test_read_later(device, backend):
    """Nothing waits before, and the caller's masks may change; a chessboard has more runs than there is room for."""
    for masks in (shapes(33, 8), (torch.arange(40)[:, None] + torch.arange(6))[None] % 2 == 0):
        masks, expected = masks.to(device), encoded(masks)
        with poisoned_empty(), count_blocking() as waits:
            got = masks_to_rle(masks, output="run_lengths", backend=backend)
        assert backend == "reference" or not waits
        masks.zero_()
        assert len(got) == len(masks)
        assert got.to_coco() == expected


def test_memory_is_a_bit_a_pixel_and_some_bytes_a_column(device):
    masks = torch.zeros(3, 64, 50, device=device)
    with allocated(masks) as sizes:
        masks_to_rle(masks, output="run_lengths", backend="triton")
    room = 4 * 3 * (2 * 50 + 1)
    least = 3 * 64 * 50 // 8 + 12 * 3 * 50 + room
    assert sum(sizes) == least if device.type == "cpu" else least <= sum(sizes) <= least + room + 8 * 3


def parity(module: ModuleType, device: torch.device) -> None:
    """`module` is that of the public function or a copy with an error below it."""
    for size in SIZES[3:]:
        masks = shapes(*size).to(device)
        for given, threshold in ((masks, 0.5), (masks.bfloat16() - 2, -1.5)):
            with poisoned_empty():
                got = module.masks_to_rle(guarded(given), threshold, backend="triton")
            assert got == encoded(masks)


MUTANTS = {
    "rows beyond the mask": (kernels, "tl.minimum(first_y + y, H - 1)", "tl.minimum(first_y + y, H)"),
    "the column to the left": (kernels, "* W - 1, mask=exists & (x > 0)", "* W - 1, mask=exists & (x < 0)"),
    "the first column of a mask": (kernels, "mask=exists & (x > 0), other=0", "mask=exists & (column > 0), other=0"),
    "last bit of a column": (
        kernels,
        "before.to(tl.uint32, bitcast=True) >> 31",
        "before.to(tl.uint32, bitcast=True) & 1",
    ),
    "bit of the word before": (kernels, "before = word >> 31", "before = word & 1"),
    "no end": (kernels, "ends = exists & (x == W - 1)", "ends = exists & (x == W)"),
    "position": (kernels, "x * H + b * 32 + bit", "x * H + b * 31 + bit"),
    "beyond the room": (kernels, "mask=there & (slot < room)", "mask=there & (slot < room + 9)"),
    "count": (numbers, "0x01010101 >> 24", "0x01010101 >> 25"),
}


def test_parity_is_green(device):
    assert SIZES[-1][1] > kernels.PACKED_X > SIZES[3][1], "several blocks of a row, and one"
    parity(op, device)


@each_mutant(MUTANTS, ("rows beyond the mask", "beyond the room"))
def test_mutants_turn_parity_red(name, device, tmp_path):
    module, old, new = MUTANTS[name]
    with pytest.raises(AssertionError):
        parity(mutant(module, old, new, tmp_path, seen_from=op), device)
