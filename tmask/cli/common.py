"""What the commands share: parsers whose errors are one line, and checks that come before any work."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from tmask.checks import describe
from tmask.config import from_dict, nested_config

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
    parser.add_argument(
        "--precision",
        type=Precision | None,
        default=None,
        help="of the features; boxes are always fp32; null: as in training, or fp32 on a device that lacks it",
    )


def parse(parser: ArgumentParser, argv: list[str], file: Mapping[str, Any] | None = None) -> Namespace:
    """Parse; `file` holds the settings of the config file that `argv` names.

    An unknown option is answered with the nearest known one, a wrong value with what is expected.
    """
    words = [word.removeprefix("--").partition("=")[0] for word in argv if word.startswith("--")]
    known = {option.removeprefix("--") for action in parser._actions for option in action.option_strings}
    for action in parser._actions:  # settings that are given as a whole, or one by one, or not at all
        nested = nested_config(getattr(action, "_typehint", None))
        known |= {f"{action.dest}.{item.name}" for item in dataclasses.fields(nested)} if nested else set()
    for name in [*words, *_leaves(file or {})]:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UsageError(f"unknown option --{name}" + (f"; did you mean --{near[0]}?" if near else ""))
    try:
        return parser.parse_args(argv)
    except argparse.ArgumentError as error:
        raise UsageError(_explain(parser, str(error))) from error


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of the values in nested settings."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _explain(parser: ArgumentParser, message: str) -> str:
    """jsonargparse's message of a value of the wrong type, in the words of ours; any other as it is."""
    wrong = re.search(r'^Parser key "([\w.]+)":\s.* value: (.*)', message, re.DOTALL)
    hints = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    if wrong is None or hints.get(wrong[1]) is None:
        return message
    nested = nested_config(hints[wrong[1]])
    if nested is not None:
        return f"--{wrong[1]}: {_explain_nested(nested, wrong[2])}"
    return f"--{wrong[1]}: expected {describe(hints[wrong[1]], wrong[2])}, got {wrong[2]}"


def _explain_nested(config: type[Any], given: str) -> str:
    """What is wrong with settings that jsonargparse did not take, by our own check of them."""
    single = re.fullmatch(r"NestedArg\(key='(\w+)', val=(.*)\)", given, re.DOTALL)
    with contextlib.suppress(SyntaxError, ValueError):
        value = ast.literal_eval(single[2] if single else given)
        try:
            from_dict(config, {single[1]: value} if single else value)
        except ValueError as error:
            return str(error)
    return f"expected {describe(config, given)}, got {given}"


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


def check_precision(device: Any, precision: str | None) -> None:
    """Errors: ValueError for a precision the device lacks."""
    from tmask.engine.device import autocast

    if precision is not None:
        autocast(device, precision)


def precision_of(device: Any, precision: str | None, saved: dict[str, Any]) -> str:
    """`precision`, or that of the run which wrote the checkpoint `saved`, or fp32 if the device lacks that one."""
    if precision is not None:
        return precision
    trained: str = (saved["train_config"] or {}).get("precision", "fp32")  # None: written by hand
    try:
        check_precision(device, trained)
    except ValueError:
        return "fp32"
    return trained


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


def check_out(out: Path, option: str = "out") -> None:
    """Find before any work that nothing could be written to the folder that an option names."""
    there = next(path for path in (out, *out.parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"--{option} {out}: expected a folder, but {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"--{option} {out}: the folder {there} is not writable")
