"""Results of tables into docs/ablations.md.

    python -m bench.ablate.publish [FOLDER ...]

FOLDER is that of a table (``runs/ablate/NAME``): its result goes to bench/ablate/results and its chart to docs/images;
that of the small setting and that of COCO stand beside each other.
The page is made of what is there, so without a folder it is only written anew.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.ablate import table as tables
from bench.ablate.chart import draw
from bench.ablate.outcome import VERSION, shared
from bench.ablate.report import RESULT, markdown
from bench.ablate.verdict import RULE
from bench.rows import ROOT
from tmask.engine.files import replace_text, replacing

RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "ablations.md"
BEGIN, END = "<!-- ablate:begin -->", "<!-- ablate:end -->"

HEADING = {"small": "", "full": "### On COCO\n\n"}  # by the setting of a result


def page(text: str, results: Path = RESULTS) -> str:
    """`text` with what stands between its marks made anew. Errors: ValueError if the marks are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"docs/ablations.md: expected {BEGIN} and {END}")
    blocks = [_section(name, results) for name in tables.names()]
    return f"{before}{BEGIN}\n{RULE}\n\n{chr(10).join(blocks)}{END}{after}"


def _section(name: str, results: Path) -> str:
    table = tables.load(name)
    head = f"## {table.title}\n\n`tmask ablate {name}`\n\n{table.about}\n\n"
    found = {setting: path for setting in HEADING if (path := results / f"{_stem(name, setting)}.json").is_file()}
    if found:
        blocks = [
            HEADING[setting] + markdown(table, load(path), chart=f"images/ablate_{path.stem}.png")
            for setting, path in found.items()
        ]
        if table.finding and "small" in found:
            blocks.insert(1, f"{table.finding}\n")
        return head + "\n".join(blocks)
    rows = [f"- {variant.label}: {variant.published or 'no figure'}" for variant in table.variants.values()]
    published = "\n".join([f"Published ({table.source}):", "", *rows])
    return f"{head}**Not measured yet.** {published}\n"


def _stem(name: str, setting: str) -> str:
    return name if setting == "small" else f"{name}_{setting}"


def load(path: Path) -> dict[str, Any]:
    """A result of its table as it is now. Errors: ValueError for one of another version or other settings."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found.get("version") != VERSION or found["table"] not in tables.names():
        raise ValueError(f"{path}: expected a result of version {VERSION} of one of {', '.join(tables.names())}")
    table = tables.load(found["table"])
    if found["settings"] != shared(table, table.small if found["setting"] == "small" else table.full):
        raise ValueError(f"{path}: the table {found['table']} has other settings now: run it again")
    return found


def main(arguments: Sequence[str]) -> int:
    """Take the results of some folders over and write the page; gives the exit code."""
    try:
        for folder in arguments:
            result = load(Path(folder) / RESULT)
            stem = _stem(result["table"], result["setting"])
            replace_text(RESULTS / f"{stem}.json", json.dumps(result, indent=1) + "\n")
            with replacing(PAGE.parent / "images" / f"ablate_{stem}.png") as file:
                draw(tables.load(result["table"]), result, file)
        replace_text(PAGE, page(PAGE.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        print(f"bench.ablate.publish: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
