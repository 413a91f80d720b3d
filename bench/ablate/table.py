"""The parts of an ablation table."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Changes = Mapping[str, Any]  # config fields by dotted name, "model.mask_head"; a nested config is replaced as a whole


@dataclass(frozen=True)
class Drawn:
    """A data set of shapes (`tmask.data.shapes`), drawn when a run first needs it."""

    variant: str
    train_images: int = 2000
    val_images: int = 200
    size: int = 128  # pixels a side


@dataclass(frozen=True)
class Setting:
    """What all variants of a table share: a preset and the changes to it."""

    preset: str
    changes: Changes = field(default_factory=dict)
    shapes: Drawn | None = None  # None: the images of COCO, from a folder that the user names


@dataclass(frozen=True)
class Variant:
    """One row of a table: its changes to the setting."""

    label: str  # in tables and charts
    changes: Changes = field(default_factory=dict)
    published: str = ""  # the published figure


@dataclass(frozen=True)
class Claim:
    """The published direction: one variant is above another."""

    better: str
    worse: str
    metric: str
    published: float | str = ""  # the difference in points of AP, or in words; "": nobody published a direction
    small: bool = True  # False: a small data set is not expected to show it; the report says so


@dataclass(frozen=True, kw_only=True)
class Table:
    """The variants of one published table, and two settings to train them in."""

    title: str
    about: str  # the question, and why the small data set can answer it
    source: str  # of the published figures
    metrics: tuple[str, ...]  # keys of ``metrics.json``; report and chart show every seed's value of the first
    variants: Mapping[str, Variant]  # by folder name
    claims: tuple[Claim, ...]
    small: Setting  # at most 8 minutes a run on two CPU cores
    full: Setting  # for a GPU
    finding: str = ""  # what the published small result means; the page shows it below that result

    def __post_init__(self) -> None:
        for claim in self.claims:
            assert {claim.better, claim.worse} <= set(self.variants), claim
            assert claim.metric in self.metrics, claim


def names() -> list[str]:
    """Names of all tables: the files of `tables`."""
    return sorted(path.stem for path in (Path(__file__).parent / "tables").glob("[!_]*.py"))


def load(name: str) -> Table:
    """The table of that name."""
    table: Table = importlib.import_module(f"bench.ablate.tables.{name}").TABLE
    return table
