"""Bad inputs, each with the message that tells of it. test_bad_input.py runs them; docs/bad-input.md shows them.

A case runs in a folder of its own: a sound data set of three images in ``data`` (``images`` and ``annotations.json``),
a checkpoint trained on it, ``run/checkpoint.pt``, and whatever its `spoil` does there.
"""

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


@dataclass(frozen=True)
class Accepted:
    """`words` succeed; `warning` is the one that is shown, None for none."""

    what: str
    words: str
    done: str
    spoil: Spoil | None = None
    warning: str | None = None


@dataclass(frozen=True)
class PythonCase:
    """`code` is evaluated with the names that test_bad_input.py has for it; its ValueError has this `message`."""

    what: str
    code: str
    message: str


def spoilt(words: str, message: str, rows: dict[str, tuple[str, Spoil]]) -> list[Case]:
    """Cases of one command: what is wrong, how the message goes on behind `message`, and the spoil."""
    return [Case(what, words, message + end, spoil) for what, (end, spoil) in rows.items()]


def refused(rows: dict[tuple[str, str], str], code: int = 2) -> list[Case]:
    """Cases of commands alone: what is wrong and the words, to the message."""
    return [Case(*case, message, code=code) for case, message in rows.items()]


def expects(rows: dict[tuple[str, str], str]) -> list[Case]:
    """Cases of an option's value: what is wrong and the words, to what the last option expects and has got."""
    return refused({case: f"--{case[1].split('--')[-1].split()[0]}: expected {end}" for case, end in rows.items()})


def from_config(rows: dict[tuple[str, str], str]) -> list[Case]:
    """Cases of config files: what is wrong, the file's text, and the message."""
    words = "train --config c.yaml"
    return [Case(what, words, message, file("c.yaml", text), 2) for (what, text), message in rows.items()]


def content(change: Callable[[dict[str, Any]], object], to: Path | str = FILE) -> Spoil:
    """Change the annotation file, in place or `to` a copy."""

    def spoil() -> None:
        parsed = json.loads(FILE.read_text())
        change(parsed)
        Path(to).write_text(json.dumps(parsed))

    return spoil


def annotation(**fields: Any) -> Spoil:
    """Other fields for the first annotation."""
    return content(lambda c: c["annotations"][0].update(fields))


def image(**fields: Any) -> Spoil:
    """Other fields for the first image."""
    return content(lambda c: c["images"][0].update(fields))


def each(**fields: Any) -> Spoil:
    """Other fields for every annotation."""
    return content(lambda c: [item.update(fields) for item in c["annotations"]])


def cleared(*lists: str) -> Spoil:
    """Empty lists of the annotation file."""
    return content(lambda c: c.update({name: [] for name in lists}))


def first_only(number: int) -> Spoil:
    """The first annotations alone."""
    return content(lambda c: c.update(annotations=c["annotations"][:number]))


def renamed(change: Callable[[str], str]) -> Spoil:
    """Other image names in the annotation file."""
    return content(lambda c: [item.update(file_name=change(item["file_name"])) for item in c["images"]])


def keypoints(values: list[float]) -> Spoil:
    """Name two keypoints, with these values in the first annotation."""
    return both(content(lambda c: c["categories"][0].update(keypoints=["head", "tail"])), annotation(keypoints=values))


def file(path: Path | str, data: bytes | str) -> Spoil:
    """Write a file, in place of a link too."""

    def spoil() -> None:
        Path(path).unlink(missing_ok=True)
        Path(path).write_bytes(data.encode() if isinstance(data, str) else data)

    return spoil


def first_image(pixels: Any, mode: str | None = None) -> Spoil:
    """Put another picture in place of the first, and its size into the file."""
    picture = Image.fromarray(np.asarray(pixels))
    picture = picture.convert(mode) if mode else picture
    return both(lambda: picture.save(FIRST), image(width=picture.width, height=picture.height))


def saved(pixels: Any, mode: str | None = None, **how: Any) -> Spoil:
    """Write the first image as Pillow does, in the format of its name unless `how` names another."""
    return lambda: Image.fromarray(pixels, mode).save(FIRST, **how)


def first_tiff(*args: Any, **kwargs: Any) -> Spoil:
    """The first image is a TIFF of these pixels."""
    return file(FIRST, tiff(*args, **kwargs))


def turned(orientation: int, height: int = 32, width: int = 32, **more: Any) -> Spoil:
    """The first image is black and has that EXIF orientation."""
    return file(FIRST, with_exif(zeros(height, width, 3), "png", orientation, **more))


def torch_file(path: str, content: object) -> Spoil:
    return lambda: torch.save(content() if callable(content) else content, path)


def both(*spoils: Spoil) -> Spoil:
    return lambda: [spoil() for spoil in spoils]


