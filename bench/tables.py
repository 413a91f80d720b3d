"""Results as text: lines for a terminal, one Markdown document, and the table of the README."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import result as results
from bench.result import ROOT, STATUSES, VARIANT, Line, Result, Row
from bench.standings import BASELINE, OURS, Standing, digits, duration, fastest, ratio, standings, times

README = ROOT / "README.md"
BEST_LAUNCHES = 10  # of a sweep
REDUCED = "Reduced sizes, no GPU: Triton kernels are checked by its interpreter, not timed; other times are this CPU's."
HEAD = ("op", "case", "ours, best", "torchvision, best", "speed-up", "aim", "reached", "of roof")
ROW_HEAD = (*VARIANT, "median", "p20-p80", "call", "torchvision", "GB/s", "of roof", "MiB", "reason")


# ---- For a terminal


def contest_line(rows: Sequence[Row]) -> str:
    """Return one line for the rows of a contest: each provider's time, and torchvision's over it."""
    base = fastest(row for row in rows if row.provider == "torchvision")
    name = " ".join(part for part in rows[0].contest.split("/") if part != "-")
    size = " (reduced)" if any(row.size == "reduced" for row in rows) else ""
    return f"{name}{size}: " + ", ".join(f"{row.provider} {_short(row, base)}" for row in rows)


def _short(row: Row, base: Row | None) -> str:
    if row.status != "timed":
        return {"passed": "right"}.get(row.status, row.status)
    return duration(row.median_us) + (f" ({ratio(base, row):.2g}x)" if base and base is not row else "")


def meaning(rows: Sequence[Row]) -> list[str]:
    """Return the lines under the rows: what each case is, what a row says, and why some have no time."""
    from bench.cases import CASES

    names = [name for name in dict.fromkeys(row.case for row in rows) if name in CASES]
    lines = ["", "A time is a median, (2x) torchvision's time over it; right: equals the truth, no time here."]
    lines += [REDUCED] if any(row.size == "reduced" for row in rows) else []
    lines += ["Cases at full size, their least cost and its floor on an H100:"] if names else []
    for name in names:
        lines += [f"  {line}" for line in case_lines(CASES[name], {row.mode for row in rows if row.case == name})]
    why = dict.fromkeys((row.provider, row.status, row.reason) for row in rows if row.status not in ("timed", "passed"))
    return lines + [f"  {provider} {status}: {reason}" for provider, status, reason in why]


def case_lines(case: Any, modes: Iterable[str] = ()) -> list[str]:
    """Return a line for each of the modes, or of all modes of the case, in its main dtype."""
    from bench.machine import H100

    lines = []
    for mode in [mode for mode in case.modes if mode in modes] or case.modes:
        work, aim = case.work(case.dtype, mode), case.aim(mode)
        floor = duration(H100.floor_us(work, case.dtype))
        cost = f"{digits(work.bytes / 1e6)} MB, {digits(work.flops / 1e9)} GFLOP, {floor}"
        name = case.name if len(case.modes) == 1 else f"{case.name} {mode}"
        lines.append(f"{name}: {case.what}; {cost}" + (f"; aim {aim}" if aim else ""))
    return lines


# ---- Markdown


def markdown(result: Result) -> str:
    """Return the whole report."""
    rows = results.rows(result)
    blocks = [
        "# Benchmark report",
        machine_line(result["machine"]),
        _roofs(result["roofs"]),
        f"**{REDUCED}**" if any(row.size == "reduced" for row in rows) else "",
        *_comparisons(standings(rows)),
        *_all_rows(rows),
        *_sweeps(results.rows(result, sweeps=True)),
        *_tests(result["tests"]),
        *_parts(result["parts"]),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def machine_line(machine: dict[str, Any]) -> str:
    """Device, versions, commit and date in one line."""
    commit, gpu = machine["commit"], machine["gpu"]
    parts = [
        gpu or f"{machine['device']}, threads: {machine['threads']}, no GPU",
        gpu and f"driver {machine['driver']}, CUDA {machine['cuda']}",
        f"Python {machine['python']}",
        *(f"{name} {found}" for name, found in machine["versions"].items() if found),
        f"commit {commit[:10]}" + (" with changes" if machine["changed"] else ""),
        machine["date"],
    ]
    return ", ".join(filter(None, parts))


def _roofs(roofs: Mapping[str, float] | None) -> str:
    if not roofs:
        return "The machine's roofs were not measured."
    tf32 = roofs.get("matmul_tf32_tflops")
    return (
        f"Measured roofs: copy {digits(roofs['copy_gbps'])} GB/s (read plus written), matrix product "
        f"{digits(roofs['matmul_bf16_tflops'])} TFLOP/s in bf16 and {digits(roofs['matmul_fp32_tflops'])} in fp32"
        f"{f', {digits(tf32)} in TF32, which float32 models take' if tf32 else ''}. "
        "*Of roof* is the least time these allow, from the bytes and operations a case needs, over the median."
    )


def _comparisons(found: Sequence[Standing]) -> Iterator[str]:
    if any(standing.best() for standing in found):
        yield "## Against torchvision"
        yield "Both in their best dtype and layout. A speed-up is torchvision's time over ours."
        yield table(HEAD, map(_comparison, found), right=2)


def _comparison(standing: Standing) -> Sequence[str]:
    name = standing.name + (" (reduced)" if standing.reduced else "")
    speedup = times(standing.speedup) if standing.speedup else ""
    met = {True: "yes", False: "no", None: ""}[standing.aim_met]
    best = _best(standing, OURS), _best(standing, BASELINE)
    return standing.op, name, *best, speedup, str(standing.aim or ""), met, _of_roof(standing.ours)


def _of_roof(row: Row | None) -> str:
    return f"{100 * row.roof_share:.1f} %" if row and row.roof_share else ""


def _best(standing: Standing, providers: Sequence[str]) -> str:
    """Return the best time of `providers` with its setting, or, if none was timed, the worst status."""
    row = standing.best(providers)
    if row is None:
        return min((one.status for one in standing.rows if one.provider in providers), key=STATUSES.index, default="")
    kind = {"graph": "graph", "compile": "compiled"}.get(row.provider.rpartition("-")[2], "-")
    setting = " ".join(s for s in (row.dtype, row.layout, kind) if s != "-")
    return duration(row.median_us) + (f" ({setting})" if setting else "")


def _all_rows(rows: Sequence[Row]) -> Iterator[str]:
    by_op: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_op[row.op].append(row)
    if by_op:
        yield "## All rows"
        yield (
            "*Call* is from the call to the end of its work, nothing queued before it. Ratios are the time of "
            "torchvision's row of the same dtype and layout over the row's: below 1 the row is slower."
        )
    for op, of_op in by_op.items():
        base = {row.contest: row for row in of_op if row.provider == "torchvision" and row.status == "timed"}
        yield f"### {op}"
        yield table(ROW_HEAD, [_line(row, base.get(row.contest)) for row in of_op], right=5)


def _line(row: Row, base: Row | None) -> Sequence[str]:
    provider = f"**{row.provider}**" if row.provider in OURS else text(row.provider)
    variant = (row.case, row.mode, row.dtype, row.layout, provider)
    if row.status != "timed":
        return (*variant, row.status, "", "", "", "", "", "", text(row.reason))
    numbers = [duration(row.median_us), f"{duration(row.p20_us)} - {duration(row.p80_us)}", duration(row.wall_us)]
    memory = "" if row.peak_mib is None else digits(row.peak_mib)
    return (*variant, *numbers, times(ratio(base, row)) if base else "", digits(row.gbps), _of_roof(row), memory, "")


def _sweeps(rows: Sequence[Row]) -> Iterator[str]:
    for name in dict.fromkeys(row.case for row in rows):
        group = [row for row in rows if row.case == name]
        timed = sorted((row for row in group if row.status == "timed"), key=lambda row: row.median_us)
        now = fastest(row for row in timed if row.provider == "triton")
        yield f"## Sweep {name}: {len(timed)} of {len(group)} launch configurations timed; `triton` is the present one"
        lines = [
            (str(place), text(row.provider), duration(row.median_us), times(ratio(now, row)) if now else "")
            for place, row in enumerate(timed, 1)
            if place <= BEST_LAUNCHES or row is now
        ]
        yield table(("place", "launch", "median", "against now"), lines, right=2)


def _tests(tests: Sequence[Line]) -> Iterator[str]:
    if not tests:
        return
    yield "## Tests"
    by_file: dict[str, list[Line]] = defaultdict(list)
    for test in tests:
        by_file[test["key"].partition("::")[0]].append(test)
    lines = []
    for name, group in [*by_file.items(), ("all", tests)]:
        statuses = [test["status"] for test in group]
        counts = [str(statuses.count(status)) for status in ("passed", "skipped", "not reached")]
        bad = statuses.count("failed") + statuses.count("killed")
        lines.append((name, *counts, str(bad), digits(sum(test.get("seconds", 0.0) for test in group))))
    yield table(("file", "passed", "skipped", "not reached", "failed", "seconds"), lines, right=1)
    bad_tests = [test for test in tests if test["status"] in ("failed", "killed")]
    yield "\n".join(f"- `{test['key']}` {test['status']}: {text(test['reason'])}" for test in bad_tests)


def _parts(parts: Sequence[Line]) -> Iterator[str]:
    if parts:
        yield "## Parts of the run"
        lines = [(p["key"], p["status"], digits(p["seconds"]), text(p["reason"])) for p in parts]
        yield table(("part", "status", "seconds", "reason"), lines)


def table(head: Sequence[str], lines: Iterable[Sequence[str]], right: int | None = None) -> str:
    """Return a Markdown table; columns from `right` on are aligned there."""
    rule = ["---:" if right is not None and i >= right else "---" for i in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def text(text: str) -> str:
    """Return the first line of a message, its Markdown escaped."""
    first = text.strip().splitlines()[0] if text.strip() else ""
    return re.sub(r"([|<>*_`\[\]])", r"\\\1", first)


# ---- The README


def newest(folder: Path) -> Path | None:
    """Return the latest result of a GPU; None if there is none. Errors: ValueError for another schema."""
    dated = []
    for path in folder.glob("**/*.json"):
        machine = results.load(path)["machine"]
        if machine["gpu"]:
            dated.append((machine["date"], machine.get("time", ""), path))
    return max(dated)[-1] if dated else None


def readme_block(result: Result | None, path: Path | None = None) -> str:
    """Return the text between the README's marks; `path` is the result's file, whose report and chart are linked.

    Errors: ValueError for a result without a GPU.
    """
    if result is None:
        return "No result of a GPU has been committed yet, hence no claim of speed.\n"
    if not result["machine"]["gpu"]:
        raise ValueError("the README shows results of a GPU; this one has none")
    found = [standing for standing in standings(results.rows(result)) if standing.ours or standing.baseline]
    speedups = [standing.speedup for standing in found if standing.speedup]
    met = [standing.aim_met for standing in found if standing.aim_met is not None]
    faster = f"Faster than torchvision in {sum(s >= 1 for s in speedups)} of {len(speedups)} lines"
    blocks = [
        f"{machine_line(result['machine'])}. {faster}, aim reached in {sum(met)} of {len(met)}.",
        table(HEAD, map(_comparison, found), right=2),
    ]
    if path is not None:
        chart, whole = path.with_suffix("") / "speedup.png", path.with_suffix(".md")
        if chart.exists():
            blocks.insert(1, f"![Speed-up of every case over torchvision]({chart.relative_to(ROOT).as_posix()})")
        if whole.exists():
            blocks.append(f"[The whole report]({whole.relative_to(ROOT).as_posix()})")
    return "\n\n".join(blocks) + "\n"


def replace_table(text: str, name: str, new: str) -> str:
    """Return `text` with the table `name` between its two marks replaced. Errors: ValueError without the marks."""
    before, begin, rest = text.partition(f"<!-- table {name}")
    mark, newline, rest = rest.partition("\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    if not end:
        raise ValueError(f"expected a table {name!r} between its marks")
    return before + begin + mark + newline + new + end + after
