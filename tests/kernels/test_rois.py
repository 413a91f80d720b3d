"""What every kind of RoI pooling must do: each property is tested once, over all kinds and backends.

The answers of one kind alone are in test_roi_align.py and test_roi_pool.py, the mutants that turn these properties red
in test_roi_mutants.py.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.rois import (
    ADAPTIVE,
    FIXED,
    GRIDS,
    HEIGHT,
    KINDS,
    SLOW,
    WIDTH,
    Grid,
    Kind,
    brute_force,
    check,
    each,
    odd_boxes,
)
from tmask_kernels import roi_align, roi_pool
from tmask_kernels.ops.roi_align import op
from tmask_kernels.ops.roi_align.kernels import backward, forward, max_backward
from tmask_kernels.ops.roi_align.kernels import boxes as boxes_backward
from tmask_kernels.ops.roi_align.kernels import max as max_forward
from tmask_kernels.ops.roi_pool.kernels import backward as pool_backward
from tmask_kernels.ops.roi_pool.kernels import forward as pool_forward
from tmask_kernels.testing import assert_close, guarded, random_boxes

FLOAT64 = torch.float64
# In cells of a map of 7 x 9.
BOXES = {
    "inside": [1.3, 2.1, 5.4, 7.9],
    "over": [-4.3, -3.1, 14.2, 12.3],
    "small": [3.2, 3.1, 3.9, 3.7],
    "wide": [-30.5, 2.0, 25.0, 4.0],
    "of no size": [3.3, 2.4, 3.3, 2.4],
    "inverted": [6.2, 1.4, 2.3, 4.1],
}


# Against the truth


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
@pytest.mark.parametrize("kind", [KINDS[name] for name in ("bilinear", "bicubic", "max", "max-bicubic")], ids=str)
def test_reference_follows_the_definition(kind: Kind, box: list[float], grid: Grid) -> None:
    feature = torch.randn(3, 7, 9, dtype=FLOAT64)
    boxes = torch.tensor([[box]], dtype=FLOAT64)
    out = kind.pool([feature[None]], 2 * boxes, (3, 2), backend="reference", grid=grid, scale=0.5)
    options = {"cubic": kind.cubic, "largest": kind.largest}
    assert_close(out[0], brute_force(feature, box, (3, 2), grid, **options))


def every_grid_and_layout() -> list[Any]:
    """Kinds, backends, grids and layouts; the slow ones are those where others show the same of the kernel."""
    cases = []
    for kind in KINDS.values():
        for backend in kind.backends:
            for name, grid in GRIDS.items():
                for channels_last in (False, True) if grid in kind.grids else ():
                    both = kind.name in ("bilinear", "bicubic", "pool")  # else each grid has a layout of its own
                    first = grid in (FIXED, ADAPTIVE) and (both or channels_last == (grid == ADAPTIVE))
                    marks = [] if first and not (kind.name == "max-bicubic" and channels_last) else [SLOW]
                    layout = "channels_last" if channels_last else "contiguous"
                    label = f"{kind}-{backend}-{name}-{layout}"
                    cases.append(pytest.param(kind, backend, grid, channels_last, id=label, marks=marks))
    return cases


@pytest.mark.parametrize(("kind", "backend", "grid", "channels_last"), every_grid_and_layout())
def test_values_and_gradients_equal_the_truth(
    kind: Kind, backend: str, grid: Grid, channels_last: bool, device: torch.device
) -> None:
    features = kind.maps(device, channels_last=channels_last)
    check(kind, features, kind.boxes(device), (2, 3), backend=backend, grid=grid)


@pytest.mark.parametrize(
    ("dtype", "channels_last"),
    [
        (torch.bfloat16, True),
        (torch.float16, True),
        (FLOAT64, False),
        pytest.param(torch.bfloat16, False, marks=SLOW),
        pytest.param(torch.float16, False, marks=SLOW),
    ],
    ids=str,
)
@each(slow="max-bicubic boxes-bicubic")
def test_dtypes(kind: Kind, backend: str, dtype: torch.dtype, channels_last: bool, device: torch.device) -> None:
    check(kind, kind.maps(device, dtype=dtype, channels_last=channels_last), kind.boxes(device), 2, backend=backend)


@each("bilinear", "bicubic", "max", slow="bicubic max")
def test_bfloat16_in_pairs(kind: Kind, backend: str, device: torch.device) -> None:
    """Of an even number of channels the kernels read two at a time; not where an offset is odd."""
    kind = replace(kind, channels=5)
    for first, past in ((0, 5), (0, 4), (1, 5)):  # odd channels; odd strides of cells; an odd first cell as well
        maps = [m[:, first:past] for m in kind.maps(device, dtype=torch.bfloat16, channels_last=True)]
        check(kind, maps, kind.boxes(device), (3, 4), backend=backend)
    even = replace(kind, channels=4).maps(device, dtype=torch.bfloat16, channels_last=True)
    check(kind, even, kind.boxes(device), (3, 4), backend=backend)


def test_blocks_of_bins_of_one_program(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many boxes: a program takes some blocks of their bins, the last of them perhaps fewer."""
    assert [forward.blocks_of_each_program(7 * boxes, 7) for boxes in (0, 8, 604, 1024, 10**6)] == [1, 1, 2, 3, 7]
    monkeypatch.setattr(forward, "blocks_of_each_program", lambda tiles, blocks: 2)
    for name, channels_last in (("bilinear", True), ("bilinear", False), ("max", True)):
        kind = KINDS[name]
        check(kind, kind.maps(device, channels_last=channels_last), kind.boxes(device), (3, 7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, FLOAT64], ids=str)
