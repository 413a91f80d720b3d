"""Prediction on image files: COCO results and pictures of the detections. A stopped run can continue."""

from __future__ import annotations

import glob
import hashlib
import os
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tmask.checks import listed, nearest, require
from tmask.engine.checkpoint import config_dict, read_model_config
from tmask.engine.detect import coco_results, skeleton_of
from tmask.engine.device import autocast
from tmask.engine.files import RECORD_NAME, held
from tmask.engine.log import progress
from tmask.engine.pictures import SUFFIXES, draw_detections
from tmask.engine.record import Record, file_state
from tmask.visualize import PARTS, check_parts, check_side

_PICTURE_SETTINGS = {"picture_format": "png", "picture_side": None, "picture_parts": PARTS}  # with their defaults
_MANY = 0.1  # part of the images with as many detections as the limit, from which on a warning comes


class Summary(NamedTuple):
    """The result of `predict`: images done, images among them that an earlier run had done, and detections."""

    images: int
    reused: int
    detections: int


def find_images(pattern: str | Path) -> dict[str, Path]:
    """Find the image files of a file name, a folder with its subfolders, or a glob.

    A folder, and a glob without a suffix of its own, yield the files with a suffix of `image_suffixes`; one warning
    counts the others. A folder yields no hidden files, and each folder that links lead to once.

    Returns:
        Path of each image by name, sorted. The name is the path below the folder, or below the part of the glob before
        its wildcards: ``sub/a.png`` for ``data/**/*.png``.

    Raises:
        ValueError: There are no images.
    """
    from tmask.data.images import image_suffixes

    path = Path(pattern)
    if path.is_dir():
        root, found = path, list(_visible_files(path))
    elif path.is_file():
        root, found = path.parent, [path]
    else:
        root, found = _fixed_part(path), [Path(item) for item in glob.glob(str(pattern), recursive=True)]
    # A link without a target stays: `predict` names it among the errors.
    found = sorted({item for item in found if not item.is_dir()})
    total, left = len(found), []
    if path.is_dir() or (not path.is_file() and path.suffix in ("", ".*")):
        left = [item for item in found if item.suffix.lower() not in image_suffixes()]
        found = [item for item in found if item.suffix.lower() in image_suffixes()]
    if found and left:
        warnings.warn(
            f"images: left out {len(left)} of {total} files, whose suffix is that of no image format, first {left[0]}",
            stacklevel=2,
        )
    if not found:
        raise ValueError(f"images: expected an image, a folder of images or a glob, found no image at {str(pattern)!r}")
    return {item.relative_to(root).as_posix(): item for item in found}


def _visible_files(root: Path) -> Iterator[Path]:
    """Yield the files below `root` that are not hidden and not in a hidden folder.

    Each folder is entered once, by its own path if it is below `root`, so that links make no loop.
    """
    entered, links = set(), [root]
    while links:
        for folder, subfolders, names in os.walk(links.pop(0), onerror=_raise):  # os.walk follows no links
            if (real := os.path.realpath(folder)) in entered:
                subfolders.clear()
                continue
            entered.add(real)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            links += [Path(folder, name) for name in subfolders if Path(folder, name).is_symlink()]
            yield from (Path(folder, name) for name in names if not name.startswith("."))


def _raise(error: OSError) -> None:
    raise error


def _fixed_part(pattern: Path) -> Path:
    parts = pattern.parts
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:fixed])


