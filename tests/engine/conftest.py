"""Fixtures of the tests of training, evaluation and prediction."""

from pathlib import Path
from typing import Any

import pytest

from tests.engine.predictions import make_model, write_checkpoint
from tmask.data.shapes import write_shapes


@pytest.fixture
def model() -> Any:
    return make_model()


@pytest.fixture
def checkpoint(model: Any, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "a.pt", model)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    folder, _ = write_shapes(tmp_path / "shapes", num_images=4, seed=0, size=64)
    return sorted(folder.iterdir())


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Four small images in ``data`` of the present folder, which is empty else; for `toy.command`."""
    monkeypatch.chdir(tmp_path)
    return write_shapes("data", num_images=4, seed=1, size=32)


@pytest.fixture
def corners(tmp_path: Path) -> tuple[Path, Path]:
    """Images and annotations with keypoints."""
    return write_shapes(tmp_path / "shapes", num_images=2, seed=0, size=64, variant="corners")
