"""The harness reads what it claims to read, and each of its rules can turn red."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.compile_only import harness, resources
from tests.compile_only.harness import ARCHES, BASE, check
from tests.compile_only.probes import copy_kernel, dot_kernel, spill_kernel
from tests.compile_only.record import Case, Launch, cases, variants
from tests.compile_only.resources import Resources, compile_kernel

pytestmark = pytest.mark.compile_only


def launch_of(kernel: Any, *args: Any, **options: Any) -> Launch:
    (launch,) = variants(partial(kernel[(1,)], *args, **options))
    return launch


def test_the_table_has_exactly_the_rows_of_the_cases() -> None:
    text = harness.TABLE.read_text()
    assert text.startswith(harness.table_head()), "run TRITON_INTERPRET=0 python -m tests.compile_only.harness --write"
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == len(harness.recorded()) + 2  # two tables, a head each
    expected = {(case.name, arch) for case in cases() for arch in ARCHES}
    assert {key[:2] for key in harness.recorded() if key[2] == BASE} == expected
    assert {key[:2] for key in harness.recorded()} == expected


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("first", "width"), [(0, 16), (1, 4)], ids=["aligned", "unaligned"])
def test_alignment_decides_the_width(first: int, width: int, arch: str) -> None:
    """As Triton's launcher reads it from the pointer."""
    out, values = torch.zeros(2, 1040)[:, first:]
    got = compile_kernel(launch_of(copy_kernel, out, values, 1024, BLOCK=1024, ATOMIC=False), arch)
    assert (got.load_bytes, got.store_bytes, got.atomic_bytes) == (width, width, 0)
    lanes = 256 if arch.startswith("gfx") else 128
    assert got.loads == max(1, 1024 // lanes * 4 // width)


@pytest.mark.parametrize(("arch", "width"), [("sm_80", 4), ("sm_90", 16), ("gfx942", 4)])
def test_atomic_width(arch: str, width: int) -> None:
    got = compile_kernel(launch_of(copy_kernel, *torch.zeros(2, 1024), 1024, BLOCK=1024, ATOMIC=True), arch)
    assert (got.atomic_bytes, got.store_bytes) == (width, 0)


@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
@pytest.mark.parametrize("precision", ["tf32", "tf32x3", "ieee"])
def test_tf32_is_seen(precision: str, arch: str) -> None:
    got = compile_kernel(launch_of(dot_kernel, *torch.zeros(3, 32, 32), PRECISION=precision), arch)
    assert got.uses_tf32 == (precision == "tf32")


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_spills_and_shared_memory_are_seen(arch: str) -> None:
    tensors = torch.zeros(2, 256, 256)
    got = compile_kernel(launch_of(spill_kernel, *tensors, SIDE=256, num_warps=4 if arch == "sm_90" else 1), arch)
    assert got.spills > 0
    assert got.shared > 0
    assert (got.scratch > 0) == (arch == "gfx942")


def test_launches_of_one_call_are_told_apart() -> None:
    """By the constants that differ; the options of a launch are recorded."""
    tensors = torch.zeros(2, 1024)
    both = variants(lambda: [copy_kernel[(1,)](*tensors, 1024, BLOCK=b, ATOMIC=False, num_warps=8) for b in (64, 128)])
    assert [launch.options for launch in both] == [{"num_warps": 8}] * 2
    assert [launch.named_constants()["BLOCK"] for launch in both] == [64, 128]
    names = [case.name for case in cases() if case.launch.name == "_runs_kernel"]
    assert len(names) == len({name.replace("WRITE=True", "WRITE=False") for name in names}) * 2


@pytest.fixture
def case() -> Case:
    """A case in the table whose widths are a rule."""
    return next(case for case in cases() if case.wide == "load store")


GOOD = Resources(
    registers=80, spills=0, shared=0, load_bytes=16, store_bytes=16, atomic_bytes=0, loads=13, uses_tf32=False
)


@pytest.fixture
def compiled(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Resources]:
    """The one element is what compiling any case returns. The table records GOOD for `case` on sm_90."""
    found = [GOOD]
    monkeypatch.setattr(harness, "TABLE", tmp_path / "table.md")
    monkeypatch.setattr(harness, "running", lambda: BASE)
    monkeypatch.setattr(harness, "compile_kernel", lambda launch, arch: found[0])
    monkeypatch.setattr(harness, "cases", lambda: [case])
    monkeypatch.setattr(harness, "ARCHES", ("sm_90",))
    harness.write_table()
    check(case, "sm_90")
    return found


@pytest.mark.parametrize(
    ("change", "settings", "complaint"),
    [
        ({"spills": 4}, {}, "spills: "),
        ({"spills": 8}, {"known": 8}, "spills 8, was 0"),
        ({"spills": 12}, {"known": 8}, "spills: "),
        ({"scratch": 4}, {}, "scratch"),
        ({"uses_tf32": True}, {}, "TF32"),
        ({"load_bytes": 8}, {}, "load width 8, a rule"),
        ({"load_bytes": 8}, {"wide": ""}, "load width 8, was 16"),
        ({"store_bytes": 8}, {}, "store width 8, a rule"),
        ({"load_bytes": 8, "store_bytes": 4}, {"arch": "gfx942"}, "store width 4, a rule"),  # twice the lanes a warp
        ({"registers": 81}, {}, "worse than recorded: .*, Triton 3.6: registers 81, was 80"),
        ({"shared": 16}, {}, "shared 16, was 0"),
        ({"loads": 14}, {}, "loads 14, was 13"),
        ({"registers": 79}, {}, "not worse than recorded, but this is not the row"),
    ],
    ids=str,
)
def test_check_turns_red(
    case: Case,
    compiled: list[Resources],
    change: dict[str, Any],
    settings: dict[str, Any],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled[0] = replace(GOOD, **change)
    monkeypatch.setattr(harness, "KNOWN_SPILLS", {case.name: (settings.get("known", 0), "why")})
    with pytest.raises(AssertionError, match=complaint):
        check(replace(case, wide=settings.get("wide", case.wide)), settings.get("arch", "sm_90"))


def test_writing_refuses_what_became_worse(case: Case, compiled: list[Resources]) -> None:
    before = harness.TABLE.read_text()
    compiled[0] = replace(GOOD, registers=81)
    with pytest.raises(SystemExit, match="registers 81, was 80"):
        harness.write_table()
    assert harness.TABLE.read_text() == before
    compiled[0] = replace(GOOD, registers=72)
    harness.write_table()
    check(case, "sm_90")


def test_a_later_triton_records_what_is_worse_there(
    case: Case, compiled: list[Resources], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = harness.TABLE.read_text()
    monkeypatch.setattr(harness, "running", lambda: "3.8")
    check(case, "sm_90")  # no worse than under BASE
    harness.write_table()
    assert harness.TABLE.read_text() == base
    compiled[0] = replace(GOOD, registers=88)
    with pytest.raises(AssertionError, match=r"Triton 3\.6: registers 88, was 80"):
        check(case, "sm_90")
    harness.write_table()
    check(case, "sm_90")
    row = next(line for line in base.splitlines() if "| sm_90 |" in line)
    later = row.replace("sm_90", "sm_90 Triton 3.8").replace("| 80 |", "| 88 |")
    assert harness.TABLE.read_text() == base.replace(row, f"{row}\n{later}")
    # A version without a record of its own is held to the newest older one, and to no exact row.
    for version, limit in (("3.10", 88), ("3.9", 88), ("3.7", 80)):
        monkeypatch.setattr(harness, "running", lambda version=version: version)
        compiled[0] = replace(GOOD, registers=limit - 1)
        check(case, "sm_90")
        compiled[0] = replace(GOOD, registers=limit + 1)
        with pytest.raises(AssertionError, match=f"registers {limit + 1}, was {limit}"):
            check(case, "sm_90")
    # The rows of BASE stay, and writing under BASE keeps the later ones.
    monkeypatch.setattr(harness, "running", lambda: BASE)
    compiled[0] = GOOD
    harness.write_table()
    monkeypatch.setattr(harness, "running", lambda: "3.8")
    with pytest.raises(AssertionError, match="this is not the row"):
        check(case, "sm_90")


def test_stack_that_nothing_uses_is_no_spill() -> None:
    asm = {"ttir": "", "ptx": "", "cubin": b"", "sass": "IADD R1, R1, -0x8"}
    usage = " REG:40 STACK:8 SHARED:0 LOCAL:0"
    with mock.patch.object(resources, "_cuobjdump", return_value=usage):
        assert resources._read_nvidia(asm, 0).spills == 0
        assert resources._read_nvidia(asm | {"sass": "STL.64 [R1+0x4], R16"}, 0).spills == 8
