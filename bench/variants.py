"""Which variants a benchmark has: the product of its cases, modes, dtypes, layouts and providers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest

VARIANT = ("case", "mode", "dtype", "layout", "provider")


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

    "-" is a dtype or layout that does not matter.
    """
    return of_rows([row for row in itertools.product(cases, modes, dtypes, layouts, providers) if where(*row)])


def of_rows(rows: Sequence[tuple[str, ...]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(VARIANT, rows, ids=["-".join(row) for row in rows])
