"""docs/bad-input.md is the table: every bad input of it gives its one line and changes no file."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import tmask
import tmask_kernels
from tests.bad_inputs import CHECKPOINT, COMMANDS, FILE, FIRST, SPOILS
from tests.data.conftest import told
from tests.engine.toy import files
from tmask import cli
from tmask.data.coco import CocoDataset
from tmask.data.segmentation import run_length
from tmask.data.shapes import write_shapes
from tmask.engine.checkpoint import load_model
from tmask.engine.evaluate import coco_metrics

ROOT = Path(__file__).parents[1]


def read_page() -> dict[str, list[list[str]]]:
    """Return the rows of each section's table. Code has no backticks; a bar inside a cell is written ``\\|``."""
    sections: dict[str, list[list[str]]] = {}
    for part in (ROOT / "docs" / "bad-input.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        title, *lines = part.splitlines()
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("| ")]
        sections[title] = [[cell.strip().strip("`").replace("\\|", "|") for cell in row] for row in rows[1:]]
    return sections


SECTIONS = read_page()
NO_ERRORS = ("In Python", "Accepted", "Tested elsewhere")
ERRORS = [row for title, rows in SECTIONS.items() if title not in NO_ERRORS for row in rows]


def name_of(row: list[str]) -> str:
    return f"{row[0]} ({row[1]})"


def run(words: str) -> int:
    command, *more = words.split()
    return cli.main([command, *COMMANDS[command].split(), *more])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of three images and a run of one step."""
    folder = tmp_path_factory.mktemp("trained")
    write_shapes(folder / "data", num_images=3, seed=1, size=32)
    with contextlib.chdir(folder):
        assert run("train --out run") == 0
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


@pytest.mark.parametrize("row", ERRORS, ids=name_of)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_is_told_in_one_line(row: list[str], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    what, words, message, code = row
    SPOILS.get(what, lambda: None)()
    before = files(folder)
    assert run(words) == int(code)
    command = words.split()[0]
    see = f" (see tmask {command} --help)" if code == "2" else ""
    assert capfd.readouterr().err == f"tmask {command}: error: {message}{see}\n"
    after = files(folder)
    assert {path: after.get(path) for path in before} == before
    assert not Path("code-ran").exists()


@pytest.mark.parametrize("row", SECTIONS["In Python"], ids=lambda row: row[0])
def test_it_is_a_value_error_in_python(row: list[str], folder: Path) -> None:
    _, code, message = row
    torch.manual_seed(0)
    FIRST.unlink()
    names: dict[str, Any] = {"tmask": tmask, "tmask_kernels": tmask_kernels, "torch": torch}
    names |= {"CocoDataset": CocoDataset, "load_model": load_model, "coco_metrics": coco_metrics}
    names["truth"] = json.loads(FILE.read_text())
    names["result"] = {**names["truth"]["annotations"][0], "score": 0.5}
    names["result"]["segmentation"] = run_length(names["result"]["segmentation"], (32, 32))
    if code.startswith("model"):
        names["model"] = tmask.build_model("tiny", 3, min_size=32, max_size=64, fpn_channels=8)
    names["image"] = torch.rand(3, 40, 50)
    masks = torch.ones(1, 40, 50)
    names["target"] = {"boxes": torch.tensor([[5.0, 6, 20, 30]]), "labels": torch.tensor([1]), "masks": masks}
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared whole
        eval(code, names)
    assert str(error.value) == message


@pytest.mark.parametrize("row", SECTIONS["Accepted"], ids=name_of)
def test_it_is_accepted(row: list[str], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    what, words, _, warning = row
    SPOILS.get(what, lambda: None)()
    with told() as warned:
        code = run(words)
    assert code == 0, capfd.readouterr().err
    assert warned == ([warning] if warning else [])


def test_a_warning_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file and line of ours before it, and no source line after it."""
    shown: list[str] = []

    def warn(_: list[str]) -> int:
        shown.append(warnings.formatwarning("a.json: left\nout", UserWarning, "coco.py", 7, "warnings.warn(...)"))
        return 0

    monkeypatch.setitem(cli.COMMANDS, "warn", warn)
    assert cli.main(["warn"]) == 0
    assert shown == ["tmask warn: warning: a.json: left out\n"]


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


LOADERS = {"torch.load", "pickle.load", "torch.jit.load", "np.load", "numpy.load", "joblib.load"}


def loads(source: str) -> list[bool]:
    """For each call that unpickles a file, whether it reads weights alone."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    texts = [ast.unparse(call) for call in calls if ast.unparse(call.func) in LOADERS]
    return [text.startswith("torch.load(") and "weights_only=True" in text for text in texts]


def test_no_file_can_run_code() -> None:
    sources = [
        path.read_text(encoding="utf-8") for name in ("tmask", "tmask_kernels") for path in ROOT.glob(f"{name}/**/*.py")
    ]
    found = [safe for source in sources for safe in loads(source)]
    assert len(found) >= 2
    assert all(found)
    assert not any("from torch import load" in source for source in sources)  # loads would not see it
    for more in ("", ", weights_only=False", ", weights_only=x"):
        assert loads(f"torch.load(f{more})") == [False]
    assert loads("pickle.load(f)") == [False]


@pytest.mark.parametrize("test", [test for _, test in SECTIONS["Tested elsewhere"]])
def test_tests_elsewhere_exist(test: str) -> None:
    path, name = test.split("::")
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")


def test_no_row_has_lost_its_input() -> None:
    assert SPOILS.keys() <= {row[0] for row in [*ERRORS, *SECTIONS["Accepted"]]}
