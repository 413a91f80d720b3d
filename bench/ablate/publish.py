"""Results of tables into docs/ablations.md.

    python -m bench.ablate.publish [FOLDER ...]

FOLDER is the folder of a table (``runs/ablate/NAME``). Its result goes to bench/ablate/results and its chart to
docs/images. The page is made from all results there, those of the small setting and those of COCO. Without a folder
the page alone is written again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.ablate.report import RULE, draw, markdown
from bench.ablate.runs import RESULT, VERSION, settings
from bench.ablate.table import Table, tables
from bench.result import ROOT
from bench.tables import replace_table
from tmask.engine.files import replace_text, replacing

RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "ablations.md"
ENDINGS = {"small": "", "full": "_full"}  # of file names, by the setting of a result


def page(text: str) -> str:
    """Return `text` with the sections of all tables between their marks. Errors: ValueError without the marks."""
    return replace_table(text, "ablations", f"{RULE}\n\n" + "\n".join(map(_section, tables().values())))


def _section(table: Table) -> str:
    blocks = [f"## {table.title}\n\n`tmask ablate {table.name}`\n\n{table.about}\n"]
    for setting, ending in ENDINGS.items():
        path = RESULTS / f"{table.name}{ending}.json"
        if path.is_file():
            heading = "### On COCO\n\n" if setting == "full" else ""
            blocks.append(heading + markdown(table, load(path), chart=f"images/ablate_{path.stem}.png"))
            if setting == "small" and table.finding:
                blocks.append(f"{table.finding}\n")
    if len(blocks) == 1:
        rows = [f"- {variant.label}: {variant.published or 'no figure'}\n" for variant in table.variants.values()]
        blocks.append(f"**Not measured yet.** Published ({table.source}):\n\n{''.join(rows)}")
    return "\n".join(blocks)


def load(path: Path) -> dict[str, Any]:
    """A result. Raises ValueError if its version is another one, or the settings of its table have changed since."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found.get("version") != VERSION or found["table"] not in tables():
        raise ValueError(f"{path}: expected a result of version {VERSION} of one of {', '.join(tables())}")
    table = tables()[found["table"]]
    if found["settings"] != settings(table, table.small if found["setting"] == "small" else table.full):
        raise ValueError(f"{path}: the table {found['table']} has other settings now: run it again")
    return found


def main(folders: Sequence[str]) -> int:
    """Publish the results of some folders, and return the exit code."""
    try:
        for folder in folders:
            result = load(Path(folder) / RESULT)
            stem = result["table"] + ENDINGS[result["setting"]]
            replace_text(RESULTS / f"{stem}.json", json.dumps(result, indent=1) + "\n")
            with replacing(PAGE.parent / "images" / f"ablate_{stem}.png") as file:
                draw(tables()[result["table"]], result, file)
        replace_text(PAGE, page(PAGE.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        print(f"bench.ablate.publish: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
