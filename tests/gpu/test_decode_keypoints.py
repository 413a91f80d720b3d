"""Keypoint decoding on a GPU: the reference's bits at full size, huge boxes, offsets past 2^31."""

import pytest
import torch

from bench.cases import CASES, KeypointCase
from tests.gpu.tools import assert_same_bits, need_memory
from tmask_kernels import decode_keypoints

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),  # the interpreter's
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_has_the_bits_of_the_reference(dtype: torch.dtype, full: bool, device: torch.device) -> None:
    case = CASES["keypoints"]
    assert isinstance(case, KeypointCase)
    heatmaps, boxes = (case if full else case.small()).inputs(dtype, device)
    if not full:
        heatmaps = heatmaps[..., :1, :5, :5]
    valid = torch.arange(boxes.shape[1], device=device)[None] % 7 != 5
    got = decode_keypoints(heatmaps, boxes, valid, backend="triton")
    expected = decode_keypoints(heatmaps.cpu(), boxes.cpu(), valid.cpu(), backend="reference")
    assert_same_bits([t.cpu() for t in got], expected)
    assert (got[1] != 0).any()


@pytest.mark.parametrize("kind", ["noise", "constant", "checkerboard"])
def test_huge_boxes_end(kind: str, full: bool, device: torch.device) -> None:
    """64 M pixels a map, where bounds rule out most, all but some, and nothing."""
    cells, side = (56, 8000.0) if full else (3, 12.0)
    y, x = torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij")
    heatmap = {"noise": torch.randn(cells, cells), "constant": torch.ones(cells, cells), "checkerboard": (x + y) % 2.0}
    heatmaps = heatmap[kind].to(device).expand(1, 1, 2, cells, cells)
    boxes = torch.tensor([[[1.0, 2.0, 1.0 + side, 1.5 + side]]], device=device)
    got = decode_keypoints(heatmaps, boxes, backend="triton")
    expected = decode_keypoints(heatmaps[:, :, :1], boxes, backend="reference")
    assert_same_bits([t[:, :, 1:].cpu() for t in got], [t.cpu() for t in expected])


def test_offsets_past_2_31(full: bool, device: torch.device) -> None:
    maps = 2**31 // 56**2 + 2 if full else 2
    need_memory(5 if full else 0, device)
    heatmaps = torch.zeros(maps, 1, 1, 56, 56, dtype=torch.bfloat16, device=device)
    heatmaps[-1, 0, 0, 50, 3] = 1
    boxes = torch.tensor([[[0.0, 0.0, 56.0, 56.0]]], device=device).expand(maps, 1, 4)
    valid = torch.zeros(maps, 1, dtype=torch.bool, device=device)
    valid[-1] = True
    xy, scores = decode_keypoints(heatmaps, boxes, valid, backend="triton")
    assert xy[-1, 0, 0].tolist() == [3.5, 50.5]
    assert scores.flatten().nonzero().flatten().tolist() == [maps - 1]
