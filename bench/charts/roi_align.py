"""The two figures of docs/roi-align.md: where each op reads, and what moving the box does to it."""

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
DASHED = {"linestyle": (0, (1.2, 1.8)), "linewidth": 2.6, "zorder": 5}
BIN = (2, 5)  # row and column of the bin that stands for the others
WINDOW = (3, 14, 0, 12)  # cells shown: x from, to, y from, to


def draw(folder: Path) -> list[Path]:
    """Write both figures into `folder`; gives their files."""
    import matplotlib

    matplotlib.use("Agg")
    with matplotlib.rc_context(STYLE):
        figures = {"roi-align-samples.png": sample_points(), "roi-align-shift.png": shifts()}
        return [_write(figure, folder / name) for name, figure in figures.items()]


def _write(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI)
    pyplot.close(figure)
    image = Image.open(buffer).convert("RGB").quantize(COLOURS, kmeans=3, dither=Image.Dither.NONE)
    image.save(path, optimize=True)
    return path


def sample_points() -> Any:
    """Six views of the cells: photograph, RoIPool, RoIAlign with a fixed ratio, unaligned, adaptive, bicubic."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(9, 6.65))
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.015, top=0.955, wspace=0.04, hspace=0.12)
    views = (_photograph, _roi_pool, _fixed, _unaligned, _adaptive, _bicubic)
    for view, ax, letter in zip(views, axes.flat, "abcdef", strict=True):
        ax.set(xticks=[], yticks=[])
        ax.set_xlim(WINDOW[0], WINDOW[1])
        ax.set_ylim(WINDOW[3], WINDOW[2])
        title = view(ax)
        ax.set_title(f"{letter}  {title}", loc="left", fontsize=8.5, color="black")
        for spine in ax.spines.values():
            spine.set(visible=True, color=GREY, linewidth=0.8)
    return figure


def _cells(ax: Any) -> None:
    """The feature map in light grey, with a line between cells."""
    cells = data.feature_map(data.COARSE)[0, 0]
    height, width = cells.shape
    ax.imshow(cells.numpy(), cmap="gray", vmin=-260, vmax=255, extent=(0, width, height, 0), interpolation="nearest")
    _grid(ax, "white")


def _grid(ax: Any, colour: str) -> None:
    for x in range(WINDOW[0] + 1, WINDOW[1]):
        ax.axvline(x, color=colour, linewidth=0.6)
    for y in range(WINDOW[2] + 1, WINDOW[3]):
        ax.axhline(y, color=colour, linewidth=0.6)


def _box(ax: Any, colour: str = BLUE, lines: bool = True) -> None:
    """The box, and the borders of its bins."""
    x1, y1, x2, y2 = (side / data.COARSE for side in data.BOX)
    _rectangle(ax, x1, y1, x2, y2, colour, 1.8)
    for i in range(1, data.COARSE_BINS * lines):
        share = i / data.COARSE_BINS
        ax.plot([x1 + share * (x2 - x1)] * 2, [y1, y2], color=colour, linewidth=0.9)
        ax.plot([x1, x2], [y1 + share * (y2 - y1)] * 2, color=colour, linewidth=0.9)


def _rectangle(ax: Any, x1: float, y1: float, x2: float, y2: float, colour: str, width: float, **kwargs: Any) -> None:
    from matplotlib.patches import Rectangle

    kwargs = {"fill": False, "edgecolor": colour, "linewidth": width, "zorder": 3} | kwargs
    ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, **kwargs))


def _dots(ax: Any, found: data.Samples, colour: str, **kwargs: Any) -> None:
    y, x = torch.meshgrid(found.y.flatten(), found.x.flatten(), indexing="ij")
    ax.scatter(x.numpy(), y.numpy(), s=17, color=colour, edgecolor="white", linewidth=0.6, zorder=4, **kwargs)


def _photograph(ax: Any) -> str:
    image = data.photograph()
    height, width = (side / data.COARSE for side in image.shape[1:])
    ax.imshow(image.permute(1, 2, 0).byte().numpy(), extent=(0, width, height, 0), interpolation="antialiased")
    _grid(ax, "#FFFFFF88")
    _box(ax, "#56B4E9", lines=False)
    return "photograph, cells of 32 pixels, box"


def _roi_pool(ax: Any) -> str:
    """Bins in two colours, so that shared cells show; a dot in the cells that won."""
    _cells(ax)
    found = data.rounded(data.COARSE_BINS, data.COARSE)
    for i, row in enumerate(found.rows):
        for j, column in enumerate(found.columns):
            inset = 0.06 + 0.1 * ((i + j) % 2)
            (y1, y2), (x1, x2) = _ends(row), _ends(column)
            corners = (x1 + inset, y1 + inset, x2 - inset, y2 - inset)
            _rectangle(ax, *corners, (VERMILION, "#7A3300")[(i + j) % 2], 1.3)
    y, x = found.largest.nonzero().T + 0.5
    ax.scatter(x.numpy(), y.numpy(), s=26, color=VERMILION, edgecolor="white", linewidth=0.6, zorder=4)
    _box(ax, lines=False)
    return "RoIPool: bins of whole cells, the largest wins"


def _ends(inside: Tensor) -> tuple[int, int]:
    cells = inside.nonzero()
    return int(cells[0]), int(cells[-1]) + 1


def _fixed(ax: Any) -> str:
    _cells(ax)
    _box(ax)
    _dots(ax, data.samples(data.COARSE_BINS, data.COARSE, 2, True), BLUE)
    return "RoIAlign, aligned=True, 2 x 2 samples a bin"


def _unaligned(ax: Any) -> str:
    _cells(ax)
    _box(ax)
    right = data.samples(data.COARSE_BINS, data.COARSE, 2, True)
    wrong = data.samples(data.COARSE_BINS, data.COARSE, 2, False)
    for y0, y1 in zip(right.y.flatten(), wrong.y.flatten(), strict=True):
        for x0, x1 in zip(right.x.flatten(), wrong.x.flatten(), strict=True):
            ax.plot([x0, x1], [y0, y1], color=PURPLE, linewidth=1, zorder=3)
    _dots(ax, wrong, PURPLE)
    return "aligned=False: half a cell right and down"


def _adaptive(ax: Any) -> str:
    _cells(ax)
    _box(ax)
    found = data.samples(data.COARSE_BINS, data.COARSE, 0, True)
    _dots(ax, found, BLUE)
    return f"adaptive: {found.y.shape[1]} x {found.x.shape[1]} samples a bin"


def _bicubic(ax: Any) -> str:
    """One sample of the middle bin, close up, with the weights of its cells in percent."""
    _cells(ax)
    _box(ax)
    found = data.samples(data.COARSE_BINS, data.COARSE, 2, True)
    x, y = float(found.x[1, 1]), float(found.y[1, 0])
    weights = data.taps(x, y, "bicubic")
    near = data.taps(x, y, "bilinear") > 0
    for row, column in (weights != 0).nonzero().tolist():
        percent = float(weights[row, column]) * 100
        colour = GREEN if percent > 0 else VERMILION
        corners = (column + 0.04, row + 0.04, column + 0.96, row + 0.96)
        _rectangle(ax, *corners, colour, 0, facecolor="white", alpha=0.85, fill=True)
        _rectangle(ax, *corners, colour, 2.0 if near[row, column] else 0.9)
        text = f"{percent:.1f}" if abs(percent) >= 0.05 else "0"
        ax.text(column + 0.5, row + 0.42, text, ha="center", fontsize=8.5, color="black", zorder=6)
    ax.scatter(x, y, s=60, color=BLUE, edgecolor="white", linewidth=0.8, zorder=7)
    ax.set_xlim(x - 2.9, x + 2.9)
    ax.set_ylim(y + 2.9 * 12 / 11, y - 2.9 * 12 / 11)
    return "bicubic: 16 cells of one sample, in percent"


def shifts() -> Any:
    """Three panels: the ramp, one bin of the photograph, and the difference from the exact shift over all bins."""
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(9, 3.5))
    figure.subplots_adjust(left=0.055, right=0.985, bottom=0.32, top=0.925, wspace=0.3)
    shift = (torch.arange(data.FINE + 1) / data.FINE).numpy()
    for name, pool in data.POOLS.items():
        colour, label = LINES[name], name.replace("`", "")
        styles = {"RoIPool": {"drawstyle": "steps-post"}, "RoIAlign, `aligned=True`, bicubic": DASHED}
        style: Any = styles.get(name, {})
        found = data.on_ramp(pool)
        left.plot(shift, (found.got[:, 3, 3] - found.exact[0, 3, 3]).numpy(), color=colour, label=label, **style)
        photo = data.on_photograph(pool)
        right.plot(shift, data.rms(photo).numpy(), color=colour, **DASHED if style is DASHED else {})
        if name in ("RoIPool", "RoIAlign, `aligned=True`"):
            middle.plot(shift, photo.got[:, *BIN].numpy(), color=colour, **style)
            middle.plot(shift, photo.exact[:, *BIN].numpy(), color=colour, linestyle=":", linewidth=1.8)
    for ax, letter, title, label in (
        (left, "a", "linear ramp: the middle bin", "cells from the bin's first centre"),
        (middle, "b", "photograph: one bin", "grey level; dotted: exact"),
        (right, "c", "photograph: error of all bins", "grey levels, root mean square"),
    ):
        ax.set_title(f"{letter}  {title}", loc="left", fontsize=8.5, color="black")
        ax.set_xlabel("box moved right by, in cells")
        ax.set_ylabel(label, labelpad=2)
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "1/4", "1/2", "3/4", "1"])
        ax.grid(color="#E4E4E4", linewidth=0.7)
        ax.set_axisbelow(True)
    figure.legend(loc="lower center", ncols=3, frameon=False, bbox_to_anchor=(0.5, 0.0), fontsize=9)
    return figure
