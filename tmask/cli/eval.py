"""``tmask eval``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from tmask.cli.common import (
    UsageError,
    add_device,
    advising,
    check_out,
    check_precision,
    device_of,
    make_parser,
    parse,
    paths_exist,
    precision_of,
    usage,
)


def eval_command(argv: list[str]) -> int:
    """Evaluate a checkpoint on a COCO data set: a table of average precision.

    As in training unless told otherwise, so it gives the figures that the run ended with.
    """
    parser = make_parser("eval", eval_command)
    parser.add_argument("--checkpoint", type=str, required=True, help="checkpoint.pt of a run")
    parser.add_argument("--images", type=str, required=True, help="folder of the images")
    parser.add_argument("--annotations", type=str, required=True, help="COCO annotation file")
    parser.add_argument("--out", type=str | None, default=None, help="folder for metrics.json and results.json")
    parser.add_argument(
        "--plots", type=str | None, default=None, help="folder for precision-recall curves and confusion matrices"
    )
    parser.add_argument(
        "--max_detections", type=int | None, default=None, help="an image, made and counted; null: as in training"
    )
    parser.add_argument(
        "--mask_classes",
        type=str | None,
        default=None,
        help="those with masks in training, to evaluate the others apart, as --data.mask_classes; null: as in training",
    )
    parser.add_argument(
        "--exif",
        type=bool | None,
        default=None,
        help="turn images by their EXIF orientation, as --data.exif; null: as in training",
    )
    parser.add_argument(
        "--crowds", type=Literal["ignore", "instances"], default="ignore", help="what iscrowd 1 is taken for"
    )
    parser.add_argument(
        "--check", type=Literal["full", "headers", "off"] | None, default=None, help="of the images, as --data.check"
    )
    parser.add_argument("--skip_bad", type=bool, default=False, help="leave out bad images, as --data.skip_bad")
    # Images of a batch are padded to one size, which reaches into the features at their borders.
    parser.add_argument("--batch_size", type=int | None, default=None, help="null: as in training")
    parser.add_argument("--num_workers", type=int, default=0)
    add_device(parser)
    args = parse(parser, argv)
    device = usage(lambda: device_of(args.device))
    usage(lambda: check_precision(device, args.precision))
    usage(lambda: paths_exist(checkpoint=args.checkpoint, images=args.images, annotations=args.annotations))
    for name, least in (("max_detections", 1), ("batch_size", 1), ("num_workers", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UsageError(f"--{name}: expected at least {least}, got {value}")
    if args.skip_bad and args.check == "off":
        raise UsageError("--check: expected 'full' or 'headers' with skip_bad, got 'off'")
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
