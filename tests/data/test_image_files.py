"""Images under another name than the annotation file's: taken if one file alone can be meant, else shown."""

import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.conftest import coco, told, write_coco
from tmask.data.coco import CocoDataset
from tmask.engine.predict import image_records


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    """Open a data set whose folder has the files `there`, and whose images have the names `named`."""

    def opened(there: list[str], named: list[str], **fields: Any) -> tuple[list[str], list[str]]:
        for name in there:
            path = tmp_path / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(path) if path.suffix != ".txt" else path.touch()
        content = coco([(name, 6, 4) for name in named])
        first = content["images"][0] | fields
        content["images"][0] = {name: value for name, value in first.items() if value != "left out"}
        write_coco(tmp_path, content)
        with told() as messages:
            dataset = CocoDataset(tmp_path / "images", tmp_path / "file.json")
        paths = [dataset.image_path(i).relative_to(tmp_path / "images").as_posix() for i in range(len(dataset))]
        assert all(dataset[i][0].shape == (3, 4, 6) for i in range(len(dataset)))
        return paths, messages

    return opened


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "é1.png") for form in ("NFC", "NFD"))
OTHER_NAMES = {
    "backslash": ("a/1.png", r"a\1.png"),
    "two backslashes": ("a/1.png", r"a\\1.png"),
    "a folder above": ("1.png", "images/1.png"),
    "a folder above, with backslashes": ("1.png", r".\images\1.png"),
    "a folder below": ("train/1.png", "1.png"),
    "absolute": ("1.png", "/home/someone/data/images/1.png"),
    "of Windows": ("1.png", r"C:\data\images\1.png"),
    "of Windows, with slashes": ("a/1.png", "C:/data/images/a/1.png"),
    "up and down": ("1.png", "../../upload/1.png"),
    "URL": ("1.png", "https://example.org/data/images/1.png"),
    "URL with a signature": ("a b.png", "https://example.org/x/a%20b.png?X-Signature=1.png&e=3"),
    "URL of a store": ("1.png", "s3://bucket/data/1.png"),
    "path in a query": ("a/1.png", "http://localhost:8080/data/local-files/?d=data/a/1.png"),
    "quoted": ("a b.png", "a%20b.png"),
    "composed": (DECOMPOSED, COMPOSED),
    "decomposed": (COMPOSED, DECOMPOSED),
    "case of the suffix": ("1.png", "1.PNG"),
    "case": ("Train/Img_1.PNG", "train/img_1.png"),
    "suffix": ("1.png", "1.jpg"),
    "no suffix": ("1.png", "1"),
    "suffix with a point before": ("1.2.png", "1.2"),
    "all of it": (f"a/{DECOMPOSED}", rf"D:\data\A\{COMPOSED.replace('png', 'JPEG')}"),
}


@pytest.mark.parametrize(("there", "named"), OTHER_NAMES.values(), ids=OTHER_NAMES)
def test_it_is_taken_with_a_warning_and_prediction_finds_its_id(
    opened: Any, tmp_path: Path, there: str, named: str
) -> None:
    paths, messages = opened([there, "other.png", "1.txt"], ["other.png", named])
    assert paths == ["other.png", there]
    expected = f"1 of 2 images are there under another name, first {named!r}: {there} (image id 2)"
    assert messages == [f"{tmp_path / 'file.json'}: {expected}"]
    expected = f"1 of 2 images are in it under another name, first {there}: {named!r} (image id 2)"
    with pytest.warns(UserWarning, match=re.escape(expected)):
        records = image_records(tmp_path / "file.json", [there, "other.png"])
    assert {name: record["id"] for name, record in records.items()} == {there: 2, "other.png": 1}


def test_names_as_they_are_give_no_warning(opened: Any) -> None:
    names = ["a/1.png", "1.png", "b/1.png"]
    assert opened(sorted(names), names) == (names, [])


@pytest.mark.parametrize("there", ["397133.jpg", "val2017/397133.jpg"])
def test_lvis_names_an_image_by_its_url(opened: Any, tmp_path: Path, there: str) -> None:
    lvis = {"coco_url": "http://images.cocodataset.org/val2017/397133.jpg", "neg_category_ids": [3], "license": None}
    for name in (None, "left out"):
        assert opened([there], [""], **lvis, file_name=name) == ([there], [])
    assert image_records(tmp_path / "file.json", ["397133.jpg"])["397133.jpg"]["id"] == 1


NOT_SURE = {
    "two folders": (["a/1.png", "b/1.png"], ["1.png"], "; there is a/1.png and b/1.png"),
    "another folder": (["b/1.png"], ["a/1.png"], "; there is b/1.png"),
    "two formats": (["1.png", "1.bmp"], ["1.jpg"], "; there is 1.bmp and 1.png"),
    "two cases": (["a.png", "A.png"], ["a.PNG"], "; there is A.png and a.png"),
    "nearly the name": (["image_01.png"], ["image_1.png"], "; there is image_01.png"),
    "too long a name": (["1.png"], ["1" * 300 + ".png"], ""),
    "nothing like it": (["x.png"], ["0123456.jpg"], ""),
    "no image": (["1.txt"], ["1.png"], ""),
}


@pytest.mark.parametrize(("there", "named", "hint"), NOT_SURE.values(), ids=NOT_SURE)
def test_what_may_be_another_image_is_shown_and_not_taken(
    opened: Any, tmp_path: Path, there: list[str], named: list[str], hint: str
) -> None:
    with pytest.raises(ValueError, match="images_folder") as error:
        opened(there, named)
    none = f"images_folder: none of the 1 images of {tmp_path / 'file.json'} is in {tmp_path / 'images'}"
    assert str(error.value) == f"{none}, first {named[0]} (image id 1){hint}"


@pytest.mark.parametrize("named", [["a/1.png", "b/1.png"], ["1.jpg", "1.bmp"], ["1.png", "1.jpg"]], ids=str)
def test_a_file_is_not_taken_for_two_images(opened: Any, named: list[str]) -> None:
    with pytest.raises(ValueError, match=r"; there is 1.png$"):
        opened(["1.png", "2.png"], [*named, "2.png"])


def test_a_file_that_is_like_the_name_but_another_image_s_is_no_hint(opened: Any) -> None:
    with pytest.raises(ValueError, match=r"1 of 2 images do not exist, first .*/1.png \(image id 1\)$"):
        opened(["2.png"], ["1.png", "2.png"])


def test_prediction_takes_no_file_for_one_of_two_images(opened: Any, tmp_path: Path) -> None:
    opened(["a/1.png", "b/1.png"], ["a/1.png", "b/1.png"])
    with pytest.raises(ValueError, match=r"1 of 1 images are not in it: 1.png"):
        image_records(tmp_path / "file.json", ["1.png"])
