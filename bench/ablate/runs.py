"""The runs of a table: their configs, the folder they share, and what that folder holds so far."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench.ablate.table import Setting, Table
from tmask.config import DataConfig, TrainConfig, from_dict
from tmask.data.mask_classes import mask_category_ids
from tmask.demo import make_data
from tmask.engine.checkpoint import differences
from tmask.engine.files import CHECKPOINT_NAME, LOG_NAME, METRICS_NAME, part_of, replace_text
from tmask.engine.log import read_log
from tmask.presets import TRAIN_PRESETS, model_config

VERSION = 1  # of a result
RESULT, LOG = "result.json", "ablate.log"  # of a table: settings and outcomes; its output in the background
SETTINGS, TRAIN_LOG, TRAINED_BY = "settings.yaml", "train.log", "trained_by.txt"  # in the folder of a run
FAILED = "failed.txt"  # why the training failed, until the next attempt
DONE, BROKEN, BEGUN, WAITING = "done", "failed", "begun", "waiting"
COCO = {  # paths inside COCO 2017 as published
    "train_images": "train2017",
    "train_annotations": "annotations/instances_train2017.json",
    "val_images": "val2017",
    "val_annotations": "annotations/instances_val2017.json",
}


@dataclass(frozen=True)
class Run:
    """One training: one variant with one seed."""

    variant: str
    seed: int
    folder: Path

    @property
    def state(self) -> str:
        """DONE as soon as there are metrics: a training writes them last, and whole."""
        for name, state in ((METRICS_NAME, DONE), (FAILED, BROKEN), (CHECKPOINT_NAME, BEGUN)):
            if (self.folder / name).is_file():
                return state
        return WAITING

    def trained_by(self) -> list[str]:
        """Device, torch and commit; several lines if another machine continued the run."""
        path = self.folder / TRAINED_BY
        return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []

    def minutes(self) -> float | None:
        """The minutes of all steps in the training's log, breaks not counted; None without a step."""
        steps, seconds = 0, 0.0
        path = self.folder / LOG_NAME
        for row in read_log(path) if path.is_file() else ():
            if "seconds_per_step" in row:
                seconds += row["seconds_per_step"] * (row["step"] - steps)
                steps = row["step"]
        return round(seconds / 60, 2) if steps else None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A table as the user asks for it."""

    table: Table
    out: Path
    seeds: int
    coco: Path | None = None  # folder of COCO 2017: selects the full setting
    backbone_weights: Path | None = None  # ImageNet weights for the full setting

    @property
    def setting(self) -> Setting:
        return self.table.small if self.coco is None else self.table.full

    def runs(self) -> list[Run]:
        """All runs, the first seed of every variant first: a table that is broken off is still a fair one."""
        pairs = ((variant, seed) for seed in range(self.seeds) for variant in self.table.variants)
        return [Run(variant, seed, self.out / variant / f"seed-{seed}") for variant, seed in pairs]

    def configs(self, variant: str) -> dict[str, dict[str, Any]]:
        """Every field of the model, train and data configs. Seed and paths keep their defaults."""
        preset = self.setting.preset
        own: dict[str, dict[str, Any]] = {"model": {}, "train": {}, "data": {}}
        for name, value in {**self.setting.changes, **self.table.variants[variant].changes}.items():
            group, _, field = name.partition(".")
            own[group][field] = value
        if self.backbone_weights:
            own["model"]["backbone_weights"] = str(self.backbone_weights)
        train = dataclasses.asdict(TRAIN_PRESETS[preset]) | own["train"]
        parts = {
            "model": model_config(preset, **own["model"]),
            "train": from_dict(TrainConfig, train),
            "data": from_dict(DataConfig, own["data"]),
        }
        configs: dict[str, Any] = json.loads(json.dumps(parts, default=dataclasses.asdict))
        del configs["model"]["num_classes"]  # the training data decide it
        return configs

    def metrics(self, run: Run) -> dict[str, float]:
        """The figures over all classes.

        If the setting leaves some classes without masks, also the AP of the classes with and without masks. Only a run
        that learnt from all masks needs that: the metrics of the others have these two figures already.
        """
        metrics = json.loads((run.folder / METRICS_NAME).read_text(encoding="utf-8"))
        if (mask_classes := self.setting.changes.get("data.mask_classes")) is not None:
            paths = yaml.safe_load((run.folder / SETTINGS).read_text(encoding="utf-8"))["data"]
            categories = json.loads(Path(paths["val_annotations"]).read_text(encoding="utf-8"))["categories"]
            masked = mask_category_ids(mask_classes, categories)
            for name, has_masks in (("segm/AP_with_masks", True), ("segm/AP_boxes_only", False)):
                some = [f"segm/AP/{item['name']}" for item in categories if (item["id"] in masked) == has_masks]
                values = [metrics[key] for key in some if metrics.get(key, -1) >= 0]  # -1: no such object in the images
                if values:
                    metrics.setdefault(name, statistics.fmean(values))
        return {name: value for name, value in metrics.items() if name.count("/") == 1}  # else it is of one class


def settings(table: Table, setting: Setting) -> dict[str, Any]:
    """The settings as ``tables.yaml`` has them, for a result."""
    return {
        "preset": setting.preset,
        "shapes": setting.shapes,
        "changed": setting.changes,
        "variants": {name: variant.changes for name, variant in table.variants.items()},
    }


def check(plan: Plan) -> None:
    """Check data and folder before anything is written.

    Raises:
        ValueError: COCO or the weights are missing, or the folder holds something else than this table.
    """
    weights = plan.backbone_weights
    for place in COCO.values() if plan.coco else ():
        if not (plan.coco / place).exists():
            raise ValueError(f"--coco {plan.coco}: expected COCO 2017, but there is no {place}")
    if plan.coco is None and weights is not None:
        raise ValueError("--backbone_weights: only with --coco; the small setting trains from random weights")
    if plan.coco is not None and weights is None:
        backbone = plan.configs(next(iter(plan.table.variants)))["model"]["backbone"]
        raise ValueError(f"--backbone_weights: needed with --coco: torchvision's ImageNet weights of {backbone}")
    if weights is not None and not weights.is_file():
        raise ValueError(f"--backbone_weights: no such file: {weights}")
    out, path = f"--out {plan.out}", plan.out / RESULT
    if not path.is_file():
        ours = {"lock", ".tmask.lock", LOG, part_of(path).name}  # a killed table may leave these and no result
        if plan.out.is_dir() and {item.name for item in plan.out.iterdir()} - ours:
            raise ValueError(f"{out}: expected an empty folder or one of this table, but it holds other files")
        return
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged: {error}") from error
    if saved.get("table") != plan.table.name:
        raise ValueError(f"{out}: holds the table {saved.get('table')!r}, not {plan.table.name!r}")
    if changed := differences(saved["settings"], settings(plan.table, plan.setting)):
        raise ValueError(f"{out}: holds this table in other settings: {'; '.join(changed)}")


def prepare(plan: Plan) -> None:
    """Draw missing data, and write the settings of every run."""
    paths = data_paths(plan)
    for run in plan.runs():
        configs = plan.configs(run.variant)
        configs["train"]["seed"] = run.seed
        configs["data"] |= paths
        text = yaml.safe_dump({"preset": plan.setting.preset, **configs}, sort_keys=False)
        replace_text(run.folder / SETTINGS, text)


def data_paths(plan: Plan) -> dict[str, str]:
    """The path fields of DataConfig. Draws the images of a small setting if they are missing."""
    if plan.coco is not None:
        return {name: str(plan.coco / place) for name, place in COCO.items()}
    shapes = plan.setting.shapes
    assert shapes is not None, "a small setting has drawn images"
    paths = {}
    # These seeds draw images. The seed of a run decides weights, order and flips.
    for split, seed in (("train", 1), ("val", 2)):
        drawn = {"num_images": shapes[f"{split}_images"], "size": shapes["size"], "variant": shapes["variant"]}
        images, annotations = make_data(plan.out / "data" / split, seed=seed, **drawn)
        paths |= {f"{split}_images": str(images), f"{split}_annotations": str(annotations)}
    return paths


def result(plan: Plan) -> dict[str, Any]:
    """The settings of the table and the outcome of each run, as JSON. Figures are COCO's, 0..1."""
    return {
        "version": VERSION,
        "table": plan.table.name,
        "setting": "small" if plan.coco is None else "full",
        "seeds": plan.seeds,
        "settings": settings(plan.table, plan.setting),
        "runs": [_outcome(run, plan) for run in plan.runs()],
    }


def _outcome(run: Run, plan: Plan) -> dict[str, Any]:
    found: dict[str, Any] = {"variant": run.variant, "seed": run.seed, "state": run.state}
    if found["state"] == DONE:
        found |= {"metrics": plan.metrics(run), "minutes": run.minutes(), "trained_by": run.trained_by()}
    if found["state"] == BROKEN:
        reason = (run.folder / FAILED).read_text(encoding="utf-8").strip()
        found |= {"reason": reason, "log": str((run.folder / TRAIN_LOG).relative_to(plan.out))}
    return found
