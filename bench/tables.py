"""A result as one Markdown document: times and ratios, what was not timed and why, sweeps, tests, validation."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bench import result as results
from bench.result import Result
from bench.rows import Row
from bench.standings import (
    BASELINE,
    OURS,
    SEVERITY,
    Standing,
    digits,
    duration,
    machine_line,
    percent,
    ratio,
    spread,
    standings,
    times,
    us,
)

BEST_CONFIGURATIONS = 10
# In a sweep, the provider that launches as the project does now.
PRESENT = "triton"


def markdown(result: Result) -> str:
    """The whole report."""
    rows = results.rows(result)
    blocks = [
        "# Benchmark report",
        machine_line(result["machine"]),
        _roofs(result["roofs"]),
        _reduced_note(rows),
        *_op_tables(standings(rows)),
        *_not_timed(rows),
        *_sweeps(results.rows(result, "sweeps")),
        *_tests(result["tests"]),
        *_validation(result["validation"]),
        *_parts(result["parts"]),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _roofs(roofs: dict[str, float] | None) -> str:
    if not roofs:
        return "The machine's roofs were not measured."
    tf32 = roofs.get("matmul_tf32_tflops")
    return (
        f"Measured roofs: copy {digits(roofs['copy_gbps'])} GB/s (read plus written), matrix product "
        f"{digits(roofs['matmul_bf16_tflops'])} TFLOP/s in bf16 and {digits(roofs['matmul_fp32_tflops'])} in fp32"
        f"{f', {digits(tf32)} in TF32, which float32 models take' if tf32 else ''}. "
        "*Of roof* is the least time these allow, from the bytes and operations a case needs, over the median."
    )


def _reduced_note(rows: Sequence[Row]) -> str:
    if not any(row.size == "reduced" for row in rows):
        return ""
    return (
        "**Reduced sizes on a CPU: no statement about the kernels.** Triton kernels are only checked there; their "
        "interpreter is no timing."
    )


def _op_tables(all_standings: Sequence[Standing]) -> Iterator[str]:
    by_op: dict[str, list[Standing]] = defaultdict(list)
    for standing in all_standings:
        if standing.best():
            by_op[standing.op].append(standing)
    if not by_op:
        return
    yield "## Times"
    yield (
        "Each provider in its best layout. *Call* is from the call to the end of its work, nothing queued before it. "
        "Ratios are torchvision's time over the row's: above 1 the row is faster, below 1 slower. *Best* compares with "
        "torchvision's fastest row of the case, whatever its dtype and layout."
    )
    for op, of_op in by_op.items():
        yield f"### {op}"
        head = ("case", "mode", "dtype", "provider", "layout", "median", "p20-p80", "call", "against torchvision",
                "against its best", "GB/s", "of roof", "peak MiB")  # fmt: skip
        yield table(head, [line for standing in of_op for line in _times(standing)], right=5)


def _times(standing: Standing) -> Iterator[Sequence[str]]:
    for dtype in dict.fromkeys(row.dtype for row in standing.rows):
        same = standing.best(BASELINE, dtype)
        for provider in dict.fromkeys(row.provider for row in standing.rows):
            row = standing.best((provider,), dtype)
            if row is None:
                continue
            yield (
                row.case, row.mode, row.dtype,
                f"**{provider}**" if provider in OURS else provider,
                row.layout, duration(us(row)), _range(row),
                duration(row.wall_us) if row.wall_us else "",
                _ratio(same, row), _ratio(standing.baseline, row),
                digits(row.gbps) if row.gbps else "",
                percent(row.roof_share) if row.roof_share else "",
                "" if row.peak_mib is None else digits(row.peak_mib),
            )  # fmt: skip


def _not_timed(rows: Sequence[Row]) -> Iterator[str]:
    """Every row without a time: what went wrong with its variants, what cannot be had in short."""
    groups: dict[tuple[str, str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.status not in ("timed", "not built"):
            groups[row.status, row.provider, row.op, row.reason].append(row)
    unbuilt = [row for row in rows if row.status == "not built"]
    if not groups and not unbuilt:
        return
    yield "## Not timed"
    if groups:
        lines = [
            (status, provider, op, str(len(group)), _variants(group), text(reason))
            for (status, provider, op, reason), group in groups.items()
        ]
        lines.sort(key=lambda line: SEVERITY.index(line[0]))
        yield table(("status", "provider", "op", "rows", "variants", "reason"), lines)
    if unbuilt:
        cases = dict.fromkeys(f"{row.op} {row.case}" for row in unbuilt)
        yield f"Not built yet ({len(unbuilt)} rows): {', '.join(cases)}."


def _variants(rows: Sequence[Row]) -> str:
    """Case and mode with their dtypes and layouts: "W1 forward (bf16 nchw, bf16 nhwc)"."""
    settings: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        settings[f"{row.case} {row.mode}"].append(" ".join(s for s in (row.dtype, row.layout) if s != "-"))
    return "; ".join(
        f"{name} ({', '.join(found)})" if any(found) else name for name, found in settings.items()
    )  # fmt: skip


def _sweeps(rows: Sequence[Row]) -> Iterator[str]:
    if not rows:
        return
    yield "## Sweeps"
    yield f"The {BEST_CONFIGURATIONS} fastest launch configurations, and the one that the project uses now."
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.contest].append(row)
    for contest, group in groups.items():
        timed = sorted((row for row in group if row.status == "timed"), key=us)
        now = next((row for row in timed if row.provider == PRESENT), None)
        shown = timed[:BEST_CONFIGURATIONS]
        shown += [now] if now and now not in shown else []
        lines = [
            (
                str(timed.index(row) + 1),
                "**as now**" if row is now else text(row.provider),
                duration(us(row)),
                _range(row),
                _ratio(now, row),
            )
            for row in shown
        ]
        name = contest.removeprefix("sweep ").rstrip("/-")
        yield f"### {name}: {len(timed)} of {len(group)} configurations timed"
        if lines:
            yield table(("place", "configuration", "median", "p20-p80", "against now"), lines, right=2)


def _range(row: Row) -> str:
    low, high = spread(row)
    return f"{duration(low)} - {duration(high)}"


def _ratio(slow: Row | None, fast: Row | None) -> str:
    found = ratio(slow, fast)
    return "" if found is None else times(found)


def _tests(tests: Sequence[dict[str, Any]]) -> Iterator[str]:
    if not tests:
        return
    yield "## Tests"
    lines = [
        (test["file"], str(test["passed"]), str(test["failed"]), str(test["skipped"]), digits(test["seconds"]),
         test["status"])
        for test in tests
    ]  # fmt: skip
    total = [str(sum(test[name] for test in tests)) for name in ("passed", "failed", "skipped")]
    lines.append(("all", *total, digits(sum(test["seconds"] for test in tests)), ""))
    yield table(("file", "passed", "failed", "skipped", "seconds", "status"), lines, right=1)
    failures = [f"- `{f['test']}`: {text(f['reason'])}" for test in tests for f in test["failures"]]
    if failures:
        yield "\n".join(failures)


def _validation(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """`tmask validate`: each op against its reference in float64."""
    if not rows:
        return
    yield "## Validation"
    verdicts = [row["verdict"] for row in rows]
    yield f"{verdicts.count('pass')} passed, {verdicts.count('fail')} failed, {verdicts.count('skip')} skipped."
    failed = [row for row in rows if row["verdict"] == "fail"]
    if failed:
        yield "\n".join(
            f"- {row['op']} {row['direction']}, {row['backend']}, {row['dtype']}: "
            + (f"error {row['max_error']:.3g}, tolerance {row['tolerance']:.3g}. "
               if row["max_error"] is not None and row["tolerance"] is not None else "")
            + text(row["note"])
            for row in failed
        )  # fmt: skip


def _parts(parts: dict[str, dict[str, Any]]) -> Iterator[str]:
    if parts:
        yield "## Parts of the run"
        yield table(
            ("part", "status", "seconds", "reason"),
            [(name, p["status"], digits(p["seconds"]), text(p.get("reason") or "")) for name, p in parts.items()],
        )


def table(head: Sequence[str], lines: Iterable[Sequence[str]], right: int | None = None) -> str:
    """A Markdown table; columns from `right` on are aligned there."""
    rule = ["---:" if right is not None and i >= right else "---" for i in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def text(text: str) -> str:
    """The first line of a message, so that nothing in it is Markdown."""
    first = text.strip().splitlines()[0] if text.strip() else ""
    return re.sub(r"([|<>*_`\[\]])", r"\\\1", first)
