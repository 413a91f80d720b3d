"""The answers that other libraries hold their RoIAlign to, worked out by hand here, through every backend.

Both published conventions on one 5 x 5 table, sampling by grid_sample, an image of half the size, nothing to pool.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.test_roi_align import BACKENDS
from tmask_kernels import multiscale_roi_align, roi_align
from tmask_kernels.testing import assert_close, random_boxes

INTERPOLATIONS = pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    if request.param == "torchvision" and device.type != "cpu":
        pytest.skip("the torchvision backend serves the CPU only")
    return str(request.param)


def need_bilinear(backend: str, interpolation: str) -> None:
    if backend == "torchvision" and interpolation == "bicubic":
        pytest.skip("torchvision has no bicubic samples")


def table(device: torch.device) -> Tensor:
    """f(y, x) = 5 y + x on 5 x 5 cells: [1, 1, 5, 5]."""
    return torch.arange(25.0, device=device).view(1, 1, 5, 5)


# The box reaches from 1 to 3 in both directions: 4 bins of half a cell, whose centres are 1.25, 1.75, 2.25, 2.75, so f
# begins at 5 * 1.25 + 1.25 = 7.5 and grows by 0.5 a column and 2.5 a row. Aligned, all lies half a cell further up and
# left: 3 less.
NOT_ALIGNED = [
    [7.5, 8.0, 8.5, 9.0],
    [10.0, 10.5, 11.0, 11.5],
    [12.5, 13.0, 13.5, 14.0],
    [15.0, 15.5, 16.0, 16.5],
]
ALIGNED = [
    [4.5, 5.0, 5.5, 6.0],
    [7.0, 7.5, 8.0, 8.5],
    [9.5, 10.0, 10.5, 11.0],
    [12.0, 12.5, 13.0, 13.5],
]


@pytest.mark.parametrize("sampling_ratio", [0, 1, 2])
@pytest.mark.parametrize(("aligned", "rows"), [(False, NOT_ALIGNED), (True, ALIGNED)], ids=["not_aligned", "aligned"])
def test_the_5_x_5_table(
    backend: str, device: torch.device, aligned: bool, rows: list[list[float]], sampling_ratio: int
) -> None:
    box = torch.tensor([[0.0, 1, 1, 3, 3]], device=device)
    out = roi_align(table(device), box, 4, 1.0, sampling_ratio, aligned, backend=backend)
    assert_close(out[0, 0], torch.tensor(rows, device=device))


def test_the_table_reversed(backend: str, device: torch.device) -> None:
    """The map and the box turned by half a turn give the table turned by half a turn: no corner is favoured."""
    box = torch.tensor([[0.0, 1, 1, 3, 3]], device=device)
    turned = torch.tensor([[0.0, 2, 2, 4, 4]], device=device)
    out = roi_align(table(device).flip(2, 3), turned, 4, 1.0, 0, True, backend=backend)
    assert_close(out.flip(2, 3), roi_align(table(device), box, 4, 1.0, 0, True, backend=backend))
    assert_close(out[0, 0].flip(0, 1), torch.tensor(ALIGNED, device=device))


def test_the_gradient_of_one_sample(backend: str, device: torch.device) -> None:
    """A sample at y = 1.25, x = 2.5 between four cells: (3/4, 1/4) of the rows times (1/2, 1/2) of the columns."""
    cells = table(device).requires_grad_()
    box = torch.tensor([[0.0, 3, 1.75, 3, 1.75]], device=device)
    (gradient,) = torch.autograd.grad(roi_align(cells, box, 1, 1.0, 1, True, backend=backend).sum(), cells)
    expected = torch.zeros(5, 5, device=device)
    expected[1, 2:4], expected[2, 2:4] = 0.375, 0.125
    assert_close(gradient[0, 0], expected)


def by_grid_sample(feature: Tensor, boxes: Tensor, bins: int, ratio: int, mode: str) -> Tensor:
    """Aligned RoIAlign of [C, H, W], boxes [K, 4] in cells and inside, as a mean over grid_sample's points."""
    _, H, W = feature.shape
    x1, y1, x2, y2 = boxes.unbind(1)  # [K]
    steps = (torch.arange(bins * ratio, dtype=boxes.dtype, device=boxes.device) + 0.5) / (bins * ratio)
    # grid_sample without align_corners: -1 and 1 are the outer edges of the border's cells, as 0 and W are of a box.
    x = 2 * (x1[:, None] + (x2 - x1)[:, None] * steps) / W - 1  # [K, bins * ratio]
    y = 2 * (y1[:, None] + (y2 - y1)[:, None] * steps) / H - 1
    grid = torch.stack([x[:, None, :].expand(-1, len(steps), -1), y[:, :, None].expand(-1, -1, len(steps))], 3)
    samples = F.grid_sample(feature.expand(len(boxes), -1, -1, -1), grid, mode, "border", align_corners=False)
    return F.avg_pool2d(samples, ratio)


