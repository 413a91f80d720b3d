"""``tmask validate`` and ``tmask info``: is every op right on this machine, and who serves it.

The truth of a row is the op's reference in float64 on the same, already rounded, inputs.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tmask.checks import nearest
from tmask.engine.log import progress
from tmask.presets import PRESETS
from tmask_kernels import machine
from tmask_kernels.backend import BACKENDS, interpreter_enabled, triton_reasons
from tmask_kernels.testing import TOLERANCES, Inputs, OpSpec, op_specs

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
    """Print each row as soon as it is known, then the failures and the total; or all rows as JSON at the end.

    A run that stops early, as by Ctrl-C, still prints the total of the rows it has.

    Returns:
        1 if a row failed, else 0.

    Raises:
        ValueError: `ops` has an unknown name.
    """
    checks = select_ops(ops)
    width = max(len(check.name) for check in checks)
    how = _how(device)
    print(f"{len(checks)} cases on {device}, {how}{'' if ops else _duration(device)}", file=sys.stderr)
    if not as_json:
        print(
            _line(width, "op", "direction", "backend", "dtype", "max error", "tolerance", "verdict", "note"), flush=True
        )
    rows: list[Row] = []
    done, start = 0, time.monotonic()
    try:
        for check in progress(checks, "validate", "case"):
            for row in _rows(check, device):
                rows.append(row)
                if not as_json:
                    _print_beside_the_bar(_format(width, row))
            done += 1
    finally:
        if as_json:
            print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
        else:
            stopped = f", stopped after {done} of {len(checks)} cases" if done < len(checks) else ""
            print("\n".join([*_failures(rows), f"{_total(rows)} in {time.monotonic() - start:.0f} s ({how}){stopped}"]))
    return int(any(row.verdict == "fail" for row in rows))


def _how(device: torch.device) -> str:
    """How the Triton kernels run on `device`, or why they do not."""
    if reasons := triton_reasons(torch.empty(0, device=device)):
        return f"without Triton: {'; '.join(reasons)}"
    return "Triton through its interpreter" if interpreter_enabled() else "Triton compiled"


def _duration(device: torch.device) -> str:
    """About how long all cases take."""
    if triton_reasons(torch.empty(0, device=device)):
        return ""
    return ": about two minutes" if interpreter_enabled() else ": the first run compiles every kernel"


def _print_beside_the_bar(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line)
    sys.stdout.flush()


def select_ops(ops: Sequence[str] | None) -> list[OpSpec]:
    """The cases of the named ops; all if none is named. Errors: ValueError for an unknown name."""
    specs = op_specs()
    names = {check.name.split()[0] for check in specs}
    for name in ops or ():
        if name not in names:
            raise ValueError(f"ops: expected {nearest(name, names)}, got {name!r}")
    return [check for check in specs if not ops or check.name.split()[0] in ops]


def validate_op(check: OpSpec, device: torch.device) -> list[Row]:
    """All rows of one op on `device`: backend x dtype, forward and (where it has gradients) backward."""
    return list(_rows(check, device))


def _rows(check: OpSpec, device: torch.device) -> Iterator[Row]:
    for dtype in check.dtypes:
        inputs = _inputs(check, dtype, device)
        truth_inputs = {k: v.double() if k in check.features else v for k, v in inputs.items()}
        directions = ("forward", "backward") if check.gradients else ("forward",)
        for direction in directions:
            run = _forward if direction == "forward" else _backward
            truth = run(check, truth_inputs, "reference")
            for backend in NAMES:
                yield from _row(check, direction, backend, dtype, inputs, truth)


def _row(
    check: OpSpec, direction: str, backend: str, dtype: torch.dtype, inputs: Inputs, truth: list[Any]
) -> list[Row]:
    """The row of one backend; none if the op has no such backend."""
    head = (check.name, direction, backend, _DTYPE_NAMES[dtype])
    run = _forward if direction == "forward" else _backward
    try:
        values = run(check, inputs, backend)
    except Exception as error:  # a kernel that does not compile must not hide the other rows
        says = str(error)
        if isinstance(error, ValueError) and "does not exist for this op" in says:
            return []
        if isinstance(error, ValueError) and "cannot serve this call: " in says:
            return [Row(*head, None, None, "skip", says.split("cannot serve this call: ")[1])]
        return [Row(*head, None, None, "fail", _short(f"{type(error).__name__}: {_first_and_last_line(says)}", 120))]
    if len(values) != len(truth):
        return [Row(*head, None, None, "fail", f"{len(values)} outputs, expected {len(truth)}")]
    results = [_compare(value, true) for value, true in zip(values, truth, strict=True)]
    worst = max(results, key=lambda r: (not r[2], r[0] / r[1] if r[1] else r[0]))
    return [Row(*head, worst[0], worst[1], "pass" if worst[2] else "fail", worst[3])]


def _inputs(check: OpSpec, dtype: torch.dtype, device: torch.device) -> Inputs:
    made = check.make()
    return {k: (v.to(device, dtype) if k in check.features else v.to(device)) for k, v in made.items()}


def _forward(check: OpSpec, inputs: Inputs, backend: str) -> list[Any]:
    with torch.no_grad():
        out = check.call(inputs, backend)
    return list(out) if isinstance(out, tuple | list) else [out]


def _backward(check: OpSpec, inputs: Inputs, backend: str) -> list[Any]:
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


def _failures(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each failed row: what was compared, what the tolerance expects, and the error."""
    for row in rows:
        if row.verdict == "fail":
            parts = [row.note] if row.note else []
            if row.max_error is not None:
                parts = [f"expected an error of at most {row.tolerance:.1e}, got {row.max_error:.1e}", *parts]
            yield f"FAIL {row.op}, {row.direction}, {row.backend}, {row.dtype}: {'; '.join(parts)}"


