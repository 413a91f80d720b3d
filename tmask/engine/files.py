"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to that becomes `path` when the block ends well, so `path` holds the old bytes or the new.

    The bytes go to ``.NAME.part`` in the same folder (made if missing) and reach the disk before it takes the name. On
    an error, a full disk among them, that file is removed and the old one stays; what a killed process leaves of it is
    overwritten by the next. Errors: OSError that names `path`.
    """
    path = Path(path)
    part = part_of(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def part_of(path: Path) -> Path:
    """The file that holds the bytes of `path` until they are whole."""
    return path.with_name(f".{path.name}.part")


def replace_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, as `replacing` does. Errors: OSError that names `path`."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """What the system cannot do in here concerns `path`: of a full disk it does not say so itself."""
    try:
        yield
    except OSError as error:
        if error.strerror is None:  # not the system's
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _sync_folder(folder: Path) -> None:
    """Make the new name last: fsync of the folder, which only POSIX systems have."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
