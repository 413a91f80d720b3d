"""Which images a file name, a folder or a glob gives."""

import os
import warnings
from pathlib import Path

import pytest

from tests.engine.predictions import touch
from tmask.engine.predict import find_images


def test_a_folder_gives_its_visible_images(tmp_path: Path) -> None:
    touch(tmp_path, "b.JPG", "a b[1].png", "ü.Tiff", ".hidden.png", "._b.JPG", "sub/b.JPG", ".hidden/e.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "a b[1].png")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = find_images(tmp_path)
    assert list(found) == ["a b[1].png", "b.JPG", "broken.png", "link.png", "sub/b.JPG", "ü.Tiff"]
    assert found["sub/b.JPG"] == tmp_path / "sub" / "b.JPG"


def test_every_format_that_can_be_read_is_found(tmp_path: Path) -> None:
    suffixes = "jfif jpe avif JP2 j2k gif pgm PPM pbm webp apng tga ico dib"
    names = [f"a.{suffix}" for suffix in suffixes.split()]
    touch(tmp_path, *names)
    assert list(find_images(tmp_path)) == sorted(names)


@pytest.mark.parametrize("pattern", ["", "**", "**/*.*"])
def test_files_of_other_suffixes_are_counted_in_a_warning(tmp_path: Path, pattern: str) -> None:
    touch(tmp_path, "a.png", "b.txt", "c", "sub/d.heic", "sub/e.jpg", ".DS_Store")
    with pytest.warns(UserWarning, match="image") as told:
        assert list(find_images(tmp_path / pattern)) == ["a.png", "sub/e.jpg"]
    first = tmp_path / "b.txt"
    count, total = (2, 4) if pattern == "**/*.*" else (3, 5)
    words = f"images: left out {count} of {total} files, whose suffix is that of no image format, first {first}"
    assert [str(item.message) for item in told] == [words]


def test_links_to_folders_are_followed_and_make_no_loop(tmp_path: Path) -> None:
    touch(tmp_path, "x/in/a.png", "x/in/sub/b.png", "elsewhere/c.png")
    root = tmp_path / "x"
    (root / "in" / "up").symlink_to(root)
    (root / "in" / "sub" / "self").symlink_to(".")
    (root / "again").symlink_to(root / "in")  # named before the folder it leads to
    (root / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(root)
    (root / "nowhere").symlink_to(tmp_path / "nothing")
    with pytest.warns(UserWarning, match="left out 1 of 4 files, .*/x/nowhere$"):  # a link that leads to no folder
        assert list(find_images(root)) == ["in/a.png", "in/sub/b.png", "out/c.png"]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the system says; root may read everything."""
    touch(tmp_path, "a.png", "sub/b.png")
    scan = os.scandir

    def refuse(path: str) -> object:
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="sub"):
        find_images(tmp_path)


@pytest.mark.filterwarnings("ignore:images. left out")
def test_globs_name_images_from_their_fixed_part_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "x/a.png", "x/sub/b.png", "x/sub/c.gif", "x/sub/d.txt", "e.png")
    names = {
        "x/**/*.png": ["a.png", "sub/b.png"],
        "x/**/**/*.png": ["a.png", "sub/b.png"],  # which finds files twice
        "x/**": ["a.png", "sub/b.png", "sub/c.gif"],
        "x/*/*.*": ["sub/b.png", "sub/c.gif"],
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
