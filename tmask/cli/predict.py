"""``tmask predict``."""

from __future__ import annotations

from pathlib import Path

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


def predict_command(argv: list[str]) -> int:
    """Detect in an image, a folder or a glob; writes COCO results and pictures to --out."""
    from jsonargparse import ActionYesNo

    parser = make_parser("predict", predict_command)
    parser.add_argument("--checkpoint", type=str, required=True, help="checkpoint.pt of a run")
    parser.add_argument("--images", type=str, required=True, help="image, folder or quoted glob")
    parser.add_argument("--out", type=str, required=True, help="folder for predictions.json and the pictures")
    parser.add_argument(
        "--annotations", type=str | None, default=None, help="COCO file whose image ids the results shall have"
    )
    parser.add_argument(
        "--exif",
        type=bool | None,
        default=None,
        help="turn images upright by their EXIF orientation; null: yes, with --annotations as in training",
    )
    parser.add_argument("--pictures", action=ActionYesNo, default=True, help="draw the detections")
    parser.add_argument("--score_threshold", type=float, default=0.5, help="least score that is drawn")
    parser.add_argument("--max_detections", type=int | None, default=None, help="an image; null: as in training")
    parser.add_argument("--overwrite", action="store_true", help="forget what an earlier run left in --out")
    add_device(parser)
    args = parse(parser, argv)
    device = usage(lambda: device_of(args.device))
    usage(lambda: check_precision(device, args.precision))
    usage(lambda: paths_exist(checkpoint=args.checkpoint, annotations=args.annotations))
    out = Path(args.out)
    check_out(out)
    if not 0 <= args.score_threshold <= 1:
        raise UsageError(f"--score_threshold: expected in 0..1, got {args.score_threshold}")
    if args.max_detections is not None and args.max_detections < 1:
        raise UsageError(f"--max_detections: expected at least 1, got {args.max_detections}")

    from tmask.engine.checkpoint import load_model
    from tmask.engine.files import PICTURES_NAME, PREDICTIONS_NAME
    from tmask.engine.predict import find_images, image_records, predict
    from tmask.engine.record import OtherSettingsError

    files = usage(lambda: find_images(args.images))
    known = usage(lambda: image_records(args.annotations, list(files))) if args.annotations else None
    model, saved = load_model(args.checkpoint, device)
    if args.max_detections is not None:
        model.roi_heads.max_detections = args.max_detections
    precision = precision_of(device, args.precision, saved)
    memory = {"--max_detections": model.roi_heads.max_detections, "--precision": precision}
    again = "the same command" + (" without --overwrite" if args.overwrite else "")
    kept = f"what is done is in {out}, and {again} goes on there"
    try:
        with advising(memory, f"; {kept}, but other settings begin anew with --overwrite"):
            done = predict(
                model,
                files,
                saved["categories"],
                out_dir=out,
                device=device,
                precision=precision,
                score_threshold=args.score_threshold,
                pictures=args.pictures,
                coco_images=known,
                overwrite=args.overwrite,
                apply_exif=saved.get("exif") if known and args.exif is None else args.exif,
            )
    except OtherSettingsError as error:
        raise UsageError(str(error)) from error
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"interrupted; {kept}") from stop
    drawn = f", pictures in {out / PICTURES_NAME}" if args.pictures else ""
    print(f"{done.detections} detections in {done.images} images: {out / PREDICTIONS_NAME}{drawn}")
    return 0
