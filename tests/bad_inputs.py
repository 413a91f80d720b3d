"""Bad inputs, each with the message that tells of it. test_bad_input.py runs them; docs/bad-input.md shows them.

A case runs in a folder of its own: a sound data set of three images in ``data`` (``images`` and ``annotations.json``),
a checkpoint trained on it, ``run/checkpoint.pt``, and whatever its `spoil` does there.
"""

# ruff: noqa: E501 - messages are compared whole

from __future__ import annotations

import argparse
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.image_files import tiff, with_exif
from tmask.engine.checkpoint import load_checkpoint
from tmask.model.state_dict import NOT_READ

Spoil = Callable[[], object]

FILE, IMAGES, FIRST = Path("data/annotations.json"), Path("data/images"), Path("data/images/000000.png")
CHECKPOINT = Path("run/checkpoint.pt")

KEYPOINT_TRAINING = "train --model.keypoints.names [head,tail]"
# `train` stands for these and what a case adds; `eval` and `predict` likewise.
SMALL = """--model.min_size 32 --model.max_size 64 --model.fpn_channels 8 --model.box_head_dim 8
    --model.mask_head_channels 8 --model.mask_head_layers 1 --model.box_batch_size 8 --train.precision fp32
    --train.steps 1 --train.batch_size 2 --data.num_workers 0 --device cpu"""
COMMANDS = {
    "train": f"--preset tiny --data.train_images {IMAGES} --data.train_annotations {FILE} {SMALL} --out out",
    "eval": f"--checkpoint {CHECKPOINT} --images {IMAGES} --annotations {FILE} --device cpu",
    "predict": f"--checkpoint {CHECKPOINT} --images {IMAGES} --out out --max_detections 1000 --device cpu",
    "bench": "--device cpu",
    "ablate": "--device cpu --out out",
}


@dataclass(frozen=True)
class Case:
    """`words`: a command and what it adds to ``COMMANDS``. `message`: what follows "tmask COMMAND: error: "."""

    what: str
    words: str
    message: str
    spoil: Spoil | None = None
    code: int = 1


