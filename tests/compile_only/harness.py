"""Budgets of Triton kernels, checked without a GPU: what each compiled variant may take.

The variants are those that the `BUDGETS` of the ops launch (record.py). Two things turn a test red:

- a rule: no spills but `KNOWN_SPILLS`, no scratch, no plain TF32, accesses of 512 bytes a warp where a case is `wide`;
- the ratchet: docs/compile-budgets.md records every figure, and none may become worse. A better one is recorded too.

The page records Triton `BASE` in full. Of a later version it records the rows that are worse there than under `BASE`.
A version without such rows is held to the newest older one.

Record new figures with ``TRITON_INTERPRET=0 python -m tests.compile_only.harness --write``, under `BASE` and then under
the later versions. The command refuses worse figures: delete a row by hand that has to become worse, so that a review
sees it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.compile_only.record import Case, cases
from tests.compile_only.resources import Resources, compile_kernel

TABLE = Path(__file__).parents[2] / "docs" / "compile-budgets.md"
BASE = "3.6"  # the oldest Triton that the package takes
ARCHES = ("sm_80", "sm_90", "sm_100", "gfx942")  # NVIDIA A100, H100 and H200, B200, and AMD MI300
WIDE = 512  # bytes of a warp's access: 16 a lane on NVIDIA, 8 on AMD

# Bytes that NVIDIA's architectures may spill all the same, and why.
KNOWN_SPILLS = {
    "batched_nms: padded_nms": (
        22,
        "B200, Triton 3.8: stored and loaded once a block of boxes, outside the loops over IoUs; MI300: see the next",
    ),
    "nms: padded_nms": (16, "MI300: strides and pointers that the sort alone reads wait in a vector register"),
    "padded_nms: padded_nms": (24, "the same"),
    "padded_nms (long segments): step": (48, "Triton 3.8: stored once, beside the 64 words of bits a thread holds"),
    "batched_nms (long segments): step": (64, "the same"),
    # But for H100 and B200, whose products read shared memory. More registers would cost a third of the programs there.
    **{
        f"multiscale_roi_align ({name}: gather": (spills, "A100, RTX, MI300: a product's bins stand in registers")
        for name, spills in {
            "7x7, channels_last) bf16": 8,
            "7x7, channels_last) fp16": 8,
            "7x7, channels_last, adaptive) bf16": 24,
            "7x7, channels_last, bicubic) bf16": 24,
            "7x7, channels_last, bicubic, adaptive) bf16": 16,
            "14x14, channels_last) bf16": 48,
            "7x7, contiguous) fp32": 8,
            "7x7, contiguous, no gradient to boxes) bf16": 16,
            "7x7, contiguous, adaptive) bf16": 16,
            "7x7, contiguous, adaptive) fp32": 4,
            "7x7, contiguous, bicubic) fp32": 8,
        }.items()
    },
}

Row = dict[str, str]  # the cells of a line by column
Key = tuple[str, str, str]  # the case, the architecture and the Triton version of a line


@dataclass(frozen=True)
class Figure:
    """A measured number. `more`: larger is better; None: neither is."""

    actual: float
    more: bool | None = False

    def worse_than(self, other: float) -> bool:
        return self.more is not None and (self.actual < other if self.more else self.actual > other)


def figures(arch: str, got: Resources) -> dict[str, Figure]:
    """Every figure of a compiled case by its column in the table."""
    amd = arch.startswith("gfx")
    rows = {("VGPRs" if amd else "registers"): Figure(got.registers)}
    if amd:
        rows |= {"AGPRs": Figure(got.agprs), "SGPRs": Figure(got.sgprs, more=None), "scratch": Figure(got.scratch)}
    return rows | {
        "spills": Figure(got.spills),
        ("LDS" if amd else "shared"): Figure(got.shared),
        "load width": Figure(got.load_bytes, more=True),
        "store width": Figure(got.store_bytes, more=True),
        "atomic width": Figure(got.atomic_bytes, more=True),
        "loads": Figure(got.loads),
    }


def check(case: Case, arch: str) -> None:
    """Assert the rules for `case` compiled for `arch`, and that the table in docs/ records these figures."""
    got = compile_kernel(case.launch, arch)
    check_rules(case, arch, got)
    found, rows, version = figures(arch, got), recorded(), record()
    before = rows.get((case.name, arch, version)) or rows.get((case.name, arch, BASE))
    worse = complaints(f"{case.name} {arch}, Triton {version}", found, numbers(before))
    assert not worse, "\n".join(worse)
    row = table_row(case, arch, version, found, rows)
    assert version != running() or row == rows.get((case.name, arch, version)), (
        f"not worse than recorded, but this is not the row of {TABLE.name} for Triton {version}; "
        f"run TRITON_INTERPRET=0 python -m tests.compile_only.harness --write\n{row}"
    )


def check_rules(case: Case, arch: str, got: Resources) -> None:
    """Assert what no record can lower: spills, scratch, plain TF32, and the width of accesses."""
    known, _ = KNOWN_SPILLS.get(case.name, (0, ""))
    assert got.spills <= known, f"{case.name} {arch} spills: {got}"
    assert got.scratch == 0, f"{case.name} {arch} uses scratch memory: {got}"
    assert not got.uses_tf32, f"{case.name} {arch} computes in TF32"
    lanes = 64 if arch.startswith("gfx") else 32
    for access in case.wide.split():
        width = getattr(got, f"{access}_bytes")
        assert width * lanes >= WIDE, f"{case.name} {arch}: {access} width {width}, a rule"


def complaints(where: str, found: Mapping[str, Figure], before: Mapping[str, float]) -> list[str]:
    """A line for each figure that is worse than the one recorded."""
    return [
        f"worse than recorded: {where}: {name} {figure.actual:g}, was {before[name]:g}"
        for name, figure in found.items()
        if name in before and figure.worse_than(before[name])
    ]


def recorded() -> dict[Key, Row]:
    """The lines of docs/compile-budgets.md."""
    return _recorded(TABLE.read_text()) if TABLE.exists() else {}


@functools.cache
def _recorded(text: str) -> dict[Key, Row]:
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
    """The figures of a row."""
    return {name: float(cell) for name, cell in list((row or {}).items())[2:]}


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


def table_row(case: Case, arch: str, version: str, found: Mapping[str, Figure], rows: Mapping[Key, Row]) -> Row | None:
    """The row of a compiled case. None if the row of `BASE` covers it."""
    if version != BASE:
        if not complaints("", found, numbers(rows.get((case.name, arch, BASE)))):
            return None
        arch += f" Triton {version}"
    return {"variant": case.name, "arch": arch} | {name: f"{f.actual:g}" for name, f in found.items()}


def table_head() -> str:
    """The text of docs/compile-budgets.md above its tables."""
    return f"""# Compile budgets

