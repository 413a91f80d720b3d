"""Which variants a benchmark has: the product of its cases, modes, dtypes, layouts and providers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest


def variants(
    *,
    cases: Sequence[str],
    providers: Sequence[str],
    modes: Sequence[str] = ("forward",),
    dtypes: Sequence[str] = ("fp32",),
    layouts: Sequence[str] = ("-",),
    where: Callable[..., bool] = lambda case, mode, dtype, layout, provider: True,
) -> pytest.MarkDecorator:
    """Parametrise ``test(case, mode, dtype, layout, provider, contest)``; `where` leaves combinations out.

    "-" stands for a dtype or layout that does not matter. Providers of one variant stand next to one another: they are
    timed in turn.
    """
    rows = [row for row in itertools.product(cases, modes, dtypes, layouts, providers) if where(*row)]
    return pytest.mark.parametrize(
        ("case", "mode", "dtype", "layout", "provider"), rows, ids=["-".join(row) for row in rows]
    )
