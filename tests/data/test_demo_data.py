"""When the demo draws its pictures anew."""

from pathlib import Path

import pytest

from tmask.data import shapes
from tmask.demo import make_data


def test_pictures_of_another_generator_are_drawn_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn_anew(num_images: int = 2) -> bool:
        (tmp_path / "images").mkdir(exist_ok=True)
        first = tmp_path / "images" / "000000.png"
        first.write_text("kept")
        make_data(tmp_path, num_images=num_images, seed=1, size=64)
        return first.read_bytes() != b"kept"

    assert drawn_anew()
    assert not drawn_anew()
    monkeypatch.setattr(shapes, "GENERATOR_VERSION", shapes.GENERATOR_VERSION + 1)
    assert drawn_anew()
    assert not drawn_anew()
    assert drawn_anew(num_images=3)
