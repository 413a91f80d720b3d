"""How far a long loop is, on stderr: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")

_LINE_SECONDS = 30.0  # between lines


def progress(items: Iterable[T], task: str, unit: str) -> Iterator[T]:
    """The items one after another. `task` is what is done with them, and `unit` what one is."""
    from tqdm import tqdm

    total = len(items) if isinstance(items, Sized) else None
    if total == 0:
        return
    of_total = "" if total is None else f"/{total}"
    start = last = time.monotonic()
    # disable=None: the bar shows on a terminal only. leave=None: below the bar of a training it goes when it is full.
    bar = tqdm(items, desc=task, unit=unit, disable=None, leave=None, file=sys.stderr)
    for count, item in enumerate(bar, start=1):
        yield item
        now = time.monotonic()
        if now - last >= _LINE_SECONDS and not sys.stderr.isatty():
            last = now
            rate = count / (now - start)
            print(f"{task}: {unit} {count}{of_total}  {rate:.2f} {unit}/s", file=sys.stderr, flush=True)
