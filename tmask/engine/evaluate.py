"""COCO evaluation: a model and a loader in, average precision of boxes, masks and keypoints out."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tmask.data.annotations import known_id
from tmask.data.segmentation import run_length
from tmask.engine.device import autocast, to_device
from tmask.engine.files import replace_text
from tmask.engine.progress import progress
from tmask.skeleton import PERSON, Skeleton

KINDS = ("bbox", "segm")
KEYPOINTS = "keypoints"  # the kind of models that find them
KEYPOINT_DETECTIONS = 20  # an image: COCO's limit for keypoints
# Rows of the table, and what their keys end with. The latter two are for classes learnt from boxes alone, if any are.
ALL = "all classes"
GROUPS = {ALL: "", "classes with masks": "_with_masks", "classes of boxes only": "_boxes_only"}


def evaluate(
    model: Any,
    loader: Iterable[Any],
    dataset: Any,
    *,
    max_detections: int = 100,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    results_file: str | Path | None = None,
    boxes_only: Collection[int] = (),
) -> dict[str, float]:
    """COCO metrics of `model` on `dataset` (a CocoDataset), whose images `loader` gives.

    The keys are those of `coco_metrics`, as is `boxes_only`, of ``keypoints`` too if the model finds them.
    `max_detections` an image count in the AP; the model must be set to give as many (``max_detections`` of its config).
    With `results_file` the detections are also written as COCO results.
    Images that `dataset` has left out have no part in any of it; ``images_left_out`` is their number, if there are any.
    """
    results = detect(model, loader, dataset.category_ids, device=device, precision=precision)
    if results_file is not None:
        write_results(results_file, results)
    skeleton = skeleton_of(model)
    kinds, sigmas = KINDS if has_masks(model) else KINDS[:1], None
    if skeleton is not None:
        kinds, sigmas = (*kinds, KEYPOINTS), skeleton.sigmas
    left_out = len(getattr(dataset, "left_out", ()))
    metrics = {"images_left_out": float(left_out)} if left_out else {}
    return metrics | coco_metrics(
        dataset.coco.dataset,
        results,
        max_detections=max_detections,
        kinds=kinds,
        boxes_only=boxes_only,
        keypoint_sigmas=sigmas,
    )


def skeleton_of(model: Any) -> Skeleton | None:
    """The keypoints that a model made by `build_model` finds; None if it finds none."""
    own = getattr(getattr(model, "config", None), "keypoints", None)
    return None if own is None else own.skeleton


def has_masks(model: Any) -> bool:
    """Whether a model gives masks, as any does that was not built with ``masks=False``."""
    return bool(getattr(getattr(model, "config", None), "masks", True))


def detect(
    model: Any,
    loader: Iterable[Any],
    category_ids: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
) -> list[dict[str, Any]]:
    """The model's detections as COCO results: image_id, category_id, bbox (xywh), score, segmentation (RLE) of a model
    with masks, and keypoints (x, y, score of each) of a model that finds them.

    Label i becomes ``category_ids[i - 1]``. The mode of the model (train or eval) is put back at the end.
    Errors: ValueError if a model made by `build_model` has more or fewer classes than `category_ids` and background.
    """
    from tmask.model.postprocess import to_list

    device = torch.device(device)
    num_classes = getattr(getattr(model, "config", None), "num_classes", None)
    if num_classes is not None and num_classes != len(category_ids) + 1:
        need = f"{num_classes - 1}, the model's classes without background"
        raise ValueError(f"category_ids: expected {need}, got {len(category_ids)}")
    was_training = model.training
    model.eval()
    results = []
    try:
        with torch.inference_mode():
            for batch in progress(loader, "evaluation", "batch"):
                images = to_device(batch.images, device, channels_last=True)
                with autocast(device, precision):
                    detections = model.forward_padded(images, compact=device.type == "cpu")
                found = to_list(detections, images.sizes, batch.original_sizes, masks="rle", convention=model.paste)
                for image_id, result in zip(batch.image_ids, _on_host(found), strict=True):
                    results += coco_results(image_id, result, category_ids)
    finally:
        model.train(was_training)
    return results


def _on_host(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of a batch with their tensors on the host: a wait for each field, however many the images."""
    counts = [len(result["boxes"]) for result in found]
    names = [name for name, value in found[0].items() if isinstance(value, Tensor)]
    fields = {name: torch.cat([result[name] for result in found]).cpu() for name in names}
    rows = zip(*(values.split(counts) for values in fields.values()), strict=True)
    return [result | dict(zip(fields, row, strict=True)) for result, row in zip(found, rows, strict=True)]


