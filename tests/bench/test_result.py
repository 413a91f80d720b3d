"""What is written down: rows, result files that merge, and messages without names and paths."""

import platform
from typing import Any

import pytest

from bench import result
from bench.__main__ import main
from bench.result import ROOT, STATUSES, Row, clean

KEY = "op/case/forward/fp32/-/triton"


def test_a_row_is_its_line():
    row = Row(key=KEY, status="timed", reason="because", bytes=12, median_us=1 / 3)
    assert (row.contest, row.op, row.provider) == ("op/case/forward/fp32/-", "op", "triton")
    assert "wall_us" not in row.line()
    assert Row(**row.line()) == row
    for status in STATUSES:
        Row(key=KEY, status=status)
    with pytest.raises(AssertionError):
        Row(key=KEY, status="fine")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"error in {ROOT}/bench/result.py", "error in bench/result.py"),
        ('File "/home/someone/.venv/lib/torch/a.py", line 3', 'File "a.py", line 3'),
        ("no folder /home/someone", "no folder (path)"),
        ("no folder '/someone/'", "no folder '(path)'"),
        ("gcc '-I/home/some.one/include' -L/opt/cuda/lib64 /tmp/x/main.c", "gcc '-I(path)' -L(path) main.c"),
        ("see file:///srv/data/a.json", "see file://a.json"),
        ("node-7.example.org and node-7, not node-71", "this machine and this machine, not node-71"),
        ("12 GB/s, 1 / 2, and/or, x /= 2, [K, C]/[N]", "12 GB/s, 1 / 2, and/or, x /= 2, [K, C]/[N]"),
        ("one\n\n   two  \n", "one two"),
        ("x" * 300, "x" * 300),
        ("x" * 1000, "x" * 297 + "..."),
    ],
)
def test_messages_tell_no_names_and_no_paths(text, expected, monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "node-7.example.org")
    assert clean(text) == expected
    assert Row(key=KEY, status="failed", reason=text).reason == expected


def test_two_calls_make_one_result(tmp_path, capsys):
    def described(**changed: Any) -> dict[str, Any]:
        return {
            "device": "NVIDIA H200", "gpu": "NVIDIA H200", "commit": "0123456789", "date": "2026-01-02",
            "changed": False,
        } | changed  # fmt: skip

    def row(name: str, status: str = "timed", **fields: Any) -> dict[str, Any]:
        return Row(key=f"op/{name}/forward/fp32/-/triton", status=status, **fields).line()

    first, second = result.empty(described()), result.empty(described(date="2026-01-03"))
    result.add(first, "rows", [row("a", median_us=1.0), row("b", median_us=2.0)])
    first["roofs"] = {"copy_gbps": 4000.0}
    result.add(first, "tests", [{"key": "a.py::x", "status": "passed", "reason": ""}])
    result.add(second, "rows", [row("a", median_us=3.0), row("b", "not reached")])
    result.add(second, "tests", [{"key": "a.py::x", "status": "not reached", "reason": ""}])
    files = [tmp_path / "one.json", tmp_path / "two.json", tmp_path / "other.json"]
    for file, each in zip(files, (first, second, result.empty(described(commit="fedcba9876"))), strict=True):
        result.save(file, each)
    assert main(["merge", *map(str, files[:2]), "--out", str(tmp_path)]) == 0
    merged = result.load(tmp_path / "nvidia-h200" / "2026-01-02-0123456.json")
    assert {row.case: row.median_us for row in result.rows(merged)} == {"a": 3.0, "b": 2.0}
    assert merged["roofs"] == first["roofs"]
    assert [test["status"] for test in merged["tests"]] == ["passed"]
    # The next call of this commit writes into the same file; another commit or schema is refused.
    assert result.place(tmp_path, described(date="2026-02-01")).name == "2026-01-02-0123456.json"
    assert main(["merge", str(files[0]), str(files[2]), "--out", str(tmp_path)]) == 2
    assert "commit is '0123456789' and 'fedcba9876'" in capsys.readouterr().err
    files[0].write_text('{"schema": 0}')
    with pytest.raises(ValueError, match=r"one\.json: expected a result of schema 2"):
        result.load(files[0])
