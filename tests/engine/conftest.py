"""Fixtures of the tests of prediction."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.engine.predictions import CATEGORIES, make_model
from tmask.data.shapes import write_shapes
from tmask.engine.checkpoint import FORMAT, KEYS, VERSION, save_checkpoint


@pytest.fixture
def model() -> Any:
    return make_model()


@pytest.fixture
def checkpoint(model: Any, tmp_path: Path) -> Path:
    content: dict[str, Any] = dict.fromkeys(KEYS)
    content |= {"format": FORMAT, "version": VERSION, "model": model.state_dict(), "categories": CATEGORIES}
    content |= {"model_config": dataclasses.asdict(model.config)}
    save_checkpoint(tmp_path / "a.pt", content)
    return tmp_path / "a.pt"


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    folder, _ = write_shapes(tmp_path / "shapes", num_images=4, seed=0, size=64)
    return sorted(folder.iterdir())
