"""What the charts have in common: size, colours and the lines at their head."""

from __future__ import annotations

from typing import Any

from bench.result import Result
from bench.standings import machine_line

WIDTH, DPI = 9.0, 200  # inches and dots an inch: twice 900 pixels
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


def head(figure: Any, result: Result, title: str, height: float) -> float:
    """Title, what was measured on, and a warning where no GPU was; the height in inches that is left below them."""
    below = height - 0.3
    figure.text(0.015, below / height, title, fontsize=13, fontweight="bold", va="center")
    if not result["machine"]["gpu"]:
        below -= 0.26
        warning = "CPU, reduced sizes: no statement about the kernels"
        figure.text(0.015, below / height, warning, fontsize=11, fontweight="bold", color=LOSS, va="center")
    below -= 0.24
    line = machine_line(result["machine"])
    figure.text(0.015, below / height, line, fontsize=7, color=GREY, va="center")
    return below - 0.1


def provider_name(provider: str) -> str:
    return {"compile": "torch.compile(reference)", "reference": "reference, eager"}.get(provider, provider)
