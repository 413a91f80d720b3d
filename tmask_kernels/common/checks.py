"""Checks of the arguments of the public ops. Each raises ``ValueError("op: argument: expected X, got Y")``.

A check reads types, shapes, dtypes and devices, never a value on a device, so it causes no host synchronisation and
works on fake tensors and under `torch.compile`. Numbers and sizes may be symbolic; numpy's numbers count as Python's.
A bool is no number. A check of a number returns it as Python's own type, since an op's schema takes no other.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
_BOOL = frozenset({torch.bool})
# The names of dtypes, as a message has them.
DTYPES = {
    "float": _FLOATS,
    "float or bool": _FLOATS | _BOOL,
    "real": _FLOATS | _INTEGERS,
    "real or bool": _FLOATS | _INTEGERS | _BOOL,
    "integer": _INTEGERS | _BOOL | {torch.uint16, torch.uint32, torch.uint64},
    "int64": frozenset({torch.int64}),
    "int32": frozenset({torch.int32}),
    "bool": _BOOL,
    "bool or uint8": frozenset({torch.bool, torch.uint8}),
}
# numpy's numbers are Integral or Real, and are asked for so: the package does without numpy.
_WHOLE: Any = (int, torch.SymInt, Integral)
_NUMBER: Any = (float, torch.SymFloat, Real, *_WHOLE)
_SYMBOLIC: Any = (torch.SymInt, torch.SymFloat)
_FINITE, _INT64 = sys.float_info.max, 2**63 - 1
_SHOWN = 100  # characters of a value


def wrong(op: str, name: str, expected: str, value: Any) -> ValueError:
    """Return the error to raise for `value` as the argument `name` of `op`."""
    return ValueError(f"{op}: {name}: expected {expected}, got {describe(value)}")


def describe(value: Any) -> str:
    """Return `value` in one short line. Tensors show dtype and shape alone: their elements may lie on a device."""
    if isinstance(value, Tensor):
        layout = "" if value.layout == torch.strided else f" {value.layout}"
        return f"{value.dtype} {list(value.shape)}{layout}"
    if isinstance(value, list | tuple):
        shown = ", ".join(describe(item) for item in value[:8]) + (", ..." if len(value) > 8 else "")
        text = f"[{shown}]" if isinstance(value, list) else f"({shown}{',' if len(value) == 1 else ''})"
    elif value is None or isinstance(value, (str, complex, *_NUMBER)) or _is_flag(value):
        # The repr of an int of thousands of digits is an error of Python's.
        text = repr(value) if not isinstance(value, int) or abs(value) < 10**_SHOWN else "a number of many digits"
    else:
        kind = value if isinstance(value, type) else type(value)
        text = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def check_tensor(
    op: str,
    name: str,
    value: Any,
    shape: Sequence[int | str],
    dtype: str = "real",
    *,
    device: torch.device | None = None,
    hint: str = "",
) -> None:
    """Check that `value` is a dense tensor of `shape`, of a dtype in ``DTYPES[dtype]`` and, if given, on `device`.

    Args:
        op: the public function, for the message, as in every check here.
        name: the argument's name.
        value: what the caller passed.
        shape: an axis each: its length, or a letter for any length. "..." as the first item is any number of axes.
        dtype: a key of `DTYPES`.
        device: the device of the other tensors; None means any.
        hint: text that the message adds to the expected shape.

    Raises:
        ValueError: `value` is something else.
    """
    if isinstance(value, Tensor):
        head = 1 if shape and shape[0] == "..." else 0
        axes = shape[head:]
        given = value.shape[value.ndim - len(axes) :] if head and value.ndim > len(axes) else value.shape
        if (
            len(given) == len(axes)
            and all(isinstance(want, str) or want == got for want, got in zip(axes, given, strict=True))
            and value.dtype in DTYPES[dtype]
            and value.layout == torch.strided
        ):
            if device is not None and value.device != device:
                raise ValueError(f"{op}: {name}: expected device {device}, got {value.device}")
            return
    kind = "" if isinstance(value, Tensor) else "a tensor, "
    raise wrong(op, name, f"{kind}{dtype} [{', '.join(str(item) for item in shape)}]{hint}", value)


def check_values(op: str, name: str, value: Tensor) -> None:
    """Check that a tensor has values; a meta tensor has none. For results whose length depends on values."""
    if value.device.type == "meta":
        raise ValueError(f"{op}: {name}: expected a tensor with values, got one on the device meta")


def check_number(
    op: str,
    name: str,
    value: Any,
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    expected: str = "",
) -> float:
    """Return `value` as a float. It must be finite, at least `low`, at most `high` and greater than `above`.

    `expected` replaces the message's own words for these bounds. An infinite `high` allows `value` to be infinite.
    """
    # numpy's floats would be compared in their own precision; an int may be beyond any float.
    # A number of a traced graph must not be asked for attributes.
    plain = isinstance(value, (int, float, *_SYMBOLIC))
    number = float(value) if not plain and isinstance(value, Real) and hasattr(value, "dtype") else value
    if (
        isinstance(number, _NUMBER)
        and not isinstance(number, bool)
        and (-_FINITE <= number <= _FINITE or number == high)  # `high` may be infinite
        and (low is None or number >= low)
        and (high is None or number <= high)
        and (above is None or number > above)
    ):
        return number if isinstance(number, _SYMBOLIC) else float(number)
    raise wrong(op, name, expected or _bounded("number", low, high, above), value)


def check_whole(op: str, name: str, value: Any, low: int | None = None, high: int = _INT64) -> int:
    """Return `value` as an int in `low` .. `high`. A float is an error, even 7.0."""
    if (
        isinstance(value, _WHOLE)
        and not isinstance(value, bool)
        and (low is None or value >= low)
        # In a traced graph the bound of int64 would be a guard on a size.
        and ((high == _INT64 and torch.compiler.is_compiling()) or -_INT64 <= value <= high)
    ):
        return value if isinstance(value, _SYMBOLIC) else int(value)
    raise wrong(op, name, _bounded("whole number", low, None if high == _INT64 else high, None), value)


def check_size(op: str, name: str, value: Any, low: int = 1, *, or_number: bool = False) -> tuple[int, int]:
    """Return `value` as (height, width), ints of at least `low`. `or_number` allows one number for both sides."""
    pair = value
    if or_number and not isinstance(value, Sequence):
        pair = (value, value)
    if isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2:
        try:
            return check_whole(op, name, pair[0], low), check_whole(op, name, pair[1], low)
        except ValueError:
            pass  # the message below shows the whole value, not one side
    number = "a whole number or " if or_number else ""
    raise wrong(op, name, f"{number}(height, width), whole numbers of at least {low}", value)


def check_flag(op: str, name: str, value: Any) -> bool:
    """Return `value` as a bool: True or False, also numpy's."""
    if _is_flag(value):
        return bool(value)
    raise wrong(op, name, "True or False", value)


