"""``tmask predict``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tmask.checks import at_least, check_fields, optional
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
from tmask.cli.options import Flag, options_of
from tmask.config import CountOrNone, Part, PrecisionName


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Options of ``tmask predict``."""

    checkpoint: str
    """File checkpoint.pt of a run."""
    images: str
    """Image, folder of images with its subfolders, or quoted glob."""
    out: str
    """Folder for predictions.json, images.json and the pictures."""
    overwrite: Flag = False
    """Forget what an earlier run left in --out."""
    score_threshold: Part = 0.5
    """Least score of a detection that is drawn."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda or cuda:N."""
    precision: PrecisionName | None = None
    """Precision of the features; null: as in training, or fp32 on a device that lacks it."""
    max_detections: CountOrNone = None
    """Most detections of an image; null: as in training."""
    annotations: str | None = None
    """COCO file whose image ids the results shall have; null: new ids."""
    exif: bool | None = None
    """Whether images are turned upright by their EXIF orientation; null: yes, with --annotations as in training."""
    pictures: Flag = True
    """Draw the detections; --no_pictures does not."""
    picture_parts: str = "masks,boxes,keypoints,labels,legend"
    """What pictures show: some of the parts of the default, with commas between them."""
    picture_side: Annotated[int | None, optional(at_least(128))] = None
    """Largest side of a picture in pixels; null: images keep their size, and small ones are enlarged."""
    picture_format: Literal["png", "jpeg"] = "png"
    """Format of the pictures."""

    def __post_init__(self) -> None:
        check_fields(self)


def predict_command(argv: list[str]) -> int:
    """Detect in an image, a folder or a glob; writes COCO results and pictures to --out."""
    args: PredictOptions = options_of(PredictOptions, "predict", predict_command, argv)
    device = usage(lambda: device_of(args.device))
    usage(lambda: check_precision(device, args.precision))
    usage(lambda: paths_exist(checkpoint=args.checkpoint, annotations=args.annotations))
    out = Path(args.out)
    check_out(out)

    from tmask.engine.checkpoint import load_model
    from tmask.engine.files import PICTURES_NAME, PREDICTIONS_NAME
    from tmask.engine.predict import find_images, image_records, predict
    from tmask.engine.record import OtherSettingsError
    from tmask.visualize import check_parts

    parts = [part.strip() for part in args.picture_parts.split(",") if part.strip()]
    usage(lambda: check_parts(parts, "--picture_parts"))
    files = usage(lambda: find_images(args.images))
    annotations = args.annotations
    known = usage(lambda: image_records(annotations, list(files))) if annotations else None
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
                picture_format=args.picture_format,
                picture_side=args.picture_side,
                picture_parts=parts,
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
