"""decode_keypoints: hand-made answers, torchvision, `F.interpolate` in float64, ties, odd boxes and maps, mutants."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints

from tests.kernels.tools import INF, NAN, assert_same, each_mutant, slow
from tests.mutation import mutant
from tmask_kernels import decode_keypoints
from tmask_kernels.ops.decode_keypoints import kernels, reference
from tmask_kernels.testing import Tolerance, assert_close, guarded, poisoned_empty


def box(x: float, y: float, width: float, height: float) -> list[float]:
    return [x, y, x + width, y + height]


def run(maps: Tensor, boxes: list[list[float]], backend: str, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Maps [D, K, H, W] and a box for each, as one image between guard bands: xy [D, K, 2], scores [D, K]."""
    given_boxes = guarded(torch.tensor([boxes], device=maps.device))
    with poisoned_empty():
        xy, scores = decode_keypoints(guarded(maps[None]), given_boxes, backend=backend, **kwargs)
    assert xy.dtype == torch.float32
    assert scores.dtype == (torch.float64 if maps.dtype == torch.float64 else torch.float32)
    return xy[0], scores[0]


def check_kernel(maps: Tensor, boxes: list[list[float]]) -> None:
    """Kernel and reference agree bit for bit."""
    assert_same(run(maps, boxes, "triton"), run(maps, boxes, "reference"))


def scenes() -> Tensor:
    """[6, 1, 8, 9]: each is decoded wrongly if some part of the kernel is wrong."""
    maps = torch.zeros(6, 1, 8, 9)
    # Between four equal cells the surface rises to 1.41, above a lone larger cell that stands before them.
    maps[0, 0, 1, 1], maps[0, 0, 4:6, 5:7] = 1.05, 1.0
    # Two such rises in one row of patches, the later one larger; and one below them that equals it.
    maps[1, 0, 1:3, 1:3], maps[1, 0, 1:3, 6:8], maps[1, 0, 5:7, 6:8] = 0.9, 1.0, 1.0
    # Scene 2 is constant: all pixels are equal.
    maps[3] = torch.randn(1, 8, 9, generator=torch.Generator().manual_seed(1))
    # A lone larger cell, whose pixels are not larger: those between two rows of other cells, or where a plateau ends.
    maps[4, 0, 1, 1], maps[4, 0, 4, 5:7], maps[4, 0, 5, 5:7] = 1.32, 1.0, 0.9
    maps[5, 0, 1, 1], maps[5, 0, 2, 5:7], maps[5, 0, 3:6, 5:7] = 1.3, 0.9, 1.0
    return maps


SCENE_BOXES = [
    box(3.0, -2.0, 35.4, 30.9),
    box(0.0, 0.0, 36.0, 32.0),
    box(0.5, 0.25, 36.0, 32.0),
    box(1.0, 2.0, 20.3, 17.0),
]
SCENE_BOXES += [box(0.0, 0.0, 72.0, 64.0)] * 2


def test_a_peak_is_at_its_cells_centre(backend, device):
    """4 x 4 cells in a box of 12 x 8: 3 x 2 pixels a cell. One row of pixels above the centre of a cell equals the one
    below; in x the middle one of three is the cell's centre.
    """
    maps = torch.zeros(1, 2, 4, 4, device=device)
    maps[0, 0, 2, 1] = maps[0, 1, 0, 1] = 5
    xy, scores = run(maps, [box(10.0, 20.0, 12.0, 8.0)], backend)
    assert xy.tolist() == [[[10 + 4.5, 20 + 4.5], [10 + 4.5, 20 + 0.5]]]
    # Keys' weight of a cell a quarter of a cell away, a = -0.75. Before the first row the first is repeated: all
    # weights are its own there, but that of the next row, 1.25 cells away.
    near, far = 1 - 2.25 * 0.25**2 + 1.25 * 0.25**3, -0.75 * (1.25**3 - 5 * 1.25**2 + 8 * 1.25 - 4)
    assert_close(scores[0], torch.tensor([5 * near, 5 * (1 - far)], device=device).double())


