"""What the tests of prediction share: a small model, and readers of what a run left."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import tmask
from tmask.data.shapes import CLASSES
from tmask.engine.checkpoint import FORMAT, KEYS, VERSION, save_checkpoint

CATEGORIES = [{"id": 10 * label, "name": name} for label, name in enumerate(CLASSES, start=1)]


def make_model(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    small = {"min_size": 64, "max_size": 64, "fpn_channels": 16, "box_head_dim": 16, "mask_head_channels": 16}
    return tmask.build_model(
        "tiny", len(CLASSES) + 1, **{**small, "max_detections": 5, "box_score_threshold": 1e-6, **options}
    )


def write_checkpoint(path: Path, model: Any, **entries: Any) -> Path:
    """A checkpoint of `model` with no more entries than it needs, and `entries`."""
    content: dict[str, Any] = dict.fromkeys(KEYS)
    content |= {"format": FORMAT, "version": VERSION, "model": model.state_dict(), "categories": CATEGORIES}
    content |= {"model_config": dataclasses.asdict(model.config), **entries}
    save_checkpoint(path, content)
    return path


def by_name(paths: list[Path]) -> dict[str, Path]:
    return {path.name: path for path in paths}


def rows(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "predictions.json").read_text())  # type: ignore[no-any-return]


def seen(out: Path) -> list[tuple[int, str]]:
    """Image ids and files of predictions.json."""
    return sorted({(row["image_id"], row["file_name"]) for row in rows(out)})


def pictures(out: Path) -> list[str]:
    folder = out / "pictures"
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def count_calls(model: Any) -> list[int]:
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def stop_at(model: Any, number: int, error: BaseException) -> None:
    """Raise `error` when the model sees its image of that number."""
    calls: list[int] = []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) == number:
            raise error

    model.register_forward_pre_hook(hook)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")


def read_pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
