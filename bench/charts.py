"""The style of all charts, and the chart of a result: the speed-up of every case over torchvision.

900 pixels wide at two dots a pixel, on white, so that a light page and a dark one can show them. A provider has one
colour (of the palette of Okabe and Ito, which the colour-blind can tell apart); a loss has its own colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import result as results
from bench.result import STATUSES, Result
from bench.standings import OURS, Standing, digits, ratio, standings
from bench.tables import machine_line

WIDTH, DPI = 9.0, 200  # inches, and dots an inch: twice 900 pixels
WIN, LOSS, BASE = "#0072B2", "#D55E00", "#333333"
PEERS = {"compile": "#009E73", "reference": "#999999", "detectron2": "#CC79A7", "mmcv": "#E69F00"}
GREY, FAINT = "#666666", "#E4E4E4"

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}

NAMES = {"compile": "torch.compile(reference)", "reference": "reference, eager"}
LINE = 0.21  # inches of a case
LEAST = 0.1  # a peer that is slower is marked at the left edge


def draw(result: Result, folder: Path) -> Path | None:
    """Draw ``speedup.png`` into `folder` and return its path; None where nothing was timed beside torchvision."""
    import matplotlib

    cases = [s for s in standings(results.rows(result)) if s.baseline and (s.ours or s.best(tuple(PEERS)))]
    if not cases:
        return None
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        _chart(result, cases).savefig(folder / "speedup.png", dpi=DPI)
    return folder / "speedup.png"


def _chart(result: Result, cases: Sequence[Standing]) -> Any:
    """Return a figure with a line for each case, grouped by op."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ops = dict.fromkeys(standing.op for standing in cases)
    bottom = len(cases) + 1.5 * len(ops)
    height = LINE * bottom + 1.6
    figure = Figure(figsize=(WIDTH, height))
    title = "Speed-up over torchvision, both at their best setting"
    figure.text(0.015, 1 - 0.3 / height, title, fontsize=13, fontweight="bold", va="center")
    if not result["machine"]["gpu"]:
        warning = "CPU, reduced sizes: no statement about the kernels"
        figure.text(0.015, 1 - 1.05 / height, warning, fontsize=11, fontweight="bold", color=LOSS, va="center")
    figure.text(0.015, 1 - 0.54 / height, machine_line(result["machine"]), fontsize=7, color=GREY, va="center")
    axes = figure.add_axes((0.27, 0.4 / height, 0.6, LINE * bottom / height))
    axes.set(xscale="log", ylim=(bottom - 0.6, -0.9), yticks=[])
    at = 0.0
    for op in ops:
        axes.text(-0.425, at, op, transform=axes.get_yaxis_transform(), fontweight="bold", va="center")
        for standing in sorted((s for s in cases if s.op == op), key=lambda s: -(s.speedup or 0.0)):
            at += 1
            label = axes.get_yaxis_transform()
            axes.text(-0.015, at, standing.name, transform=label, va="center", ha="right", color=BASE)
            _speedup(axes, at, standing)
        at += 1.5
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}x"))
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    marks = dict(zip(labels, handles, strict=True))
    figure.legend(
        marks.values(), marks, loc="center left", bbox_to_anchor=(0.01, 1 - 0.8 / height), ncols=len(marks),
        frameon=False, fontsize=8, handlelength=1.2, columnspacing=1.3, handletextpad=0.5,
    )  # fmt: skip
    return figure


def _speedup(axes: Any, at: float, standing: Standing) -> None:
    """A bar from 1x on, a whisker from the worst to the best ratio of p20 and p80, the aim, and the peers as dots."""
    baseline, ours, speedup, aim = standing.baseline, standing.ours, standing.speedup, standing.aim_speedup
    assert baseline is not None
    axes.axvline(1, color=BASE, linewidth=1.2, zorder=3)
    if ours is not None and speedup is not None:
        colour, name = (WIN, "ours, faster") if speedup >= 1 else (LOSS, "ours, slower")
        axes.barh(at, speedup - 1, left=1, height=0.62, color=colour, zorder=2, label=name)
        spread = baseline.p20_us / ours.p80_us, baseline.p80_us / ours.p20_us
        axes.plot(spread, [at, at], color="black", linewidth=0.9, zorder=4, label="p20-p80")
        _note(axes, at, f"{digits(speedup)}x", colour)
        if aim:
            axes.plot(aim, at, "|", color="black", markersize=10, markeredgewidth=2, zorder=5, label="aim")
    statuses = {row.status for row in standing.rows if row.provider in OURS}
    if statuses and not statuses & {"timed", "passed"}:  # "passed": right, but this machine has no clock for it
        _note(axes, at, f"ours: {min(statuses, key=STATUSES.index)}", GREY)
    for peer, colour in PEERS.items():
        if value := ratio(baseline, standing.best((peer,))):
            marker, value = ("o", value) if value >= LEAST else ("<", LEAST)
            name = NAMES.get(peer, peer) if marker == "o" else "off the scale"
            axes.scatter(
                value, at, s=20, marker=marker, color=colour, edgecolor="white", linewidth=0.6, zorder=6, label=name
            )


def _note(axes: Any, at: float, words: str, colour: str) -> None:
    """Words at the right end of a line."""
    weight = "normal" if colour == GREY else "bold"
    where = axes.get_yaxis_transform()
    axes.text(1.01, at, words, transform=where, va="center", color=colour, fontweight=weight, fontsize=8)