@each("boxes")
def test_dtypes_of_the_boxes(kind: Kind, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """The gradient has the dtype of the boxes, which are cast to float32."""
    boxes = kind.boxes(device, 1).detach().to(dtype).float().to(dtype).requires_grad_()
    check(kind, kind.maps(device), boxes, 2, backend=backend)


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1)], ids=str)
@each("bilinear", "max", "pool")
def test_maps_of_few_cells(kind: Kind, backend: str, shape: tuple[int, int], device: torch.device) -> None:
    features = [torch.randn(1, 2, *shape, device=device, requires_grad=True)]
    boxes = torch.tensor([[[0.2, -0.4, 4.7, 3.1], [-0.3, -0.2, 0.9, 0.8]]], device=device)
    check(kind, features, boxes, (2, 1), backend=backend, scale=1.0)


@each("bilinear", "max", "pool")
def test_one_map_for_all_images(kind: Kind, backend: str, device: torch.device) -> None:
    features = [x.detach()[:1].expand_as(x).requires_grad_() for x in kind.maps(device)]
    check(kind, features, kind.boxes(device), 2, backend=backend)


@each(grids=True, slow="bicubic boxes-bicubic max-bicubic")
def test_odd_boxes(kind: Kind, backend: str, grid: Grid, device: torch.device) -> None:
    """Degenerate boxes are pooled as by the reference; those that are not finite are 0 and take no gradient."""
    boxes = odd_boxes(device)[None].requires_grad_(kind.to_boxes)
    out, gradients = check(kind, kind.maps(device, images=1), boxes, (1, 2), backend=backend, grid=grid)
    assert not out[-3:].any()
    if kind.to_boxes:
        assert gradients[-1][0, :4].all()
        assert not gradients[-1][0, -3:].any()


