"""Every bad input of tests/bad_inputs.py gives its one line and changes no file, and docs/bad-input.md shows them all.

Write the page anew with ``python -m tests.test_bad_input --write``.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import tmask
import tmask_kernels
from tests.bad_inputs import (
    ACCEPTED,
    CHECKPOINT,
    COMMANDS,
    ELSEWHERE,
    FILE,
    FIRST,
    GROUPS,
    PYTHON,
    Accepted,
    Case,
    PythonCase,
)
from tmask import cli
from tmask.data.coco import CocoDataset
from tmask.data.segmentation import run_length
from tmask.data.shapes import write_shapes
from tmask.engine.checkpoint import load_model
from tmask.engine.evaluate import coco_metrics

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "bad-input.md"
CASES = {f"{case.what} ({case.words})": case for cases in GROUPS.values() for case in cases}


def run(words: str) -> int:
    command, *more = words.split()
    return cli.main([command, *COMMANDS[command].split(), *more])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of three images and a run of one step."""
    folder = tmp_path_factory.mktemp("trained")
    write_shapes(folder / "data", num_images=3, seed=1, size=32)
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert run("train --out run") == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder a case runs in."""
    shutil.copytree(trained / "data", tmp_path / "data")
    (tmp_path / "run").mkdir()
    (tmp_path / CHECKPOINT).symlink_to(trained / CHECKPOINT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # a message counts them
    return tmp_path


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_is_told_in_one_line(case: Case, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if case.spoil is not None:
        case.spoil()
    before = contents(folder)
    assert run(case.words) == case.code
    command = case.words.split()[0]
    see = f" (see tmask {command} --help)" if case.code == 2 else ""
    assert capfd.readouterr().err == f"tmask {command}: error: {case.message}{see}\n"
    after = contents(folder)
    assert {path: after.get(path) for path in before} == before
    assert not Path("code-ran").exists()


@pytest.mark.parametrize("case", PYTHON, ids=lambda case: case.what)
def test_it_is_a_value_error_in_python(case: PythonCase, folder: Path) -> None:
    torch.manual_seed(0)
    FIRST.unlink()
    names: dict[str, Any] = {"tmask": tmask, "tmask_kernels": tmask_kernels, "torch": torch}
    names |= {"CocoDataset": CocoDataset, "load_model": load_model, "coco_metrics": coco_metrics}
    names["truth"] = json.loads(FILE.read_text())
    names["result"] = {**names["truth"]["annotations"][0], "score": 0.5}
    names["result"]["segmentation"] = run_length(names["result"]["segmentation"], (32, 32))
    if case.code.startswith("model"):
        names["model"] = tmask.build_model("tiny", 3, min_size=32, max_size=64, fpn_channels=8)
    names["image"] = torch.rand(3, 40, 50)
    masks = torch.ones(1, 40, 50)
    names["target"] = {"boxes": torch.tensor([[5.0, 6, 20, 30]]), "labels": torch.tensor([1]), "masks": masks}
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared whole
        eval(case.code, names)
    assert str(error.value) == case.message


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: f"{case.what} ({case.words})")
def test_it_is_accepted(case: Accepted, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if case.spoil is not None:
        case.spoil()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        code = run(case.words)
    assert code == 0, capfd.readouterr().err
    told = [str(item.message) for item in caught if item.category is UserWarning]
    assert told == ([] if case.warning is None else [case.warning])


def test_a_warning_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """No file and line of ours before it, and no source line after it."""
    monkeypatch.setitem(cli.COMMANDS, "warn", lambda _: warnings.warn("a.json: left\nout", stacklevel=1) or 0)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "_showwarnmsg_impl", shown := Shown())
        assert cli.main(["warn"]) == 0
    assert shown.lines == ["tmask warn: warning: a.json: left out\n"]
    assert capsys.readouterr().err == ""


class Shown:
    """Keeps what a terminal would show of each warning; pytest takes warnings away before they are formatted."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, told: Any) -> None:
        self.lines.append(warnings.formatwarning(told.message, told.category, told.filename, told.lineno, told.line))


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_folder_that_cannot_be_written_to_is_found_first(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By what the system says of it; root may write everywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK and Path(path) == Path("run")))
    assert run(f"{command} --out run/new/out") == 2
    expected = f"error: --out run/new/out: the folder run is not writable (see tmask {command} --help)\n"
    assert capfd.readouterr().err == f"tmask {command}: {expected}"


