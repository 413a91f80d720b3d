"""``tmask train``. The preset has the defaults of the options, so it is read before the parser is made."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from tmask.checks import nearest
from tmask.cli.common import UsageError, check_out, check_precision, device_of, going_on, paths_exist, usage
from tmask.cli.options import add_device, describe_options, make_parser, parse, settings_of
from tmask.config import (
    CONVENTIONS,
    Convention,
    DataConfig,
    LossConfig,
    ModelConfig,
    RoIExtractorConfig,
    TrainConfig,
    from_dict,
)
from tmask.presets import PRESETS, TRAIN_PRESETS

DEFAULT_PRESET = "r50_fpn"
GROUPS = {
    "data": DataConfig,
    "train": TrainConfig,
    "model": ModelConfig,
    "model.convention": Convention,
    "model.roi_extractor": RoIExtractorConfig,
    "model.losses": LossConfig,
}
COMMON = (
    *("data.train_images", "data.train_annotations", "data.val_images", "data.val_annotations", "out", "config"),
    *("preset", "init", "resume", "overwrite", "train.steps", "train.batch_size", "train.lr", "device"),
)  # shown first


def train_command(argv: list[str]) -> int:
    """Train on a COCO data set; writes checkpoint, log, results and pictures to --out."""
    preset, argv, file = _expand(argv)
    args = parse(train_parser(preset), argv, file)
    if args.out is None:
        raise UsageError("--out is required: the folder of the run")
    if not isinstance(args.overwrite, bool):  # from a config file, which jsonargparse does not check for a flag
        raise UsageError(f"--overwrite: expected true or false, got {args.overwrite!r}")
    if args.init is not None and args.resume is not None:
        raise UsageError("--init begins a run and --resume goes on with one: give one of them")
    if args.train.only is not None and args.init is None and args.resume is None:
        raise UsageError(f"--train.only {args.train.only}: expected --init, the checkpoint of a detector")
    # Everything that can be wrong with the settings and paths is found before the first step.
    try:
        data = settings_of(DataConfig, "data", args)
        training = settings_of(TrainConfig, "train", args)
        device = device_of(args.device)
        check_precision(device, training.precision)
        from tmask.engine.dataset import augment, open_dataset
        from tmask.engine.files import CONFIG_NAME
        from tmask.engine.log import check_tensorboard
        from tmask.engine.train import check_no_run, train, write_config
        from tmask.weights import missing_weights

        check_tensorboard(training)
        if args.init is not None and not Path(args.init).exists():
            raise UsageError(missing_weights("--init", args.init))
        for name in ("train_images", "train_annotations"):
            if getattr(data, name) is None:
                raise UsageError(f"--data.{name} is required")
        names = ("train_images", "train_annotations", "val_images", "val_annotations")
        paths_exist(**{f"data.{name}": getattr(data, name) for name in names}, init=args.init, resume=args.resume)
    except ValueError as error:
        raise UsageError(str(error)) from error
    out = Path(args.out)
    check_out(out)
    if args.resume is None and not args.overwrite:
        usage(lambda: check_no_run(out))
    settings = args.model.as_dict()
    if settings["keypoints"] and data.vflip > 0:  # as `augment` says, but before the data are read
        raise UsageError(f"--data.vflip: expected 0 with --model.keypoints, got {data.vflip}")
    for option, value in (("data.mask_classes", data.mask_classes), ("train.only", training.only)):
        if value is not None and not settings["masks"]:
            raise UsageError(f"--{option}: expected null with --model.masks false, got {value!r}")
    train_set, val_set = (open_dataset(data, split, masks=settings["masks"]) for split in ("train", "val"))
    if settings["num_classes"] is None:
        settings["num_classes"] = train_set.num_classes
    if settings["keypoints"] is not None:
        _keypoints_of_data(settings["keypoints"], train_set)
    try:
        config = from_dict(ModelConfig, settings)
    except ValueError as error:
        raise UsageError(f"--model.{error}") from error
    augment(train_set, data, config)
    with going_on(out, args.device, _memory_options(config, training, data)):
        result = train(
            config,
            training,
            data,
            train_set,
            val_set,
            out_dir=out,
            device=device,
            init=args.init,
            resume=args.resume,
            overwrite=args.overwrite,
            on_start=lambda: write_config(out / CONFIG_NAME, args.preset, config, training, data),
        )
    _print_run(out, result, has_val=val_set is not None)
    return 0


def train_parser(preset: str) -> ArgumentParser:
    """The parser of ``tmask train`` with the defaults of a preset."""
    usage = "--data.train_images FOLDER --data.train_annotations FILE --out FOLDER"
    parser = make_parser("train", train_command, usage)
    common = parser.add_argument_group("common options")
    parser.add_argument("--config", action="config", metavar="FILE", help="YAML file with any of these settings.")
    presets = f"Named model and training to begin with. ({', '.join(PRESETS)}; default: %(default)s)"
    parser.add_argument("--preset", default=preset, metavar="NAME", help=presets)
    text = "Folder of the run; needed here or in the config file."
    parser.add_argument("--out", type=str | None, default=None, metavar="FOLDER", help=text)
    text = "Checkpoint, or torchvision's weights, to begin with."
    parser.add_argument("--init", type=str | None, default=None, metavar="FILE", help=text)
    text = "Checkpoint of a run to go on from."
    parser.add_argument("--resume", type=str | None, default=None, metavar="FILE", help=text)
    parser.add_argument("--overwrite", action="store_true", help="Train anew in a folder that holds a run.")
    add_device(parser)
    parser.add_class_arguments(DataConfig, "data")
    parser.add_class_arguments(TrainConfig, "train")
    parser.add_class_arguments(ModelConfig, "model", skip={"num_classes"})
    classes = "Number of classes with the background; null: as the training data has. (default: %(default)s)"
    parser.groups["model"].add_argument(
        "--model.num_classes", type=int | None, default=None, metavar="INT", help=classes
    )
    for group, config in GROUPS.items():
        describe_options(parser, group, config)
    settings = dataclasses.asdict(PRESETS[preset])
    del settings["num_classes"]
    parser.set_defaults({f"model.{name}": value for name, value in settings.items()})
    training = dataclasses.asdict(TRAIN_PRESETS[preset])
    parser.set_defaults({f"train.{name}": value for name, value in training.items()})
    for section in parser._action_groups:
        section._group_actions = [action for action in section._group_actions if action.dest not in COMMON]
    actions = {action.dest: action for action in parser._actions}
    actions["print_config"].help = "Print all settings, those of other options too, and exit."
    common._group_actions += [actions[name] for name in COMMON]
    parser._action_groups.sort(key=lambda section: section is not common)
    return parser


def _expand(argv: list[str]) -> tuple[str, list[str], dict[str, Any]]:
    """Prepare the command line for the parser.

    Returns:
        The name of the preset; `argv` with named conventions spelled out and the config file first, so that options
        override the file; the settings of the file.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--config")
    peek.add_argument("--preset")
    peek.add_argument("--model.convention", dest="convention")
    known, rest = peek.parse_known_args(argv)
    config: dict[str, Any] = {}
    if known.config is not None:
        config = _read_config(known.config)
    preset = known.preset or config.get("preset") or DEFAULT_PRESET
    if str(preset) not in PRESETS:
        raise UsageError(f"--preset: expected {nearest(str(preset), PRESETS)}, got {preset!r}")
    head = []
    if config:
        model = config.get("model")
        if isinstance(model, dict) and isinstance(model.get("convention"), str):
            model["convention"] = _convention(model["convention"])
        head += ["--config", json.dumps(config, default=str, skipkeys=True)]  # YAML also has dates, and any keys
    head += ["--preset", str(preset)]
    if known.convention is not None:
        named = not known.convention.lstrip().startswith("{")
        head += ["--model.convention", json.dumps(_convention(known.convention)) if named else known.convention]
    return str(preset), head + rest, config