@INTERPOLATIONS
@pytest.mark.parametrize("ratio", [1, 2])
def test_is_the_mean_of_grid_samples_points(backend: str, device: torch.device, interpolation: str, ratio: int) -> None:
    need_bilinear(backend, interpolation)
    feature = torch.randn(2, 17, 23, device=device)
    boxes = random_boxes(3, height=17, width=23, min_size=2, max_size=16, device=device)
    boxes = boxes.clamp(0.5, 16.5)  # samples between cell centres, where no library clamps a coordinate
    # grid_sample's cubic kernel has the coefficient -0.75.
    options: dict[str, Any] = {"interpolation": interpolation, "cubic_coeff": -0.75, "backend": backend}
    out = roi_align(feature[None], boxes[None], 2, 1.0, ratio, True, **options)
    assert_close(out, by_grid_sample(feature.double(), boxes.double(), 2, ratio, interpolation))


@INTERPOLATIONS
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_an_image_of_half_the_size(backend: str, device: torch.device, interpolation: str, sampling_ratio: int) -> None:
    """Aligned, a box and the same box on the image halved see the same ramp; else they are a quarter cell apart."""
    need_bilinear(backend, interpolation)
    y, x = torch.meshgrid(torch.arange(20.0, device=device), torch.arange(24.0, device=device), indexing="ij")
    image = (3 * y + 2 * x)[None, None]
    half = F.interpolate(image, scale_factor=0.5, mode="bilinear", antialias=False)  # f at 2 (i + 0.5) - 0.5
    boxes = torch.tensor([[[6.0, 7, 14, 11], [5.5, 6.25, 9.0, 9.75]]], device=device)
    options: dict[str, Any] = {"interpolation": interpolation, "backend": backend}
    for aligned, apart in ((True, 0.0), (False, (3 + 2) * 0.5)):
        whole = roi_align(image, boxes, 2, 1.0, sampling_ratio, aligned, **options)
        halved = roi_align(half, boxes / 2, 2, 1.0, sampling_ratio, aligned, **options)
        scaled = roi_align(half, boxes, 2, 0.5, sampling_ratio, aligned, **options)
        assert_close(halved, whole.double() + apart)
        assert torch.equal(scaled, halved)


@INTERPOLATIONS
@pytest.mark.parametrize("images", [0, 2], ids=["no_images", "no_boxes"])
def test_nothing_to_pool_keeps_the_graph(backend: str, device: torch.device, interpolation: str, images: int) -> None:
    need_bilinear(backend, interpolation)
    maps = [torch.rand(images, 4, 8 >> i, 8 >> i, device=device, requires_grad=True) for i in range(2)]
    options: dict[str, Any] = {"interpolation": interpolation, "backend": backend}
    single = roi_align(maps[0], torch.rand(0, 5, device=device), 7, 1.0, 0, True, **options)
    several = multiscale_roi_align(maps, torch.rand(0, 5, device=device), 7, [1 / 4, 1 / 8], **options)
    assert single.shape == several.shape == (0, 4, 7, 7)
    gradients = torch.autograd.grad(single.sum() + several.sum(), maps)
    assert [g.shape for g in gradients] == [m.shape for m in maps]
    assert not any(g.any() for g in gradients)