def content(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Change the annotation file in place."""

    def spoil() -> None:
        parsed = json.loads(FILE.read_text())
        change(parsed)
        FILE.write_text(json.dumps(parsed))

    return spoil


def annotation(**fields: Any) -> Spoil:
    """Give the first annotation other fields."""
    return content(lambda c: c["annotations"][0].update(fields))


def keypoints(values: list[float]) -> Spoil:
    """Name two keypoints, and give the first annotation these."""

    def change(c: Any) -> None:
        c["categories"][0]["keypoints"] = ["head", "tail"]
        c["annotations"][0]["keypoints"] = values

    return content(change)


def each(**fields: Any) -> Spoil:
    """Give every annotation other fields."""
    return content(lambda c: [item.update(fields) for item in c["annotations"]])


def first_image(pixels: Any, mode: str | None = None) -> Spoil:
    """Put another picture in place of the first, and its size into the file."""

    def spoil() -> None:
        image = Image.fromarray(np.asarray(pixels))
        (image.convert(mode) if mode else image).save(FIRST)
        content(lambda c: c["images"][0].update(width=image.width, height=image.height))()

    return spoil


def file(path: Path | str, data: bytes | str) -> Spoil:
    """Write a file."""
    return lambda: Path(path).write_bytes(data.encode() if isinstance(data, str) else data)


def saved(path: Path, pixels: Any, mode: str | None = None, **how: Any) -> Spoil:
    """Write an image as Pillow does, in the format of `path` unless `how` names another."""
    return lambda: Image.fromarray(pixels, mode).save(path, **how)


def both(*spoils: Spoil) -> Spoil:
    return lambda: [spoil() for spoil in spoils]


def config(text: str) -> Spoil:
    return file("c.yaml", text)


def truncate(path: Path) -> Spoil:
    return lambda: file(path, path.read_bytes()[: path.stat().st_size // 2])()


def truncated_jpeg() -> None:
    jpeg = FIRST.with_suffix(".jpg")
    Image.open(FIRST).save(jpeg)
    truncate(jpeg)()
    content(lambda c: c["images"][0].update(file_name=jpeg.name))()


def tiny_image(width: int, height: int) -> Spoil:
    """The first image and its first annotation are all of `width` x `height` pixels."""

    def spoil() -> None:
        first_image(np.full((height, width, 3), 200, np.uint8))()
        content(lambda c: c.update(annotations=[item for item in c["annotations"] if item["image_id"] != 1]))()
        box: dict[str, Any] = {"id": 99, "image_id": 1, "category_id": 1, "bbox": [0, 0, width, height]}
        polygon = [[0, 0, width, 0, width, height, 0, height]]
        content(lambda c: c["annotations"].append({**box, "segmentation": polygon}))()

    return spoil


def size_mismatch() -> None:
    each(segmentation=None)()
    content(lambda c: c["images"][0].update(width=33))()


def truncated_checkpoint() -> None:
    whole = CHECKPOINT.read_bytes()
    CHECKPOINT.unlink()  # a link to the one that all cases share
    CHECKPOINT.write_bytes(whole[: len(whole) // 2])


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("open('code-ran', 'w')",)


def evil_checkpoint() -> None:
    CHECKPOINT.unlink()
    CHECKPOINT.write_bytes(pickle.dumps(Evil()))


def torchvision_weights() -> None:
    torch.save({"backbone.body.conv1.weight": torch.zeros(1), "rpn.head.conv.0.0.bias": torch.zeros(1)}, "tv.pth")


def other_categories() -> None:
    shutil.copy(FILE, "val.json")
    parsed = json.loads(FILE.read_text())
    parsed["categories"][2]["name"] = "plate"
    Path("val.json").write_text(json.dumps(parsed))


def two_of_a_name() -> None:
    for folder in ("a", "b"):
        (IMAGES / folder / "sub").mkdir(parents=True)
        shutil.copy(FIRST, IMAGES / folder / "sub" / "1.png")
    content(lambda c: c["images"][0].update(file_name="sub/1.png"))()


def categories_of_one_name() -> None:
    parsed = json.loads(FILE.read_text())
    parsed["categories"][0]["name"] = "square"
    Path("val.json").write_text(json.dumps(parsed))


def xyxy(c: Any) -> None:
    """Boxes as x1, y1, x2, y2."""
    for item in c["annotations"]:
        x, y, w, h = item["bbox"]
        item["bbox"] = [x, y, x + w, y + h]


def in_parts(c: Any) -> None:
    """Boxes and polygons in parts of the image's size, 32 x 32."""
    for item in c["annotations"]:
        item["bbox"] = [value / 32 for value in item["bbox"]]
        item["segmentation"] = [[value for point in corners(item) for value in point]]


def large_ids() -> None:
    """Image and category ids that int64 does not hold, and negative annotation ids."""

    def change(c: Any) -> None:
        for item in [*c["images"], *c["categories"]]:
            item["id"] += 2**64
        for k, item in enumerate(c["annotations"]):
            item |= {"id": -k, "image_id": item["image_id"] + 2**64, "category_id": item["category_id"] + 2**64}

    content(change)()


def by_rows(c: Any) -> None:
    """Run lengths along the rows."""
    for item in c["annotations"]:
        x, y, w, h = map(int, item["bbox"])
        counts = [32 * y + x, *[w, 32 - w] * (h - 1), w, 32 * (32 - y - h) + 32 - x - w]
        item["segmentation"] = {"size": [32, 32], "counts": counts}


def corners(item: dict[str, Any]) -> list[list[float]]:
    x, y, w, h = item["bbox"]
    return [[x, y], [x + w, y], [x + w, y + h], [x, y + h]]


def other_ids() -> None:
    """A validation set of the same classes by other ids, one of them left out."""
    parsed = json.loads(FILE.read_text())
    parsed["categories"] = [{"id": 9 - item["id"], "name": item["name"]} for item in parsed["categories"][1:]]
    for item in parsed["annotations"]:
        item["category_id"] = 9 - item["category_id"]
    Path("val.json").write_text(json.dumps(parsed))


def with_root(c: Any) -> None:
    """Roboflow's first category."""
    for item in c["categories"]:
        item["supercategory"] = "shapes"
    c["categories"].insert(0, {"id": 0, "name": "shapes", "supercategory": "none"})


def lvis(c: Any) -> None:
    """LVIS' fields."""
    for item in c["images"]:
        url = f"http://images.cocodataset.org/val2017/{item.pop('file_name')}"
        item.update(coco_url=url, neg_category_ids=[1], not_exhaustive_category_ids=[])
    for item in c["categories"]:
        item["frequency"] = "r"
    for item in c["annotations"]:
        del item["iscrowd"]


def renamed(change: Callable[[str], str]) -> Spoil:
    """Other image names in the annotation file."""
    return content(lambda c: [item.update(file_name=change(item["file_name"])) for item in c["images"]])


FILES = [
    Case(
        "missing image file",
        "train",
        "data/annotations.json: 1 of 3 images do not exist, first data/images/000000.png (image id 1)",
        FIRST.unlink,
    ),
    Case(
        "image name of which two files have the end",
        "train",
        "data/annotations.json: 1 of 3 images do not exist, first data/images/sub/1.png (image id 1); there is a/sub/1.png and b/sub/1.png",
        two_of_a_name,
    ),
    Case(
        "two images of one file",
        "train",
        "data/annotations.json: 1 of 3 images do not exist, first data/images/000001.jpg (image id 1); there is 000001.png",
        content(lambda c: c["images"][0].update(file_name="000001.jpg")),
    ),
    Case(
        "wrong images folder: all images missing",
        "train --data.train_images empty",
        "images_folder: none of the 3 images of data/annotations.json is in empty, first 000000.png (image id 1)",
        lambda: Path("empty").mkdir(),
    ),
    Case(
        "images folder does not exist",
        "train --data.train_images nowhere",
        "--data.train_images: no such file or folder: nowhere",
        code=2,
    ),
    Case(
        "images folder is a file",
        f"eval --images {FILE}",
        "--images: expected a folder, got a file: data/annotations.json",
        code=2,
    ),
    Case(
        "images without annotations",
        f"train --data.val_images {IMAGES}",
        "--data.val_annotations: expected a path, as val_images has one, got None",
        code=2,
    ),
    Case(
        "annotation file is a folder",
        "train --data.train_annotations data",
        "--data.train_annotations: expected a file, got a folder: data",
        code=2,
    ),
    Case(
        "truncated JPEG",
        "train",
        "data/images/000000.jpg: cannot be read as an image: Truncated File Read",
        truncated_jpeg,
    ),
    Case(
        "truncated PNG, read by a worker",
        "train --data.num_workers 2",
        "data/images/000000.png: cannot be read as an image: image file is truncated",
        truncate(FIRST),
    ),
    Case(
        "truncated PNG, found before the first step",
        "train --data.check full",
        f"{FIRST}: cannot be read as an image: image file is truncated",
        truncate(FIRST),
    ),
    Case(
        "truncated PNG, found by workers",
        "eval --check full --num_workers 2",
        f"{FIRST}: cannot be read as an image: image file is truncated",
        truncate(FIRST),
    ),
    Case(
        "several bad images",
        "train --data.check full",
        f"2 of 3 images are bad: {FIRST}: cannot be read as an image: image file is truncated; data/images/000002.png: cannot be read as an image: empty, or of no known format",
        both(truncate(FIRST), file(IMAGES / "000002.png", b"")),
    ),
    Case(
        "several bad images, found by their headers",
        "eval",
        f"2 of 3 images are bad: {FIRST}: cannot be read as an image: empty, or of no known format; data/images/000002.png: cannot be read as an image: empty, or of no known format",
        both(file(FIRST, b""), file(IMAGES / "000002.png", b"")),
    ),
    Case(
        "bad images alone, to be left out",
        "train --data.skip_bad true",
        "3 of 3 images are bad: data/images/000000.png: cannot be read as an image: empty, or of no known format; data/images/000001.png: cannot be read as an image: empty, or of no known format; data/images/000002.png: cannot be read as an image: empty, or of no known format",
        both(*[file(IMAGES / f"00000{i}.png", b"") for i in range(3)]),
    ),
    Case(
        "wrong images folder, bad images to be left out",
        "train --data.skip_bad true --data.train_images empty",
        "images_folder: none of the 3 images of data/annotations.json is in empty, first 000000.png (image id 1)",
        lambda: Path("empty").mkdir(),
    ),
    Case(
        "bad images to be left out, with all annotations",
        "train --data.skip_bad true",
        "data/annotations.json: annotations: expected at least one to train on, got none",
        both(content(lambda c: c.update(annotations=c["annotations"][:1])), truncate(FIRST)),
    ),
    Case(
        "image file of zero bytes",
        "eval",
        "data/images/000000.png: cannot be read as an image: empty, or of no known format",
        file(FIRST, b""),
    ),
    Case(
        "image file of zero bytes, read by a worker",
        "eval --num_workers 2",
        "data/images/000000.png: cannot be read as an image: empty, or of no known format",
        file(FIRST, b""),
    ),
    Case(
        "image file of zero bytes",
        "predict",
        "1 of 3 images left out (the 2 others are done): data/images/000000.png: cannot be read as an image: empty, or of no known format",
        file(FIRST, b""),
    ),
    Case(
        "16-bit image",
        "train",
        "data/images/000000.png: expected an image of 8 bits a channel, got mode 'I;16B'; convert it (magick IN -auto-level -depth 8 OUT.png stretches the darkest value to 0 and the brightest to 255)",
        first_image(np.zeros((32, 32), np.uint16)),
    ),
    Case(
        "16-bit colours, a plane each",
        "train",
        f"{FIRST}: expected an image of 8 bits a channel, got 16; convert it (magick IN -auto-level -depth 8 OUT.png stretches the darkest value to 0 and the brightest to 255)",
        file(FIRST, tiff(np.zeros((32, 32, 3), np.uint16), planar=True)),
    ),
    Case(
        "16-bit PPM",
        "predict",
        f"1 of 3 images left out (the 2 others are done): {FIRST}: expected an image of 8 bits a channel, got values up to 65535; convert it (magick IN -auto-level -depth 8 OUT.png stretches the darkest value to 0 and the brightest to 255)",
        file(FIRST, b"P6 32 32 65535\n" + bytes(32 * 32 * 6)),
    ),
    Case(
        "signed values",
        "eval",
        f"{FIRST}: expected unsigned values, got signed ones; convert it",
        file(FIRST, tiff(np.zeros((32, 32, 1), np.int8))),
    ),
    Case(
        "band that is neither colour nor alpha",
        "train",
        f"{FIRST}: expected 3 bands, or one more of alpha, got 4; choose those of the colours (gdal_translate -b 1 -b 2 -b 3 IN OUT)",
        file(FIRST, tiff(np.zeros((32, 32, 4), np.uint8), extra=[0])),
    ),
    Case(
        "bands of no colours",
        "train",
        f"{FIRST}: cannot be read as an image: a damaged TIFF, or one that is not 8-bit grey, RGB or CMYK",
        file(FIRST, tiff(np.zeros((32, 32, 9), np.uint8), extra=[0] * 6)),
    ),
    Case(
        "Lab colours",
        "train",
        f"{FIRST}: expected grey, RGB, CMYK or a palette, got mode 'LAB'; convert it",
        file(FIRST, tiff(np.zeros((32, 32, 3), np.uint8), photometric=8)),
    ),
    Case(
        "several pages",
        "train",
        f"{FIRST}: expected one image, got a file of 2; split it (magick IN OUT-%d.png)",
        file(FIRST, tiff(pages=[{"pixels": np.zeros((32, 32, 3), np.uint8)}] * 2)),
    ),
    Case(
        "animation",
        "train",
        f"{FIRST}: expected one image, got a file of 2; split it (magick IN OUT-%d.png)",
        saved(
            FIRST,
            np.zeros((32, 32), np.uint8),
            format="GIF",
            save_all=True,
            append_images=[Image.fromarray(np.full((32, 32), 255, np.uint8))],
        ),
    ),
    Case(
        "photograph that is annotated as its EXIF orientation turns it",
        "train",
        f"{FIRST}: expected 32x16 pixels by {FILE}, got 16x32, width and height swapped; --data.exif true (eval: --exif true) turns it by its EXIF orientation",
        both(
            file(FIRST, with_exif(np.zeros((32, 16, 3), np.uint8), "png", 6)),
            each(segmentation=None),
            content(lambda c: c["images"][0].update(height=16)),
        ),
    ),
    Case(
        "photograph that is annotated as stored, read upright",
        "eval --exif true",
        f"{FIRST}: expected 16x32 pixels by {FILE}, got 32x16, width and height swapped; --data.exif false (eval: --exif false) reads it without its EXIF orientation",
        both(
            file(FIRST, with_exif(np.zeros((32, 16, 3), np.uint8), "png", 6)),
            each(segmentation=None),
            content(lambda c: c["images"][0].update(width=16)),
        ),
    ),
    Case(
        "width and height swapped",
        "train",
        f"{FIRST}: expected 32x16 pixels by {FILE}, got 16x32, width and height swapped",
        both(
            saved(FIRST, np.zeros((32, 16, 3), np.uint8)),
            each(segmentation=None),
            content(lambda c: c["images"][0].update(height=16)),
        ),
    ),
    Case(
        "image of another size than the file says",
        "train",
        "data/images/000000.png: expected 33x32 pixels by data/annotations.json, got 32x32",
        size_mismatch,
    ),
    Case(
        "no image to predict on",
        "predict --images run",
        "images: expected an image, a folder of images or a glob, found no image at 'run'",
        code=2,
    ),
    Case(
        "broken JSON",
        "train",
        "data/annotations.json: broken JSON at line 2, column 3: Expecting value",
        file(FILE, '{"images": [\n1,, 2]}'),
    ),
    Case(
        "empty annotation file",
        "train",
        "data/annotations.json: broken JSON at line 1, column 1: Expecting value",
        file(FILE, b""),
    ),
    Case(
        "no COCO file",
        "eval",
        "data/annotations.json: expected a COCO file, an object with a list 'images'",
        file(FILE, "[]"),
    ),
    Case(
        "no images in the file",
        "train",
        "data/annotations.json: images: expected at least one, got none",
        content(lambda c: (c["images"].clear(), c["annotations"].clear())),
    ),
    Case(
        "no categories",
        "train",
        "data/annotations.json: categories: expected at least one, got none",
        content(lambda c: c["categories"].clear()),
    ),
    Case(
        "no annotations to train on",
        "train",
        "data/annotations.json: annotations: expected at least one to train on, got none",
        content(lambda c: c["annotations"].clear()),
    ),
    Case(
        "nothing but crowds to train on",
        "train",
        "data/annotations.json: annotations: expected at least one to train on, got 7, all crowds or without area inside their image",
        each(iscrowd=1),
    ),
    Case(
        "nothing but boxes outside their image to train on",
        "train",
        "data/annotations.json: annotations: expected at least one to train on, got 7, all crowds or without area inside their image",
        each(bbox=[40, 40, 9, 9]),
    ),
    Case(
        "annotation of an unknown image",
        "train",
        "data/annotations.json: annotation id 1: image_id 99 is not in the file",
        annotation(image_id=99),
    ),
    Case(
        "annotation of an unknown category",
        "train",
        "data/annotations.json: annotation id 1: category_id 99 is not in the file",
        annotation(category_id=99),
    ),
    Case(
        "image id of no whole number",
        "train",
        "data/annotations.json: annotation id 1: image_id: expected a whole number, got 'one'",
        annotation(image_id="one"),
    ),
    Case(
        "category id that is null",
        "train",
        "data/annotations.json: annotations[0]: expected a field 'category_id', got none",
        annotation(category_id=None),
    ),
    Case(
        "the same id twice",
        "train",
        "data/annotations.json: images[1]: id 1 occurs twice",
        content(lambda c: c["images"][1].update(id=1)),
    ),
    Case(
        "id that is a text",
        "train",
        "data/annotations.json: images[0]: id: expected a whole number, got 'one'",
        content(lambda c: c["images"][0].update(id="one")),
    ),
    Case(
        "image without a size",
        "train",
        "data/annotations.json: images[0]: expected a field 'width', got none",
        content(lambda c: c["images"][0].pop("width")),
    ),
    Case(
        "size that is no number",
        "train",
        "data/annotations.json: images[0]: expected a size in whole pixels, got 32 x '32'",
        content(lambda c: c["images"][0].update(height="32")),
    ),
    Case(
        "box of three numbers",
        "train",
        "data/annotations.json: annotation id 1: bbox: expected four numbers [x, y, width, height], got [1, 2, 3]",
        annotation(bbox=[1, 2, 3]),
    ),
    Case(
        "neither box nor mask",
        "train",
        "data/annotations.json: annotation id 1: expected a bbox or a segmentation, got neither",
        annotation(bbox=None, segmentation=None),
    ),
    Case(
        "keypoints of the wrong number",
        KEYPOINT_TRAINING,
        "data/annotations.json: annotation id 1: keypoints: expected 6 numbers, x, y and visibility of each of 2, got 3",
        keypoints([1, 2, 2]),
    ),
    Case(
        "keypoint that is half visible",
        KEYPOINT_TRAINING,
        "data/annotations.json: annotation id 1: keypoints: expected a visibility of 0, 1 or 2, got 0.5",
        keypoints([1, 2, 0.5, 0, 0, 0]),
    ),
    Case(
        "NaN in a box",
        "train",
        "data/annotations.json: annotation id 1: bbox: expected finite numbers, got nan",
        annotation(bbox=[1, 2, 3, float("nan")]),
    ),
    Case(
        "infinite box",
        "train",
        "data/annotations.json: annotation id 1: bbox: expected finite numbers, got inf",
        annotation(bbox=[1, 2, float("inf"), 3]),
    ),
    Case(
        "text in a box",
        "train",
        "data/annotations.json: annotation id 1: bbox: expected finite numbers, got '4'",
        annotation(bbox=[1, 2, 3, "4"]),
    ),
    Case(
        "polygon with an odd number of values",
        "train",
        "data/annotations.json: annotation id 1: segmentation: expected polygons of x, y pairs, got an odd number of values, 7",
        annotation(segmentation=[[1, 2, 9, 2, 9, 8, 1]]),
    ),
    Case(
        "NaN in a polygon",
        "train",
        "data/annotations.json: annotation id 1: segmentation: expected finite numbers, got nan",
        annotation(segmentation=[[1, 2, 9, 2, 9, float("nan")]]),
    ),
    Case(
        "text in a polygon",
        "train",
        "data/annotations.json: annotation id 1: segmentation: expected finite numbers, got '8'",
        annotation(segmentation=[[1, 2, 9, 2, 9, "8"]]),
    ),
    Case(
        "polygon that is no list of lists",
        "train",
        "data/annotations.json: annotation id 1: segmentation: expected polygons [[x, y, ...], ...], got a list of 1",
        annotation(segmentation=[1, 2, 9, 2, 9, 8]),
    ),
    Case(
        "masks that are all empty",
        "train",
        "data/annotations.json: segmentation: expected masks that cover pixels, got 7 that are all empty, first annotation id 1",
        each(segmentation=[[1, 2, 9, 8]]),
    ),
    Case(
        "run lengths of another size",
        "train",
        "data/annotations.json: annotation id 1: segmentation: expected run lengths of size (32, 32), got (9, 9)",
        annotation(segmentation={"size": [9, 9], "counts": [81]}),
    ),
    Case(
        "run lengths that end early",
        "train",
        "data/annotations.json: annotation id 1: segmentation: expected runs of 1024 pixels in all, got 7",
        annotation(segmentation={"size": [32, 32], "counts": "0123"}),
    ),
    Case(
        "run lengths that are no text",
        "train",
        "data/annotations.json: annotation id 1: segmentation: expected runs of 1024 pixels in all, got damaged ones",
        annotation(segmentation={"size": [32, 32], "counts": "\u00e9"}),
    ),
    Case(
        "crowd flag that is no number",
        "train",
        "data/annotations.json: annotation id 1: iscrowd: expected 0 or 1, got 'no'",
        annotation(iscrowd="no"),
    ),
    Case(
        "validation set of other categories",
        f"train --data.val_images {IMAGES} --data.val_annotations val.json",
        "val.json: categories: expected those of training, one of disc, ring, square, star, triangle, got 'plate' (id 3)",
        other_categories,
    ),
    Case(
        "validation set of the same categories, two of one name",
        f"train --data.val_images {IMAGES} --data.val_annotations val.json",
        "categories: expected those of training, where label 1 is (1, 'disc'), got (1, 'square')",
        categories_of_one_name,
    ),
]

SETTINGS = [
    Case(
        "unknown key on the command line",
        "train --model.min_sise 3",
        "unknown option --model.min_sise; did you mean --model.min_size?",
        code=2,
    ),
    Case(
        "unknown key, by an abbreviation",
        "train --model.convention.past torchvision",
        "unknown option --model.convention.past; did you mean --model.convention.paste?",
        code=2,
    ),
    Case(
        "unknown key in the config file",
        "train --config c.yaml",
        "unknown option --model.min_sise; did you mean --model.min_size?",
        config("model: {min_sise: 3}"),
        code=2,
    ),
    Case(
        "unknown group in the config file",
        "train --config c.yaml",
        "unknown option --modle.min_size; did you mean --model.min_size?",
        config("modle: {min_size: 3}"),
        code=2,
    ),
    Case(
        "group that holds no settings",
        "train --config c.yaml",
        "--config c.yaml: train: expected settings by name, got 3",
        config("train: 3"),
        code=2,
    ),
    Case(
        "config file that is no YAML",
        "train --config c.yaml",
        "--config c.yaml: not YAML: while parsing a flow node expected the node content, but found '<stream end>' in \"<unicode string>\", line 1, column 9: model: [ ^",
        config("model: ["),
        code=2,
    ),
    Case(
        "config file that does not exist",
        "train --config nowhere.yaml",
        "--config nowhere.yaml: No such file or directory",
        code=2,
    ),
    Case(
        "key of the config file that is no text",
        "train --config c.yaml",
        "unknown option --2020-01-01",
        config("2020-01-01: 3"),
        code=2,
    ),
    Case("unknown preset", "train --preset tinny", "--preset: expected 'tiny'?, got 'tinny'", code=2),
    Case(
        "unknown convention",
        "train --model.convention torch",
        "--model.convention: expected 'torchvision'?, got 'torch'",
        code=2,
    ),
    Case(
        "wrong field of a convention",
        "train --model.convention.paste torch",
        "--model.convention.paste: expected 'torchvision'?, got torch",
        code=2,
    ),
    Case(
        "impossible field of a convention",
        "train --model.convention.roi_sampling_ratio -1",
        "--model.convention: roi_sampling_ratio: expected at least 0, got -1",
        code=2,
    ),
    Case(
        "unknown loss",
        "train --model.losses.box iou",
        "--model.losses.box: expected 'giou'?, got iou",
        code=2,
    ),
    Case(
        "impossible prior of a focal loss",
        "train --model.losses.rpn_objectness focal --model.losses.focal_prior 1",
        "--model.losses: focal_prior: expected in (0, 1), got 1.0",
        code=2,
    ),
    Case(
        "unknown class with masks",
        "train --data.mask_classes disk",
        "mask_classes: unknown category 'disk': expected 'disc'?",
    ),
    Case(
        "more random classes with masks than there are",
        "train --data.mask_classes random:9:0",
        "mask_classes: expected a count in 1..5, got 'random:9:0'",
    ),
    Case(
        "VOC's classes in other data",
        "train --data.mask_classes voc",
        "mask_classes: expected categories of COCO for 'voc', some but not all of them VOC's, got 0 of 5 that are VOC's",
    ),
    Case(
        "unknown key of settings that may be none",
        "train --model.mask_transfer.layer 2",
        "unknown option --model.mask_transfer.layer; did you mean --model.mask_transfer.layers?",
        code=2,
    ),
    Case(
        "unknown input of the weight transfer",
        "train --model.mask_transfer.inputs boxes",
        "--model.mask_transfer: inputs: expected 'box'?, got 'boxes'",
        code=2,
    ),
    Case(
        "too deep a weight transfer",
        "train --config c.yaml",
        "--model.mask_transfer: layers: expected in 1..3, got 4",
        config("model: {mask_transfer: {layers: 4}}"),
        code=2,
    ),
    Case(
        "too deep a fusion of masks",
        "train --model.mask_fusion_layers 3",
        "--model.mask_fusion_layers: expected 0, 1 or 2, got 3",
        code=2,
    ),
    Case(
        "up-down flips of keypoints",
        "train --model.keypoints.names [left,right] --data.vflip 0.5",
        "--data.vflip: expected 0 with --model.keypoints, got 0.5",
        code=2,
    ),
    Case(
        "masks alone, and no detector to learn them on",
        "train --train.only masks",
        "--train.only masks: expected --init, the checkpoint of a detector",
        code=2,
    ),
    Case(
        "fusion of masks that are left out",
        "train --model.masks false --model.mask_fusion_layers 1",
        "--model.mask_fusion_layers: expected 0 with masks false, got 1",
        code=2,
    ),
    Case(
        "classes with masks, and a model without masks",
        "train --model.masks false --data.mask_classes disc",
        "--data.mask_classes: expected null with --model.masks false, got 'disc'",
        code=2,
    ),
    Case(
        "masks alone, of a model without masks",
        f"train --model.masks false --train.only masks --init {CHECKPOINT}",
        "--train.only: expected null with --model.masks false, got 'masks'",
        code=2,
    ),
    Case("wrong type", "train --train.steps many", "--train.steps: expected a whole number, got many", code=2),
    Case(
        "wrong type in the config file",
        "train --config c.yaml",
        "--train.momentum: expected a finite number, got fast",
        config("train: {momentum: fast}"),
        code=2,
    ),
    Case(
        "NaN as the learning rate",
        "train --config c.yaml",
        "--train.lr: expected a finite number, got NaN",
        config("train: {lr: .nan}"),
        code=2,
    ),
    Case(
        "date as the learning rate",
        "train --config c.yaml",
        "--train.lr: expected a finite number, got 2020-01-01",
        config("train: {lr: 2020-01-01}"),
        code=2,
    ),
    Case(
        "flag that is neither true nor false",
        "train --config c.yaml",
        "--overwrite: expected true or false, got 'nope'",
        config("overwrite: nope"),
        code=2,
    ),
    Case("negative learning rate", "train --train.lr -1", "--train.lr: expected at least 0, got -1.0", code=2),
    Case(
        "one image of 32 x 32 pixels and batch norm",
        "train --train.batch_size 1",
        "norm bn needs more than one value a channel: batch_size 1 of 32 x 32 pixels leaves a map of 1 x 1; larger --train.batch_size or --model.min_size, or --model.norm frozen_bn (or gn)",
    ),
    Case("batch of no images", "train --train.batch_size 0", "--train.batch_size: expected at least 1, got 0", code=2),
    Case("negative size", "train --model.min_size -3", "--model.min_size: expected in 1..max_size, got -3", code=2),
    Case(
        "shorter long side than short side",
        "train --model.min_size 800",
        "--model.min_size: expected in 1..max_size, got 800",
        code=2,
    ),
    Case(
        "standard deviation of 0",
        "train --model.image_std [0,1,1]",
        "--model.image_std: expected numbers above 0, got (0.0, 1.0, 1.0)",
        code=2,
    ),
    Case(
        "no anchor sizes",
        "train --model.anchor_sizes []",
        "--model.anchor_sizes: expected 5 tuples, one a level P2-P6, got ()",
        code=2,
    ),
    Case(
        "anchor sizes of a pyramid for one level",
        "train --model.neck c5",
        "--model.anchor_sizes: expected 1 tuple, as the neck c5 is one level, got ((12.0,), (20.0,), (32.0,), (48.0,), (72.0,))",
        code=2,
    ),
    Case("unknown neck", "train --model.neck c3", "--model.neck: expected one of c4, c5, fpn, got c3", code=2),
    Case(
        "batch norm in the RoI heads",
        "train --model.neck c4 --model.anchor_sizes [[16,32,64]]",
        "--model.norm: expected 'frozen_bn' or 'gn', as the neck c4 has conv5 on RoIs, of which batch statistics tell nothing, got 'bn'",
        code=2,
    ),
    Case(
        "channels that 32 groups do not divide",
        "train --model.norm gn",
        "--model.fpn_channels: expected a multiple of the 32 groups of gn, got 8",
        code=2,
    ),
    Case(
        "levels without anchor sizes",
        "train --model.anchor_sizes [[],[],[],[],[]]",
        "--model.anchor_sizes: expected numbers above 0, at least one a level, got ((), (), (), (), ())",
        code=2,
    ),
    Case(
        "levels of different numbers of anchors",
        "train --model.anchor_sizes [[8],[8],[8],[8],[8,9]]",
        "--model.anchor_sizes: expected as many sizes in each level, got ((8.0,), (8.0,), (8.0,), (8.0,), (8.0, 9.0))",
        code=2,
    ),
    Case(
        "background alone",
        "train --model.num_classes 1",
        "--model.num_classes: expected at least 2 (background and one class), got 1",
        code=2,
    ),
    Case(
        "more classes than the data has",
        "train --model.num_classes 9",
        "num_classes: expected 6 (the 5 categories and background), got 9",
    ),
    Case(
        "threshold above 1",
        "train --model.box_nms_threshold 1.5",
        "--model.box_nms_threshold: expected in 0..1, got 1.5",
        code=2,
    ),
    Case(
        "thresholds the wrong way round",
        "train --model.rpn_bg_iou 0.9",
        "--model.rpn_bg_iou: expected at most rpn_fg_iou (0.7), got 0.9",
        code=2,
    ),
    Case(
        "sample too small for a positive",
        "train --model.box_batch_size 3",
        "--model.box_batch_size: expected enough for a positive at box_positive_fraction (0.25), got 3",
        code=2,
    ),
    Case(
        "backbone weights that do not exist",
        "train --model.backbone_weights nowhere.pth",
        "backbone_weights: expected a state-dict file, got 'nowhere.pth', which does not exist",
    ),
    Case(
        "backbone weights that are no weights",
        f"train --model.backbone_weights {FILE}",
        'backbone_weights: expected weights in data/annotations.json, got a text that begins \'{"images": [{"id": 1, "file_name": "0000\'',
    ),
    Case(
        "device that does not exist",
        "train --device gpu",
        "device: expected auto, cpu, cuda or cuda:N, got 'gpu'",
        code=2,
    ),
    Case(
        "device this machine does not have",
        "eval --device cuda:77",
        "device: expected one of this machine's, got 'cuda:77' (0 GPUs)",
        code=2,
    ),
    Case(
        "--out is a file",
        f"train --out {FILE}",
        "--out data/annotations.json: expected a folder, but data/annotations.json is a file",
        code=2,
    ),
    Case(
        "--out is a file",
        f"eval --out {FILE}",
        "--out data/annotations.json: expected a folder, but data/annotations.json is a file",
        code=2,
    ),
    Case(
        "--out is a file",
        f"predict --out {FILE}",
        "--out data/annotations.json: expected a folder, but data/annotations.json is a file",
        code=2,
    ),
    Case(
        "--out inside a file",
        f"train --out {FILE}/out",
        "--out data/annotations.json/out: expected a folder, but data/annotations.json is a file",
        code=2,
    ),
    Case(
        "unknown check of the images",
        "train --data.check fully",
        "--data.check: expected 'full'? or none, got fully",
        code=2,
    ),
    Case(
        "bad images left out without a look",
        "train --data.skip_bad true --data.check off",
        "--data.check: expected 'full' or 'headers' with skip_bad, got 'off'",
        code=2,
    ),
    Case(
        "bad images left out without a look",
        "eval --skip_bad true --check off",
        "--check: expected 'full' or 'headers' with skip_bad, got 'off'",
        code=2,
    ),
    Case("negative number of workers", "eval --num_workers -1", "--num_workers: expected at least 0, got -1", code=2),
]

CHECKPOINTS = [
    Case(
        "checkpoint that does not exist",
        "eval --checkpoint nowhere.pt",
        "--checkpoint: no such file or folder: nowhere.pt",
        code=2,
    ),
    Case(
        "checkpoint that is a folder",
        "predict --checkpoint run",
        "--checkpoint: expected a file, got a folder: run",
        code=2,
    ),
    Case(
        "truncated checkpoint",
        "eval",
        "checkpoint run/checkpoint.pt: expected a file written by tmask, got a truncated or damaged file",
        truncated_checkpoint,
    ),
    Case(
        "foreign file to go on from",
        f"train --resume {FILE}",
        'checkpoint data/annotations.json: expected a file written by tmask, got a text that begins \'{"images": [{"id": 1, "file_name": "0000\'',
    ),
    Case(
        "foreign file",
        f"predict --checkpoint {FILE}",
        'checkpoint data/annotations.json: expected a file written by tmask, got a text that begins \'{"images": [{"id": 1, "file_name": "0000\'',
    ),
    Case(
        "pickle with code in it: does not run",
        "eval",
        "checkpoint run/checkpoint.pt: expected a file written by tmask, got a pickle of builtins.exec, which is not read, as it could run code; save the weights alone: torch.save(model.state_dict(), 'weights.pth')",
        evil_checkpoint,
    ),
    Case(
        "checkpoint with another object in it",
        "predict --checkpoint args.pt",
        "checkpoint args.pt: holds argparse.Namespace, which is none of tmask's and could run code",
        lambda: torch.save({"format": "tmask checkpoint", "args": argparse.Namespace(lr=0.02)}, "args.pt"),
    ),
    Case(
        "a whole model, pickled",
        "train --init model.pth",
        f"init model.pth: expected a checkpoint or weights of a Mask R-CNN, got a pickle of torch.nn.modules.linear.Linear, {NOT_READ}",
        lambda: torch.save(torch.nn.Linear(1, 1), "model.pth"),
    ),
    Case(
        "a whole model, pickled",
        "eval --checkpoint model.pth",
        f"checkpoint model.pth: expected a file written by tmask, got a pickle of torch.nn.modules.linear.Linear, {NOT_READ}",
        lambda: torch.save(torch.nn.Linear(1, 1), "model.pth"),
    ),
    Case(
        "weights of detectron2",
        "train --init d2.pkl",
        "init d2.pkl: expected a checkpoint or weights of a Mask R-CNN, got weights of detectron2, which are not read yet",
        file("d2.pkl", pickle.dumps({"model": {"backbone.bottom_up.stem.conv1.weight": np.zeros(1)}})),
    ),
    Case(
        "weights of mmdetection",
        "train --init mm.pth",
        "init mm.pth: expected a checkpoint or weights of a Mask R-CNN, got weights of mmdetection, which are not read yet",
        lambda: torch.save({"meta": {}, "state_dict": {"rpn_head.rpn_conv.weight": torch.zeros(1)}}, "mm.pth"),
    ),
    Case(
        "weights of Keras",
        "train --init mask_rcnn_coco.h5",
        "init mask_rcnn_coco.h5: expected a checkpoint or weights of a Mask R-CNN, got an HDF5 file, such as Keras's .h5, which is not read",
        file("mask_rcnn_coco.h5", b"\x89HDF\r\n\x1a\n" + bytes(99)),
    ),
    Case(
        "page of an error, saved as weights",
        "eval --checkpoint a.pt",
        "checkpoint a.pt: expected a file written by tmask, got a page of HTML or XML, which servers give in place of a file: download it again",
        file("a.pt", "<!DOCTYPE html>\n<html>404</html>"),
    ),
    Case(
        "Git LFS pointer",
        "train --model.backbone_weights resnet18.pth",
        "backbone_weights: expected weights in resnet18.pth, got a Git LFS pointer in place of the file: run git lfs pull",
        file("resnet18.pth", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    ),
    Case(
        "weights of tmask without settings",
        "predict --checkpoint own.pth",
        "checkpoint own.pth: expected a file written by tmask, got the weights of tmask's model alone: --init begins a run with them, model.load_state_dict takes them",
        lambda: torch.save(load_checkpoint(CHECKPOINT)["model"], "own.pth"),
    ),
    Case(
        "weights of a ResNet alone",
        "train --init resnet18.pth",
        "init resnet18.pth: expected a checkpoint or weights of a Mask R-CNN, got weights of a ResNet without a detector: give them as model.backbone_weights",
        lambda: torch.save({"layer1.0.conv1.weight": torch.zeros(1)}, "resnet18.pth"),
    ),
    Case(
        "weights of several models",
        "train --init two.pth",
        "init two.pth: expected the weights of one model, got 2, under 'student.', 'teacher.'; save one alone",
        lambda: torch.save(
            {f"{own}.rpn.head.conv.weight": torch.zeros(1) for own in ("student", "teacher")}, "two.pth"
        ),
    ),
    Case(
        "torchvision's weights",
        "eval --checkpoint tv.pth",
        "checkpoint tv.pth: expected a file written by tmask, got a torchvision state dict: use tmask.load_torchvision, or --init to begin a run with it",
        torchvision_weights,
    ),
    Case(
        "checkpoint of another config",
        f"train --resume {CHECKPOINT} --model.fpn_channels 16",
        "checkpoint run/checkpoint.pt: cannot resume, the model differs: fpn_channels: 8 -> 16",
    ),
    Case(
        "checkpoint with masks, to go on without",
        f"train --resume {CHECKPOINT} --model.masks false",
        "checkpoint run/checkpoint.pt: cannot resume, the model differs: masks: True -> False",
    ),
    Case(
        "file to begin with that holds no weights",
        f"train --init {FILE}",
        'init data/annotations.json: expected a checkpoint or weights of a Mask R-CNN, got a text that begins \'{"images": [{"id": 1, "file_name": "0000\'',
    ),
    Case(
        "weights to begin with of another model",
        f"train --init {CHECKPOINT} --model.fpn_channels 16",
        "init run/checkpoint.pt: the weights are of another model: fpn_channels: 8 -> 16",
    ),
    Case(
        "detector to be frozen of which not all is there",
        f"train --init {CHECKPOINT} --train.only masks --model.losses.classifier sigmoid_focal",
        "init run/checkpoint.pt: expected all weights of the detector, as only the masks learn, "
        "got none that fit roi_heads.box_head.classifier.weight and 1 more",
    ),
    Case(
        "checkpoint of another batch size",
        f"train --resume {CHECKPOINT} --train.batch_size 1",
        "checkpoint run/checkpoint.pt: cannot resume, the run differs: batch_size: 2 -> 1",
    ),
    Case(
        "checkpoint of other categories",
        "eval --annotations val.json",
        "val.json: categories: expected those of training, one of disc, ring, square, star, triangle, got 'plate' (id 3)",
        other_categories,
    ),
]


@dataclass(frozen=True)
class Accepted:
    """`words` succeed; `warning` is the one that is given, None for none."""

    what: str
    words: str
    done: str
    spoil: Spoil | None = None
    warning: str | None = None


SKIPPED = "is left out"
ACCEPTED = [
    Accepted(
        "box with x2 <= x1",
        "train",
        SKIPPED,
        annotation(bbox=[9, 9, -4, 5]),
        "data/annotations.json: left out 1 of 7 annotations, whose box has no area inside the image; first annotation id 1",
    ),
    Accepted(
        "box wholly outside its image",
        "train",
        SKIPPED,
        annotation(bbox=[50, 9, 4, 5]),
        "data/annotations.json: left out 1 of 7 annotations, whose box has no area inside the image; first annotation id 1",
    ),
    Accepted(
        "empty polygon",
        "train",
        "the mask is left out, the box counts",
        annotation(segmentation=[[]]),
        "data/annotations.json: the mask of 1 of 7 annotations is empty and left out, their boxes count; first annotation id 1",
    ),
    Accepted(
        "one file for two images",
        "train",
        "both are taken",
        content(lambda c: c["images"][1].update(file_name=c["images"][0]["file_name"])),
        "data/annotations.json: 1 of 3 images have the file of another image, first 000000.png (image ids 1 and 2): the annotations of one are missing in the other",
    ),
    Accepted(
        "boxes alone that reach beyond their images",
        "train --model.masks false",
        "are cut at the edge",
        each(bbox=[20, 9, 40, 9], segmentation=None),
        "data/annotations.json: 7 of 7 boxes without a mask reach beyond their images: expected x, y, width, height in pixels of the image; first annotation id 1",
    ),
    Accepted(
        "polygon of two points",
        "train",
        "the mask is left out, the box counts",
        annotation(segmentation=[[1, 2, 9, 8]]),
        "data/annotations.json: the mask of 1 of 7 annotations is empty and left out, their boxes count; first annotation id 1",
    ),
    Accepted(
        "no annotations to evaluate with",
        "eval --out out",
        "the table shows no figures, the results are written",
        content(lambda c: c["annotations"].clear()),
        "data/annotations.json: no annotation to evaluate with: no average precision",
    ),
    Accepted(
        "more objects than detections count",
        "eval --max_detections 2",
        "AP counts the best 2 of a class and image",
        None,
        "data/annotations.json: 1 of 3 images hold more than 2 objects, up to 4, but 2 detections an image count: --max_detections",
    ),
    Accepted(
        "more objects than detections count",
        f"train --data.val_images {IMAGES} --data.val_annotations {FILE} --train.eval_max_detections 1 --model.max_detections 2",
        "is told before the first step",
        None,
        "data/annotations.json: 2 of 3 images hold more than 1 objects, up to 4, but 1 detections an image count: --train.eval_max_detections, --model.max_detections",
    ),
    Accepted(
        "as many detections as may be",
        "predict --max_detections 1",
        "the best are kept",
        None,
        "3 of 3 images give exactly 1 detections, the limit of an image: there may be more objects; --max_detections",
    ),
    Accepted(
        "ids beyond 2^63",
        f"train --data.val_images {IMAGES} --data.val_annotations {FILE}",
        "results have them",
        large_ids,
    ),
    Accepted("ids beyond 2^63", "eval --out out --plots out", "results have them", large_ids),
    Accepted("annotation without a mask", "train", "the box counts", annotation(segmentation=None)),
    Accepted(
        "class without any mask",
        "train",
        "its boxes count",
        content(lambda c: c["annotations"][1].pop("segmentation")),
        "data/annotations.json: no instance of ring (id 5) has a mask; first annotation id 2",
    ),
    Accepted(
        "boxes alone",
        "train",
        "the detector learns, its masks do not",
        each(segmentation=[]),
        "data/annotations.json: none of 7 annotations has a mask: boxes alone are learnt from and evaluated; a model trained with --model.masks false predicts no masks",
    ),
    Accepted("boxes alone", "train --model.masks false", "the detector learns", each(segmentation=[])),
    Accepted(
        "damaged masks beside boxes",
        "train --model.masks false",
        "no mask is used",
        annotation(segmentation=[[1, 2, 9, 2, 9, 8, 1]]),
    ),
    Accepted(
        "masks that are all empty",
        "train --model.masks false",
        "no mask is used",
        each(segmentation=[[1, 2, 9, 8]]),
    ),
    Accepted(
        "weights with masks to begin with",
        f"train --model.masks false --init {CHECKPOINT}",
        "those of masks are left out",
        None,
        f"init {CHECKPOINT}: left out, as the model has no such part: roi_heads.mask_head.convs.0.weight and 5 more",
    ),
    Accepted(
        "box that its mask contradicts",
        "train",
        "both are taken as they are",
        annotation(bbox=[1, 20, 9, 9]),
        "data/annotations.json: bbox and mask of 1 of 7 annotations contradict each other (IoU of the box and the mask's box below 0.5); first annotation id 1",
    ),
    Accepted(
        "boxes as x1, y1, x2, y2",
        "train",
        "are taken for x, y, width, height",
        content(xyxy),
        "data/annotations.json: bbox and mask of 7 of 7 annotations contradict each other (IoU of the box and the mask's box below 0.5; as if bbox held x1, y1, x2, y2); first annotation id 1",
    ),
    Accepted(
        "boxes and polygons in parts of the image's size",
        "train",
        "are taken for pixels",
        content(in_parts),
        "data/annotations.json: bbox of 7 of 7 annotations lies in 0..1: expected pixels, got parts of the image's size; first annotation id 1",
    ),
    Accepted(
        "run lengths along the rows",
        "train",
        "are taken to go down the columns",
        content(by_rows),
        "data/annotations.json: bbox and mask of 7 of 7 annotations contradict each other (IoU of the box and the mask's box below 0.5; as if run lengths went along the rows, and not down the columns); first annotation id 1",
    ),
    Accepted(
        "many crowds",
        "train",
        "are not learnt",
        content(lambda c: [item.update(iscrowd=1) for item in c["annotations"][::2]]),
        "data/annotations.json: 4 of 7 annotations are crowds (iscrowd 1), which are not learnt; if they are single objects, set --data.crowds (eval: --crowds) instances; first annotation id 1",
    ),
    Accepted(
        "truncated PNG",
        "train --data.skip_bad true",
        "is left out, and listed in `skipped.txt` of the run",
        truncate(FIRST),
        f"{FILE}: left out 1 of 3 images: {FIRST}: cannot be read as an image: image file is truncated",
    ),
    Accepted(
        "missing image",
        "train --data.skip_bad true --data.check headers",
        "is left out, and listed in `skipped.txt` of the run",
        FIRST.unlink,
        f"{FILE}: left out 1 of 3 images: {FIRST}: no such file (image id 1)",
    ),
    Accepted(
        "truncated PNG",
        "eval --skip_bad true --num_workers 2",
        "is left out of the figures, which say so",
        truncate(FIRST),
        f"{FILE}: left out 1 of 3 images: {FIRST}: cannot be read as an image: image file is truncated",
    ),
    Accepted("nothing but crowds", "train --data.crowds instances", "are learnt like all", each(iscrowd=1)),
    Accepted("nothing but crowds", "eval --crowds instances", "are evaluated like all", each(iscrowd=1)),
    Accepted(
        "polygon as points",
        "train",
        "is that polygon",
        content(lambda c: [item.update(segmentation=corners(item)) for item in c["annotations"]]),
    ),
    Accepted(
        "polygons nested deeper",
        "train",
        "are those polygons",
        content(lambda c: [item.update(segmentation=[[corners(item)]]) for item in c["annotations"]]),
    ),
    Accepted(
        "masks without boxes",
        "train",
        "the boxes are made from them",
        each(bbox=None),
        "data/annotations.json: the box of 7 of 7 annotations is missing and made from the mask; first annotation id 1",
    ),
    Accepted("fields that are null", "train", "are as if they were missing", each(iscrowd=None, area=None)),
    Accepted(
        "ids of annotations as texts",
        "train",
        "are the numbers they name",
        content(lambda c: [item.update(image_id=str(item["image_id"]), category_id="3") for item in c["annotations"]]),
    ),
    Accepted(
        "keypoints of the wrong number",
        "train",
        "are left out, as nothing learns them",
        keypoints([1, 2, 2]),
        "data/annotations.json: annotation id 1: keypoints: expected 6 numbers, x, y and visibility of each of 2, got 3; all keypoints are left out",
    ),
    Accepted(
        "root category without annotations",
        "train",
        "is left out",
        content(with_root),
        "data/annotations.json: left out the category 'shapes' (id 0), which has no annotation and is the supercategory of all others",
    ),
    Accepted(
        "validation set of other ids and fewer classes",
        f"train --data.val_images {IMAGES} --data.val_annotations val.json",
        "names decide; a class that is not there has no AP",
        other_ids,
    ),
    Accepted("data of other ids and fewer classes", "eval --annotations val.json", "names decide", other_ids),
    Accepted(
        "image names of Windows",
        "train",
        "the files are found",
        renamed(lambda name: f"C:\\data\\images\\{name}"),
        "data/annotations.json: 3 of 3 images are there under another name, first 'C:\\\\data\\\\images\\\\000000.png': 000000.png (image id 1)",
    ),
    Accepted(
        "image names of another format and case",
        "eval",
        "the files are found",
        renamed(lambda name: name.replace(".png", ".JPG")),
        "data/annotations.json: 3 of 3 images are there under another name, first '000000.JPG': 000000.png (image id 1)",
    ),
    Accepted("fields of LVIS, without file names", "train", "the end of the URL is the name", content(lvis)),
    Accepted("crowd among the annotations", "train", "nothing inside it counts as background", annotation(iscrowd=1)),
    Accepted(
        "category ids with holes",
        "train",
        "labels are counted through",
        content(
            lambda c: (
                c["categories"][4].update(id=900),
                [item.update(category_id=900) for item in c["annotations"] if item["category_id"] == 5],
            )
        ),
    ),
    Accepted(
        "image without annotations",
        "train",
        "all of it is background",
        content(lambda c: c.update(annotations=c["annotations"][:2])),
    ),
    Accepted(
        "one image of 32 x 32 pixels and group norm",
        "train --train.batch_size 1 --model.norm gn --model.fpn_channels 64 --model.mask_head_channels 32",
        "trains: it has statistics of groups of channels",
    ),
    Accepted("batch larger than the data set", "train --train.batch_size 8", "every batch holds all images"),
    Accepted(
        "alpha that hides something",
        "train",
        "alpha is dropped",
        first_image(np.zeros((32, 32, 4), np.uint8)),
        f"the alpha of 1 of 3 images, first {FIRST}, is not opaque, and dropped: what it hides shows",
    ),
    Accepted(
        "alpha that hides something",
        "predict",
        "alpha is dropped",
        first_image(np.zeros((32, 32, 4), np.uint8)),
        f"the alpha of 1 of 3 images, first {FIRST}, is not opaque, and dropped: what it hides shows",
    ),
    Accepted("opaque alpha", "train", "is dropped", first_image(np.full((32, 32, 4), 255, np.uint8))),
    Accepted(
        "palette with a transparent colour",
        "eval",
        "its colours are looked up",
        saved(FIRST, np.zeros((32, 32), np.uint8), "P", transparency=bytes([7])),
        f"the alpha of 1 of 3 images, first {FIRST}, is not opaque, and dropped: what it hides shows",
    ),
    Accepted(
        "TIFF with overviews",
        "train",
        "the full image is read",
        file(
            FIRST,
            tiff(
                pages=[
                    {"pixels": np.zeros((32, 32, 3), np.uint8)},
                    {"pixels": np.zeros((16, 16, 3), np.uint8), "more": [(254, 4, [1])]},
                ]
            ),
        ),
    ),
    Accepted(
        "EXIF orientation",
        "train",
        "is not applied",
        file(FIRST, with_exif(np.zeros((32, 32, 3), np.uint8), "png", 3)),
        f"the EXIF orientation of 1 of 3 images, first {FIRST}, is not applied. Were the annotations drawn on upright images? true turns these upright, false keeps them as stored without this warning: --data.exif of train, --exif of eval and predict, apply_exif of CocoDataset",
    ),
    Accepted(
        "EXIF orientation",
        "train --data.exif true",
        "is applied",
        file(FIRST, with_exif(np.zeros((32, 32, 3), np.uint8), "png", 3)),
    ),
    Accepted(
        "EXIF orientation",
        "eval --exif false",
        "is not applied",
        file(FIRST, with_exif(np.zeros((32, 32, 3), np.uint8), "png", 3)),
    ),
    Accepted(
        "EXIF orientation",
        f"predict --annotations {FILE}",
        "is not applied",
        file(FIRST, with_exif(np.zeros((32, 32, 3), np.uint8), "png", 3)),
        f"the EXIF orientation of 1 of 3 images, first {FIRST}, is not applied. Were the annotations drawn on upright images? true turns these upright, false keeps them as stored without this warning: --data.exif of train, --exif of eval and predict, apply_exif of CocoDataset",
    ),
    Accepted(
        "EXIF tags that are damaged",
        "predict",
        "the orientation alone is read",
        file(FIRST, with_exif(np.zeros((32, 32, 3), np.uint8), "png", 6, [(0x11A, 10, 1, 200), (0x8769, 4, 1, 8)])),
    ),
    Accepted(
        "weights of tmask without settings",
        "train --init own.pth",
        "a run begins with them; their classes are taken to be those of the data",
        lambda: torch.save(load_checkpoint(CHECKPOINT)["model"], "own.pth"),
    ),
    Accepted(
        "weights in a checkpoint of Lightning or of a script, with other objects beside them",
        "train --init theirs.ckpt",
        "the weights are taken, and no prefix of a wrapper; in place of the objects stand empty dicts",
        lambda: torch.save(
            {
                "state_dict": {f"model.module.{n}": t for n, t in load_checkpoint(CHECKPOINT)["model"].items()},
                "args": argparse.Namespace(lr=0.02, out=Path("a")),
            },
            "theirs.ckpt",
        ),
    ),
    Accepted(
        "folder with other files, and with subfolders",
        "predict --images data",
        "the images are found",
        None,
        f"images: left out 1 of 4 files, whose suffix is that of no image format, first {FILE}",
    ),
    Accepted(
        "image with a palette", "train", "its colours are looked up", first_image(np.zeros((32, 32, 3), np.uint8), "P")
    ),
    Accepted("image of one channel", "eval", "grey is repeated", first_image(np.zeros((32, 32), np.uint8))),
    Accepted("1 x 1 image", "train --train.batch_size 3", "is enlarged like any other", tiny_image(1, 1)),
    Accepted("1 x 1 image", "eval", "is enlarged like any other", tiny_image(1, 1)),
    Accepted("1 x 1 image", "predict", "is enlarged like any other", tiny_image(1, 1)),
    Accepted(
        "image of 1 x 700 pixels", "train --train.batch_size 3", "keeps one row after the resize", tiny_image(700, 1)
    ),
    Accepted(
        "image of 1 x 700 pixels",
        "train --train.batch_size 3 --model.convention torchvision",
        "keeps one row after the resize",
        tiny_image(700, 1),
    ),
    Accepted("image of 1 x 700 pixels", "eval", "keeps one row after the resize", tiny_image(700, 1)),
    Accepted("image of 1 x 700 pixels", "predict", "keeps one row after the resize", tiny_image(700, 1)),
    Accepted(
        "byte-order mark before the JSON",
        "train",
        "is read over",
        lambda: FILE.write_text(FILE.read_text(), encoding="utf-8-sig"),
    ),
]

# Tested where the code is.
ELSEWHERE = {
    "full disk while saving a checkpoint": "tests/engine/test_processes.py::test_a_full_disk_ends_the_run_and_not_the_checkpoint",
    "bad image midway": "tests/engine/test_errors.py::test_a_bad_image_midway_costs_no_step",
    "any error in a run": "tests/engine/test_errors.py::test_a_run_goes_on_behind_the_last_whole_update",
    "out of memory, or a data worker that died": "tests/engine/test_memory.py::test_training_saves_and_names_the_options",
    "folder where another command is at work": "tests/engine/test_files.py::test_one_training_at_a_time",
    "loss that is NaN or infinite": "tests/engine/test_train.py::test_a_loss_that_is_not_finite_names_step_and_term",
    "every form of damage to a mask": "tests/data/test_coco.py::"
    "test_faults_of_a_mask_are_found_on_opening_and_name_the_annotation",
    "every field of a config": "tests/test_config.py::test_wrong_values_name_field_expected_and_got",
    "every argument of every op": "tests/kernels/test_arguments.py::test_a_wrong_argument_is_named",
    "any error in a loader's worker": "tests/data/test_loader.py::test_an_error_is_the_same_from_a_worker",
    "folders and data of an ablation": "tests/bench/test_ablate.py::"
    "test_more_seeds_may_be_added_but_nothing_else_changed",
    "formats that Pillow would read to other pixels": "tests/data/test_images.py::"
    "test_more_than_eight_bits_are_refused_in_every_format",
    "every odd EXIF tag": "tests/data/test_images.py::test_odd_tags_neither_stop_the_turn_nor_warn",
    "links that make a loop of folders": "tests/engine/test_find_images.py::"
    "test_links_to_folders_are_followed_and_make_no_loop",
    "targets and images of the model": "tests/model/test_transform.py::test_bad_targets_are_named",
}

BENCHMARKS = [
    Case("unknown op, nearly right", "bench roi_alin", "unknown op 'roi_alin': expected 'roi_align'?", code=2),
    Case("unknown option", "bench --jason a.json", "unknown option --jason; did you mean --json?", code=2),
    Case(
        "budget that is no number",
        "bench --budget soon",
        "--budget: expected a finite number or none, got soon",
        code=2,
    ),
    Case("no time at all", "bench --budget 0", "--budget: expected more than 0 seconds, got 0", code=2),
    Case(
        "device that is not there",
        "bench --device cuda:9",
        "device: expected one of this machine's, got 'cuda:9' (0 GPUs)",
        code=2,
    ),
    Case(
        "result that would lie in a file",
        f"bench --json {FILE}/a.json",
        f"--json {FILE}: expected a folder, but {FILE} is a file",
        code=2,
    ),
    Case("result that is a folder", "bench --json data", "--json data: expected a file, got a folder", code=2),
]

ABLATIONS = [
    Case("unknown table, nearly right", "ablate focl", "unknown table 'focl': expected 'focal'?", code=2),
    Case("no seed", "ablate focal --seeds 0", "--seeds: expected at least 1, got 0", code=2),
    Case("seeds that are no number", "ablate focal --seeds two", "--seeds: expected a whole number, got two", code=2),
    Case("COCO that is not there", "ablate focal --coco nowhere", "--coco: no such folder: nowhere", code=2),
    Case(
        "table that would lie in a file",
        f"ablate focal --out {FILE}",
        f"--out {FILE}: expected a folder, but {FILE} is a file",
        code=2,
    ),
]

GROUPS = {
    "Data": FILES,
    "Settings": SETTINGS,
    "Checkpoints": CHECKPOINTS,
    "Benchmarks": BENCHMARKS,
    "Ablations": ABLATIONS,
}


@dataclass(frozen=True)
class PythonCase:
    """`code` is evaluated with `tmask`, `tmask_kernels`, `torch`, a `model` of 3 classes, an `image` [3, 40, 50] and its `target`, the content of the annotation file as `truth` and a `result`."""

    what: str
    code: str
    message: str


PYTHON = [
    PythonCase(
        "unknown setting",
        'tmask.build_model("tiny", min_sise=3)',
        "unknown ModelConfig setting 'min_sise': expected 'min_size'?",
    ),
    PythonCase(
        "impossible setting",
        'tmask.build_model("tiny", rpn_nms_threshold=float("nan"))',
        "rpn_nms_threshold: expected a finite number, got nan",
    ),
    PythonCase("unknown preset", 'tmask.build_model("r50_fnp")', "preset: expected 'r50_fpn'?, got 'r50_fnp'"),
    PythonCase(
        "backbone that is none",
        'tmask.build_model("tiny", backbone=torch.nn.ReLU())',
        "backbone: expected a module with out_channels, the widths of its 4 maps of strides (4, 8, 16, 32), or with timm's feature_info, got out_channels None",
    ),
    PythonCase("no image", "model([])", "images: expected at least one image, got an empty list"),
    PythonCase(
        "NaN in an image",
        "model.eval()([image, image * float('nan')])",
        "images[1]: expected finite values, got 6000 NaN or infinite of 6000",
    ),
    PythonCase(
        "NaN in an image, in training",
        "model([image * float('nan')], [target])",
        "images[0]: expected finite values, got 6000 NaN or infinite of 6000",
    ),
    PythonCase(
        "float image of 0..255",
        "model.eval()([torch.linspace(0, 255, 6000).view(3, 40, 50)])",
        "images[0]: expected float values in 0..1, got 0.0..255.0 (the model itself subtracts image_mean and divides by image_std; give 0..255 as uint8)",
    ),
    PythonCase(
        "image that is normalised already",
        "model([(torch.linspace(0, 1, 6000).view(3, 40, 50) - 0.45) / 0.225], [target])",
        "images[0]: expected float values in 0..1, got -2.0..2.444 (the model itself subtracts image_mean and divides by image_std; give 0..255 as uint8)",
    ),
    PythonCase(
        "wrong channel count", "model.eval()([image[:1]])", "images[0]: expected a tensor [3, h, w], got (1, 40, 50)"
    ),
    PythonCase(
        "integers that are no bytes",
        "model.eval()([image.long()])",
        "images[0]: expected uint8 or a float dtype, got torch.int64",
    ),
    PythonCase(
        "x2 <= x1",
        'model([image], [target | {"boxes": torch.tensor([[9.0, 2, 9, 8]])}])',
        "targets[0]['boxes'][0]: expected finite x1 < x2 and y1 < y2, got [7.2, 1.6, 7.2, 6.4] (after the resize)",
    ),
    PythonCase(
        "NaN in a box",
        'model([image], [target | {"boxes": torch.full((1, 4), float("nan"))}])',
        "targets[0]['boxes'][0]: expected finite x1 < x2 and y1 < y2, got [nan, nan, nan, nan] (after the resize)",
    ),
    PythonCase(
        "mask of another size",
        'model([image], [target | {"masks": torch.ones(1, 50, 40)}])',
        "targets[0]['masks']: expected shape (1, 40, 50), got (1, 50, 40)",
    ),
    PythonCase(
        "label out of range",
        'model([image], [target | {"labels": torch.tensor([3])}])',
        "targets[0]['labels'][0]: expected 1..2, got 3",
    ),
    PythonCase(
        "label of a float type",
        'model([image], [target | {"labels": torch.tensor([1.0])}])',
        "targets[0]['labels']: expected an integer dtype, got torch.float32",
    ),
    PythonCase(
        "no labels",
        'model([image], [{"boxes": torch.zeros(0, 4)}])',
        "targets[0]: expected a key 'labels', got ['boxes']",
    ),
    PythonCase(
        "fewer targets than images", "model([image, image], [target])", "targets: expected 2, one an image, got 1"
    ),
    PythonCase("training without targets", "model([image])", "targets: expected Targets in training mode, got None"),
    PythonCase(
        "missing image file",
        'CocoDataset("data/images", "data/annotations.json")[0]',
        "data/annotations.json: 1 of 3 images do not exist, first data/images/000000.png (image id 1)",
    ),
    PythonCase(
        "weights of several precisions",
        "model.eval() and model.fpn.half() and model([image])",
        "weights: expected one dtype, got float16 and float32: give all the same, or keep all in float32 and use torch.autocast (in the commands --precision)",
    ),
    PythonCase("checkpoint that does not exist", 'load_model("nowhere.pt")', "checkpoint nowhere.pt: no such file"),
    PythonCase(
        "result of an unknown category",
        'coco_metrics(truth, [result, result | {"category_id": 99}])',
        "results[1]: category_id 99 is not in the ground truth",
    ),
    PythonCase(
        "unknown kind of evaluation",
        'coco_metrics(truth, [result], kinds=["bbox", "mask"])',
        "kinds: expected one of bbox, keypoints, segm, got 'mask'",
    ),
    PythonCase(
        "result of an unknown image",
        'coco_metrics(truth, [result | {"image_id": 99}])',
        "results[0]: image_id 99 is not in the ground truth",
    ),
    PythonCase(
        "category by its name",
        'coco_metrics(truth, [result | {"category_id": "disc"}])',
        "results[0]: category_id: expected a whole number, got 'disc'",
    ),
    PythonCase(
        "result without a score",
        'coco_metrics(truth, [{key: result[key] for key in ("image_id", "category_id", "bbox")}])',
        "results[0]: expected a field 'score', got none",
    ),
    PythonCase(
        "score that is NaN",
        'coco_metrics(truth, [result | {"score": float("nan")}])',
        "results[0]: score: expected finite numbers, got nan",
    ),
    PythonCase(
        "run lengths of another size",
        'coco_metrics(truth, [result | {"segmentation": {"size": [9, 8], "counts": [72]}}])',
        "results[0]: segmentation: expected run lengths of size (32, 32), got (9, 8)",
    ),
    PythonCase(
        "IoU threshold above 1",
        "tmask_kernels.nms(torch.zeros(3, 4), torch.zeros(3), 1.5)",
        "nms: iou_threshold: expected a number in 0..1, got 1.5",
    ),
    PythonCase(
        "fewer scores than boxes",
        "tmask_kernels.soft_nms(torch.zeros(3, 4), torch.zeros(2))",
        "soft_nms: scores: expected float [3], got torch.float32 [2]",
    ),
    PythonCase(
        "unknown soft-NMS method",
        'tmask_kernels.soft_nms(torch.zeros(3, 4), torch.zeros(3), method="hard")',
        "soft_nms: method: expected one of linear, gaussian, got 'hard'",
    ),
    PythonCase(
        "heat maps without an axis of images",
        "tmask_kernels.decode_keypoints(torch.zeros(2, 17, 56, 56), torch.zeros(1, 2, 4))",
        "decode_keypoints: heatmaps: expected float [N, D, K, H, W] with H, W >= 1, got torch.float32 [2, 17, 56, 56]",
    ),
    PythonCase(
        "a dict of feature maps",
        'tmask_kernels.multiscale_roi_align({"0": torch.zeros(1, 3, 8, 8)}, [torch.zeros(2, 4)], 7, [0.25])',
        "multiscale_roi_align: features: expected a list of tensors [N, C, H, W], one a spatial scale (1), such as list(features.values()), got dict",
    ),
    PythonCase(
        "size that is a float",
        "tmask_kernels.roi_align(torch.zeros(1, 3, 8, 8), [torch.zeros(2, 4)], 7.0)",
        "roi_align: output_size: expected a whole number or (height, width), whole numbers of at least 1, got 7.0",
    ),
    PythonCase(
        "size of one number in a tuple",
        "tmask_kernels.roi_pool(torch.zeros(1, 3, 8, 8), [torch.zeros(2, 4)], (7,))",
        "roi_pool: output_size: expected a whole number or (height, width), whole numbers of at least 1, got (7,)",
    ),
    PythonCase(
        "array for a tensor",
        "tmask_kernels.nms(torch.zeros(3, 4).numpy(), torch.zeros(3), 0.5)",
        "nms: boxes: expected a tensor, float [K, 4], got numpy.ndarray",
    ),
]