What each Triton kernel takes when compiled for each architecture. A row is a case of an op (`BUDGETS` of its
`example.py`), the dtype of its features, and the kernel that it launches; a variant that several cases launch has one
row. The figures are those of Triton {BASE}; where a later version makes one worse, a row of that version follows. Made
without a GPU, under each version, by

    TRITON_INTERPRET=0 python -m tests.compile_only.harness --write

and held by `make test-compile`: no figure becomes worse than it is here, fp32 is never plain TF32, scratch is 0, and
the accesses that a case calls `wide` move 512 bytes a warp, 16 a thread on NVIDIA. Spills are 0 but for a few bytes
that `tests/compile_only/harness.py` lists with their reasons. The cases that take the most also compile for sm_86,
sm_89 and sm_120 (RTX 30, 40 and 50) without further spills, in less than the 99 KiB of shared memory that a program has
there.

Widths are bytes a thread moves in its widest access. `loads` are global load instructions in the program text.
"""


def write_table() -> None:
    """Compile every case and write docs/compile-budgets.md. Errors: SystemExit if a figure became worse."""
    old, version, worse = recorded(), running(), []
    rows: dict[Key, Row] = {}
    for case in cases():
        for arch in ARCHES:
            rows |= {key: row for key, row in old.items() if key[:2] == (case.name, arch) and key[2] != version}
            found = figures(arch, compile_kernel(case.launch, arch))
            worse += complaints(f"{case.name} {arch}", found, numbers(old.get((case.name, arch, version))))
            if row := table_row(case, arch, version, found, rows):
                rows[case.name, arch, version] = row
    if worse:
        raise SystemExit("\n".join([*worse, f"nothing written; a row that has to become worse is deleted in {TABLE}"]))
    parts: dict[bool, list[str]] = {False: [], True: []}
    for key in sorted(rows, key=lambda key: ([case.name for case in cases()].index(key[0]), ARCHES.index(key[1]), key)):
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
    if not cases():
        raise SystemExit("TRITON_INTERPRET is set: kernels cannot be compiled in this process")
    write_table()
