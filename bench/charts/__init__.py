"""Charts of a result: the speed-up of every case over torchvision, and how near each comes to the machine's roofs.

Drawn for a width of 900 pixels on a white ground, so that they read in a light page and in a dark one. A provider has
one colour everywhere (Okabe and Ito's palette, which the colour-blind can tell apart); a loss has a colour of its own.
"""

from __future__ import annotations

from pathlib import Path

from bench import result as results
from bench.charts.roofline import roofline
from bench.charts.speedup import speedups
from bench.charts.style import DPI, STYLE
from bench.result import Result
from bench.standings import standings


def charts(result: Result, folder: Path) -> list[Path]:
    """Write PNG files into `folder` and name them; none where nothing of a kind was timed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    found = [standing for standing in standings(results.rows(result)) if standing.best()]
    written = []
    with pyplot.rc_context(STYLE):
        for name, draw in (("speedup", speedups), ("roofline", roofline)):
            figure = draw(found, result)
            if figure is None:
                continue
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=DPI)
            pyplot.close(figure)
            written.append(path)
    return written
