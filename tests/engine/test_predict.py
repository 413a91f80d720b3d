"""Prediction on files: what is found, what is written, and how a run that was stopped goes on."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

import tmask
from tmask import cli
from tmask.data.shapes import CLASSES, write_shapes
from tmask.engine import predict as module
from tmask.engine import progress
from tmask.engine.checkpoint import FORMAT, KEYS, VERSION, save_checkpoint
from tmask.engine.predict import Summary, find_images, image_records, predict
from tmask.engine.record import OtherSettingsError, Record

CATEGORIES = [{"id": 10 * label, "name": name} for label, name in enumerate(CLASSES, start=1)]


def make_model(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    small = {"min_size": 64, "max_size": 64, "fpn_channels": 16, "box_head_dim": 16, "mask_head_channels": 16}
    return tmask.build_model(
        "tiny", len(CLASSES) + 1, **{**small, "max_detections": 5, "box_score_threshold": 1e-6, **options}
    )


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


def by_name(paths: list[Path]) -> dict[str, Path]:
    return {path.name: path for path in paths}


def rows(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "predictions.json").read_text())  # type: ignore[no-any-return]


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
    calls: list[int] = []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) == number:
            raise error

    model.register_forward_pre_hook(hook)


# ---- which images


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")


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


# ---- what is written


def test_results_are_coco_and_pictures_stand_beside_them(
    model: Any, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    done = predict(model, by_name(images), CATEGORIES, out_dir=out)
    assert done == Summary(images=4, reused=0, detections=len(rows(out)))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"prediction: image {count}/4" for count in range(1, 5)]
    assert seen(out) == [(i, path.name) for i, path in enumerate(images, start=1)]
    assert pictures(out) == [path.name for path in images]
    coco = COCO(out / "images.json")
    assert [(item["file_name"], item["height"], item["width"]) for item in coco.dataset["images"]] == [
        (path.name, 64, 64) for path in images
    ]
    assert coco.dataset["categories"] == CATEGORIES
    loaded = coco.loadRes(str(out / "predictions.json"))
    found = model([module_image(images[1])], masks="rle")[0]
    own = loaded.loadAnns(loaded.getAnnIds(imgIds=2))
    assert [item["score"] for item in own] == found["scores"].tolist()
    assert [item["category_id"] for item in own] == [10 * label for label in found["labels"].tolist()]
    assert [item["segmentation"] for item in own] == found["masks"]
    assert {item["id"] for item in coco.dataset["images"]} == {row["image_id"] for row in rows(out)}


def module_image(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


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


@pytest.mark.parametrize("drawn", [True, False])
def test_pictures_are_drawn_or_not(checkpoint: Path, images: list[Path], tmp_path: Path, drawn: bool) -> None:
    argv = ["predict", "--checkpoint", str(checkpoint), "--images", str(images[0]), "--out", str(tmp_path / "out")]
    assert cli.main([*argv, "--pictures" if drawn else "--no_pictures"]) == 0
    assert pictures(tmp_path / "out") == [images[0].name] * drawn
    assert rows(tmp_path / "out")


def test_missing_pictures_are_drawn_from_the_record(model: Any, images: list[Path], tmp_path: Path) -> None:
    predict(model, by_name(images), CATEGORIES, out_dir=tmp_path / "whole", score_threshold=0)
    predict(model, by_name(images), CATEGORIES, out_dir=tmp_path / "out", score_threshold=0, pictures=False)
    calls = count_calls(model)
    done = predict(model, by_name(images), CATEGORIES, out_dir=tmp_path / "out", score_threshold=0)
    assert done.reused == 4
    assert calls == []
    for path in images:
        first, second = (tmp_path / out / "pictures" / path.name for out in ("whole", "out"))
        assert first.read_bytes() == second.read_bytes()
        assert not torch.equal(module_image(first), module_image(path).repeat_interleave(8, 1).repeat_interleave(8, 2))


def test_an_empty_result_is_an_empty_array(images: list[Path], tmp_path: Path) -> None:
    model = make_model(box_score_threshold=0.999)
    assert predict(model, by_name(images), CATEGORIES, out_dir=tmp_path).detections == 0
    assert rows(tmp_path) == []
    assert len(pictures(tmp_path)) == 4


def test_any_size_in_one_run(tmp_path: Path) -> None:
    sizes = [(1, 1), (1, 3000), (3000, 1), (2, 7), (500, 30), (97, 203)]  # width, height
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate(sizes):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert("L" if i % 2 else "RGB").save(tmp_path / f"{i}.png")
    out = tmp_path / "out"
    assert predict(make_model(), find_images(tmp_path), CATEGORIES, out_dir=out, score_threshold=0).images == 6
    listed = json.loads((out / "images.json").read_text())["images"]
    assert [(item["width"], item["height"]) for item in listed] == sizes
    for row in rows(out):
        width, height = sizes[row["image_id"] - 1]
        x, y, w, h = row["bbox"]
        assert min(x, y, w, h) >= 0
        assert x + w <= width + 1e-3
        assert y + h <= height + 1e-3
        assert coco_mask.decode(row["segmentation"]).shape == (height, width)
    assert len(pictures(out)) == 6


def test_exif_orientation_turns_picture_and_boxes_upright(model: Any, tmp_path: Path) -> None:
    """A JPEG as a camera held upright writes it: pixels 120x80, to be turned by 90 degrees."""
    upright = np.zeros((120, 80, 3), dtype=np.uint8)
    upright[:30] = (255, 0, 0)  # the sky
    upright[60:100, 20:60] = (0, 255, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(upright))).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    Image.fromarray(upright).save(tmp_path / "upright.jpg", quality=95)
    assert Image.open(tmp_path / "turned.jpg").size == (120, 80)
    out = tmp_path / "out"
    predict(model, find_images(tmp_path), CATEGORIES, out_dir=out, score_threshold=1)
    listed = json.loads((out / "images.json").read_text())["images"]
    assert [(item["width"], item["height"]) for item in listed] == [(80, 120)] * 2
    picture = module_image(out / "pictures" / "turned.png")
    assert picture.shape == (3, 120 * 6, 80 * 6)
    assert (picture[0, :100] > 150).all()
    assert (picture[0, -100:] < 100).all()
    turned, plain = ([row for row in rows(out) if row["image_id"] == i] for i in (1, 2))
    assert turned
    for a, b in zip(turned, plain, strict=True):  # but for what JPEG changes
        assert a["bbox"] == pytest.approx(b["bbox"], abs=1)
        assert a["segmentation"]["size"] == [120, 80]


def test_annotations_give_ids_and_stored_pixels(
    checkpoint: Path, images: list[Path], tmp_path: Path, capsys: Any
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((40, 60, 3), dtype=np.uint8)).save(images[0].parent / "z.jpg", exif=exif)
    names = [*(path.name for path in images), "z.jpg"]
    listed = [{"id": 70 - i, "file_name": name, "width": 64, "height": 64} for i, name in enumerate(names)]
    listed[-1] |= {"width": 60, "height": 40}
    file, out = tmp_path / "file.json", tmp_path / "out"
    argv = ["predict", "--checkpoint", str(checkpoint), "--images", str(images[0].parent)]
    argv += ["--annotations", str(file), "--score_threshold=0"]
    file.write_text(json.dumps({"images": listed}))
    assert cli.main([*argv, "--out", str(out)]) == 0
    assert seen(out) == [(70 - i, name) for i, name in reversed(list(enumerate(names)))]
    assert {tuple(row["segmentation"]["size"]) for row in rows(out) if row["file_name"] == "z.jpg"} == {(40, 60)}
    # Another size than the file says is an error of that image.
    listed[1]["width"] = 65
    file.write_text(json.dumps({"images": listed}))
    assert cli.main([*argv, "--out", str(tmp_path / "second")]) == 1
    assert f"{images[1]}: expected 65x64 pixels by the annotations, got 64x64" in capsys.readouterr().err
    assert len(seen(tmp_path / "second")) == 4
    # So it is if the image was done by another file.
    assert cli.main([*argv, "--out", str(out)]) == 1
    assert f"{images[1]}: expected 65x64 pixels by the annotations, got 64x64" in capsys.readouterr().err
    assert (70 - 1, names[1]) not in seen(out)
    assert len(seen(out)) == 4
    # An image that is not in the file is one of the command.
    file.write_text(json.dumps({"images": listed[2:]}))
    assert cli.main([*argv, "--out", str(tmp_path / "third")]) == 2
    assert f"2 of 5 images are not in it: {names[0]}, {names[1]}" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected a COCO file"),
        ({"images": [{"id": 1, "width": 1, "height": 1}]}, r"images\[0\]: expected a field 'file_name'"),
        ({"images": [{"id": i, "file_name": "a", "width": 1, "height": 1} for i in (1, 2)]}, "'a' occurs twice"),
        ({"images": [{"id": 1, "file_name": n, "width": 1, "height": 1} for n in "ab"]}, r"\[1\]: id 1 occurs twice"),
        ({"images": [{"id": 1, "file_name": ["a"], "width": 1, "height": 1}]}, r"\[0\]: file_name: expected a text"),
    ],
    ids=["no object", "no name", "twice", "one id", "list"],
)
def test_broken_annotations_are_named(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        image_records(tmp_path / "a.json", ["a"])


def test_max_detections_bounds_the_results(checkpoint: Path, images: list[Path], tmp_path: Path) -> None:
    for count in (5, 2):
        argv = ["predict", "--checkpoint", str(checkpoint), "--images", str(images[0]), f"--max_detections={count}"]
        assert cli.main([*argv, "--out", str(tmp_path / str(count))]) == 0
        assert len(rows(tmp_path / str(count))) == count


# ---- errors


def test_unreadable_images_are_named_when_the_others_are_done(
    checkpoint: Path, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = images[0].read_bytes()
    images[0].write_text("no image")
    images[2].write_bytes(images[2].read_bytes()[:100])
    out = tmp_path / "out"
    argv = ["predict", "--checkpoint", str(checkpoint), "--images", str(images[0].parent), "--out", str(out)]
    assert cli.main(argv) == 1
    err = capsys.readouterr().err
    assert "2 of 4 images left out (the 2 others are done)" in err
    assert all((str(images[i]) in err) == (i in (0, 2)) for i in range(4))
    # An image's number is its place in the list, whatever happens to the others.
    assert seen(out) == [(2, images[1].name), (4, images[3].name)]
    assert pictures(out) == [images[1].name, images[3].name]
    images[0].write_bytes(whole)  # mended: the same command does it
    assert cli.main(argv) == 1
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


# ---- going on


def test_a_run_that_was_interrupted_goes_on(
    checkpoint: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    argv = ["predict", "--checkpoint", str(checkpoint), "--images", str(images[0].parent), "--out"]
    assert cli.main([*argv, str(tmp_path / "whole")]) == 0
    out = tmp_path / "out"
    real, reads = module.predict, []

    def interrupted(model: Any, *arguments: Any, **options: Any) -> Any:
        stop_at(model, 3, KeyboardInterrupt())
        return real(model, *arguments, **options)

    def counted(model: Any, *arguments: Any, **options: Any) -> Any:
        calls = count_calls(model)
        done = real(model, *arguments, **options)
        reads.append((len(calls), done.reused))
        return done

    capsys.readouterr()
    monkeypatch.setattr(module, "predict", interrupted)
    assert cli.main([*argv, str(out)]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"tmask predict: interrupted; what is done is in {out}, and the same command goes on there"
    )
    assert seen(out) == [(1, images[0].name), (2, images[1].name)]
    assert cli.main([*argv, str(out), "--overwrite"]) == 130
    assert capsys.readouterr().err.endswith(" and the same command without --overwrite goes on there\n")
    assert seen(out) == [(1, images[0].name), (2, images[1].name)]
    monkeypatch.setattr(module, "predict", counted)
    assert cli.main([*argv, str(out)]) == 0
    assert cli.main([*argv, str(out)]) == 0
    assert reads == [(2, 2), (0, 4)]
    assert "2 of 4 images were done before" in capsys.readouterr().err
    for name in ("predictions.json", "images.json", *(f"pictures/{path.name}" for path in images)):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(checkpoint: Path, images: list[Path], tmp_path: Path) -> None:
    """kill -9 of a real process, when its first images are done."""
    for i in range(20):
        (images[0].parent / f"z{i}.png").write_bytes(images[0].read_bytes())
    out, whole = tmp_path / "out", tmp_path / "whole"
    argv = ["predict", "--checkpoint", str(checkpoint), "--images", str(images[0].parent), "--device=cpu", "--out"]
    command = [sys.executable, "-m", "tmask", *argv, str(out)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "predictions.jsonl").exists() and (out / "predictions.jsonl").read_bytes().count(b"\n") > 2:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = (out / "predictions.jsonl").read_bytes().count(b"\n") - 1
    assert 2 <= done < 24
    assert not (out / "predictions.json").exists()
    assert cli.main([*argv, str(out)]) == 0
    assert cli.main([*argv, str(whole)]) == 0
    for a, b in zip(rows(out), rows(whole), strict=True):
        assert {**a, "bbox": 0, "score": 0, "segmentation": 0} == {**b, "bbox": 0, "score": 0, "segmentation": 0}
        assert a["bbox"] == pytest.approx(b["bbox"], abs=1e-3)  # another number of threads
    assert pictures(out) == pictures(whole)
    assert not list(out.rglob(".*"))


@pytest.mark.parametrize("cut", [1, 5, 100, 10**6], ids=str)
def test_a_half_written_line_is_done_again(model: Any, images: list[Path], tmp_path: Path, cut: int) -> None:
    out = tmp_path / "out"
    predict(model, by_name(images), CATEGORIES, out_dir=out)
    before = (out / "predictions.json").read_bytes()
    file = out / "predictions.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-1]) + lines[-1][: max(0, len(lines[-1]) - cut)])
    (out / "pictures" / images[-1].name).unlink()  # it is drawn when the line is whole
    assert predict(model, by_name(images), CATEGORIES, out_dir=out).reused == 3
    assert (out / "predictions.json").read_bytes() == before
    assert file.read_bytes() == b"".join(lines)


def test_bytes_lost_in_the_middle_cost_the_images_from_there_on(model: Any, images: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict(model, by_name(images), CATEGORIES, out_dir=out)
    before = (out / "predictions.json").read_bytes()
    lines = (out / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    lines[2] = b"\0" * (len(lines[2]) - 1) + b"\n"  # as a power cut may leave it
    (out / "predictions.jsonl").write_bytes(b"".join(lines))
    assert predict(model, by_name(images), CATEGORIES, out_dir=out).reused == 1
    assert (out / "predictions.json").read_bytes() == before


def test_changed_new_and_removed_images(model: Any, images: list[Path], tmp_path: Path) -> None:
    out, folder = tmp_path / "out", images[0].parent
    predict(model, find_images(folder), CATEGORIES, out_dir=out, score_threshold=0)
    old = (out / "pictures" / images[1].name).read_bytes()
    images[0].unlink()
    images[1].write_bytes(images[2].read_bytes())
    (folder / "zz.png").write_bytes(images[3].read_bytes())
    calls = count_calls(model)
    done = predict(model, find_images(folder), CATEGORIES, out_dir=out, score_threshold=0)
    assert (done.images, done.reused, len(calls)) == (4, 2, 2)
    assert seen(out) == [(1, images[1].name), (2, images[2].name), (3, images[3].name), (4, "zz.png")]
    scores = {i: [row["score"] for row in rows(out) if row["image_id"] == i] for i in range(1, 5)}
    assert scores[1] == scores[2]
    assert scores[3] == scores[4] != scores[1]
    assert (out / "pictures" / images[1].name).read_bytes() not in (b"", old)


def test_a_changed_image_never_keeps_its_old_picture(model: Any, images: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict(model, by_name(images), CATEGORIES, out_dir=out)
    images[1].write_bytes(images[2].read_bytes())
    predict(model, by_name(images), CATEGORIES, out_dir=out, pictures=False)
    assert pictures(out) == [path.name for path in images if path != images[1]]


def test_own_pictures_are_not_taken_for_images(
    checkpoint: Path, images: list[Path], tmp_path: Path, capsys: Any
) -> None:
    argv = ["predict", "--checkpoint", str(checkpoint), "--images", f"{images[0].parent}/**/*.png"]
    argv += ["--out", str(images[0].parent / "out")]
    around = f"{images[0].parent}/../images"  # the same folder by another path
    for more in ([], [], [f"--images={around}/**/*.png"], ["--overwrite"]):
        assert cli.main([*argv, *more]) == 0
        assert " detections in 4 images" in capsys.readouterr().out
        assert pictures(images[0].parent / "out") == [path.name for path in images]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--score_threshold=0.25"], r"\(score_threshold: 0.5 -> 0.25\)"),
        (["--precision=bf16", "--max_detections=3"], r"\(max_detections: 5 -> 3, precision: fp32 -> bf16\)"),
    ],
    ids=["threshold", "two"],
)
def test_other_settings_are_refused_and_nothing_is_lost(
    checkpoint: Path, images: list[Path], tmp_path: Path, capsys: Any, options: list[str], message: str
) -> None:
    out = tmp_path / "out"
    argv = ["predict", "--checkpoint", str(checkpoint), "--images", str(images[0].parent), "--out", str(out)]
    assert cli.main(argv) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert cli.main([*argv, *options]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--overwrite" in err
    assert message.replace("\\", "") in err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert cli.main([*argv, *options, "--overwrite"]) == 0
    assert "done before" not in capsys.readouterr().err


def test_another_checkpoint_is_refused(model: Any, images: list[Path], tmp_path: Path) -> None:
    predict(model, by_name(images[:1]), CATEGORIES, out_dir=tmp_path)
    predict(make_model(), by_name(images[:2]), CATEGORIES, out_dir=tmp_path)  # the same weights
    with pytest.raises(OtherSettingsError, match=r"made with other settings \(checkpoint\); --overwrite begins anew"):
        predict(make_model(1), by_name(images), CATEGORIES, out_dir=tmp_path)
    renamed = [{**CATEGORIES[0], "name": "new"}, *CATEGORIES[1:]]
    with pytest.raises(OtherSettingsError, match=r"made with other settings \(categories\)"):
        predict(make_model(), by_name(images), renamed, out_dir=tmp_path)


@pytest.mark.parametrize("content", ["", "no record", '{"format": "other"}\n', "[]\n"])
def test_a_foreign_file_is_left_alone(model: Any, images: list[Path], tmp_path: Path, content: str) -> None:
    (tmp_path / "predictions.jsonl").write_text(content)
    with pytest.raises(OtherSettingsError, match="expected the record of an earlier run, got something else"):
        predict(model, by_name(images), CATEGORIES, out_dir=tmp_path)
    assert (tmp_path / "predictions.jsonl").read_text() == content
    assert predict(model, by_name(images), CATEGORIES, out_dir=tmp_path, overwrite=True).images == 4


@pytest.mark.parametrize("name", ["predictions.json", "images.json"])
def test_files_of_someone_else_are_not_replaced(
    checkpoint: Path, images: list[Path], tmp_path: Path, capsys: Any, name: str
) -> None:
    """Above all a COCO file ``images.json`` of the user's own."""
    out = tmp_path / "out"
    touch(out, name)
    argv = ["predict", "--checkpoint", str(checkpoint), "--images", str(images[0]), "--out", str(out)]
    assert cli.main(argv) == 2
    assert f"{out / name}: stands there without the record of a run, predictions.jsonl; --o" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [name]
    assert (out / name).read_text() == ""
    assert cli.main([*argv, "--overwrite"]) == 0
    assert (out / name).read_text() != ""