def coco_results(image_id: int, result: dict[str, Any], category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """One image's result (boxes [D, 4] xyxy, labels [D], scores [D], masks: D RLEs or left out) as COCO results.

    So are ``keypoints`` [D, Kp, 3] with ``keypoints_scores`` [D, Kp], if there are any: in COCO's pixels, half a pixel
    less than ours, with the score in the place of the visibility. One whose score is NaN, of a head that has diverged,
    is 0, 0, 0, as COCO has what is not known: JSON has no NaN.
    """
    boxes: Tensor = result["boxes"]
    xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
    rows = zip(xywh, result["labels"].tolist(), result["scores"].tolist(), strict=True)
    results = [
        {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score}
        for box, label, score in rows
    ]
    if "masks" in result:
        for item, rle in zip(results, result["masks"], strict=True):
            item["segmentation"] = {"size": [int(side) for side in rle["size"]], "counts": rle["counts"]}
    if "keypoints" in result:
        triples = torch.cat([result["keypoints"][..., :2] - 0.5, result["keypoints_scores"][..., None]], dim=-1)
        triples = torch.where(triples[..., 2:].isnan(), 0.0, triples)
        for item, keypoints in zip(results, triples.flatten(1).tolist(), strict=True):
            item["keypoints"] = keypoints
    return results


def write_results(path: str | Path, results: list[dict[str, Any]]) -> None:
    """Write COCO results as one JSON array, folders included."""
    replace_text(path, json.dumps(results))


def coco_metrics(
    ground_truth: dict[str, Any],
    results: list[dict[str, Any]],
    *,
    max_detections: int = 100,
    kinds: Sequence[str] = KINDS,
    boxes_only: Collection[int] = (),
    keypoint_sigmas: Sequence[float] | None = None,
) -> dict[str, float]:
    """pycocotools' figures for COCO results against a COCO annotation dict; neither is changed.

    For each kind: ``bbox/AP``, ``AP50``, ``AP75``, ``AP_small``, ``AP_medium``, ``AP_large``, ``AR`` and
    ``AP/<class name>``, in 0..1, with up to `max_detections` detections an image; -1 where there is no ground truth.
    Classes of the same name are told apart by their category id, ``name (id)``. No results give 0. Annotations without
    ``area`` or ``iscrowd`` get them. In ``segm`` a ground truth without a mask neither helps nor harms; if there is
    none with a mask, ``segm`` is left out.

    `boxes_only` are the ids of the categories whose masks the model did not learn from. If there are any, AP, AP50 and
    AP75 also come for them and for the others apart: ``segm/AP_boxes_only``, ``segm/AP_with_masks``...

    ``keypoints`` (to be named in `kinds`) goes by the similarity of keypoints, counts up to 20 detections an image, and
    has no ``AP_small``. `keypoint_sigmas` are the spreads of the skeleton, by default COCO's of a person. If no
    annotation has a keypoint it is left out. Errors: ValueError for keypoints of another number than sigmas.
    """
    sigmas = PERSON.sigmas if keypoint_sigmas is None else tuple(keypoint_sigmas)
    metrics: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints at every step
        for kind in kinds:
            truth = _ground_truth(ground_truth, kind, len(sigmas))
            if truth is not None:
                found = _results(truth, results, kind, len(sigmas))
                evaluated = _run_cocoeval(truth, found, kind, max_detections, sigmas)
                metrics.update(_summarize(evaluated, kind, boxes_only))
    return metrics


def _ground_truth(dataset: dict[str, Any], kind: str, num_keypoints: int) -> Any:
    """A COCO object of its own annotations (COCOeval changes them), or None if `kind` has no ground truth."""
    from pycocotools import mask as mask_utils
    from pycocotools.coco import COCO

    sizes = {image["id"]: (image["height"], image["width"]) for image in dataset["images"]}
    annotations, usable = [], 0
    for number, source in enumerate(dataset.get("annotations", ()), start=1):
        item = {**source, "id": number, "iscrowd": int(source.get("iscrowd") or 0)}  # id 0 would read as "no match"
        size = sizes[item["image_id"]]
        rle = run_length(item.get("segmentation"), size) if kind == "segm" or item.get("area") is None else None
        if item.get("area") is None:
            item["area"] = float(mask_utils.area(rle)) if rle else float(item["bbox"][2] * item["bbox"][3])
        if kind == "segm":
            usable += rle is not None
            if rle is None:  # unknown mask: a detection inside the box is neither right nor wrong, as in a crowd
                rle = run_length([_corners(item["bbox"])], size)
                item["iscrowd"] = 1
            item["segmentation"] = rle
        if kind == KEYPOINTS:
            keypoints = _keypoints(item.get("keypoints") or [0] * (3 * num_keypoints), num_keypoints, "annotations")
            item["keypoints"] = keypoints
            item.setdefault("num_keypoints", sum(value > 0 for value in keypoints[2::3]))
            usable += item["num_keypoints"] > 0
        annotations.append(item)
    if not usable and (kind == KEYPOINTS or (kind == "segm" and annotations)):
        return None
    return _coco(COCO(), dataset, annotations)


def _keypoints(values: Sequence[float], count: int, name: str) -> Sequence[float]:
    if len(values) != 3 * count:
        raise ValueError(f"{name}: keypoints: expected {3 * count} numbers, three for each sigma, got {len(values)}")
    return values


def _results(truth: Any, results: list[dict[str, Any]], kind: str, num_keypoints: int) -> Any:
    """A COCO object of the results. For ``segm`` area and box are the mask's, as when it is loaded alone.

    For ``keypoints`` they are those of the box around all of them, also as when they are loaded alone.
    """
    from pycocotools import mask as mask_utils
    from pycocotools.coco import COCO

    annotations = []
    for number, result in enumerate(results, start=1):
        item = {"id": number, "iscrowd": 0, "score": result["score"]}
        for key, known in (("image_id", truth.imgs), ("category_id", truth.cats)):
            try:
                item[key] = known_id(key, result[key], known, where="the ground truth")
            except ValueError as error:
                raise ValueError(f"results: {error}") from error
        if kind == "segm":
            rle = result["segmentation"]
            item |= {"segmentation": rle, "area": float(mask_utils.area(rle)), "bbox": mask_utils.toBbox(rle).tolist()}
        elif kind == KEYPOINTS:
            keypoints = _keypoints(result.get("keypoints", ()), num_keypoints, "results")
            x, y = keypoints[0::3], keypoints[1::3]
            box = [min(x), min(y), max(x) - min(x), max(y) - min(y)]
            item |= {"keypoints": keypoints, "bbox": box, "area": box[2] * box[3]}
        else:
            item |= {"bbox": result["bbox"], "area": result["bbox"][2] * result["bbox"][3]}
        annotations.append(item)
    return _coco(COCO(), truth.dataset, annotations)


def _coco(coco: Any, dataset: dict[str, Any], annotations: list[dict[str, Any]]) -> Any:
    coco.dataset = {"images": dataset["images"], "categories": dataset["categories"], "annotations": annotations}
    coco.createIndex()
    return coco


def _corners(bbox: Sequence[float]) -> list[float]:
    x, y, w, h = bbox
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def _run_cocoeval(truth: Any, results: Any, kind: str, max_detections: int, sigmas: Sequence[float]) -> Any:
    from pycocotools.cocoeval import COCOeval

    evaluation = COCOeval(truth, results, kind)
    # One limit: `accumulate` would repeat its work for each, and the figures are of the largest alone.
    evaluation.params.maxDets = [max_detections if kind != KEYPOINTS else min(max_detections, KEYPOINT_DETECTIONS)]
    if kind == KEYPOINTS:
        evaluation.params.kpt_oks_sigmas = np.array(sigmas)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def _summarize(evaluation: Any, kind: str, boxes_only: Collection[int]) -> dict[str, float]:
    """The figures at the largest maxDets. (pycocotools' own `summarize` takes AP at 100 whatever is set.)"""
    precision = evaluation.eval["precision"][..., -1]  # [T thresholds, R recalls, K classes, A areas]
    recall = evaluation.eval["recall"][..., -1]  # [T, K, A]
    thresholds = evaluation.params.iouThrs
    at50, at75 = (int(np.argmin(np.abs(thresholds - value))) for value in (0.5, 0.75))
    apart = np.isin(evaluation.params.catIds, list(boxes_only))
    groups = [np.ones_like(apart), *([~apart, apart] if boxes_only else [])]  # as those of GROUPS
    metrics: dict[str, float] = {}
    for suffix, chosen in zip(GROUPS.values(), groups, strict=False):
        metrics |= {
            f"{kind}/AP{suffix}": _mean(precision[:, :, chosen, 0]),
            f"{kind}/AP50{suffix}": _mean(precision[at50, :, chosen, 0]),
            f"{kind}/AP75{suffix}": _mean(precision[at75, :, chosen, 0]),
        }
    for index, area in enumerate(evaluation.params.areaRngLbl[1:], start=1):
        metrics[f"{kind}/AP_{area}"] = _mean(precision[:, :, :, index])
    metrics[f"{kind}/AR"] = _mean(recall[:, :, 0])
    names = [str(evaluation.cocoGt.cats[category_id]["name"]) for category_id in evaluation.params.catIds]
    for index, (name, category_id) in enumerate(zip(names, evaluation.params.catIds, strict=True)):
        key = name if names.count(name) == 1 else f"{name} ({category_id})"
        metrics[f"{kind}/AP/{key}"] = _mean(precision[:, :, index, 0])
    return metrics


def _mean(values: np.ndarray[Any, Any]) -> float:
    known = values[values > -1]  # -1 marks a class or size without ground truth
    return float(known.mean()) if known.size else -1.0


def results_table(metrics: dict[str, float]) -> str:
    """The metrics as a plain text table in percent: a row for all classes and for each group, then one a class."""
    kinds = [kind for kind in (*KINDS, KEYPOINTS) if f"{kind}/AP" in metrics]
    columns = [(kind, name) for kind in kinds for name in ("AP", "AP50", "AP75")]
    rows = [(label, [f"{kind}/{name}{suffix}" for kind, name in columns]) for label, suffix in GROUPS.items()]
    rows = [row for row in rows if row[0] == ALL or any(key in metrics for key in row[1])]
    prefix = f"{kinds[0]}/AP/" if kinds else ""
    classes = [key.removeprefix(prefix) for key in metrics if prefix and key.startswith(prefix)]
    rows += [(label, [f"{kind}/{name}/{label}" for kind, name in columns]) for label in classes]
    width = max(len(label) for label, _ in rows)
    heads = [f"{kind}/{name}".rjust(9) for kind, name in columns]
    lines = [" ".join([" " * width, *heads])]
    for label, keys in rows:
        cells = [_percent(metrics[key]) if key in metrics else "" for key in keys]
        cells = [cell.rjust(len(head)) for cell, head in zip(cells, heads, strict=True)]
        lines.append(" ".join([f"{label:<{width}}", *cells]).rstrip())
    if "images_left_out" in metrics:
        lines.append(f"{metrics['images_left_out']:.0f} images are left out: the figures are of the others")
    return "\n".join(lines)


def _percent(value: float) -> str:
    return "-" if value < 0 else f"{100 * value:.1f}"
