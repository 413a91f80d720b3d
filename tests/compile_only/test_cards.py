"""The cards that most users own: the cases that take the most fit their shared memory and do not spill."""

import pytest

from tests.compile_only.harness import BASE, Case, all_cases, compile_case, numbers, recorded

pytestmark = pytest.mark.compile_only

CARDS = ("sm_86", "sm_89", "sm_120")  # RTX 30, 40 and 50
SHARED = 99 * 1024  # bytes of a program: CUDA C++ Programming Guide, technical specifications per compute capability


def takes_much(case: Case) -> bool:
    """Whether a case comes near a limit on the A100; one without a record may."""
    taken = numbers(recorded().get((case.name, "sm_80", BASE)))
    return not taken or taken["registers"] >= 112 or taken["shared"] > SHARED / 4


@pytest.mark.parametrize("arch", CARDS)
@pytest.mark.parametrize("case", list(filter(takes_much, all_cases())), ids=lambda case: case.name)
def test_fits(case: Case, arch: str) -> None:
    got = compile_case(case, arch)
    assert got.spills <= case.known_spills, got
    assert got.shared <= SHARED, got
