"""The command line: ``tmask train | eval | predict | demo | validate | info``.

Each command has its own parser, built when it is called. `train` builds its parser twice over: what ``--preset`` and
``--config`` say is looked up first, because it decides the defaults that the parser shows and the user overrides.
Exit codes: 0 done; 1 the run failed; 2 the command line or a config file is wrong; 130 interrupted (143 by SIGTERM).
An error is one line on stderr; ``TMASK_DEBUG=1`` shows the traceback.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import json
import os
import re
import shlex
import sys
import typing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from tmask.checks import describe, nearest
from tmask.config import (
    CONVENTIONS,
    PRESETS,
    TRAIN_PRESETS,
    DataConfig,
    ModelConfig,
    TrainConfig,
    from_dict,
)

Precision = Literal["fp32", "bf16", "fp16"]
DEFAULT_PRESET = "r50_fpn"


class UsageError(Exception):
    """Something the user typed is wrong; the message is for him."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if args else sys.stderr)
        return 0 if args else 2
    if args[0] == "--version":
        from importlib.metadata import version

        print(f"tmask {version('tmask')}")
        return 0
    name = args[0]
    python_format = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"tmask {name}: warning: {_one_line(str(message))}\n"
    try:
        if name not in COMMANDS:
            raise UsageError(f"unknown command {name!r}: expected {nearest(name, COMMANDS)}")
        return COMMANDS[name](args[1:])
    except SystemExit as stop:  # --help and --print_config end this way
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt as stop:
        return _fail(f"tmask {name}: {str(stop) or 'interrupted'}", getattr(stop, "exit_code", 130))
    except (UsageError, argparse.ArgumentError) as error:
        if _debug():
            raise
        prog = f"tmask {name}" if name in COMMANDS else "tmask"
        return _fail(f"{prog}: error: {error} (see {prog} --help)", 2)
    except Exception as error:  # a user's terminal is no place for a traceback
        if _debug():
            raise
        return _fail(f"tmask {name}: error: {_describe(error)}", 1)
    finally:
        warnings.formatwarning = python_format


def _describe(error: Exception) -> str:
    """An error in one line: what the system says with the file it says it of, any other with its kind."""
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {error}"


def _fail(message: str, code: int) -> int:
    print(_one_line(message), file=sys.stderr)
    return code


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _debug() -> bool:
    return os.environ.get("TMASK_DEBUG") == "1"


