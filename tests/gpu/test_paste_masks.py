"""Pasting at full size on a GPU: the reference's bits, offsets past 2^31, memory, run lengths that decode."""

import pytest
import torch
from torch import Tensor

from bench.cases import CASES, PasteCase
from bench.rle import decode_rle
from tests.gpu.tools import MEBIBYTE, need_memory, peak_bytes
from tmask_kernels import paste_masks, paste_masks_batched, unpack_masks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # the interpreter's
]

NAMES = ["paste-masks", "paste-masks-detectron2"]


def given(name: str, full: bool, device: torch.device) -> tuple[PasteCase, Tensor, Tensor, tuple[int, int]]:
    case = CASES[name]
    assert isinstance(case, PasteCase)
    masks, boxes = (case if full else case.small()).inputs(device)
    if full:
        return case, masks, boxes, (case.height, case.width)
    return case, masks[:2], boxes[:2] / 8, (7, 19)


@pytest.mark.parametrize("output", ["bool", "packed", "probability", "rle"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_reference_bit_for_bit(name: str, output: str, full: bool, device: torch.device) -> None:
    case, masks, boxes, size = given(name, full, device)
    got = paste_masks(masks, boxes, size, output=output, convention=case.convention, backend="triton")
    expected = paste_masks(masks.cpu(), boxes.cpu(), size, output=output, convention=case.convention)
    if output == "rle":
        assert got == expected
        inside = paste_masks(masks, boxes, size, convention=case.convention, backend="triton")
        assert torch.equal(torch.stack([decode_rle(one) for one in got]), inside.cpu())
    else:
        assert torch.equal(got.cpu(), expected)
        assert expected.any()


@pytest.mark.parametrize("output", ["bool", "rle"])
def test_a_batch_is_its_images(output: str, full: bool, device: torch.device) -> None:
    """Four images of their own sizes, one without masks."""
    case, masks, boxes, (height, width) = given("paste-masks", full, device)
    sizes = [(height, width), (height // 2, width), (height, width // 3), (height + 1, 2 * width)]
    counts = [len(masks), 1, 0, len(masks) - 1]
    images = masks.expand(4, -1, -1, -1), boxes.expand(4, -1, -1)
    got = paste_masks_batched(*images, counts, sizes, output=output, convention=case.convention, backend="triton")
    for one, count, size in zip(got, counts, sizes, strict=True):
        own = paste_masks(
            masks[:count], boxes[:count], size, output=output, convention=case.convention, backend="triton"
        )
        assert torch.equal(one, own) if isinstance(one, Tensor) else one == own


def test_the_reference_on_the_gpu_has_the_same_bits(full: bool, device: torch.device) -> None:
    case, masks, boxes, size = given("paste-masks", full, device)
    for output in ("probability", "bool"):
        here = paste_masks(masks[:9], boxes[:9], size, output=output, convention=case.convention, backend="reference")
        there = paste_masks(masks[:9].cpu(), boxes[:9].cpu(), size, output=output, convention=case.convention)
        assert torch.equal(here.cpu(), there)


@pytest.mark.parametrize("output", ["bool", "packed"])
def test_offsets_past_31_bits(output: str, full: bool, device: torch.device) -> None:
    """70 masks of 8,000 x 4,000: the last one begins past 2^31 bytes."""
    need_memory(6, device)
    (height, width), count = ((8000, 4000), 70) if full else ((24, 40), 2)
    masks = torch.rand(count, 28, 28, device=device)
    corner = torch.tensor([width - 17.0, height - 11.0], device=device)
    boxes = torch.cat([corner, corner + 15]).expand(count, 4)
    got = paste_masks(masks, boxes, (height, width), output=output, backend="triton")
    last = unpack_masks(got[-1:], width) if output == "packed" else got[-1:]
    expected = paste_masks(masks[-1:], boxes[-1:], (height, width), backend="reference")
    assert torch.equal(last, expected)
    assert expected.any()
    if output == "bool":
        assert int(got[: count - 1].sum()) == sum(
            int(paste_masks(masks[k : k + 1], boxes[:1], (height, width), backend="triton").sum())
            for k in range(count - 1)
        )


@pytest.mark.parametrize(("output", "limit"), [("bool", 103), ("packed", 14), ("rle", 32)])
def test_memory(output: str, limit: int, full: bool, device: torch.device) -> None:
    """Dense outputs take their own bytes and nothing else; run lengths less than an eighth of a byte a pixel."""
    case, masks, boxes, size = given("paste-masks", full, device)
    peak = peak_bytes(
        lambda: paste_masks(masks, boxes, size, output=output, convention=case.convention, backend="triton"), device
    )
    assert peak is None or peak < limit * MEBIBYTE
