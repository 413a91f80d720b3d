"""Files that are written whole or not at all, locked folders, and the names of the files of a run."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# In the folder of a training; metrics and results also of an evaluation, pictures also of a prediction.
CHECKPOINT_NAME, CONFIG_NAME, LOG_NAME, TENSORBOARD_NAME = "checkpoint.pt", "config.yaml", "log.jsonl", "tensorboard"
METRICS_NAME, RESULTS_NAME, SKIPPED_NAME, PICTURES_NAME = "metrics.json", "results.json", "skipped.txt", "pictures"
# In the folder of a prediction.
RECORD_NAME, PREDICTIONS_NAME, IMAGES_NAME = "predictions.jsonl", "predictions.json", "images.json"

_LOCK_NAME = ".tmask.lock"
_locks: set[BinaryIO] = set()  # open lock files of this process


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `path` when the block ends without an error.

    `path` always holds the old bytes or the new bytes. The bytes go to ``.NAME.part`` in the same folder (made if
    missing) and reach the disk before the rename. After an error, such as a full disk, the part file is removed. A
    killed process leaves its part file; the next write replaces that file.

    Raises:
        OSError: The write failed; the error names `path`.
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
        if os.name == "posix":  # make the new name last
            handle = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def part_of(path: Path) -> Path:
    """The file that holds the bytes of `path` while `path` is written."""
    return path.with_name(f".{path.name}.part")


def replace_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, as `replacing` does. Raises an OSError that names `path`."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to the system's errors in this block: the error of a full disk names no file."""
    try:
        yield
    except OSError as error:
        if error.strerror is None:  # not an error of the system
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def held(folder: str | Path, command: str) -> Iterator[None]:
    """Lock `folder` (made if missing) against other commands, on POSIX systems.

    The operating system frees the lock when this process ends, also by ``kill -9``. A folder that `held` made and that
    is empty at the end is removed.

    Args:
        folder: The folder.
        command: The name of this command, for the message to other commands.

    Raises:
        ValueError: Another command holds `folder`.
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
            free = os.fstat(file.fileno()).st_nlink > 0  # 0: the holder has removed the file and is about to end
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


def _drop_locks() -> None:
    """Close the lock files in a forked data worker: a worker outlives a killed training by seconds."""
    for file in _locks:
        file.close()
    _locks.clear()


if os.name == "posix":
    os.register_at_fork(after_in_child=_drop_locks)
