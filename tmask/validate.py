"""``tmask validate`` and ``tmask info``: is every op right on this machine, and who serves it.

The truth of a row is the op's reference in float64 on the same, already rounded, inputs. Without a GPU the Triton
kernels need the interpreter, which must be switched on before Python starts: then a second process does the work.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tmask.op_checks import OP_CHECKS, Inputs, OpCheck
from tmask.presets import PRESETS
from tmask_kernels.backend import BACKENDS, interpreter_enabled
from tmask_kernels.testing import TOLERANCES

NAMES = tuple(name for name in BACKENDS if name != "auto")
_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Row:
    """One comparison. `max_error` and `tolerance` are relative to the largest true value (at least 1); for integers
    and masks `max_error` counts the elements that differ."""

    op: str
    direction: str  # forward or backward
    backend: str
    dtype: str
    max_error: float | None
    tolerance: float | None
    verdict: str  # pass, fail or skip
    note: str = ""


def run_validation(device: torch.device, *, ops: Sequence[str] | None = None, as_json: bool = False) -> int:
    """Print the table of all rows (or JSON); 1 if any failed, else 0. Errors: ValueError for an unknown op."""
    checks = select_ops(ops)
    if device.type == "cpu" and not interpreter_enabled():
        command = [sys.executable, "-m", "tmask", "validate", "--device", "cpu"]
        command += ["--json"] if as_json else []
        command += ["--ops", json.dumps(list(ops))] if ops else []
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False).returncode
    rows = [row for check in checks for row in validate_op(check, device)]
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    else:
        print(format_rows(rows))
    return int(any(row.verdict == "fail" for row in rows))


def select_ops(ops: Sequence[str] | None) -> list[OpCheck]:
    """The cases of the named ops; all if none is named. Errors: ValueError for an unknown name."""
    names = {check.name.split()[0] for check in OP_CHECKS}
    for name in ops or ():
        if name not in names:
            raise ValueError(f"ops: expected some of {', '.join(sorted(names))}, got {name!r}")
    return [check for check in OP_CHECKS if not ops or check.name.split()[0] in ops]


def validate_op(check: OpCheck, device: torch.device) -> list[Row]:
    """All rows of one op on `device`: backend x dtype, forward and (where it has gradients) backward."""
    rows = []
    for dtype in check.dtypes:
        inputs = _inputs(check, dtype, device)
        truth_inputs = {k: v.double() if k in check.features else v for k, v in inputs.items()}
        directions = ("forward", "backward") if check.gradients else ("forward",)
        for direction in directions:
            run = _forward if direction == "forward" else _backward
            truth = run(check, truth_inputs, "reference")
            for backend in NAMES:
                rows += _row(check, direction, backend, dtype, inputs, truth)
    return rows


def _row(
    check: OpCheck, direction: str, backend: str, dtype: torch.dtype, inputs: Inputs, truth: list[Any]
) -> list[Row]:
    """The row of one backend; none if the op has no such backend."""
    head = (check.name, direction, backend, _DTYPE_NAMES[dtype])
    run = _forward if direction == "forward" else _backward
    try:
        values = run(check, inputs, backend)
    except ValueError as error:
        if "does not exist for this op" in str(error):
            return []
        if "cannot serve this call" in str(error):
            return [Row(*head, None, None, "skip", str(error).split("cannot serve this call: ")[1])]
        return [Row(*head, None, None, "fail", f"ValueError: {error}")]
    except Exception as error:  # a kernel that does not compile must not hide the other rows
        return [Row(*head, None, None, "fail", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")]
    if len(values) != len(truth):
        return [Row(*head, None, None, "fail", f"{len(values)} outputs, expected {len(truth)}")]
    results = [_compare(value, true) for value, true in zip(values, truth, strict=True)]
    worst = max(results, key=lambda r: (not r[2], r[0] / r[1] if r[1] else r[0]))
    return [Row(*head, worst[0], worst[1], "pass" if worst[2] else "fail", worst[3])]


def _inputs(check: OpCheck, dtype: torch.dtype, device: torch.device) -> Inputs:
    made = check.make()
    return {k: (v.to(device, dtype) if k in check.features else v.to(device)) for k, v in made.items()}


def _forward(check: OpCheck, inputs: Inputs, backend: str) -> list[Any]:
    with torch.no_grad():
        out = check.call(inputs, backend)
    return list(out) if isinstance(out, tuple | list) else [out]


def _backward(check: OpCheck, inputs: Inputs, backend: str) -> list[Any]:
    """Gradients of the first output, weighted by seeded random numbers, to the inputs that take them."""
    leaves = {k: v.detach().clone().requires_grad_(k in check.gradients) for k, v in inputs.items()}
    out = check.call(leaves, backend)
    out = out[0] if isinstance(out, tuple) else out
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    # Through bf16, so that every dtype (and the truth) gets the same weights.
    weights = weights.to(torch.bfloat16).to(out.device, out.dtype)
    return list(torch.autograd.grad(out, [leaves[name] for name in check.gradients], weights))


def _compare(value: Any, truth: Any) -> tuple[float, float, bool, str]:
    """Largest error, tolerance, verdict and a note. Floats by `TOLERANCES` of their dtype, all else must be equal."""
    if not isinstance(value, Tensor):
        return (0.0, 0.0, True, "") if value == truth else (1.0, 0.0, False, "values differ")
    if value.shape != truth.shape:
        return 0.0, 0.0, False, f"shape {tuple(value.shape)}, expected {tuple(truth.shape)}"
    if not value.is_floating_point():
        different = int((value != truth).sum())
        return float(different), 0.0, different == 0, f"{different} of {value.numel()} differ" if different else ""
    tolerance = TOLERANCES[value.dtype]
    a, e = value.double(), truth.double()
    if not (torch.isfinite(a).all() and torch.isfinite(e).all()):
        return float("inf"), tolerance.max, False, "a value is not finite"
    if not a.numel():
        return 0.0, tolerance.max, True, ""
    scale = max(1.0, float(e.abs().max()))
    worst, rms = float((a - e).abs().max()) / scale, float((a - e).square().mean().sqrt()) / scale
    note = f"rms {rms:.1e} over {tolerance.rms:.1e}" if rms > tolerance.rms else ""
    return worst, tolerance.max, worst <= tolerance.max and not note, note


def format_rows(rows: Sequence[Row]) -> str:
    """The rows as a text table, and a last line that counts the verdicts."""
    width = max([len(row.op) for row in rows] + [2])
    header = ("op", "direction", "backend", "dtype", "max error", "tolerance", "verdict", "note")
    lines = [_line(width, *header)]
    for row in rows:
        error = "-" if row.max_error is None else f"{row.max_error:.1e}"
        bound = "-" if row.tolerance is None else f"{row.tolerance:.1e}"
        lines.append(_line(width, row.op, row.direction, row.backend, row.dtype, error, bound, row.verdict, row.note))
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in ("pass", "fail", "skip")}
    how = "Triton through its interpreter" if interpreter_enabled() else "Triton compiled"
    total = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return "\n".join([*lines, f"{len(rows)} rows: {total} ({how})"])


def _line(width: int, *cells: str) -> str:
    op, direction, backend, dtype, error, bound, verdict, note = cells
    return f"{op:<{width}} {direction:<9} {backend:<11} {dtype:<5} {error:>9} {bound:>9} {verdict:<7} {note}".rstrip()


def describe() -> str:
    """Versions, devices, presets and, for each op, which backends can serve it here and why others cannot."""
    from importlib.metadata import PackageNotFoundError, version

    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    for package in ("tmask", "torch", "triton", "torchvision", "numpy", "pycocotools"):
        try:
            lines.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package}: not installed")
    lines.append(f"cpu: {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(f"cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.device_count():
        lines.append("cuda: no GPU")
    lines.append(f"presets: {', '.join(PRESETS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines.append(f"backends on {device}, the first is what auto takes:")
    notes: list[str] = []
    for check in OP_CHECKS:
        lines.append(f"  {check.name:<26} {_backends(check, device, notes)}")
    return "\n".join(lines + [f"[{number}] {note}" for number, note in enumerate(notes, start=1)])


def _backends(check: OpCheck, device: torch.device, notes: list[str]) -> str:
    """The backends that serve this op, in auto's order, then those that do not, with the numbers of their reasons."""
    inputs = _inputs(check, torch.float32, device)
    truth = _forward(check, inputs, "reference")
    order = ("triton", "reference", "torchvision") if device.type == "cuda" else ("torchvision", "reference", "triton")
    rows = [row for backend in order for row in _row(check, "forward", backend, torch.float32, inputs, truth)]
    serving = [row.backend + (" (WRONG: see tmask validate)" if row.verdict == "fail" else "") for row in rows
               if row.verdict != "skip"]  # fmt: skip
    refusing = []
    for row in rows:
        if row.verdict == "skip":
            if row.note not in notes:
                notes.append(row.note)
            refusing.append(f"; not {row.backend} [{notes.index(row.note) + 1}]")
    return ", ".join(serving) + "".join(refusing)
