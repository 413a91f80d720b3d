"""What is written down: rows, the journal that survives a kill, and messages without names and paths."""

import json
import platform
from pathlib import Path

import pytest

from bench.rows import ROOT, STATUSES, Journal, clean, read_lines, read_rows, row_of

KEY = "op/W1/forward/fp32/-/triton"


def test_a_row_knows_its_key():
    row = row_of(KEY, "failed", "because", bytes=12)
    assert row.key == KEY
    assert row.contest == "op/W1/forward/fp32/-"
    assert (row.provider, row.status, row.reason, row.bytes, row.median_us) == ("triton", "failed", "because", 12, None)


def test_a_status_is_one_of_the_list():
    for status in STATUSES:
        row_of(KEY, status, "")
    with pytest.raises(AssertionError):
        row_of(KEY, "fine", "")


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
    ],
)
def test_messages_tell_no_names_and_no_paths(text, expected):
    assert clean(text) == expected


def test_a_host_is_known_by_its_short_name_too(monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "node-7.example.org")
    assert clean("node-7.example.org and node-7, not node-71") == "this machine and this machine, not node-71"


def test_long_messages_are_cut():
    assert len(clean("x" * 1000)) == 300
    assert clean("x" * 300) == "x" * 300


def test_rows_are_cleaned(tmp_path: Path):
    journal = Journal(tmp_path / "j")
    journal.add(row_of(KEY, "failed", f"no file {tmp_path}/weights.pt on {platform.node()}"))
    written = (tmp_path / "j").read_text()
    assert str(tmp_path) not in written
    assert platform.node() not in written
    assert "weights.pt" in written


def test_a_journal_gives_back_its_rows(tmp_path: Path):
    path = tmp_path / "j"
    rows = [row_of(KEY, "timed", "", median_us=1 / 3, rounds=7), row_of(KEY + "2", "wrong", "off by one")]
    for row in rows:
        Journal(path).add(row)  # as processes one after another
    assert read_rows(path) == rows
    assert list(Journal(path).rows) == [KEY, KEY + "2"]


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_a_journal_cut_in_mid_line_is_read_and_goes_on(tmp_path: Path, cut: int):
    path = tmp_path / "j"
    first, second, third = (row_of(f"{KEY}{i}", "wrong", "x") for i in range(3))
    journal = Journal(path)
    journal.add(first)
    journal.add(second)
    path.write_bytes(path.read_bytes()[:-cut])
    # Without its newline alone the second line is whole.
    kept = [first, second] if cut == 1 else [first]
    assert read_rows(path) == kept
    Journal(path).add(third)
    assert read_rows(path) == [*kept, third]


def test_every_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path):
    journal = Journal(tmp_path / "j")
    journal.write({"plan": [KEY]})
    journal.write({"begin": KEY})
    assert [json.loads(line) for line in (tmp_path / "j").open()] == [{"plan": [KEY]}, {"begin": KEY}]


def test_no_journal(tmp_path: Path):
    journal = Journal(None)
    journal.add(row_of(KEY, "wrong", "x"))
    assert list(journal.rows) == [KEY]
    assert list(read_lines(tmp_path / "none")) == []