@pytest.mark.parametrize(
    ("corners", "expected"),
    [
        (box(10.0, 20.0, 0.0, 0.0), [10.5, 20.5]),  # a box has a pixel at least
        ([10.0, 20.0, 4.0, 15.0], [10.5, 20.5]),  # inverted
        (box(-10.0, 20.0, 1.5, 0.2), [-10 + 1.125, 20.5]),  # two pixels of 0.75
    ],
    ids=["point", "inverted", "small"],
)
def test_the_smallest_boxes(backend, device, corners, expected):
    maps = torch.arange(6.0, device=device).repeat(1, 1, 5, 1)
    assert run(maps, [corners], backend)[0][0, 0].tolist() == expected


def test_the_first_of_equal_pixels(backend, device):
    """A constant map; and peaks of one form, with four pixels a cell, of which the first in row-major order wins."""
    maps = torch.full((2, 1, 6, 6), 0.3, device=device)
    maps[1] = 0
    maps[1, 0, 4, 1] = maps[1, 0, 1, 4] = maps[1, 0, 1, 1] = 2
    xy, scores = run(maps, [box(0.0, 0.0, 24.0, 24.0)] * 2, backend)
    assert xy[0, 0].tolist() == [0.5, 0.5]
    assert scores[0].item() == maps[0, 0, 0, 0].item()  # not a rounding away
    assert_close(xy[1, 0], torch.tensor([6.0, 6.0]), tolerance=Tolerance(max=0.1, rms=0.1))  # half a pixel of 6


def torchvision_boxes(count: int) -> Tensor:
    corners = torch.rand(count, 2) * 60 - 20
    return torch.cat([corners, corners + torch.rand(count, 2) ** 2 * 70], 1)


@pytest.mark.parametrize("cells", [(6, 5), (3, 8), (1, 1)], ids=str)
def test_equals_torchvision(backend, device, cells):
    """The same pixels, of boxes smaller and larger than the map. Its sums are in another order, so scores differ in the
    last bits, and so may pixels that are equal up to those: there are none among these.
    """
    maps = torch.randn(*((2, 1) if backend == "triton" else (25, 2)), *cells).to(device)  # the same on any device
    boxes = torchvision_boxes(len(maps))
    boxes[0] = torch.tensor([2.0, 3.0, 4.5, 5.2])
    if cells == (1, 1):
        maps[:] = 0.5  # every pixel
        boxes[:, 2:] = boxes[:, :2] + 0.7  # and there is just one
    expected, scores = heatmaps_to_keypoints(maps.cpu(), boxes)
    xy, got = run(maps, boxes.tolist(), backend)
    assert torch.equal(xy.cpu(), expected[..., :2])
    assert_close(got.cpu(), scores.double())


# The kernel and the reference


QUICK_SCENES = [(torch.float32, scene) for scene in (0, 2, 4)] + [(torch.float16, 3), (torch.bfloat16, 0)]
SLOW_SCENES = [(torch.float32, scene) for scene in (1, 3, 5)] + [(torch.float16, 4), (torch.bfloat16, 5)]


@pytest.mark.parametrize(("dtype", "scene"), [*QUICK_SCENES, *(slow(*case) for case in SLOW_SCENES)], ids=str)
def test_kernel_equals_the_reference(device, dtype, scene):
    check_kernel(scenes()[scene : scene + 1].to(device, dtype), SCENE_BOXES[scene : scene + 1])


def test_scenes_have_the_answers_that_they_were_made_for(device):
    xy, scores = run(scenes().to(device), SCENE_BOXES, "reference")
    assert scores[0] > 1.35
    assert xy[1, 0].tolist() == [7 * 4 - 0.5, 2 * 4 - 0.5]
    assert xy[2, 0].tolist() == [1.0, 0.75]


