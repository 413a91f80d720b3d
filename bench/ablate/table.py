"""What a table of ablations is made of."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "tables"

Overrides = Mapping[str, Any]  # fields of a config, by name; one that holds a config in turn is replaced whole


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A data set of shapes (`tmask.data.shapes`), drawn when it is needed."""

    variant: str
    train_images: int
    val_images: int
    size: int  # pixels a side


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all variants of a table have in common: a preset, and what it changes of it."""

    preset: str
    shapes: Drawn | None = None  # none: COCO's images, in a folder that the user names
    model: Overrides = field(default_factory=dict)
    train: Overrides = field(default_factory=dict)
    data: Overrides = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row: what it changes, over the setting."""

    label: str  # as tables and charts show it
    published: str = ""  # its figure
    model: Overrides = field(default_factory=dict)
    train: Overrides = field(default_factory=dict)
    data: Overrides = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """That one variant is above another, as published: the direction that is looked for."""

    better: str
    worse: str
    metric: str
    published: float | str | None = None  # difference in points of AP, or in words; none: no direction was published
    small: bool = True  # whether a small data set can be expected to show it; if not, it is reported all the same


@dataclass(frozen=True, kw_only=True)
class Table:
    """The variants of one published table, and two settings to train them in."""

    title: str
    about: str  # what is asked, and why the small data set can answer
    source: str  # of the published figures
    metrics: tuple[str, ...]  # of ``metrics.json``; every seed's value of the first is shown and drawn
    variants: Mapping[str, Variant]  # by the name of their folder
    claims: tuple[Claim, ...]
    small: Setting  # a run of at most 8 minutes on two CPU cores
    full: Setting  # for a GPU
    finding: str = ""  # what its published small result means, in words; shown below that one alone

    def __post_init__(self) -> None:
        for claim in self.claims:
            assert {claim.better, claim.worse} <= set(self.variants), claim
            assert claim.metric in self.metrics, claim


def names() -> list[str]:
    """Of all tables: the files of `tables`."""
    return sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


def load(name: str) -> Table:
    """The table of that name."""
    table: Table = importlib.import_module(f"bench.ablate.tables.{name}").TABLE
    return table
