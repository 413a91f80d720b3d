"""Prediction on files: what is written, and what is said of errors."""

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

from tests.engine.predictions import (
    CATEGORIES,
    by_name,
    count_calls,
    listed,
    make_model,
    pictures,
    read_pixels,
    rows,
    run_predict,
    seen,
    stop_at,
    touch,
)
from tests.image_files import with_exif
from tmask.engine import log
from tmask.engine.predict import Summary, find_images, image_records, predict

# The small model gives as many detections as it may.
pytestmark = pytest.mark.filterwarnings("ignore:.*give exactly:UserWarning")


def test_results_are_coco_and_pictures_are_beside_them(
    model: Any, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(log, "_LINE_SECONDS", 0.0)
    done = predict(model, by_name(images), CATEGORIES, out_dir=out)
    assert done == Summary(images=4, reused=0, detections=len(rows(out)))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"prediction: image {count}/4" for count in range(1, 5)]
    assert seen(out) == [(i, path.name) for i, path in enumerate(images, start=1)]
    assert pictures(out) == [path.name for path in images]
    assert listed(out) == [
        {"id": i, "file_name": path.name, "height": 64, "width": 64} for i, path in enumerate(images, start=1)
    ]
    coco = COCO(out / "images.json")
    assert coco.dataset["categories"] == CATEGORIES
    loaded = coco.loadRes(str(out / "predictions.json"))
    found = model([read_pixels(images[1])], masks="rle")[0]
    own = loaded.loadAnns(loaded.getAnnIds(imgIds=2))
    assert [item["score"] for item in own] == found["scores"].tolist()
    assert [item["category_id"] for item in own] == [10 * label for label in found["labels"].tolist()]
    assert [item["segmentation"] for item in own] == found["masks"]


