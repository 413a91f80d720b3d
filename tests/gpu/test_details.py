"""What one op alone does at full size on a GPU."""

from dataclasses import replace

import pytest
import torch

from bench.cases import roi_align as roi_align_bench
from tests.gpu.test_full_size import case_of
from tests.gpu.tools import random_like
from tests.kernels.tools import HALVES, assert_same
from tmask_kernels import decode_keypoints, nms, soft_nms
from tmask_kernels.ops.nms.reference import sort_segments
from tmask_kernels.ops.proposals.reference import top_indices
from tmask_kernels.testing import assert_close

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("dtype", "layout"), [("fp32", "nchw"), ("bf16", "nhwc")])
@pytest.mark.parametrize("name", ["roi-align-box-head", "roi-align-mask-head", "roi-align-bicubic", "roi-align-map"])
def test_roi_align_gradient_to_the_boxes(name: str, dtype: str, layout: str, full: bool) -> None:
    """Against the reference in float64, 64 boxes; the same bits again.

    At a cell's centre the gradient of a bilinear sample jumps, so no sample may be a rounding away from one. Of boxes
    in 1/8 pixel the samples of 14 bins of 2 are multiples of 1/448 pixel away from the start; 1/896 keeps them clear.
    """
    case = case_of("roi_align", name, full)
    given = roi_align_bench.inputs(replace(case, rois=64) if full else case, "forward", dtype, layout)
    boxes = ((given.boxes * 8).round() / 8 + 1 / 896).requires_grad_()
    exact = given._replace(
        features=[f.double() for f in given.features], boxes=boxes.detach().double().requires_grad_()
    )
    out = roi_align_bench.BENCH.providers["triton"](given._replace(boxes=boxes))()
    upstream = random_like(out)
    first, second = (torch.autograd.grad(out, boxes, upstream, retain_graph=True) for _ in range(2))
    assert_same(first, second)
    expected = roi_align_bench.BENCH.providers["reference"](exact)()
    (want,) = torch.autograd.grad(expected, exact.boxes, upstream.double())
    assert_close(first[0], want, tolerance=roi_align_bench.FLOAT_COORDINATES)


def test_nms_of_a_chain_of_removals(full: bool, device: torch.device) -> None:
    """Each box removes the next, so every second is kept: as many rounds inside a step as it has boxes."""
    count = 5_000 if full else 150
    left = torch.arange(count, device=device)[:, None] * 4.0
    boxes = torch.cat([left, left * 0, left + 10, left * 0 + 10], 1)
    scores = torch.linspace(1, 0.5, count, device=device)
    assert_same(nms(boxes, scores, 0.4, backend="triton"), torch.arange(0, count, 2, device=device))


def test_soft_nms_equals_the_reference(full: bool, device: torch.device) -> None:
    (boxes,), (scores,), _ = case_of("nms", "nms-1k", full).inputs(device)
    found, expected = (soft_nms(boxes, scores, score_threshold=0.01, backend=b) for b in ("triton", "reference"))
    assert len(found[0]) > 20
    assert_same(found, expected)


@pytest.mark.parametrize("count", [1, 31, 33, 130, 1025, 4097, 20_000, 300_000])
def test_sorts_and_top_indices_have_the_order_of_the_cpu(count: int, device: torch.device) -> None:
    """CUDA sorts short, medium and long rows by different kernels; ties, signed zeros and NaN must stand alike."""
    generator = torch.Generator().manual_seed(0)
    odd = torch.tensor([0.0, -0.0, float("nan"), float("-nan"), float("inf"), -float("inf"), 0.5, 0.25, -1.5])
    scores = odd[torch.randint(len(odd), (3, count), generator=generator)]
    scores[1] = torch.randn(count, generator=generator).bfloat16().float()
    boxes, valid = torch.rand(3, count, 4, generator=generator), torch.rand(3, count, generator=generator) > 0.2
    for mask in (None, valid):
        expected = sort_segments(boxes, scores, mask)
        got = sort_segments(boxes.to(device), scores.to(device), None if mask is None else mask.to(device))
        real = expected.suppresses  # the order of boxes without a score does not matter
        assert_same(got.suppresses.cpu(), real)
        assert_same(got.order.cpu()[real], expected.order[real])
    for dtype in (torch.float32, *HALVES):
        k = min(count, 2000)
        assert_same(top_indices(scores.to(device, dtype), k).cpu(), top_indices(scores.to(dtype), k))


@pytest.mark.parametrize("kind", ["noise", "constant", "checkerboard"])
def test_keypoints_of_huge_boxes_end(kind: str, full: bool, device: torch.device) -> None:
    """64 M pixels a map, where bounds rule out most, all but some, and nothing."""
    cells, side = (56, 8000.0) if full else (3, 12.0)
    y, x = torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij")
    heatmap = {"noise": torch.randn(cells, cells), "constant": torch.ones(cells, cells), "checkerboard": (x + y) % 2.0}
    heatmaps = heatmap[kind].to(device).expand(1, 1, 2, cells, cells)
    boxes = torch.tensor([[[1.0, 2.0, 1.0 + side, 1.5 + side]]], device=device)
    got = decode_keypoints(heatmaps, boxes, backend="triton")
    expected = decode_keypoints(heatmaps[:, :, :1], boxes, backend="reference")
    assert_same([t[:, :, 1:].cpu() for t in got], [t.cpu() for t in expected])
