"""Pictures of a run and of a prediction: what they say of hits and misses, their formats, sizes and parts."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from tests.engine.predictions import CATEGORIES, by_name, make_model, pictures, run_predict
from tests.engine.toy import CPU
from tmask.data.coco import CocoDataset
from tmask.data.shapes import write_shapes
from tmask.engine.pictures import draw_pictures
from tmask.engine.predict import predict
from tmask.visualize import PARTS, draw_instances

# The small model gives as many detections as it may.
pytestmark = pytest.mark.filterwarnings("ignore:.*give exactly:UserWarning")


class AlmostRight(torch.nn.Module):
    """Finds all objects of a data set but the first of each image, a small one that is not there, and an unsure one."""

    def __init__(self, dataset: CocoDataset) -> None:
        super().__init__()
        self.dataset, self.index = dataset, 0

    def forward(self, images: list[torch.Tensor], masks: str) -> list[dict[str, Any]]:
        target = self.dataset[self.index][1]
        self.index += 1
        dense = torch.cat([target["masks"][1:], torch.zeros(2, *images[0].shape[1:], dtype=torch.uint8)])
        dense[-2:, :3, :3] = 1
        corner = torch.tensor([[0.0, 0.0, 3.0, 3.0]] * 2)
        return [
            {
                "boxes": torch.cat([target["boxes"][1:], corner]),
                "labels": torch.cat([target["labels"][1:], torch.tensor([1, 1])]),
                "scores": torch.tensor([0.9] * (len(dense) - 1) + [0.4]),
                "masks": coco_mask.encode(np.asfortranarray(dense.permute(1, 2, 0).numpy())),
            }
        ]


def test_pictures_of_a_run_count_hits_misses_and_false_detections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = CocoDataset(*write_shapes(tmp_path / "data", num_images=3, seed=1, size=64))
    texts: list[str] = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda _, place, text, **__: texts.append(text))
    paths = draw_pictures(AlmostRight(dataset), dataset, tmp_path / "pictures", device=CPU)
    said = [re.findall(r"^(hit|false|missed) (\d+)$", text) for text in texts]
    counts = [(name, int(number)) for match in said for name, number in match]
    expected = []
    for _, target in (dataset[i] for i in range(3)):
        hits = [("hit", len(target["boxes"]) - 1)] * (len(target["boxes"]) > 1)
        expected += [*hits, ("false", 1), *hits, ("missed", 1)]
    assert counts == expected
    assert [path.suffix for path in paths] == [".png"] * 3
    assert Image.open(paths[0]).format == "PNG"


def test_format_side_and_parts_of_predicted_pictures(checkpoint: Path, images: list[Path], tmp_path: Path) -> None:
    out, options = tmp_path / "out", ("--score_threshold=0", "--picture_format=jpeg", "--picture_side=200")
    for _ in range(2):  # names stay when the run goes on
        assert run_predict(checkpoint, images[0].parent, out, *options) == 0
        assert pictures(out) == [path.with_suffix(".jpg").name for path in images]
    for path in (out / "pictures").iterdir():
        with Image.open(path) as picture:
            assert (picture.format, max(picture.size)) == ("JPEG", 200)
    assert run_predict(checkpoint, images[0].parent, out, *options, "--picture_parts=", "--overwrite") == 0
    for path in images:
        with Image.open(out / "pictures" / path.with_suffix(".jpg").name) as picture, Image.open(path) as image:
            plain = np.array(image.convert("RGB").resize((200, 200), Image.Resampling.BICUBIC)).astype(int)
            assert np.abs(np.array(picture).astype(int) - plain).mean() < 4
    assert run_predict(checkpoint, images[0].parent, out, "--picture_parts=masks, boxes", "--overwrite") == 0
    assert pictures(out) == [path.name for path in images]


def test_jpeg_keeps_the_colours_of_thin_lines(checkpoint: Path, images: list[Path], tmp_path: Path) -> None:
    """With colours at half resolution a line of a pixel differs by more than 100."""
    read = []
    for kind, suffix in (("png", ".png"), ("jpeg", ".jpg")):
        options = ("--score_threshold=0", "--picture_parts=boxes", f"--picture_format={kind}")
        assert run_predict(checkpoint, images[0], tmp_path / kind, *options) == 0
        with Image.open(tmp_path / kind / "pictures" / images[0].with_suffix(suffix).name) as picture:
            read.append(np.array(picture).astype(int))
    assert np.abs(read[0] - read[1]).max() < 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"picture_format": "gif"}, "picture_format: expected one of jpeg, png, got 'gif'"),
        ({"picture_side": 127}, "picture_side: expected at least 128, got 127"),
        (
            {"picture_parts": ["box"]},
            "picture_parts: expected some of masks, boxes, keypoints, labels, legend, got 'box'",
        ),
    ],
)
def test_wrong_settings_of_pictures_are_named(options: Any, message: str, tmp_path: Path, images: list[Path]) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        predict(make_model(), by_name(images), CATEGORIES, out_dir=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_parts_of_the_command_are_those_of_the_drawing() -> None:
    from tmask.cli.predict import PredictOptions

    assert PredictOptions.picture_parts == ",".join(PARTS)
    assert draw_instances.__kwdefaults__["parts"] is PARTS
