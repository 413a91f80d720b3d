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


def test_a_failing_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, full = write(tmp_path, step=1), OSError(errno.ENOSPC, "No space left on device")
    message = f"checkpoint {path}: cannot be written: No space left on device"
    with monkeypatch.context() as patch:
        patch.setattr(files_module.os, "replace", after(0, lambda *_: None, full))
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


@pytest.mark.parametrize(("version", "age"), [(1, "1, from an older"), (99, "99, from a newer")])
def test_another_version_is_told_by_its_age(version: int, age: str, tmp_path: Path) -> None:
    """Foreign and damaged files: tests/model/test_state_dict.py."""
    torch.save({key: value for key, value in content(version=version).items() if key != "ema"}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=f"of format version {age} tmask"):
        load_checkpoint(tmp_path / "a.pt")


def build(**settings: Any) -> tuple[Any, dict[str, Any]]:
    """A model and the entries of its checkpoint."""
    model = tmask.build_model("tiny", 3, **SMALL, **settings)
    return model, {"model": model.state_dict(), "model_config": dataclasses.asdict(model.config)}


@pytest.mark.parametrize("averaged", [False, True])
def test_load_model_rebuilds_the_model(averaged: bool, tmp_path: Path) -> None:
    """With the averaged weights, if there are any."""
    settings = {"mask_transfer": {"inputs": "box"}, "mask_fusion_layers": 1, "mask_pool_size": 7}
    model, entries = build(convention="torchvision", roi_extractor={"op": "roi_pool"}, **settings)
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
