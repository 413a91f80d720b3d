"""Prediction on image files: COCO results and pictures with the instances drawn in; a run may stop and go on."""

from __future__ import annotations

import glob
import hashlib
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tmask.checks import listed
from tmask.engine.checkpoint import config_dict, read_model_config
from tmask.engine.device import autocast
from tmask.engine.evaluate import coco_results, skeleton_of
from tmask.engine.files import held, replacing
from tmask.engine.progress import progress
from tmask.engine.record import RECORD_NAME, Record, file_state
from tmask.skeleton import Pairs

_MANY = 0.1  # part of the images that give as many detections as the model may


class Summary(NamedTuple):
    """What a run of `predict` left: images done, those among them that an earlier run had done, and detections."""

    images: int
    reused: int
    detections: int


def find_images(pattern: str | Path) -> dict[str, Path]:
    """The image files of a file name, a folder with its subfolders or a glob, by name, sorted.

    A name is the path from the folder on, or from the part of the glob without wildcards: ``sub/a.png`` for
    ``data/**/*.png``. A folder gives the files with a suffix of `image_suffixes` that are not hidden; so does a glob,
    unless it ends in a suffix itself. One warning counts the files of other suffixes. A folder that links lead to
    counts once. Errors: ValueError if there are no images.
    """
    from tmask.data.images import image_suffixes

    path = Path(pattern)
    if path.is_dir():
        root, found = path, list(_visible_files(path))
    elif path.is_file():
        root, found = path.parent, [path]
    else:
        root, found = _fixed_part(path), [Path(item) for item in glob.glob(str(pattern), recursive=True)]
    # A link that leads nowhere stays: prediction will name it.
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
    """The files below a folder that are not hidden, nor in a hidden folder.

    A folder is entered once, by its own place if it has one below `root`, so that no link makes a loop.
    """
    entered, links = set(), [root]
    while links:
        for folder, subfolders, names in os.walk(links.pop(0), onerror=_raise):  # which enters no links below
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
    """The records (``id``, ``width``, ``height``, ...) that a COCO file holds of the images of these names.

    Images that the file names otherwise are found if they alone can be meant, and counted in one warning.
    Errors: ValueError for a broken file, an image that is not in it or that it lists twice.
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
    coco_images: Mapping[str, dict[str, Any]] | None = None,
    overwrite: bool = False,
    apply_exif: bool | None = None,
) -> Summary:
    """Detect in each file of `images`, by name as `find_images` gives them, and leave in `out_dir`

    ``predictions.json``, the COCO results of every detection, with ``file_name`` added; ``images.json``, a COCO file of
    the images and `categories`; with `pictures` a folder ``pictures`` of PNGs like the images' names; and
    ``predictions.jsonl``, by which a later call goes on: images that are done and have not changed are not computed
    again. The two JSON files are written however this ends, with the images done by then.

    ``image_id`` counts the images from 1, and images are turned upright by their EXIF orientation. With `coco_images`
    (see `image_records`) ids are theirs and the pixels stay as stored, as annotations and `evaluate` have them, with a
    warning of orientations. `apply_exif` decides in both cases.
    `categories` are the checkpoint's: label i is ``categories[i - 1]``. `score_threshold` limits what is drawn. One
    warning counts the images with as many detections as the model may give, if they are a tenth of all or more.
    Errors: ValueError if `out_dir` has results of other settings or weights, or without a record, unless `overwrite`;
    if another process is at work there; and, when all others are done, one that names the files that are no images.
    """
    from tmask.data.images import read_picture, warn_transparent, warn_turned

    device = torch.device(device)
    model.to(device).eval()
    turn = coco_images is None if apply_exif is None else apply_exif
    settings = {"precision": precision, "score_threshold": score_threshold, "exif": turn}
    settings = _model_settings(model, categories) | settings
    with held(out_dir, "predict"):
        record = Record(out_dir, settings, overwrite=overwrite, completed=_completed)
        # A glob may find the pictures of an earlier run.
        files = {name: path for name, path in images.items() if not record.is_own_picture(path)}
        numbers = {name: coco_images[name]["id"] if coco_images else i for i, name in enumerate(files, start=1)}
        entries = {name: record.find(name, path) for name, path in files.items()}
        for name, entry in entries.items():
            if coco_images and entry is not None and not _is_size(entry.width, entry.height, coco_images[name]):
                entries[name] = None  # other annotations than then: read again, it is named among the errors
        todo = [
            name
            for name, entry in entries.items()
            if entry is None or (pictures and not record.picture_path(entry.picture).is_file())
        ]
        reused = sum(entry is not None for entry in entries.values())
        if reused:
            print(f"{reused} of {len(files)} images were done before", file=sys.stderr)
        unreadable: dict[str, str] = {}
        turned, transparent = [], []
        skeleton = skeleton_of(model)
        edges = () if skeleton is None else skeleton.edges
        try:
            for name in progress(todo, "prediction", "image"):
                path, entry = files[name], entries[name]
                try:
                    state = file_state(path)
                    image, orientation, is_transparent = read_picture(path, apply_exif=turn)
                    if coco_images:
                        _check_size(path, image, coco_images[name])
                except ValueError as error:
                    unreadable[name] = str(error)
                    continue
                turned += [path] * (orientation != 1)
                transparent += [path] * is_transparent
                if entry is None:
                    rows = _detect(model, image, path, categories, device, precision)
                    entry = record.add(name, state, (image.shape[1], image.shape[2]), rows)
                if pictures:
                    rows = record.detections(entry)
                    _draw(record.picture_path(entry.picture), image, rows, categories, score_threshold, edges)
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
            "objects; --max_detections",
            stacklevel=2,
        )
    if unreadable:
        done = f"the {len(files) - len(unreadable)} others are done"
        raise ValueError(
            f"{len(unreadable)} of {len(files)} images left out ({done}): {listed([*unreadable.values()], '; ')}"
        )
    return Summary(len(counts), reused, sum(counts))


def _detect(
    model: Any,
    image: Tensor,
    path: Path,
    categories: Sequence[dict[str, Any]],
    device: torch.device,
    precision: str,
) -> list[dict[str, Any]]:
    """COCO results of an image, but for its id."""
    try:
        with torch.inference_mode(), autocast(device, precision):
            result = model([image.to(device)], masks="rle")[0]
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(f"{path}: {error}") from error
    rows = coco_results(0, result, [int(category["id"]) for category in categories])
    return [{key: value for key, value in row.items() if key != "image_id"} for row in rows]


def _draw(
    path: Path,
    image: Tensor,
    rows: Sequence[dict[str, Any]],
    categories: Sequence[dict[str, Any]],
    score_threshold: float,
    edges: Pairs,
) -> None:
    from tmask.visualize import draw_instances, save_png

    labels = {int(category["id"]): label for label, category in enumerate(categories, start=1)}
    xywh = torch.tensor([row["bbox"] for row in rows]).reshape(-1, 4)
    result: dict[str, Any] = {
        "boxes": torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1),
        "labels": torch.tensor([labels[row["category_id"]] for row in rows], dtype=torch.int64),
        "scores": torch.tensor([row["score"] for row in rows]),
    }
    if rows and "segmentation" in rows[0]:
        result["masks"] = [row["segmentation"] for row in rows]
    if rows and "keypoints" in rows[0]:
        keypoints = torch.tensor([row["keypoints"] for row in rows]).unflatten(1, (-1, 3))
        known = (keypoints != 0).any(-1, keepdim=True)
        result["keypoints"] = torch.cat([keypoints[..., :2] + 0.5, known.float()], dim=-1)
    names = [str(category["name"]) for category in categories]
    with replacing(path) as file:
        save_png(file, draw_instances(image, result, names, min_score=score_threshold, edges=edges))


def _check_size(path: Path, image: Tensor, record: dict[str, Any]) -> None:
    height, width = image.shape[1:]
    if not _is_size(width, height, record):
        expected = f"{record['width']}x{record['height']}"
        raise ValueError(f"{path}: expected {expected} pixels by the annotations, got {width}x{height}")


def _is_size(width: int, height: int, record: dict[str, Any]) -> bool:
    return (width, height) == (record["width"], record["height"])


def _model_settings(model: Any, categories: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "checkpoint": _digest(model),
        "model": config_dict(getattr(model, "config", None)),
        "categories": [[category["id"], category["name"]] for category in categories],
        "max_detections": model.roi_heads.max_detections,
    }


def _completed(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of a record; model settings that came since it was made have their defaults."""
    try:
        return settings | {"model": config_dict(read_model_config(settings["model"], RECORD_NAME))}
    except (KeyError, ValueError):  # of a model of one's own, or one that knows more than this
        return settings


def _digest(model: Any) -> str:
    """A fingerprint of the weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
