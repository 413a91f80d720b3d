"""The comparison of the RoI ops with their references has power: it turns red on a copy with one thing broken."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.kernels.rois import ADAPTIVE, FIXED, KINDS, SLOW, Grid, Kind, check, odd_boxes
from tests.kernels.test_roi_align import (
    check_close_samples,
    check_first_of_equals,
    check_huge_boxes_of_max,
    check_maps_of_few_cells,
    close_samples,
    few_values,
    whole_boxes,
)
from tests.mutation import mutant
from tmask_kernels.common.kernels import boxes as boxes_load
from tmask_kernels.common.kernels import numbers, pyramid, roi_axis
from tmask_kernels.ops.roi_align import op, reference, reference_max
from tmask_kernels.ops.roi_align.kernels import backward, forward, max_backward, samples, touch
from tmask_kernels.ops.roi_align.kernels import boxes as boxes_backward
from tmask_kernels.ops.roi_align.kernels import max as max_forward
from tmask_kernels.ops.roi_pool.kernels import backward as pool_backward
from tmask_kernels.ops.roi_pool.kernels import cells as pool_cells
from tmask_kernels.ops.roi_pool.kernels import forward as pool_forward
from tmask_kernels.testing import guarded, random_boxes

Case = tuple[list[Tensor], Tensor, tuple[int, int]]  # maps, boxes, output size


def mean_case(kind: Kind, device: torch.device) -> Case:
    return kind.maps(device), odd_boxes(device)[:9].expand(2, -1, -1).contiguous(), (2, 3)


def nhwc_case(kind: Kind, device: torch.device) -> Case:
    """Boxes inside and over each border, of two blocks of bins; bfloat16 in pairs."""
    maps = replace(kind, channels=4).maps(device, dtype=torch.bfloat16, channels_last=True)
    boxes = torch.cat([odd_boxes(device)[:9], random_boxes(2, height=22, width=38, min_size=8, device=device)])
    return maps, boxes.expand(2, -1, -1).contiguous(), (3, 4)


def bicubic_case(kind: Kind, device: torch.device) -> Case:
    """Small boxes all over a map of 2 x 2 tiles of the backward, 8 x 16 cells each; and the closest samples.

    One box's second row of bins begins more than a cell below row 7, the last of the upper tiles.
    """
    boxes = random_boxes(6, height=11, width=19, min_size=2, max_size=6, device=device)
    rows = boxes.new_tensor([[-1.5, -1.2, 3.0, 2.5], [3.0, 7.7, 8.0, 9.9]])
    boxes = torch.cat([boxes, rows, close_samples(2, device)[::2]])
    return kind.maps(device, images=1)[:1], 2 * boxes[None], (2, 2)


def max_case(kind: Kind, device: torch.device) -> Case:
    """Equal samples everywhere, inside and outside the map; two rows of tiles of the backward."""
    feature = few_values(guarded(torch.randn(1, 2, 5, 7, device=device)))
    return [feature], 4 * whole_boxes(device)[None], (2, 2)


def max_adaptive_case(kind: Kind, device: torch.device) -> Case:
    """Also channels with no cell above 0, where samples outside are among the largest."""
    (feature,), boxes, size = max_case(kind, device)
    feature = feature.detach()
    return [torch.cat([feature, -feature.abs()], 1).requires_grad_()], boxes, size


def boxes_case(kind: Kind, device: torch.device) -> Case:
    """Boxes inside, over two borders, on the second level and, where that matters, of less than a cell."""
    rows = [[3.3, 4.1, 9.2, 12.9], [-3.7, 11.2, 12.4, 24.9], [20.3, 3.2, 33.1, 13.6], [9.1, 8.2, 10.3, 9.1]]
    boxes = torch.tensor([rows], device=device, requires_grad=True)
    return kind.maps(device, images=1, channels_last=True), boxes, (2, 2)


def pool_case(kind: Kind, device: torch.device) -> Case:
    """Cells of few values, so that equal ones are everywhere."""
    halves = torch.tensor([[1.0, 3.0, 9.0, 13.0]], device=device)  # in cells, which is where rounding differs
    boxes = random_boxes(4, height=22, width=38, max_size=9, device=device)
    boxes = torch.cat([odd_boxes(device)[[0, 2, 3, 4, 5]], halves, boxes])
    boxes = torch.cat([torch.arange(10.0, device=device)[:, None] % 2, boxes], 1)
    return [(x.detach() * 2).round().requires_grad_() for x in kind.maps(device)], boxes, (2, 3)


CASES: dict[str, tuple[str, Grid, Callable[[Kind, torch.device], Case]]] = {
    "mean": ("bilinear", (2, True), mean_case),
    "mean-nhwc": ("bilinear", (2, True), nhwc_case),
    "bicubic": ("bicubic", FIXED, bicubic_case),
    "bicubic-nhwc": ("bicubic", FIXED, nhwc_case),
    "bicubic-adaptive": ("bicubic", ADAPTIVE, bicubic_case),
    "max": ("max", (2, True), max_case),
    "max-adaptive": ("max", ADAPTIVE, max_adaptive_case),
    "boxes": ("boxes", FIXED, boxes_case),
    "boxes-adaptive": ("boxes", ADAPTIVE, boxes_case),
    "boxes-bicubic": ("boxes-bicubic", FIXED, boxes_case),
    "pool": ("pool", FIXED, pool_case),
}
# The module to break, and what the mutant reads.
MUTANTS: dict[str, dict[str, tuple[ModuleType, str, str]]] = {
    "mean": {
        "tap off by one": (roi_axis, "tl.minimum(low + 1, length - 1)", "tl.minimum(low + 2, length - 1)"),
        "border not clamped": (roi_axis, "high = tl.minimum(low + 1, length - 1)", "high = low + 1"),
        "border excluded": (roi_axis, "(at >= -1.0) & (at <= length)", "(at >= 0.0) & (at <= length - 1)"),
        "wrong level": (pyramid, "(area >= thresholds[i - 1])", "(area >= 4 * thresholds[i - 1])"),
        "swapped sizes": (samples, "H = tl.cast(of_level(level, heights,", "H = tl.cast(of_level(level, widths,"),
        "no half cell": (roi_axis, "shift: tl.constexpr = 0.5 if ALIGNED else 0.0", "shift: tl.constexpr = 0.0"),
        "wrong image": (boxes_load, "image = k // boxes_an_image", "image = k * 0"),
        "non-finite read": (boxes_load, "usable = image < num_images", "usable = image < num_images - 1"),
        "gradient not shared": (backward, "share * _axis_weights(", "_axis_weights("),
        "gradient to one tap alone": (roi_axis, "1.0 - tl.abs(at - cells)", "1.0 * (tl.floor(at) == cells)"),
        "gradient without the border": (backward, "(at >= -1.0) & (at <= length)", "(at >= 0.0) & (at <= length)"),
        "last row of bins left out": (touch, "divide(last, grid)) + 1.0", "divide(last, grid))"),
        "a bin a sample": (touch, "divide(first, grid)", "first"),
        "tiles beside the box left out": (touch, "tl.floor(high) + 1.0", "tl.floor(high) - 1.0"),
        "boxes of another level": (touch, " & (tile_level[:, None] == level[None, :])", ""),
        "a box a word": (numbers, "bits ^ lowest", "bits * 0"),
        "every sample the first": (forward, "(ix + sample)", "(ix + 0 * sample)"),
        "every tap the first": (
            forward,
            "weight_x = tap_along(sample_x, tap_x,",
            "weight_x = tap_along(sample_x, 0 * tap_x,",
        ),
        "one tap along y": (forward, "tap_y in tl.static_range(TAPS)", "tap_y in tl.static_range(TAPS - 1)"),
        "samples outside": (forward, "inside = inside_y & inside_x", "inside = inside_x"),
    },
    "mean-nhwc": {
        "a tap of the wrong row": (samples, "v10 = load_values((row_high", "v10 = load_values((row_low"),
        "a weight of the wrong column": (samples, "((1.0 - ly) * lx)", "((1.0 - ly) * (1.0 - lx))"),
        "samples outside": (forward, "mask & (inside_y &", "mask & ("),
        "a box over the border as one inside": (samples, "tl.maximum(one_end, other_end) <= length", "step == step"),
        "a box over the first border as one inside": (
            samples,
            "tl.minimum(one_end, other_end) >= -1.0",
            "step == step",
        ),
        "the next block's bins": (samples, "tl.minimum(place, BLOCK - 1)", "place + 1"),
        "the halves of a pair swapped": (samples, "tl.join(low, high)", "tl.join(high, low)"),
        "a half of a pair not cleared": (samples, "(values & -65536)", "(values & -16777216)"),
    },
    "bicubic-nhwc": {
        "three rows of taps": (samples, "for row in range(4)", "for row in range(3)"),
        "weights of one axis": (samples, "(weight_y * weight_x)", "(weight_x)"),
    },
    "bicubic": {
        "tap off by one": (roi_axis, "tl.floor(at) + (tap - 1)", "tl.floor(at) + tap"),
        "taps not clamped": (roi_axis, "tl.minimum(tl.maximum(cell, 0.0), length - 1.0).to", "cell.to"),
        "three rows of taps": (forward, "tap_y in tl.static_range(TAPS)", "tap_y in tl.static_range(TAPS - 1)"),
        "weights of one axis": (forward, "(weight_y * weight_x)", "(weight_x)"),
        "another kernel near": (roi_axis, "(CUBIC + 2.0)", "(CUBIC + 2.1)"),
        "another kernel far": (roi_axis, "CUBIC * (distance", "-0.5 * (distance"),
        "gradient without the first border": (roi_axis, "cells == 0,", "cells == -1,"),
        "gradient without the last border": (roi_axis, "cells == length - 1.0", "cells == length + 1.0"),
        "tiles a tap away left out": (touch, "0.0 if CUBIC is None else 1.0", "0.0"),
        "bins a tap above left out": (touch, "(low - reach", "(low - 1.0"),
        "bins a tap below left out": (touch, "(high + reach", "(high + 1.0"),
    },
    "bicubic-adaptive": {
        "samples a tap away left out": (backward, "(cells - reach", "(cells - 1.0"),
        "a sample too few": (backward, "5 if CUBIC is None else 6", "5"),
    },
    "max": {
        "last of equals": (max_forward, "stays = (value <= best)", "stays = (value < best)"),
        "outside takes a gradient": (max_forward, "+ ix, -1)", "+ ix, 0)"),
        "a sample outside for one": (max_forward, "inside = inside_y &", "inside ="),
        "a sample too few": (max_forward, "while ix < num_x", "while ix < num_x - 1"),
        "columns of the taps swapped": (max_forward, "v01 - v00, v00", "v00 - v01, v01"),
        "index read by another rule": (max_backward, "kept % samples_a_row(SAMPLING_RATIO)", "kept % 3"),
        "gradient of bins that kept none": (
            max_backward,
            "tl.where(kept >= 0, grad.to(ACC), 0.0)",
            "grad.to(ACC)",
        ),
        "gradient not clamped": (max_backward, "tl.minimum(tl.maximum(at, 0.0), length - 1.0)", "at"),
        "a tile beside the bins left out": (touch, "divide(last, grid)) + 1.0", "divide(last - 1.0, grid)) + 1.0"),
        "another weight": (roi_axis, "1.0 - tl.abs(at - cells)", "1.0 - (at - cells)"),
    },
    "max-adaptive": {
        "no sample before the window": (roi_axis, "step - 0.5) - 1", "step - 0.5)"),
        "no sample after the window": (roi_axis, "step - 0.5) + 1", "step - 1.5)"),
        "window left out": (max_backward, "(first + sample", "(sample"),
    },
    "boxes": {
        "not free at the border": (boxes_backward, "(at >= 0.0) & (at <= length - 1.0)", "at == at"),
        "the other corner": (boxes_backward, "tl.where(free, 1.0 - t, 0.0)", "tl.where(free, t, 0.0)"),
        "samples at the bin's start": (boxes_backward, "(offs + (sample + 0.5) / grid)", "(offs + 0.0 * grid)"),
        "weights of the other axis": (boxes_backward, "(1.0 - lx) * (v10 - v00)", "(1.0 - ly) * (v10 - v00)"),
        "a tap of the wrong column": (boxes_backward, "ly * (v11 - v10)", "ly * (v11 - v00)"),
        "short boxes follow their end": (boxes_backward, "y2 * scale - y1 * scale < 1.0", "y2 < y1"),
        "pixels for cells": (boxes_backward, "scale / tl.maximum(grid", "1.0 / tl.maximum(grid"),
        "every second channel": (boxes_backward, "_sum_groups(along_x", "_sum_groups(offs_c % 2 * along_x"),
        "a row of bins left out": (boxes_backward, "return sums.sum(1)", "return sums[:, 1:].sum(1)"),
    },
    "boxes-adaptive": {
        "a sum for a mean": (boxes_backward, "scale / tl.maximum(grid_h * grid_w, 1.0)", "scale"),
    },
    "boxes-bicubic": {
        "slope of another kernel near": (roi_axis, "3.0 * CUBIC + 6.0", "3.0 * CUBIC + 5.9"),
        "slope of another kernel far": (roi_axis, "(3.0 * distance - 4.0)", "(3.0 * distance - 4.1)"),
        "slope of the wrong sign": (roi_axis, "tl.where(offset < 0, -slope, slope)", "slope"),
        "slope of the wrong axis": (boxes_backward, "tl.fma(slope_y, value", "tl.fma(weight_y, value"),
    },
    "pool": {
        "last of equals": (pool_forward, "larger = value > best", "larger = value >= best"),
        "empty bin not 0": (pool_forward, "past_x)[:, None], best, 0.0", "past_x)[:, None], best, 1.0"),
        "cells beyond the bin": (pool_forward, "mask = (x < past_x)[:, None]", "mask = (x < W)[:, None]"),
        "every other column": (pool_forward, "(i + j * COLUMNS)", "(i + 2 * j * COLUMNS)"),
        "swapped sizes": (pool_forward, "pw.to(tl.float32), W.to", "pw.to(tl.float32), H.to"),
        "index of the column alone": (pool_forward, "(y * W + x)[:, None]", "x[:, None]"),
        "the last of equal columns": (
            pool_forward,
            "tl.min(tl.where(best == largest[:, None, :], index, 2**31 - 1), 1)",
            "tl.max(tl.where(best == largest[:, None, :], index, -1), 1)",
        ),
        "a column a bin": (pool_forward, "+ column\n", "+ 0 * column\n"),
        "rounded down": (pool_cells, "size - whole >= 0.5", "size - whole >= 1.5"),
        "half towards zero": (pool_cells, "size - whole >= 0.5", "size - whole > 0.5"),
        "without the last cell": (pool_cells, "- start + 1.0, 1.0)", "- start, 1.0)"),
        "no cell of inverted boxes": (pool_cells, "- start + 1.0, 1.0)", "- start + 1.0, 0.0)"),
        "bins not rounded up": (pool_cells, "tl.ceil((index + 1.0)", "tl.floor((index + 1.0)"),
        "a gradient for each cell": (pool_backward, "kept[None, None, :] == cells", "kept[None, None, :] >= 0 * cells"),
        "a box a word": (numbers, "bits ^ lowest", "bits * 0"),
        "boxes of another image": (pool_backward, " & (image == n)", ""),
        "last row of bins left out": (pool_backward, "tl.ceil(high + slack)", "tl.floor(high - 1.0)"),
        "first bins left out": (pool_backward, "tl.floor(low - slack)", "tl.ceil(low + slack)"),
        "tiles at the box's end left out": (
            pool_backward,
            "(end_x[None, :] > left)",
            "(end_x[None, :] > left + 4)",
        ),
    },
}
# At least one of most modules; `make test-slow` breaks the rest.
FAST = {
    "mean": ("wrong level", "swapped sizes", "gradient not shared", "tiles beside the box left out", "a box a word"),
    "mean-nhwc": ("a box over the border as one inside", "the halves of a pair swapped"),
    "max": ("last of equals",),
    "max-adaptive": ("no sample before the window",),
    "boxes": ("not free at the border", "the other corner", "short boxes follow their end"),
    "pool": ("last of equals", "half towards zero", "a gradient for each cell", "a box a word"),
}


def parity(case: str, device: torch.device, module: ModuleType | None = None) -> None:
    name, grid, make = CASES[case]
    kind = replace(KINDS[name], channels=3)
    features, boxes, size = make(kind, device)
    check(kind, features, boxes, size, grid=grid, run=lambda f, b: kind.launch(f, b, size, grid=grid, module=module))


@pytest.mark.parametrize("case", [case if case in FAST else pytest.param(case, marks=SLOW) for case in CASES])
def test_parity_is_green(case: str, device: torch.device) -> None:
    parity(case, device)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, marks=[] if name in FAST.get(case, ()) else [SLOW])
        for case, mutants in MUTANTS.items()
        for name in mutants
    ],
)
def test_mutants_turn_parity_red(case: str, name: str, device: torch.device, tmp_path: Path) -> None:
    seen_from = {"max": max_forward, "pool": pool_forward}.get(case.partition("-")[0], forward)
    broken = mutant(*MUTANTS[case][name], tmp_path, seen_from=seen_from)
    with pytest.raises(AssertionError):
        parity(case, device, broken)


def test_without_a_look_at_the_unseen_huge_boxes_are_wrong(device: torch.device, tmp_path: Path) -> None:
    broken = mutant(max_forward, "unseen_y) > 0, 0.0", "unseen_y) < 0, 0.0", tmp_path)

    def run(features: list[Tensor], boxes: Tensor, scale: float) -> Tensor:
        return KINDS["max"].launch(features, boxes, (1, 1), grid=ADAPTIVE, scale=scale, module=broken)

    with pytest.raises(AssertionError):
        check_huge_boxes_of_max(run, device)


CPU = torch.device("cpu")
AXIS, MAX = (reference, "axis_weights"), (reference_max, "multiscale_roi_align_max_reference")
REFERENCE_MUTANTS: dict[str, tuple[tuple[ModuleType, str], str, str, Callable[[], None]]] = {
    "a sample too few": (AXIS, "NEARBY_CUBIC_SAMPLES = 6", "NEARBY_CUBIC_SAMPLES = 5", check_close_samples),
    "samples a tap away": (AXIS, "reach = 1 if cubic is None else 2", "reach = 1", check_close_samples),
    "border not clamped": (AXIS, "(low + tap).clamp(0, last)", "(low + tap).clamp(max=last)", check_maps_of_few_cells),
    "a tap too few": (AXIS, "for tap in (-1, 0, 1, 2)", "for tap in (0, 1, 2)", check_maps_of_few_cells),
    "coefficient": (AXIS, "far = coefficient *", "far = -0.75 *", check_maps_of_few_cells),
    "last of equals": (MAX, "stays = (value <= best)", "stays = (value < best)", check_first_of_equals),
    "none before the window": (MAX, "self.turns = -1, ", "self.turns = 0, ", check_first_of_equals),
    "none after the window": (MAX, "beyond = self._past < self.grid", "beyond = self._past < 0", check_first_of_equals),
    "outside takes a gradient": (MAX, "torch.where(inside, y, -1.0)", "y", check_first_of_equals),
}


@pytest.mark.parametrize("name", REFERENCE_MUTANTS)
def test_mutants_of_the_references(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (module, function), old, new, definition = REFERENCE_MUTANTS[name]
    definition()
    broken = getattr(mutant(module, old, new, tmp_path), function)
    monkeypatch.setattr(op if module is reference_max else module, function, broken)
    with pytest.raises(AssertionError):
        definition()