def truncated(path: Path) -> Spoil:
    return lambda: file(path, path.read_bytes()[: path.stat().st_size // 2])()


def empty(*numbers: int) -> Spoil:
    """Image files of zero bytes."""
    return both(*[file(IMAGES / f"00000{i}.png", b"") for i in numbers])


def empty_folder() -> None:
    Path("empty").mkdir()


def zeros(*shape: int, dtype: Any = np.uint8) -> Any:
    return np.zeros(shape, dtype)


def truncated_jpeg() -> None:
    jpeg = FIRST.with_suffix(".jpg")
    Image.open(FIRST).save(jpeg)
    truncated(jpeg)()
    image(file_name=jpeg.name)()


def tiny_image(width: int, height: int) -> Spoil:
    """The first image and its first annotation are all of `width` x `height` pixels."""
    box: dict[str, Any] = {"id": 99, "image_id": 1, "category_id": 1, "bbox": [0, 0, width, height]}
    box["segmentation"] = [[0, 0, width, 0, width, height, 0, height]]

    def change(c: Any) -> None:
        c["annotations"] = [item for item in c["annotations"] if item["image_id"] != 1] + [box]

    return both(first_image(np.full((height, width, 3), 200, np.uint8)), content(change))


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("open('code-ran', 'w')",)


def own_weights() -> dict[str, Any]:
    weights: dict[str, Any] = load_checkpoint(CHECKPOINT)["model"]
    return weights


def lightning() -> dict[str, Any]:
    weights = {f"model.module.{name}": tensor for name, tensor in own_weights().items()}
    return {"state_dict": weights, "args": argparse.Namespace(lr=0.02, out=Path("a"))}


def two_of_a_name() -> None:
    for folder in ("a", "b"):
        (IMAGES / folder / "sub").mkdir(parents=True)
        shutil.copy(FIRST, IMAGES / folder / "sub" / "1.png")
    image(file_name="sub/1.png")()


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


def by_rows(c: Any) -> None:
    """Run lengths along the rows."""
    for item in c["annotations"]:
        x, y, w, h = map(int, item["bbox"])
        counts = [32 * y + x, *[w, 32 - w] * (h - 1), w, 32 * (32 - y - h) + 32 - x - w]
        item["segmentation"] = {"size": [32, 32], "counts": counts}


def corners(item: dict[str, Any]) -> list[list[float]]:
    x, y, w, h = item["bbox"]
    return [[x, y], [x + w, y], [x + w, y + h], [x, y + h]]


def as_corners(c: Any) -> None:
    for item in c["annotations"]:
        item["segmentation"] = corners(item)


def nested_corners(c: Any) -> None:
    for item in c["annotations"]:
        item["segmentation"] = [[corners(item)]]


def large_ids(c: Any) -> None:
    """Image and category ids that int64 does not hold, and negative annotation ids."""
    for item in [*c["images"], *c["categories"]]:
        item["id"] += 2**64
    for k, item in enumerate(c["annotations"]):
        item |= {"id": -k, "image_id": item["image_id"] + 2**64, "category_id": item["category_id"] + 2**64}


def ids_as_texts(c: Any) -> None:
    for item in c["annotations"]:
        item.update(image_id=str(item["image_id"]), category_id="3")


def ids_with_holes(c: Any) -> None:
    c["categories"][4].update(id=900)
    for item in c["annotations"]:
        item["category_id"] = 900 if item["category_id"] == 5 else item["category_id"]


def other_ids(c: Any) -> None:
    """The same classes by other ids, one of them left out."""
    c["categories"] = [{"id": 9 - item["id"], "name": item["name"]} for item in c["categories"][1:]]
    for item in c["annotations"]:
        item["category_id"] = 9 - item["category_id"]


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


ZERO = torch.zeros(1)
VALIDATED = f"train --data.val_images {IMAGES} --data.val_annotations"
KEYPOINT_TRAINING = "train --model.keypoints.names [head,tail]"
HALF = "data/images/000000.png: cannot be read as an image: image file is truncated"
UNKNOWN = "cannot be read as an image: empty, or of no known format"
STRETCH = (
    "convert it (magick IN -auto-level -depth 8 OUT.png stretches the darkest value to 0 and the brightest to 255)"
)
EIGHT_BITS = "expected an image of 8 bits a channel, got"
ONE_IMAGE = "expected one image, got a file of 2; split it (magick IN OUT-%d.png)"
NONE_TO_TRAIN_ON = "annotations: expected at least one to train on, got"
ALL_CROWDS = f"{NONE_TO_TRAIN_ON} 7, all crowds or without area inside their image"
OF_TRAINING = "categories: expected those of training,"
OTHER_CATEGORIES = f"{OF_TRAINING} one of disc, ring, square, star, triangle, got 'plate' (id 3)"
OF_TMASK = "expected a file written by tmask, got"
OF_MASK_RCNN = "expected a checkpoint or weights of a Mask R-CNN, got"
A_TEXT = 'a text that begins \'{"images": [{"id": 1, "file_name": "0000\''
PLATE = content(lambda c: c["categories"][2].update(name="plate"), "val.json")
TWO_BAD = both(truncated(FIRST), empty(2))
GIF = {"format": "GIF", "save_all": True, "append_images": [Image.fromarray(np.full((32, 32), 255, np.uint8))]}

FILE_MESSAGES = {
    ("images folder does not exist", "train --data.train_images nowhere"): (
        "--data.train_images: no such file or folder: nowhere"
    ),
    ("images without annotations", f"train --data.val_images {IMAGES}"): (
        "--data.val_annotations: expected a path, as val_images has one, got None"
    ),
    ("annotation file is a folder", "train --data.train_annotations data"): (
        "--data.train_annotations: expected a file, got a folder: data"
    ),
    ("no image to predict on", "predict --images run"): (
        "images: expected an image, a folder of images or a glob, found no image at 'run'"
    ),
}
FILES = [
    *spoilt(
        "train",
        f"{FILE}: 1 of 3 images do not exist, first data/images/",
        {
            "missing image file": ("000000.png (image id 1)", FIRST.unlink),
            "image name of which two files have the end": (
                "sub/1.png (image id 1); there is a/sub/1.png and b/sub/1.png",
                two_of_a_name,
            ),
            "two images of one file": ("000001.jpg (image id 1); there is 000001.png", image(file_name="000001.jpg")),
        },
    ),
    *[
        Case(
            what,
            f"train {options}--data.train_images empty",
            f"images_folder: none of the 3 images of {FILE} is in empty, first 000000.png (image id 1)",
            empty_folder,
        )
        for what, options in (
            ("wrong images folder: all images missing", ""),
            ("wrong images folder, bad images to be left out", "--data.skip_bad true "),
        )
    ],
    *refused(FILE_MESSAGES),
    Case(
        *("images folder is a file", f"eval --images {FILE}", f"--images: expected a folder, got a file: {FILE}"),
        code=2,
    ),
    *spoilt(
        "train",
        "data/images/000000.",
        {
            "truncated JPEG": ("jpg: cannot be read as an image: Truncated File Read", truncated_jpeg),
        },
    ),
    Case("truncated PNG, read by a worker", "train --data.num_workers 2", HALF, truncated(FIRST)),
    Case("truncated PNG, found before the first step", "train --data.check full", HALF, truncated(FIRST)),
    Case("truncated PNG, found by workers", "eval --check full --num_workers 2", HALF, truncated(FIRST)),
    Case(
        *("several bad images", "train --data.check full"),
        f"2 of 3 images are bad: {HALF}; data/images/000002.png: {UNKNOWN}",
        TWO_BAD,
    ),
    Case(
        *("several bad images, found by their headers", "eval"),
        f"2 of 3 images are bad: {FIRST}: {UNKNOWN}; data/images/000002.png: {UNKNOWN}",
        empty(0, 2),
    ),
    Case(
        *("bad images alone, to be left out", "train --data.skip_bad true"),
        f"3 of 3 images are bad: {'; '.join(f'data/images/00000{i}.png: {UNKNOWN}' for i in range(3))}",
        empty(0, 1, 2),
    ),
    Case(
        *("bad images to be left out, with all annotations", "train --data.skip_bad true"),
        f"{FILE}: {NONE_TO_TRAIN_ON} none",
        both(first_only(1), truncated(FIRST)),
    ),
    Case("image file of zero bytes", "eval", f"{FIRST}: {UNKNOWN}", empty(0)),
    Case("image file of zero bytes, read by a worker", "eval --num_workers 2", f"{FIRST}: {UNKNOWN}", empty(0)),
    *spoilt(
        "predict",
        f"1 of 3 images left out (the 2 others are done): {FIRST}: ",
        {
            "image file of zero bytes": (UNKNOWN, empty(0)),
            "16-bit PPM": (
                f"{EIGHT_BITS} values up to 65535; {STRETCH}",
                file(FIRST, b"P6 32 32 65535\n" + bytes(32 * 32 * 6)),
            ),
        },
    ),
    *spoilt(
        "eval",
        f"{FIRST}: expected unsigned values, ",
        {
            "signed values": ("got signed ones; convert it", first_tiff(zeros(32, 32, 1, dtype=np.int8))),
        },
    ),
    *spoilt(
        "train",
        f"{FIRST}: ",
        {
            "16-bit image": (f"{EIGHT_BITS} mode 'I;16B'; {STRETCH}", first_image(zeros(32, 32, dtype=np.uint16))),
            "16-bit colours, a plane each": (
                f"{EIGHT_BITS} 16; {STRETCH}",
                first_tiff(zeros(32, 32, 3, dtype=np.uint16), planar=True),
            ),
            "band that is neither colour nor alpha": (
                (
                    "expected 3 bands, or one more of alpha, got 4; "
                    "choose those of the colours (gdal_translate -b 1 -b 2 -b 3 IN OUT)"
                ),
                first_tiff(zeros(32, 32, 4), extra=[0]),
            ),
            "bands of no colours": (
                "cannot be read as an image: a damaged TIFF, or one that is not 8-bit grey, RGB or CMYK",
                first_tiff(zeros(32, 32, 9), extra=[0] * 6),
            ),
            "Lab colours": (
                "expected grey, RGB, CMYK or a palette, got mode 'LAB'; convert it",
                first_tiff(zeros(32, 32, 3), photometric=8),
            ),
            "several pages": (ONE_IMAGE, first_tiff(pages=[{"pixels": zeros(32, 32, 3)}] * 2)),
            "animation": (ONE_IMAGE, saved(zeros(32, 32), **GIF)),
            "photograph that is annotated as its EXIF orientation turns it": (
                (
                    f"expected 32x16 pixels by {FILE}, got 16x32, width and height swapped; "
                    "--data.exif true (eval: --exif true) turns it by its EXIF orientation"
                ),
                both(turned(6, 32, 16), each(segmentation=None), image(height=16)),
            ),
            "width and height swapped": (
                f"expected 32x16 pixels by {FILE}, got 16x32, width and height swapped",
                both(saved(zeros(32, 16, 3)), each(segmentation=None), image(height=16)),
            ),
            "image of another size than the file says": (
                f"expected 33x32 pixels by {FILE}, got 32x32",
                both(each(segmentation=None), image(width=33)),
            ),
        },
    ),
    Case(
        *("photograph that is annotated as stored, read upright", "eval --exif true"),
        f"{FIRST}: expected 16x32 pixels by {FILE}, got 32x16, width and height swapped; "
        "--data.exif false (eval: --exif false) reads it without its EXIF orientation",
        both(turned(6, 32, 16), each(segmentation=None), image(width=16)),
    ),
    Case("no COCO file", "eval", f"{FILE}: expected a COCO file, an object with a list 'images'", file(FILE, "[]")),
    *spoilt(
        "train",
        f"{FILE}: ",
        {
            "broken JSON": ("broken JSON at line 2, column 3: Expecting value", file(FILE, '{"images": [\n1,, 2]}')),
            "empty annotation file": ("broken JSON at line 1, column 1: Expecting value", file(FILE, b"")),
            "no images in the file": ("images: expected at least one, got none", cleared("images", "annotations")),
            "no categories": ("categories: expected at least one, got none", cleared("categories")),
            "no annotations to train on": (f"{NONE_TO_TRAIN_ON} none", cleared("annotations")),
            "nothing but crowds to train on": (ALL_CROWDS, each(iscrowd=1)),
            "nothing but boxes outside their image to train on": (ALL_CROWDS, each(bbox=[40, 40, 9, 9])),
            "category id that is null": (
                "annotations[0]: expected a field 'category_id', got none",
                annotation(category_id=None),
            ),
            "the same id twice": ("images[1]: id 1 occurs twice", content(lambda c: c["images"][1].update(id=1))),
            "id that is a text": ("images[0]: id: expected a whole number, got 'one'", image(id="one")),
            "image without a size": (
                "images[0]: expected a field 'width', got none",
                content(lambda c: c["images"][0].pop("width")),
            ),
            "size that is no number": ("images[0]: expected a size in whole pixels, got 32 x '32'", image(height="32")),
            "masks that are all empty": (
                "segmentation: expected masks that cover pixels, got 7 that are all empty, first annotation id 1",
                each(segmentation=[[1, 2, 9, 8]]),
            ),
        },
    ),
    *[
        Case(what, words, f"{FILE}: annotation id 1: {end}", spoil)
        for what, words, end, spoil in (
            (
                *("keypoints of the wrong number", KEYPOINT_TRAINING),
                "keypoints: expected 6 numbers, x, y and visibility of each of 2, got 3",
                keypoints([1, 2, 2]),
            ),
            (
                *("keypoint that is half visible", KEYPOINT_TRAINING),
                "keypoints: expected a visibility of 0, 1 or 2, got 0.5",
                keypoints([1, 2, 0.5, 0, 0, 0]),
            ),
        )
    ],
    *[
        Case(what, "train", f"{FILE}: annotation id 1: {end}", annotation(**fields))
        for what, end, fields in (
            ("annotation of an unknown image", "image_id 99 is not in the file", {"image_id": 99}),
            ("annotation of an unknown category", "category_id 99 is not in the file", {"category_id": 99}),
            ("image id of no whole number", "image_id: expected a whole number, got 'one'", {"image_id": "one"}),
            (
                *("box of three numbers", "bbox: expected four numbers [x, y, width, height], got [1, 2, 3]"),
                {"bbox": [1, 2, 3]},
            ),
            (
                *("neither box nor mask", "expected a bbox or a segmentation, got neither"),
                {"bbox": None, "segmentation": None},
            ),
            ("NaN in a box", "bbox: expected finite numbers, got nan", {"bbox": [1, 2, 3, float("nan")]}),
            ("infinite box", "bbox: expected finite numbers, got inf", {"bbox": [1, 2, float("inf"), 3]}),
            ("text in a box", "bbox: expected finite numbers, got '4'", {"bbox": [1, 2, 3, "4"]}),
            ("crowd flag that is no number", "iscrowd: expected 0 or 1, got 'no'", {"iscrowd": "no"}),
        )
    ],
    *[
        Case(what, "train", f"{FILE}: annotation id 1: segmentation: expected {end}", annotation(segmentation=mask))
        for what, end, mask in (
            (
                *("polygon with an odd number of values", "polygons of x, y pairs, got an odd number of values, 7"),
                [[1, 2, 9, 2, 9, 8, 1]],
            ),
            ("NaN in a polygon", "finite numbers, got nan", [[1, 2, 9, 2, 9, float("nan")]]),
            ("text in a polygon", "finite numbers, got '8'", [[1, 2, 9, 2, 9, "8"]]),
            (
                *("polygon that is no list of lists", "polygons [[x, y, ...], ...], got a list of 1"),
                [1, 2, 9, 2, 9, 8],
            ),
            (
                *("run lengths of another size", "run lengths of size (32, 32), got (9, 9)"),
                {"size": [9, 9], "counts": [81]},
            ),
            (
                *("run lengths that end early", "runs of 1024 pixels in all, got 7"),
                {"size": [32, 32], "counts": "0123"},
            ),
            (
                *("run lengths that are no text", "runs of 1024 pixels in all, got damaged ones"),
                {"size": [32, 32], "counts": "\u00e9"},
            ),
        )
    ],
    Case("validation set of other categories", f"{VALIDATED} val.json", f"val.json: {OTHER_CATEGORIES}", PLATE),
    Case(
        *("validation set of the same categories, two of one name", f"{VALIDATED} val.json"),
        "categories: expected those of training, where label 1 is (1, 'disc'), got (1, 'square')",
        content(lambda c: c["categories"][0].update(name="square"), "val.json"),
    ),
]

DID_YOU_MEAN = "unknown option --{}; did you mean --{}?".format
NO_FOLDER = "--{} {}: expected a folder, but {} is a file".format

SETTING_VALUES = {
    ("unknown preset", "train --preset tinny"): "'tiny'?, got 'tinny'",
    ("unknown convention", "train --model.convention torch"): "'torchvision'?, got 'torch'",
    ("wrong field of a convention", "train --model.convention.paste torch"): "'torchvision'?, got torch",
    ("unknown loss", "train --model.losses.box iou"): "'giou'?, got iou",
    ("unknown neck", "train --model.neck c3"): "one of c4, c5, fpn, got c3",
    ("unknown check of the images", "train --data.check fully"): "'full'? or none, got fully",
    ("wrong type", "train --train.steps many"): "a whole number, got many",
    ("too deep a fusion of masks", "train --model.mask_fusion_layers 3"): "0, 1 or 2, got 3",
    ("negative learning rate", "train --train.lr -1"): "at least 0, got -1.0",
    ("batch of no images", "train --train.batch_size 0"): "at least 1, got 0",
    ("negative size", "train --model.min_size -3"): "in 1..max_size, got -3",
    ("shorter long side than short side", "train --model.min_size 800"): "in 1..max_size, got 800",
    ("standard deviation of 0", "train --model.image_std [0,1,1]"): "numbers above 0, got (0.0, 1.0, 1.0)",
    ("no anchor sizes", "train --model.anchor_sizes []"): "5 tuples, one a level P2-P6, got ()",
    ("background alone", "train --model.num_classes 1"): "at least 2 (background and one class), got 1",
    ("threshold above 1", "train --model.box_nms_threshold 1.5"): "in 0..1, got 1.5",
    ("thresholds the wrong way round", "train --model.rpn_bg_iou 0.9"): "at most rpn_fg_iou (0.7), got 0.9",
    ("sample too small for a positive", "train --model.box_batch_size 3"): (
        "enough for a positive at box_positive_fraction (0.25), got 3"
    ),
    ("levels without anchor sizes", "train --model.anchor_sizes [[],[],[],[],[]]"): (
        "numbers above 0, at least one a level, got ((), (), (), (), ())"
    ),
    ("levels of different numbers of anchors", "train --model.anchor_sizes [[8],[8],[8],[8],[8,9]]"): (
        "as many sizes in each level, got ((8.0,), (8.0,), (8.0,), (8.0,), (8.0, 9.0))"
    ),
    ("up-down flips of keypoints", "train --model.keypoints.names [left,right] --data.vflip 0.5"): (
        "0 with --model.keypoints, got 0.5"
    ),
    ("fusion of masks that are left out", "train --model.masks false --model.mask_fusion_layers 1"): (
        "0 with masks false, got 1"
    ),
    ("classes with masks, and a model without masks", "train --model.masks false --data.mask_classes disc"): (
        "null with --model.masks false, got 'disc'"
    ),
    ("bad images left out without a look", "train --data.skip_bad true --data.check off"): (
        "'full' or 'headers' with skip_bad, got 'off'"
    ),
    ("negative number of workers", "eval --num_workers -1"): "at least 0, got -1",
    ("bad images left out without a look", "eval --skip_bad true --check off"): (
        "'full' or 'headers' with skip_bad, got 'off'"
    ),
}
SETTING_MESSAGES = {
    ("unknown key on the command line", "train --model.min_sise 3"): DID_YOU_MEAN("model.min_sise", "model.min_size"),
    ("unknown key, by an abbreviation", "train --model.convention.past torchvision"): (
        DID_YOU_MEAN("model.convention.past", "model.convention.paste")
    ),
    ("unknown key of settings that may be none", "train --model.mask_transfer.layer 2"): (
        DID_YOU_MEAN("model.mask_transfer.layer", "model.mask_transfer.layers")
    ),
    ("config file that does not exist", "train --config nowhere.yaml"): (
        "--config nowhere.yaml: No such file or directory"
    ),
    ("impossible field of a convention", "train --model.convention.roi_sampling_ratio -1"): (
        "--model.convention: roi_sampling_ratio: expected at least 0, got -1"
    ),
    ("impossible prior of a focal loss", "train --model.losses.rpn_objectness focal --model.losses.focal_prior 1"): (
        "--model.losses: focal_prior: expected in (0, 1), got 1.0"
    ),
    ("unknown input of the weight transfer", "train --model.mask_transfer.inputs boxes"): (
        "--model.mask_transfer: inputs: expected 'box'?, got 'boxes'"
    ),
    ("masks alone, and no detector to learn them on", "train --train.only masks"): (
        "--train.only masks: expected --init, the checkpoint of a detector"
    ),
    ("masks alone, of a model without masks", f"train --model.masks false --train.only masks --init {CHECKPOINT}"): (
        "--train.only: expected null with --model.masks false, got 'masks'"
    ),
    ("anchor sizes of a pyramid for one level", "train --model.neck c5"): (
        "--model.anchor_sizes: expected 1 tuple, as the neck c5 is one level, "
        "got ((12.0,), (20.0,), (32.0,), (48.0,), (72.0,))"
    ),
    ("batch norm in the RoI heads", "train --model.neck c4 --model.anchor_sizes [[16,32,64]]"): (
        "--model.norm: expected 'frozen_bn' or 'gn', as the neck c4 has conv5 on RoIs, "
        "of which batch statistics tell nothing, got 'bn'"
    ),
    ("channels that 32 groups do not divide", "train --model.norm gn"): (
        "--model.fpn_channels: expected a multiple of the 32 groups of gn, got 8"
    ),
    ("device that does not exist", "train --device gpu"): "device: expected auto, cpu, cuda or cuda:N, got 'gpu'",
    ("--out inside a file", f"train --out {FILE}/out"): NO_FOLDER("out", f"{FILE}/out", FILE),
    ("--out is a file", f"train --out {FILE}"): NO_FOLDER("out", FILE, FILE),
    ("--out is a file", f"eval --out {FILE}"): NO_FOLDER("out", FILE, FILE),
    ("device this machine does not have", "eval --device cuda:77"): (
        "device: expected one of this machine's, got 'cuda:77' (0 GPUs)"
    ),
    ("--out is a file", f"predict --out {FILE}"): NO_FOLDER("out", FILE, FILE),
}
SETTING_FAILURES = {
    ("unknown class with masks", "train --data.mask_classes disk"): (
        "mask_classes: unknown category 'disk': expected 'disc'?"
    ),
    ("more random classes with masks than there are", "train --data.mask_classes random:9:0"): (
        "mask_classes: expected a count in 1..5, got 'random:9:0'"
    ),
    ("VOC's classes in other data", "train --data.mask_classes voc"): (
        "mask_classes: expected categories of COCO for 'voc', some but not all of them VOC's, got 0 of 5 that are VOC's"
    ),
    ("one image of 32 x 32 pixels and batch norm", "train --train.batch_size 1"): (
        "norm bn needs more than one value a channel: batch_size 1 of 32 x 32 pixels leaves a map of 1 x 1; "
        "larger --train.batch_size or --model.min_size, or --model.norm frozen_bn (or gn)"
    ),
    **{
        (f"{what} classes than the data has", f"train --model.num_classes {number}"): (
            f"num_classes: expected 6 (the 5 categories and background), got {number}"
        )
        for what, number in (("more", 9), ("fewer", 5))
    },
    ("backbone weights that do not exist", "train --model.backbone_weights nowhere.pth"): (
        "backbone_weights: expected a state-dict file, got 'nowhere.pth', which does not exist"
    ),
    ("backbone weights that are no weights", f"train --model.backbone_weights {FILE}"): (
        f"backbone_weights: expected weights in {FILE}, got {A_TEXT}"
    ),
}
SETTINGS = [
    *expects(SETTING_VALUES),
    *refused(SETTING_MESSAGES),
    *refused(SETTING_FAILURES, code=1),
    *from_config(
        {
            ("unknown key in the config file", "model: {min_sise: 3}"): (
                DID_YOU_MEAN("model.min_sise", "model.min_size")
            ),
            ("unknown group in the config file", "modle: {min_size: 3}"): (
                DID_YOU_MEAN("modle.min_size", "model.min_size")
            ),
            ("group that holds no settings", "train: 3"): "--config c.yaml: train: expected settings by name, got 3",
            ("config file that is no YAML", "model: ["): (
                "--config c.yaml: not YAML: while parsing a flow node expected the node content, "
                "but found '<stream end>' in \"<unicode string>\", line 1, column 9: model: [ ^"
            ),
            ("key of the config file that is no text", "2020-01-01: 3"): "unknown option --2020-01-01",
            ("too deep a weight transfer", "model: {mask_transfer: {layers: 4}}"): (
                "--model.mask_transfer: layers: expected in 1..3, got 4"
            ),
            ("wrong type in the config file", "train: {momentum: fast}"): (
                "--train.momentum: expected a finite number, got fast"
            ),
            ("NaN as the learning rate", "train: {lr: .nan}"): "--train.lr: expected a finite number, got NaN",
            ("date as the learning rate", "train: {lr: 2020-01-01}"): (
                "--train.lr: expected a finite number, got 2020-01-01"
            ),
            ("flag that is neither true nor false", "overwrite: nope"): (
                "--overwrite: expected true or false, got 'nope'"
            ),
        },
    ),
]

CHECKPOINT_MESSAGES = {
    ("checkpoint that does not exist", "eval --checkpoint nowhere.pt"): (
        "--checkpoint: no such file or folder: nowhere.pt"
    ),
    ("checkpoint that is a folder", "predict --checkpoint run"): "--checkpoint: expected a file, got a folder: run",
}
CHECKPOINT_FAILURES = {
    ("foreign file to go on from", f"train --resume {FILE}"): f"checkpoint {FILE}: {OF_TMASK} {A_TEXT}",
    ("file to begin with that holds no weights", f"train --init {FILE}"): f"init {FILE}: {OF_MASK_RCNN} {A_TEXT}",
    ("checkpoint of another config", f"train --resume {CHECKPOINT} --model.fpn_channels 16"): (
        f"checkpoint {CHECKPOINT}: cannot resume, the model differs: fpn_channels: 8 -> 16"
    ),
    ("checkpoint with masks, to go on without", f"train --resume {CHECKPOINT} --model.masks false"): (
        f"checkpoint {CHECKPOINT}: cannot resume, the model differs: masks: True -> False"
    ),
    ("checkpoint of another batch size", f"train --resume {CHECKPOINT} --train.batch_size 1"): (
        f"checkpoint {CHECKPOINT}: cannot resume, the run differs: batch_size: 2 -> 1"
    ),
    ("weights to begin with of another model", f"train --init {CHECKPOINT} --model.fpn_channels 16"): (
        f"init {CHECKPOINT}: the weights are of another model: fpn_channels: 8 -> 16"
    ),
    (
        "detector to be frozen of which not all is there",
        f"train --init {CHECKPOINT} --train.only masks --model.losses.classifier sigmoid_focal",
    ): (
        f"init {CHECKPOINT}: expected all weights of the detector, as only the masks learn, "
        "got none that fit roi_heads.box_head.classifier.weight and 1 more"
    ),
    ("foreign file", f"predict --checkpoint {FILE}"): f"checkpoint {FILE}: {OF_TMASK} {A_TEXT}",
}
CHECKPOINTS = [
    *refused(CHECKPOINT_MESSAGES),
    *spoilt(
        "eval",
        f"checkpoint {CHECKPOINT}: {OF_TMASK} ",
        {
            "truncated checkpoint": ("a truncated or damaged file", truncated(CHECKPOINT)),
            "pickle with code in it: does not run": (
                (
                    "a pickle of builtins.exec, which is not read, as it could run code; "
                    "save the weights alone: torch.save(model.state_dict(), 'weights.pth')"
                ),
                file(CHECKPOINT, pickle.dumps(Evil())),
            ),
        },
    ),
    *refused(CHECKPOINT_FAILURES, code=1),
    *[
        Case(what, f"train --init {name}", f"init {name}: {OF_MASK_RCNN} {end}", spoil)
        for what, name, end, spoil in (
            (
                *("a whole model, pickled", "model.pth", f"a pickle of torch.nn.modules.linear.Linear, {NOT_READ}"),
                torch_file("model.pth", lambda: torch.nn.Linear(1, 1)),
            ),
            (
                *("weights of detectron2", "d2.pkl", "weights of detectron2, which are not read yet"),
                file("d2.pkl", pickle.dumps({"model": {"backbone.bottom_up.stem.conv1.weight": np.zeros(1)}})),
            ),
            (
                *("weights of mmdetection", "mm.pth", "weights of mmdetection, which are not read yet"),
                torch_file("mm.pth", {"meta": {}, "state_dict": {"rpn_head.rpn_conv.weight": ZERO}}),
            ),
            (
                *("weights of Keras", "mask_rcnn_coco.h5", "an HDF5 file, such as Keras's .h5, which is not read"),
                file("mask_rcnn_coco.h5", b"\x89HDF\r\n\x1a\n" + bytes(99)),
            ),
            (
                *("weights of a ResNet alone", "resnet18.pth"),
                "weights of a ResNet without a detector: give them as model.backbone_weights",
                torch_file("resnet18.pth", {"layer1.0.conv1.weight": ZERO}),
            ),
        )
    ],
    Case(
        *("weights of several models", "train --init two.pth"),
        "init two.pth: expected the weights of one model, got 2, under 'student.', 'teacher.'; save one alone",
        torch_file("two.pth", {f"{own}.rpn.head.conv.weight": ZERO for own in ("student", "teacher")}),
    ),
    Case(
        *("Git LFS pointer", "train --model.backbone_weights resnet18.pth"),
        "backbone_weights: expected weights in resnet18.pth, "
        "got a Git LFS pointer in place of the file: run git lfs pull",
        file("resnet18.pth", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    ),
    *[
        Case(what, f"{command} --checkpoint {name}", f"checkpoint {name}: {OF_TMASK} {end}", spoil)
        for what, command, name, end, spoil in (
            (
                *("a whole model, pickled", "eval", "model.pth"),
                f"a pickle of torch.nn.modules.linear.Linear, {NOT_READ}",
                torch_file("model.pth", lambda: torch.nn.Linear(1, 1)),
            ),
            (
                *("page of an error, saved as weights", "eval", "a.pt"),
                "a page of HTML or XML, which servers give in place of a file: download it again",
                file("a.pt", "<!DOCTYPE html>\n<html>404</html>"),
            ),
            (
                *("weights of tmask without settings", "predict", "own.pth"),
                "the weights of tmask's model alone: --init begins a run with them, model.load_state_dict takes them",
                torch_file("own.pth", own_weights),
            ),
            (
                *("torchvision's weights", "eval", "tv.pth"),
                "a torchvision state dict: use tmask.load_torchvision, or --init to begin a run with it",
                torch_file("tv.pth", {"backbone.body.conv1.weight": ZERO, "rpn.head.conv.0.0.bias": ZERO}),
            ),
        )
    ],
    Case(
        *("checkpoint with another object in it", "predict --checkpoint args.pt"),
        "checkpoint args.pt: holds argparse.Namespace, which is none of tmask's and could run code",
        torch_file("args.pt", {"format": "tmask checkpoint", "args": argparse.Namespace(lr=0.02)}),
    ),
    Case("checkpoint of other categories", "eval --annotations val.json", f"val.json: {OTHER_CATEGORIES}", PLATE),
]

BENCHMARK_VALUES = {
    ("budget that is no number", "bench --budget soon"): "a finite number or none, got soon",
    ("no time at all", "bench --budget 0"): "more than 0 seconds, got 0",
}
BENCHMARK_MESSAGES = {
    ("unknown op, nearly right", "bench roi_alin"): "unknown op 'roi_alin': expected 'roi_align'?",
    ("unknown option", "bench --jason a.json"): DID_YOU_MEAN("jason", "json"),
    ("device that is not there", "bench --device cuda:9"): (
        "device: expected one of this machine's, got 'cuda:9' (0 GPUs)"
    ),
    ("result that would lie in a file", f"bench --json {FILE}/a.json"): NO_FOLDER("json", FILE, FILE),
    ("result that is a folder", "bench --json data"): "--json data: expected a file, got a folder",
}
BENCHMARKS = [
    *expects(BENCHMARK_VALUES),
    *refused(BENCHMARK_MESSAGES),
]

ABLATION_VALUES = {
    ("no seed", "ablate focal --seeds 0"): "at least 1, got 0",
    ("seeds that are no number", "ablate focal --seeds two"): "a whole number, got two",
}
ABLATION_MESSAGES = {
    ("unknown table, nearly right", "ablate focl"): "unknown table 'focl': expected 'focal'?",
    ("COCO that is not there", "ablate focal --coco nowhere"): "--coco: no such folder: nowhere",
    ("table that would lie in a file", f"ablate focal --out {FILE}"): NO_FOLDER("out", FILE, FILE),
}
ABLATIONS = [
    *expects(ABLATION_VALUES),
    *refused(ABLATION_MESSAGES),
]

GROUPS = {
    "Data": FILES,
    "Settings": SETTINGS,
    "Checkpoints": CHECKPOINTS,
    "Benchmarks": BENCHMARKS,
    "Ablations": ABLATIONS,
}

NO_AREA = f"{FILE}: left out 1 of 7 annotations, whose box has no area inside the image; first annotation id 1"
EMPTY_MASK = f"{FILE}: the mask of 1 of 7 annotations is empty and left out, their boxes count; first annotation id 1"
CONTRADICT = "annotations contradict each other (IoU of the box and the mask's box below 0.5{}); first annotation id 1"
CONTRADICTS = f"{FILE}: bbox and mask of {{}} of 7 {CONTRADICT}".format
HALF_LEFT_OUT = f"{FILE}: left out 1 of 3 images: {HALF}"
NOT_OPAQUE = f"the alpha of 1 of 3 images, first {FIRST}, is not opaque, and dropped: what it hides shows"
NOT_TURNED = (
    f"the EXIF orientation of 1 of 3 images, first {FIRST}, is not applied. Were the annotations drawn on upright "
    "images? true turns these upright, false keeps them as stored without this warning: "
    "--data.exif of train, --exif of eval and predict, apply_exif of CocoDataset"
)
RENAMED = f"{FILE}: 3 of 3 images are there under another name, first {{!r}}: 000000.png (image id 1)".format
MORE_OBJECTS = "images hold more than {0} objects, up to 4, but {0} detections an image count:".format
OVERVIEW = [{"pixels": zeros(32, 32, 3)}, {"pixels": zeros(16, 16, 3), "more": [(254, 4, [1])]}]
HIDDEN = first_image(zeros(32, 32, 4))
BATCH_OF_3 = "train --train.batch_size 3"

ACCEPTED = [
    Accepted("box with x2 <= x1", "train", "is left out", annotation(bbox=[9, 9, -4, 5]), NO_AREA),
    Accepted("box wholly outside its image", "train", "is left out", annotation(bbox=[50, 9, 4, 5]), NO_AREA),
    *[
        Accepted(what, "train", "the mask is left out, the box counts", annotation(segmentation=mask), EMPTY_MASK)
        for what, mask in (("empty polygon", [[]]), ("polygon of two points", [[1, 2, 9, 8]]))
    ],
    Accepted(
        *("one file for two images", "train", "both are taken"),
        content(lambda c: c["images"][1].update(file_name=c["images"][0]["file_name"])),
        f"{FILE}: 1 of 3 images have the file of another image, first 000000.png (image ids 1 and 2): "
        "the annotations of one are missing in the other",
    ),
    Accepted(
        *("boxes alone that reach beyond their images", "train --model.masks false", "are cut at the edge"),
        each(bbox=[20, 9, 40, 9], segmentation=None),
        f"{FILE}: 7 of 7 boxes without a mask reach beyond their images: "
        "expected x, y, width, height in pixels of the image; first annotation id 1",
    ),
    Accepted(
        *("no annotations to evaluate with", "eval --out out", "the table shows no figures, the results are written"),
        cleared("annotations"),
        f"{FILE}: no annotation to evaluate with: no average precision",
    ),
    Accepted(
        *("more objects than detections count", "eval --max_detections 2", "AP counts the best 2 of a class and image"),
        None,
        f"{FILE}: 1 of 3 {MORE_OBJECTS(2)} --max_detections",
    ),
    Accepted(
        "more objects than detections count",
        f"{VALIDATED} {FILE} --train.eval_max_detections 1 --model.max_detections 2",
        "is told before the first step",
        None,
        f"{FILE}: 2 of 3 {MORE_OBJECTS(1)} --train.eval_max_detections, --model.max_detections",
    ),
    Accepted(
        *("as many detections as may be", "predict --max_detections 1", "the best are kept"),
        None,
        "3 of 3 images give exactly 1 detections, the limit of an image: there may be more objects; --max_detections "
        "raises the limit",
    ),
    Accepted("ids beyond 2^63", f"{VALIDATED} {FILE}", "results have them", content(large_ids)),
    Accepted("ids beyond 2^63", "eval --out out --plots out", "results have them", content(large_ids)),
    Accepted("annotation without a mask", "train", "the box counts", annotation(segmentation=None)),
    Accepted(
        *("class without any mask", "train", "its boxes count"),
        content(lambda c: c["annotations"][1].pop("segmentation")),
        f"{FILE}: no instance of ring (id 5) has a mask; first annotation id 2",
    ),
    Accepted(
        *("boxes alone", "train", "the detector learns, its masks do not"),
        each(segmentation=[]),
        f"{FILE}: none of 7 annotations has a mask: boxes alone are learnt from and evaluated; "
        "a model trained with --model.masks false predicts no masks",
    ),
    Accepted("boxes alone", "train --model.masks false", "the detector learns", each(segmentation=[])),
    *[
        Accepted(what, "train --model.masks false", "no mask is used", spoil)
        for what, spoil in (
            ("damaged masks beside boxes", annotation(segmentation=[[1, 2, 9, 2, 9, 8, 1]])),
            ("masks that are all empty", each(segmentation=[[1, 2, 9, 8]])),
        )
    ],
    Accepted(
        *("weights with masks to begin with", f"train --model.masks false --init {CHECKPOINT}"),
        "those of masks are left out",
        None,
        f"init {CHECKPOINT}: left out, as the model has no such part: roi_heads.mask_head.convs.0.weight and 5 more",
    ),
    Accepted(
        *("box that its mask contradicts", "train", "both are taken as they are"),
        annotation(bbox=[1, 20, 9, 9]),
        CONTRADICTS(1, ""),
    ),
    Accepted(
        *("boxes as x1, y1, x2, y2", "train", "are taken for x, y, width, height"),
        content(xyxy),
        CONTRADICTS(7, "; as if bbox held x1, y1, x2, y2"),
    ),
    Accepted(
        *("run lengths along the rows", "train", "are taken to go down the columns"),
        content(by_rows),
        CONTRADICTS(7, "; as if run lengths went along the rows, and not down the columns"),
    ),
    Accepted(
        *("boxes and polygons in parts of the image's size", "train", "are taken for pixels"),
        content(in_parts),
        f"{FILE}: bbox of 7 of 7 annotations lies in 0..1: expected pixels, got parts of the image's size; "
        "first annotation id 1",
    ),
    Accepted(
        *("many crowds", "train", "are not learnt"),
        content(lambda c: [item.update(iscrowd=1) for item in c["annotations"][::2]]),
        f"{FILE}: 4 of 7 annotations are crowds (iscrowd 1), which are not learnt; if they are single objects, "
        "set --data.crowds (eval: --crowds) instances; first annotation id 1",
    ),
    Accepted(
        *("truncated PNG", "train --data.skip_bad true", "is left out, and listed in `skipped.txt` of the run"),
        truncated(FIRST),
        HALF_LEFT_OUT,
    ),
    Accepted(
        *("missing image", "train --data.skip_bad true --data.check headers"),
        "is left out, and listed in `skipped.txt` of the run",
        FIRST.unlink,
        f"{FILE}: left out 1 of 3 images: {FIRST}: no such file (image id 1)",
    ),
    Accepted(
        *("truncated PNG", "eval --skip_bad true --num_workers 2", "is left out of the figures, which say so"),
        truncated(FIRST),
        HALF_LEFT_OUT,
    ),
    Accepted("nothing but crowds", "train --data.crowds instances", "are learnt like all", each(iscrowd=1)),
    Accepted("nothing but crowds", "eval --crowds instances", "are evaluated like all", each(iscrowd=1)),
    Accepted("polygon as points", "train", "is that polygon", content(as_corners)),
    Accepted("polygons nested deeper", "train", "are those polygons", content(nested_corners)),
    Accepted(
        *("masks without boxes", "train", "the boxes are made from them"),
        each(bbox=None),
        f"{FILE}: the box of 7 of 7 annotations is missing and made from the mask; first annotation id 1",
    ),
    Accepted("fields that are null", "train", "are as if they were missing", each(iscrowd=None, area=None)),
    Accepted("ids of annotations as texts", "train", "are the numbers they name", content(ids_as_texts)),
    Accepted(
        *("keypoints of the wrong number", "train", "are left out, as nothing learns them"),
        keypoints([1, 2, 2]),
        f"{FILE}: annotation id 1: keypoints: expected 6 numbers, x, y and visibility of each of 2, got 3; "
        "all keypoints are left out",
    ),
    Accepted(
        *("root category without annotations", "train", "is left out"),
        content(with_root),
        f"{FILE}: left out the category 'shapes' (id 0), "
        "which has no annotation and is the supercategory of all others",
    ),
    Accepted(
        *("validation set of other ids and fewer classes", f"{VALIDATED} val.json"),
        "names decide; a class that is not there has no AP",
        content(other_ids, "val.json"),
    ),
    Accepted(
        *("data of other ids and fewer classes", "eval --annotations val.json", "names decide"),
        content(other_ids, "val.json"),
    ),
    Accepted(
        *("image names of Windows", "train", "the files are found"),
        renamed(lambda name: f"C:\\data\\images\\{name}"),
        RENAMED("C:\\data\\images\\000000.png"),
    ),
    Accepted(
        *("image names of another format and case", "eval", "the files are found"),
        renamed(lambda name: name.replace(".png", ".JPG")),
        RENAMED("000000.JPG"),
    ),
    Accepted("fields of LVIS, without file names", "train", "the end of the URL is the name", content(lvis)),
    Accepted("crowd among the annotations", "train", "nothing inside it counts as background", annotation(iscrowd=1)),
    Accepted("category ids with holes", "train", "labels are counted through", content(ids_with_holes)),
    Accepted("image without annotations", "train", "all of it is background", first_only(2)),
    Accepted(
        "one image of 32 x 32 pixels and group norm",
        "train --train.batch_size 1 --model.norm gn --model.fpn_channels 64 --model.mask_head_channels 32",
        "trains: it has statistics of groups of channels",
    ),
    Accepted("batch larger than the data set", "train --train.batch_size 8", "every batch holds all images"),
    Accepted("alpha that hides something", "train", "alpha is dropped", HIDDEN, NOT_OPAQUE),
    Accepted("alpha that hides something", "predict", "alpha is dropped", HIDDEN, NOT_OPAQUE),
    Accepted("opaque alpha", "train", "is dropped", first_image(np.full((32, 32, 4), 255, np.uint8))),
    Accepted(
        *("palette with a transparent colour", "eval", "its colours are looked up"),
        saved(zeros(32, 32), "P", transparency=bytes([7])),
        NOT_OPAQUE,
    ),
    Accepted("TIFF with overviews", "train", "the full image is read", first_tiff(pages=OVERVIEW)),
    Accepted("EXIF orientation", "train", "is not applied", turned(3), NOT_TURNED),
    Accepted("EXIF orientation", "train --data.exif true", "is applied", turned(3)),
    Accepted("EXIF orientation", "eval --exif false", "is not applied", turned(3)),
    Accepted("EXIF orientation", f"predict --annotations {FILE}", "is not applied", turned(3), NOT_TURNED),
    Accepted(
        *("EXIF tags that are damaged", "predict", "the orientation alone is read"),
        turned(6, more=[(0x11A, 10, 1, 200), (0x8769, 4, 1, 8)]),
    ),
    Accepted(
        *("weights of tmask without settings", "train --init own.pth"),
        "a run begins with them; their classes are taken to be those of the data",
        torch_file("own.pth", own_weights),
    ),
    Accepted(
        "weights in a checkpoint of Lightning or of a script, with other objects beside them",
        "train --init theirs.ckpt",
        "the weights are taken, and no prefix of a wrapper; in place of the objects stand empty dicts",
        torch_file("theirs.ckpt", lightning),
    ),
    Accepted(
        *("folder with other files, and with subfolders", "predict --images data", "the images are found"),
        None,
        f"images: left out 1 of 4 files, whose suffix is that of no image format, first {FILE}",
    ),
    Accepted("image with a palette", "train", "its colours are looked up", first_image(zeros(32, 32, 3), "P")),
    Accepted("image of one channel", "eval", "grey is repeated", first_image(zeros(32, 32))),
    *[
        Accepted("1 x 1 image", words, "is enlarged like any other", tiny_image(1, 1))
        for words in (BATCH_OF_3, "eval", "predict")
    ],
    *[
        Accepted("image of 1 x 700 pixels", words, "keeps one row after the resize", tiny_image(700, 1))
        for words in (BATCH_OF_3, f"{BATCH_OF_3} --model.convention torchvision", "eval", "predict")
    ],
    Accepted(
        *("byte-order mark before the JSON", "train", "is read over"),
        lambda: FILE.write_text(FILE.read_text(), encoding="utf-8-sig"),
    ),
]

# Tested where the code is.
ELSEWHERE = {
    what: f"tests/{test}"
    for what, test in {
        "full disk while saving a checkpoint": "engine/test_processes.py::"
        "test_a_full_disk_ends_the_run_and_not_the_checkpoint",
        "bad image midway": "engine/test_errors.py::test_a_bad_image_midway_costs_no_step",
        "any error in a run": "engine/test_errors.py::test_a_run_goes_on_behind_the_last_whole_update",
        "out of memory, or a data worker that died": "engine/test_memory.py::test_training_saves_and_names_the_options",
        "folder where another command is at work": "engine/test_files.py::test_one_training_at_a_time",
        "loss that is NaN or infinite": "engine/test_train.py::test_a_loss_that_is_not_finite_names_step_and_term",
        "every form of damage to a mask": "data/test_coco.py::"
        "test_faults_of_a_mask_are_found_on_opening_and_name_the_annotation",
        "every field of a config": "test_config.py::test_wrong_values_name_field_expected_and_got",
        "every argument of every op": "kernels/test_arguments.py::test_a_wrong_argument_is_named",
        "any error in a loader's worker": "data/test_loader.py::test_an_error_is_the_same_from_a_worker",
        "folders and data of an ablation": "bench/test_ablate.py::"
        "test_more_seeds_may_be_added_but_nothing_else_changed",
        "formats that Pillow would read to other pixels": "data/test_images.py::"
        "test_more_than_eight_bits_are_refused_in_every_format",
        "every odd EXIF tag": "data/test_images.py::test_odd_tags_neither_stop_the_turn_nor_warn",
        "links that make a loop of folders": "engine/test_find_images.py::"
        "test_links_to_folders_are_followed_and_make_no_loop",
        "targets and images of the model": "model/test_transform.py::test_bad_targets_are_named",
    }.items()
}

IN_0_1 = "(the model itself subtracts image_mean and divides by image_std; give 0..255 as uint8)"
OUTPUT_SIZE = "output_size: expected a whole number or (height, width), whole numbers of at least 1, got"
X1_X2 = "targets[0]['boxes'][0]: expected finite x1 < x2 and y1 < y2, got"

PYTHON = [
    PythonCase(*case, message)
    for case, message in {
        ("unknown setting", 'tmask.build_model("tiny", min_sise=3)'): (
            "unknown ModelConfig setting 'min_sise': expected 'min_size'?"
        ),
        ("impossible setting", 'tmask.build_model("tiny", rpn_nms_threshold=float("nan"))'): (
            "rpn_nms_threshold: expected a finite number, got nan"
        ),
        ("unknown preset", 'tmask.build_model("r50_fnp")'): "preset: expected 'r50_fpn'?, got 'r50_fnp'",
        ("backbone that is none", 'tmask.build_model("tiny", backbone=torch.nn.ReLU())'): (
            "backbone: expected a module with out_channels, the widths of its 4 maps of strides (4, 8, 16, 32), "
            "or with timm's feature_info, got out_channels None"
        ),
        ("no image", "model([])"): "images: expected at least one image, got an empty list",
        ("NaN in an image", "model.eval()([image, image * float('nan')])"): (
            "images[1]: expected finite values, got 6000 NaN or infinite of 6000"
        ),
        ("NaN in an image, in training", "model([image * float('nan')], [target])"): (
            "images[0]: expected finite values, got 6000 NaN or infinite of 6000"
        ),
        ("float image of 0..255", "model.eval()([torch.linspace(0, 255, 6000).view(3, 40, 50)])"): (
            f"images[0]: expected float values in 0..1, got 0.0..255.0 {IN_0_1}"
        ),
        (
            "image that is normalised already",
            "model([(torch.linspace(0, 1, 6000).view(3, 40, 50) - 0.45) / 0.225], [target])",
        ): (f"images[0]: expected float values in 0..1, got -2.0..2.444 {IN_0_1}"),
        ("wrong channel count", "model.eval()([image[:1]])"): (
            "images[0]: expected a tensor [3, h, w], got (1, 40, 50)"
        ),
        ("integers that are no bytes", "model.eval()([image.long()])"): (
            "images[0]: expected uint8 or a float dtype, got torch.int64"
        ),
        ("x2 <= x1", 'model([image], [target | {"boxes": torch.tensor([[9.0, 2, 9, 8]])}])'): (
            f"{X1_X2} [7.2, 1.6, 7.2, 6.4] (after the resize)"
        ),
        ("NaN in a box", 'model([image], [target | {"boxes": torch.full((1, 4), float("nan"))}])'): (
            f"{X1_X2} [nan, nan, nan, nan] (after the resize)"
        ),
        ("mask of another size", 'model([image], [target | {"masks": torch.ones(1, 50, 40)}])'): (
            "targets[0]['masks']: expected shape (1, 40, 50), got (1, 50, 40)"
        ),
        ("label out of range", 'model([image], [target | {"labels": torch.tensor([3])}])'): (
            "targets[0]['labels'][0]: expected 1..2, got 3"
        ),
        ("label of a float type", 'model([image], [target | {"labels": torch.tensor([1.0])}])'): (
            "targets[0]['labels']: expected an integer dtype, got torch.float32"
        ),
        ("no labels", 'model([image], [{"boxes": torch.zeros(0, 4)}])'): (
            "targets[0]: expected a key 'labels', got ['boxes']"
        ),
        ("fewer targets than images", "model([image, image], [target])"): ("targets: expected 2, one an image, got 1"),
        ("training without targets", "model([image])"): "targets: expected Targets in training mode, got None",
        ("missing image file", 'CocoDataset("data/images", "data/annotations.json")[0]'): (
            "data/annotations.json: 1 of 3 images do not exist, first data/images/000000.png (image id 1)"
        ),
        ("weights of several precisions", "model.eval() and model.fpn.half() and model([image])"): (
            "weights: expected one dtype, got float16 and float32: give all the same, or keep all in float32 and "
            "use torch.autocast (in the commands --precision)"
        ),
        ("checkpoint that does not exist", 'load_model("nowhere.pt")'): "checkpoint nowhere.pt: no such file",
        ("result of an unknown category", 'coco_metrics(truth, [result, result | {"category_id": 99}])'): (
            "results[1]: category_id 99 is not in the ground truth"
        ),
        ("unknown kind of evaluation", 'coco_metrics(truth, [result], kinds=["bbox", "mask"])'): (
            "kinds: expected one of bbox, keypoints, segm, got 'mask'"
        ),
        ("result of an unknown image", 'coco_metrics(truth, [result | {"image_id": 99}])'): (
            "results[0]: image_id 99 is not in the ground truth"
        ),
        ("category by its name", 'coco_metrics(truth, [result | {"category_id": "disc"}])'): (
            "results[0]: category_id: expected a whole number, got 'disc'"
        ),
        (
            "result without a score",
            'coco_metrics(truth, [{key: result[key] for key in ("image_id", "category_id", "bbox")}])',
        ): ("results[0]: expected a field 'score', got none"),
        ("score that is NaN", 'coco_metrics(truth, [result | {"score": float("nan")}])'): (
            "results[0]: score: expected finite numbers, got nan"
        ),
        (
            "run lengths of another size",
            'coco_metrics(truth, [result | {"segmentation": {"size": [9, 8], "counts": [72]}}])',
        ): ("results[0]: segmentation: expected run lengths of size (32, 32), got (9, 8)"),
        ("IoU threshold above 1", "tmask_kernels.nms(torch.zeros(3, 4), torch.zeros(3), 1.5)"): (
            "nms: iou_threshold: expected a number in 0..1, got 1.5"
        ),
        ("fewer scores than boxes", "tmask_kernels.soft_nms(torch.zeros(3, 4), torch.zeros(2))"): (
            "soft_nms: scores: expected float [3], got torch.float32 [2]"
        ),
        ("unknown soft-NMS method", 'tmask_kernels.soft_nms(torch.zeros(3, 4), torch.zeros(3), method="hard")'): (
            "soft_nms: method: expected one of linear, gaussian, got 'hard'"
        ),
        (
            "heat maps without an axis of images",
            "tmask_kernels.decode_keypoints(torch.zeros(2, 17, 56, 56), torch.zeros(1, 2, 4))",
        ): (
            "decode_keypoints: heatmaps: expected float [N, D, K, H, W] with H, W >= 1, got torch.float32 [2, "
            "17, 56, 56]"
        ),
        (
            "a dict of feature maps",
            'tmask_kernels.multiscale_roi_align({"0": torch.zeros(1, 3, 8, 8)}, [torch.zeros(2, 4)], 7, [0.25])',
        ): (
            "multiscale_roi_align: features: expected a list of tensors [N, C, H, W], one a spatial scale (1), "
            "such as list(features.values()), got dict"
        ),
        ("size that is a float", "tmask_kernels.roi_align(torch.zeros(1, 3, 8, 8), [torch.zeros(2, 4)], 7.0)"): (
            f"roi_align: {OUTPUT_SIZE} 7.0"
        ),
        (
            "size of one number in a tuple",
            "tmask_kernels.roi_pool(torch.zeros(1, 3, 8, 8), [torch.zeros(2, 4)], (7,))",
        ): (f"roi_pool: {OUTPUT_SIZE} (7,)"),
        ("array for a tensor", "tmask_kernels.nms(torch.zeros(3, 4).numpy(), torch.zeros(3), 0.5)"): (
            "nms: boxes: expected a tensor, float [K, 4], got numpy.ndarray"
        ),
    }.items()
]
