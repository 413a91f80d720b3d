"""The harness reads what it claims to read, and docs/compile-budgets.md has one row for each case, no more."""

import pytest

from tests.compile_only import harness
from tests.compile_only.harness import TARGETS, Budget, Case, all_cases, check, compile_kernel
from tests.compile_only.probes import copy_kernel, dot_kernel, spill_kernel

pytestmark = pytest.mark.compile_only

COPY_TYPES = {"out_ptr": "*fp32", "in_ptr": "*fp32", "count": "i32"}


def test_table_has_exactly_the_rows_of_the_cases() -> None:
    text = harness.TABLE.read_text()
    assert text.startswith(harness.table_head()), "run TRITON_INTERPRET=0 python -m tests.compile_only.harness --write"
    rows = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in text.splitlines() if line.startswith("|")]
    expected = [(case.name, target) for case in all_cases() for target in case.targets]
    assert rows[2:] == expected


def test_case_names_are_unique() -> None:
    names = [case.name for case in all_cases()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("target", TARGETS)
def test_alignment_decides_the_width(target: str) -> None:
    aligned = compile_kernel(
        copy_kernel,
        COPY_TYPES,
        {"BLOCK": 1024, "ATOMIC": False},
        divisible_by_16=["out_ptr", "in_ptr", "count"],
        target=target,
    )
    assert (aligned.load_bytes, aligned.store_bytes, aligned.atomic_bytes) == (16, 16, 0)
    unaligned = compile_kernel(copy_kernel, COPY_TYPES, {"BLOCK": 1024, "ATOMIC": False}, target=target)
    assert (unaligned.load_bytes, unaligned.store_bytes) == (4, 4)
    assert unaligned.loads > aligned.loads


@pytest.mark.parametrize(("target", "width"), [("sm_80", 4), ("sm_90", 16), ("gfx942", 4)])
def test_atomic_width(target: str, width: int) -> None:
    got = compile_kernel(
        copy_kernel,
        COPY_TYPES,
        {"BLOCK": 1024, "ATOMIC": True},
        divisible_by_16=["out_ptr", "in_ptr", "count"],
        target=target,
    )
    assert (got.atomic_bytes, got.store_bytes) == (width, 0)


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_tf32_is_seen(target: str) -> None:
    types = {"out_ptr": "*fp32", "a_ptr": "*fp32", "b_ptr": "*fp32"}
    assert compile_kernel(dot_kernel, types, {"PRECISION": "tf32"}, target=target).uses_tf32
    assert not compile_kernel(dot_kernel, types, {"PRECISION": "ieee"}, target=target).uses_tf32


def test_spills_and_shared_memory_are_seen() -> None:
    types = {"out_ptr": "*fp32", "in_ptr": "*fp32"}
    got = compile_kernel(spill_kernel, types, {"SIDE": 256}, target="sm_90", num_warps=4)
    assert got.spills > 0
    assert got.shared > 0


@pytest.mark.parametrize(
    ("budget", "complaint"),
    [
        (Budget(registers=1), "registers over 1"),
        (Budget(registers=255, load_bytes=32), "load_bytes under 32"),
        (Budget(registers=255, store_bytes=16), "lacks this row"),
    ],
    ids=["registers", "width", "row"],
)
def test_check_turns_red(budget: Budget, complaint: str) -> None:
    case = Case(
        name="probe",
        kernel=copy_kernel,
        signature=COPY_TYPES,
        constexprs={"BLOCK": 1024, "ATOMIC": False},
        divisible_by_16=["out_ptr", "in_ptr", "count"],
        budget=budget,
    )
    with pytest.raises(AssertionError, match=complaint):
        check(case, "sm_90")
