"""Prediction into a folder that holds a run: it goes on, and nothing is lost."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.engine.predictions import (
    CATEGORIES,
    by_name,
    count_calls,
    make_model,
    pictures,
    rows,
    run_predict,
    seen,
    stop_at,
    touch,
)
from tests.engine.test_files import holder
from tests.engine.toy import after, files
from tmask.engine import predict as module
from tmask.engine.predict import find_images, predict
from tmask.engine.record import OtherSettingsError, Record

# The small model gives as many detections as it may.
pytestmark = pytest.mark.filterwarnings("ignore:.*give exactly:UserWarning")


def test_a_run_that_was_interrupted_goes_on(
    checkpoint: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder, out, whole = images[0].parent, tmp_path / "out", tmp_path / "whole"
    assert run_predict(checkpoint, folder, whole) == 0
    real = module.predict

    def interrupted(model: Any, *arguments: Any, **options: Any) -> Any:
        stop_at(model, 3, KeyboardInterrupt())
        return real(model, *arguments, **options)

    monkeypatch.setattr(module, "predict", interrupted)
    for option, how in ((), ""), (("--overwrite",), " without --overwrite"):
        capsys.readouterr()
        assert run_predict(checkpoint, folder, out, *option) == 130
        said = f"interrupted; what is done is in {out}, and the same command{how} goes on there"
        assert capsys.readouterr().err.splitlines()[-1] == f"tmask predict: {said}"
        assert seen(out) == [(1, images[0].name), (2, images[1].name)]
    monkeypatch.undo()
    for done in (2, 4):
        assert run_predict(checkpoint, folder, out) == 0
        assert f"{done} of 4 images were done before\n" in capsys.readouterr().err
    for name in ("predictions.json", "images.json", *(f"pictures/{path.name}" for path in images)):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.fixture
def out(model: Any, images: list[Path], tmp_path: Path) -> Path:
    """The folder of a run over `images`."""
    predict(model, by_name(images), CATEGORIES, out_dir=tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("cut", [1, 5, 100, 10**6, "zeros"], ids=str)
def test_lost_bytes_cost_the_images_from_there_on(model: Any, images: list[Path], out: Path, cut: Any) -> None:
    """Of a line half written, or in the middle, as a power cut may leave the file."""
    before = (out / "predictions.json").read_bytes()
    file = out / "predictions.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    if cut == "zeros":
        file.write_bytes(b"".join([*lines[:2], b"\0" * (len(lines[2]) - 1) + b"\n", *lines[3:]]))
    else:
        file.write_bytes(b"".join(lines[:-1]) + lines[-1][: max(0, len(lines[-1]) - cut)])
        (out / "pictures" / images[-1].name).unlink()  # it is drawn when the line is whole
    assert predict(model, by_name(images), CATEGORIES, out_dir=out).reused == (1 if cut == "zeros" else 3)
    assert (out / "predictions.json").read_bytes() == before
    assert cut == "zeros" or file.read_bytes() == b"".join(lines)


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


def test_a_changed_image_never_keeps_its_old_picture(model: Any, images: list[Path], out: Path) -> None:
    images[1].write_bytes(images[2].read_bytes())
    predict(model, by_name(images), CATEGORIES, out_dir=out, pictures=False)
    assert pictures(out) == [path.name for path in images if path != images[1]]


def test_own_pictures_are_not_taken_for_images(
    checkpoint: Path, images: list[Path], tmp_path: Path, capsys: Any
) -> None:
    folder, out = images[0].parent, images[0].parent / "out"
    around = f"{folder}/../images"  # the same folder by another path
    for place, *more in ([folder], [folder], [around], [folder, "--overwrite"]):
        assert run_predict(checkpoint, f"{place}/**/*.png", out, *more) == 0
        assert " detections in 4 images" in capsys.readouterr().out
        assert pictures(out) == [path.name for path in images]


def test_other_settings_are_refused_and_nothing_is_lost(
    checkpoint: Path, images: list[Path], out: Path, capsys: Any
) -> None:
    before, folder = files(out), images[0].parent
    options = ["--precision=bf16", "--max_detections=3", "--score_threshold=0.25", "--picture_format=jpeg"]
    assert run_predict(checkpoint, folder, out, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--overwrite" in line
    said = "(max_detections: 5 -> 3, picture_format, precision: fp32 -> bf16, score_threshold: 0.5 -> 0.25)"
    assert said in line
    assert files(out) == before
    assert run_predict(checkpoint, folder, out, *options, "--overwrite") == 0
    assert "done before" not in capsys.readouterr().err


def test_another_checkpoint_is_refused(images: list[Path], out: Path) -> None:
    predict(make_model(), by_name(images), CATEGORIES, out_dir=out)  # the same weights
    renamed = [{**CATEGORIES[0], "name": "new"}, *CATEGORIES[1:]]
    for seed, categories, what in ((1, CATEGORIES, "checkpoint"), (0, renamed, "categories")):
        said = rf"made with other settings \({what}\); --overwrite begins anew"
        with pytest.raises(OtherSettingsError, match=said):
            predict(make_model(seed), by_name(images), categories, out_dir=out)


def test_a_record_from_before_a_setting_goes_on(model: Any, images: list[Path], out: Path) -> None:
    """It was made with the default of that setting, whatever else the model has now."""
    path = out / "predictions.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)

    def again(**changes: Any) -> Any:
        header = json.loads(first)
        settings = header["settings"]["model"] | changes
        header["settings"]["model"] = {name: value for name, value in settings.items() if value != "gone"}
        for name in ("picture_format", "picture_side", "picture_parts"):
            del header["settings"][name]
        path.write_text("".join([json.dumps(header) + "\n", *rest]))
        return predict(model, by_name(images), CATEGORIES, out_dir=out)

    assert again(mask_fusion_layers="gone").reused == 4
    for wrong in ({"mask_fusion_layers": 2}, {"from_the_future": 1}):
        with pytest.raises(OtherSettingsError, match=r"made with other settings \(model\)"):
            again(**wrong)


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
    assert run_predict(checkpoint, images[0], out) == 2
    said = f"{out / name}: exists, but not predictions.jsonl, which is needed to go on; --overwrite begins anew"
    assert said in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [name]
    assert (out / name).read_text() == ""
    assert run_predict(checkpoint, images[0], out, "--overwrite") == 0
    assert (out / name).read_text() != ""


def test_two_at_once_are_refused(model: Any, checkpoint: Path, images: list[Path], tmp_path: Path, capsys: Any) -> None:
    """The second is told, and the first is none the worse."""
    out = tmp_path / "out"
    codes: list[int] = []
    model.register_forward_pre_hook(
        lambda *_: codes.append(run_predict(checkpoint, images[0].parent, out, *["--overwrite"] * len(codes)))
    )
    predict(model, by_name(images[:2]), CATEGORIES, out_dir=out)
    assert codes == [1, 1]
    assert f"tmask predict: error: {out}: {holder('predict')}\n" in capsys.readouterr().err
    assert len(seen(out)) == 2
    assert {path.name for path in out.iterdir()} == {"images.json", "pictures", "predictions.json", "predictions.jsonl"}


def test_errors_of_the_system_name_the_file_that_was_to_be_written(
    checkpoint: Path, images: list[Path], out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (out / "predictions.json").unlink()
    (out / "predictions.json").mkdir()
    assert run_predict(checkpoint, images[0].parent, out) == 1
    assert capsys.readouterr().err.endswith(f"tmask predict: error: {out / 'predictions.json'}: Is a directory\n")
    (out / "predictions.json").rmdir()
    monkeypatch.setattr(os, "fsync", after(0, lambda _: None, OSError(errno.ENOSPC, "No space left on device")))
    assert run_predict(checkpoint, images[0].parent, out, "--overwrite") == 1
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
