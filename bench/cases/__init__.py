"""The standard work: one file an op, with sizes, inputs, least bytes and flops, aims, peers and the check.

`pytest bench/cases/nms.py` measures one op. Letters: N images, K boxes of an image, C channels, S segments, H W sides
in pixels.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from bench.cases._model import CASES as MODEL_CASES
from bench.cases._shared import Case
from bench.contest import Contest

CASES: dict[str, Case] = {}
SWEEPS: dict[str, Callable[[], Contest]] = {}  # launch configurations of a kernel beside each other
for _file in sorted(Path(__file__).parent.glob("[!_]*.py")):
    _module = importlib.import_module(f"{__name__}.{_file.stem}")
    CASES |= getattr(_module, "CASES", {})
    SWEEPS |= getattr(_module, "SWEEPS", {})
CASES |= MODEL_CASES
