"""Size and colours of all charts."""

WIDTH, DPI = 9.0, 200  # inches, and dots an inch: twice 900 pixels
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
