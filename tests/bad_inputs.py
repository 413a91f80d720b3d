"""How the inputs of docs/bad-input.md are made. test_bad_input.py runs every row of that page.

A row runs in a folder of its own: a sound data set of three images in ``data`` (``images`` and ``annotations.json``),
and a checkpoint trained on it, ``run/checkpoint.pt``. ``SPOILS`` holds what a row changes there first, by the text in
its first column. A row without an entry is wrong by its command alone.
"""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.image_files import tiff, with_exif
from tmask.engine.checkpoint import load_checkpoint

Spoil = Callable[[], object]
Content = dict[str, Any]

FILE, IMAGES, FIRST = Path("data/annotations.json"), Path("data/images"), Path("data/images/000000.png")
CHECKPOINT = Path("run/checkpoint.pt")

# `train` stands for these options and what a row adds; `eval` and the others likewise.
SMALL = """--model.min_size 32 --model.max_size 64 --model.fpn_channels 8 --model.box_head_dim 8
    --model.mask_head_channels 8 --model.mask_head_layers 1 --model.box_batch_size 8 --train.precision fp32
    --train.steps 1 --train.batch_size 2 --data.num_workers 0 --device cpu"""
COMMANDS = {
    "train": f"--preset tiny --data.train_images {IMAGES} --data.train_annotations {FILE} {SMALL} --out out",
    "eval": f"--checkpoint {CHECKPOINT} --images {IMAGES} --annotations {FILE} --device cpu",
    "predict": f"--checkpoint {CHECKPOINT} --images {IMAGES} --out out --max_detections 1000 --device cpu",
    "convert": "--out coco.pt",
    "validate": "--device cpu",
    "demo": "--out out",
    "bench": "--device cpu",
    "ablate": "--device cpu --out out",
}


def content(change: Callable[[Content], object], to: Path | str = FILE) -> Spoil:
    """Change the annotation file, in place or `to` a copy."""

    def spoil() -> None:
        parsed = json.loads(FILE.read_text())
        change(parsed)
        Path(to).write_text(json.dumps(parsed))

    return spoil


def annotation(**fields: Any) -> Spoil:
    """Other fields for the first annotation."""
    return content(lambda c: c["annotations"][0].update(fields))


def image(number: int = 0, /, **fields: Any) -> Spoil:
    """Other fields for an image."""
    return content(lambda c: c["images"][number].update(fields))


def each(change: Callable[[Content], object] | None = None, **fields: Any) -> Spoil:
    """Other fields for every annotation, which `change` may make of the annotation."""
    return content(lambda c: [item.update(change(item) if change else fields) for item in c["annotations"]])


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


def both(*spoils: Spoil) -> Spoil:
    return lambda: [spoil() for spoil in spoils]


def file(path: Path | str, data: bytes | str) -> Spoil:
    """Write a file, in place of a link too."""

    def spoil() -> None:
        Path(path).unlink(missing_ok=True)
        Path(path).write_bytes(data.encode() if isinstance(data, str) else data)

    return spoil


def config(text: str) -> Spoil:
    return file("c.yaml", text)


def torch_file(path: str, content: object) -> Spoil:
    return lambda: torch.save(content() if callable(content) else content, path)