def test_odd_boxes_and_invalid_ones_are_zero(backend, device):
    rows = [
        [NAN, 0.0, 5.0, 5.0],
        [0.0, 0.0, INF, 5.0],
        [0.0, -INF, 5.0, 5.0],
        [-3e38, 0.0, 3e38, 5.0],  # its width is infinite
        [2.0, 2.0, 5.0, 5.0],
        [2.0, 2.0, 5.0, 5.0],
    ]
    maps = torch.rand(6, 2, 3, 4, device=device)
    valid = torch.ones(1, 6, dtype=torch.bool, device=device)
    valid[0, 4] = False
    maps[0], maps[4] = NAN, INF  # looked at by none
    xy, scores = run(maps, rows, backend, valid=valid)
    assert not xy[:5].any()
    assert not scores[:5].any()
    assert xy[5].all()
    assert scores[5].all()
    assert torch.equal(run(maps[4:], [rows[5]] * 2, backend)[0][1], xy[5])  # valid=None: all


def test_maps_that_are_no_numbers_show_in_the_score(backend, device):
    maps = torch.rand(1, 5, 3, 4, device=device)
    for k, value in enumerate((NAN, INF, -INF, -2e37)):
        maps[0, k, k % 3, k] = value
    xy, scores = run(maps, [box(1.0, 2.0, 6.0, 5.0)], backend)
    assert not xy[0, :4].any()
    assert scores[0, :4].isnan().all()
    assert xy[0, 4].all()
    assert scores[0, 4] > 0


def test_the_largest_grids(backend, device, monkeypatch):
    """Beyond the limit pixels grow with the box, and their number does not."""
    for module in (kernels, reference):
        monkeypatch.setattr(module, "MAX_GRID", 8)
    maps = torch.zeros(1, 1, 4, 4, device=device)
    maps[0, 0, 1, 2] = 1
    xy, _ = run(maps, [box(5.0, 7.0, 1e6, 7.5)], backend)
    # Two pixels a cell, of 125,000 in x; both of a cell are equal, so the first.
    assert xy[0, 0].tolist() == [5 + 4.5 * 125_000, 7 + 2.5 * 7.5 / 8]
    xy, _ = run(maps, [box(0.0, 0.0, 1e30, 1e30)], backend)
    assert_close(xy[0, 0] / 1e30, torch.tensor([4.5 / 8, 2.5 / 8], device=device).double())


def test_chunks_of_rows_in_the_reference(monkeypatch):
    expected = run(scenes(), SCENE_BOXES, "reference")
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 130)
    assert_same(run(scenes(), SCENE_BOXES, "reference"), expected)


LAYOUTS = {  # maps [N, D, K, H, W]; the last ones have an axis of one cell, whose stride may be any number
    "expanded": lambda: torch.randn(1, 1, 1, 3, 4).expand(2, 1, 1, 3, 4),
    "one column": lambda: torch.randn(40).as_strided((1, 1, 1, 5, 1), (0, 0, 0, 1, 7)),
    "one row": lambda: torch.randn(40).as_strided((1, 1, 1, 1, 5), (0, 0, 0, 7, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_maps(device, layout):
    with device:
        maps = LAYOUTS[layout]()
    boxes = torch.tensor([[box(0.0, 0.0, 4.0, 2.5)], [box(0.0, 0.0, 6.0, 5.5)]], device=device)[-len(maps) :]
    got = decode_keypoints(maps, boxes.mT.contiguous().mT, backend="triton")
    assert_same(got, decode_keypoints(maps.contiguous(), boxes, backend="reference"))


@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 4), (2, 0, 2, 4, 4), (2, 3, 0, 4, 4)], ids=str)
def test_nothing_to_decode(backend, device, shape):
    maps, boxes = torch.zeros(shape, device=device), torch.zeros(*shape[:2], 4, device=device)
    xy, scores = decode_keypoints(maps, boxes, backend=backend)
    assert xy.shape == (*shape[:3], 2)
    assert scores.shape == shape[:3]


