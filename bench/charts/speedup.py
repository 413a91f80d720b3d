"""How many times as fast as torchvision each case is: a bar a case, peers as dots."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from bench.charts.style import BASE, FAINT, GREY, LOSS, PEERS, WIDTH, WIN, head, provider_name
from bench.result import Result
from bench.rows import Row
from bench.standings import BASELINE, OURS, SEVERITY, Standing, digits, ratio, ratio_range, us


def speedups(found: Sequence[Standing], result: Result) -> Any:
    """A bar a case from 1x on, whiskers where p20 and p80 of both put it, the aim as a mark, peers as dots."""
    from matplotlib import pyplot

    shown = [s for s in found if s.baseline and any(row.provider not in BASELINE for row in _timed(s))]
    if not shown:
        return None
    by_op: dict[str, list[Standing]] = defaultdict(list)
    for standing in shown:
        by_op[standing.op].append(standing)
    places, headings, y = [], [], 0.0
    for op, group in by_op.items():
        headings.append((y, op))
        for standing in sorted(group, key=lambda s: (s.speedup is None, -(s.speedup or 0.0))):
            y += 1
            places.append((y, standing))
        y += 1.5
    height = 0.21 * y + 1.9
    figure = pyplot.figure(figsize=(WIDTH, height))
    top = head(figure, result, "Speed-up over torchvision, both at their best setting", height) - 0.3
    axes = figure.add_axes((0.27, 0.5 / height, 0.68, (top - 0.5) / height))
    low, high = _limits(shown)
    axes.set(xscale="log", xlim=(low, high), ylim=(y - 0.6, -0.9))
    _ratio_axis(axes, low, high)
    for at, op in headings:
        axes.text(-0.38, at, op, transform=axes.get_yaxis_transform(), fontweight="bold", va="center")
    for at, standing in places:
        _case(axes, at, standing, low, high)
    axes.axvline(1, color=BASE, linewidth=1.2, zorder=3)
    _legend(figure, shown, low, top, height)
    return figure


def _timed(standing: Standing) -> list[Row]:
    return [row for row in standing.rows if row.status == "timed"]


def _limits(shown: Sequence[Standing]) -> tuple[float, float]:
    """Room for every bar, whisker and aim; a peer slower than a tenth may lie off the left edge and is marked there."""
    ends = [0.7, 1.5]
    for standing in shown:
        if standing.ours and standing.baseline:
            ends += ratio_range(standing.baseline, standing.ours)
            ends += [standing.aim_speedup] if standing.aim_speedup else []
        peers = [ratio(standing.baseline, standing.best((name,))) for name in PEERS]
        ends += [max(peer, 0.1) for peer in peers if peer]
    low, high = min(ends) / 1.25, max(ends) * 1.9
    return low, max(high, 2 * low**-0.55) if any(_why_no_bar(standing) for standing in shown) else high


def _why_no_bar(standing: Standing) -> str:
    """What became of ours; nothing where it is right and merely has no clock here."""
    statuses = {row.status for row in standing.rows if row.provider in OURS}
    return "" if not statuses or statuses & {"timed", "passed"} else f"ours: {min(statuses, key=SEVERITY.index)}"


def _ratio_axis(axes: Any, low: float, high: float) -> None:
    steps = (1, 2, 5) if high / low < 300 else (1, 3) if high / low < 3000 else (1,)
    ticks = [step * 10.0**power for power in range(-4, 6) for step in steps]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:,.6g}x" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    at = (math.log(1 / low)) / math.log(high / low)
    axes.annotate("faster →", (at, 0), (6, -28), "axes fraction", "offset points", color=WIN, fontweight="bold")
    axes.annotate(
        "← slower", (at, 0), (-6, -28), "axes fraction", "offset points", color=LOSS, fontweight="bold", ha="right"
    )


def _case(axes: Any, at: float, standing: Standing, low: float, high: float) -> None:
    """The line at height `at`: name, bar, spread, aim, label and the peers' dots."""
    baseline, ours, aim = standing.baseline, standing.ours, standing.aim_speedup
    assert baseline is not None
    axes.text(-0.015, at, standing.name, transform=axes.get_yaxis_transform(), va="center", ha="right", color=BASE)
    taken = []
    for name, colour in PEERS.items():
        if peer := ratio(baseline, standing.best((name,))):
            marker, peer = ("o", peer) if peer >= low * 1.03 else ("<", low * 1.03)
            axes.scatter(peer, at, s=20, marker=marker, color=colour, edgecolor="white", linewidth=0.6, zorder=6)
            taken.append(peer)
    if ours is None:
        _label(axes, _why_no_bar(standing), at, 1.0, taken, (low, high), GREY)
        return
    speedup = us(baseline) / us(ours)
    colour = WIN if speedup >= 1 else LOSS
    worst, best = ratio_range(baseline, ours)
    axes.barh(at, speedup - 1, left=1, height=0.62, color=colour, zorder=2)
    axes.plot([worst, best], [at, at], color="black", linewidth=0.9, zorder=4, solid_capstyle="butt")
    if aim:
        axes.plot([aim, aim], [at - 0.42, at + 0.42], color="black", linewidth=2, zorder=5)
        taken.append(aim)
    _label(axes, f"{digits(speedup)}x", at, best if speedup >= 1 else worst, taken, (low, high), colour)


def _label(
    axes: Any, label: str, at: float, end: float, taken: Sequence[float], limits: tuple[float, float], colour: str
) -> None:
    """Write at the outer end of a bar, or behind the marks that stand in the way there."""
    low, high = limits
    side = 1 if end >= 1 else -1
    width = (high / low) ** (0.013 * len(label) + 0.02)  # about a letter's share of the axis
    for mark in sorted(taken, key=lambda mark: side * mark):
        if 1 / 1.02 <= (mark / end) ** side <= width:
            end = mark
    axes.annotate(
        label, (end, at), (6 * side, 0), textcoords="offset points", va="center", ha="left" if side > 0 else "right",
        color=colour, fontweight="normal" if colour == GREY else "bold", fontsize=8, zorder=7,
    )  # fmt: skip


def _legend(figure: Any, shown: Sequence[Standing], low: float, top: float, height: float) -> None:
    """One line above the chart: what colours and marks mean, of those that occur."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    speedups = [s.speedup for s in shown if s.speedup]
    if any(value >= 1 for value in speedups):
        handles.append(Patch(color=WIN, label="ours, faster"))
    if any(value < 1 for value in speedups):
        handles.append(Patch(color=LOSS, label="ours, slower"))
    if speedups:
        handles.append(Line2D([], [], color="black", linewidth=0.9, label="p20-p80"))
    if any(s.ours and s.aim_speedup for s in shown):
        handles.append(Line2D([], [], color="black", marker="|", markersize=9, markeredgewidth=2, ls="", label="aim"))
    for name, colour in PEERS.items():
        if any(s.best((name,)) for s in shown):
            handles.append(Line2D([], [], color=colour, marker="o", ls="", markersize=5, label=provider_name(name)))
    if any((r := ratio(s.baseline, s.best((name,)))) and r < low * 1.03 for s in shown for name in PEERS):
        handles.append(Line2D([], [], color=GREY, marker="<", ls="", markersize=4, label="off the scale"))
    figure.legend(
        handles=handles, loc="center left", bbox_to_anchor=(0.01, (top + 0.2) / height), ncols=len(handles),
        frameon=False, fontsize=8, handlelength=1.2, columnspacing=1.3, handletextpad=0.5,
    )  # fmt: skip