def test_the_system_s_errors_name_the_file(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "out" / "log.jsonl").mkdir(parents=True)
    assert run("train") == 1
    assert capfd.readouterr().err == "tmask train: error: out/log.jsonl: Is a directory\n"


def loads(tree: ast.AST) -> list[ast.Call]:
    """The calls of ``torch.load``, by whatever name, and of what else unpickles a file."""
    names = {"torch.load", "pickle.load", "torch.jit.load", "np.load", "numpy.load", "joblib.load"}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func) in names]


def is_safe(call: ast.Call) -> bool:
    return ast.unparse(call.func) == "torch.load" and any(
        word.arg == "weights_only" and isinstance(word.value, ast.Constant) and word.value.value is True
        for word in call.keywords
    )


def test_no_file_can_run_code() -> None:
    found = []
    for path in sorted([*ROOT.glob("tmask/**/*.py"), *ROOT.glob("tmask_kernels/**/*.py")]):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        aliases = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "torch"]
        assert not any(alias.name == "load" for node in aliases for alias in node.names), path
        found += [(path.name, is_safe(call)) for call in loads(tree)]
    assert len(found) >= 2
    assert all(safe for _, safe in found), found
    for code in (
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=x)",
        "pickle.load(f)",
    ):
        assert [is_safe(call) for call in loads(ast.parse(code))] == [False]


HEAD = """\
# Bad input

Each of these gives one error on stderr, in one line, `tmask COMMAND: error: ` and the message below, and exit code 1,
or 2 if the command line or a config file is wrong (then ` (see tmask COMMAND --help)` follows). Lines of
`tmask COMMAND: warning: ` may stand before it. No file that was there changes. `TMASK_DEBUG=1` shows the traceback.
In Python the message of wrong data, settings or weights comes as a `ValueError` or its subclass `CheckpointError`.

Every row is a case of [tests/bad_inputs.py](../tests/bad_inputs.py), which `tests/test_bad_input.py` runs under the
name of its first two columns. This page is made of them by `python -m tests.test_bad_input --write`.
"""


def page() -> str:
    """docs/bad-input.md as the cases have it."""
    lines = HEAD.splitlines()
    for group, cases in GROUPS.items():
        rows = [(case.what, code(case.words), code(case.message), str(case.code)) for case in cases]
        lines += table(group, ("input", "given to", "message", "exit"), rows)
    lines += table("In Python", ("input", "code", "message"), [(c.what, code(c.code), code(c.message)) for c in PYTHON])
    told = "Real data sets hold some of these. What is left out is counted in one warning that names the first."
    rows = [(case.what, code(case.words), case.done, code(case.warning or "")) for case in ACCEPTED]
    lines += table("Accepted", ("input", "given to", "what is done", "warning"), rows, told, "")
    lines += table("Tested elsewhere", ("input", "test"), [(what, code(test)) for what, test in ELSEWHERE.items()])
    return "\n".join([*lines, ""])


def table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]], *text: str) -> list[str]:
    """A section of the page; a bar inside a cell would end the cell."""
    cells = [columns, *[tuple(cell.replace("|", "\\|") for cell in row) for row in rows]]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return ["", f"## {title}", "", *text, lines[0], "|---" * len(columns) + "|", *lines[1:]]


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.test_bad_input --write"


@pytest.mark.parametrize("test", ELSEWHERE.values())
def test_tests_elsewhere_exist(test: str) -> None:
    path, name = test.split("::")
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("usage: python -m tests.test_bad_input --write")
    PAGE.write_text(page(), encoding="utf-8")
