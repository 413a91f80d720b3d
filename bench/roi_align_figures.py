"""The figures and the tables of docs/roi-align.md, made by the ops themselves from a photograph.

``python -m bench.roi_align_figures`` prints the tables; with ``--write`` it puts them into the page and draws the
figures beside it (`bench.charts.roi_align`). The photograph is the portrait of Grace Hopper that comes with matplotlib
(United States Navy, public domain); a feature map is its brightness, averaged over the pixels of each cell.
Letters: H W cells of a map, PH PW bins, S shifts. Positions are in cells, of which cell i covers i to i + 1.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.counted import replace_table
from bench.rows import ROOT
from tmask_kernels import roi_align, roi_pool
from tmask_kernels.ops.roi_pool.reference import bin_cells, round_half_away

PAGE = ROOT / "docs" / "roi-align.md"
IMAGES = ROOT / "docs" / "images"

BOX = (152.0, 22.0, 377.0, 330.0)  # the head in the photograph, xyxy pixels

COARSE, COARSE_BINS = 32, 3  # pixels a cell, and bins: few enough to see each
FINE, FINE_BINS = 16, 7  # the level and the bins that a detector has for such a box

Pool = Callable[[Tensor, Tensor, int, float], Tensor]


@functools.cache
def photograph() -> Tensor:
    """Red, green and blue in 0..255: [3, 600, 512]."""
    from matplotlib.cbook import get_sample_data
    from PIL import Image

    with get_sample_data("grace_hopper.jpg") as file, Image.open(file) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1).float()


def feature_map(stride: int, left: int = 0) -> Tensor:
    """Mean brightness of each cell of the photograph without its first `left` columns: [1, 1, H, W].

    Of all `left` below `stride` the map has the same size.
    """
    brightness = photograph().mean(0)  # [600, 512]
    height, width = brightness.shape[0] // stride * stride, brightness.shape[1] // stride * stride - stride
    return F.avg_pool2d(brightness[None, None, :height, left : left + width], stride)


def ramp(stride: int) -> Tensor:
    """A map of `feature_map`'s size whose cells hold the position of their centre: [1, 1, H, W]."""
    like = feature_map(stride)
    return (torch.arange(like.shape[3]) + 0.5).expand_as(like)


def moved(shift: float) -> Tensor:
    """The box, `shift` pixels further right: [1, 5]."""
    return torch.tensor([[0.0, BOX[0] + shift, BOX[1], BOX[2] + shift, BOX[3]]])


POOLS: dict[str, Pool] = {
    "RoIPool": roi_pool,
    "RoIAlign, `aligned=False`": lambda f, b, size, scale: roi_align(f, b, size, scale),
    "RoIAlign, `aligned=True`": lambda f, b, size, scale: roi_align(f, b, size, scale, aligned=True),
    "RoIAlign, `aligned=True`, max": lambda f, b, size, scale: roi_align(
        f, b, size, scale, aligned=True, reduction="max", backend="reference"
    ),
    "RoIAlign, `aligned=True`, bicubic": lambda f, b, size, scale: roi_align(
        f, b, size, scale, aligned=True, interpolation="bicubic", backend="reference"
    ),
}


class Samples(NamedTuple):
    """Where one RoIAlign reads, in cells of the picture: y [PH, g], x [PW, g]."""

    y: Tensor
    x: Tensor


def samples(bins: int, stride: int, sampling_ratio: int, aligned: bool) -> Samples:
    """The samples of BOX. RoIAlign's coordinate c is the centre of cell c, so it stands at c + 0.5 in the picture."""
    axes = []
    for low, high in ((BOX[1], BOX[3]), (BOX[0], BOX[2])):
        start, size = low / stride - 0.5 * aligned, (high - low) / stride
        grid = sampling_ratio if sampling_ratio > 0 else int(np.ceil(size / bins))
        index = torch.arange(bins)[:, None] + (torch.arange(grid) + 0.5) / grid  # [bins, g]
        axes.append(start + index * size / bins + 0.5)
    return Samples(*axes)


@dataclass(frozen=True)
class Rounded:
    """RoIPool's view of BOX: the rows [PH, H] and columns [PW, W] of its bins, and the cells [H, W] that won."""

    rows: Tensor
    columns: Tensor
    largest: Tensor


def rounded(bins: int, stride: int) -> Rounded:
    box, usable, scale = torch.tensor(BOX)[:, None], torch.tensor([True]), 1 / stride
    cells = feature_map(stride).requires_grad_()
    (gradient,) = torch.autograd.grad(roi_pool(cells, moved(0), bins, scale).sum(), cells)
    return Rounded(
        rows=bin_cells(box[1], box[3], usable, scale, bins, cells.shape[2])[0],
        columns=bin_cells(box[0], box[2], usable, scale, bins, cells.shape[3])[0],
        largest=gradient[0, 0] > 0,
    )