def test_most_pixels_are_not_computed(monkeypatch):
    """A smooth peak of a heat map, and a constant map, whose pixels all are as large as its bounds."""
    if not kernels.triton.knobs.runtime.interpret:
        pytest.skip("counts what the interpreter computes")
    searched: list[int] = []
    search = kernels._search

    def counting(best, index, map_ptr, y_first, y_past, x_first, x_past, *rest):
        searched.append((int(y_past) - int(y_first)) * (int(x_past) - int(x_first)))
        return search(best, index, map_ptr, y_first, y_past, x_first, x_past, *rest)

    monkeypatch.setattr(kernels, "_search", counting)
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    peak = -((x - 5.2) ** 2 + (y - 3.1) ** 2)
    for heatmap, share in ((peak, 0.5), (torch.ones(8, 8), 0.25)):
        searched.clear()
        decode_keypoints(heatmap[None, None, None], torch.tensor([[box(0.0, 0.0, 64.0, 64.0)]]), backend="triton")
        assert 0 < sum(searched) < share * 64 * 64
    searched.clear()
    decode_keypoints(peak[None, None, None], torch.tensor([[box(0.0, 0.0, 8.0, 7.5)]]), backend="triton")
    assert searched == [64]  # no more pixels than cells


def test_detectron2s_score(device):
    """The formula of the docstring: the resized map's softmax at its largest pixel, normalised over the map's cells."""
    maps, boxes = torch.randn(1, 1, 2, 5, 6, device=device), torch.tensor([[box(0.0, 0.0, 9.0, 8.0)]], device=device)
    _, scores = decode_keypoints(maps, boxes, backend="reference")
    resized = F.interpolate(maps[0].double(), size=(8, 9), mode="bicubic", align_corners=False)
    expected = resized.flatten(2).amax(2).exp() / maps[0].double().exp().flatten(2).sum(2)
    assert_close((scores - maps.flatten(3).logsumexp(3)).exp()[0], expected)


# Mutants

MUTANTS = {  # and the scenes that show it
    "bounds": ("OVERSHOOT = -KEYS / 4", "OVERSHOOT = 0.0", 0),
    "patch of the best": ("(y_first * GW <= index)", "(y_first * GW < 0)", 2),
    "tie of patches": ("(top == best) & (place < index)", "(top == best) & (place > index)", 1),
    "tie of lanes": ("(value == values) & (place < places)", "(value == values) & (place > places)", 1, 2),
    "next patch": ("tl.where(reach & (offs_c > past), offs_c, BLOCK_W)", "tl.where(offs_c > 99, 0, BLOCK_W)", 1),
    "near weight": ("(A + 2.0) * t) - A)", "(A + 2.0) * t))", 3),
    "far weight": ("outer * rest, after, outer * t", "outer * t, after, outer * rest", 3),
    "centre": ("(pixel.to(tl.float32) + 0.5) * step - 0.5", "(pixel.to(tl.float32) + 0.5) * step", 3),
    "rows of a patch": ("tl.minimum(patch_y + 2, H - 1)", "tl.minimum(patch_y + 1, H - 1)", 5),
    "rotation": ("low1, high1, low2, high2, low3, high3\n", "low1, high1, low1, high1, low3, high3\n", 4),
    "pixels of a side": ("tl.ceil(width)", "tl.floor(width)", 3),
    "height": ("tl.math.div_rn(height, grid_h) + y1", "tl.math.div_rn(width, grid_w) + y1", 3),
    "last cell": ("cell + 2, length - 1", "cell + 1, length - 1", 3),
}


@each_mutant(MUTANTS, ["bounds", "patch of the best"])
def test_a_broken_kernel_is_seen(tmp_path, name):
    old, new, *shown = MUTANTS[name]
    broken = mutant(kernels, old, new, tmp_path)
    with pytest.raises(AssertionError):  # noqa: PT012 - either scene may show it
        for i in shown:
            maps, boxes = scenes()[i][None, None], torch.tensor([[SCENE_BOXES[i]]])
            expected = decode_keypoints(maps, boxes, backend="reference")
            assert_same(broken.decode_keypoints(maps, boxes, None), expected)
