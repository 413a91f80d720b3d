"""The record of a prediction on disk, so that a stopped run can continue.

``predictions.jsonl`` grows by one line for each finished image. The first line holds the settings; each other line is
``{"file_name", "bytes", "mtime_ns", "height", "width", "picture", "detections"}``. A process that dies loses only the
image it was working on. ``predictions.json`` and ``images.json``, for other programs, are written from the record.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tmask.engine.files import IMAGES_NAME, PICTURES_NAME, PREDICTIONS_NAME, RECORD_NAME, naming, replacing

FORMAT, VERSION = "tmask predictions", 1
_WAY_OUT = "--overwrite begins anew, another --out keeps it"


class OtherSettingsError(ValueError):
    """The folder holds the record of a run with other settings, or a file that is no record."""


class Entry(NamedTuple):
    """What memory holds of a finished image; its detections stay in the file."""

    offset: int  # of its line in the file
    state: tuple[int, int]  # bytes and mtime_ns of the image file
    height: int
    width: int
    picture: str  # name in the folder of pictures


class Record:
    """The finished images in `out_dir`, by file name.

    Args:
        out_dir: Folder of the prediction.
        settings: JSON values that decide the results.
        overwrite: Forget the record in `out_dir` and remove its pictures.
        completed: Adds defaults for settings that are younger than the record in `out_dir`.
        suffix: Suffix of the pictures' names.

    Raises:
        OtherSettingsError: Without `overwrite`: the record in `out_dir` has other settings or is no record, or
            `out_dir` has results without a record.
    """

    def __init__(
        self,
        out_dir: str | Path,
        settings: Mapping[str, Any],
        overwrite: bool = False,
        completed: Callable[[dict[str, Any]], dict[str, Any]] = dict,
        suffix: str = ".png",
    ) -> None:
        self.out_dir = Path(out_dir)
        self.path = self.out_dir / RECORD_NAME
        self._completed, self._suffix = completed, suffix
        self._entries: dict[str, Entry] = {}
        self._pictures: set[str] = set()
        self._replaced: set[str] = set()  # pictures of the record that `overwrite` removed
        header = {"format": FORMAT, "version": VERSION, "settings": json.loads(json.dumps(settings))}
        if self.path.exists():
            self._open(header, overwrite=overwrite)
        elif not overwrite:
            for path in (self.out_dir / PREDICTIONS_NAME, self.out_dir / IMAGES_NAME):
                if path.exists():  # without a record the file is someone else's
                    needed = f"exists, but not {RECORD_NAME}, which is needed to go on"
                    raise OtherSettingsError(f"{path}: {needed}; {_WAY_OUT}")
        if not self.path.exists() or overwrite:
            for picture in self._pictures:
                self.picture_path(picture).unlink(missing_ok=True)
            self._entries, self._pictures, self._replaced = {}, set(), self._pictures
            with replacing(self.path) as file:
                file.write(_line(header))

    def _open(self, header: dict[str, Any], *, overwrite: bool) -> None:
        """Read the file, and cut it off after the last whole line."""
        with self.path.open("rb") as file:
            found = _parse(file.readline()) or {}
            if not overwrite:
                self._check(found, header)
            elif not _is_record(found):
                return
            end = file.tell()
            for line in file:
                row = _parse(line)
                if row is None:
                    break
                self._remember(row, end)
                end += len(line)
        if not overwrite and self.path.stat().st_size > end:
            with self.path.open("r+b") as file:
                file.truncate(end)

    def _check(self, found: dict[str, Any], header: dict[str, Any]) -> None:
        if not _is_record(found):
            wrong = "expected the record of an earlier run, got something else"
            raise OtherSettingsError(f"{self.path}: {wrong}; {_WAY_OUT}")
        old, new = json.loads(json.dumps(self._completed(found["settings"]))), header["settings"]
        names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
        if names:
            short = {name: f": {old[name]} -> {new[name]}" for name in names if _is_short(old, new, name)}
            listed = ", ".join(name + short.get(name, "") for name in names)
            raise OtherSettingsError(f"{self.path}: made with other settings ({listed}); {_WAY_OUT}")

    def _remember(self, row: dict[str, Any], offset: int) -> None:
        state = (row["bytes"], row["mtime_ns"])
        self._entries[row["file_name"]] = Entry(offset, state, row["height"], row["width"], row["picture"])
        self._pictures.add(row["picture"])

    def picture_path(self, picture: str) -> Path:
        """The path of the picture with that name."""
        return self.out_dir / PICTURES_NAME / picture

    def is_own_picture(self, path: Path) -> bool:
        """Whether `path` is a picture of this record or of the record that it replaced."""
        folder, path = self.picture_path("").resolve(), path.resolve()
        return path.is_relative_to(folder) and path.relative_to(folder).as_posix() in self._pictures | self._replaced

    def find(self, file_name: str, path: Path) -> Entry | None:
        """The entry of an image; None if its file has changed or is gone, or if the image is not done."""
        entry = self._entries.get(file_name)
        return entry if entry is not None and entry.state == file_state(path) else None

    def add(
        self, file_name: str, state: tuple[int, int], size: tuple[int, int], detections: list[dict[str, Any]]
    ) -> Entry:
        """Append a finished image and remove an earlier picture of it.

        `state` is its `file_state` before it was read, `size` its height and width.
        """
        before = self._entries.get(file_name)
        if before:
            self.picture_path(before.picture).unlink(missing_ok=True)
        row = {"file_name": file_name, "bytes": state[0], "mtime_ns": state[1], "height": size[0], "width": size[1]}
        row |= {"picture": before.picture if before else self._free_name(file_name), "detections": detections}
        with naming(self.path), self.path.open("ab") as file:
            offset = file.tell()
            file.write(_line(row))
            file.flush()
            os.fsync(file.fileno())  # before the picture is drawn, so that each picture has a line
        self._remember(row, offset)
        return self._entries[file_name]

    def _free_name(self, file_name: str) -> str:
        """A free name for a picture, like the image's name; ``a.jpg`` beside ``a.png`` gets a number."""
        stem, number = Path(file_name).with_suffix("").as_posix(), 1
        name = f"{stem}{self._suffix}"
        while name in self._pictures or self.picture_path(name).exists():
            number += 1
            name = f"{stem}-{number}{self._suffix}"
        return name

    def detections(self, entry: Entry) -> list[dict[str, Any]]:
        """The detections of an image, as they were added."""
        with self.path.open("rb") as file:
            file.seek(entry.offset)
            return json.loads(file.readline())["detections"]

    def write_results(self, images: Mapping[str, tuple[int, Path]], categories: list[dict[str, Any]]) -> list[int]:
        """Write ``predictions.json`` and ``images.json`` of the finished ones of `images` (name: id, file).

        Returns:
            The number of detections of each finished image.
        """
        found = [(name, number, self.find(name, path)) for name, (number, path) in images.items()]
        done = [(name, number, entry) for name, number, entry in found if entry is not None]
        counts, listed = [], []
        with replacing(self.out_dir / PREDICTIONS_NAME) as file:
            start = b"["
            for name, number, entry in done:
                listed.append({"id": number, "file_name": name, "height": entry.height, "width": entry.width})
                rows = self.detections(entry)
                counts.append(len(rows))
                for row in rows:
                    file.write(start + json.dumps({"image_id": number, **row, "file_name": name}).encode())
                    start = b",\n"
            file.write(b"]\n" if any(counts) else b"[]\n")
        with replacing(self.out_dir / IMAGES_NAME) as file:
            file.write(_line({"images": listed, "categories": categories, "annotations": []}))
        return counts


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object of a whole line; None for part of a line, as a killed process leaves it."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _is_record(header: dict[str, Any]) -> bool:
    return (header.get("format"), header.get("version")) == (FORMAT, VERSION)


def file_state(path: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in ns; -1 and -1 for a missing file."""
    try:
        stat = path.stat()
    except OSError:
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def _is_short(old: dict[str, Any], new: dict[str, Any], name: str) -> bool:
    return all(isinstance(values.get(name), int | float) or name == "precision" for values in (old, new))
