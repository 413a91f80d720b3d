"""The two figures of docs/roi-align.md: where each op reads, and the effect of moving the box."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import roi_align_figures as data
from bench.charts.style import GREY, STYLE

# Colour-blind safe (Okabe and Ito 2008).
BLUE, VERMILION, GREEN, PURPLE, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
LINES = dict(zip(data.POOLS, (VERMILION, PURPLE, BLUE, ORANGE, GREEN), strict=True))

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
    views = (_photograph, _roi_pool, _fixed, _unaligned, _adaptive, _bicubic)
    for view, ax, letter in zip(views, axes.flat, "abcdef", strict=True):
        ax.set(xticks=[], yticks=[], xlim=(LEFT, RIGHT), ylim=(BOTTOM, TOP))
        if view is not _photograph:
            cells = data.feature_map(data.COARSE)[0, 0].numpy()
            extent = (0, cells.shape[1], cells.shape[0], 0)
            ax.imshow(cells, cmap="gray", vmin=-260, vmax=255, extent=extent, interpolation="nearest")
            _grid(ax, "white")
            if view is not _roi_pool:
                _box(ax)
        ax.set_title(f"{letter}  {view(ax)}", loc="left", fontsize=8.5, color="black")
        for spine in ax.spines.values():
            spine.set(visible=True, color=GREY, linewidth=0.8)
    return figure


def _grid(ax: Any, colour: str) -> None:
    """Lines between cells."""
    for x in range(LEFT + 1, RIGHT):
        ax.axvline(x, color=colour, linewidth=0.6)
    for y in range(TOP + 1, BOTTOM):
        ax.axhline(y, color=colour, linewidth=0.6)


def _box(ax: Any, colour: str = BLUE, lines: bool = True) -> None:
    """The box, and the borders of its bins."""
    x1, y1, x2, y2 = (side / data.COARSE for side in data.BOX)
    _rectangle(ax, x1, y1, x2, y2, colour, 1.8)
    for i in range(1, data.COARSE_BINS * lines):
        share = i / data.COARSE_BINS
        ax.plot([x1 + share * (x2 - x1)] * 2, [y1, y2], color=colour, linewidth=0.9)
        ax.plot([x1, x2], [y1 + share * (y2 - y1)] * 2, color=colour, linewidth=0.9)


def _rectangle(ax: Any, x1: float, y1: float, x2: float, y2: float, colour: str, width: float, **style: Any) -> None:
    from matplotlib.patches import Rectangle

    style = {"fill": False, "edgecolor": colour, "linewidth": width, "zorder": 3} | style
    ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, **style))


def _dots(ax: Any, at: tuple[Tensor, Tensor], colour: str) -> None:
    y, x = torch.meshgrid(at[0].flatten(), at[1].flatten(), indexing="ij")
    ax.scatter(x.numpy(), y.numpy(), s=17, color=colour, edgecolor="white", linewidth=0.6, zorder=4)


def _photograph(ax: Any) -> str:
    image = data.photograph()
    height, width = (side / data.COARSE for side in image.shape[1:])
    ax.imshow(image.permute(1, 2, 0).byte().numpy(), extent=(0, width, height, 0), interpolation="antialiased")
    _grid(ax, "#FFFFFF88")
    _box(ax, "#56B4E9", lines=False)
    return "photograph, cells of 32 pixels, box"


def _roi_pool(ax: Any) -> str:
    """Bins in two colours, to show the cells they share; a dot in each cell that wins."""
    rows, columns, largest = data.rounded(data.COARSE_BINS, data.COARSE)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            (y1, *_, y2), (x1, *_, x2) = row.nonzero()[:, 0].tolist(), column.nonzero()[:, 0].tolist()
            inset = 0.06 + 0.1 * ((i + j) % 2)
            colour = (VERMILION, "#7A3300")[(i + j) % 2]
            _rectangle(ax, x1 + inset, y1 + inset, x2 + 1 - inset, y2 + 1 - inset, colour, 1.3)
    y, x = largest.nonzero().T + 0.5
    ax.scatter(x.numpy(), y.numpy(), s=26, color=VERMILION, edgecolor="white", linewidth=0.6, zorder=4)
    _box(ax, lines=False)
    return "RoIPool: bins of whole cells, the largest wins"


def _fixed(ax: Any) -> str:
    _dots(ax, data.samples(data.COARSE_BINS, data.COARSE, 2, True), BLUE)
    return "RoIAlign, aligned=True, 2 x 2 samples a bin"


def _unaligned(ax: Any) -> str:
    right, wrong = (data.samples(data.COARSE_BINS, data.COARSE, 2, aligned) for aligned in (True, False))
    for y in zip(right[0].flatten(), wrong[0].flatten(), strict=True):
        for x in zip(right[1].flatten(), wrong[1].flatten(), strict=True):
            ax.plot(x, y, color=PURPLE, linewidth=1, zorder=3)
    _dots(ax, wrong, PURPLE)
    return "aligned=False: half a cell right and down"


def _adaptive(ax: Any) -> str:
    y, x = data.samples(data.COARSE_BINS, data.COARSE, 0, True)
    _dots(ax, (y, x), BLUE)
    return f"adaptive: {y.shape[1]} x {x.shape[1]} samples a bin"


def _bicubic(ax: Any) -> str:
    """One sample of the middle bin, close up, with the weights of its cells in percent."""
    ys, xs = data.samples(data.COARSE_BINS, data.COARSE, 2, True)
    x, y = float(xs[1, 1]), float(ys[1, 0])
    weights, near = data.taps(x, y, "bicubic"), data.taps(x, y, "bilinear") > 0
    for row, column in (weights != 0).nonzero().tolist():
        percent = float(weights[row, column]) * 100
        colour = GREEN if percent > 0 else VERMILION
        corners = (column + 0.04, row + 0.04, column + 0.96, row + 0.96)
        _rectangle(ax, *corners, colour, 0, facecolor="white", alpha=0.85, fill=True)
        _rectangle(ax, *corners, colour, 2.0 if near[row, column] else 0.9)
        text = f"{percent:.1f}" if abs(percent) >= 0.05 else "0"
        ax.text(column + 0.5, row + 0.42, text, ha="center", fontsize=8.5, color="black", zorder=6)
    ax.scatter(x, y, s=60, color=BLUE, edgecolor="white", linewidth=0.8, zorder=7)
    ax.set(xlim=(x - 2.9, x + 2.9), ylim=(y + 2.9 * 12 / 11, y - 2.9 * 12 / 11))
    return "bicubic: 16 cells of one sample, in percent"


def shifts() -> Any:
    """Three panels: the ramp, one bin of the photograph, and the difference from the exact shift over all bins."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5))
    panels = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.055, right=0.985, bottom=0.32, top=0.925, wspace=0.3)
    shift = (torch.arange(data.FINE + 1) / data.FINE).numpy()
    for name, colour in LINES.items():
        style: Any = {"drawstyle": "steps-post"} if name == "RoIPool" else BICUBIC if "bicubic" in name else {}
        ramp, photo = data.on_ramp(name), data.on_photograph(name)
        label = name.replace("`", "")
        panels[0].plot(shift, (ramp.got[:, 3, 3] - ramp.exact[0, 3, 3]).numpy(), color=colour, label=label, **style)
        panels[2].plot(shift, photo.rms().numpy(), color=colour, **style | {"drawstyle": "default"})
        if name in ("RoIPool", "RoIAlign, `aligned=True`"):
            panels[1].plot(shift, photo.got[:, *BIN].numpy(), color=colour, **style)
            panels[1].plot(shift, photo.exact[:, *BIN].numpy(), color=colour, linestyle=":", linewidth=1.8)
    titles = (
        ("a  linear ramp: the middle bin", "cells from the bin's first centre"),
        ("b  photograph: one bin", "grey level; dotted: exact"),
        ("c  photograph: error of all bins", "grey levels, root mean square"),
    )
    for ax, (title, label) in zip(panels, titles, strict=True):
        ax.set_title(title, loc="left", fontsize=8.5, color="black")
        ax.set_xlabel("box moved right by, in cells")
        ax.set_ylabel(label, labelpad=2)
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "1/4", "1/2", "3/4", "1"])
        ax.grid(color="#E4E4E4", linewidth=0.7)
        ax.set_axisbelow(True)
    figure.legend(loc="lower center", ncols=3, frameon=False, bbox_to_anchor=(0.5, 0.0), fontsize=9)
    return figure
