"""How near each case comes to the machine's roofs: one chart of two panels, and the placing of its labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bench.charts.style import BASE, FAINT, GREY, LOSS, PEERS, WIDTH, WIN, head, provider_name
from bench.machine import Roofs
from bench.result import Result
from bench.rows import Row
from bench.standings import Standing, digits, us

PANEL = 4.4  # inches

# Lines of constant time in the panel of bandwidths, in microseconds.
TIMES = {"1 us": 1, "10 us": 10, "100 us": 100, "1 ms": 1e3, "10 ms": 1e4, "100 ms": 1e5, "1 s": 1e6}

# Where a label may stand, in points from its mark, the nearest first.
OFFSETS = [
    (dx, dy)
    for far in (0, 10, 20, 32, 46, 62, 80)
    for dx, dy in (
        (7 + far, 0), (-7 - far, 0), (6 + far, 8 + far), (6 + far, -8 - far), (-6 - far, 8 + far), (-6 - far, -8 - far),
        (0, 10 + far), (0, -10 - far), (12 + far, 5 + far / 2), (12 + far, -5 - far / 2), (-12 - far, 5 + far / 2),
        (-12 - far, -5 - far / 2),
    )
]  # fmt: skip


class _Case(NamedTuple):
    """What a panel shows of a case: its name, and rows with their colours."""

    name: str
    rows: list[tuple[Row, str]]


@dataclass(frozen=True)
class Point:
    """One provider of one case in a panel."""

    name: str
    row: Row
    colour: str
    x: float
    y: float


def roofline(found: Sequence[Standing], result: Result) -> Any:
    """Cases bound by memory: bandwidth against bytes. Cases bound by arithmetic: operations a second against intensity.

    None where no roof or no case was measured.
    """
    from matplotlib import pyplot

    roofs, on_gpu = result["roofs"], bool(result["machine"]["gpu"])
    found = [s for s in found if (row := _first(s)) is not None and row.bytes]
    if not roofs or not found:
        return None
    memory = [s for s in found if _memory_bound(s, roofs)]
    arithmetic = [s for s in found if not _memory_bound(s, roofs)]
    panels = [(group, draw) for group, draw in ((memory, _memory_panel), (arithmetic, _arithmetic_panel)) if group]
    height = 1.2 + PANEL * len(panels) + (0 if on_gpu else 0.26)
    figure = pyplot.figure(figsize=(WIDTH, height))
    top = head(figure, result, "How near the machine's limits", height)
    _legend(figure, found, on_gpu, (top - 0.1) / height)
    for index, (group, draw) in enumerate(panels):
        bottom = top - 0.3 - PANEL * (index + 1) + 0.5
        axes = figure.add_axes((0.075, bottom / height, 0.905, (PANEL - 0.95) / height))
        axes.set(xscale="log", yscale="log")
        axes.tick_params(which="both", length=0)
        axes.grid(color=FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        draw(figure, axes, [_Case(_name(s, found), list(_rows(s, on_gpu))) for s in group], roofs)
    return figure


def _first(standing: Standing) -> Row | None:
    return standing.ours or standing.baseline


def _name(standing: Standing, found: Sequence[Standing]) -> str:
    """With its op where two ops have a case of this name."""
    ops = {other.op for other in found if other.name == standing.name}
    return standing.name if len(ops) == 1 else f"{standing.name} {standing.op}"


def _flops_roof(roofs: dict[str, float], dtype: str) -> float:
    return Roofs(**roofs).tflops(dtype)


def _roof_of(row: Row) -> str:
    return row.roof or row.dtype


def _memory_bound(standing: Standing, roofs: dict[str, float]) -> bool:
    row = _first(standing)
    assert row is not None
    return row.bytes / (roofs["copy_gbps"] * 1e9) >= row.flops / (_flops_roof(roofs, _roof_of(row)) * 1e12)


def _rows(standing: Standing, on_gpu: bool) -> Iterator[tuple[Row, str]]:
    """Rows and their colours: ours first, then torchvision; on a CPU the peers take the place of ours."""
    ours, baseline = standing.ours, standing.baseline
    if ours is not None:
        loses = baseline is not None and us(baseline) < us(ours)
        yield ours, LOSS if loses else WIN
    elif not on_gpu:
        for name in ("compile", "reference"):
            if row := standing.best((name,)):
                yield row, PEERS[name]
    if baseline is not None:
        yield baseline, BASE


def _memory_panel(figure: Any, axes: Any, cases: Sequence[_Case], roofs: dict[str, float]) -> None:
    points = [
        [Point(name, row, colour, row.bytes / 1e6, row.bytes / us(row) / 1e3) for row, colour in rows]
        for name, rows in cases
    ]
    roof = roofs["copy_gbps"]
    _limits(axes, points, roof)
    x_low, x_high = axes.get_xlim()
    y_low, _ = axes.get_ylim()
    axes.axhline(roof, color=BASE, linewidth=1.5)
    for name, micro in TIMES.items():  # a time is a line of slope 1 here
        line = [x / micro * 1e3 for x in (x_low, x_high)]
        axes.plot([x_low, x_high], line, color=GREY, linewidth=0.6, ls=(0, (1, 3)), zorder=1)
        at = max(x_low, y_low * micro / 1e3)
        if at < x_high / 2 and at / micro * 1e3 < roof / 3:
            _note(axes, name, (at, at / micro * 1e3), (12, 8))
    _note(axes, f"copy, measured: {digits(roof)} GB/s", (x_low, roof), (6, 8))
    axes.set_title("Bound by memory", loc="left", fontweight="bold", fontsize=10)
    axes.set_xlabel("MB the case must move at least")
    axes.set_ylabel("GB/s attained")
    _draw(figure, axes, points)


def _arithmetic_panel(figure: Any, axes: Any, cases: Sequence[_Case], roofs: dict[str, float]) -> None:
    giga = max(_flops_roof(roofs, _roof_of(row)) for _, rows in cases for row, _ in rows) < 1  # a CPU
    unit, scale = ("GFLOP/s", 1e3) if giga else ("TFLOP/s", 1.0)
    points = [
        [Point(name, row, colour, row.flops / row.bytes, row.flops / us(row) / 1e6 * scale) for row, colour in rows]
        for name, rows in cases
    ]
    names = {_roof_of(p.row) for group in points for p in group}
    dtypes = {name if name in ("fp32", "tf32") else "bf16" for name in names}
    flat = {dtype: _flops_roof(roofs, dtype) * scale for dtype in sorted(dtypes)}
    _limits(axes, points, max(flat.values()))
    x_low, x_high = axes.get_xlim()
    for dtype, roof in flat.items():
        slope = roofs["copy_gbps"] / 1e3 * scale
        xs = [x_low, max(roof / slope, x_low), x_high]
        axes.plot(xs, [min(roof, x * slope) for x in xs], color=BASE, linewidth=1.5)
        _note(axes, f"matrix product {dtype}, measured: {digits(roof)} {unit}", (x_high, roof), (-6, 8))
    axes.set_title("Bound by arithmetic", loc="left", fontweight="bold", fontsize=10)
    axes.set_xlabel("operations for each byte the case must move at least")
    axes.set_ylabel(f"{unit} attained")
    _draw(figure, axes, points)


def _note(axes: Any, words: str, at: tuple[float, float], offset: tuple[float, float]) -> None:
    axes.annotate(
        words, at, offset, textcoords="offset points", color=GREY, fontsize=8, va="center",
        ha="left" if offset[0] > 0 else "right", bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
    )  # fmt: skip


def _limits(axes: Any, points: Sequence[Sequence[Point]], roof: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    xs = [p.x for group in points for p in group]
    ys = [p.y for group in points for p in group]
    axes.set(xlim=(min(xs) / 3, max(xs) * 4), ylim=(min(*ys, roof / 100) / 2.5, max(*ys, roof) * 2.2))
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 50 else (1.0,)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _draw(figure: Any, axes: Any, points: Sequence[Sequence[Point]]) -> None:
    """Marks, a thin line from ours to torchvision's, and a name at the first of each case."""
    marks, names = [], []
    for group in points:
        axes.plot([p.x for p in group], [p.y for p in group], color=GREY, linewidth=0.6, alpha=0.7, zorder=2)
        for p in group:
            face = "white" if p.colour == BASE else p.colour
            axes.scatter(p.x, p.y, s=26, color=face, edgecolor=p.colour, linewidth=1.1, zorder=3)
            marks.append((p.x, p.y))
        names.append((group[0].name, group[0].x, group[0].y, group[0].colour))
    _place_labels(figure, axes, names, marks)


