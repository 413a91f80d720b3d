"""The harness reads what it claims to read, each of its rules can turn red, and docs/compile-budgets.md is its own."""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from tests.compile_only import harness, resources
from tests.compile_only.harness import BASE, CHIPS, Case, Target, all_cases, check, complaints, figures, registers
from tests.compile_only.probes import copy_kernel, dot_kernel, loop_kernel, spill_kernel
from tests.compile_only.resources import ARCHES, Resources, at_depths, compile_kernel

pytestmark = pytest.mark.compile_only

COPY_TYPES = {"out_ptr": "*fp32", "in_ptr": "*fp32", "count": "i32"}


def test_table_has_exactly_the_rows_of_the_cases() -> None:
    text = harness.TABLE.read_text()
    assert text.startswith(harness.table_head()), "run TRITON_INTERPRET=0 python -m tests.compile_only.harness --write"
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == len(harness.recorded()) + 2  # two tables, a head each
    expected = {(case.name, arch) for case in all_cases() for arch in case.arches}
    assert {key[:2] for key in harness.recorded() if key[2] == BASE} == expected
    assert {key[:2] for key in harness.recorded()} == expected


def test_case_names_are_unique() -> None:
    names = [case.name for case in all_cases()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("arch", ARCHES)
def test_alignment_decides_the_width(arch: str) -> None:
    aligned = compile_kernel(
        copy_kernel,
        COPY_TYPES,
        {"BLOCK": 1024, "ATOMIC": False},
        divisible_by_16=["out_ptr", "in_ptr", "count"],
        arch=arch,
    )
    assert (aligned.load_bytes, aligned.store_bytes, aligned.atomic_bytes) == (16, 16, 0)
    unaligned = compile_kernel(copy_kernel, COPY_TYPES, {"BLOCK": 1024, "ATOMIC": False}, arch=arch)
    assert (unaligned.load_bytes, unaligned.store_bytes) == (4, 4)
    assert sum(unaligned.loads) > sum(aligned.loads)


@pytest.mark.parametrize(("arch", "width"), [("sm_80", 4), ("sm_90", 16), ("gfx942", 4)])
def test_atomic_width(arch: str, width: int) -> None:
    got = compile_kernel(
        copy_kernel,
        COPY_TYPES,
        {"BLOCK": 1024, "ATOMIC": True},
        divisible_by_16=["out_ptr", "in_ptr", "count"],
        arch=arch,
    )
    assert (got.atomic_bytes, got.store_bytes) == (width, 0)


@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
def test_tf32_is_seen(arch: str) -> None:
    types = {"out_ptr": "*fp32", "a_ptr": "*fp32", "b_ptr": "*fp32"}
    assert compile_kernel(dot_kernel, types, {"PRECISION": "tf32"}, arch=arch).uses_tf32
    assert not compile_kernel(dot_kernel, types, {"PRECISION": "ieee"}, arch=arch).uses_tf32


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_spills_and_shared_memory_are_seen(arch: str) -> None:
    types = {"out_ptr": "*fp32", "in_ptr": "*fp32"}
    got = compile_kernel(spill_kernel, types, {"SIDE": 256}, arch=arch, num_warps=4 if arch == "sm_90" else 1)
    assert got.spills > 0
    assert got.shared > 0
    assert (got.scratch > 0) == (arch == "gfx942")


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_loads_are_counted_in_the_loop_they_stand_in(arch: str) -> None:
    types = {"out_ptr": "*fp32", "in_ptr": "*fp32", "rows": "i32", "cols": "i32"}
    got = compile_kernel(loop_kernel, types, {"BLOCK": 128}, arch=arch, num_warps=2)
    # Once before the loops, once a row, once a column; the compiler may pull a loop's first turn out of it.
    assert len(got.loads) == 3
    assert min(got.loads) >= 1


def test_depths_of_a_text() -> None:
    text = """
entry:
    load
    @%p1 bra $L__BB0_3;
$L__BB0_1:
    load
$L__BB0_2:
    load
    load
    @%p2 bra $L__BB0_2;
    bra.uni $L__BB0_4;
$L__BB0_3:
    load
    ret;
$L__BB0_4:
    load
    @%p3 bra $L__BB0_1;
    bra.uni $L__BB0_3;
"""
    # Block 4 stands last and belongs to the outer loop; block 3 stands inside its text and does not.
    assert at_depths(text, lambda line: "load" in line) == (2, 2, 2)


def test_formulas() -> None:
    # 16 sums, 128 bytes of taps, 8 addresses and the 16 of every kernel: 80 registers.
    assert registers(values=16, bytes_in_flight=128, pointers=8) == 80
    h100 = CHIPS["sm_90"]
    # 512 registers a lane hold 6 warps of 80 in each of the four parts of an SM; programs of 16 warps fit once.
    assert h100.warps(80, 0, 4) == 24
    assert h100.warps(80, 0, 16) == 16
    assert h100.warps(26, 0, 4) == 64
    assert h100.warps(32, 100 * 1024, 4) == 8
    # 3,350 GB/s for 1 us over 132 SMs are 25,379 bytes; a warp of 128 bytes a thread asks for 4,096.
    assert h100.warps_wanted(128) == 7


@pytest.fixture
def case() -> Case:
    """A case in the table whose widths are a rule, and whose loops have known trips."""
    return next(case for case in all_cases() if case.wide and case.target("sm_90").trips)


GOOD = Resources(
    registers=80, spills=0, shared=0, load_bytes=16, store_bytes=16, atomic_bytes=0, loads=(5, 0, 8), uses_tf32=False
)


@pytest.fixture
def compiled(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Resources]:
    """The one element is what compiling any case gives; the table records GOOD for `case` on sm_90."""
    found = [GOOD]
    table = tmp_path / "table.md"
    monkeypatch.setattr(harness, "TABLE", table)
    monkeypatch.setattr(harness, "running", lambda: BASE)
    monkeypatch.setattr(harness, "compile_case", lambda case, arch: found[0])
    monkeypatch.setattr(harness, "all_cases", lambda: [replace(case, arches=("sm_90",))])
    harness.write_table(harness.compile_case)
    check(case, "sm_90")
    return found


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"spills": 4}, "spills"),
        ({"scratch": 4}, "scratch"),
        ({"uses_tf32": True}, "TF32"),
        ({"load_bytes": 8}, "load width 8 / 16, a rule"),
        ({"store_bytes": 8}, "store width 8 / 16, a rule"),
        ({"registers": 81}, "worse than recorded: .*, Triton 3.6: registers 81, was 80"),
        ({"registers": 88}, "warps 20, was 24"),
        ({"shared": 16}, "shared 16, was 0"),
        ({"loads": (5, 1, 8)}, "loads an output 2.79, was 2.64"),
        ({"registers": 79}, "not worse than recorded, but this is not the row"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_check_turns_red(case: Case, compiled: list[Resources], change: dict[str, int], complaint: str) -> None:
    compiled[0] = replace(GOOD, **change)
    with pytest.raises(AssertionError, match=complaint):
        check(case, "sm_90")


def test_a_warp_of_amd_is_wide_with_half_as_many_bytes_a_lane(case: Case, compiled: list[Resources]) -> None:
    compiled[0] = replace(GOOD, load_bytes=8, store_bytes=4)
    with pytest.raises(AssertionError, match="store width 4 / 16, a rule"):
        check(case, "gfx942")


def test_a_moved_target_turns_red(case: Case, compiled: list[Resources]) -> None:
    target: Target = case.target("sm_90")
    with pytest.raises(AssertionError, match="this is not the row"):
        check(replace(case, target=lambda arch: replace(target, registers=target.registers + 8)), "sm_90")


def test_a_missed_target_stands_in_the_table_and_fails_nothing(
    case: Case, compiled: list[Resources], monkeypatch: pytest.MonkeyPatch
) -> None:
    hard = replace(case, target=lambda arch: replace(case.target(arch), registers=40, shared=-1), arches=("sm_90",))
    harness.TABLE.unlink()
    monkeypatch.setattr(harness, "all_cases", lambda: [hard])
    harness.write_table(harness.compile_case)
    check(hard, "sm_90")
    assert "| 80 / 40 |" in harness.TABLE.read_text()
    assert "| registers, shared |" in harness.TABLE.read_text()


def test_text_loads_count_where_trips_are_unknown(case: Case, compiled: list[Resources]) -> None:
    unknown = replace(case, target=lambda arch: replace(case.target(arch), trips=None, loads=5))
    found = figures(unknown, "sm_90", GOOD)
    assert found["loads"].missed
    assert found["loads an output"].actual is None
    assert complaints("", found, {"loads": 12, "loads an output": 2}) == ["worse than recorded: : loads 13, was 12"]
    assert not complaints("", figures(case, "sm_90", GOOD), {"loads": 12})


def test_writing_refuses_what_became_worse(case: Case, compiled: list[Resources]) -> None:
    before = harness.TABLE.read_text()
    compiled[0] = replace(GOOD, registers=81)
    with pytest.raises(SystemExit, match="registers 81, was 80"):
        harness.write_table(harness.compile_case)
    assert harness.TABLE.read_text() == before
    compiled[0] = replace(GOOD, registers=72)
    harness.write_table(harness.compile_case)
    check(case, "sm_90")


def test_a_later_triton_records_what_is_worse_there(
    case: Case, compiled: list[Resources], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = harness.TABLE.read_text()
    monkeypatch.setattr(harness, "running", lambda: "3.8")
    check(case, "sm_90")  # no worse than under BASE
    harness.write_table(harness.compile_case)
    assert harness.TABLE.read_text() == base
    compiled[0] = replace(GOOD, registers=88)
    with pytest.raises(AssertionError, match=r"Triton 3\.6: registers 88, was 80"):
        check(case, "sm_90")
    harness.write_table(harness.compile_case)
    check(case, "sm_90")
    row = next(line for line in base.splitlines() if "| sm_90 |" in line)
    later = row.replace("sm_90", "sm_90 Triton 3.8").replace("| 80 / ", "| 88 / ").replace("| 24 / ", "| 20 / ")
    assert harness.TABLE.read_text() == base.replace(row, f"{row}\n{later}")
    # One without a record of its own is held to the newest older one, and to no exact row.
    for version, limit in (("3.10", 88), ("3.9", 88), ("3.7", 80)):
        monkeypatch.setattr(harness, "running", lambda version=version: version)
        compiled[0] = replace(GOOD, registers=limit - 1)
        check(case, "sm_90")
        compiled[0] = replace(GOOD, registers=limit + 1)
        with pytest.raises(AssertionError, match=f"registers {limit + 1}, was {limit}"):
            check(case, "sm_90")
    # BASE is unmoved by it, and keeps its rows.
    monkeypatch.setattr(harness, "running", lambda: BASE)
    compiled[0] = GOOD
    harness.write_table(harness.compile_case)
    monkeypatch.setattr(harness, "running", lambda: "3.8")
    with pytest.raises(AssertionError, match="this is not the row"):
        check(case, "sm_90")


def test_stack_that_nothing_uses_is_no_spill() -> None:
    asm = {"ptx": "", "cubin": b"", "sass": "IADD R1, R1, -0x8"}
    usage = " REG:40 STACK:8 SHARED:0 LOCAL:0"
    with mock.patch.object(resources, "_cuobjdump", return_value=usage):
        assert resources._read_nvidia(asm, 0).spills == 0
        assert resources._read_nvidia(asm | {"sass": "STL.64 [R1+0x4], R16"}, 0).spills == 8
