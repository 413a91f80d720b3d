"""Checkpoints: whole or not at all, readable without running code, clear about what is wrong."""

import dataclasses
import errno
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import tmask
from tests.engine.predictions import SMALL
from tests.engine.toy import after
from tmask.config import TrainConfig
from tmask.engine import checkpoint
from tmask.engine import files as files_module
from tmask.engine.checkpoint import KEYS, CheckpointError, load_checkpoint, load_model, save_checkpoint

WEIGHTS = {"weight": torch.arange(3.0)}
RNG = {"torch": torch.get_rng_state(), "cuda": None}


def content(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = dict.fromkeys(KEYS) | {"optimizer": {}, "step": 12, "epoch": 1, "position": 2, "rng": RNG}
    base |= {"format": checkpoint.FORMAT, "version": checkpoint.VERSION, "model": WEIGHTS}
    base |= {"categories": [{"id": 7, "name": "disc"}], "train_config": dataclasses.asdict(TrainConfig())}
    return base | changes


def write(tmp_path: Path, **changes: Any) -> Path:
    save_checkpoint(tmp_path / "a.pt", content(**changes))
    return tmp_path / "a.pt"


def test_keys_are_a_contract() -> None:
    names = "format version model ema model_config categories train_config optimizer scaler step epoch position rng"
    assert " ".join(KEYS) == names
    assert checkpoint.YOUNGER_KEYS == ("exif",)
    assert checkpoint.VERSION == 2
    with pytest.raises(ValueError, match="content: expected the keys"):
        save_checkpoint("a.pt", content(more=1))


def test_round_trip(tmp_path: Path) -> None:
    loaded = load_checkpoint(write(tmp_path / "new folder"))
    assert torch.equal(loaded.pop("model")["weight"], WEIGHTS["weight"])
    assert torch.equal(loaded.pop("rng")["torch"], RNG["torch"])
    assert loaded == {key: value for key, value in content().items() if key not in ("model", "rng")}
    assert [item.name for item in (tmp_path / "new folder").iterdir()] == ["a.pt"]


@pytest.mark.parametrize("stage", ["write", "rename"])
def test_a_failing_write_leaves_the_old_file(tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, step=1)
    full = OSError(errno.ENOSPC, "No space left on device")

    def half_written(value: Any, file: Any) -> None:
        file.write(b"half")
        try:
            raise full
        except OSError:
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed") from None

    with monkeypatch.context() as patch:
        if stage == "write":
            patch.setattr(checkpoint.torch, "save", half_written)
        else:
            patch.setattr(files_module.os, "replace", after(0, lambda *_: None, full))
        message = f"checkpoint {path}: cannot be written: No space left on device"
        with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
            write(tmp_path, step=2)
    assert load_checkpoint(path)["step"] == 1
    assert [item.name for item in tmp_path.iterdir()] == ["a.pt"]


def test_what_a_killed_process_leaves_goes_with_the_next(tmp_path: Path) -> None:
    (tmp_path / ".a.pt.part").write_bytes(b"half")
    assert load_checkpoint(write(tmp_path, step=3))["step"] == 3
    assert [item.name for item in tmp_path.iterdir()] == ["a.pt"]


def test_a_full_disk_is_told_by_name_and_reason(tmp_path: Path) -> None:
    """A real limit on the size of files, in a process of its own: no test double says what torch.save does then."""
    code = """
import resource, sys
from pathlib import Path
import torch
from tests.engine.test_checkpoint import content
from tmask.engine.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

path = Path(sys.argv[1])
save_checkpoint(path, content(step=1))
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
for weights in ({"a": torch.zeros(200_000)}, {str(i): torch.zeros(1000) for i in range(200)}):
    try:
        save_checkpoint(path, content(model=weights))
    except CheckpointError as error:
        print(error)
print(load_checkpoint(path)["step"], [item.name for item in path.parent.iterdir()])
"""
    path = tmp_path / "a.pt"
    root = Path(__file__).parents[2]
    argv = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=root)
    assert done.stdout.splitlines() == [*[f"checkpoint {path}: cannot be written: File too large"] * 2, "1 ['a.pt']"]
    assert done.stderr == ""


def test_bytes_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(files_module.os, name)
        monkeypatch.setattr(
            files_module.os, name, lambda *given, name=name, real=real: (calls.append(name), real(*given))
        )
    write(tmp_path)
    assert calls[:2] == ["fsync", "replace"]


def test_missing_truncated_and_foreign_files_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(path)
    whole = write(tmp_path).read_bytes()
    for size in (100, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="expected a file written by tmask, got a truncated or damaged file"):
            load_checkpoint(path)
    old = {key: value for key, value in content(version=1).items() if key != "ema"}
    for other, message in (
        ({"model": {}}, "expected a file written by tmask"),
        (old, "version 1, from an older tmask"),
        (content(version=99), "99, from a newer tmask"),
    ):
        torch.save(other, path)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


def test_code_in_a_file_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(content(categories=Evil()), tmp_path / "a.pt")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "a.pt")
    assert "code ran" not in capsys.readouterr().out


def build(**settings: Any) -> tuple[Any, dict[str, Any]]:
    """A model and the entries of its checkpoint."""
    model = tmask.build_model("tiny", 3, **SMALL, **settings)
    return model, {"model": model.state_dict(), "model_config": dataclasses.asdict(model.config)}


@pytest.mark.parametrize("averaged", [False, True])
def test_load_model_rebuilds_the_model(averaged: bool, tmp_path: Path) -> None:
    """With the averaged weights, if there are any."""
    model, entries = build(convention="torchvision", roi_extractor={"op": "roi_pool"})
    weights = entries["model"]
    if averaged:
        weights = {name: value + 1 if value.is_floating_point() else value for name, value in weights.items()}
    loaded, rest = load_model(write(tmp_path, **entries, ema=weights if averaged else None))
    assert loaded.config == model.config
    assert not loaded.training
    assert rest["categories"] == [{"id": 7, "name": "disc"}]
    assert not {"model", "ema"} & rest.keys()
    for name, value in weights.items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_load_model_of_frozen_layers_gives_no_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="random"):
        _, entries = build(norm="frozen_bn", trainable_layers=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(write(tmp_path, **entries))


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    _, entries = build()
    config = entries["model_config"]
    shapes = r"weights do not fit the model: .*: expected \[24.*\], got \[16.* and \d+ more"
    for other, message in (
        (config | {"fpn_channels": 24}, shapes),
        (config | {"fpn_chanels": 3}, "unknown ModelConfig setting 'fpn_chanels': expected 'fpn_channels'"),
        (None, "not made by build_model"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_model(write(tmp_path, **entries | {"model_config": other}))
