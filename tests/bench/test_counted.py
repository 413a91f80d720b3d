"""The counted tables are what docs/performance.md shows, and the floors follow from the figures."""

import re

import pytest

from bench import counted
from bench.cases import CASES, ModelCase, count_touched
from bench.counted import PAPER, Counted, page, stages
from bench.work import Work


@pytest.fixture(scope="module")
def lines() -> list[Counted]:
    return counted.counted()


def test_the_page_is_current() -> None:
    text = counted.PAGE.read_text()
    assert page(text) == text, "run python -m bench.counted --write"


def test_a_stale_page_is_seen() -> None:
    text = counted.PAGE.read_text()
    stale = text.replace("| backbone | 175 |", "| backbone | 174 |")
    assert stale != text
    assert counted.replace_table(stale, "stages", counted.stage_table()) == text
    with pytest.raises(ValueError, match="expected a table 'stages'"):
        counted.replace_table(text.replace("<!-- end of stages -->", ""), "stages", "")


def test_every_case_has_its_line_at_full_size(lines: list[Counted]) -> None:
    assert {line.case for line in lines} == set(CASES)
    assert {re.match(r"W\d+", line.case)[0] for line in lines} == {f"W{i}" for i in range(1, 15)}  # type: ignore[index]
    assert all(line.work.bytes > 0 and line.work.flops > 0 for line in lines)


def test_figures_in_the_text_are_those_of_the_cases() -> None:
    text = counted.PAGE.read_text()
    for name in ("W1", "W2", "W3", "W4-ratio2", "W4-ratio0"):
        cells = count_touched(CASES[name])[1]  # type: ignore[arg-type]
        assert f"{cells:,}" in text, f"{name} touches {cells:,} cells"
    compared, cells = CASES["W4-pool"].count_touched()  # type: ignore[attr-defined]
    assert f"{compared:,} in all, of which {cells:,}" in " ".join(text.split())
    assert f"{CASES['W8'].anchors:,} an image" in text  # type: ignore[attr-defined]
    assert f"4 x {CASES['W8'].candidates:,} deltas" in text  # type: ignore[attr-defined]


def test_stages_add_up_to_the_work_of_the_model() -> None:
    case = CASES["W12-b1"]
    assert isinstance(case, ModelCase)
    found = stages(case)
    assert {name: round(flops / 1e9) for name, flops in found.items()} == {
        "backbone": 175,
        "FPN": 122,
        "RPN head": 106,
        "box head": 29,
        "mask head": 106,
    }
    assert sum(found.values()) == case.work("bf16").flops


@pytest.mark.parametrize(
    ("work", "dtype", "floor_us", "bound"),
    [
        (Work(335_000_000), "bf16", 100.0, "bytes"),
        (Work(335_000_000, 989 * 10**9), "bf16", 1000.0, "flops"),
        (Work(335_000_000, 67 * 10**9), "fp32", 1000.0, "flops"),
        (Work(335_000_000, 67 * 10**9), "bf16", 100.0, "bytes"),
        (Work(3_350_000), "bf16", 1.0, "launches"),
    ],
    ids=["bytes", "bf16 flops", "fp32 flops", "tensor cores", "launches"],
)
def test_floor_is_the_larger_of_bytes_and_flops(work: Work, dtype: str, floor_us: float, bound: str) -> None:
    line = Counted("case", "forward", dtype, work)
    assert line.floor_us(PAPER["H100"]) == pytest.approx(floor_us)
    assert line.bound == bound