def _help() -> str:
    lines = ["usage: tmask COMMAND [options]", ""]
    lines += [f"  {name:<9} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "tmask COMMAND --help shows the options. TMASK_DEBUG=1 shows tracebacks."])


# ---- train


def train_command(argv: list[str]) -> int:
    """Train on a COCO data set; writes checkpoint, log, results and pictures to --out."""
    preset, argv = _expand(argv)
    parser = train_parser(preset)
    args = _parse(parser, argv)
    if args.out is None:
        raise UsageError("--out is required: the folder of the run")
    # Everything that can be wrong with the settings and paths is found before the first step.
    try:
        data = _settings(DataConfig, "data", args)
        training = _settings(TrainConfig, "train", args)
        device = _device(args.device)
        _check_precision(device, training.precision)
        from tmask.engine.interrupt import Interrupted
        from tmask.engine.report import check_tensorboard
        from tmask.engine.run import CONFIG_NAME, open_dataset, run_training, write_config
        from tmask.engine.train import CHECKPOINT_NAME

        check_tensorboard(training)
        for name in ("train_images", "train_annotations"):
            if getattr(data, name) is None:
                raise UsageError(f"--data.{name} is required")
        _paths_exist(
            **{f"data.{n}": getattr(data, n) for n in ("train_images", "train_annotations")},
            **{f"data.{n}": getattr(data, n) for n in ("val_images", "val_annotations")},
            resume=args.resume,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    out = Path(args.out)
    _check_out(out)
    if args.resume is None and not args.overwrite and (out / CHECKPOINT_NAME).exists():
        raise UsageError(f"--out {out} holds a checkpoint; go on with --resume {out / CHECKPOINT_NAME} or --overwrite")
    train_set, val_set = open_dataset(data, "train"), open_dataset(data, "val")
    settings = args.model.as_dict()
    if settings["num_classes"] is None:
        settings["num_classes"] = train_set.num_classes
    try:
        config = from_dict(ModelConfig, settings)
    except ValueError as error:
        raise UsageError(f"--model.{error}") from error
    try:
        result = run_training(
            config,
            training,
            data,
            train_set,
            val_set,
            out_dir=out,
            device=device,
            resume=args.resume,
            on_start=lambda: write_config(out / CONFIG_NAME, args.preset, config, training, data),
        )
    except Interrupted as stop:
        if stop.checkpoint_step is None:
            return _fail(f"tmask train: {stop} before the first checkpoint", stop.exit_code)
        again = ["--config", out / CONFIG_NAME, "--out", out, "--resume", out / CHECKPOINT_NAME]
        again += [] if args.device == "auto" else ["--device", args.device]
        command = shlex.join(["tmask", "train", *map(str, again)])
        return _fail(f"tmask train: {stop}; to go on from step {stop.checkpoint_step}: {command}", stop.exit_code)
    _print_run(out, result, has_val=val_set is not None)
    return 0


def train_parser(preset: str) -> ArgumentParser:
    """The parser of ``tmask train`` with the defaults of a preset."""
    parser = _parser("train", train_command)
    parser.add_argument("--config", action="config", help="YAML file with any of these settings")
    parser.add_argument("--preset", default=preset, help=f"defaults to start from: {', '.join(PRESETS)}")
    parser.add_argument("--out", type=str | None, default=None, help="folder of the run")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--resume", type=str | None, default=None, help="checkpoint to go on from")
    parser.add_argument("--overwrite", action="store_true", help="train anew into a folder that holds a run")
    parser.add_class_arguments(DataConfig, "data")
    parser.add_class_arguments(ModelConfig, "model", skip={"num_classes"})
    parser.add_argument(
        "--model.num_classes", type=int | None, default=None, help="with background; null: from the training data"
    )
    parser.add_class_arguments(TrainConfig, "train")
    _add_help(parser, {"data": DataConfig, "model": ModelConfig, "train": TrainConfig})
    settings = dataclasses.asdict(PRESETS[preset])
    del settings["num_classes"]
    parser.set_defaults({f"model.{name}": value for name, value in settings.items()})
    training = dataclasses.asdict(TRAIN_PRESETS[preset])
    parser.set_defaults({f"train.{name}": value for name, value in training.items()})
    return parser


def _add_help(parser: ArgumentParser, configs: dict[str, type]) -> None:
    """The comment behind a field of a config is the help of its option."""
    texts = {
        f"{group}.{name}": text.replace("%", "%%")
        for group, config in configs.items()
        for name, text in re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(config), re.MULTILINE)
    }
    for action in parser._actions:
        action.help = action.help or texts.get(action.dest)


def _expand(argv: list[str]) -> tuple[str, list[str]]:
    """The preset, and `argv` with named conventions spelled out and the config file first (arguments override it)."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--config")
    peek.add_argument("--preset")
    peek.add_argument("--model.convention", dest="convention")
    known, rest = peek.parse_known_args(argv)
    config: dict[str, Any] = {}
    if known.config is not None:
        config = _read_config(known.config)
    preset = known.preset or config.get("preset") or DEFAULT_PRESET
    if preset not in PRESETS:
        raise UsageError(f"--preset: expected {nearest(str(preset), PRESETS)}, got {preset!r}")
    head = []
    if config:
        model = config.get("model")
        if isinstance(model, dict) and isinstance(model.get("convention"), str):
            model["convention"] = _convention(model["convention"])
        head += ["--config", json.dumps(config)]
    head += ["--preset", str(preset)]
    if known.convention is not None:
        named = not known.convention.lstrip().startswith("{")
        head += ["--model.convention", json.dumps(_convention(known.convention)) if named else known.convention]
    return str(preset), head + rest


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
    return config or {}


def _convention(name: str) -> dict[str, Any]:
    if name not in CONVENTIONS:
        raise UsageError(f"--model.convention: expected {nearest(name, CONVENTIONS)}, got {name!r}")
    return dataclasses.asdict(CONVENTIONS[name])


def _print_run(out: Path, result: Any, *, has_val: bool) -> None:
    from tmask.engine.evaluate import results_table
    from tmask.engine.run import PICTURES_NAME

    if has_val:
        print(results_table(result.metrics))
        print(f"pictures: {out / PICTURES_NAME}")
    print(f"checkpoint: {result.checkpoint} ({result.step} steps, {result.seconds:.0f} s of training)")


# ---- eval, predict, demo


def eval_command(argv: list[str]) -> int:
    """Evaluate a checkpoint on a COCO data set: a table of average precision."""
    parser = _parser("eval", eval_command)
    parser.add_argument("--checkpoint", type=str, required=True, help="checkpoint.pt of a run")
    parser.add_argument("--images", type=str, required=True, help="folder of the images")
    parser.add_argument("--annotations", type=str, required=True, help="COCO annotation file")
    parser.add_argument("--out", type=str | None, default=None, help="folder for metrics.json and results.json")
    parser.add_argument(
        "--max_detections", type=int | None, default=None, help="an image, made and counted; null: as in training"
    )
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--num_workers", type=int, default=0)
    _add_device(parser)
    args = _parse(parser, argv)
    device = _usage(lambda: _device(args.device))
    _usage(lambda: _check_precision(device, args.precision))
    _usage(lambda: _paths_exist(checkpoint=args.checkpoint, images=args.images, annotations=args.annotations))
    for name, least in (("max_detections", 1), ("batch_size", 1), ("num_workers", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UsageError(f"--{name}: expected at least {least}, got {value}")
    out = Path(args.out) if args.out is not None else None
    if out:
        _check_out(out)

    from tmask.data.coco import CocoDataset, check_instances
    from tmask.data.loader import make_loader
    from tmask.engine.checkpoint import load_model
    from tmask.engine.evaluate import evaluate, results_table
    from tmask.engine.files import replace_text
    from tmask.engine.run import METRICS_NAME, RESULTS_NAME, check_categories

    model, saved = load_model(args.checkpoint, device)
    dataset = CocoDataset(args.images, args.annotations)
    check_categories(model.config.num_classes, saved["categories"], dataset.categories)
    check_instances(dataset, train=False)
    loader = make_loader(
        dataset, model.transform, batch_size=args.batch_size, shuffle=False, num_workers=args.num_workers
    )
    max_detections = args.max_detections
    if max_detections is None:
        max_detections = saved["train_config"]["eval_max_detections"]
    else:
        model.roi_heads.max_detections = max_detections
    metrics = evaluate(
        model,
        loader,
        dataset,
        max_detections=max_detections,
        device=device,
        precision=args.precision,
        results_file=out / RESULTS_NAME if out else None,
    )
    if out:
        replace_text(out / METRICS_NAME, json.dumps(metrics, indent=1))
    print(results_table(metrics))
    return 0


def predict_command(argv: list[str]) -> int:
    """Detect in an image, a folder or a glob; writes COCO results and pictures to --out."""
    from jsonargparse import ActionYesNo

    parser = _parser("predict", predict_command)
    parser.add_argument("--checkpoint", type=str, required=True, help="checkpoint.pt of a run")
    parser.add_argument("--images", type=str, required=True, help="image, folder or quoted glob")
    parser.add_argument("--out", type=str, required=True, help="folder for predictions.json and the pictures")
    parser.add_argument(
        "--annotations", type=str | None, default=None, help="COCO file whose image ids the results shall have"
    )
    parser.add_argument("--pictures", action=ActionYesNo, default=True, help="draw the detections")
    parser.add_argument("--score_threshold", type=float, default=0.5, help="least score that is drawn")
    parser.add_argument("--max_detections", type=int | None, default=None, help="an image; null: as in training")
    parser.add_argument("--overwrite", action="store_true", help="forget what an earlier run left in --out")
    _add_device(parser)
    args = _parse(parser, argv)
    device = _usage(lambda: _device(args.device))
    _usage(lambda: _check_precision(device, args.precision))
    _usage(lambda: _paths_exist(checkpoint=args.checkpoint, annotations=args.annotations))
    out = Path(args.out)
    _check_out(out)
    if not 0 <= args.score_threshold <= 1:
        raise UsageError(f"--score_threshold: expected in 0..1, got {args.score_threshold}")
    if args.max_detections is not None and args.max_detections < 1:
        raise UsageError(f"--max_detections: expected at least 1, got {args.max_detections}")

    from tmask.engine.checkpoint import load_model
    from tmask.engine.predict import find_images, image_records, predict
    from tmask.engine.record import PICTURES_NAME, OtherSettingsError
    from tmask.engine.record import RESULTS_NAME as PREDICTIONS_NAME

    files = _usage(lambda: find_images(args.images))
    known = _usage(lambda: image_records(args.annotations, list(files))) if args.annotations else None
    model, saved = load_model(args.checkpoint, device)
    if args.max_detections is not None:
        model.roi_heads.max_detections = args.max_detections
    try:
        done = predict(
            model,
            files,
            saved["categories"],
            out_dir=out,
            device=device,
            precision=args.precision,
            score_threshold=args.score_threshold,
            pictures=args.pictures,
            coco_images=known,
            overwrite=args.overwrite,
        )
    except OtherSettingsError as error:
        raise UsageError(str(error)) from error
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"interrupted; what is done is in {out}, and the same command goes on there") from stop
    drawn = f", pictures in {out / PICTURES_NAME}" if args.pictures else ""
    print(f"{done.detections} detections in {done.images} images: {out / PREDICTIONS_NAME}{drawn}")
    return 0


def demo_command(argv: list[str]) -> int:
    """Make a data set of shapes, train the tiny preset on it, evaluate and draw."""
    from tmask.demo import DemoConfig, run_demo

    parser = _parser("demo", demo_command)
    hints = typing.get_type_hints(DemoConfig)
    for item in dataclasses.fields(DemoConfig):
        parser.add_argument(f"--{item.name}", type=hints[item.name], default=item.default, help=item.metadata["help"])
    args = _parse(parser, argv)
    config = _usage(lambda: from_dict(DemoConfig, args.as_dict()))
    _usage(lambda: _check_precision(_device(config.device), config.precision))
    _check_out(Path(config.out))
    run_demo(config, device=_device(config.device))
    return 0


# ---- validate, info


def validate_command(argv: list[str]) -> int:
    """Compare every op of tmask_kernels, on every backend and dtype, with its float64 reference."""
    from tmask.validate import run_validation, select_ops

    parser = _parser("validate", validate_command)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--ops", type=list[str] | None, default=None, help='only these ops, e.g. ["nms"]')
    args = _parse(parser, argv)
    device = _usage(lambda: _device(args.device))
    _usage(lambda: select_ops(args.ops))
    return run_validation(device, ops=args.ops, as_json=args.json)


def info_command(argv: list[str]) -> int:
    """Show versions, devices, presets and which backend serves each op here, with the reasons."""
    from tmask.validate import describe

    _parse(_parser("info", info_command), argv)
    print(describe())
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train_command,
    "eval": eval_command,
    "predict": predict_command,
    "demo": demo_command,
    "validate": validate_command,
    "info": info_command,
}


# ---- shared


def _parser(name: str, command: Callable[..., int]) -> ArgumentParser:
    return ArgumentParser(prog=f"tmask {name}", description=command.__doc__, exit_on_error=False, allow_abbrev=False)


def _add_device(parser: ArgumentParser) -> None:
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", type=Precision, default="fp32", help="of the features; boxes are always fp32")


def _parse(parser: ArgumentParser, argv: list[str]) -> Namespace:
    """Parse; an unknown option is answered with the nearest known one, a wrong value with what is expected."""
    try:
        return parser.parse_args(argv)
    except argparse.ArgumentError as error:
        raise UsageError(_explain(parser, str(error))) from error


def _explain(parser: ArgumentParser, message: str) -> str:
    """jsonargparse's message in the words of ours."""
    known = {action.dest: action for action in parser._actions}
    value = re.search(r'^Parser key "([\w.]+)":\s.* value: (.*)', message, re.DOTALL)
    if value and getattr(known.get(value[1]), "_typehint", None) is not None:
        return f"--{value[1]}: expected {describe(known[value[1]]._typehint, value[2])}, got {value[2]}"
    group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    unknown = re.search(r"(?:unrecognized arguments: --|[Kk]ey '|Option ')([\w.]+)", message)
    wanted = f"{group[1]}.{group[2]}" if group else unknown[1] if unknown else None
    if wanted is None or wanted in known:
        return message
    near = difflib.get_close_matches(wanted, known, n=1)
    return f"unknown option --{wanted}" + (f"; did you mean --{near[0]}?" if near else "")


def _usage(function: Callable[[], Any]) -> Any:
    """Call it; a ValueError of its is the user's error."""
    try:
        return function()
    except ValueError as error:
        raise UsageError(str(error)) from error


def _device(name: str) -> Any:
    from tmask.engine.device import keep_freed_memory, pick_device

    device = pick_device(name)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def _check_precision(device: Any, precision: str) -> None:
    from tmask.engine.device import autocast

    autocast(device, precision)


def _settings(cls: type[Any], group: str, args: Namespace) -> Any:
    """The config of a group of options; its errors name the option."""
    try:
        return from_dict(cls, args[group].as_dict())
    except ValueError as error:
        raise UsageError(f"--{group}.{error}") from error


def _paths_exist(**paths: str | None) -> None:
    """Options that name what must be there: a folder of images, or a file."""
    for name, path in paths.items():
        if path is None:
            continue
        if not Path(path).exists():
            raise UsageError(f"--{name}: no such file or folder: {path}")
        if name.endswith("images") != Path(path).is_dir():
            kinds = ("folder", "file") if name.endswith("images") else ("file", "folder")
            raise UsageError(f"--{name}: expected a {kinds[0]}, got a {kinds[1]}: {path}")


def _check_out(out: Path) -> None:
    """Find before any work that nothing could be written there."""
    there = next(path for path in (out, *out.parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"--out {out}: expected a folder, but {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"--out {out}: the folder {there} is not writable")
