"""The runs of a table: their order, the config of each, and the folder that they share."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench.ablate.table import Setting, Table
from tmask.config import DataConfig, ModelConfig, TrainConfig, from_dict
from tmask.data.shapes import GENERATOR_VERSION
from tmask.demo import make_data
from tmask.engine.checkpoint import differences
from tmask.engine.files import part_of, replace_text
from tmask.presets import TRAIN_PRESETS, model_config

RECORD = "ablation.json"  # in the folder of a table: whose it is, and all its settings
LOCK, LOG = "lock", "ablate.log"  # who is at work there, and what a run in the background says
SETTINGS = "settings.yaml"  # in the folder of a run: what it trains with, for `tmask train --config`
TRAIN_SEED, VAL_SEED = 1, 2  # of drawn images; a seed of the table is that of weights, order and flips
COCO = {  # where COCO 2017 keeps them
    "train_images": "train2017",
    "train_annotations": "annotations/instances_train2017.json",
    "val_images": "val2017",
    "val_annotations": "annotations/instances_val2017.json",
}


@dataclass(frozen=True)
class Run:
    """One training of the table."""

    variant: str
    seed: int
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A table as it is asked for."""

    name: str
    table: Table
    out: Path
    seeds: int
    coco: Path | None = None  # the folder of COCO's images: then the full setting
    backbone_weights: Path | None = None  # ImageNet's, of the full setting

    @property
    def setting(self) -> Setting:
        return self.table.small if self.coco is None else self.table.full

    def runs(self) -> list[Run]:
        """All runs, the first seed of every variant first: a table that is broken off is still a fair one."""
        return [
            Run(variant, seed, self.out / variant / f"seed-{seed}")
            for seed in range(self.seeds)
            for variant in self.table.variants
        ]

    def configs(self, variant: str) -> dict[str, dict[str, Any]]:
        """Model, training and data of a variant, with every field. Seed and paths are left at their defaults."""
        setting, row = self.setting, self.table.variants[variant]
        model = dataclasses.asdict(model_config(setting.preset, **{**setting.model, **row.model}))
        del model["num_classes"]  # of the training data
        training = {**dataclasses.asdict(TRAIN_PRESETS[setting.preset]), **setting.train, **row.train}
        data = from_dict(DataConfig, {**setting.data, **row.data})
        return {
            "model": model | ({"backbone_weights": str(self.backbone_weights)} if self.backbone_weights else {}),
            "train": dataclasses.asdict(from_dict(TrainConfig, training)),
            "data": dataclasses.asdict(data),
        }

    def record(self) -> dict[str, Any]:
        """All that decides what comes out, but for the seeds: more of them may be added later."""
        setting = self.setting
        shapes = {**dataclasses.asdict(setting.shapes), "generator": GENERATOR_VERSION} if setting.shapes else None
        record = {
            "table": self.name,
            "preset": setting.preset,
            "shapes": shapes,
            "coco": str(self.coco) if self.coco else None,
            "variants": {variant: self.configs(variant) for variant in self.table.variants},
        }
        return json.loads(json.dumps(record))  # as a file gives it back: lists for tuples


def check_folder(plan: Plan) -> None:
    """Errors: ValueError for a folder that holds something else than this table in these settings."""
    out, path = plan.out, plan.out / RECORD
    if not path.is_file():
        ours = {LOCK, LOG, part_of(path).name}  # the last is what a kill leaves of the first file
        if out.is_dir() and {item.name for item in out.iterdir()} - ours:
            raise ValueError(f"--out {out}: expected an empty folder or one of this table, but it holds other files")
        return
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged: {error}") from error
    wanted = plan.record()
    if saved.get("table") != plan.name:
        raise ValueError(f"--out {out}: holds the table {saved.get('table')!r}, not {plan.name!r}")
    try:
        saved["variants"] = {variant: _completed(configs) for variant, configs in saved["variants"].items()}
    except ValueError as error:
        raise ValueError(f"--out {out}: holds this table in other settings: {error}") from error
    changed = differences(_flat(saved), _flat(wanted))
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ValueError(f"--out {out}: holds this table in other settings: {'; '.join(changed[:3])}{more}")


def _completed(configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`configs` of a record, with the defaults of settings that are younger. Errors: ValueError for unknown ones."""
    kinds = {"model": ModelConfig, "train": TrainConfig, "data": DataConfig}
    out = {name: dataclasses.asdict(from_dict(kind, configs[name])) for name, kind in kinds.items()}
    del out["model"]["num_classes"]
    return json.loads(json.dumps(out))


def check_data(plan: Plan) -> None:
    """Errors: ValueError if the full setting lacks a file."""
    if plan.coco is None:
        if plan.backbone_weights is not None:
            raise ValueError("--backbone_weights: only with --coco; the small setting trains from random weights")
        return
    for place in COCO.values():
        if not (plan.coco / place).exists():
            raise ValueError(f"--coco {plan.coco}: expected COCO 2017, but there is no {place}")
    if plan.backbone_weights is None:
        backbone = model_config(plan.setting.preset, **plan.setting.model).backbone
        raise ValueError(f"--backbone_weights: needed with --coco: torchvision's ImageNet weights of {backbone}")
    if not plan.backbone_weights.is_file():
        raise ValueError(f"--backbone_weights: no such file: {plan.backbone_weights}")


def prepare(plan: Plan) -> None:
    """Draw the data if it is not there, and write the record and the settings of every run."""
    plan.out.mkdir(parents=True, exist_ok=True)
    replace_text(plan.out / RECORD, json.dumps(plan.record(), indent=1))
    paths = data_paths(plan)
    for run in plan.runs():
        configs = plan.configs(run.variant)
        configs["train"]["seed"] = run.seed
        configs["data"] |= paths
        values = json.loads(json.dumps({"preset": plan.setting.preset, **configs}))  # YAML's safe writer has no tuples
        replace_text(run.folder / SETTINGS, yaml.safe_dump(values, sort_keys=False))


def data_paths(plan: Plan) -> dict[str, str]:
    """Where the images and annotations are, by the fields of DataConfig; drawn ones are drawn if need be."""
    if plan.coco is not None:
        return {name: str(plan.coco / place) for name, place in COCO.items()}
    shapes = plan.setting.shapes
    assert shapes is not None, "a small setting has drawn images"
    paths = {}
    counts = {"train": (shapes.train_images, TRAIN_SEED), "val": (shapes.val_images, VAL_SEED)}
    for split, (count, seed) in counts.items():
        images, annotations = make_data(
            plan.out / "data" / split, num_images=count, seed=seed, size=shapes.size, variant=shapes.variant
        )
        paths |= {f"{split}_images": str(images), f"{split}_annotations": str(annotations)}
    return paths


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    parts: Sequence[dict[str, Any]] = [
        _flat(value, f"{prefix}.{name}" if prefix else name) for name, value in values.items()
    ]
    return {name: value for part in parts for name, value in part.items()}
