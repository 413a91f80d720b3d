"""Mask targets at full size on a GPU: the reference's bits, torchvision's values, no wait, memory, large offsets."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align

from bench.cases import CASES, MaskLossCase
from tests.gpu.tools import need_memory, peak_bytes, waiting_is_an_error
from tmask_kernels import mask_targets, pack_masks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # the interpreter's
]

CONVENTIONS = ["detectron2", "torchvision"]


def given(full: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
    """Masks [N, G, H, W] bool, RoIs, their masks' rows, and the side of a target."""
    case = CASES["mask-loss"]
    assert isinstance(case, MaskLossCase)
    small = replace(case, rois=2, gt=2, height=30, width=40, side=3)
    case = case if full else small
    return *case.ground_truth(device), case.side


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_equals_the_reference_bit_for_bit(convention: str, full: bool, device: torch.device) -> None:
    masks, boxes, index, side = given(full, device)
    sizes = torch.tensor([masks.shape[2:]] * len(masks), device=device)
    sizes[-1] -= 17
    args = pack_masks(masks), boxes, index, side
    got = mask_targets(*args, convention=convention, image_sizes=sizes, backend="triton")
    with waiting_is_an_error(device):
        again = mask_targets(*args, convention=convention, image_sizes=sizes, backend="triton")
    assert torch.equal(again, got)
    for where in {device, torch.device("cpu")}:
        packed, *rest, limits = (t.to(where) for t in (*args[:3], sizes))
        expected = mask_targets(
            packed, *rest, side, convention=convention, image_sizes=limits, backend="reference"
        )  # fmt: skip
        assert torch.equal(got.to(where), expected)
    assert got.any()


def test_equals_torchvision(full: bool, device: torch.device) -> None:
    masks, boxes, index, side = given(full, device)
    sizes = torch.tensor([masks.shape[2:]] * len(masks), device=device)
    args = pack_masks(masks), boxes, index, side
    got = mask_targets(*args, convention="torchvision", image_sizes=sizes, backend="triton")
    for n in range(len(masks)):
        rois = torch.cat([index[n, :, None].double(), boxes[n].double()], dim=1)
        expected = roi_align(masks[n, :, None].double(), rois, side, 1.0, -1, False)[:, 0]
        assert (got[n] - expected).abs().max() < 1e-3  # float32 places a sample at 1,344 pixels within 1e-4


@pytest.mark.parametrize(("count", "size"), [(250, (256, 256)), (100, (800, 1344))], ids=str)
def test_memory(count: int, size: tuple[int, int], full: bool, device: torch.device) -> None:
    """The output of 128 RoIs, and nothing that grows with the masks."""
    height, width = size
    words = torch.randint(-(2**31), 2**31, (1, count, height, width // 32), dtype=torch.int32, device=device)
    rois, side = (128, 28) if full else (1, 1)
    corner = torch.rand(1, rois, 2, device=device) * 100
    boxes = torch.cat([corner, corner + 50], dim=2)
    index = torch.arange(rois, device=device)[None] % count

    def call() -> Tensor:
        return mask_targets(words, boxes, index, side, convention="detectron2", backend="triton")

    peak = peak_bytes(call, device)
    assert peak is None or peak <= rois * side * side * 4 + 512  # PyTorch's blocks are of 512 bytes
    assert call().shape == (1, rois, side, side)


def test_offsets_past_31_bits(full: bool, device: torch.device) -> None:
    """2,120 masks of 4,000 x 8,160: the last one begins past 2^31 words."""
    need_memory(12, device)
    count, height, words = (2120, 4000, 255) if full else (2, 6, 2)
    assert (count - 1) * height * words > 2**31 or not full
    packed = torch.zeros(1, count, height, words, dtype=torch.int32, device=device)
    packed[0, -1] = torch.randint(-(2**31), 2**31, (height, words), dtype=torch.int32, device=device)
    box = torch.tensor([words * 32 - 40.0, height - 5.0, words * 32.0, height], device=device).expand(1, 1, 4)
    index = torch.full((1, 1), count - 1, device=device)
    got = mask_targets(packed, box, index, 2, convention="torchvision", backend="triton")
    expected = mask_targets(packed[:, -1:], box, index * 0, 2, convention="torchvision", backend="reference")
    assert torch.equal(got, expected)
    assert expected.any()
