"""``tmask demo``: from nothing to a trained detector and its pictures, on a data set of drawn shapes."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from tmask.checks import at_least, check_fields
from tmask.config import Count, CountOrZero, DataConfig, PrecisionName, Weight
from tmask.data.shapes import MIN_IMAGE_SIZE
from tmask.presets import PRESETS, TRAIN_PRESETS

PRESET = "tiny"
TRAIN_SEED, VAL_SEED = 1, 2  # of the pictures: disjoint sets
DATA_NAME = "shapes"
_MARK = "complete.json"  # written last, so a half-written data set is made anew


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings of the demo; each is an option of the command line."""

    out: str = "runs/demo"
    """Folder of the run."""
    steps: Count = 1200
    """Training steps."""
    batch_size: Count = 8
    """Images of a batch."""
    lr: Weight = 1e-3
    """Highest learning rate."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda or cuda:N."""
    precision: PrecisionName = "bf16"
    """Precision of the features; boxes are always fp32."""
    train_images: Count = 4000
    """Pictures to train on."""
    val_images: Count = 200
    """Pictures to evaluate on."""
    image_size: Annotated[int, at_least(MIN_IMAGE_SIZE)] = 128
    """Side of the pictures, in pixels."""
    seed: int = 0
    """Seed of weights and data order."""
    num_workers: CountOrZero = 0
    """Processes that load the data; 0: the training process itself."""

    def __post_init__(self) -> None:
        check_fields(self)


def run_demo(config: DemoConfig, *, device: torch.device) -> dict[str, float]:
    """Make (or reuse) the data, train, evaluate, draw, print the results, and return the metrics."""
    from tmask.engine.dataset import augment, open_dataset
    from tmask.engine.evaluate import results_table
    from tmask.engine.files import CONFIG_NAME, PICTURES_NAME
    from tmask.engine.train import train, write_config

    began = time.perf_counter()
    out = Path(config.out)
    train_images, train_annotations = make_data(
        out / DATA_NAME / "train", num_images=config.train_images, seed=TRAIN_SEED, size=config.image_size
    )
    val_images, val_annotations = make_data(
        out / DATA_NAME / "val", num_images=config.val_images, seed=VAL_SEED, size=config.image_size
    )
    data = DataConfig(
        train_images=str(train_images),
        train_annotations=str(train_annotations),
        val_images=str(val_images),
        val_annotations=str(val_annotations),
        num_workers=config.num_workers,
    )
    train_set, val_set = open_dataset(data, "train"), open_dataset(data, "val")
    model = dataclasses.replace(PRESETS[PRESET], num_classes=train_set.num_classes)
    augment(train_set, data, model)
    training = dataclasses.replace(
        TRAIN_PRESETS[PRESET],
        steps=config.steps,
        batch_size=config.batch_size,
        lr=config.lr,
        precision=config.precision,
        seed=config.seed,
    )
    prepared = time.perf_counter() - began
    result = train(
        model,
        training,
        data,
        train_set,
        val_set,
        out_dir=out,
        device=device,
        on_start=lambda: write_config(out / CONFIG_NAME, PRESET, model, training, data),
    )
    total = time.perf_counter() - began
    print(results_table(result.metrics))
    rest = total - prepared - result.seconds
    print(f"seconds: data {prepared:.0f}, training {result.seconds:.0f}, evaluation and pictures {rest:.0f}")
    print(f"pictures (prediction beside ground truth): {out / PICTURES_NAME}")
    return result.metrics


def make_data(folder: Path, *, num_images: int, seed: int, size: int, variant: str = "mixed") -> tuple[Path, Path]:
    """Draw shapes as a COCO data set in `folder` and return the images folder and the annotation file.

    A complete data set of the same settings and version of the generator is reused.
    """
    from tmask.data.shapes import GENERATOR_VERSION, write_shapes

    drawn: dict[str, Any] = {"num_images": num_images, "seed": seed, "size": size, "variant": variant}
    wanted = {**drawn, "generator": GENERATOR_VERSION}
    mark = folder / _MARK
    if mark.is_file():
        found = json.loads(mark.read_text(encoding="utf-8"))
        images, annotations = folder / found.pop("images"), folder / found.pop("annotations")
        if found == wanted and annotations.is_file() and len(list(images.iterdir())) >= num_images:
            return images, annotations
    mark.unlink(missing_ok=True)
    images, annotations = (Path(path) for path in write_shapes(folder, **drawn))
    places = {"images": str(images.relative_to(folder)), "annotations": str(annotations.relative_to(folder))}
    mark.write_text(json.dumps(wanted | places), encoding="utf-8")
    return images, annotations
