"""Files that are written whole or not at all, and folders that one process at a time writes to."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_LOCK_NAME = ".tmask.lock"
_locks: set[BinaryIO] = set()  # the files by which this process holds folders


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


@contextlib.contextmanager
def held(folder: str | Path, command: str) -> Iterator[None]:
    """Lock `folder` (made if missing) against other commands, on POSIX systems.

    The operating system frees the lock when this process ends, also by ``kill -9``. At the end a folder that was made
    here is removed if it is empty.

    Args:
        folder: The folder.
        command: The name of the command that is at work, for the message to others.

    Raises:
        ValueError: Another command is at work in `folder`.
    """
    path = Path(folder) / _LOCK_NAME
    made = [item for item in (path.parent, *path.parent.parents) if not item.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(path, command) if os.name == "posix" else contextlib.nullcontext():
            yield
    finally:
        for item in made:
            with contextlib.suppress(OSError):  # not empty
                item.rmdir()


@contextlib.contextmanager
def _locked(path: Path, command: str) -> Iterator[None]:
    import fcntl

    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.fstat(file.fileno()).st_nlink > 0  # else its holder was just about to end, and removed it
        except BlockingIOError:
            free = False
        except OSError:  # a file system without locks
            free = True
        if not free:
            holder = path.read_text(errors="replace") if path.is_file() else ""
            way_out = "wait for its end or stop it, or choose another folder"
            raise ValueError(f"{path.parent}: another tmask {holder or 'command'} is at work in this folder; {way_out}")
        _locks.add(file)
        try:
            with contextlib.suppress(OSError):  # a full disk
                file.truncate(0)
                file.write(f"{command} (process {os.getpid()} on {platform.node()})".encode())
                file.flush()
            yield
        finally:
            _locks.discard(file)
            path.unlink(missing_ok=True)


def _leave_locks_to_the_parent() -> None:
    """A data worker, which a killed training leaves behind for seconds, must not hold its folder."""
    for file in _locks:
        file.close()
    _locks.clear()


if os.name == "posix":
    os.register_at_fork(after_in_child=_leave_locks_to_the_parent)
