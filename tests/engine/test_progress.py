"""Progress on stderr; test_predict.py and test_evaluate.py see it where it is used."""

import sys
from typing import Any

import pytest

from tmask.engine import progress as module
from tmask.engine.progress import progress


def test_it_is_a_line_now_and_then_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert list(progress([7, 8], "prediction", "image")) == [7, 8]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "_LINE_SECONDS", 0.0)
    assert list(progress([7, 8], "prediction", "image")) == [7, 8]
    assert list(progress(iter([9]), "prediction", "image")) == [9]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"prediction: image {count}" for count in ("1/2", "2/2", "1")]


def test_it_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(module, "_LINE_SECONDS", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress(["a", "b"], "prediction", "image")) == ["a", "b"]
    err = capsys.readouterr().err
    assert "| 2/2 [" in err
    assert "image 2/2" not in err
    assert list(progress([], "prediction", "image")) == []
    assert capsys.readouterr().err == ""