@each(grids=True, slow="bicubic max-bicubic boxes-bicubic")
def test_boxes_that_overflow_once_scaled_give_zeros(kind: Kind, backend: str, grid: Grid, device: torch.device) -> None:
    feature = torch.ones(1, 3, 8, 8, device=device, requires_grad=True)
    rows = [[1e30, 1e30, 2e30, 2e30], [-1e30, 0.0, 1e30, 2e-10], [0.0, -3e28, 2e-10, 3e28], [0.0, 0.0, 4e-10, 4e-10]]
    boxes = torch.tensor([rows], device=device).requires_grad_(kind.to_boxes)
    out = kind.pool([feature], boxes, 2, backend=backend, grid=grid, scale=1e10)
    assert_close(out, torch.tensor([0.0, 0, 0, 1], device=device)[:, None, None, None].expand(4, 3, 2, 2))
    assert_close(torch.autograd.grad(out.sum(), feature, retain_graph=True)[0].sum(), torch.tensor(12.0, device=device))
    if kind.to_boxes:
        (gradient,) = torch.autograd.grad(out.sum(), boxes)
        assert not gradient[0, :3].any()
        assert gradient.isfinite().all()


@each("bilinear")
def test_nan_cells_stay_in_their_image_and_level(kind: Kind, backend: str, device: torch.device) -> None:
    features = [x.detach() for x in kind.maps(device)]
    boxes = odd_boxes(device)[:3].expand(2, -1, -1)
    clean = kind.pool(features, boxes, 2, backend=backend).view(2, 3, -1)
    features[0][1, :, 3, 3] = math.nan
    out = kind.pool(features, boxes, 2, backend=backend).view(2, 3, -1)
    assert torch.equal(out[0], clean[0])
    assert torch.equal(out[1, 1:], clean[1, 1:])
    assert out[1, 0].isnan().any()


@each("bilinear", "max", "pool")
def test_many_gradients_of_one_cell_are_summed_in_float32(kind: Kind, backend: str, device: torch.device) -> None:
    """256 and eight ones on one cell: in bfloat16 256 + 1 is 256."""
    feature = torch.zeros(1, 1, 3, 3, device=device, dtype=torch.bfloat16)
    feature[..., 1, 1] = 1
    feature.requires_grad_()
    boxes = torch.tensor([0.5, 0.5, 2.5, 2.5], device=device).expand(1, 9, 4)  # one sample, on the middle cell
    upstream = torch.tensor([256.0] + [1.0] * 8, device=device, dtype=torch.bfloat16).view(9, 1, 1, 1)
    out = kind.pool([feature], boxes, 1, backend=backend, grid=(1, True), scale=1.0)
    (gradient,) = torch.autograd.grad(out, feature, upstream)
    expected = torch.zeros_like(gradient)
    expected[..., 1, 1] = 264
    assert torch.equal(gradient, expected)


# Forms of the arguments, empty inputs, layouts


@each(slow="bicubic max-bicubic boxes-bicubic")
def test_forms_of_boxes_agree(kind: Kind, backend: str, device: torch.device) -> None:
    """Padded, a list, with the image's index in another order, and strided: values and gradients to the boxes."""
    features, padded = [x.detach() for x in kind.maps(device)], kind.boxes(device)
    index = torch.tensor([1.0, 1, 0, 0], device=device)[:, None]
    turned = torch.cat([index, padded.flip(0).flatten(0, 1)], 1)
    strided = padded.transpose(0, 1).contiguous().transpose(0, 1)
    expected = kind.pool(features, padded, 2, backend=backend)
    weights = torch.randn_like(expected)
    for form in (list(padded), turned, strided):
        out = kind.pool(features, form, 2, backend=backend)
        out = out.roll(2, 0) if form is turned else out
        assert_close(out, expected)
        if kind.to_boxes:
            got, want = (torch.autograd.grad(x, padded, weights, retain_graph=True)[0] for x in (out, expected))
            assert_close(got, want)
    if kind.to_boxes:
        (gradient,) = torch.autograd.grad(kind.pool(features, turned, 2, backend=backend).sum(), turned)
        assert not gradient[:, 0].any(), "an index takes no gradient"


