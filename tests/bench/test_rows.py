"""What is written down: rows, the journal that survives a kill, and messages without names and paths."""

import platform
from pathlib import Path

import pytest

from bench.process import Journal
from bench.rows import ROOT, STATUSES, clean, row_of

KEY = "op/case/forward/fp32/-/triton"


def test_a_row_is_its_line():
    row = row_of(KEY, "timed", "because", bytes=12, median_us=1 / 3)
    assert (row.key, row.contest, row.provider) == (KEY, "op/case/forward/fp32/-", "triton")
    assert "wall_us" not in row.line()
    assert row_of(**row.line()) == row
    for status in STATUSES:
        row_of(KEY, status)
    with pytest.raises(AssertionError):
        row_of(KEY, "fine")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"error in {ROOT}/bench/rows.py", "error in bench/rows.py"),
        ('File "/home/someone/.venv/lib/torch/a.py", line 3', 'File "a.py", line 3'),
        ("no folder /home/someone", "no folder (path)"),
        ("no folder '/someone/'", "no folder '(path)'"),
        ("gcc '-I/home/some.one/include' -L/opt/cuda/lib64 /tmp/x/main.c", "gcc '-I(path)' -L(path) main.c"),
        ("see file:///srv/data/a.json", "see file://a.json"),
        (f"host {platform.node()}: lost", "host this machine: lost"),
        ("12 GB/s, 1 / 2, and/or, x /= 2, [K, C]/[N]", "12 GB/s, 1 / 2, and/or, x /= 2, [K, C]/[N]"),
        ("one\n\n   two  \n", "one two"),
        ("", ""),
        ("x" * 300, "x" * 300),
        ("x" * 1000, "x" * 297 + "..."),
    ],
)
def test_messages_tell_no_names_and_no_paths(text, expected):
    assert clean(text) == expected
    assert row_of(KEY, "failed", text).reason == expected


def test_a_host_is_known_by_its_short_name_too(monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "node-7.example.org")
    assert clean("node-7.example.org and node-7, not node-71") == "this machine and this machine, not node-71"


@pytest.mark.parametrize("cut", [1, 20, 90])
def test_a_journal_cut_in_mid_line_is_read_and_goes_on(tmp_path: Path, cut: int):
    path = tmp_path / "j"
    first, second, third = (row_of(f"{KEY}{i}", "wrong", "x" * 30) for i in range(3))
    journal = Journal(path)
    journal.write(first.line())
    journal.write(second.line())
    path.write_bytes(path.read_bytes()[:-cut])
    # Without its newline alone the second line is whole as soon as another one follows.
    assert list(Journal(path).settled) == [first.key]
    Journal(path).write(third.line())
    assert list(Journal(path).settled.values()) == [
        r.line() for r in ((first, second, third) if cut == 1 else (first, third))
    ]


def test_a_journal_is_on_disk_at_once_and_read_as_it_grows(tmp_path: Path):
    journal, reader = Journal(tmp_path / "j"), Journal(tmp_path / "j")
    lines = [
        {"plan": [KEY, "b"], "errors": {"c": "no"}},
        {"begin": KEY, "patience": 400.0},
        row_of(KEY, "failed").line(),
    ]
    for line in lines:
        journal.write(line)
        assert reader.read() == [line]
    assert (reader.missing(), reader.errors, reader.patience) == (["b"], {"c": "no"}, 400.0)
    assert reader.guilty(left=False) is None


def test_without_a_path_nothing_is_written():
    journal = Journal(None)
    journal.write(row_of(KEY, "wrong").line())
    assert list(journal.settled) == [KEY]
