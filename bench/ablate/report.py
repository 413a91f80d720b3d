"""A result as Markdown; with its chart and the result itself it stands in the folder of the table."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from bench.ablate.outcome import BROKEN, DONE
from bench.ablate.plan import Plan
from bench.ablate.table import Claim, Table
from bench.ablate.verdict import RULE, Spread, Verdict, judge
from bench.tables import table as markdown_table
from bench.tables import text
from tmask.engine.files import replace_text, replacing

RESULT, MARKDOWN, CHART = "result.json", "table.md", "chart.png"

Result = dict[str, Any]


def write(plan: Plan, result: Result) -> None:
    """All three files, each whole or not at all."""
    from bench.ablate.chart import draw

    replace_text(plan.out / RESULT, json.dumps(result, indent=1) + "\n")
    with replacing(plan.out / CHART) as file:
        draw(plan.table, result, file)
    text = f"# {plan.table.title}\n\n{plan.table.about}\n\n{markdown(plan.table, result, chart=CHART)}\n{RULE}\n"
    replace_text(plan.out / MARKDOWN, text)


def markdown(table: Table, result: Result, *, chart: str) -> str:
    """The table with every seed's value, the published directions and what came of them."""
    blocks = [
        progress(result),
        _variants(table, result),
        f"![Every seed's value of each variant]({chart})",
        _claims(table, result),
        _failed(table, result),
        settings(table, result),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def machines(result: Result) -> str:
    """What trained the runs: a device and torch with all its commits, then the next."""
    commits: dict[str, set[str]] = defaultdict(set)
    for line in {line for run in result["runs"] for line in run.get("trained_by", ())}:
        device, _, commit = line.partition(", commit ")
        commits[device].add(commit)
    return "; ".join(f"{device}, commit {' and '.join(sorted(found))}" for device, found in sorted(commits.items()))


def progress(result: Result) -> str:
    """How much of the table is there, unless it is all."""
    done = sum(run["state"] == DONE for run in result["runs"])
    return "" if done == len(result["runs"]) else f"**Partial: {done} of {len(result['runs'])} runs.**"


def values(result: Result, variant: str, metric: str) -> list[float]:
    """Of the seeds that are done, in points of AP."""
    found = [run["metrics"].get(metric, -1) for run in result["runs"] if run["variant"] == variant and "metrics" in run]
    return [100 * value for value in found if value >= 0]  # -1: nothing to find


def percent(value: float | None) -> str:
    """A figure of COCO's, 0..1, in points."""
    return "-" if value is None or value < 0 else f"{100 * value:.1f}"


def verdict(result: Result, claim: Claim) -> Verdict:
    """Of one claim."""
    better, worse = (values(result, variant, claim.metric) for variant in (claim.better, claim.worse))
    return judge(better, worse, published=claim.published is not None)


def published(claim: Claim) -> str:
    """What was published of it; empty if nothing was."""
    return f"{claim.published:+.1f}" if isinstance(claim.published, float) else claim.published or ""


def _variants(table: Table, result: Result) -> str:
    first, *others = table.metrics
    head = ("", f"{first}, each seed", "mean", "min..max", "std", *others, "published")
    return markdown_table(head, [_variant(table, result, name) for name in table.variants], right=2)


def _variant(table: Table, result: Result, name: str) -> Sequence[str]:
    runs = [run for run in result["runs"] if run["variant"] == name]
    done = sum(run["state"] == DONE for run in runs)
    mark = "" if done == len(runs) else f" ({done} of {len(runs)} seeds)"
    found = values(result, name, table.metrics[0])
    cells = ["-"] * 4
    if found:
        spread = Spread(tuple(found))
        deviation = "-" if spread.deviation is None else f"{spread.deviation:.1f}"
        each = ", ".join(f"{value:.1f}" for value in found)
        cells = [each, f"{spread.mean:.1f}", f"{min(found):.1f}..{max(found):.1f}", deviation]
    others = [values(result, name, metric) for metric in table.metrics[1:]]
    means = [f"{statistics.fmean(other):.1f}" if other else "-" for other in others]
    return (table.variants[name].label, cells[0] + mark, *cells[1:], *means, table.variants[name].published or "-")


def _claims(table: Table, result: Result) -> str:
    lines = []
    for claim in table.claims:
        found = verdict(result, claim)
        unexpected = not claim.small and result["setting"] == "small"
        lines.append(
            (
                f"{table.variants[claim.better].label} over {table.variants[claim.worse].label}, {claim.metric}",
                published(claim) or "-",
                "-" if found.difference is None else f"{found.difference:+.1f}",
                "-" if found.error is None else f"{found.error:.1f}",
                found.word + (" (not expected of a small data set)" if unexpected else ""),
            )
        )
    head = ("direction", "published", "here", "standard error", "verdict")
    return f"Published: {table.source}.\n\n{markdown_table(head, lines)}"


def _failed(table: Table, result: Result) -> str:
    return "\n".join(
        f"- **Failed**: {table.variants[run['variant']].label}, seed {run['seed']}: {text(run['reason'])} "
        f"(`{run['log']}`)"
        for run in result["runs"]
        if run["state"] == BROKEN
    )


def settings(table: Table, result: Result) -> str:
    """What the runs have in common and in what they differ, how long they took and on what."""
    return "\n".join(f"- {line}" for line in _settings(table, result))


def _settings(table: Table, result: Result) -> Iterator[str]:
    shared, shapes = result["settings"], result["settings"]["shapes"]
    changed = "".join(f", `{name}` {json.dumps(value)}" for name, value in shared["changed"].items())
    yield f"Every run: preset `{shared['preset']}`{changed}; seeds 0 to {result['seeds'] - 1}."
    if shapes:
        yield (
            f"Data: {shapes['train_images']} drawn images to train on and {shapes['val_images']} others to evaluate "
            f"on, {shapes['size']} pixels a side, variant `{shapes['variant']}`."
        )
    else:
        yield "Data: COCO 2017."
    for variant, own in shared["variants"].items():
        words = [f"`{name}` {json.dumps(value)}" for name, value in own.items()]
        yield f"{table.variants[variant].label}: {', '.join(words) or 'as it is'}."
    minutes = [run["minutes"] for run in result["runs"] if run.get("minutes") is not None]
    if minutes:
        median, longest = statistics.median(minutes), max(minutes)
        yield f"{machines(result)}; a run trained for {median:.1f} min (median), the longest for {longest:.1f}."
