"""A whole training run on a COCO data set: model, loaders, training, evaluation, pictures. `tmask train` and the demo.

Everything a run leaves stands in one folder: ``config.yaml``, ``checkpoint.pt``, ``log.jsonl``, ``metrics.json``,
``results.json`` (COCO results of the validation images), ``pictures/`` and, if asked for, ``tensorboard/``. Where
images were left out (``data.skip_bad``), ``skipped.txt`` lists them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tmask.build import build_model
from tmask.config import DataConfig, ModelConfig, TrainConfig
from tmask.engine.checkpoint import load_initial
from tmask.engine.evaluate import evaluate, skeleton_of, warn_limits
from tmask.engine.files import held, replace_text
from tmask.engine.progress import progress
from tmask.engine.train import CHECKPOINT_NAME, TrainResult, tell_checkpoint, train
from tmask.model.detector import MaskRCNN
from tmask.model.transform import is_packed, mask_chunks
from tmask_kernels import unpack_masks

CONFIG_NAME = "config.yaml"
METRICS_NAME = "metrics.json"
RESULTS_NAME = "results.json"
SKIPPED_NAME = "skipped.txt"
PICTURES_NAME = "pictures"
NUM_PICTURES = 8  # of validation images, drawn at the end
OVERVIEW_NAME, OVERVIEW_PICTURES = "overview.png", 4


def open_dataset(data: DataConfig, split: str, *, masks: bool = True) -> Any:
    """The CocoDataset of split ``"train"`` or ``"val"``, whose summary is printed; None if `data` names none.

    `masks`: False for a model without masks. The images are read as ``data.check`` says; with ``data.skip_bad`` bad
    ones are left out. Errors: those of CocoDataset and `check_images`, and ValueError if there is nothing to train on,
    or if of the classes chosen for their masks one that is listed, or all of a split, have none.
    """
    from tmask.data.check import check_images
    from tmask.data.coco import CocoDataset, check_instances, check_masks

    images, annotations = getattr(data, f"{split}_images"), getattr(data, f"{split}_annotations")
    if images is None:
        return None
    mask_classes = data.mask_classes if split == "train" else None  # masks of all classes are evaluated
    dataset = CocoDataset(
        images,
        annotations,
        masks=masks,
        packed_masks=True,
        mask_classes=mask_classes,
        crowds=data.crowds,
        apply_exif=data.exif,
        allow_missing=data.skip_bad,
    )
    print(dataset.summary)
    check_images(
        dataset,
        data.check,
        skip_bad=data.skip_bad,
        num_workers=data.num_workers,
        watch=functools.partial(progress, task=f"checking {split} images", unit="image"),
    )
    check_instances(dataset, train=split == "train")
    if mask_classes is not None:
        check_masks(dataset, mask_classes)
    return dataset


def augment(train_set: Any, data: DataConfig, model: ModelConfig) -> None:
    """Let `train_set` give its images with the random transforms of `data`; a flip swaps the keypoints of `model`.

    Warns of flips that swap none, by names of more than one keypoint that show no left and right. Errors: ValueError
    for up-down flips of keypoints.
    """
    from tmask.data.transforms import train_transforms

    order: tuple[int, ...] = ()
    if model.keypoints is not None:
        if data.vflip > 0:  # which would turn left into right too, and top into bottom
            raise ValueError(f"data.vflip: expected 0 with model.keypoints, got {data.vflip}")
        skeleton = model.keypoints.skeleton
        order = skeleton.flip_order
        if data.hflip and model.keypoints.flip_pairs is None and not skeleton.flip_pairs and len(order) > 1:
            warnings.warn(
                f"data.hflip {data.hflip}: flips swap none of the keypoints {', '.join(skeleton.names)}, as no names "
                "differ by left and right alone; name the pairs with model.keypoints.flip_pairs, [] if there are none",
                stacklevel=2,
            )
    train_set.transforms = train_transforms(
        data.hflip,
        data.vflip,
        min_crop=data.min_crop,
        min_sizes=data.min_sizes,
        flip_order=order,
    )


def run_training(
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
    """Train on `train_set`, evaluate on `val_set` (if given) and leave everything in `out_dir`.

    A fresh run begins with the weights of `init` (`load_initial`) if it is given, `resume` is a run to go on with. Of a
    run that stands in `out_dir` a fresh one removes what it will not write anew at once, after the first step.
    ``config.yaml`` is the caller's to write, by `on_start`: called after the first step.
    `val_set` gets the labels of `train_set`. `out_dir` is locked to the end; an error tells of its checkpoint, as one
    of `train` does.
    Errors: ValueError if another command is at work in `out_dir`, or, without `overwrite`, a fresh run finds a
    checkpoint there; if the model has not the classes, masks or keypoints of the data or the two sets name other
    categories, or ``only`` would freeze layers that begin at random; and those of `train`.
    """
    from tmask.data.coco import check_keypoint_names
    from tmask.data.loader import make_loader

    if train_config.only is not None and init is None and resume is None:
        raise ValueError(f"init: expected the checkpoint of a detector, as only={train_config.only!r}, got none")
    check_categories(model_config.num_classes, train_set.categories)
    if model_config.masks and not train_set.masks:
        raise ValueError("masks: expected false, as the training data were opened without masks, got True")
    boxes_only = train_set.boxes_only  # as ids of the validation set
    if val_set is not None:
        val_set.use_labels(train_set.categories)
        pairs = zip(train_set.category_ids, val_set.category_ids, strict=True)
        boxes_only = {own for learnt, own in pairs if learnt in train_set.boxes_only}
    if model_config.keypoints is not None:
        names = model_config.keypoints.skeleton.names
        check_keypoint_names(train_set, names, train=True)
        if val_set is not None:
            check_keypoint_names(val_set, names, train=False)
    sets = {"train": train_set} | ({} if val_set is None else {"val": val_set})
    out_dir = Path(out_dir)
    torch.manual_seed(train_config.seed)
    if resume is None and init is None:
        model = build_model(model_config)
    else:  # all the weights come from elsewhere: the ImageNet file the run began with may be gone
        model = build_model(dataclasses.replace(model_config, backbone_weights=None), warn_if_untrained=False)
        model.config = model_config
    if init is not None and resume is None:
        kept = load_initial(model, init, train_set.categories)
        if train_config.only is not None:
            _check_frozen(model, kept, init)
        if kept:
            print(f"init {init}: begins anew: {_listed(kept)}", file=sys.stderr)

    skipped = [f"{split}: {fault}\n" for split, data in sets.items() for fault in data.left_out.values()]

    def start() -> None:
        if resume is None:
            _remove_run(out_dir, init)
        if skipped:
            replace_text(out_dir / SKIPPED_NAME, "".join(skipped))
        if on_start is not None:
            on_start()

    loader = make_loader(
        train_set,
        model.transform,
        batch_size=train_config.batch_size,
        shuffle=True,
        seed=train_config.seed,
        num_workers=data_config.num_workers,
        aspect_grouping=data_config.aspect_grouping,
        drop_last=len(train_set) - len(train_set.left_out) >= train_config.batch_size,
    )

    measure = None
    if val_set is not None:
        options = ("--train.eval_max_detections", "--model.max_detections", "--model.rpn_post_nms_top_n_test")
        warn_limits(val_set, model, train_config.eval_max_detections, options=options)
        measure = functools.partial(
            evaluate,
            loader=make_loader(
                val_set,
                model.transform,
                batch_size=train_config.batch_size,
                shuffle=False,
                num_workers=data_config.num_workers,
            ),
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
        result = train(
            model,
            loader,
            train_config,
            out_dir=out_dir,
            device=device,
            categories=[{**item, "boxes_only": item["id"] in train_set.boxes_only} for item in train_set.categories],
            exif=train_set.apply_exif,
            evaluate_fn=measure,
            resume=resume,
            on_start=start,
        )
        if val_set is not None:
            try:
                draw_pictures(
                    result.model, val_set, out_dir / PICTURES_NAME, device=device, precision=train_config.precision
                )
                # Last: who finds metrics finds a whole run.
                replace_text(out_dir / METRICS_NAME, json.dumps(result.metrics, indent=1))
            except BaseException as error:
                tell_checkpoint(error, result.checkpoint, result.step)
                raise
    return result


def check_no_run(out_dir: Path) -> None:
    """Errors: ValueError if `out_dir` holds a checkpoint, which a fresh run would remove."""
    path = out_dir / CHECKPOINT_NAME
    if path.exists():
        raise ValueError(f"--out {out_dir} holds a checkpoint; go on with --resume {path} or --overwrite")


def _remove_run(out_dir: Path, init: str | Path | None) -> None:
    """Remove the results, the pictures and the checkpoint, unless it is `init`, of an earlier run; nothing without one.

    Should the new run end early or have no validation images, they would be taken for its own.
    """
    checkpoint = out_dir / CHECKPOINT_NAME
    if not checkpoint.is_file():
        return
    names = (METRICS_NAME, RESULTS_NAME, SKIPPED_NAME, f"{PICTURES_NAME}/{OVERVIEW_NAME}")
    for path in (*(out_dir / name for name in names), *(out_dir / PICTURES_NAME).glob("[1-9]-*.png")):
        path.unlink(missing_ok=True)
    if init is None or not checkpoint.samefile(init):
        checkpoint.unlink()  # last: by it an earlier run is known


def _check_frozen(model: MaskRCNN, kept: Mapping[str, str], init: str | Path) -> None:
    """No layer that is to be frozen is among those that `init` left at random: `kept`. Errors: ValueError."""
    heads = model.roi_heads
    learning = tuple(f"roi_heads.{name}." for name, part in heads.named_children() if part in heads.mask_parts())
    random = {name: why for name, why in kept.items() if not name.startswith(learning)}
    if random:
        expected = "all weights of the detector, as only the masks learn"
        raise ValueError(f"init {init}: expected {expected}, got none that fit {_listed(random)}")


def _listed(kept: Mapping[str, str]) -> str:
    """The first of the names, and the reasons there are."""
    first, more = next(iter(kept)), len(kept) - 1
    reasons = "; ".join(dict.fromkeys(why for why in kept.values() if why))
    return first + (f" and {more} more" if more else "") + (f" ({reasons})" if reasons else "")


def check_categories(num_classes: int, categories: Sequence[dict[str, Any]]) -> None:
    """The model must have the classes of `categories` and no more. Errors: ValueError."""
    if num_classes != len(categories) + 1:
        need = f"{len(categories) + 1} (the {len(categories)} categories and background)"
        raise ValueError(f"num_classes: expected {need}, got {num_classes}")


def draw_pictures(
    model: Any,
    dataset: Any,
    folder: Path,
    *,
    device: torch.device,
    precision: str = "fp32",
    count: int = NUM_PICTURES,
    score_threshold: float = 0.5,
) -> list[Path]:
    """For the first `count` images of `dataset`: a PNG ``1-NAME.png`` of the prediction beside the ground truth.

    ``overview.png`` shows the first few of them on one page.
    """
    from tmask.engine.device import autocast
    from tmask.visualize import comparison, grid, save_png

    skeleton = skeleton_of(model)
    edges = () if skeleton is None else skeleton.edges
    folder.mkdir(parents=True, exist_ok=True)
    names = [str(category["name"]) for category in dataset.categories]
    was_training = model.training
    model.eval()
    paths, pictures = [], []
    for index in [i for i in range(len(dataset)) if i not in dataset.left_out][:count]:
        image, target = dataset[index]
        with torch.inference_mode(), autocast(device, precision):
            found = model([image.to(device)], masks="rle")[0]
        found = {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in found.items()}
        truth = {"boxes": target["boxes"], "labels": target["labels"]}
        if (masks := target.get("masks")) is not None:
            truth["masks"] = _run_lengths(masks, image.shape[-1])
        if skeleton is not None and "keypoints" in target:
            truth["keypoints"] = target["keypoints"]
        pictures.append(comparison(image, found, truth, names, min_score=score_threshold, edges=edges))
        # By place: images in two folders may share a name, and one may be called as the overview.
        paths.append(folder / f"{index + 1}-{Path(dataset.image_path(index)).stem}.png")
        save_png(paths[-1], pictures[-1])
    if pictures:
        save_png(folder / OVERVIEW_NAME, grid(pictures[:OVERVIEW_PICTURES], columns=2))
    model.train(was_training)
    return paths


def _run_lengths(masks: torch.Tensor, width: int) -> list[dict[str, Any]]:
    """COCO's run lengths of masks [G, H, W] or packed, of which few are held as bytes at once."""
    from pycocotools import mask as coco_mask

    runs: list[dict[str, Any]] = []
    for chunk in mask_chunks(len(masks), masks.shape[1] * width):
        part = unpack_masks(masks[chunk], width) if is_packed(masks, width) else masks[chunk]
        runs += coco_mask.encode(np.asfortranarray(part.to(torch.uint8).permute(1, 2, 0).numpy()))
    return runs


def write_config(path: Path, preset: str, model: ModelConfig, training: TrainConfig, data: DataConfig) -> None:
    """Save the resolved settings as YAML that ``tmask train --config`` reads."""
    import yaml

    groups: dict[str, Any] = {"model": model, "train": training, "data": data}
    values = {"preset": preset} | {name: dataclasses.asdict(config) for name, config in groups.items()}
    # By way of JSON: YAML's safe writer has no tuples.
    replace_text(path, yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False))