def _read_config(path: str) -> dict[str, Any]:
    import yaml

    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not YAML: {error}") from error
    if config is not None and not isinstance(config, dict):
        raise UsageError(f"--config {path}: expected settings, got {type(config).__name__}")
    for group in ("model", "train", "data"):
        if config and not isinstance(config.get(group, {}), dict):
            raise UsageError(f"--config {path}: {group}: expected settings by name, got {config[group]!r}")
    if config and config.get("data", {}).get("check") is False:  # which YAML reads in off
        config["data"]["check"] = "off"
    return config or {}


def _convention(name: str) -> dict[str, Any]:
    if name not in CONVENTIONS:
        raise UsageError(f"--model.convention: expected {nearest(name, CONVENTIONS)}, got {name!r}")
    return dataclasses.asdict(CONVENTIONS[name])


def _keypoints_of_data(settings: dict[str, Any], train_set: Any) -> None:
    """Fill in the keypoint names of the data, in place, if `settings` has none, and their lines."""
    if train_set.keypoint_fault is not None:
        raise ValueError(train_set.keypoint_fault)
    if settings["names"] is None and train_set.keypoint_names:
        settings["names"] = train_set.keypoint_names
        if settings["edges"] is None:
            settings["edges"] = train_set.keypoint_edges


def _memory_options(model: ModelConfig, training: TrainConfig, data: DataConfig) -> dict[str, Any]:
    """Map the options that decide about the memory of a training to their values, the most effective first."""
    sizes = {"--data.min_sizes": data.min_sizes} if data.min_sizes else {"--model.min_size": model.min_size}
    return {
        "--train.batch_size": training.batch_size,
        **sizes,
        "--model.max_size": model.max_size,
        "--train.precision": training.precision,
        "--model.box_batch_size": model.box_batch_size,
        "--data.num_workers": data.num_workers,
    }


def _print_run(out: Path, result: Any, *, has_val: bool) -> None:
    from tmask.engine.evaluate import results_table
    from tmask.engine.files import PICTURES_NAME

    if has_val:
        print(results_table(result.metrics))
        print(f"pictures: {out / PICTURES_NAME}")
    print(f"checkpoint: {result.checkpoint} ({result.step} steps, {result.seconds:.0f} s of training)")
