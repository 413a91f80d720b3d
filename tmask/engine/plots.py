"""Pictures of an evaluation: precision-recall curves and confusion matrices.

Letters: T IoU thresholds, Cls classes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tmask.engine.files import replacing

Array = npt.NDArray[Any]

_MOST_CLASSES = 100  # in a picture; the classes with the most objects are shown
_NUMBERED = 30  # most classes of a confusion matrix with numbers in its cells
_MOST_LETTERS = 60  # in a class name
_SIZE = 8  # font size of class names in points
_DPI = 120
_CURVES = ((0.5, "#0072B2"), (0.75, "#E69F00"))  # IoU; Okabe and Ito's colours, which the colour-blind can tell apart
_MEAN_COLOUR = "#333333"
_FONT = "DejaVu Sans"
_STYLE = {"font.family": _FONT, "font.size": 9, "figure.facecolor": "white", "text.parse_math": False}
_NAMES = {"bbox": "boxes", "segm": "masks"}


def draw_precision_recall(path: Path, evaluation: Any, names: Sequence[str], kind: str) -> None:
    """Draw precision over recall for each class, at IoU 0.5 and 0.75 and as the mean over all thresholds.

    `evaluation` is a COCOeval of `kind` after ``accumulate``, with the classes `names`. Precision is COCO's: the best
    at this recall or a higher one. Classes without objects are left out, and beyond 100 classes also the classes with
    the fewest objects. Without any objects no file is written.
    """
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [T, recalls, Cls]
    thresholds, recalls = evaluation.params.iouThrs, evaluation.params.recThrs
    known = np.flatnonzero((precision > -1).all((0, 1)))
    if not known.size:
        return
    number = np.bincount([item["category_id"] - 1 for item in evaluation.cocoGt.anns.values()], minlength=len(names))
    shown = _most(known, number)
    panels = [("all classes", precision[:, :, known].mean(2))]
    labels, _ = _labels(names, shown, 1.4)
    panels += [(label, precision[:, :, k]) for label, k in zip(labels, shown, strict=True)]
    columns = min(len(panels), max(3, math.ceil(math.sqrt(len(panels)))))
    rows = -(-len(panels) // columns)
    with _figure(path, 2.0 * columns + 0.7, 1.9 * rows + 1.3) as (figure, width, height):
        figure.text(0.15 / width, 1 - 0.25 / height, f"Precision and recall of {_NAMES.get(kind, kind)}", fontsize=13)
        left = f"; {len(shown)} of {len(known)} classes, those with the most objects" if len(shown) < len(known) else ""
        figure.text(0.15 / width, 1 - 0.47 / height, f"AP of each class in percent{left}", fontsize=8)
        lines: list[Any] = []
        for place, (name, curves) in enumerate(panels):
            row, column = divmod(place, columns)
            corner = (0.55 + 2.0 * column) / width, 1 - (0.95 + 1.9 * (row + 1) - 0.35) / height
            axes = figure.add_axes((*corner, 1.65 / width, 1.4 / height))
            lines = [
                *(
                    axes.plot(recalls, curves[_nearest(thresholds, iou)], color=c, label=f"IoU {iou}")
                    for iou, c in _CURVES
                ),
                axes.plot(recalls, curves.mean(0), color=_MEAN_COLOUR, label="mean over IoU 0.5 to 0.95"),
            ]
            axes.set(xlim=(0, 1), ylim=(0, 1.03), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
            axes.tick_params(labelsize=7)
            axes.grid(color="#E4E4E4", linewidth=0.6)
            axes.set_title(f"{name}  {100 * curves.mean():.1f}", fontsize=_SIZE)
            if column == 0:
                axes.set_ylabel("precision", fontsize=8)
            if place + columns >= len(panels):
                axes.set_xlabel("recall", fontsize=8)
        handles = [line for (line,) in lines]
        figure.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(0.1 / width, 1 - 0.5 / height), ncols=3, fontsize=8,
            frameon=False, handlelength=1.2, columnspacing=1.0,
        )  # fmt: skip


def draw_confusion(path: Path, counts: Array, names: Sequence[str], kind: str, score: float, iou: float) -> None:
    """Draw a confusion matrix [Cls + 1, Cls + 1]: a row for each true class, a column for each predicted class.

    The colour of a cell is its part of the row. Classes without objects and detections are left out, and beyond 100
    classes also the classes with the fewest objects. `score` and `iou` are the lowest ones that were counted.
    """
    known = np.flatnonzero((counts.sum(0) + counts.sum(1))[:-1])
    shown = _most(known, counts.sum(1)[:-1])
    cells = counts[np.ix_([*shown, len(names)], [*shown, len(names)])]
    labels, longest = _labels([*names, "background"], [*shown, len(names)], 2.0)
    part = cells / np.maximum(1, counts.sum(1)[[*shown, len(names)]])[:, None]
    numbered = len(shown) <= _NUMBERED
    cell = 0.42 if numbered else 0.2
    margin = 0.5 + longest  # for the labels
    side = cell * len(labels)
    with _figure(path, max(margin + side + 1.0, 5.6), margin + side + 0.95) as (figure, width, height):
        figure.text(0.15 / width, 1 - 0.25 / height, f"Confusion matrix of {_NAMES[kind]}", fontsize=13)
        rule = [
            f"Detections of score {score} or more, best first, each take the free object of the",
            f"largest IoU ({iou} or more), whatever its class. Background: no object, or not found.",
        ]
        if len(shown) < len(known):
            rule[1] += f" {len(shown)} of {len(known)} classes."
        for line, text in enumerate(rule):
            figure.text(0.15 / width, 1 - (0.47 + 0.16 * line) / height, text, fontsize=7.5)
        axes = figure.add_axes((margin / width, margin / height, side / width, side / height))
        axes.imshow(part, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        size = _SIZE if numbered else 6.5
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=size)
        axes.set_yticks(range(len(labels)), labels, fontsize=size)
        axes.set_xlabel("predicted", fontsize=9)
        axes.set_ylabel("true", fontsize=9)
        axes.set_xticks(np.arange(len(labels) + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(len(labels) + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="#E4E4E4", linewidth=0.5)
        axes.tick_params(which="minor", length=0)
        for row, column in np.argwhere(cells) if numbered else ():
            text = f"{cells[row, column]}"
            colour = "white" if part[row, column] > 0.5 else "black"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8 if len(text) < 5 else 6)
        bar = figure.add_axes(((margin + side + 0.15) / width, margin / height, 0.12 / width, side / height))
        figure.colorbar(axes.images[0], cax=bar)
        bar.set_ylabel("part of the row", fontsize=8)
        bar.tick_params(labelsize=7)


def _most(known: Array, number: Array) -> list[int]:
    """The `known` classes with the largest `number`, in order."""
    return sorted(sorted(known.tolist(), key=lambda k: -number[k])[:_MOST_CLASSES])


def _nearest(thresholds: Array, value: float) -> int:
    return int(np.argmin(np.abs(thresholds - value)))


def _labels(names: Sequence[str], classes: Sequence[int], width: float) -> tuple[list[str], float]:
    """The names of some classes, each cut to one line of `width` inches, and the largest width.

    A name that the font cannot write becomes ``class i``, with the label i.
    """
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont(_FONT))
    font.set_size(_SIZE, 72)

    def inches(text: str) -> float:
        font.set_text(text)
        return float(font.get_width_height()[0]) / 64 / 72

    labels = []
    for k in classes:
        name = " ".join(names[k].split())
        if not all(font.get_char_index(ord(letter)) for letter in name):
            name = f"class {k + 1}"
        whole = name
        for length in range(min(len(whole), _MOST_LETTERS), 0, -1):
            name = whole if length == len(whole) else whole[:length].rstrip() + "\u2026"
            if inches(name) <= width:
                break
        labels.append(name)
    return labels, max(map(inches, labels), default=0.0)


@contextlib.contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[tuple[Any, float, float]]:
    """Yield a figure and its size in inches; write it as PNG at the end."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        yield figure, width, height
        with replacing(path) as file:
            figure.savefig(file, format="png", dpi=_DPI)
