"""What the commands share: parsers whose errors are one line, and checks that come before any work."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from tmask.checks import describe
from tmask.config import from_dict

Precision = Literal["fp32", "bf16", "fp16"]


class UsageError(Exception):
    """Something the user typed is wrong; the message is for him."""


def fail(message: str, code: int) -> int:
    """Say it in one line on stderr; gives `code`."""
    print(one_line(message), file=sys.stderr)
    return code


def one_line(text: str) -> str:
    """The text without line breaks."""
    return " ".join(text.split())


def make_parser(name: str, command: Callable[..., int]) -> ArgumentParser:
    """The parser of a command, described by its docstring."""
    return ArgumentParser(prog=f"tmask {name}", description=command.__doc__, exit_on_error=False, allow_abbrev=False)


def add_device(parser: ArgumentParser) -> None:
    """The options ``--device`` and ``--precision``."""
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", type=Precision, default="fp32", help="of the features; boxes are always fp32")


def parse(parser: ArgumentParser, argv: list[str]) -> Namespace:
    """Parse; an unknown option is answered with the nearest known one, a wrong value with what is expected."""
    try:
        return parser.parse_args(argv)
    except argparse.ArgumentError as error:
        raise UsageError(_explain(parser, str(error))) from error


def _explain(parser: ArgumentParser, message: str) -> str:
    """jsonargparse's message in the words of ours."""
    known = {action.dest: action for action in parser._actions}
    value = re.search(r'^Parser key "([\w.]+)":\s.* value: (.*)', message, re.DOTALL)
    if value and getattr(known.get(value[1]), "_typehint", None) is not None:
        return f"--{value[1]}: expected {describe(known[value[1]]._typehint, value[2])}, got {value[2]}"
    group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    unknown = re.search(r"(?:unrecognized arguments: --|[Kk]ey '|Option ')([\w.]+)", message)
    wanted = f"{group[1]}.{group[2]}" if group else unknown[1] if unknown else None
    if wanted is None or wanted in known:
        return message
    near = difflib.get_close_matches(wanted, known, n=1)
    return f"unknown option --{wanted}" + (f"; did you mean --{near[0]}?" if near else "")


def usage(function: Callable[[], Any]) -> Any:
    """Call it; a ValueError of its is the user's error."""
    try:
        return function()
    except ValueError as error:
        raise UsageError(str(error)) from error


def device_of(name: str) -> Any:
    """The device of that name, with the process set up for it."""
    from tmask.engine.device import keep_freed_memory, pick_device

    device = pick_device(name)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def check_precision(device: Any, precision: str) -> None:
    """Errors: ValueError for a precision the device lacks."""
    from tmask.engine.device import autocast

    autocast(device, precision)


def settings_of(cls: type[Any], group: str, args: Namespace) -> Any:
    """The config of a group of options; its errors name the option."""
    try:
        return from_dict(cls, args[group].as_dict())
    except ValueError as error:
        raise UsageError(f"--{group}.{error}") from error


def paths_exist(**paths: str | None) -> None:
    """Options that name what must be there: a folder of images, or a file."""
    for name, path in paths.items():
        if path is None:
            continue
        if not Path(path).exists():
            raise UsageError(f"--{name}: no such file or folder: {path}")
        if name.endswith("images") != Path(path).is_dir():
            kinds = ("folder", "file") if name.endswith("images") else ("file", "folder")
            raise UsageError(f"--{name}: expected a {kinds[0]}, got a {kinds[1]}: {path}")


def check_out(out: Path) -> None:
    """Find before any work that nothing could be written there."""
    there = next(path for path in (out, *out.parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"--out {out}: expected a folder, but {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"--out {out}: the folder {there} is not writable")