def taps(x: float, y: float, interpolation: str) -> Tensor:
    """Weight of each cell in one sample at (x, y), which stands for a box of its own: [H, W]."""
    cells = torch.zeros_like(feature_map(COARSE)).requires_grad_()
    point = torch.tensor([[0.0, x, y, x, y]])
    out = roi_align(cells, point, 1, 1.0, 1, True, interpolation=interpolation, backend="reference")  # type: ignore[arg-type]
    return torch.autograd.grad(out.sum(), cells)[0][0, 0]


class Moved(NamedTuple):
    """Outputs [S, PH, PW] at shifts of 0, 1... pixels up to a cell: of the moved box, and of the moved photograph."""

    got: Tensor
    exact: Tensor


def on_photograph(pool: Pool) -> Moved:
    """If positions were exact, a box moved right over the photograph would give what it gives where it stands when the
    photograph moves left below it instead, before its features are made."""
    shifts, still = range(FINE + 1), feature_map(FINE)
    got = [pool(still, moved(s), FINE_BINS, 1 / FINE)[0, 0] for s in shifts]
    exact = [pool(feature_map(FINE, s), moved(0), FINE_BINS, 1 / FINE)[0, 0] for s in shifts]
    return Moved(torch.stack(got), torch.stack(exact))


def on_ramp(pool: Pool) -> Moved:
    """On a ramp the exact answer is the centre of the bin."""
    cells, shifts = ramp(FINE), range(FINE + 1)
    got = torch.stack([pool(cells, moved(s), FINE_BINS, 1 / FINE)[0, 0] for s in shifts])
    width = (BOX[2] - BOX[0]) / FINE / FINE_BINS
    centres = BOX[0] / FINE + (torch.arange(FINE_BINS) + 0.5) * width  # [PW]
    exact = centres + torch.tensor(shifts)[:, None, None] / FINE
    return Moved(got, exact.expand_as(got))


def rms(found: Moved) -> Tensor:
    """Root of the mean squared difference of all bins, at each shift: [S]."""
    return (found.got - found.exact).square().mean((1, 2)).sqrt()


def rounding_table() -> str:
    """What RoIPool makes of the four sides."""
    lines = ["| side | pixels | cells of 32 pixels | RoIPool rounds to | moves it by |", "|---|---:|---:|---:|---:|"]
    for name, side in zip(("left", "top", "right", "bottom"), BOX, strict=True):
        cell = side / COARSE
        whole = float(round_half_away(torch.tensor(cell)))
        lines.append(f"| {name} | {side:.0f} | {cell:.2f} | {whole:.0f} | {(whole - cell) * COARSE:+.0f} px |")
    return "\n".join(lines) + "\n"


def shift_table() -> str:
    """How far each op is from the exact shift."""
    lines = [
        "| | ramp: mean error | ramp: spread of errors | photograph: half a cell | photograph: all shifts |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, pool in POOLS.items():
        found = on_ramp(pool)
        error, away = found.got - found.exact, rms(on_photograph(pool))
        cells = [f"{value:.2f}".replace("-0.00", "0.00") for value in (error.mean(), error.max() - error.min())]
        greys = [f"{value:.1f}" for value in (away[FINE // 2], away.mean())]
        lines.append(f"| {name} | {' | '.join(cells + greys)} |")
    return "\n".join(lines) + "\n"


def taps_table() -> str:
    """The weights along one axis of a sample between two centres."""
    lines = [
        "| beyond the centre of cell 0 by | cell -1 | cell 0 | cell 1 | cell 2 |",
        "|---|---:|---:|---:|---:|",
    ]
    for fraction in (0.0, 0.25, 0.5):
        for name in ("bilinear", "bicubic"):
            weights = taps(5.5 + fraction, 5.5, name)[5, 4:8]
            lines.append(f"| {fraction}, {name} | " + " | ".join(f"{weight:.4f}" for weight in weights) + " |")
    return "\n".join(lines) + "\n"


TABLES = {"rounding": rounding_table, "shift": shift_table, "taps": taps_table}


def page(text: str) -> str:
    """The page with its tables made anew."""
    for name, make in TABLES.items():
        text = replace_table(text, name, make())
    return text


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        from bench.charts.roi_align import draw

        PAGE.write_text(page(PAGE.read_text()))
        draw(IMAGES)
    elif sys.argv[1:]:
        raise SystemExit("usage: python -m bench.roi_align_figures [--write]")
    else:
        print("\n".join(make() for make in TABLES.values()), end="")