def _place_labels(
    figure: Any, axes: Any, names: Sequence[tuple[str, float, float, str]], marks: Sequence[tuple[float, float]]
) -> None:
    """Put each name at the nearest free place: over no other name, no mark and inside the axes."""
    from matplotlib.transforms import Bbox

    renderer = figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    point = figure.dpi / 72
    taken = [text.get_window_extent(renderer) for text in axes.texts]
    for x, y in axes.transData.transform(marks):
        taken.append(Bbox.from_bounds(x - 3.5 * point, y - 3.5 * point, 7 * point, 7 * point))
    for name, x, y, colour in sorted(names, key=lambda entry: -entry[2]):
        label = axes.annotate(name, (x, y), (0, 0), textcoords="offset points", fontsize=8, color=colour, va="center")
        size = label.get_window_extent(renderer)
        mark_x, mark_y = axes.transData.transform((x, y))

        def box_at(dx: float, dy: float, size: Any = size, mark_x: float = mark_x, mark_y: float = mark_y) -> Any:
            left = mark_x + dx * point - size.width * (0 if dx > 0 else 1 if dx < 0 else 0.5)
            return Bbox.from_bounds(left, mark_y + dy * point - size.height / 2, size.width, size.height)

        def cost(offset: tuple[float, float]) -> float:
            box = box_at(*offset)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            return sum(_common(box, other) for other in taken) + (0 if inside else 1e9)

        dx, dy = next((offset for offset in OFFSETS if not cost(offset)), None) or min(OFFSETS, key=cost)
        taken.append(box_at(dx, dy))
        label.set(position=(dx, dy), ha="left" if dx > 0 else "right" if dx < 0 else "center")
        if math.hypot(dx, dy) > 14:
            axes.annotate(
                "", (x, y), (dx, dy), textcoords="offset points", zorder=1,
                arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0},
            )  # fmt: skip


def _common(a: Any, b: Any) -> float:
    """Area two boxes share."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(0.0, width) * max(0.0, height)


def _legend(figure: Any, found: Sequence[Standing], on_gpu: bool, y: float) -> None:
    from matplotlib.lines import Line2D

    names = {WIN: "ours, faster than torchvision", LOSS: "ours, slower"}
    names |= {colour: provider_name(provider) for provider, colour in PEERS.items()}
    names |= {BASE: "torchvision's fastest"}
    shown = {colour for standing in found for _, colour in _rows(standing, on_gpu)}
    handles = [
        Line2D(
            [], [], ls="", marker="o", markersize=5.5, markerfacecolor="white" if colour == BASE else colour,
            markeredgecolor=colour, label=name,
        )
        for colour, name in names.items() if colour in shown
    ]  # fmt: skip
    figure.legend(
        handles=handles, loc="center left", bbox_to_anchor=(0.01, y), ncols=len(handles), frameon=False, fontsize=8,
        handletextpad=0.3, columnspacing=1.3,
    )  # fmt: skip