@each(slow="bicubic max-bicubic boxes-bicubic")
def test_invalid_rows_are_zero_and_take_no_gradient(kind: Kind, backend: str, device: torch.device) -> None:
    features, boxes = kind.maps(device), kind.boxes(device).detach()
    valid = torch.tensor([[True, False], [False, False]], device=device)
    expected = kind.pool(features, [boxes[0, :1], boxes[1, :0]], 2, backend=backend)
    boxes[~valid] = math.nan
    boxes.requires_grad_(kind.to_boxes)
    out = kind.pool(features, boxes, 2, backend=backend, valid=valid)
    assert_close(out[:1], expected)
    assert not out[1:].any()
    leaves = [*features, boxes] if kind.to_boxes else features
    assert not any(g.any() for g in torch.autograd.grad(out[1:].sum(), leaves, retain_graph=True))
    assert all(g.any() for g in torch.autograd.grad(out[:1].sum(), leaves[-1:] if kind.to_boxes else features[:1]))


NOTHING = {
    "no boxes": ((2, 3, 8, 8), (2, 0, 4)),
    "no boxes with an index": ((2, 3, 8, 8), (0, 5)),
    "no images": ((0, 3, 8, 8), (0, 5)),
    "no padded images": ((0, 3, 8, 8), (0, 3, 4)),
    "no rows": ((1, 3, 0, 8), (1, 2, 4)),
    "no columns": ((1, 3, 8, 0), (1, 2, 4)),
    "no cells": ((1, 3, 0, 0), (1, 2, 4)),
    "no channels": ((1, 0, 8, 8), (1, 2, 4)),
}


@pytest.mark.parametrize(("shape", "boxes_shape"), NOTHING.values(), ids=NOTHING)
@each()
def test_nothing_to_pool_keeps_the_graph(
    kind: Kind, backend: str, shape: tuple[int, ...], boxes_shape: tuple[int, ...], device: torch.device
) -> None:
    feature = torch.zeros(shape, device=device, requires_grad=True)
    boxes = torch.zeros(boxes_shape, device=device)
    boxes[..., -2:] = 4
    chosen = "auto" if kind.rounded and backend == "torchvision" else backend  # it refuses maps without cells
    for grid in kind.grids[:2]:
        out = kind.pool([feature], boxes.requires_grad_(kind.to_boxes), (4, 2), backend=chosen, grid=grid)
        assert out.shape == (math.prod(boxes_shape[:-1]), shape[1], 4, 2)
        assert not out.any()
        for leaf in [feature, boxes] if kind.to_boxes else [feature]:
            (gradient,) = torch.autograd.grad(out.sum(), leaf, retain_graph=True)
            assert gradient.shape == leaf.shape
            assert not gradient.any()


@each("bilinear", "bicubic", "max")
def test_a_level_without_cells_or_boxes(kind: Kind, backend: str, device: torch.device) -> None:
    """Boxes of the empty level give zeros, those of the other are pooled as ever; with none both take no gradient."""
    maps = [torch.ones(1, 3, 8, 8, device=device), torch.zeros(1, 3, 0, 4, device=device)]
    boxes = torch.tensor([[[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 30.0, 30.0]]], device=device)
    for grid in kind.grids[:2]:
        out = kind.pool(maps, boxes, 2, backend=backend, grid=grid, scale=0.25)
        assert_close(out.flatten(1).sum(1), torch.tensor([12.0, 0], device=device))
    maps = [x.requires_grad_() for x in maps]
    out = kind.pool(maps, boxes[:, :0], 2, backend=backend)
    assert [(g.shape, bool(g.any())) for g in torch.autograd.grad(out.sum(), maps)] == [(m.shape, False) for m in maps]


