"""Figures and tables of docs/roi-align.md. The ops themselves make them from a photograph.

``python -m bench.roi_align_figures`` prints the tables. With ``--write`` it puts them into the page and draws the
figures beside it. The photograph is the portrait of Grace Hopper that comes with matplotlib
(United States Navy, public domain). A feature map is the brightness of the photograph, averaged over each cell.
Letters: H W cells of a map, PH PW bins, S shifts. Positions are in cells: cell i covers i to i + 1.
"""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.charts import GREY, STYLE
from bench.result import ROOT
from bench.tables import replace_table
from tmask_kernels import roi_align, roi_pool
from tmask_kernels.ops.roi_pool.reference import bin_cells, round_half_away

PAGE, IMAGES = ROOT / "docs" / "roi-align.md", ROOT / "docs" / "images"

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


# ---- The figures

# Colour-blind safe (Okabe and Ito 2008).
BLUE, VERMILION, GREEN, PURPLE, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
LINES = dict(zip(POOLS, (VERMILION, PURPLE, BLUE, ORANGE, GREEN), strict=True))

DPI = 150
COLOURS = 256  # of the written files: a photograph in all of them takes four times the bytes
BICUBIC = {"linestyle": (0, (1.2, 1.8)), "linewidth": 2.6, "zorder": 5}
BIN = (2, 5)  # row and column of the one bin that figure (b) shows
LEFT, RIGHT, TOP, BOTTOM = 3, 14, 0, 12  # cells shown


def draw(folder: Path) -> list[Path]:
    """Write both figures into `folder` and return their paths."""
    import matplotlib
    from PIL import Image

    paths = []
    with matplotlib.rc_context(STYLE):
        for name, make in (("samples", sample_points), ("shift", shifts)):
            buffer = io.BytesIO()
            make().savefig(buffer, dpi=DPI)
            image = Image.open(buffer).convert("RGB").quantize(COLOURS, kmeans=3, dither=Image.Dither.NONE)
            paths.append(folder / f"roi-align-{name}.png")
            image.save(paths[-1], optimize=True)
    return paths


