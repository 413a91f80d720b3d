"""The record of a prediction run on disk, so that a run that was stopped goes on where it was.

``predictions.jsonl`` grows by a line whenever an image is done: a first line holds the settings, then each line an
image, ``{"file_name", "bytes", "mtime_ns", "height", "width", "picture", "detections"}``. A process that dies loses the
image it was at. ``predictions.json`` and ``images.json``, which others read, are made of the record.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tmask.engine.files import naming, replacing

FORMAT, VERSION = "tmask predictions", 1
RECORD_NAME, RESULTS_NAME, IMAGES_NAME = "predictions.jsonl", "predictions.json", "images.json"
PICTURES_NAME = "pictures"
_WAY_OUT = "--overwrite begins anew, another --out keeps it"


class OtherSettingsError(ValueError):
    """The folder holds the record of a run with other settings, or something else of that name."""


class Entry(NamedTuple):
    """What is kept in memory of an image that is done; its detections stay in the file."""

    offset: int  # of its line
    state: tuple[int, int]  # bytes and mtime_ns of the image file
    height: int
    width: int
    picture: str  # name in the folder of pictures


class Record:
    """The images that are done in `out_dir`, by their file name.

    `settings` are values for JSON that decide about the results. Errors: OtherSettingsError if the record in
    `out_dir` was made with others, or is none, or if results stand there without a record; not with `overwrite`, which
    forgets the record and removes its pictures. `completed` gives the settings of an earlier record those that have
    come since.
    """

    def __init__(
        self,
        out_dir: str | Path,
        settings: Mapping[str, Any],
        *,
        overwrite: bool = False,
        completed: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> None:
        self.out_dir = Path(out_dir)
        self.path = self.out_dir / RECORD_NAME
        self._completed = completed
        self._entries: dict[str, Entry] = {}
        self._pictures: set[str] = set()
        self._replaced: set[str] = set()  # those of the record that `overwrite` forgot
        header = {"format": FORMAT, "version": VERSION, "settings": json.loads(json.dumps(settings))}
        if self.path.exists():
            self._open(header, overwrite=overwrite)
        elif not overwrite:
            self._check_free()
        if not self.path.exists() or overwrite:
            for picture in self._pictures:
                self.picture_path(picture).unlink(missing_ok=True)
            self._entries, self._pictures, self._replaced = {}, set(), self._pictures
            with replacing(self.path) as file:
                file.write(_line(header))

    def _check_free(self) -> None:
        """Without a record, files of the results' names are someone else's."""
        for name in (RESULTS_NAME, IMAGES_NAME):
            if (self.out_dir / name).exists():
                raise OtherSettingsError(
                    f"{self.out_dir / name}: exists, but not {RECORD_NAME}, which is needed to go on; {_WAY_OUT}"
                )

    def _open(self, header: dict[str, Any], *, overwrite: bool) -> None:
        """Read the file, and cut off what is no whole line."""
        with self.path.open("rb") as file:
            found = _parse(file.readline()) or {}
            if not overwrite:
                self._check(found, header)
            elif (found.get("format"), found.get("version")) != (FORMAT, VERSION):
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
        if (found.get("format"), found.get("version")) != (FORMAT, VERSION):
            raise OtherSettingsError(
                f"{self.path}: expected the record of an earlier run, got something else; {_WAY_OUT}"
            )
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
        """Where a picture of that name stands."""
        return self.out_dir / PICTURES_NAME / picture

    def is_own_picture(self, path: Path) -> bool:
        """Whether the record, or one that it replaced, lists `path` among its pictures."""
        folder, path = self.picture_path("").resolve(), path.resolve()
        if not path.is_relative_to(folder):
            return False
        name = path.relative_to(folder).as_posix()
        return name in self._pictures or name in self._replaced

    def find(self, file_name: str, path: Path) -> Entry | None:
        """The entry of an image, unless its file has changed since, is gone or was never done."""
        entry = self._entries.get(file_name)
        return entry if entry is not None and entry.state == file_state(path) else None

    def add(
        self, file_name: str, state: tuple[int, int], size: tuple[int, int], detections: list[dict[str, Any]]
    ) -> Entry:
        """Append an image of `size` (height, width) that is done, with the `file_state` from before it was read.

        An earlier picture of it is out of date and goes.
        """
        before = self._entries.get(file_name)
        if before is not None:
            self.picture_path(before.picture).unlink(missing_ok=True)
        row = {"file_name": file_name, "bytes": state[0], "mtime_ns": state[1], "height": size[0], "width": size[1]}
        row |= {"picture": before.picture if before else self._free_name(file_name), "detections": detections}
        with naming(self.path), self.path.open("ab") as file:
            offset = file.tell()
            file.write(_line(row))
            file.flush()
            os.fsync(file.fileno())  # before its picture, so that no picture is ever left without a line
        self._remember(row, offset)
        return self._entries[file_name]

    def _free_name(self, file_name: str) -> str:
        """A PNG's name like the image's, which no file has and no entry: a.jpg beside a.png gets a number."""
        stem, number = Path(file_name).with_suffix("").as_posix(), 1
        name = f"{stem}.png"
        while name in self._pictures or self.picture_path(name).exists():
            number += 1
            name = f"{stem}-{number}.png"
        return name

    def detections(self, entry: Entry) -> list[dict[str, Any]]:
        """The detections of an image, as they were added."""
        with self.path.open("rb") as file:
            file.seek(entry.offset)
            return json.loads(file.readline())["detections"]

    def write_results(self, images: Mapping[str, tuple[int, Path]], categories: list[dict[str, Any]]) -> list[int]:
        """Write ``predictions.json`` and ``images.json`` of those of `images` (name: id, file) that are done.

        Gives the number of detections of each of them.
        """
        found = [(name, number, self.find(name, path)) for name, (number, path) in images.items()]
        done = [(name, number, entry) for name, number, entry in found if entry is not None]
        listed = [
            {"id": number, "file_name": name, "height": entry.height, "width": entry.width}
            for name, number, entry in done
        ]
        counts = []
        with replacing(self.out_dir / RESULTS_NAME) as file:
            start = b"["
            for name, number, entry in done:
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
    """The object of a whole line; None for a part, as a process that was killed leaves it."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def file_state(path: Path) -> tuple[int, int]:
    """Size in bytes and time of change in ns; -1 of a file that is not there."""
    try:
        stat = path.stat()
    except OSError:
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def _is_short(old: dict[str, Any], new: dict[str, Any], name: str) -> bool:
    return all(isinstance(values.get(name), int | float) or name == "precision" for values in (old, new))
