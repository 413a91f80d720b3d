"""What the tests of prediction share: a small model, and readers of what a run left."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import tmask
from tests.engine.toy import after
from tmask import cli
from tmask.data.shapes import CLASSES
from tmask.engine.checkpoint import FORMAT, KEYS, VERSION, save_checkpoint

CATEGORIES = [{"id": 10 * label, "name": name} for label, name in enumerate(CLASSES, start=1)]
SMALL = {"min_size": 64, "max_size": 64, "fpn_channels": 16, "box_head_dim": 16, "mask_head_channels": 16}


def make_model(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return tmask.build_model(
        "tiny", len(CLASSES) + 1, **{**SMALL, "max_detections": 5, "box_score_threshold": 1e-6, **options}
    )


def write_checkpoint(path: Path, model: Any, **entries: Any) -> Path:
    """A checkpoint of `model` with no more entries than it needs, and `entries`."""
    content: dict[str, Any] = dict.fromkeys(KEYS)
    content |= {"format": FORMAT, "version": VERSION, "model": model.state_dict(), "categories": CATEGORIES}
    content |= {"model_config": dataclasses.asdict(model.config), **entries}
    save_checkpoint(path, content)
    return path


def run_predict(checkpoint: Path, images: Path | str, out: Path, *more: str) -> int:
    """The exit code of `tmask predict`."""
    return cli.main(["predict", "--checkpoint", str(checkpoint), "--images", str(images), "--out", str(out), *more])


def by_name(paths: list[Path]) -> dict[str, Path]:
    return {path.name: path for path in paths}


def rows(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "predictions.json").read_text())  # type: ignore[no-any-return]


def listed(out: Path) -> list[dict[str, Any]]:
    """The images of images.json."""
    return json.loads((out / "images.json").read_text())["images"]  # type: ignore[no-any-return]


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
    model.register_forward_pre_hook(after(number - 1, lambda *_: None, error))


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")


def read_pixels(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