def sample_points() -> Any:
    """Six views of the cells: photograph, RoIPool, RoIAlign with a fixed ratio, unaligned, adaptive, bicubic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.65))
    axes = figure.subplots(2, 3)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.015, top=0.955, wspace=0.04, hspace=0.12)
    adaptive = [ticks.shape[1] for ticks in samples(COARSE_BINS, COARSE, 0, True)]
    views = {
        "photograph, cells of 32 pixels, box": _draw_photograph,
        "RoIPool: bins of whole cells, the largest wins": _draw_roi_pool,
        "RoIAlign, aligned=True, 2 x 2 samples a bin": _draw_roi_align,
        "aligned=False: half a cell right and down": functools.partial(_draw_roi_align, aligned=False),
        f"adaptive: {adaptive[0]} x {adaptive[1]} samples a bin": functools.partial(_draw_roi_align, ratio=0),
        "bicubic: 16 cells of one sample, in percent": _draw_bicubic,
    }
    for (title, view), ax, letter in zip(views.items(), axes.flat, "abcdef", strict=True):
        ax.set(xticks=[], yticks=[], xlim=(LEFT, RIGHT), ylim=(BOTTOM, TOP))
        view(ax)
        ax.set_title(f"{letter}  {title}", loc="left", fontsize=8.5, color="black")
        for spine in ax.spines.values():
            spine.set(visible=True, color=GREY, linewidth=0.8)
    return figure


def _draw_cells(ax: Any, image: Tensor, lines: str) -> None:
    """An image [H, W] or [H, W, 3] whose pixels or cells fill its extent, and the lines between cells."""
    height, width = (side / COARSE for side in photograph().shape[1:])
    if image.dim() == 2:
        height, width = image.shape
    style = {"cmap": "gray", "vmin": -260, "vmax": 255, "interpolation": "nearest"} if image.dim() == 2 else {}
    ax.imshow(image.numpy(), extent=(0, width, height, 0), **style)
    for x in range(LEFT + 1, RIGHT):
        ax.axvline(x, color=lines, linewidth=0.6)
    for y in range(TOP + 1, BOTTOM):
        ax.axhline(y, color=lines, linewidth=0.6)


def _draw_box(ax: Any, colour: str = BLUE, bins: int = 1) -> None:
    """The box, and the borders of its bins."""
    x1, y1, x2, y2 = (side / COARSE for side in BOX)
    _draw_rectangle(ax, x1, y1, x2, y2, colour, 1.8)
    for share in (i / bins for i in range(1, bins)):
        ax.plot([x1 + share * (x2 - x1)] * 2, [y1, y2], color=colour, linewidth=0.9)
        ax.plot([x1, x2], [y1 + share * (y2 - y1)] * 2, color=colour, linewidth=0.9)


def _draw_rectangle(
    ax: Any, x1: float, y1: float, x2: float, y2: float, colour: str, width: float, **style: Any
) -> None:
    from matplotlib.patches import Rectangle

    style = {"fill": False, "edgecolor": colour, "linewidth": width, "zorder": 3} | style
    ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, **style))


def _draw_photograph(ax: Any) -> None:
    _draw_cells(ax, photograph().permute(1, 2, 0).byte(), "#FFFFFF88")
    _draw_box(ax, "#56B4E9")


def _draw_roi_pool(ax: Any) -> None:
    """Bins in two colours, to show the cells they share; a dot in each cell that wins."""
    _draw_cells(ax, feature_map(COARSE)[0, 0], "white")
    rows, columns, largest = rounded(COARSE_BINS, COARSE)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            (y1, *_, y2), (x1, *_, x2) = row.nonzero()[:, 0].tolist(), column.nonzero()[:, 0].tolist()
            inset = 0.06 + 0.1 * ((i + j) % 2)
            colour = (VERMILION, "#7A3300")[(i + j) % 2]
            _draw_rectangle(ax, x1 + inset, y1 + inset, x2 + 1 - inset, y2 + 1 - inset, colour, 1.3)
    y, x = largest.nonzero().T + 0.5
    ax.scatter(x.numpy(), y.numpy(), s=26, color=VERMILION, edgecolor="white", linewidth=0.6, zorder=4)
    _draw_box(ax)


def _draw_roi_align(ax: Any, ratio: int = 2, aligned: bool = True) -> None:
    """A dot for each sample; of unaligned ones a line to its aligned place."""
    _draw_cells(ax, feature_map(COARSE)[0, 0], "white")
    _draw_box(ax, bins=COARSE_BINS)
    right, found = (samples(COARSE_BINS, COARSE, ratio, each) for each in (True, aligned))
    grids = [torch.meshgrid(y.flatten(), x.flatten(), indexing="ij") for y, x in (right, found)]
    (y0, x0), (y, x) = [[side.flatten().numpy() for side in grid] for grid in grids]
    colour = BLUE if aligned else PURPLE
    if not aligned:
        ax.plot([x0, x], [y0, y], color=colour, linewidth=1, zorder=3)
    ax.scatter(x, y, s=17, color=colour, edgecolor="white", linewidth=0.6, zorder=4)


def _draw_bicubic(ax: Any) -> None:
    """One sample of the middle bin, close up, with the weights of its cells in percent."""
    _draw_cells(ax, feature_map(COARSE)[0, 0], "white")
    _draw_box(ax, bins=COARSE_BINS)
    ys, xs = samples(COARSE_BINS, COARSE, 2, True)
    x, y = float(xs[1, 1]), float(ys[1, 0])
    weights, near = taps(x, y, "bicubic"), taps(x, y, "bilinear") > 0
    for row, column in (weights != 0).nonzero().tolist():
        percent = float(weights[row, column]) * 100
        colour = GREEN if percent > 0 else VERMILION
        corners = (column + 0.04, row + 0.04, column + 0.96, row + 0.96)
        _draw_rectangle(ax, *corners, colour, 0, facecolor="white", alpha=0.85, fill=True)
        _draw_rectangle(ax, *corners, colour, 2.0 if near[row, column] else 0.9)
        text = f"{percent:.1f}" if abs(percent) >= 0.05 else "0"
        ax.text(column + 0.5, row + 0.42, text, ha="center", fontsize=8.5, color="black", zorder=6)
    ax.scatter(x, y, s=60, color=BLUE, edgecolor="white", linewidth=0.8, zorder=7)
    ax.set(xlim=(x - 2.9, x + 2.9), ylim=(y + 2.9 * 12 / 11, y - 2.9 * 12 / 11))


def shifts() -> Any:
    """Three panels: the ramp, one bin of the photograph, and the difference from the exact shift over all bins."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5))
    panels = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.055, right=0.985, bottom=0.32, top=0.925, wspace=0.3)
    shift = (torch.arange(FINE + 1) / FINE).numpy()
    for name, colour in LINES.items():
        style: Any = {"drawstyle": "steps-post"} if name == "RoIPool" else BICUBIC if "bicubic" in name else {}
        ramp, photo = on_ramp(name), on_photograph(name)
        label = name.replace("`", "")
        panels[0].plot(shift, (ramp.got[:, 3, 3] - ramp.exact[0, 3, 3]).numpy(), color=colour, label=label, **style)
        panels[2].plot(shift, photo.rms().numpy(), color=colour, **style | {"drawstyle": "default"})
        if name in ("RoIPool", "RoIAlign, `aligned=True`"):
            panels[1].plot(shift, photo.got[:, *BIN].numpy(), color=colour, **style)
            panels[1].plot(shift, photo.exact[:, *BIN].numpy(), color=colour, linestyle=":", linewidth=1.8)
    titles = {
        "a  linear ramp: the middle bin": "cells from the bin's first centre",
        "b  photograph: one bin": "grey level; dotted: exact",
        "c  photograph: error of all bins": "grey levels, root mean square",
    }
    for ax, (title, label) in zip(panels, titles.items(), strict=True):
        ax.set_title(title, loc="left", fontsize=8.5, color="black")
        ax.set_xlabel("box moved right by, in cells")
        ax.set_ylabel(label, labelpad=2)
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "1/4", "1/2", "3/4", "1"])
        ax.grid(color="#E4E4E4", linewidth=0.7)
        ax.set_axisbelow(True)
    figure.legend(loc="lower center", ncols=3, frameon=False, bbox_to_anchor=(0.5, 0.0), fontsize=9)
    return figure


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page(PAGE.read_text()))
        draw(IMAGES)
    elif sys.argv[1:]:
        raise SystemExit("usage: python -m bench.roi_align_figures [--write]")
    else:
        print("\n".join(make() for make in TABLES.values()), end="")
