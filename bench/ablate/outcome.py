"""What the folder of a table holds so far, as one JSON result."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from bench.ablate.plan import SETTINGS, Plan, Run
from bench.ablate.table import Setting, Table, Variant
from bench.machine import checkout
from tmask.data.mask_classes import mask_category_ids
from tmask.engine.log import read_log
from tmask.engine.report import LOG_NAME
from tmask.engine.run import METRICS_NAME
from tmask.engine.train import CHECKPOINT_NAME

VERSION = 1
TRAIN_LOG = "train.log"  # what the training said, in the folder of a run
TRAINED_BY = "trained_by.txt"  # device, torch and commit; a run that was broken off may have two lines
FAILED = "failed.txt"  # why it failed; gone as soon as it is tried again
DONE, BROKEN, BEGUN, WAITING = "done", "failed", "begun", "waiting"


def state(run: Run) -> str:
    """How far a run is. It is done once it has metrics, which a training writes last and whole."""
    if (run.folder / METRICS_NAME).is_file():
        return DONE
    if (run.folder / FAILED).is_file():
        return BROKEN
    return BEGUN if (run.folder / CHECKPOINT_NAME).is_file() else WAITING


def result(plan: Plan) -> dict[str, Any]:
    """The settings of the table and what each run has come to. Figures are COCO's, 0..1."""
    return {
        "version": VERSION,
        "table": plan.name,
        "setting": "small" if plan.coco is None else "full",
        "seeds": plan.seeds,
        "settings": shared(plan.table, plan.setting),
        "runs": [run_result(run, plan) for run in plan.runs()],
    }


def shared(table: Table, setting: Setting) -> dict[str, Any]:
    """What the runs have in common and in what they differ, as the file of the table has it."""
    shapes = vars(setting.shapes) if setting.shapes else None
    variants = {name: _changed(variant) for name, variant in table.variants.items()}
    return {"preset": setting.preset, "shapes": shapes, "changed": _changed(setting), "variants": variants}


def _changed(part: Setting | Variant) -> dict[str, Any]:
    groups = {"model": part.model, "train": part.train, "data": part.data}
    changed = {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()}
    return json.loads(json.dumps(changed))  # as a file gives it back: lists for tuples


def run_result(run: Run, plan: Plan) -> dict[str, Any]:
    """What one run has come to: its state, and its figures or why it failed."""
    found: dict[str, Any] = {"variant": run.variant, "seed": run.seed, "state": state(run)}
    if found["state"] == DONE:
        metrics = json.loads((run.folder / METRICS_NAME).read_text(encoding="utf-8"))
        metrics = _apart(metrics, run, plan.setting.data.get("mask_classes")) | metrics
        found["metrics"] = {name: value for name, value in metrics.items() if name.count("/") == 1}  # not each class's
        found["minutes"] = training_minutes(run.folder)
        found["trained_by"] = trained_by(run)
    if found["state"] == BROKEN:
        found["reason"] = (run.folder / FAILED).read_text(encoding="utf-8").strip()
        found["log"] = str((run.folder / TRAIN_LOG).relative_to(plan.out))
    return found


def trained_by(run: Run) -> list[str]:
    """Device, torch and commit of a run; several if it was broken off and went on with others."""
    path = run.folder / TRAINED_BY
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _apart(metrics: dict[str, float], run: Run, mask_classes: str | None) -> dict[str, float]:
    """AP of the classes with and without masks in the setting, also of a run that learnt from the masks of all."""
    if mask_classes is None:
        return {}
    settings = yaml.safe_load((run.folder / SETTINGS).read_text(encoding="utf-8"))
    annotations = json.loads(Path(settings["data"]["val_annotations"]).read_text(encoding="utf-8"))
    masked = mask_category_ids(mask_classes, annotations["categories"])
    groups: dict[str, list[float]] = {"segm/AP_with_masks": [], "segm/AP_boxes_only": []}
    for category in annotations["categories"]:
        value = metrics.get(f"segm/AP/{category['name']}", -1)
        if value >= 0:  # else there is none in the images
            groups["segm/AP_with_masks" if category["id"] in masked else "segm/AP_boxes_only"].append(value)
    return {name: statistics.fmean(found) for name, found in groups.items() if found}


def training_minutes(folder: Path) -> float | None:
    """The time of a run's steps, also of one that went on after a break; none without a log."""
    seconds, before = 0.0, 0
    for row in log_rows(folder):
        seconds += row["seconds_per_step"] * (row["step"] - before)
        before = row["step"]
    return round(seconds / 60, 2) if before else None


def log_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of a run's log that tell of steps."""
    path = folder / LOG_NAME
    if path.is_file():
        yield from (row for row in read_log(path) if "seconds_per_step" in row)


def machine() -> str:
    """What trains here: device, torch and the commit of this checkout."""
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"CPU, {len(os.sched_getaffinity(0))} cores"
    return f"{device}, torch {torch.__version__}, commit {checkout()}"
