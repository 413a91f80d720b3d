"""Rows of a result turned into comparisons with torchvision and with the aim, and numbers for people."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.result import Row

# Every name under which a provider of ours and of the baseline runs; all others are peers.
OURS = ("triton", "triton-graph", "tmask", "tmask-compile", "tmask-graph")
BASELINE = ("torchvision", "torchvision-compile")


@dataclass(frozen=True)
class Aim:
    """The aim of a case at full size on a GPU: `times` as fast as torchvision's best, `times_fp32` as fast as
    torchvision's best in fp32, in at most `us`, with at most `mib` of memory above the inputs."""

    times: float | None = None
    times_fp32: float | None = None
    us: float | None = None
    mib: float | None = None
    words: str = ""  # in place of these, where none says it

    def __str__(self) -> str:
        bounds = [f"≥ {self.times:g}x"] if self.times else []
        bounds += [f"≥ {self.times_fp32:g}x its fp32"] if self.times_fp32 else []
        bounds += [f"≤ {duration(self.us)}"] if self.us else []
        bounds += [f"≤ {self.mib:,.0f} MiB" if self.mib >= 100 else f"≤ {self.mib:.3g} MiB"] if self.mib else []
        return self.words or ", ".join(bounds)


@dataclass(frozen=True)
class Standing:
    """All rows of one op, case and mode, of every dtype and layout."""

    op: str
    case: str
    mode: str
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        """The case, and the mode where it is not forward."""
        return self.case if self.mode == "forward" else f"{self.case} {self.mode}"

    @property
    def aim(self) -> Aim | None:
        from bench.cases import CASES

        return CASES[self.case].aim(self.mode) if self.case in CASES else None

    @property
    def reduced(self) -> bool:
        return any(row.size != "full" for row in self.rows)

    def best(self, providers: Sequence[str] | None = None, dtype: str | None = None) -> Row | None:
        """The fastest timed row of `providers` (None: of all), in any layout and, if none is given, any dtype."""
        return fastest(
            row for row in self.rows if (providers is None or row.provider in providers) and dtype in (None, row.dtype)
        )

    @property
    def ours(self) -> Row | None:
        return self.best(OURS)

    @property
    def baseline(self) -> Row | None:
        """torchvision given its best setting."""
        return self.best(BASELINE)

    @property
    def speedup(self) -> float | None:
        return ratio(self.baseline, self.ours)

    @property
    def aim_speedup(self) -> float | None:
        """The aim as a speed-up, an aim in microseconds among it; None where that cannot be said."""
        aim, baseline = self.aim, self.baseline
        if aim is None or baseline is None or self.reduced:
            return None
        fp32 = self.best(BASELINE, "fp32")
        bounds = [
            aim.times or 0.0,
            aim.times_fp32 * baseline.median_us / fp32.median_us if aim.times_fp32 and fp32 else 0.0,
            baseline.median_us / aim.us if aim.us else 0.0,
        ]
        return max(bounds) or None

    @property
    def aim_met(self) -> bool | None:
        """None where it cannot be said: no aim in numbers, no time or memory to judge by, or not the full size."""
        aim, ours = self.aim, self.ours
        if aim is None or ours is None or self.reduced:
            return None
        parts: list[bool | None] = []
        if aim.times or aim.times_fp32:
            parts.append(self.speedup >= self.aim_speedup if self.speedup and self.aim_speedup else None)
        elif aim.us:
            parts.append(ours.median_us <= aim.us)
        if aim.mib:  # a graph's replay takes no memory of its own, so the fastest row that tells it counts
            peak = fastest(row for row in self.rows if row.provider in OURS and row.peak_mib is not None)
            parts.append(peak.peak_mib <= aim.mib if peak else None)
        return False if False in parts else all(parts) if parts and None not in parts else None


def standings(rows: Iterable[Row]) -> list[Standing]:
    """Return one standing for each op, case and mode, in the order of the rows."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.op, row.case, row.mode].append(row)
    return [Standing(*key, rows=tuple(group)) for key, group in groups.items()]


def fastest(rows: Iterable[Row]) -> Row | None:
    return min((row for row in rows if row.status == "timed"), key=lambda row: row.median_us, default=None)


def ratio(slow: Row | None, fast: Row | None) -> float | None:
    """How many times faster `fast` is; below 1 it is slower. None if either has no time."""
    return None if slow is None or fast is None else slow.median_us / fast.median_us


def digits(value: float) -> str:
    """Three significant digits, never an exponent: 0.123, 1.23, 12.3, 123, 1,230."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")
    decimals = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{decimals}f}"


def duration(microseconds: float) -> str:
    """9.87 us, 12.3 ms, 1.23 s."""
    for unit, size in (("us", 1.0), ("ms", 1e3)):
        if float(f"{microseconds / size:.3g}") < 1000:
            return f"{digits(microseconds / size)} {unit}"
    return f"{digits(microseconds / 1e6)} s"


def times(value: float) -> str:
    """A speed-up in words: a loss is called one."""
    text = f"{digits(value)}x"
    return f"{text} (slower)" if float(f"{value:.3g}") < 1 else text