def truncated(path: Path) -> Spoil:
    return lambda: file(path, path.read_bytes()[: path.stat().st_size // 2])()


def empty(*numbers: int) -> Spoil:
    """Image files of zero bytes."""
    return both(*[file(IMAGES / f"00000{i}.png", b"") for i in numbers])


def zeros(*shape: int, dtype: Any = np.uint8) -> Any:
    return np.zeros(shape, dtype)


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


def other_size(**size: int) -> Spoil:
    """The annotation file tells another size of the first image, and has no masks of the old one."""
    return both(each(segmentation=None), image(**size))


def tiny_image(width: int, height: int) -> Spoil:
    """The first image and its only annotation have `width` x `height` pixels."""
    box: Content = {"id": 99, "image_id": 1, "category_id": 1, "bbox": [0, 0, width, height]}
    box["segmentation"] = [[0, 0, width, 0, width, height, 0, height]]

    def change(c: Content) -> None:
        c["annotations"] = [item for item in c["annotations"] if item["image_id"] != 1] + [box]

    return both(first_image(np.full((height, width, 3), 200, np.uint8)), content(change))


def truncated_jpeg() -> None:
    jpeg = FIRST.with_suffix(".jpg")
    Image.open(FIRST).save(jpeg)
    truncated(jpeg)()
    image(file_name=jpeg.name)()


def two_of_a_name() -> None:
    for folder in ("a", "b"):
        (IMAGES / folder / "sub").mkdir(parents=True)
        shutil.copy(FIRST, IMAGES / folder / "sub" / "1.png")
    image(file_name="sub/1.png")()


def xyxy(item: Content) -> Content:
    """The box as x1, y1, x2, y2."""
    x, y, w, h = item["bbox"]
    return {"bbox": [x, y, x + w, y + h]}


def corners(item: Content) -> list[list[float]]:
    x, y, w, h = item["bbox"]
    return [[x, y], [x + w, y], [x + w, y + h], [x, y + h]]


def in_parts(item: Content) -> Content:
    """Box and polygon in parts of the image's size, 32 x 32."""
    points = [value / 32 for point in corners(item) for value in point]
    return {"bbox": [value / 32 for value in item["bbox"]], "segmentation": [points]}


def by_rows(item: Content) -> Content:
    """Run lengths along the rows."""
    x, y, w, h = map(int, item["bbox"])
    counts = [32 * y + x, *[w, 32 - w] * (h - 1), w, 32 * (32 - y - h) + 32 - x - w]
    return {"segmentation": {"size": [32, 32], "counts": counts}}


def large_ids(c: Content) -> None:
    """Image and category ids that int64 does not hold, and negative annotation ids."""
    for item in [*c["images"], *c["categories"]]:
        item["id"] += 2**64
    for k, item in enumerate(c["annotations"]):
        item |= {"id": -k, "image_id": item["image_id"] + 2**64, "category_id": item["category_id"] + 2**64}


def ids_with_holes(c: Content) -> None:
    c["categories"][4].update(id=900)
    for item in c["annotations"]:
        item["category_id"] = 900 if item["category_id"] == 5 else item["category_id"]


def other_ids(c: Content) -> None:
    """The same classes by other ids, one of them left out."""
    c["categories"] = [{"id": 9 - item["id"], "name": item["name"]} for item in c["categories"][1:]]
    for item in c["annotations"]:
        item["category_id"] = 9 - item["category_id"]


def with_root(c: Content) -> None:
    """Roboflow's first category."""
    for item in c["categories"]:
        item["supercategory"] = "shapes"
    c["categories"].insert(0, {"id": 0, "name": "shapes", "supercategory": "none"})


def lvis(c: Content) -> None:
    """LVIS' fields."""
    for item in c["images"]:
        url = f"http://images.cocodataset.org/val2017/{item.pop('file_name')}"
        item.update(coco_url=url, neg_category_ids=[1], not_exhaustive_category_ids=[])
    for item in c["categories"]:
        item["frequency"] = "r"
    for item in c["annotations"]:
        del item["iscrowd"]


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("open('code-ran', 'w')",)


def own_weights() -> dict[str, Any]:
    return load_checkpoint(CHECKPOINT)["model"]


def lightning() -> dict[str, Any]:
    weights = {f"model.module.{name}": tensor for name, tensor in own_weights().items()}
    return {"state_dict": weights, "args": argparse.Namespace(lr=0.02, out=Path("a"))}


ZERO = torch.zeros(1)
GIF = {"format": "GIF", "save_all": True, "append_images": [Image.fromarray(np.full((32, 32), 255, np.uint8))]}
OVERVIEW = [{"pixels": zeros(32, 32, 3)}, {"pixels": zeros(16, 16, 3), "more": [(254, 4, [1])]}]
PLATE = content(lambda c: c["categories"][2].update(name="plate"), "val.json")

SPOILS: dict[str, Spoil] = {
    # Image files.
    "missing image file": FIRST.unlink,
    "image name of which two files have the end": two_of_a_name,
    "two images of one file": image(file_name="000001.jpg"),
    "one file for two images": image(1, file_name="000000.png"),
    "image names of Windows": renamed(lambda name: f"C:\\data\\images\\{name}"),
    "image names of another format and case": renamed(lambda name: name.replace(".png", ".JPG")),
    "wrong images folder": Path("empty").mkdir,
    "truncated JPEG": truncated_jpeg,
    "truncated PNG": truncated(FIRST),
    "several bad images": both(truncated(FIRST), empty(2)),
    "several bad images, found by their headers": empty(0, 2),
    "bad images alone, to be left out": empty(0, 1, 2),
    "bad images to be left out, with all annotations": both(first_only(1), truncated(FIRST)),
    "image file of zero bytes": empty(0),
    "16-bit PPM": file(FIRST, b"P6 32 32 65535\n" + bytes(32 * 32 * 6)),
    "signed values": first_tiff(zeros(32, 32, 1, dtype=np.int8)),
    "16-bit image": first_image(zeros(32, 32, dtype=np.uint16)),
    "16-bit colours, a plane each": first_tiff(zeros(32, 32, 3, dtype=np.uint16), planar=True),
    "band that is neither colour nor alpha": first_tiff(zeros(32, 32, 4), extra=[0]),
    "bands of no colours": first_tiff(zeros(32, 32, 9), extra=[0] * 6),
    "Lab colours": first_tiff(zeros(32, 32, 3), photometric=8),
    "several pages": first_tiff(pages=[{"pixels": zeros(32, 32, 3)}] * 2),
    "animation": saved(zeros(32, 32), **GIF),
    "photograph that is annotated as its EXIF orientation turns it": both(turned(6, 32, 16), other_size(height=16)),
    "photograph that is annotated as stored, read upright": both(turned(6, 32, 16), other_size(width=16)),
    "width and height swapped": both(saved(zeros(32, 16, 3)), other_size(height=16)),
    "image of another size than the file says": other_size(width=33),
    "alpha that hides something": first_image(zeros(32, 32, 4)),
    "opaque alpha": first_image(np.full((32, 32, 4), 255, np.uint8)),
    "palette with a transparent colour": saved(zeros(32, 32), "P", transparency=bytes([7])),
    "TIFF with overviews": first_tiff(pages=OVERVIEW),
    "EXIF orientation": turned(3),
    "EXIF tags that are damaged": turned(6, more=[(0x11A, 10, 1, 200), (0x8769, 4, 1, 8)]),
    "image with a palette": first_image(zeros(32, 32, 3), "P"),
    "image of one channel": first_image(zeros(32, 32)),
    "1 x 1 image": tiny_image(1, 1),
    "image of 1 x 700 pixels": tiny_image(700, 1),
    # The annotation file.
    "no COCO file": file(FILE, "[]"),
    "broken JSON": file(FILE, '{"images": [\n1,, 2]}'),
    "empty annotation file": file(FILE, b""),
    "byte-order mark before the JSON": lambda: FILE.write_text(FILE.read_text(), encoding="utf-8-sig"),
    "no images in the file": cleared("images", "annotations"),
    "no categories": cleared("categories"),
    "no annotations to train on": cleared("annotations"),
    "no annotations to evaluate with": cleared("annotations"),
    "image without annotations": first_only(2),
    "nothing but crowds": each(iscrowd=1),
    "many crowds": content(lambda c: [item.update(iscrowd=1) for item in c["annotations"][::2]]),
    "crowd among the annotations": annotation(iscrowd=1),
    "crowd flag that is no number": annotation(iscrowd="no"),
    "the same id twice": image(1, id=1),
    "id that is a text": image(id="one"),
    "ids beyond 2^63": content(large_ids),
    "ids of annotations as texts": each(lambda item: {"image_id": str(item["image_id"]), "category_id": "3"}),
    "category id that is null": annotation(category_id=None),
    "category ids with holes": content(ids_with_holes),
    "annotation of an unknown image": annotation(image_id=99),
    "annotation of an unknown category": annotation(category_id=99),
    "image id of no whole number": annotation(image_id="one"),
    "image without a size": content(lambda c: c["images"][0].pop("width")),
    "size that is no number": image(height="32"),
    "fields that are null": each(iscrowd=None, area=None),
    "fields of LVIS, without file names": content(lvis),
    "root category without annotations": content(with_root),
    "validation set of other categories": PLATE,
    "checkpoint of other categories": PLATE,
    "validation set of the same categories, two of one name": content(
        lambda c: c["categories"][0].update(name="square"), "val.json"
    ),
    "validation set of other ids and fewer classes": content(other_ids, "val.json"),
    "data of other ids and fewer classes": content(other_ids, "val.json"),
    # Boxes, masks and keypoints in it.
    "neither box nor mask": annotation(bbox=None, segmentation=None),
    "box of three numbers": annotation(bbox=[1, 2, 3]),
    "NaN in a box": annotation(bbox=[1, 2, 3, float("nan")]),
    "infinite box": annotation(bbox=[1, 2, float("inf"), 3]),
    "text in a box": annotation(bbox=[1, 2, 3, "4"]),
    "box with x2 <= x1": annotation(bbox=[9, 9, -4, 5]),
    "box wholly outside its image": annotation(bbox=[50, 9, 4, 5]),
    "nothing but boxes outside their image to train on": each(bbox=[40, 40, 9, 9]),
    "boxes alone": each(segmentation=[]),
    "boxes alone that reach beyond their images": each(bbox=[20, 9, 40, 9], segmentation=None),
    "boxes as x1, y1, x2, y2": each(xyxy),
    "boxes and polygons in parts of the image's size": each(in_parts),
    "box that its mask contradicts": annotation(bbox=[1, 20, 9, 9]),
    "masks without boxes": each(bbox=None),
    "annotation without a mask": annotation(segmentation=None),
    "class without any mask": content(lambda c: c["annotations"][1].pop("segmentation")),
    "masks that are all empty": each(segmentation=[[1, 2, 9, 8]]),
    "empty polygon": annotation(segmentation=[[]]),
    "polygon of two points": annotation(segmentation=[[1, 2, 9, 8]]),
    "polygon as points": each(lambda item: {"segmentation": corners(item)}),
    "polygons nested deeper": each(lambda item: {"segmentation": [[corners(item)]]}),
    "polygon with an odd number of values": annotation(segmentation=[[1, 2, 9, 2, 9, 8, 1]]),
    "damaged masks beside boxes": annotation(segmentation=[[1, 2, 9, 2, 9, 8, 1]]),
    "NaN in a polygon": annotation(segmentation=[[1, 2, 9, 2, 9, float("nan")]]),
    "text in a polygon": annotation(segmentation=[[1, 2, 9, 2, 9, "8"]]),
    "polygon that is no list of lists": annotation(segmentation=[1, 2, 9, 2, 9, 8]),
    "run lengths of another size": annotation(segmentation={"size": [9, 9], "counts": [81]}),
    "run lengths that end early": annotation(segmentation={"size": [32, 32], "counts": "0123"}),
    "run lengths that are no text": annotation(segmentation={"size": [32, 32], "counts": "\u00e9"}),
    "run lengths along the rows": each(by_rows),
    "keypoints of the wrong number": keypoints([1, 2, 2]),
    "keypoint that is half visible": keypoints([1, 2, 0.5, 0, 0, 0]),
    "pair of a keypoint that is not there": keypoints([1, 2, 2, 3, 4, 2]),
    "keypoint in two pairs": keypoints([1, 2, 2, 3, 4, 2]),
    # Config files.
    "unknown key in the config file": config("model: {min_sise: 3}"),
    "unknown group in the config file": config("modle: {min_size: 3}"),
    "unknown key of keypoints in the config file": config("model: {keypoints: {layers: 2}}"),
    "name in place of a list of names": config("model: {keypoints: {names: a}}"),
    "config file that is a list": config("- 1"),
    "group that holds no settings": config("train: 3"),
    "config file that is no YAML": config("model: ["),
    "key of the config file that is no text": config("2020-01-01: 3"),
    "too deep a weight transfer": config("model: {mask_transfer: {layers: 4}}"),
    "wrong type in the config file": config("train: {momentum: fast}"),
    "NaN as the learning rate": config("train: {lr: .nan}"),
    "date as the learning rate": config("train: {lr: 2020-01-01}"),
    "flag that is neither true nor false": config("overwrite: nope"),
    # Checkpoints and weights.
    "truncated checkpoint": truncated(CHECKPOINT),
    "pickle with code in it: does not run": file(CHECKPOINT, pickle.dumps(Evil())),
    "a whole model, pickled": torch_file("model.pth", lambda: torch.nn.Linear(1, 1)),
    "weights of detectron2": file(
        "d2.pkl", pickle.dumps({"model": {"backbone.bottom_up.stem.conv1.weight": np.zeros(1)}})
    ),
    "weights of mmdetection": torch_file("mm.pth", {"meta": {}, "state_dict": {"rpn_head.rpn_conv.weight": ZERO}}),
    "weights of Keras": file("mask_rcnn_coco.h5", b"\x89HDF\r\n\x1a\n" + bytes(99)),
    "weights of a ResNet alone": torch_file("resnet18.pth", {"layer1.0.conv1.weight": ZERO}),
    "weights of several models": torch_file(
        "two.pth", {f"{own}.rpn.head.conv.weight": ZERO for own in ("student", "teacher")}
    ),
    "Git LFS pointer": file("resnet18.pth", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    "page of an error, saved as weights": file("a.pt", "<!DOCTYPE html>\n<html>404</html>"),
    "weights of tmask without settings": torch_file("own.pth", own_weights),
    "torchvision's weights": torch_file("tv.pth", {"backbone.body.conv1.weight": ZERO, "rpn.head.conv.0.0.bias": ZERO}),
    "checkpoint with another object in it": torch_file(
        "args.pt", {"format": "tmask checkpoint", "args": argparse.Namespace(lr=0.02)}
    ),
    "weights in a checkpoint of Lightning or of a script, with other objects beside them": torch_file(
        "theirs.ckpt", lightning
    ),
}
