"""Data sets of image files with EXIF orientations or alpha."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.conftest import coco, polygon, told, write_coco
from tests.image_files import UPRIGHT, encoded, with_exif
from tmask.data import check
from tmask.data.check import check_images
from tmask.data.coco import CocoDataset

BOX = [3, 2, 7, 5]  # x, y, width, height


def stored(orientation: int = 1, height: int = 16, width: int = 16) -> Any:
    """A black image with a red rectangle in BOX, as a camera stores it with this orientation."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    x, y, w, h = BOX
    pixels[y : y + h, x : x + w, 0] = 200
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    return np.ascontiguousarray(UPRIGHT[inverse](pixels))


def write(folder: Path, files: dict[str, bytes], *, width: int = 16, height: int = 16) -> tuple[Path, Path]:
    """Images with an annotation of BOX each; returns the arguments of CocoDataset."""
    (folder / "images").mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / "images" / name).write_bytes(data)
    items = [{"image_id": i, "bbox": BOX, "segmentation": polygon(*BOX)} for i in range(1, len(files) + 1)]
    return write_coco(folder, coco([(name, width, height) for name in files], items))


def is_red_in_its_box(dataset: CocoDataset) -> bool:
    image, target = dataset[0]
    x1, y1, x2, y2 = target["boxes"][0].int().tolist()
    return bool((image[0, y1:y2, x1:x2] == 200).all()) and int(image[0].sum()) == 200 * BOX[2] * BOX[3]


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_setting_puts_pixels_and_boxes_together(tmp_path: Path, orientation: int) -> None:
    arguments = write(tmp_path, {"a.png": with_exif(stored(orientation), "png", orientation)})
    for apply_exif, fits in ((True, True), (False, orientation == 1), (None, orientation == 1)):
        dataset = CocoDataset(*arguments, apply_exif=apply_exif)
        with told() as messages:
            assert [is_red_in_its_box(dataset) for _ in range(2)] == [fits] * 2
        assert len(messages) == (apply_exif is None and orientation != 1)


def test_orientations_are_counted_before_a_run_and_told_once(tmp_path: Path) -> None:
    tagged, plain = with_exif(stored(), "png", 3), with_exif(stored(), "png")
    arguments = write(tmp_path, {"a.png": plain, "b.png": tagged, "c.png": tagged})
    dataset, first = CocoDataset(*arguments), tmp_path / "images" / "b.png"
    with told() as messages:
        check_images(dataset)
    (message,) = messages
    words = f"the EXIF orientation of 2 of 3 images, first {first}, is not applied. Were the annotations"
    assert message.startswith(words)
    assert "--data.exif" in message
    assert "--exif" in message
    with told() as messages:
        for data in (dataset, pickle.loads(pickle.dumps(dataset))):
            assert len([data[i] for i in range(3)]) == 3
        for decided in (True, False):
            check_images(data := CocoDataset(*arguments, apply_exif=decided))
            assert len(data[1]) == 2
    assert messages == []
    # Without the look at all headers the first such image tells.
    dataset = CocoDataset(*arguments)
    with told() as messages:
        assert len([dataset[i] for i in range(3)]) == 3
    (message,) = messages
    assert message.startswith(f"the EXIF orientation of {first}, and of others like it, is not applied.")


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(("width", "height", "works"), [(24, 16, True), (16, 24, False)])
def test_a_quarter_turn_shows_in_the_size(tmp_path: Path, suffix: str, width: int, height: int, works: bool) -> None:
    """Annotated upright, or as stored. The messages: docs/bad-input.md."""
    files = {f"a.{suffix}": with_exif(stored(6, 16, 24), suffix, 6)}
    arguments = write(tmp_path, files, width=width, height=height)
    check_images(right := CocoDataset(*arguments, apply_exif=works))
    assert is_red_in_its_box(right) == works
    for apply_exif in (None, False) if works else (True,):
        dataset = CocoDataset(*arguments, apply_exif=apply_exif)
        for read in (check_images, lambda data: data[0]):
            with pytest.raises(ValueError, match=f"swapped; --data.exif {str(works).lower()} "):
                read(dataset)


def test_swapped_sizes_without_a_tag_are_no_matter_of_exif(tmp_path: Path) -> None:
    files = {"a.png": with_exif(stored(1, 24, 16), "png", 3)}
    dataset = CocoDataset(*write(tmp_path, files, width=24, height=16))
    with pytest.raises(ValueError, match=r"got 16x24, width and height swapped$"):
        check_images(dataset)


def rgba(alpha: int) -> bytes:
    """A PNG whose first pixel has this alpha."""
    pixels = np.dstack([stored(), np.full((16, 16), 255, dtype=np.uint8)])
    pixels[0, 0, 3] = alpha
    return encoded(pixels)


def test_alpha_is_counted_before_a_run_and_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"a.png": with_exif(stored(), "png"), "b.png": rgba(255), "c.png": rgba(0)}
    arguments, first = write(tmp_path, files), tmp_path / "images" / "c.png"
    hidden = "is not opaque, and dropped: what it hides shows"

    def opened_and_read(*arguments: Path) -> list[str]:
        dataset = CocoDataset(*arguments)
        with told() as messages:
            check_images(dataset)
            for i in [*range(len(dataset)), len(dataset) - 1]:
                assert len(dataset[i]) == 2
        return messages

    assert opened_and_read(*arguments) == [f"the alpha of 1 of 3 images, first {first}, {hidden}"]
    # Of the images that are not decoded before the run the first tells.
    monkeypatch.setattr(check, "_ALPHAS_READ", 1)
    assert opened_and_read(*arguments) == [f"the alpha of {first}, and of others like it, {hidden}"]
    del files["c.png"]
    assert opened_and_read(*write(tmp_path, files)) == []