def test_errors_of_the_system_name_the_file_that_was_to_be_written(
    checkpoint: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    argv = ["predict", "--checkpoint", str(checkpoint), "--images", str(images[0]), "--out", str(out)]
    assert cli.main(argv) == 0
    (out / "predictions.json").unlink()
    (out / "predictions.json").mkdir()
    assert cli.main(argv) == 1
    assert capsys.readouterr().err.endswith(f"tmask predict: error: {out / 'predictions.json'}: Is a directory\n")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (out / "predictions.json").rmdir()
    monkeypatch.setattr(os, "fsync", full)
    assert cli.main([*argv, "--overwrite"]) == 1
    assert capsys.readouterr().err == f"tmask predict: error: {out / 'predictions.jsonl'}: No space left on device\n"


def test_a_record_keeps_no_detections_in_memory(tmp_path: Path) -> None:
    record = Record(tmp_path, {})
    detections = [
        {"category_id": 1, "bbox": [0.0, 0.0, 1.0, 1.0], "score": 0.5, "segmentation": {"counts": "0" * 1000}}
    ]
    entries = [record.add(f"{i}.png", (1, 2), (3, 4), detections * (i + 1)) for i in range(3)]
    for i in (2, 0, 1):
        assert record.detections(entries[i]) == detections * (i + 1)
    assert "0000" not in repr(vars(record))
