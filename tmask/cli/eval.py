"""``tmask eval``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tmask.checks import check_fields
from tmask.cli.common import (
    UsageError,
    advising,
    check_out,
    check_precision,
    device_of,
    paths_exist,
    precision_of,
    usage,
)
from tmask.cli.options import options_of
from tmask.config import CheckName, CountOrNone, CountOrZero, CrowdsName, PrecisionName, check_skip_bad


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Options of ``tmask eval``. None means as in training, so the figures are the last figures of the run."""

    checkpoint: str
    """File checkpoint.pt of a run."""
    images: str
    """Folder of the images."""
    annotations: str
    """COCO annotation file of the images."""
    out: str | None = None
    """Folder for metrics.json and results.json; null: no files."""
    plots: str | None = None
    """Folder for precision-recall curves and confusion matrices; null: no pictures."""
    # Images of a batch are padded to one size, which reaches into the features at their borders.
    batch_size: CountOrNone = None
    """Images of a batch; null: as in training."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda or cuda:N."""
    precision: PrecisionName | None = None
    """Precision of the features; null: as in training, or fp32 on a device that lacks it."""
    max_detections: CountOrNone = None
    """Detections of an image that the model makes and the evaluation counts; null: as in training."""
    mask_classes: str | None = None
    """Classes with masks in training, to evaluate the others apart, as --data.mask_classes; null: as in training."""
    exif: bool | None = None
    """Whether images are turned by their EXIF orientation, as --data.exif; null: as in training."""
    crowds: CrowdsName = "ignore"
    """What annotations with iscrowd 1 are taken for."""
    check: CheckName | None = None
    """What is read of each image before the first batch, as --data.check; null: headers, or full with skip_bad."""
    skip_bad: bool = False
    """Whether bad images are left out, as --data.skip_bad; else they are an error."""
    num_workers: CountOrZero = 0
    """Processes that load the data; 0: the command's own process."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_skip_bad(self)


def eval_command(argv: list[str]) -> int:
    """Evaluate a checkpoint on a COCO data set: a table of average precision.

    Without options everything is as in training, so the figures are the last figures of the run.
    """
    args: EvalOptions = options_of(EvalOptions, "eval", eval_command, argv)
    device = usage(lambda: device_of(args.device))
    usage(lambda: check_precision(device, args.precision))
    usage(lambda: paths_exist(checkpoint=args.checkpoint, images=args.images, annotations=args.annotations))
    out = Path(args.out) if args.out is not None else None
    if out:
        check_out(out)
    if args.plots is not None:
        check_out(Path(args.plots), "plots")

    from tmask.config import DataConfig
    from tmask.data.coco import check_keypoint_names
    from tmask.data.loader import make_loader
    from tmask.data.mask_classes import mask_category_ids
    from tmask.engine.checkpoint import load_model
    from tmask.engine.dataset import check_categories, open_dataset, use_labels
    from tmask.engine.evaluate import evaluate, results_table, warn_limits
    from tmask.engine.files import METRICS_NAME, RESULTS_NAME, replace_text

    model, saved = load_model(args.checkpoint, device)
    training = saved["train_config"] or {}  # None: written by hand
    if args.mask_classes is not None and not model.config.masks:
        raise UsageError(f"--mask_classes: expected null, as the model has no masks, got {args.mask_classes!r}")
    check_categories(model.config.num_classes, saved["categories"])
    data = DataConfig(
        val_images=args.images,
        val_annotations=args.annotations,
        crowds=args.crowds,
        exif=saved.get("exif") if args.exif is None else args.exif,
        check=args.check,
        skip_bad=args.skip_bad,
        num_workers=args.num_workers,
    )
    dataset = open_dataset(data, "val", masks=model.config.masks)
    boxes_only = {item["id"] for item in saved["categories"] if item.get("boxes_only")}
    if args.mask_classes is not None:
        masked = mask_category_ids(args.mask_classes, saved["categories"])
        boxes_only = {item["id"] for item in saved["categories"]} - masked
    boxes_only = use_labels(dataset, saved["categories"], boxes_only)
    if model.config.keypoints is not None:
        check_keypoint_names(dataset, model.config.keypoints.skeleton.names, train=False)
    batch_size = args.batch_size or training.get("batch_size", 1)
    loader = make_loader(
        dataset,
        model.transform,
        batch_size=batch_size,
        shuffle=False,
        num_workers=args.num_workers,
    )
    max_detections = args.max_detections
    if max_detections is None:
        max_detections = training.get("eval_max_detections", 100)
    else:
        model.roi_heads.max_detections = max_detections
    precision = precision_of(device, args.precision, saved)
    memory = {
        "--batch_size": batch_size,
        "--max_detections": model.roi_heads.max_detections,
        "--precision": precision,
        "--num_workers": args.num_workers,
    }
    limit = "--max_detections"
    warn_limits(dataset, model, max_detections, options=(limit, limit, "model.rpn_post_nms_top_n_test of the training"))
    with advising(memory):
        metrics = evaluate(
            model,
            loader,
            dataset,
            max_detections=max_detections,
            device=device,
            precision=precision,
            results_file=out / RESULTS_NAME if out else None,
            boxes_only=boxes_only,
            plots=args.plots,
        )
    if out:
        replace_text(out / METRICS_NAME, json.dumps(metrics, indent=1))
    print(results_table(metrics))
    return 0
