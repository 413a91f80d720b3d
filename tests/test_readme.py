"""What the README tells a newcomer to type works: commands parse, Python runs, links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import tmask
from tmask import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line for line in re.sub(r"\\\n\s*", "", README).splitlines() if re.match(r"tmask (train|eval|predict) ", line)
]


def test_there_are_commands() -> None:
    assert {shlex.split(line)[1] for line in COMMANDS} == {"train", "eval", "predict"}


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: line.split()[1])
def test_commands_parse(line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """They fail for want of the data alone."""
    arguments = [word.replace("data/", f"{tmp_path}/") for word in shlex.split(line)[1:]]
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err
    assert "no such file" in message


@pytest.mark.parametrize("recipe", sorted((ROOT / "docs/recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_parse(
    recipe: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They too fail for want of the data alone."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--config", str(recipe), "--out", str(tmp_path / "out")]) == 2
    assert "no such file or folder: data/" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_python_runs() -> None:
    model_code, torchvision_code, ops_code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(model_code.replace('"r50_fpn"', '"tiny"'), names)
    assert names["result"]["masks"].shape[1:] == (1, 480, 640)  # type: ignore[index]
    exec(torchvision_code.replace('weights="COCO_V1"', "weights=None, weights_backbone=None"), names)
    assert isinstance(names["model"], tmask.MaskRCNN)
    boxes = torch.tensor([[[0.0, 0, 30, 30], [5, 5, 50, 50]]])
    pyramid = [torch.rand(1, 8, 64 // k, 64 // k) for k in (1, 2, 4, 8)]
    names = {"boxes": boxes[0], "scores": torch.rand(2), "pyramid": pyramid}
    first, second = ops_code.split("with use_backend")
    exec(first, names)
    names |= {"boxes": boxes, "valid": torch.ones(1, 2, dtype=torch.bool)}
    exec("with use_backend" + second, names)
    assert names["pooled"].shape == (2, 8, 7, 7)  # type: ignore[attr-defined]


PAGES = [path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]]


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"