def image_records(annotation_file: str | Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the records (``id``, ``width``, ``height``, ...) of the images `names` in a COCO file.

    An image with another name in the file is found if only one file can be meant; one warning counts these images.

    Raises:
        ValueError: The file is broken, lacks an image or lists an image twice.
    """
    from tmask.data.annotations import read_images
    from tmask.data.image_files import ImageFiles

    path = Path(annotation_file)
    records: dict[str, dict[str, Any]] = {}
    others: dict[int, dict[str, Any]] = {}
    wanted = set(names)
    for i, record in enumerate(read_images(path)):
        if record["file_name"] in records:
            raise ValueError(f"{path}: images[{i}]: file_name {record['file_name']!r} occurs twice")
        if record["file_name"] in wanted:
            records[record["file_name"]] = record
        else:
            others[i] = record
    missing = [name for name in names if name not in records]
    if missing:
        files = ImageFiles([Path(name).parts for name in missing])
        found = files.match({i: record["file_name"] for i, record in others.items()}, ())
        records |= {name: others[i] for i, name in found.items()}
        if found:
            i, name = next(iter(found.items()))
            warnings.warn(
                f"{path}: {len(found)} of {len(names)} images are in it under another name, first {name}: "
                f"{others[i]['file_name']!r} (image id {others[i]['id']})",
                stacklevel=2,
            )
        missing = [name for name in missing if name not in records]
    if missing:
        raise ValueError(f"{path}: {len(missing)} of {len(names)} images are not in it: {listed(missing, ', ')}")
    return records


def predict(
    model: Any,
    images: Mapping[str, Path],
    categories: Sequence[dict[str, Any]],
    *,
    out_dir: str | Path,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    score_threshold: float = 0.5,
    pictures: bool = True,
    picture_format: str = "png",
    picture_side: int | None = None,
    picture_parts: Collection[str] = PARTS,
    coco_images: Mapping[str, dict[str, Any]] | None = None,
    overwrite: bool = False,
    apply_exif: bool | None = None,
) -> Summary:
    """Detect objects in image files.

    Files in `out_dir`: ``predictions.json``, the COCO results of every detection, with ``file_name`` added;
    ``images.json``, a COCO file of the images and `categories`; ``pictures/``, a picture for each image; and
    ``predictions.jsonl``, the record by which a later call continues: it skips images that are done and unchanged. The
    two JSON files are written however `predict` ends, for the images done by then. One warning counts the images with
    as many detections as the model's limit, if they are a tenth of all or more.

    Args:
        model, device, precision: The model, where it runs, and ``fp32``, ``bf16`` or ``fp16``.
        images: Path of each image by name, as `find_images` returns them.
        categories: Categories of the checkpoint; label i is ``categories[i - 1]``.
        out_dir: Folder of the results.
        score_threshold: Lowest score of a detection in a picture.
        pictures: Whether pictures are drawn.
        picture_format: ``png`` or ``jpeg``.
        picture_side, picture_parts: Largest side and parts of the pictures: `max_side` and `parts` of `draw_instances`.
        coco_images: Records of the images (see `image_records`). Results then have their ids; without them ids count
            from 1.
        overwrite: Forget the record of an earlier run.
        apply_exif: Whether images are turned upright by their EXIF orientation. None: yes without `coco_images`; no,
            with one warning, with them, because annotations and `evaluate` use the pixels as stored.

    Raises:
        ValueError: `out_dir` has results of other settings or weights, or results without a record; another command
            holds it; or, after all other images are done, some files are no images.
    """
    from tmask.data.images import warn_transparent, warn_turned

    require(picture_format in SUFFIXES, "picture_format", nearest(picture_format, SUFFIXES), picture_format)
    check_parts(picture_parts, "picture_parts")
    check_side(picture_side, "picture_side")
    device = torch.device(device)
    model.to(device).eval()
    turn = coco_images is None if apply_exif is None else apply_exif
    settings = {"precision": precision, "score_threshold": score_threshold, "exif": turn}
    drawn = (picture_format, picture_side, [part for part in PARTS if part in picture_parts])
    settings |= dict(zip(_PICTURE_SETTINGS, drawn, strict=True))
    with held(out_dir, "predict"):
        record = Record(
            out_dir, _model_settings(model, categories) | settings, overwrite, _completed, SUFFIXES[picture_format]
        )
        # A glob may find the pictures of an earlier run.
        files = {name: path for name, path in images.items() if not record.is_own_picture(path)}
        numbers = {name: coco_images[name]["id"] if coco_images else i for i, name in enumerate(files, start=1)}
        entries = {name: record.find(name, path) for name, path in files.items()}
        for name, entry in entries.items():
            if coco_images and entry is not None and not _is_size(entry.width, entry.height, coco_images[name]):
                entries[name] = None  # the annotations have changed: read the image again, to name it as an error
        todo = [
            name
            for name, entry in entries.items()
            if entry is None or (pictures and not record.picture_path(entry.picture).is_file())
        ]
        reused = sum(entry is not None for entry in entries.values())
        if reused:
            print(f"{reused} of {len(files)} images were done before", file=sys.stderr)
        unreadable: dict[str, str] = {}
        turned: list[Path] = []
        transparent: list[Path] = []
        skeleton = skeleton_of(model)
        try:
            for name in progress(todo, "prediction", "image"):
                path, entry = files[name], entries[name]
                try:
                    state = file_state(path)
                    image, orientation, is_transparent = _read(path, turn, coco_images[name] if coco_images else None)
                except ValueError as error:
                    unreadable[name] = str(error)
                    continue
                turned += [path] * (orientation != 1)
                transparent += [path] * is_transparent
                if entry is None:
                    rows = _detect(model, image, path, categories, device, precision)
                    entry = record.add(name, state, (image.shape[1], image.shape[2]), rows)
                if pictures:
                    draw_detections(
                        record.picture_path(entry.picture),
                        image,
                        record.detections(entry),
                        categories,
                        score_threshold=score_threshold,
                        parts=picture_parts,
                        max_side=picture_side,
                        edges=skeleton.edges if skeleton else (),
                    )
        finally:
            kept = [{"id": int(category["id"]), "name": str(category["name"])} for category in categories]
            taken = {name: (numbers[name], path) for name, path in files.items() if name not in unreadable}
            counts = record.write_results(taken, kept)
            if turned and not turn and apply_exif is None:
                warn_turned(turned, len(todo))
            if transparent:
                warn_transparent(transparent, len(todo))
    limit = model.roi_heads.max_detections
    full = counts.count(limit)
    if full and full >= _MANY * len(counts):
        warnings.warn(
            f"{full} of {len(counts)} images give exactly {limit} detections, the limit of an image: there may be more "
            "objects; --max_detections raises the limit",
            stacklevel=2,
        )
    if unreadable:
        done = f"the {len(files) - len(unreadable)} others are done"
        raise ValueError(
            f"{len(unreadable)} of {len(files)} images left out ({done}): {listed([*unreadable.values()], '; ')}"
        )
    return Summary(len(counts), reused, sum(counts))


def _read(path: Path, apply_exif: bool, record: dict[str, Any] | None) -> Any:
    """Read an image as `read_picture` does. Raises ValueError if its size is not that of its COCO `record`."""
    from tmask.data.images import read_picture

    picture = read_picture(path, apply_exif=apply_exif)
    height, width = picture.pixels.shape[1:]
    if record is not None and not _is_size(width, height, record):
        expected = f"{record['width']}x{record['height']}"
        raise ValueError(f"{path}: expected {expected} pixels by the annotations, got {width}x{height}")
    return picture


def _is_size(width: int, height: int, record: dict[str, Any]) -> bool:
    return (width, height) == (record["width"], record["height"])


def _detect(
    model: Any, image: Tensor, path: Path, categories: Sequence[dict[str, Any]], device: torch.device, precision: str
) -> list[dict[str, Any]]:
    """The COCO results of one image, without ``image_id``."""
    try:
        with torch.inference_mode(), autocast(device, precision):
            result = model([image.to(device)], masks="rle")[0]
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(f"{path}: {error}") from error
    rows = coco_results(0, result, [int(category["id"]) for category in categories])
    return [{key: value for key, value in row.items() if key != "image_id"} for row in rows]


def _model_settings(model: Any, categories: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "checkpoint": _digest(model),
        "model": config_dict(getattr(model, "config", None)),
        "categories": [[category["id"], category["name"]] for category in categories],
        "max_detections": model.roi_heads.max_detections,
    }


def _completed(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a record, with defaults for settings that are younger than the record."""
    settings = _PICTURE_SETTINGS | settings
    try:
        return settings | {"model": config_dict(read_model_config(settings["model"], RECORD_NAME))}
    except (KeyError, ValueError):  # a model not from build_model, or settings of a newer tmask
        return settings


def _digest(model: Any) -> str:
    """Return a hash of the weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