def _is_flag(value: Any) -> bool:
    kind = type(value)
    return kind is bool or (kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_"))


def check_choice(op: str, name: str, value: Any, known: Sequence[str]) -> None:
    """Check that `value` is one of the words `known`."""
    if not isinstance(value, str) or value not in known:
        raise wrong(op, name, f"one of {', '.join(known)}", value)


def check_list(op: str, name: str, value: Any, expected: str, length: int | None = None) -> list[Any]:
    """Return a sequence as a list, of `length` items if given. Text, a tensor, an array or a mapping is an error."""
    if not isinstance(value, Sequence) or isinstance(value, str) or (length is not None and len(value) != length):
        way_out = f", such as list({name}.values())" if isinstance(value, Mapping) else ""
        raise wrong(op, name, expected + way_out, value)
    return list(value)


def check_numbers(op: str, name: str, value: Any, length: int | None = None, *, above: float) -> list[float]:
    """Return `value` as a list of finite numbers greater than `above`: `length` of them, or at least one."""
    expected = f"{'one or more' if length is None else length} finite numbers above {above:g}"
    items = check_list(op, name, value, expected, length)
    if not items:
        raise wrong(op, name, expected, value)
    return [check_number(op, f"{name}[{i}]", item, above=above) for i, item in enumerate(items)]


def _bounded(noun: str, low: float | None, high: float | None, above: float | None) -> str:
    """Return the bounds of a number in words."""
    if above is not None:
        return f"a {noun} in ({above:g}, {high:g}]" if high is not None else f"a finite {noun} above {above:g}"
    if low is not None:
        return f"a {noun} in {low:g}..{high:g}" if high is not None else f"a {noun} of at least {low:g}"
    return f"a {noun} of at most {high:g}" if high is not None else f"a {'finite ' if noun == 'number' else ''}{noun}"
