"""The parts of an ablation table; `tables.yaml` holds all tables."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Changes = Mapping[str, Any]  # config fields by dotted name, "model.mask_head"; a nested config is replaced as a whole


@dataclass(frozen=True)
class Setting:
    """What all variants of a table share: a preset and the changes to it."""

    preset: str
    changes: Changes = field(default_factory=dict)
    shapes: Mapping[str, Any] | None = None  # of `tmask.data.shapes`; None: the user's COCO


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

    name: str
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


@functools.cache
def tables() -> dict[str, Table]:
    """Return all tables by name."""
    texts = yaml.safe_load(Path(__file__).with_name("tables.yaml").read_text(encoding="utf-8"))["tables"]
    return {
        name: Table(
            name=name,
            metrics=tuple(values.pop("metrics")),
            variants={key: Variant(**variant) for key, variant in values.pop("variants").items()},
            claims=tuple(Claim(**claim) for claim in values.pop("claims")),
            small=Setting(**values.pop("small")),
            full=Setting(**values.pop("full")),
            **values,
        )
        for name, values in sorted(texts.items())
    }
