"""A whole training on a COCO data set: model, loaders, loop, evaluation, pictures. Used by `tmask train` and the demo.

A training leaves one folder: ``config.yaml``, ``checkpoint.pt``, ``log.jsonl``, ``metrics.json``, ``results.json``
(COCO results of the validation images), ``pictures/`` and, if asked for, ``tensorboard/``. If images were left out
(``data.skip_bad``), ``skipped.txt`` lists them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tmask.build import build_model
from tmask.config import DataConfig, ModelConfig, TrainConfig
from tmask.engine.checkpoint import load_initial
from tmask.engine.dataset import check_categories, use_labels
from tmask.engine.evaluate import evaluate, warn_limits
from tmask.engine.files import (
    CHECKPOINT_NAME,
    METRICS_NAME,
    PICTURES_NAME,
    RESULTS_NAME,
    SKIPPED_NAME,
    held,
    replace_text,
)
from tmask.engine.loop import EvaluateFn, TrainResult, fit, tell_checkpoint
from tmask.engine.pictures import OVERVIEW_NAME, draw_pictures
from tmask.model.detector import MaskRCNN


def train(
    model_config: ModelConfig,
    train_config: TrainConfig,
    data_config: DataConfig,
    train_set: Any,
    val_set: Any | None,
    *,
    out_dir: str | Path,
    device: torch.device,
    init: str | Path | None = None,
    resume: str | Path | None = None,
    overwrite: bool = True,
    on_start: Callable[[], None] | None = None,
) -> TrainResult:
    """Train on `train_set`, evaluate on `val_set` and write everything but ``config.yaml`` to `out_dir`.

    `out_dir` is locked until the end. An error tells of the checkpoint on disk, as an error of `fit` does.

    Args:
        model_config, train_config, data_config: Settings of the model, the training and the loaders.
        train_set, val_set: CocoDatasets; `val_set` gets the labels of `train_set`, or is None.
        out_dir: Folder of the run. A fresh run deletes the stale files of an earlier run after its first step.
        device: Where the training runs.
        init: File of weights to begin with (`load_initial`).
        resume: Checkpoint of a run to continue.
        overwrite: False: a fresh run refuses a folder with a checkpoint.
        on_start: Called after the first step; the caller writes ``config.yaml`` there.

    Raises:
        ValueError: Another command holds `out_dir`; `out_dir` has a checkpoint without `overwrite`; the model and the
            data have other classes, masks or keypoints; the two sets have other categories; ``only`` would freeze
            layers with random weights; or as `fit`.
    """
    if train_config.only is not None and init is None and resume is None:
        raise ValueError(f"init: expected the checkpoint of a detector, as only={train_config.only!r}, got none")
    out_dir = Path(out_dir)
    boxes_only = _match_data(model_config, train_set, val_set)
    torch.manual_seed(train_config.seed)
    model = _build(model_config, train_config, train_set, init, resume)

    sets = {"train": train_set} | ({} if val_set is None else {"val": val_set})
    skipped = [f"{split}: {fault}\n" for split, data in sets.items() for fault in data.left_out.values()]

    def start() -> None:
        if resume is None:
            _remove_run(out_dir, init)
        if skipped:
            replace_text(out_dir / SKIPPED_NAME, "".join(skipped))
        if on_start is not None:
            on_start()

    loader = _loader(
        train_set,
        model,
        train_config,
        data_config,
        shuffle=True,
        seed=train_config.seed,
        aspect_grouping=data_config.aspect_grouping,
        drop_last=len(train_set) - len(train_set.left_out) >= train_config.batch_size,
    )
    evaluate_fn: EvaluateFn | None = None
    if val_set is not None:
        options = ("--train.eval_max_detections", "--model.max_detections", "--model.rpn_post_nms_top_n_test")
        warn_limits(val_set, model, train_config.eval_max_detections, options=options)
        evaluate_fn = functools.partial(
            evaluate,
            loader=_loader(val_set, model, train_config, data_config, shuffle=False),
            dataset=val_set,
            max_detections=train_config.eval_max_detections,
            device=device,
            precision=train_config.precision,
            results_file=out_dir / RESULTS_NAME,
            boxes_only=boxes_only,
        )
    with held(out_dir, "train"):
        if resume is None and not overwrite:
            check_no_run(out_dir)
        result = fit(
            model,
            loader,
            train_config,
            out_dir=out_dir,
            device=device,
            categories=[{**item, "boxes_only": item["id"] in train_set.boxes_only} for item in train_set.categories],
            exif=train_set.apply_exif,
            evaluate_fn=evaluate_fn,
            resume=resume,
            on_start=start,
        )
        if val_set is not None:
            try:
                folder, precision = out_dir / PICTURES_NAME, train_config.precision
                draw_pictures(result.model, val_set, folder, device=device, precision=precision)
                # Last: a run with metrics counts as done.
                replace_text(out_dir / METRICS_NAME, json.dumps(result.metrics, indent=1))
            except BaseException as error:
                tell_checkpoint(error, result.checkpoint, result.step)
                raise
    return result


def _match_data(config: ModelConfig, train_set: Any, val_set: Any | None) -> set[int]:
    """Check that model and data fit, and number the labels of `val_set` as in training.

    Returns:
        Ids of `val_set` of the categories whose masks are not learnt.
    """
    from tmask.data.coco import check_keypoint_names

    check_categories(config.num_classes, train_set.categories)
    if config.masks and not train_set.masks:
        raise ValueError("masks: expected false, as the training data were opened without masks, got True")
    boxes_only = set() if val_set is None else use_labels(val_set, train_set.categories, train_set.boxes_only)
    if config.keypoints is not None:
        names = config.keypoints.skeleton.names
        check_keypoint_names(train_set, names, train=True)
        if val_set is not None:
            check_keypoint_names(val_set, names, train=False)
    return boxes_only


def _build(
    config: ModelConfig, train_config: TrainConfig, train_set: Any, init: str | Path | None, resume: str | Path | None
) -> MaskRCNN:
    """Build the model; without `resume`, load the weights of `init`."""
    if init is None and resume is None:
        return build_model(config)
    # All weights come from a checkpoint. The ImageNet file that the first run began with may be gone.
    model = build_model(dataclasses.replace(config, backbone_weights=None), warn_if_untrained=False)
    model.config = config
    if resume is None and init is not None:
        kept = load_initial(model, init, train_set.categories)
        if train_config.only is not None:
            _check_frozen(model, kept, init)
        if kept:
            print(f"init {init}: begins anew: {_listed(kept)}", file=sys.stderr)
    return model


def _loader(dataset: Any, model: MaskRCNN, training: TrainConfig, data: DataConfig, **options: Any) -> Any:
    from tmask.data.loader import make_loader

    return make_loader(
        dataset, model.transform, batch_size=training.batch_size, num_workers=data.num_workers, **options
    )


def check_no_run(out_dir: Path) -> None:
    """Raise ValueError if `out_dir` holds a checkpoint, because a fresh run would remove it."""
    path = out_dir / CHECKPOINT_NAME
    if path.exists():
        raise ValueError(f"--out {out_dir} holds a checkpoint; go on with --resume {path} or --overwrite")


def _remove_run(out_dir: Path, init: str | Path | None) -> None:
    """Remove results, pictures and checkpoint (unless it is `init`) of an earlier run; nothing without a checkpoint.

    If the new run ended early, or has no validation images, the old files would pass for its own.
    """
    checkpoint = out_dir / CHECKPOINT_NAME
    if not checkpoint.is_file():
        return
    names = (METRICS_NAME, RESULTS_NAME, SKIPPED_NAME, f"{PICTURES_NAME}/{OVERVIEW_NAME}")
    for path in (*(out_dir / name for name in names), *(out_dir / PICTURES_NAME).glob("[1-9]-*.png")):
        path.unlink(missing_ok=True)
    if init is None or not checkpoint.samefile(init):
        checkpoint.unlink()  # last, because it marks an earlier run


def _check_frozen(model: MaskRCNN, kept: Mapping[str, str], init: str | Path) -> None:
    """Raise ValueError if a layer that will be frozen is in `kept`, the layers with random weights after `init`."""
    heads = model.roi_heads
    learning = tuple(f"roi_heads.{name}." for name, part in heads.named_children() if part in heads.mask_parts())
    random = {name: why for name, why in kept.items() if not name.startswith(learning)}
    if random:
        expected = "all weights of the detector, as only the masks learn"
        raise ValueError(f"init {init}: expected {expected}, got none that fit {_listed(random)}")


def _listed(kept: Mapping[str, str]) -> str:
    """The first name, the number of the others, and the different reasons."""
    first, more = next(iter(kept)), len(kept) - 1
    reasons = "; ".join(dict.fromkeys(why for why in kept.values() if why))
    return first + (f" and {more} more" if more else "") + (f" ({reasons})" if reasons else "")


def write_config(path: Path, preset: str, model: ModelConfig, training: TrainConfig, data: DataConfig) -> None:
    """Write the resolved settings as YAML that ``tmask train --config`` reads."""
    import yaml

    groups: dict[str, Any] = {"model": model, "train": training, "data": data}
    values = {"preset": preset} | {name: dataclasses.asdict(config) for name, config in groups.items()}
    # Through JSON, because YAML's safe writer has no tuples.
    replace_text(path, yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False))
