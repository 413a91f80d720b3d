"""A result file as Markdown, as the table of the README and as charts.

    python -m bench.report [FILE] [--write-readme] [--charts DIR]

FILE is by default the newest result of a GPU under bench/results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import result as results
from bench.result import Result
from bench.rows import ROOT, Row
from bench.standings import BASELINE, OURS, SEVERITY, Standing, duration, machine_line, percent, standings, times, us
from bench.tables import markdown, table

RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def newest(folder: Path = RESULTS) -> Path | None:
    """The latest result of a GPU; None if there is none. Errors: ValueError for another schema."""
    dated = []
    for path in folder.glob("**/*.json"):
        machine = results.load(path)["machine"]
        if machine["gpu"]:
            dated.append((machine["date"], machine.get("time", ""), path))
    return max(dated)[-1] if dated else None


def readme_block(result: Result | None, path: Path | None = None) -> str:
    """What stands between the README's marks: one line a case and mode at full size, or that there is nothing yet.

    `path` is the result's file in the repository; the report and the chart that lie beside it are linked.
    Errors: ValueError for a result without a GPU.
    """
    if result is None:
        return "No result of a GPU has been committed yet, hence no claim of speed.\n"
    if not result["machine"]["gpu"]:
        raise ValueError("the README shows results of a GPU; this one has none")
    found = standings(results.rows(result))
    timed = [standing for standing in found if standing.ours or standing.baseline]
    speedups = [standing.speedup for standing in timed if standing.speedup]
    met = [standing.aim_met for standing in timed if standing.aim_met is not None]
    unbuilt = [standing.name for standing in found if _why_not(standing, OURS) == "not built"]
    lines = [
        f"{machine_line(result['machine'])}.",
        f"Faster than torchvision in {sum(s >= 1 for s in speedups)} of {len(speedups)} lines, aim reached in "
        f"{sum(met)} of {len(met)}; not built yet: {len(unbuilt)}.",
    ]
    head = ("op", "case", "ours, best", "torchvision, best", "speed-up", "aim", "reached", "of roof")
    blocks = [" ".join(lines), table(head, [_readme_line(standing) for standing in timed], right=2)]
    if path is not None:
        chart, whole = path.with_suffix("") / "speedup.png", path.with_suffix(".md")
        if chart.exists():
            blocks.insert(1, f"![Speed-up of every case over torchvision]({chart.relative_to(ROOT).as_posix()})")
        if whole.exists():
            blocks.append(f"[The whole report]({whole.relative_to(ROOT).as_posix()})")
    return "\n\n".join(blocks) + "\n"


def _readme_line(standing: Standing) -> Sequence[str]:
    ours, baseline, speedup = standing.ours, standing.baseline, standing.speedup
    reached = {True: "yes", False: "no", None: ""}[standing.aim_met]
    return (
        standing.op, standing.name, _with_setting(ours) or _why_not(standing, OURS),
        _with_setting(baseline) or _why_not(standing, BASELINE),
        times(speedup) if speedup else "", str(standing.aim or ""), reached,
        percent(ours.roof_share) if ours and ours.roof_share else "",
    )  # fmt: skip


def _with_setting(row: Row | None) -> str:
    if row is None:
        return ""
    graph = " graph" if row.provider.endswith("-graph") else " compiled" if row.provider.endswith("-compile") else ""
    setting = " ".join(s for s in (row.dtype, row.layout) if s != "-") + graph
    return f"{duration(us(row))} ({setting.strip()})" if setting.strip() else duration(us(row))


def _why_not(standing: Standing, providers: Sequence[str]) -> str:
    """The worst that became of `providers`, empty if one was timed."""
    statuses = {row.status for row in standing.rows if row.provider in providers}
    return "" if "timed" in statuses else min(statuses, key=SEVERITY.index, default="")


def replace_block(readme: str, block: str) -> str:
    """Errors: ValueError if the marks are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md: expected {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{block}{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Show a result file.")
    parser.add_argument("file", nargs="?", type=Path, help="a result file; by default the newest of a GPU")
    parser.add_argument("--write-readme", action="store_true", help="put its table into README.md")
    parser.add_argument("--charts", type=Path, metavar="DIR", help="write charts (PNG) there")
    options = parser.parse_args(arguments)
    try:
        path = options.file or newest()
        result = None if path is None else results.load(path)
        if options.write_readme:
            README.write_text(replace_block(README.read_text(), readme_block(result, path)))
        print(readme_block(None) if result is None else markdown(result), end="")
        if options.charts and result is not None:
            from bench.charts import charts

            for chart in charts(result, options.charts):
                print(f"wrote {chart}", file=sys.stderr)
    except (OSError, ValueError) as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