@pytest.mark.parametrize("name", ["bilinear", "boxes", "pool", pytest.param("max", marks=SLOW)])
def test_more_channels_than_a_block(name: str, device: torch.device) -> None:
    """Not a whole number of blocks either, nor of the channels that a thread loads at once."""
    C = 301
    tiles = {
        "bilinear": [backward.pick_gather_tile(C, 4, True)],
        "boxes": [boxes_backward.pick_slope_tile(C, 7, 4, True)],
        "max": [max_backward.pick_gather_tile(C, True, None)],
        "pool": [pool_forward.pick_tile(C, 7, True), pool_backward.pick_gather_tile(C, True)],
    }
    assert all(tile.block_c < C for tile in tiles[name])
    tile = forward.pick_tile(C, (1, 7), 4, True)
    assert tile.groups * tile.group_c < C
    kind, feature = KINDS[name], torch.randn(1, C, 3, 4, device=device).contiguous(memory_format=torch.channels_last)
    boxes = torch.tensor([[[0.2, 0.3, 3.7, 2.1]]], device=device, requires_grad=kind.to_boxes)
    out, gradients = check(kind, [guarded(feature).requires_grad_()], boxes, (1, 7), scale=1.0)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert gradients[0].is_contiguous(memory_format=torch.channels_last)


# Gradients


@each(grids=True, slow="bilinear bicubic max max-bicubic boxes-bicubic")
def test_gradcheck(kind: Kind, backend: str, grid: Grid, device: torch.device) -> None:
    """Cells far enough apart that no small step makes another the largest; no sample is near a cell or a border."""
    if backend == "triton" and device.type == "cuda":
        pytest.skip("float64 runs in the interpreter only")
    shapes = [(5, 4)] if kind.largest or kind.rounded else [(5, 4), (2, 2)]
    features = [(torch.randperm(h * w).view(1, 1, h, w).double() / 10).requires_grad_() for h, w in shapes]
    boxes = torch.tensor([[[0.83, 0.91, 3.37, 4.04], [-1.42, 2.33, 13.76, 15.68]]], dtype=FLOAT64)
    boxes = boxes.requires_grad_(kind.to_boxes or (backend == "reference" and not kind.rounded))

    def run(boxes: Tensor, *features: Tensor) -> Tensor:
        return kind.pool(list(features), boxes, (1, 2), backend=backend, grid=grid, scale=1.0)

    # Along random directions, which takes the interpreter a few calls in place of one for each number.
    assert torch.autograd.gradcheck(run, (boxes, *features), fast_mode=backend == "triton")


@pytest.mark.parametrize("name", ["bilinear", "pool", pytest.param("max", marks=SLOW)])
def test_more_boxes_than_one_word_of_the_mask_holds(name: str, device: torch.device) -> None:
    kind = replace(KINDS[name], channels=3)
    boxes = random_boxes(33, height=HEIGHT, width=WIDTH, min_size=1, max_size=13, device=device)[None]
    check(kind, kind.maps(device, images=1), boxes, 1)


@pytest.mark.parametrize("name", ["max", "pool"])
def test_a_backward_without_the_index_is_refused(name: str, device: torch.device) -> None:
    feature, boxes = torch.zeros(1, 1, 4, 4, device=device, requires_grad=True), torch.ones(1, 1, 4, device=device)
    if name == "max":
        out, _ = max_forward.multiscale_roi_align_max([feature], boxes, None, 1, 1, [1.0], [], 2, True, None, False)
    else:
        out, _ = pool_forward.roi_pool(feature, boxes, None, 1, 1, 1.0, False)
    with pytest.raises(RuntimeError, match="keep_index=True"):
        out.sum().backward()


# The choice of a backend, tracing

MAP, BOX = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4)
MOVING, MAX = {"boxes": torch.ones(1, 1, 4, requires_grad=True)}, {"reduction": "max"}
LONG = {"input": torch.zeros(1, 1, 1, op.MAX_ADAPTIVE_SIDE + 1)}
WIDE = {"input": torch.zeros(1, 1, 5793, 5793, device="meta"), "boxes": BOX.to("meta"), "sampling_ratio": 2}


