"""A data set whose image files say more than RGB pixels as stored: EXIF orientations and alpha."""

import io
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.image_files import with_exif
from tmask.data import check
from tmask.data.check import check_images
from tmask.data.coco import CocoDataset

# What a camera stores of an upright image [H, W, 3] with each orientation.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}
BOX = [3, 2, 7, 5]  # x, y, width, height


def upright(height: int = 16, width: int = 16) -> Any:
    """A black image with a red rectangle in BOX."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    x, y, w, h = BOX
    pixels[y : y + h, x : x + w, 0] = 200
    return pixels


def write(folder: Path, files: dict[str, bytes], *, width: int = 16, height: int = 16) -> tuple[Path, Path]:
    """Images with an annotation of BOX each; gives the arguments of CocoDataset."""
    for name, data in files.items():
        (folder / name).write_bytes(data)
    sizes = {"width": width, "height": height}
    listed = [{"id": i, "file_name": name, **sizes} for i, name in enumerate(files, start=1)]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": BOX} for i in range(1, len(files) + 1)]
    content = {"images": listed, "annotations": boxes, "categories": [{"id": 1, "name": "red"}]}
    (folder / "a.json").write_text(json.dumps(content))
    return folder, folder / "a.json"


def is_red_in_its_box(dataset: CocoDataset, i: int = 0) -> bool:
    image, target = dataset[i]
    x1, y1, x2, y2 = target["boxes"][0].int().tolist()
    return bool((image[0, y1:y2, x1:x2] == 200).all()) and int(image[0].sum()) == 200 * BOX[2] * BOX[3]


def messages(function: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        function()
    return [str(item.message) for item in told]


@pytest.mark.parametrize("orientation", STORED)
def test_a_setting_puts_pixels_and_boxes_together(tmp_path: Path, orientation: int) -> None:
    pixels = np.ascontiguousarray(STORED[orientation](upright()))
    arguments = write(tmp_path, {"a.png": with_exif(pixels, "png", orientation)})
    for apply_exif, fits in ((True, True), (False, orientation == 1), (None, orientation == 1)):
        dataset = CocoDataset(*arguments, apply_exif=apply_exif)
        told = messages(lambda dataset=dataset, fits=fits: [is_red_in_its_box(dataset) == fits for _ in "two"])
        assert len(told) == (apply_exif is None and orientation != 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert is_red_in_its_box(dataset) == fits


def test_orientations_are_counted_before_a_run_and_told_once(tmp_path: Path) -> None:
    tagged, plain = with_exif(upright(), "png", 3), with_exif(upright(), "png")
    arguments = write(tmp_path, {"a.png": plain, "b.png": tagged, "c.png": tagged})
    dataset = CocoDataset(*arguments)
    told = messages(lambda: check_images(dataset))
    assert len(told) == 1
    words = f"the EXIF orientation of 2 of 3 images, first {tmp_path / 'b.png'}, is not applied. Were the annotations"
    assert told[0].startswith(words)
    assert "--data.exif" in told[0]
    assert "--exif" in told[0]
    assert (
        messages(lambda: [item[i] for item in (dataset, pickle.loads(pickle.dumps(dataset))) for i in range(3)]) == []
    )
    for decided in (True, False):
        decided_set = CocoDataset(*arguments, apply_exif=decided)
        assert messages(lambda: (check_images(decided_set), decided_set[1])) == []  # noqa: B023
    # Without the look at all headers the first such image tells.
    dataset = CocoDataset(*arguments)
    told = messages(lambda: [dataset[i] for i in range(3)])
    assert len(told) == 1
    assert told[0].startswith(f"the EXIF orientation of {tmp_path / 'b.png'}, and of others like it, is not applied.")


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_quarter_turn_shows_in_the_size_and_the_error_names_the_setting(tmp_path: Path, suffix: str) -> None:
    name, pixels = f"a.{suffix}", np.ascontiguousarray(STORED[6](upright(16, 24)))
    sizes = {"width": 24, "height": 16}
    arguments = write(tmp_path, {name: with_exif(pixels, suffix, 6)}, **sizes)
    check_images(turned := CocoDataset(*arguments, apply_exif=True))
    assert is_red_in_its_box(turned)
    for apply_exif in (None, False):
        dataset = CocoDataset(*arguments, apply_exif=apply_exif)
        expected = (
            f"{name}: expected 24x16 pixels by .*a.json, got 16x24, width and height swapped; "
            r"--data.exif true \(eval: --exif true\) turns it by its EXIF orientation$"
        )
        for read in (check_images, lambda data: data[0]):
            with pytest.raises(ValueError, match=expected):
                read(dataset)
    # Annotated as stored, and read upright.
    arguments = write(tmp_path, {name: with_exif(pixels, suffix, 6)}, width=16, height=24)
    check_images(CocoDataset(*arguments, apply_exif=False))
    dataset = CocoDataset(*arguments, apply_exif=True)
    for read in (check_images, lambda data: data[0]):
        with pytest.raises(
            ValueError, match=r"got 24x16, .*; --data.exif false \(eval: --exif false\) reads it without"
        ):
            read(dataset)


def test_swapped_sizes_without_a_tag_are_no_matter_of_exif(tmp_path: Path) -> None:
    dataset = CocoDataset(*write(tmp_path, {"a.png": with_exif(upright(24, 16), "png", 3)}, width=24, height=16))
    with pytest.raises(ValueError, match=r"got 16x24, width and height swapped$"):
        check_images(dataset)


def rgba(alpha: int) -> bytes:
    """A PNG whose first pixel has this alpha."""
    out = io.BytesIO()
    pixels = np.dstack([upright(), np.full((16, 16), 255, dtype=np.uint8)])
    pixels[0, 0, 3] = alpha
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def test_alpha_is_counted_before_a_run_and_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clear, opaque, plain = rgba(0), rgba(255), with_exif(upright(), "png")
    arguments = write(tmp_path, {"a.png": plain, "b.png": opaque, "c.png": clear})
    dataset = CocoDataset(*arguments)
    told = messages(lambda: (check_images(dataset), [dataset[i] for i in range(3)]))
    assert told == [
        f"the alpha of 1 of 3 images, first {tmp_path / 'c.png'}, is not opaque, and dropped: what it hides shows"
    ]
    # Of the images that are not decoded before the run the first tells.
    monkeypatch.setattr(check, "_ALPHAS_READ", 1)
    dataset = CocoDataset(*arguments)
    assert messages(lambda: check_images(dataset)) == []
    told = messages(lambda: [dataset[i] for i in (0, 1, 2, 2)])
    words = f"the alpha of {tmp_path / 'c.png'}, and of others like it, is not opaque, and dropped: what it hides shows"
    assert told == [words]
    opaque_set = CocoDataset(*write(tmp_path, {"a.png": plain, "b.png": opaque}))
    assert messages(lambda: (check_images(opaque_set), [opaque_set[i] for i in range(2)])) == []


def test_every_header_is_read_before_a_run(tmp_path: Path) -> None:
    dataset = CocoDataset(*write(tmp_path, {"a.png": rgba(255), "b.png": b"", "c.png": rgba(255)}))
    with pytest.raises(ValueError, match=r"b.png: cannot be read as an image: empty"):
        check_images(dataset)
