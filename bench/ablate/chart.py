"""Every seed's value of each variant, its mean and its range."""

from __future__ import annotations

from typing import Any, BinaryIO

from bench.ablate.outcome import DONE
from bench.ablate.report import machines, progress, published, values, verdict
from bench.ablate.table import Table
from bench.ablate.verdict import Spread
from bench.charts.style import BASE, DPI, FAINT, GREY, STYLE, WIDTH, WIN

ROW = 0.42  # inches


def draw(table: Table, result: dict[str, Any], file: BinaryIO) -> None:
    """Write the chart as PNG."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        count, lines = len(table.variants), len(table.claims)
        height = 0.75 + ROW * count + 0.6 + 0.2 * lines + 0.1
        figure = Figure(figsize=(WIDTH, height))
        FigureCanvasAgg(figure)
        left = progress(result).replace("**", "")
        figure.text(0.015, 1 - 0.25 / height, table.title, fontsize=13, fontweight="bold", va="center")
        about = "  ".join(part for part in (_about(result), left) if part)
        figure.text(0.015, 1 - 0.5 / height, about, fontsize=7, color=GREY, va="center")
        bottom = (0.2 * lines + 0.7) / height
        axes = figure.add_axes((0.23, bottom, 0.59, ROW * count / height))
        _rows(axes, table, result)
        for number, claim in enumerate(table.claims):
            found = verdict(result, claim)
            names = f"{table.variants[claim.better].label} over {table.variants[claim.worse].label}, {claim.metric}"
            here = "" if found.difference is None else f"{found.difference:+.1f}"
            here += "" if found.error is None else f" (standard error {found.error:.1f})"
            before = f"published {published(claim)}" if published(claim) else ""
            line = ": ".join(part for part in (names, ", ".join(filter(None, (here, before))), found.word) if part)
            figure.text(0.015, (0.12 + 0.2 * (lines - 1 - number)) / height, line, fontsize=8, va="center")
        figure.savefig(file, format="png", dpi=DPI)


def _about(result: dict[str, Any]) -> str:
    data = "drawn shapes" if result["settings"]["shapes"] else "COCO 2017"
    return "; ".join(part for part in (f"{data}, preset {result['settings']['preset']}", machines(result)) if part)


def _rows(axes: Any, table: Table, result: dict[str, Any]) -> None:
    count = len(table.variants)
    for at, (name, variant) in enumerate(table.variants.items()):
        found = values(result, name, table.metrics[0])
        runs = [run for run in result["runs"] if run["variant"] == name]
        done = sum(run["state"] == DONE for run in runs)
        label = variant.label if done == len(runs) else f"{variant.label}\n{done} of {len(runs)} seeds"
        axes.text(-0.02, at, label, transform=axes.get_yaxis_transform(), ha="right", va="center")
        axes.axhline(at, color=FAINT, linewidth=0.8, zorder=0)
        if variant.published:
            place = axes.get_yaxis_transform()
            axes.text(1.02, at, f"published {variant.published}", transform=place, va="center", fontsize=7, color=GREY)
        if not found:
            continue
        mean = Spread(tuple(found)).mean
        axes.plot([min(found), max(found)], [at, at], color=WIN, linewidth=5, alpha=0.25, solid_capstyle="butt")
        axes.plot(found, [at] * len(found), "o", color=WIN, markersize=5, markeredgecolor="white", markeredgewidth=0.6)
        axes.plot([mean, mean], [at - 0.25, at + 0.25], color=BASE, linewidth=1.8)
        axes.annotate(f"{mean:.1f}", (mean, at - 0.27), ha="center", va="bottom", fontsize=8)
    axes.set(ylim=(count - 0.4, -0.75), yticks=[], xlabel=f"{table.metrics[0]}: each seed (dot), mean (bar), range")
    axes.margins(x=0.12)
    axes.set_xlim(left=max(axes.get_xlim()[0], -1))  # there is no AP below 0
    axes.spines["left"].set_visible(False)