@pytest.mark.parametrize(
    ("operator", "backend", "change", "message"),
    [
        (roi_align, "torchvision", {"interpolation": "bicubic"}, "has no bicubic interpolation"),
        (roi_align, "torchvision", MAX, "has no max of samples"),
        (roi_align, "torchvision", MOVING, "no gradient to the boxes"),
        (roi_align, "triton", MAX | MOVING, "no gradient to the boxes of max"),
        (roi_align, "triton", MAX | LONG, "at most 16000 cells"),
        (roi_align, "triton", MAX | WIDE, "at most 33554432 cells in all"),
        (roi_pool, "torchvision", {"input": MAP.double()}, "rounds the bins of float64"),
        (roi_pool, "torchvision", {"input": MAP[..., :0]}, "serves maps of 1 to"),
    ],
)
def test_backends_that_cannot_serve(operator: Any, backend: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{backend}.*{message}"):
        operator(**{"input": MAP, "boxes": BOX, "output_size": 2, "backend": backend} | change)


@pytest.mark.parametrize("name", ["bicubic", "max", "boxes"])
def test_a_cpu_takes_the_reference_where_torchvision_cannot(name: str, device: torch.device) -> None:
    kind = KINDS[name]
    features, boxes = kind.maps(device), kind.boxes(device)
    if device.type == "cpu":
        expected = kind.pool(features, boxes, 2, backend="reference")
        assert torch.equal(kind.pool(features, boxes, 2, backend=None), expected)
        fake = kind.pool([x.to("meta") for x in features], boxes.to("meta"), 2, backend="reference", grid=FIXED)
        assert fake.shape == expected.shape


@pytest.mark.parametrize("name", ["bilinear", "max", "pool"])
def test_unknown_images_give_zeros_where_they_cannot_be_seen(name: str, device: torch.device) -> None:
    kind, feature = KINDS[name], torch.ones(2, 3, 8, 8, device=device)
    boxes = torch.tensor([[-1.0, 1, 1, 5, 5], [1, 1, 1, 5, 5], [2, 1, 1, 5, 5], [math.nan, 1, 1, 5, 5]], device=device)
    expected = torch.tensor([0.0, 1, 0, 0], device=device)[:, None, None, None].expand(4, 3, 2, 2)

    def run(feature: Tensor, boxes: Tensor) -> Tensor:
        return kind.pool([feature], boxes, 2, backend="reference", grid=FIXED, scale=1.0)

    assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(feature, boxes), expected)
    assert_close(kind.launch([feature], boxes, (2, 2), grid=FIXED, scale=1.0), expected)


@pytest.mark.parametrize("name", ["bilinear", "pool", pytest.param("max", marks=SLOW)])
def test_compiles_whole(name: str, device: torch.device) -> None:
    """Where torchvision cannot be traced, or the grid of max depends on data."""
    kind, backend = KINDS[name], "triton" if name == "max" else "auto"
    features, boxes = kind.maps(device), kind.boxes(device)
    valid = torch.tensor([[True, False], [True, True]], device=device)

    def run(features: list[Tensor], boxes: Tensor) -> Tensor:
        return kind.pool(features, boxes, 2, backend=backend, grid=ADAPTIVE, valid=valid)

    out, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(features, boxes), run(features, boxes)
    assert_close(out, expected)
    weights = torch.randn_like(out)
    for got, want in zip(*(torch.autograd.grad(x, features, weights) for x in (out, expected)), strict=True):
        assert_close(got, want)


def test_a_scale_may_follow_from_a_traced_size(device: torch.device) -> None:
    def run(feature: Tensor, boxes: Tensor) -> Tensor:
        return roi_align(feature, boxes, 2, feature.shape[3] / 64, backend="triton")

    feature, boxes = MAP.to(device), BOX.to(device)
    compiled = torch.compile(run, fullgraph=True, backend="eager", dynamic=True)
    assert_close(compiled(feature, boxes), run(feature, boxes))


def test_an_adaptive_grid_of_max_is_not_traced_by_the_reference(device: torch.device) -> None:
    def run(feature: Tensor, boxes: Tensor) -> Tensor:
        return roi_align(feature, boxes, 2, reduction="max", backend="reference")

    with pytest.raises(Exception, match="searched as far as the data say"):
        torch.compile(run, fullgraph=True, backend="eager")(MAP.to(device), BOX.to(device))