def test_pictures_keep_folders_and_never_replace_a_file_that_is_not_theirs(
    model: Any, images: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    names = {"a.jpg": images[0], "a.png": images[1], "sub/a.png": images[2], "b c[ü].v2.png": images[3]}
    touch(out, "pictures/sub/a.png")
    for _ in range(2):  # the names stay when the run goes on
        predict(model, names, CATEGORIES, out_dir=out)
        assert pictures(out) == ["a-2.png", "a.png", "b c[ü].v2.png", "sub/a-2.png", "sub/a.png"]
    assert (out / "pictures" / "sub" / "a.png").read_text() == ""


def test_options_decide_about_pictures_and_detections(checkpoint: Path, images: list[Path], tmp_path: Path) -> None:
    for count, drawn in ((5, True), (2, False)):
        out = tmp_path / str(count)
        options = (f"--max_detections={count}", "--pictures" if drawn else "--no_pictures")
        assert run_predict(checkpoint, images[0], out, *options) == 0
        assert len(rows(out)) == count
        assert pictures(out) == [images[0].name] * drawn


def test_missing_pictures_are_drawn_from_the_record(model: Any, images: list[Path], tmp_path: Path) -> None:
    predict(model, by_name(images), CATEGORIES, out_dir=tmp_path / "whole", score_threshold=0)
    predict(model, by_name(images), CATEGORIES, out_dir=tmp_path / "out", score_threshold=0, pictures=False)
    calls = count_calls(model)
    done = predict(model, by_name(images), CATEGORIES, out_dir=tmp_path / "out", score_threshold=0)
    assert (done.reused, calls) == (4, [])
    for path in images:
        first, second = (tmp_path / out / "pictures" / path.name for out in ("whole", "out"))
        assert first.read_bytes() == second.read_bytes()
        assert not torch.equal(read_pixels(first), read_pixels(path).repeat_interleave(8, 1).repeat_interleave(8, 2))


def test_an_empty_result_is_an_empty_array(images: list[Path], tmp_path: Path) -> None:
    model = make_model(box_score_threshold=0.999)
    assert predict(model, by_name(images), CATEGORIES, out_dir=tmp_path).detections == 0
    assert rows(tmp_path) == []
    assert len(pictures(tmp_path)) == 4


def write_annotations(file: Path, records: list[dict[str, Any]]) -> tuple[str, str]:
    file.write_text(json.dumps({"images": records}))
    return "--annotations", str(file)


def test_annotations_give_ids_and_sizes(checkpoint: Path, images: list[Path], tmp_path: Path, capsys: Any) -> None:
    folder, file, out = images[0].parent, tmp_path / "file.json", tmp_path / "out"
    names = [path.name for path in images]
    records = [{"id": 70 - i, "file_name": name, "width": 64, "height": 64} for i, name in enumerate(names)]
    assert run_predict(checkpoint, folder, out, *write_annotations(file, records)) == 0
    assert seen(out) == [(70 - i, name) for i, name in reversed(list(enumerate(names)))]
    # Another size than the file says is an error of that image, also if it was done by another file.
    records[1]["width"] = 65
    for again in (tmp_path / "second", out):
        assert run_predict(checkpoint, folder, again, *write_annotations(file, records)) == 1
        assert f"{images[1]}: expected 65x64 pixels by the annotations, got 64x64" in capsys.readouterr().err
        assert (70 - 1, names[1]) not in seen(again)
        assert len(seen(again)) == 3
    # An image that is not in the file is one of the command.
    assert run_predict(checkpoint, folder, tmp_path / "third", *write_annotations(file, records[2:])) == 2
    assert f"2 of 4 images are not in it: {names[0]}, {names[1]}" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


def test_with_annotations_pixels_stay_as_stored_unless_told(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    """One warning asks for the setting. Without annotations images are turned upright."""
    folder, file = tmp_path / "images", tmp_path / "file.json"
    records = []
    for i, name in enumerate(("a.png", "b.png", "sub/c.png"), start=1):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(with_exif(np.zeros((40, 60, 3), np.uint8), "png", 6 if i > 1 else 1))
        records.append({"id": 10 * i, "file_name": name, "width": 60, "height": 40})

    def sizes(out: str, *options: str) -> set[tuple[int, ...]]:
        """Of the masks of each image."""
        assert run_predict(checkpoint, folder, tmp_path / out, *options) == 0
        return {(row["image_id"], *row["segmentation"]["size"]) for row in rows(tmp_path / out)}

    with pytest.warns(UserWarning, match="EXIF") as told:
        assert sizes("asks", *write_annotations(file, records)) == {(10, 40, 60), (20, 40, 60), (30, 40, 60)}
    words = f"the EXIF orientation of 2 of 3 images, first {folder / 'b.png'}, is not applied."
    assert [str(item.message).startswith(words) for item in told if "EXIF" in str(item.message)] == [True]
    for item in records[1:]:
        item |= {"width": 40, "height": 60}
    options = write_annotations(file, records)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*EXIF")
        assert sizes("turned", *options, "--exif", "true") == {(10, 40, 60), (20, 60, 40), (30, 60, 40)}
        assert sizes("upright") == {(1, 40, 60), (2, 60, 40), (3, 60, 40)}
    assert [(item["width"], item["height"]) for item in listed(tmp_path / "upright")] == [(60, 40), *[(40, 60)] * 2]
    height, width = read_pixels(tmp_path / "upright" / "pictures" / "b.png").shape[1:]
    assert height * 40 == width * 60
    assert run_predict(checkpoint, folder, tmp_path / "stored", *options, "--exif", "false") == 1
    assert "2 of 3 images left out" in capsys.readouterr().err


def test_broken_annotations_are_named(tmp_path: Path) -> None:
    one = {"id": 1, "file_name": "a", "width": 1, "height": 1}
    for content, message in (
        ([], "expected a COCO file"),
        ({"images": [one, one | {"id": 2}]}, "'a' occurs twice"),
        ({"images": [one, one | {"file_name": "b"}]}, r"\[1\]: id 1 occurs twice"),
    ):
        (tmp_path / "a.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            image_records(tmp_path / "a.json", ["a"])


@pytest.mark.filterwarnings("default:.*give exactly:UserWarning")
def test_images_with_as_many_detections_as_may_be_are_counted(model: Any, images: list[Path], tmp_path: Path) -> None:
    words = (
        "4 of 4 images give exactly 5 detections, the limit of an image: there may be more objects; --max_detections "
        "raises the limit"
    )
    for name, draw in (("first", True), ("first", True), ("other", False)):  # also of images done before
        with pytest.warns(UserWarning, match="exactly") as told:
            predict(model, by_name(images), CATEGORIES, out_dir=tmp_path / name, pictures=draw)
        assert [str(item.message) for item in told] == [words]
    model.roi_heads.max_detections = 10_000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = predict(model, by_name(images), CATEGORIES, out_dir=tmp_path / "all")
    assert max(Counter(row["image_id"] for row in rows(tmp_path / "all")).values()) < 10_000
    assert done.detections > 20


def test_unreadable_images_are_named_when_the_others_are_done(
    checkpoint: Path, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = images[0].read_bytes()
    images[0].write_text("no image")
    images[2].write_bytes(images[2].read_bytes()[:100])
    folder, out = images[0].parent, tmp_path / "out"
    assert run_predict(checkpoint, folder, out) == 1
    err = capsys.readouterr().err
    assert "2 of 4 images left out (the 2 others are done)" in err
    assert all((str(images[i]) in err) == (i in (0, 2)) for i in range(4))
    # An image's number is its place in the list, whatever happens to the others.
    assert seen(out) == [(2, images[1].name), (4, images[3].name)]
    assert pictures(out) == [images[1].name, images[3].name]
    images[0].write_bytes(whole)  # mended: the same command does it
    assert run_predict(checkpoint, folder, out) == 1
    assert "1 of 4 images left out" in capsys.readouterr().err
    assert len(seen(out)) == 3


def test_of_many_unreadable_images_a_few_are_named(model: Any, tmp_path: Path) -> None:
    touch(tmp_path, *(f"{i}.png" for i in range(8)))
    with pytest.raises(ValueError, match=r"8 of 8 images left out .*0\.png.*4\.png.*and 3 more$") as error:
        predict(model, find_images(tmp_path), CATEGORIES, out_dir=tmp_path / "out")
    assert "5.png" not in str(error.value)
    assert rows(tmp_path / "out") == []


def test_a_failure_of_the_model_names_the_image_and_keeps_the_others(
    model: Any, images: list[Path], tmp_path: Path
) -> None:
    stop_at(model, 3, RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match=f"{images[2].name}: out of memory"):
        predict(model, by_name(images), CATEGORIES, out_dir=tmp_path / "out")
    assert len(seen(tmp_path / "out")) == 2
