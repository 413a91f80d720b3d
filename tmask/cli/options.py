"""The options of the commands: made from config classes, with a help that shows their texts, and one-line errors."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import json
import re
import shutil
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

from jsonargparse import ActionYesNo, ArgumentParser, DefaultHelpFormatter, Namespace

from tmask.checks import bare, bounds, describe
from tmask.cli.common import UsageError
from tmask.config import field_texts, from_dict, nested_config

Flag = Annotated[bool, "flag"]  # an option without a value: --name, and --no_name where the default is true


class HelpFormatter(DefaultHelpFormatter):
    """Shows the sentence of each option and its default, in 100 columns at most."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        width = min(100, shutil.get_terminal_size().columns - 2)
        super().__init__(*args, **{**kwargs, "width": width, "max_help_position": 30})

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default if isinstance(action.default, str) else json.dumps(action.default, default=str)
        return (action.help or "").replace("%(default)s", default)


def make_parser(name: str, command: Callable[..., int], usage: str = "") -> ArgumentParser:
    """Make the parser of a command. Its docstring is the description, `usage` lists the options that a call needs."""
    parser = ArgumentParser(
        prog=f"tmask {name}",
        usage=" ".join(f"tmask {name} {usage} [options]".split()),
        description=command.__doc__,
        formatter_class=HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser._actions[0].help = "Show this help and exit."
    return parser


def add_options(parser: ArgumentParser, config: type[Any]) -> None:
    """Add an option for each field of a config class: its type, its default and the text below the field."""
    hints, texts = typing.get_type_hints(config, include_extras=True), field_texts(config)
    for item in dataclasses.fields(config):
        hint, needed = hints[item.name], item.default is dataclasses.MISSING
        how: dict[str, Any] = {"required": True} if needed else {"default": item.default}
        if hint is Flag:
            how["action"] = ActionYesNo if item.default else "store_true"
        else:
            how |= {"type": bare(hint), "metavar": metavar_of(hint)}
        parser.add_argument(f"--{item.name}", help=help_of(texts, item.name, hint, default=not needed), **how)


def options_of(config: type[Any], name: str, command: Callable[..., int], argv: list[str]) -> Any:
    """Parse the options of a command into an instance of `config`, which has a field for each option."""
    needed = [item.name for item in dataclasses.fields(config) if item.default is dataclasses.MISSING]
    parser = make_parser(name, command, " ".join(f"--{item} {item.upper()}" for item in needed))
    add_options(parser, config)
    return settings_of(config, "", parse(parser, argv))


def describe_options(parser: ArgumentParser, group: str, config: type[Any]) -> None:
    """Give the options of `config`, which jsonargparse made in `group`, their texts and the group its title."""
    hints, texts = typing.get_type_hints(config, include_extras=True), field_texts(config)
    parser.groups[group].title = f"--{group}.*"
    parser.groups[group].description = (config.__doc__ or "").partition("\n")[0]
    for action in list(parser._actions):
        prefix, _, name = action.dest.rpartition(".")
        if action.dest == group:
            action.help, action.metavar = "These settings by name, or a YAML file of them.", "SETTINGS"
        elif prefix == group and name in hints and not dataclasses.is_dataclass(hints[name]):
            action.help, action.metavar = help_of(texts, name, hints[name]), metavar_of(hints[name])
            action.required = False  # a preset has a value for each
            if nested := nested_config(hints[name]):
                _describe_nested(parser, action.dest, nested)


def _describe_nested(parser: ArgumentParser, name: str, config: type[Any]) -> None:
    """Show the options of settings that may be none; jsonargparse takes these options without an action for each."""
    own = parser._option_string_actions.pop(f"--{name}.help")  # jsonargparse's help of the class, without our texts
    for actions in (parser._actions, *(section._group_actions for section in parser._action_groups)):
        actions[:] = [action for action in actions if action is not own]
    section = parser.add_argument_group(f"--{name}.*", (config.__doc__ or "").partition("\n")[0])
    hints, texts = typing.get_type_hints(config, include_extras=True), field_texts(config)
    section._group_actions += [
        argparse.Action(
            [f"--{name}.{item.name}"],
            f"{name}.{item.name}",
            default=item.default,
            help=help_of(texts, item.name, hints[item.name]),
            metavar=metavar_of(hints[item.name]),
        )
        for item in dataclasses.fields(config)
    ]


def help_of(texts: Mapping[str, str], name: str, hint: Any, *, default: bool = True) -> str | None:
    """Return the text of a field with its bounds and default; None if there is no text."""
    if name not in texts:
        return None
    parts = [bound.expected for bound in bounds(hint)]
    literals = [part for part in (hint, *typing.get_args(hint)) if typing.get_origin(part) is typing.Literal]
    parts += [", ".join(typing.get_args(literal)) for literal in literals]
    parts += ["default: %(default)s"] if default and hint is not Flag else []
    return texts[name] + (f" ({'; '.join(parts)})" if parts else "")


def metavar_of(hint: Any) -> str:
    """Return what the help shows as the value of an option of this type."""
    kinds = {bool: "{true,false}", int: "INT", float: "NUMBER", str: "TEXT", tuple: "LIST", typing.Literal: "NAME"}
    for part in (bare(hint), *typing.get_args(bare(hint))):
        if (kind := typing.get_origin(part) or part) in kinds:
            return kinds[kind]
    return "SETTINGS"


def add_device(parser: ArgumentParser) -> None:
    """The option ``--device``."""
    text = "Where to run: auto, cpu, cuda or cuda:N. (default: %(default)s)"
    parser.add_argument("--device", type=str, default="auto", metavar="NAME", help=text)


def parse(parser: ArgumentParser, argv: list[str], file: Mapping[str, Any] | None = None) -> Namespace:
    """Parse `argv`. `file` holds the settings of the config file that `argv` names.

    Raises:
        UsageError: An option is unknown (the message names the nearest one), or a value is wrong.
    """
    words = [word.removeprefix("--").partition("=")[0] for word in argv if word.startswith("--")]
    known = {option.removeprefix("--") for action in parser._actions for option in action.option_strings}
    for action in parser._actions:  # settings that may be none: as a whole or one by one
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
    """Yield the dotted names of the values in nested settings."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _explain(parser: ArgumentParser, message: str) -> str:
    """Translate jsonargparse's message for a value of the wrong type; return any other message unchanged."""
    wrong = re.search(r'^Parser key "([\w.]+)":\s.* value: (.*)', message, re.DOTALL)
    hints = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    if wrong is None or hints.get(wrong[1]) is None:
        return message
    nested = nested_config(hints[wrong[1]])
    if nested is not None:
        return f"--{wrong[1]}: {_explain_nested(nested, wrong[2])}"
    return f"--{wrong[1]}: expected {describe(hints[wrong[1]], wrong[2])}, got {wrong[2]}"


def _explain_nested(config: type[Any], given: str) -> str:
    """Return what our own check says of settings that jsonargparse refused."""
    single = re.fullmatch(r"NestedArg\(key='(\w+)', val=(.*)\)", given, re.DOTALL)
    with contextlib.suppress(SyntaxError, ValueError):
        value = ast.literal_eval(single[2] if single else given)
        try:
            from_dict(config, {single[1]: value} if single else value)
        except ValueError as error:
            return str(error)
    return f"expected {describe(config, given)}, got {given}"


def settings_of(cls: type[Any], group: str, args: Namespace) -> Any:
    """Build the config from a group of options, or from all for an empty `group`; errors name the option."""
    try:
        return from_dict(cls, args[group].as_dict() if group else args.as_dict())
    except ValueError as error:
        raise UsageError(f"--{group}.{error}" if group else f"--{error}") from error
