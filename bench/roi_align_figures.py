"""Figures and tables of docs/roi-align.md. The ops themselves make them from a photograph.

``python -m bench.roi_align_figures`` prints the tables. With ``--write`` it puts them into the page and draws the
figures beside it (`bench.charts.roi_align`). The photograph is the portrait of Grace Hopper that comes with matplotlib
(United States Navy, public domain). A feature map is the brightness of the photograph, averaged over each cell.
Letters: H W cells of a map, PH PW bins, S shifts. Positions are in cells: cell i covers i to i + 1.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.tables import replace_table
from tmask_kernels import roi_align, roi_pool
from tmask_kernels.ops.roi_pool.reference import bin_cells, round_half_away

DOCS = Path(__file__).parents[1] / "docs"
PAGE, IMAGES = DOCS / "roi-align.md", DOCS / "images"

BOX = (152.0, 22.0, 377.0, 330.0)  # the head in the photograph, xyxy pixels
COARSE, COARSE_BINS = 32, 3  # pixels a cell, and bins: few enough to see each
FINE, FINE_BINS = 16, 7  # the level and the bins that a detector uses for such a box

POOLS: dict[str, Callable[[Tensor, Tensor, int, float], Tensor]] = {
    "RoIPool": roi_pool,
    "RoIAlign, `aligned=False`": roi_align,
    "RoIAlign, `aligned=True`": functools.partial(roi_align, aligned=True),
    "RoIAlign, `aligned=True`, max": functools.partial(roi_align, aligned=True, reduction="max", backend="reference"),
    "RoIAlign, `aligned=True`, bicubic": functools.partial(
        roi_align, aligned=True, interpolation="bicubic", backend="reference"
    ),
}


@functools.cache
def photograph() -> Tensor:
    """Red, green and blue in 0..255: [3, 600, 512]."""
    from matplotlib.cbook import get_sample_data
    from PIL import Image

    with get_sample_data("grace_hopper.jpg") as file, Image.open(file) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1).float()


def feature_map(stride: int, left: int = 0) -> Tensor:
    """Mean brightness of each cell, without the first `left` columns of the photograph: [1, 1, H, W].

    The size is the same for every `left` below `stride`.
    """
    brightness = photograph().mean(0)  # [600, 512]
    height, width = brightness.shape[0] // stride * stride, brightness.shape[1] // stride * stride - stride
    return F.avg_pool2d(brightness[None, None, :height, left : left + width], stride)


def moved(shift: float) -> Tensor:
    """The box, `shift` pixels further right: [1, 5]."""
    return torch.tensor([[0.0, BOX[0] + shift, BOX[1], BOX[2] + shift, BOX[3]]])


def samples(bins: int, stride: int, sampling_ratio: int, aligned: bool) -> tuple[Tensor, Tensor]:
    """Where RoIAlign reads for BOX, in cells: y [PH, g] and x [PW, g].

    RoIAlign's coordinate c is the centre of cell c, hence the position c + 0.5.
    """
    axes = []
    for low, high in ((BOX[1], BOX[3]), (BOX[0], BOX[2])):
        start, size = low / stride - 0.5 * aligned, (high - low) / stride
        grid = sampling_ratio if sampling_ratio > 0 else int(np.ceil(size / bins))
        index = torch.arange(bins)[:, None] + (torch.arange(grid) + 0.5) / grid  # [bins, g]
        axes.append(start + index * size / bins + 0.5)
    return axes[0], axes[1]


def rounded(bins: int, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """RoIPool's view of BOX, bool: the rows [PH, H] and columns [PW, W] of its bins, and the cells [H, W] that win."""
    box, usable, scale = torch.tensor(BOX)[:, None], torch.tensor([True]), 1 / stride
    cells = feature_map(stride).requires_grad_()
    (gradient,) = torch.autograd.grad(roi_pool(cells, moved(0), bins, scale).sum(), cells)
    rows = bin_cells(box[1], box[3], usable, scale, bins, cells.shape[2])[0]
    columns = bin_cells(box[0], box[2], usable, scale, bins, cells.shape[3])[0]
    return rows, columns, gradient[0, 0] > 0


