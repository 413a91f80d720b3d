"""COCO evaluation: average precision of boxes, masks and keypoints of a model on a data set."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tmask.checks import nearest
from tmask.engine.detect import detect, skeleton_of
from tmask.engine.files import replace_text
from tmask.engine.truth import FIELDS, KEYPOINTS, Truth
from tmask.skeleton import PERSON

KINDS = ("bbox", "segm")
KEYPOINT_DETECTIONS = 20  # of an image: COCO's limit for keypoints
# Rows of the table and the endings of their keys. The last two exist if some classes were learnt without masks.
GROUPS = {"all classes": "", "classes with masks": "_with_masks", "classes of boxes only": "_boxes_only"}
# Columns of the table: a key and the head of its column.
FIGURES = {name: name.removeprefix("AP_") for name in ("AP", "AP50", "AP75", "AR", "AP_small", "AP_medium", "AP_large")}
CONFUSION_SCORE, CONFUSION_IOU = 0.5, 0.5  # lowest score and IoU of a match in the confusion matrix


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
    plots: str | Path | None = None,
) -> dict[str, float]:
    """Return the COCO metrics of `model` on `dataset`, with the keys of `coco_metrics`.

    Args:
        model: The model. Its config must allow at least `max_detections`.
        device: Where the model runs.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        loader: Loader of the images of `dataset`.
        dataset: A CocoDataset. Images that the data set leaves out do not count; the metric ``images_left_out`` is
            their number.
        max_detections: Detections of each class and image that count.
        results_file: File for the COCO results.
        boxes_only, plots: As in `coco_metrics`.
    """
    warn_limits(dataset, model, max_detections)
    results = detect(model, loader, dataset.category_ids, device=device, precision=precision)
    if results_file is not None:
        replace_text(results_file, json.dumps(results))
    skeleton = skeleton_of(model)
    masks = getattr(getattr(model, "config", None), "masks", True)
    kinds = (*KINDS[: 2 if masks else 1], *([KEYPOINTS] if skeleton else []))
    left_out = len(getattr(dataset, "left_out", ()))
    metrics = {"images_left_out": float(left_out)} if left_out else {}
    return metrics | coco_metrics(
        dataset.coco.dataset,
        results,
        max_detections=max_detections,
        kinds=kinds,
        boxes_only=boxes_only,
        keypoint_sigmas=skeleton.sigmas if skeleton else None,
        plots=plots,
        check=False,
    )


def warn_limits(
    dataset: Any,
    model: Any,
    max_detections: int,
    *,
    options: tuple[str, str, str] = ("max_detections", "model.max_detections", "model.rpn_post_nms_top_n_test"),
) -> None:
    """Warn, once for a CocoDataset, if images hold more objects than detections count.

    There are three limits: `max_detections` of each class and image, the model's detections of an image, and the
    proposals of an image. `options` names the setting of each.
    """
    told: set[str] = getattr(dataset, "told", set())
    if "limits" in told:
        return
    told.add("limits")
    limits = [(max_detections, True, options[0])]
    if hasattr(model, "roi_heads"):
        limits.append((model.roi_heads.max_detections, False, options[1]))
        limits.append((model.rpn.post_nms_top_n.test, False, options[2]))
    _warn_limits(dataset.coco.dataset, limits, str(getattr(dataset, "annotation_file", "the ground truth")))


def _warn_limits(ground_truth: dict[str, Any], limits: Sequence[tuple[int, bool, str]], where: str) -> None:
    """Warn if images hold more objects than a limit: a number, whether the limit is of each class, and its name."""
    items = [item for item in ground_truth.get("annotations", ()) if not item.get("iscrowd")]
    images = Counter(item["image_id"] for item in items)
    of_class = Counter((item["image_id"], item["category_id"]) for item in items)
    most, most_of_class = max(images.values(), default=0), max(of_class.values(), default=0)
    short = [(limit, name) for limit, per_class, name in limits if limit < (most_of_class if per_class else most)]
    if short:
        least, _ = min(short)
        crowded = sum(count > least for count in images.values())
        names = ", ".join(dict.fromkeys(name for _, name in short))
        warnings.warn(
            f"{where}: {crowded} of {len(ground_truth['images'])} images hold more than {least} objects, up to {most}, "
            f"but {least} detections an image count: {names}",
            stacklevel=3,
        )


def coco_metrics(
    ground_truth: dict[str, Any],
    results: list[dict[str, Any]],
    *,
    max_detections: int = 100,
    kinds: Sequence[str] = KINDS,
    boxes_only: Collection[int] = (),
    keypoint_sigmas: Sequence[float] | None = None,
    plots: str | Path | None = None,
    check: bool = True,
) -> dict[str, float]:
    """Return pycocotools' figures for COCO results against a COCO annotation dict.

    The keys are ``bbox/AP``, ``AP50``, ``AP75``, ``AP_small``, ``AP_medium``, ``AP_large`` and ``AR`` for each kind,
    and the same names for each class, ``bbox/AP50/<class name>``. If several classes have one name, their keys have
    the id too, ``name (id)``. A figure is in 0..1, or -1 if there is no ground truth for it. Without results all
    figures are 0.

    Args:
        ground_truth: COCO annotations; not changed. Missing ``area`` and ``iscrowd`` are filled in. Ids may be any
            integers. ``segm`` ignores objects without a mask: they count neither as found nor as missed.
        results: COCO results; not changed.
        max_detections: Detections of each image and class that count. One warning counts the images with more objects.
        kinds: ``bbox``, ``segm`` and ``keypoints``. A kind without any ground truth masks or keypoints is left out.
            ``keypoints`` uses the similarity of keypoints, at most 20 detections an image, and has no ``AP_small``.
        boxes_only: Ids of categories whose masks the model did not learn. The metrics then also have AP, AP50 and AP75
            of these classes alone, ``segm/AP_boxes_only``, and of the other classes, ``segm/AP_with_masks``.
        keypoint_sigmas: Spreads of the keypoints; None: COCO's spreads of a person.
        plots: Folder for ``precision-recall-KIND.png``, and ``confusion-KIND.png`` of boxes and masks.
        check: False for results of `detect`: no check of values and no warning about `max_detections`.

    Raises:
        ValueError: A result lacks a field, has an unknown image or category, numbers that are not finite, a mask of
            another size, or a number of keypoints that is not the number of sigmas.
    """
    for kind in kinds:
        if kind not in FIELDS:
            raise ValueError(f"kinds: expected {nearest(kind, FIELDS)}, got {kind!r}")
    truth = Truth.of(ground_truth)
    if check:
        _warn_limits(ground_truth, [(max_detections, True, "max_detections")], "the ground truth")
    sigmas = PERSON.sigmas if keypoint_sigmas is None else tuple(keypoint_sigmas)
    names = truth.names()
    apart = np.array([key in boxes_only for key in truth.categories]) if boxes_only else None
    metrics: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints at every step
        for kind in kinds:
            objects = truth.objects(kind, len(sigmas))
            if objects is None:
                continue
            if check:
                truth.check(results, kind)
            found = truth.found(results, kind, len(sigmas))
            evaluation = _run_cocoeval(objects, truth.coco(found), kind, max_detections, sigmas)
            metrics |= _summarize(evaluation, kind, names, apart)
            if plots is not None:
                _plot(Path(plots), evaluation, truth, found, kind)
    return metrics


def _run_cocoeval(objects: Any, found: Any, kind: str, max_detections: int, sigmas: Sequence[float]) -> Any:
    from pycocotools.cocoeval import COCOeval

    from tmask.engine.matching import Evaluator

    evaluation = (COCOeval if kind == KEYPOINTS else Evaluator)(objects, found, kind)
    # One limit only: `accumulate` would repeat its work for each one.
    evaluation.params.maxDets = [max_detections if kind != KEYPOINTS else min(max_detections, KEYPOINT_DETECTIONS)]
    if kind == KEYPOINTS:
        evaluation.params.kpt_oks_sigmas = np.array(sigmas)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def _summarize(evaluation: Any, kind: str, names: Sequence[str], apart: Any) -> dict[str, float]:
    """Return the figures of `coco_metrics` for one kind.

    pycocotools' own `summarize` is not used, because it reads AP at 100 detections whatever the limit is.

    Args:
        evaluation: The accumulated evaluation.
        kind: The first part of each key.
        names: Class names.
        apart: [Cls] bool, True for classes whose masks the model did not learn; None if there are no such classes.
    """
    precision = evaluation.eval["precision"][..., -1]  # [T, recalls, Cls, areas]
    recall = evaluation.eval["recall"][..., -1]  # [T, Cls, areas]
    thresholds = evaluation.params.iouThrs
    at50, at75 = (int(np.argmin(np.abs(thresholds - value))) for value in (0.5, 0.75))

    def figures(chosen: Any) -> dict[str, float]:
        """Return the figures of the classes that `chosen` selects: an index, a slice or [Cls] bool."""
        parts = {
            "AP": precision[:, :, chosen, 0],
            "AP50": precision[at50, :, chosen, 0],
            "AP75": precision[at75, :, chosen, 0],
            "AR": recall[:, chosen, 0],
        }
        sizes = enumerate(evaluation.params.areaRngLbl)
        parts |= {f"AP_{size}": precision[:, :, chosen, index] for index, size in sizes if index}
        known = {name: values[values > -1] for name, values in parts.items()}  # -1: no ground truth
        return {name: float(values.mean()) if values.size else -1.0 for name, values in known.items()}

    metrics = {f"{kind}/{name}": value for name, value in figures(slice(None)).items()}
    groups = [np.ones(len(names), dtype=bool), *([] if apart is None else [~apart, apart])]  # in the order of GROUPS
    for suffix, chosen in zip(GROUPS.values(), groups, strict=False):
        found = figures(chosen)
        metrics |= {f"{kind}/{name}{suffix}": found[name] for name in ("AP", "AP50", "AP75")}
    for index, key in enumerate(names):
        metrics |= {f"{kind}/{name}/{key}": value for name, value in figures(index).items()}
    return metrics


def _plot(folder: Path, evaluation: Any, truth: Truth, found: list[dict[str, Any]], kind: str) -> None:
    """Draw the pictures of `coco_metrics` for one kind."""
    from tmask.engine import plots
    from tmask.engine.matching import confusion_matrix

    names = truth.names()
    plots.draw_precision_recall(folder / f"precision-recall-{kind}.png", evaluation, names, kind)
    if kind == KEYPOINTS:
        return
    sure = (item for item in found if item["score"] >= CONFUSION_SCORE)
    results = truth.coco([{**item, "id": number} for number, item in enumerate(sure, start=1)])
    counts = confusion_matrix(evaluation.cocoGt, results, kind, CONFUSION_IOU)
    plots.draw_confusion(folder / f"confusion-{kind}.png", counts, names, kind, CONFUSION_SCORE, CONFUSION_IOU)


def results_table(metrics: dict[str, float]) -> str:
    """Return the metrics as a text with one table for each kind, in percent.

    Rows: all classes, the groups, then each class. Columns: AP, AP at IoU 0.5 and 0.75, AR, and AP of small, medium and
    large objects.
    """
    lines = []
    for kind in (kind for kind in (*KINDS, KEYPOINTS) if f"{kind}/AP" in metrics):
        prefix = f"{kind}/AP/"
        rows = [(label, suffix) for label, suffix in GROUPS.items() if f"{kind}/AP{suffix}" in metrics]
        classes = (key.removeprefix(prefix) for key in metrics if key.startswith(prefix))
        rows += [(label, f"/{label}") for label in classes]
        width = max(len(label) for label, _ in rows)
        heads = [f"{kind}/{name}" if name == head else head.rjust(6) for name, head in FIGURES.items()]
        lines.append(" ".join([" " * width, *heads]))
        for label, suffix in rows:
            values = [metrics.get(f"{kind}/{name}{suffix}") for name in FIGURES]
            texts = ["" if value is None else "-" if value < 0 else f"{100 * value:.1f}" for value in values]
            cells = [text.rjust(len(head)) for text, head in zip(texts, heads, strict=True)]
            lines.append(" ".join([f"{label:<{width}}", *cells]).rstrip())
    if "images_left_out" in metrics:
        lines.append(f"{metrics['images_left_out']:.0f} images are left out: the figures are of the others")
    return "\n".join(lines)
