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
from tmask.config import TrainConfig
from tmask.engine import checkpoint, files
from tmask.engine.checkpoint import KEYS, CheckpointError, load_checkpoint, load_model, save_checkpoint

SMALL = {"min_size": 64, "max_size": 96, "fpn_channels": 16, "box_head_dim": 16, "mask_head_channels": 16}


def content(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "format": checkpoint.FORMAT,
        "version": checkpoint.VERSION,
        "model": {"weight": torch.arange(3.0)},
        "ema": None,
        "model_config": None,
        "categories": [{"id": 7, "name": "disc"}],
        "train_config": dataclasses.asdict(TrainConfig()),
        "optimizer": {},
        "scaler": None,
        "step": 12,
        "epoch": 1,
        "position": 2,
        "rng": {"torch": torch.get_rng_state(), "cuda": None},
    }
    return base | changes


def test_keys_are_a_contract() -> None:
    assert KEYS == (
        "format",
        "version",
        "model",
        "ema",
        "model_config",
        "categories",
        "train_config",
        "optimizer",
        "scaler",
        "step",
        "epoch",
        "position",
        "rng",
    )
    assert checkpoint.YOUNGER_KEYS == ("exif",)
    assert checkpoint.VERSION == 2


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "a.pt"
    saved = content()
    save_checkpoint(path, saved)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded.pop("model")["weight"], torch.arange(3.0))
    assert torch.equal(loaded.pop("rng")["torch"], saved["rng"]["torch"])
    assert loaded == {key: value for key, value in saved.items() if key not in ("model", "rng")}
    assert [item.name for item in path.parent.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("stage", ["write", "rename"])
def test_a_failing_write_leaves_the_old_file(tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(path, content(step=1))

    def half_written(value: Any, file: Any) -> None:
        file.write(b"half")
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed") from None

    def no_rename(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if stage == "write":
        monkeypatch.setattr(checkpoint.torch, "save", half_written)
    else:
        monkeypatch.setattr(files.os, "replace", no_rename)
    message = f"checkpoint {path}: cannot be written: No space left on device"
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        save_checkpoint(path, content(step=2))
    monkeypatch.undo()
    assert load_checkpoint(path)["step"] == 1
    assert [item.name for item in tmp_path.iterdir()] == ["a.pt"]


def test_what_a_killed_process_leaves_goes_with_the_next(tmp_path: Path) -> None:
    (tmp_path / ".a.pt.part").write_bytes(b"half")
    save_checkpoint(tmp_path / "a.pt", content(step=3))
    assert load_checkpoint(tmp_path / "a.pt")["step"] == 3
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
    real_sync, real_replace = files.os.fsync, files.os.replace
    monkeypatch.setattr(files.os, "fsync", lambda handle: (calls.append("fsync"), real_sync(handle))[1])
    monkeypatch.setattr(files.os, "replace", lambda a, b: (calls.append("replace"), real_replace(a, b))[1])
    save_checkpoint(tmp_path / "a.pt", content())
    assert calls[:2] == ["fsync", "replace"]


def test_other_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="content: expected the keys"):
        save_checkpoint(tmp_path / "a.pt", content(more=1))


def test_missing_truncated_and_foreign_files_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(path)
    save_checkpoint(path, content())
    whole = path.read_bytes()
    for size in (100, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="expected a file written by tmask, got a truncated or damaged file"):
            load_checkpoint(path)
    torch.save({"model": {}}, path)
    with pytest.raises(CheckpointError, match="expected a file written by tmask"):
        load_checkpoint(path)
    old = {key: value for key, value in content(version=1).items() if key != "ema"}
    for other, message in ((old, "version 1, from an older tmask"), (content(version=99), "99, from a newer tmask")):
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


def model_content(model: Any, **changes: Any) -> dict[str, Any]:
    return content(model=model.state_dict(), model_config=dataclasses.asdict(model.config), **changes)


def test_load_model_rebuilds_the_model(tmp_path: Path) -> None:
    model = tmask.build_model("tiny", 3, convention="torchvision", roi_extractor={"op": "roi_pool"}, **SMALL)
    save_checkpoint(tmp_path / "a.pt", model_content(model))
    loaded, saved = load_model(tmp_path / "a.pt")
    assert loaded.config == model.config
    assert not loaded.training
    assert saved["categories"] == [{"id": 7, "name": "disc"}]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_load_model_takes_the_averaged_weights(tmp_path: Path) -> None:
    model = tmask.build_model("tiny", 3, **SMALL)
    average = {name: value + 1 if value.is_floating_point() else value for name, value in model.state_dict().items()}
    save_checkpoint(tmp_path / "a.pt", model_content(model, ema=average))
    loaded, saved = load_model(tmp_path / "a.pt")
    for name, value in average.items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert "ema" not in saved


def test_load_model_of_frozen_layers_gives_no_warning(tmp_path: Path) -> None:
    frozen: dict[str, Any] = {"norm": "frozen_bn", "trainable_layers": 3}
    with pytest.warns(UserWarning, match="random"):
        model = tmask.build_model("tiny", 3, **frozen, **SMALL)
    save_checkpoint(tmp_path / "a.pt", model_content(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(tmp_path / "a.pt")


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    model = tmask.build_model("tiny", 3, **SMALL)
    config = dataclasses.asdict(dataclasses.replace(model.config, fpn_channels=24))
    save_checkpoint(tmp_path / "a.pt", model_content(model) | {"model_config": config})
    with pytest.raises(
        CheckpointError, match=r"weights do not fit the model: .*: expected \[24.*\], got \[16.* and \d+ more"
    ):
        load_model(tmp_path / "a.pt")
    config = dataclasses.asdict(model.config) | {"fpn_chanels": 3}
    save_checkpoint(tmp_path / "a.pt", model_content(model) | {"model_config": config})
    with pytest.raises(CheckpointError, match="unknown ModelConfig setting 'fpn_chanels': expected 'fpn_channels'"):
        load_model(tmp_path / "a.pt")
    save_checkpoint(tmp_path / "a.pt", content())
    with pytest.raises(CheckpointError, match="not made by build_model"):
        load_model(tmp_path / "a.pt")
