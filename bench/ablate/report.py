"""A result of a table as Markdown and as a chart, and the rule by which a published direction comes out."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from bench.ablate.runs import BROKEN, DONE, RESULT, Plan
from bench.ablate.runs import result as result_of
from bench.ablate.table import Claim, Table
from bench.charts import BASE, DPI, FAINT, GREY, STYLE, WIDTH, WIN
from bench.tables import table as markdown_table
from bench.tables import text
from tmask.engine.files import replace_text, replacing

MARKDOWN, CHART = "table.md", "chart.png"
ROW = 0.42  # inches of the chart
FACTOR = 2.0  # standard errors that a difference must reach
RULE = (
    "A direction *came out* if the difference of the means has the published sign and is at least "
    f"{FACTOR:g} standard errors; it *did not* if it is at least as large with the other sign; else it lies *within "
    "the spread*. The standard error is sqrt(s1²/n1 + s2²/n2), with the standard deviations s and numbers n of the "
    "seeds. Where nothing but chance differs, three seeds reach that in about 6 of 100 comparisons on each side. Where "
    "no direction was published, the words are *above* and *below*."
)

Result = dict[str, Any]


class Verdict(NamedTuple):
    """The outcome of one claim, in the unit of the values."""

    word: str
    difference: float | None = None  # of the means; None if one side has no value
    error: float | None = None  # standard error of the difference; None if one side has a single seed


def judge(better: Sequence[float], worse: Sequence[float], *, published: bool) -> Verdict:
    """Apply RULE to the values of two variants. `published`: whether there is a published direction."""
    if not better or not worse:
        return Verdict("no result yet")
    difference = statistics.fmean(better) - statistics.fmean(worse)
    if min(len(better), len(worse)) == 1:
        return Verdict("one seed, no spread", difference)
    error = math.sqrt(sum(statistics.variance(values) / len(values) for values in (better, worse)))
    if difference == 0 or abs(difference) < FACTOR * error:
        return Verdict("within the spread", difference, error)
    words = ("came out", "did not come out") if published else ("above", "below")
    return Verdict(words[difference < 0], difference, error)


def write(plan: Plan) -> None:
    """Write result, page and chart into the folder of the table, each file whole or not at all."""
    result = result_of(plan)
    replace_text(plan.out / RESULT, json.dumps(result, indent=1) + "\n")
    with replacing(plan.out / CHART) as file:
        draw(plan.table, result, file)
    page = f"# {plan.table.title}\n\n{plan.table.about}\n\n{markdown(plan.table, result, chart=CHART)}\n{RULE}\n"
    replace_text(plan.out / MARKDOWN, page)


def values(result: Result, variant: str, metric: str) -> list[float]:
    """The figure of each seed that is done, in points of AP."""
    found = [run["metrics"].get(metric, -1) for run in result["runs"] if run["variant"] == variant and "metrics" in run]
    return [100 * value for value in found if value >= 0]  # -1: the images show no such object


def markdown(table: Table, result: Result, *, chart: str) -> str:
    """The table with every seed's value, the published directions with their verdicts, and all settings."""
    first, *others = table.metrics
    head = ("", f"{first}, each seed", "mean", "min..max", "std", *others, "published")
    blocks = [
        progress(result),
        markdown_table(head, [_variant(table, result, name) for name in table.variants], right=2),
        f"![Every seed's value of each variant]({chart})",
        f"Published: {table.source}.",
        _claims(table, result),
        "\n".join(
            f"- **Failed**: {table.variants[run['variant']].label}, seed {run['seed']}: {text(run['reason'])} "
            f"(`{run['log']}`)"
            for run in result["runs"]
            if run["state"] == BROKEN
        ),
        "\n".join(f"- {line}" for line in _settings(table, result)),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def progress(result: Result, variant: str | None = None) -> str:
    """How many runs are done, of a variant or of the whole table; "" if all are."""
    states = [run["state"] for run in result["runs"] if variant in (None, run["variant"])]
    done = f"{states.count(DONE)} of {len(states)}"
    if states.count(DONE) == len(states):
        return ""
    return f"{done} seeds" if variant else f"**Partial: {done} runs.**"


def _variant(table: Table, result: Result, name: str) -> Sequence[str]:
    found, part = values(result, name, table.metrics[0]), progress(result, name)
    each = ", ".join(f"{value:.1f}" for value in found) or "-"
    limits = f"{min(found):.1f}..{max(found):.1f}" if found else "-"
    deviation = f"{statistics.stdev(found):.1f}" if len(found) > 1 else "-"
    mean, *means = (
        f"{statistics.fmean(of_metric):.1f}" if (of_metric := values(result, name, metric)) else "-"
        for metric in table.metrics
    )
    variant = table.variants[name]
    cells = (f"{each} ({part})" if part else each, mean, limits, deviation, *means)
    return (variant.label, *cells, variant.published or "-")


def _claims(table: Table, result: Result) -> str:
    lines = []
    for claim in table.claims:
        name, published, here, error, word = _claim(table, result, claim)
        unexpected = " (not expected of a small data set)" if not claim.small and result["setting"] == "small" else ""
        lines.append((name, published or "-", here or "-", error or "-", word + unexpected))
    return markdown_table(("direction", "published", "here", "standard error", "verdict"), lines)


def _claim(table: Table, result: Result, claim: Claim) -> tuple[str, str, str, str, str]:
    """Return in words: the claim, the published difference, ours, its standard error, the verdict; "" if unknown."""
    name = f"{table.variants[claim.better].label} over {table.variants[claim.worse].label}, {claim.metric}"
    published = claim.published if isinstance(claim.published, str) else f"{claim.published:+.1f}"
    better, worse = (values(result, variant, claim.metric) for variant in (claim.better, claim.worse))
    found = judge(better, worse, published=bool(published))
    here = "" if found.difference is None else f"{found.difference:+.1f}"
    return name, published, here, "" if found.error is None else f"{found.error:.1f}", found.word


def _settings(table: Table, result: Result) -> Iterator[str]:
    settings, shapes = result["settings"], result["settings"]["shapes"]

    def words(changes: dict[str, Any]) -> list[str]:
        return [f"`{name}` {json.dumps(value)}" for name, value in changes.items()]

    shared = ", ".join([f"preset `{settings['preset']}`", *words(settings["changed"])])
    yield f"Every run: {shared}; seeds 0 to {result['seeds'] - 1}."
    if shapes:
        yield (
            f"Data: {shapes['train_images']} drawn images to train on and {shapes['val_images']} others to evaluate "
            f"on, {shapes['size']} pixels a side, variant `{shapes['variant']}`."
        )
    else:
        yield "Data: COCO 2017."
    for name, own in settings["variants"].items():
        yield f"{table.variants[name].label}: {', '.join(words(own)) or 'as it is'}."
    minutes = [run["minutes"] for run in result["runs"] if run.get("minutes") is not None]
    if minutes:
        median, longest = statistics.median(minutes), max(minutes)
        yield f"{machines(result)}; a run trained for {median:.1f} min (median), the longest for {longest:.1f}."


def machines(result: Result) -> str:
    """The machines that trained the runs, each with all its commits."""
    commits: dict[str, set[str]] = defaultdict(set)
    for line in {line for run in result["runs"] for line in run.get("trained_by", ())}:
        device, _, commit = line.partition(", commit ")
        commits[device].add(commit)
    return "; ".join(f"{device}, commit {' and '.join(sorted(found))}" for device, found in sorted(commits.items()))


def draw(table: Table, result: Result, file: BinaryIO) -> None:
    """Write the chart as PNG: every seed's value of each variant, mean and range, and the verdicts below."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        from matplotlib.figure import Figure

        rows, lines = ROW * len(table.variants), 0.2 * len(table.claims)
        height = 0.75 + rows + 0.6 + lines + 0.1
        figure = Figure(figsize=(WIDTH, height))
        data = "drawn shapes" if result["settings"]["shapes"] else "COCO 2017"
        about = f"{data}, preset {result['settings']['preset']}"
        about = "; ".join(part for part in (about, machines(result)) if part)
        about = "  ".join(part for part in (about, progress(result).replace("**", "")) if part)
        figure.text(0.015, 1 - 0.25 / height, table.title, fontsize=13, fontweight="bold", va="center")
        figure.text(0.015, 1 - 0.5 / height, about, fontsize=7, color=GREY, va="center")
        _draw_variants(figure.add_axes((0.23, (lines + 0.7) / height, 0.59, rows / height)), table, result)
        for number, claim in enumerate(reversed(table.claims)):
            name, published, here, error, word = _claim(table, result, claim)
            here += f" (standard error {error})" if error else ""
            figures = ", ".join(filter(None, (here, published and f"published {published}")))
            line = ": ".join(filter(None, (name, figures, word)))
            figure.text(0.015, (0.12 + 0.2 * number) / height, line, fontsize=8, va="center")
        figure.savefig(file, format="png", dpi=DPI)


def _draw_variants(axes: Any, table: Table, result: Result) -> None:
    beside = axes.get_yaxis_transform()
    for at, (name, variant) in enumerate(table.variants.items()):
        label = "\n".join(filter(None, (variant.label, progress(result, name))))
        axes.text(-0.02, at, label, transform=beside, ha="right", va="center")
        axes.axhline(at, color=FAINT, linewidth=0.8, zorder=0)
        if variant.published:
            axes.text(1.02, at, f"published {variant.published}", transform=beside, va="center", fontsize=7, color=GREY)
        if found := values(result, name, table.metrics[0]):
            mean = statistics.fmean(found)
            axes.plot([min(found), max(found)], [at, at], color=WIN, linewidth=5, alpha=0.25, solid_capstyle="butt")
            dots = {"markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.6}
            axes.plot(found, [at] * len(found), "o", color=WIN, **dots)
            axes.plot([mean, mean], [at - 0.25, at + 0.25], color=BASE, linewidth=1.8)
            axes.annotate(f"{mean:.1f}", (mean, at - 0.27), ha="center", va="bottom", fontsize=8)
    bottom = len(table.variants) - 0.4
    axes.set(ylim=(bottom, -0.75), yticks=[], xlabel=f"{table.metrics[0]}: each seed (dot), mean (bar), range")
    axes.margins(x=0.12)
    axes.set_xlim(left=max(axes.get_xlim()[0], -1))  # there is no AP below 0
    axes.spines["left"].set_visible(False)
