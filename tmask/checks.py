"""Checks of user input for the configs and the command line. Every message is "name: expected ..., got ..."."""

from __future__ import annotations

import difflib
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

_NAMED = 5  # of many, in a message


class Bound(NamedTuple):
    """What a value must be beyond its type. A field has it by ``Annotated``; help and errors say `expected`."""

    expected: str
    holds: Callable[[Any], bool]


def at_least(low: float) -> Bound:
    """Numbers of `low` or more."""
    return Bound(f"at least {low}", lambda value: value >= low)


def optional(bound: Bound) -> Bound:
    """The same `bound`, or None."""
    return Bound(f"{bound.expected}, or none", lambda value: value is None or bound.holds(value))


def require(condition: bool, name: str, expected: str, got: Any) -> None:
    """Raise ValueError "name: expected ..., got ..." unless `condition`."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """Return the known name most like `name`, or all known names."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"{near[0]!r}?" if near else f"one of {', '.join(names)}"


def listed(items: Sequence[str], separator: str) -> str:
    """Join the first few items and the number of the others."""
    more = len(items) - _NAMED
    return separator.join(items[:_NAMED]) + (f"{separator}and {more} more" if more > 0 else "")


def check_fields(config: Any) -> None:
    """Check each field of a dataclass against its annotation: its type, then its bounds.

    A number must be finite, and a tuple as long as its type says.

    Raises:
        ValueError: A value is of another type or outside its bounds.
    """
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        require(_fits(value, bare(hint)), name, describe(bare(hint), value), value)
        for bound in bounds(hint):
            require(bound.holds(value), name, bound.expected, value)


def bare(hint: Any) -> Any:
    """The type that an annotation is about."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint


def bounds(hint: Any) -> list[Bound]:
    """The bounds of an annotation; none for a bare type."""
    return [item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Bound)]


def _fits(value: Any, hint: Any) -> bool:
    """Return whether `value` has the type `hint`; a float must be finite too."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            return False
        if parts[-1] is Ellipsis:
            return all(_fits(item, parts[0]) for item in value)
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if typing.get_origin(hint) is Literal:
        return value in parts
    if parts:  # X | None
        return any(_fits(value, part) for part in parts)
    if hint in (int, float):
        kinds = int if hint is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, hint)


def describe(hint: Any, got: Any) -> str:
    """Describe the type `hint` in words; for names, the one nearest to `got`."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return nearest(str(got), parts)
    if typing.get_origin(hint) in (tuple, list):
        number = len(parts) if typing.get_origin(hint) is tuple and parts[-1] is not Ellipsis else "any number"
        return f"a {typing.get_origin(hint).__name__} ({number} of: {describe(parts[0], got)})"
    if parts:
        return " or ".join(describe(part, got) for part in parts)
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text", type(None): "none"}
    return words.get(hint, f"a {getattr(hint, '__name__', hint)}")