def _total(rows: Sequence[Row]) -> str:
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in ("pass", "fail", "skip")}
    return f"{len(rows)} rows: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items())


def _format(width: int, row: Row) -> str:
    """The row as a line of the table."""
    error = "-" if row.max_error is None else f"{row.max_error:.1e}"
    bound = "-" if row.tolerance is None else f"{row.tolerance:.1e}"
    return _line(width, row.op, row.direction, row.backend, row.dtype, error, bound, row.verdict, _short(row.note, 60))


def _first_and_last_line(text: str) -> str:
    """Triton's compiler says where it failed in the first line, and why in the last, with the kernel between them."""
    lines = [line for line in text.splitlines() if line.strip()]
    return " ... ".join([lines[0], lines[-1]] if len(lines) > 1 else lines)


def _short(text: str, length: int) -> str:
    """The text in one line of at most `length` characters."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _line(width: int, *cells: str) -> str:
    op, direction, backend, dtype, error, bound, verdict, note = cells
    return f"{op:<{width}} {direction:<9} {backend:<11} {dtype:<5} {error:>9} {bound:>9} {verdict:<7} {note}".rstrip()


def describe() -> str:
    """Versions, devices, presets and, for each op, which backends can serve it here and why others cannot."""
    from importlib.metadata import PackageNotFoundError, version

    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    for package in ("tmask", "torch", "torchvision", "numpy", "pycocotools"):
        try:
            lines.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package}: not installed")
    lines.append(machine.triton_fault() or machine.triton_version())
    lines.append(f"cpu: {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        reasons = triton_reasons(torch.empty(0, device=f"cuda:{index}"))
        kind = f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
        lines.append(f"cuda:{index}: {kind}" + "".join(f"; no Triton kernels: {reason}" for reason in reasons))
    if not torch.cuda.device_count():
        lines.append(f"cuda: {machine.cuda_fault() or 'no GPU'}")
    if torch.backends.mps.is_available():
        lines.append("mps: ops take MPS tensors and serve them by the reference; tmask's commands run on the CPU")
    lines.append(f"presets: {', '.join(PRESETS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines.append(f"backends on {device}, the first is what auto takes:")
    notes: list[str] = []
    for check in op_specs():
        lines.append(f"  {check.name:<26} {_backends(check, device, notes)}")
    return "\n".join(lines + [f"[{number}] {note}" for number, note in enumerate(notes, start=1)])


def _backends(check: OpSpec, device: torch.device, notes: list[str]) -> str:
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
