"""Which images a file name, a folder or a glob gives."""

from pathlib import Path

import pytest

from tests.engine.predictions import touch
from tmask.engine.predict import find_images


def test_a_folder_gives_its_visible_images(tmp_path: Path) -> None:
    touch(tmp_path, "b.JPG", "a b[1].png", "ü.Tiff", ".hidden.png", "._b.JPG", "c.txt", "sub/d.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "a b[1].png")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere")
    assert list(find_images(tmp_path)) == ["a b[1].png", "b.JPG", "broken.png", "link.png", "ü.Tiff"]


def test_globs_name_images_from_their_fixed_part_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "x/a.png", "x/sub/b.png", "x/sub/c.gif", "x/sub/d.txt", "e.png")
    names = {
        "x/**/*.png": ["a.png", "sub/b.png"],
        "x/**/**/*.png": ["a.png", "sub/b.png"],  # which finds files twice
        "x/**": ["a.png", "sub/b.png"],
        "x/*/*.*": ["sub/b.png"],
        "x/s*/*.gif": ["sub/c.gif"],  # asked for by name
        "./x/[ab].png": ["a.png"],
        "*.png": ["e.png"],
    }
    monkeypatch.chdir(tmp_path)
    for base in ("", f"{tmp_path}/"):
        for pattern, expected in names.items():
            found = find_images(base + pattern)
            assert list(found) == expected, pattern
            assert all(path.is_file() for path in found.values())


def test_one_file_may_have_any_name(tmp_path: Path) -> None:
    touch(tmp_path, "a[1]*.dat", "x[1]/b.png")
    assert find_images(tmp_path / "a[1]*.dat") == {"a[1]*.dat": tmp_path / "a[1]*.dat"}
    assert list(find_images(tmp_path / "x[1]")) == ["b.png"]


@pytest.mark.parametrize("pattern", ["", "none", "none.png", "*.jpg", "empty"])
def test_no_images_are_an_error(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="images: expected an image, a folder of images or a glob, found no image at"):
        find_images(str(tmp_path / pattern))
