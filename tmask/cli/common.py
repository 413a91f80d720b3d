"""What the commands share: their errors, and checks that come before any work."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


class UsageError(Exception):
    """Something that the user typed is wrong; the message is for the user."""


class RunError(Exception):
    """A run failed; the message is for the user."""


def fail(message: str, code: int) -> int:
    """Print the message as one line on stderr and return `code`."""
    print(one_line(message), file=sys.stderr)
    return code


def describe_error(error: BaseException) -> str:
    """Describe an error: an error of the operating system with its file, any other with its type."""
    if isinstance(error, ValueError | RunError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def advising(options: Mapping[str, Any], way_on: str = "") -> Iterator[None]:
    """Turn an error of too little memory inside the block into a RunError with `memory_advice` and `way_on`."""
    try:
        yield
    except Exception as error:
        if advice := memory_advice(error, options):
            raise RunError(advice + way_on) from error
        raise


@contextlib.contextmanager
def going_on(out: Path, device: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Add the command that continues the training in `out` to what stops it inside the block.

    Args:
        out: The folder of the run.
        device: As the user named it.
        options: To lower where memory is short, see `memory_advice`.

    Raises:
        KeyboardInterrupt: The one raised inside the block, with the command if there is a checkpoint.
        RunError: In place of an error that has advice or a command to add.
    """
    from tmask.engine.files import CHECKPOINT_NAME, CONFIG_NAME

    checkpoint = out / CHECKPOINT_NAME
    words = ["tmask", "train", "--config", out / CONFIG_NAME, "--out", out, "--resume", checkpoint]
    command = shlex.join(map(str, words + ([] if device == "auto" else ["--device", device])))
    try:
        yield
    except KeyboardInterrupt as stop:
        step = getattr(stop, "checkpoint_step", None)
        after = " before the first checkpoint" if step is None else f"; to go on from step {step}: {command}"
        stop.args = (f"{str(stop) or 'interrupted'}{after}",)
        raise
    except Exception as error:
        step, advice = getattr(error, "checkpoint_step", None), memory_advice(error, options)
        parts = [advice or describe_error(error).rstrip("."), getattr(error, "not_saved", "")]
        if step is not None:
            from tmask.data.images import BadImageError

            if isinstance(error, BadImageError):
                parts.append("mend the file, or add --data.skip_bad true --data.check full to leave such images out")
            if advice:
                parts.append(f"--train.batch_size and --model.* may change in a new run with --init {checkpoint}")
            parts.append(f"to go on from step {step}: {command}")
        text = "; ".join(part for part in parts if part)
        if text == describe_error(error).rstrip("."):
            raise
        raise RunError(text) from error


def memory_advice(error: BaseException, options: Mapping[str, Any]) -> str:
    """Return what to do about an error of too little memory; an empty text for any other error.

    `options` maps options to their values, the most effective option first. The text names those that can be lowered:
    numbers, and a precision of fp32. If data workers died, their number comes first.
    """
    from tmask.engine.device import memory_fault

    fault = memory_fault(error)
    if fault is None:
        return ""
    reason = ". ".join(one_line(str(error)).rstrip(".").split(". ")[:2])
    lower = []
    for name, value in options.items():
        least = 0 if name.endswith("num_workers") else 1
        if value == "fp32":
            lower.append(f"{name} bf16 (now fp32)")
        elif isinstance(value, tuple) or (isinstance(value, int) and value > least):
            lower.append(f"{name} (now {value})")
    what = "out of memory"
    if fault == "worker":
        what = "a data worker died, most likely as memory or shared memory (/dev/shm; docker: --shm-size) ran out"
        lower.sort(key=lambda text: "num_workers" not in text)
    named = f"lower, the most effective first: {', '.join(lower)}" if lower else "no option of this command lowers it"
    return f"{what}{f' ({reason})' if reason else ''}; {named}"


def one_line(text: str) -> str:
    """Return the text without line breaks."""
    return " ".join(text.split())


def usage(function: Callable[[], Any]) -> Any:
    """Call `function` and turn its ValueError into a UsageError."""
    try:
        return function()
    except ValueError as error:
        raise UsageError(str(error)) from error


def device_of(name: str) -> Any:
    """Return the device of that name and set up the process for it."""
    from tmask.engine.device import keep_freed_memory, pick_device

    device = pick_device(name)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def check_precision(device: Any, precision: str | None) -> None:
    """Raise ValueError for a precision that the device lacks."""
    from tmask.engine.device import autocast

    if precision is not None:
        autocast(device, precision)


def precision_of(device: Any, precision: str | None, saved: dict[str, Any]) -> str:
    """Return `precision`, else the precision of the run that wrote the checkpoint `saved`, else fp32.

    fp32 replaces the precision of the run on a device that lacks it.
    """
    if precision is not None:
        return precision
    trained: str = (saved["train_config"] or {}).get("precision", "fp32")  # None: written by hand
    try:
        check_precision(device, trained)
    except ValueError:
        return "fp32"
    return trained


def paths_exist(**paths: str | None) -> None:
    """Raise UsageError for an option whose folder of images, or file, does not exist."""
    for name, path in paths.items():
        if path is None:
            continue
        if not Path(path).exists():
            raise UsageError(f"--{name}: no such file or folder: {path}")
        if name.endswith("images") != Path(path).is_dir():
            kinds = ("folder", "file") if name.endswith("images") else ("file", "folder")
            raise UsageError(f"--{name}: expected a {kinds[0]}, got a {kinds[1]}: {path}")


def check_out(out: Path, option: str = "out") -> None:
    """Raise UsageError if no file can be written to the folder of an option, before any work."""
    there = next(path for path in (out, *out.parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"--{option} {out}: expected a folder, but {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"--{option} {out}: the folder {there} is not writable")
