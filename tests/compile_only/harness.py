"""Budgets of Triton kernels, checked without a GPU: what a kernel should cost by its design, and what it does cost.

A file `test_<op>.py` beside this one lists `CASES` (a kernel, its argument types, the `Target` of its design) and calls
`check` for each case and architecture. Two things turn a test red:

- a rule: no spills, no scratch, no TF32 in fp32 arithmetic, accesses as wide as the target, or of `WIDE` bytes a warp,
  in cases that are `wide`;
- the ratchet: docs/compile-budgets.md records every figure, and none may become worse. A better one is recorded too.

The page records Triton `BASE` in full. Of a later version it records the cases that are worse there than under `BASE`.
A version without such rows is held to the newest older one.

A target that is missed is named in that page. Record new figures with
``TRITON_INTERPRET=0 python -m tests.compile_only.harness --write``, under `BASE` and then under the later versions. It
refuses worse ones: a row that has to become worse is deleted by hand first, so that it shows in a review.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.compile_only.resources import ARCHES, Resources, compile_kernel

FOLDER = Path(__file__).parent
TABLE = FOLDER.parents[1] / "docs" / "compile-budgets.md"
BASE = "3.6"  # the oldest Triton that the package takes


@dataclass(frozen=True, kw_only=True)
class Chip:
    """What a target reckons with. A unit (SM or CU) has four parts, each with 512 registers for every lane of a warp.

    `units` and `gbps` (memory) are data-sheet figures, `shared` bytes a unit.
    """

    units: int
    gbps: int
    shared: int
    lanes: int = 32
    max_warps: int = 64

    def warps(self, registers: int, shared: int, num_warps: int) -> int:
        """Warps resident on a unit. Registers are allotted by 8, shared memory with 1 KiB of the system's a program."""
        by_registers = 4 * (512 // _round_up(max(registers, 1), 8))
        programs = min(by_registers, self.max_warps) // num_warps
        return num_warps * min(programs, self.shared // (shared + 1024))

    def warps_wanted(self, bytes_in_flight: int) -> int:
        """Warps a unit needs to keep the memory busy when each thread has so many bytes under way (Little's law).

        Bytes under way = bandwidth x latency; 1 us is about the latency of a loaded memory, twice that of an idle one.
        """
        return min(self.max_warps, -(-self.gbps * 1000 // (self.units * self.lanes * bytes_in_flight)))


CHIPS = {
    "sm_80": Chip(units=108, gbps=2_039, shared=164 * 1024),  # A100 80 GB SXM
    "sm_90": Chip(units=132, gbps=3_350, shared=228 * 1024),  # H100 SXM
    "sm_100": Chip(units=148, gbps=8_000, shared=228 * 1024),  # B200
    "gfx942": Chip(units=304, gbps=5_300, shared=64 * 1024, lanes=64, max_warps=32),  # MI300X
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a kernel should cost by its design, set by formula before its figures are known; None sets no target.

    `load_bytes`, `store_bytes`, `atomic_bytes`: widest access of a thread. `trips[d]`: how often code inside d nested
    loops runs, and `outputs`: output elements of a thread; they turn the loads of the text into those executed per
    output element, whose target is `loads_per_output`. Where data decides how often a loop runs, there are no `trips`
    and the target is `loads`, the load instructions in the text.
    `bytes_in_flight`: bytes a thread requests before it waits; decides how many warps are wanted.
    """

    registers: int
    shared: int = 0
    load_bytes: int
    store_bytes: int | None = None
    atomic_bytes: int | None = None
    loads: int | None = None
    trips: tuple[int, ...] | None = None
    outputs: float = 1
    loads_per_output: float | None = None
    bytes_in_flight: int | None = None


WIDE = 512  # bytes of a warp's access: 16 a lane on NVIDIA, 8 on AMD

# Registers of a program whatever its tile: position, counters, masks, sizes that are computed and not arguments.
SCALARS = 16


def registers(*, values: int, bytes_in_flight: int = 0, pointers: int) -> int:
    """Registers of a thread that keeps so many 32-bit values, bytes being loaded and 64-bit addresses at one time."""
    return min(255, _round_up(values + -(-bytes_in_flight // 4) + 2 * pointers + SCALARS, 8))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class Case:
    """One compiled variant. `signature` maps run-time arguments to types ("*fp32", "i32", "fp32"...).

    Like Triton's launcher, give an integer argument that is 1 as a constexpr, and name pointers and integers that are
    multiples of 16 in `divisible_by_16`. A tuple argument takes a tuple of types; in it "=1" is an integer known to be
    1, and its name in `divisible_by_16` holds for all its members. `enable_fp_fusion` is the launch option: False where
    products and sums must round one by one; `max_registers` is one too, of NVIDIA alone. `target` maps one of
    ``ARCHES`` to the target there.

    `fp32` says that the arithmetic must be full fp32: no TF32 is allowed. `wide` makes the target's widths a rule.
    `known_spills` are bytes that NVIDIA's architectures may spill all the same, with a comment why.
    """

    name: str
    kernel: Any
    signature: Mapping[str, Any]
    constexprs: Mapping[str, Any]
    target: Callable[[str], Target]
    divisible_by_16: Sequence[str] = ()
    num_warps: int = 4
    num_stages: int | None = None
    enable_fp_fusion: bool = True
    max_registers: int | None = None
    fp32: bool = True
    wide: bool = False
    known_spills: int = 0
    arches: Sequence[str] = field(default=ARCHES)


def compile_case(case: Case, arch: str) -> Resources:
    """`compile_kernel` with the fields of `case`."""
    return compile_kernel(
        case.kernel,
        case.signature,
        case.constexprs,
        divisible_by_16=case.divisible_by_16,
        arch=arch,
        num_warps=case.num_warps,
        num_stages=case.num_stages,
        enable_fp_fusion=case.enable_fp_fusion,
        max_registers=case.max_registers,
    )


@dataclass(frozen=True)
class Figure:
    """A measured number and its target, if it has one. `more`: larger is better; None: neither is."""

    actual: float | None
    goal: float | None = None
    more: bool | None = False

    def __str__(self) -> str:
        return "-" if self.actual is None else f"{self.actual:g}" + ("" if self.goal is None else f" / {self.goal:g}")

    @property
    def missed(self) -> bool:
        return self.goal is not None and self.actual is not None and self.worse_than(self.goal)

    def worse_than(self, other: float) -> bool:
        assert self.actual is not None
        return self.more is not None and (self.actual < other if self.more else self.actual > other)


def figures(case: Case, arch: str, got: Resources) -> dict[str, Figure]:
    """Every figure of a compiled case by its column in the table."""
    target, chip = case.target(arch), CHIPS[arch]
    executed = None
    if target.trips is not None:
        trips = [*target.trips, *[target.trips[-1]] * len(got.loads)]  # a loop around nothing that the target foresees
        executed = sum(n * times for n, times in zip(got.loads, trips, strict=False)) / target.outputs
    wanted = None if target.bytes_in_flight is None else chip.warps_wanted(target.bytes_in_flight)
    amd = arch.startswith("gfx")
    rows = {("VGPRs" if amd else "registers"): Figure(got.registers, target.registers)}
    if amd:
        rows |= {"AGPRs": Figure(got.agprs), "SGPRs": Figure(got.sgprs, more=None), "scratch": Figure(got.scratch, 0)}
    return rows | {
        "spills": Figure(got.spills, 0),
        ("LDS" if amd else "shared"): Figure(got.shared, target.shared),
        "load width": Figure(got.load_bytes, target.load_bytes, more=True),
        "store width": Figure(got.store_bytes, target.store_bytes, more=True),
        "atomic width": Figure(got.atomic_bytes, target.atomic_bytes, more=True),
        # An unrolled loop has more loads in its text and executes no more: where those are known, they count.
        "loads": Figure(sum(got.loads), target.loads, more=False if target.trips is None else None),
        "loads an output": Figure(_round(executed), _round(target.loads_per_output)),
        "warps": Figure(chip.warps(got.registers, got.shared, case.num_warps), wanted, more=True),
    }


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def every(cases: Iterable[Case]) -> pytest.MarkDecorator:
    """Parametrise a test ``(case, arch)`` over each case and each of its architectures."""
    pairs = [(case, arch) for case in cases for arch in case.arches]
    return pytest.mark.parametrize(("case", "arch"), pairs, ids=[f"{c.name}-{a}" for c, a in pairs])


def check(case: Case, arch: str) -> None:
    """Assert the rules for `case` compiled for `arch`, and that the table in docs/ records these figures."""
    got = compile_case(case, arch)
    found = figures(case, arch, got)
    where = f"{case.name} {arch}"
    assert got.spills <= case.known_spills, f"{where} spills: {got}"
    assert got.scratch == 0, f"{where} uses scratch memory: {got}"
    assert not (case.fp32 and got.uses_tf32), f"{where} computes in TF32"
    for name in ("load width", "store width", "atomic width"):
        width = found[name]
        wide = not width.missed or (width.actual or 0) * CHIPS[arch].lanes >= WIDE
        assert wide or not case.wide, f"{where}: {name} {width}, a rule"
    rows, version = recorded(), record()
    before = rows.get((case.name, arch, version)) or rows.get((case.name, arch, BASE))
    worse = complaints(f"{where}, Triton {version}", found, numbers(before))
    assert not worse, "\n".join(worse)
    row = table_row(case, arch, version, found, rows)
    assert version != running() or row == rows.get((case.name, arch, version)), (
        f"not worse than recorded, but this is not the row of {TABLE.name} for Triton {version}; "
        f"run TRITON_INTERPRET=0 python -m tests.compile_only.harness --write\n{row}"
    )


def complaints(where: str, found: Mapping[str, Figure], before: Mapping[str, float]) -> list[str]:
    """A line for each figure that is worse than the one recorded."""
    return [
        f"worse than recorded: {where}: {name} {figure.actual:g}, was {before[name]:g}"
        for name, figure in found.items()
        if name in before and figure.actual is not None and figure.worse_than(before[name])
    ]


def all_cases() -> list[Case]:
    """The `CASES` of every test file in this folder, in the order of the files."""
    cases: list[Case] = []
    for path in sorted(FOLDER.glob("test_*.py")):
        cases += getattr(importlib.import_module(f"tests.compile_only.{path.stem}"), "CASES", [])
    return cases


Row = dict[str, str]  # the cells of a line by column


def recorded() -> dict[tuple[str, str, str], Row]:
    """The lines of docs/compile-budgets.md by case, architecture and Triton version."""
    return _recorded(TABLE.read_text()) if TABLE.exists() else {}


@functools.cache
def _recorded(text: str) -> dict[tuple[str, str, str], Row]:
    found = {}
    columns: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "variant":
            columns = cells
        elif line.startswith("| "):
            arch, _, version = cells[1].partition(" Triton ")
            found[cells[0], arch, version or BASE] = dict(zip(columns, cells, strict=True))
    return found


def numbers(row: Row | None) -> dict[str, float]:
    """The figures of a row, without their targets."""
    cells = list((row or {}).items())[2:-1]
    return {name: float(cell.split(" / ")[0]) for name, cell in cells if not cell.startswith("-")}


def running() -> str:
    """The installed Triton, as "3.6"."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def record() -> str:
    """The version whose figures the installed Triton is held to: the newest recorded one that is no newer."""

    def place(version: str) -> list[int]:
        return [int(part) for part in version.split(".")]

    older = [version for _, _, version in recorded() if place(version) <= place(running())]
    return max(older, key=place, default=BASE)


def table_row(
    case: Case, arch: str, version: str, found: Mapping[str, Figure], rows: Mapping[tuple[str, str, str], Row]
) -> Row | None:
    """The row of a compiled case: actual / target, and what missed its target. None if that of `BASE` covers it."""
    if version != BASE:
        if not complaints("", found, numbers(rows.get((case.name, arch, BASE)))):
            return None
        arch += f" Triton {version}"
    missed = ", ".join(name for name, figure in found.items() if figure.missed)
    return {"variant": case.name, "arch": arch} | {name: str(f) for name, f in found.items()} | {"missed": missed}


def table_head() -> str:
    """The text of docs/compile-budgets.md above its tables."""
    return f"""# Compile budgets

What each Triton kernel takes when compiled for each architecture, as `actual / target`. Targets come from the design
of a kernel, by formulas beside its cases in `tests/compile_only`; they are not raised when they are missed: the last
column names what is. The figures are those of Triton {BASE}; where a later version makes one worse, a row of that
version follows. Made without a GPU, under each version, by

    TRITON_INTERPRET=0 python -m tests.compile_only.harness --write

and held by `make test-compile`: channels_last features move 512 bytes a warp in an access, 16 a thread on NVIDIA, fp32
arithmetic is no TF32, scratch is 0, and no figure becomes worse than it stands here. Spills are 0 but for a few bytes,
which the column `missed` names and a comment beside the case explains. The cases that take the most also compile for
sm_86, sm_89 and sm_120 (RTX 30, 40 and 50) without further spills, in less than the 99 KiB of shared memory that a
program has there. [How targets are set](performance.md).

Widths are bytes a thread moves in its widest access. `loads` are global load instructions in the program text,
`loads an output` those executed per output element (`-` where data decides how often a loop runs). `warps` are those
that fit on an SM or CU, and the number wanted so that enough bytes are under way to keep the memory busy.
"""


def write_table(compile_one: Callable[[Case, str], Resources] = compile_case) -> None:
    """Compile every case and write docs/compile-budgets.md. Errors: SystemExit if a figure became worse."""
    rows, version, worse = dict(recorded()), running(), []
    for case in all_cases():
        for arch in case.arches:
            found = figures(case, arch, compile_one(case, arch))
            before = rows.pop((case.name, arch, version), None)
            worse += complaints(f"{case.name} {arch}", found, numbers(before))
            if row := table_row(case, arch, version, found, rows):
                rows[case.name, arch, version] = row
    if worse:
        raise SystemExit("\n".join([*worse, f"nothing written; a row that has to become worse is deleted in {TABLE}"]))
    parts: dict[bool, list[str]] = {False: [], True: []}
    for case in all_cases():
        for key in [key for arch in case.arches for key in sorted(rows) if key[:2] == (case.name, arch)]:
            part = parts[key[1].startswith("gfx")]
            if not part:
                part += ["| " + " | ".join(rows[key]) + " |", "|" + "---|" * len(rows[key])]
            part.append("| " + " | ".join(rows[key].values()) + " |")
    nvidia, amd = ("\n".join(part) for part in parts.values())
    TABLE.write_text(
        f"{table_head()}\n## NVIDIA: sm_80 A100, sm_90 H100 and H200, sm_100 B200\n\n{nvidia}\n\n"
        f"## AMD: gfx942 MI300\n\nFrom the amdgcn text. VGPRs include AGPRs.\n\n{amd}\n"
    )


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("usage: TRITON_INTERPRET=0 python -m tests.compile_only.harness --write")
    os.environ["TRITON_INTERPRET"] = "0"
    # Run as a script this file is `__main__`; the cases are built from its importable copy.
    importlib.import_module("tests.compile_only.harness").write_table()