def taps(x: float, y: float, interpolation: str) -> Tensor:
    """Weight of each cell in a single sample at coordinates (x, y): [H, W]."""
    cells = torch.zeros_like(feature_map(COARSE)).requires_grad_()
    point = torch.tensor([[0.0, x, y, x, y]])
    out = roi_align(cells, point, 1, 1.0, 1, True, interpolation=interpolation, backend="reference")  # type: ignore[arg-type]
    return torch.autograd.grad(out.sum(), cells)[0][0, 0]


class Moved(NamedTuple):
    """Outputs [S, PH, PW] at shifts of 0, 1... pixels up to a cell: of an op, and exact ones."""

    got: Tensor
    exact: Tensor

    def rms(self) -> Tensor:
        """Root mean square of the difference over all bins, at each shift: [S]."""
        return (self.got - self.exact).square().mean((1, 2)).sqrt()


def on_photograph(name: str) -> Moved:
    """The op of that name, once with the box moved right, and once (exact) with the photograph moved left instead."""
    pool, still, shifts = POOLS[name], feature_map(FINE), range(FINE + 1)
    got = [pool(still, moved(s), FINE_BINS, 1 / FINE)[0, 0] for s in shifts]
    exact = [pool(feature_map(FINE, s), moved(0), FINE_BINS, 1 / FINE)[0, 0] for s in shifts]
    return Moved(torch.stack(got), torch.stack(exact))


def on_ramp(name: str) -> Moved:
    """The op on a map whose cells hold the position of their centre. Exact is the centre of the bin."""
    like, shifts = feature_map(FINE), range(FINE + 1)
    ramp = (torch.arange(like.shape[3]) + 0.5).expand_as(like)
    got = torch.stack([POOLS[name](ramp, moved(s), FINE_BINS, 1 / FINE)[0, 0] for s in shifts])
    width = (BOX[2] - BOX[0]) / FINE / FINE_BINS
    centres = BOX[0] / FINE + (torch.arange(FINE_BINS) + 0.5) * width  # [PW]
    return Moved(got, (centres + torch.tensor(shifts)[:, None, None] / FINE).expand_as(got))


def rounding_table() -> str:
    """RoIPool's rounding of the four sides."""
    rows = ["| side | pixels | cells of 32 pixels | RoIPool rounds to | moves it by |", "|---|---:|---:|---:|---:|"]
    for name, side in zip(("left", "top", "right", "bottom"), BOX, strict=True):
        cell = side / COARSE
        whole = float(round_half_away(torch.tensor(cell)))
        rows.append(f"| {name} | {side:.0f} | {cell:.2f} | {whole:.0f} | {(whole - cell) * COARSE:+.0f} px |")
    return "\n".join(rows) + "\n"


def shift_table() -> str:
    """The difference of each op from the exact shift."""
    rows = [
        "| | ramp: mean error | ramp: spread of errors | photograph: half a cell | photograph: all shifts |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in POOLS:
        found, away = on_ramp(name), on_photograph(name).rms()
        error = found.got - found.exact
        cells = [f"{value:.2f}".replace("-0.00", "0.00") for value in (error.mean(), error.max() - error.min())]
        rows.append(f"| {name} | {' | '.join(cells)} | {away[FINE // 2]:.1f} | {away.mean():.1f} |")
    return "\n".join(rows) + "\n"


def taps_table() -> str:
    """The weights along one axis of a sample between two centres."""
    rows = ["| beyond the centre of cell 0 by | cell -1 | cell 0 | cell 1 | cell 2 |", "|---|---:|---:|---:|---:|"]
    for fraction in (0.0, 0.25, 0.5):
        for name in ("bilinear", "bicubic"):
            weights = taps(5.5 + fraction, 5.5, name)[5, 4:8]
            rows.append(f"| {fraction}, {name} | " + " | ".join(f"{weight:.4f}" for weight in weights) + " |")
    return "\n".join(rows) + "\n"


TABLES = {"rounding": rounding_table, "shift": shift_table, "taps": taps_table}


def page(text: str) -> str:
    """Return `text` with new tables between their marks."""
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
