"""Whether a published direction came out: the rule, and the spread it goes by."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

FACTOR = 2.0  # standard errors that a difference must reach

RULE = (
    "A direction *came out* if the difference of the means has the published sign and is at least "
    f"{FACTOR:g} standard errors; it *did not* if it is at least as large with the other sign; else it lies *within "
    "the spread*. The standard error is sqrt(s1²/n1 + s2²/n2), with the standard deviations s and numbers n of the "
    "seeds. Where nothing but chance differs, three seeds reach that in about 6 of 100 comparisons on each side. Where "
    "no direction was published, the words are *above* and *below*."
)


@dataclass(frozen=True)
class Spread:
    """The values of some seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the sample; none of fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Verdict:
    """How one variant stands to another, in the unit of the values."""

    word: str
    difference: float | None = None  # of the means; none while one of them has no value
    error: float | None = None  # its standard error; none with fewer than two seeds on either side


def judge(better: Sequence[float], worse: Sequence[float], *, published: bool) -> Verdict:
    """By ``RULE``. Without a published figure there is no direction to come out, and the word says which is above."""
    if not better or not worse:
        return Verdict("no result yet")
    a, b = Spread(tuple(better)), Spread(tuple(worse))
    difference = a.mean - b.mean
    if a.deviation is None or b.deviation is None:
        return Verdict("one seed, no spread", difference)
    error = math.sqrt(a.deviation**2 / len(better) + b.deviation**2 / len(worse))
    if difference == 0 or abs(difference) < FACTOR * error:
        return Verdict("within the spread", difference, error)
    words = ("came out", "did not come out") if published else ("above", "below")
    return Verdict(words[difference < 0], difference, error)
