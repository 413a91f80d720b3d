"""COCO evaluation: a model and a loader in, average precision of boxes, masks and keypoints out."""

from __future__ import annotations

import contextlib
import io
import json
import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tmask.checks import nearest
from tmask.data.annotations import known_id
from tmask.data.segmentation import check_numbers, check_segmentation, compressed, run_length
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
# Columns of the table: the keys of all classes, and with ``/NAME`` those of each.
FIGURES = {name: name.removeprefix("AP_") for name in ("AP", "AP50", "AP75", "AR", "AP_small", "AP_medium", "AP_large")}
_FIELDS = {"bbox": "bbox", "segm": "segmentation", KEYPOINTS: "keypoints"}  # of a result, for each kind
CONFUSION_SCORE, CONFUSION_IOU = 0.5, 0.5  # least ones of a detection in the confusion matrix
_CHUNK = 255  # run lengths that are measured at once; pycocotools refuses more with numpy 2


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
    """COCO metrics of `model` on `dataset` (a CocoDataset), whose images `loader` gives.

    The keys are those of `coco_metrics`, as are `boxes_only` and `plots`, of ``keypoints`` too if the model finds them.
    `max_detections` of each class and image count in the AP; the model must be set to give as many (``max_detections``
    of its config). One warning counts the images that hold more objects. With `results_file` the detections are also
    written as COCO results.
    Images that `dataset` has left out have no part in any of it; ``images_left_out`` is their number, if there are any.
    """
    warn_limits(dataset, model, max_detections)
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
    """Warn, once for a CocoDataset, if images hold more objects than detections can count.

    `max_detections` of each class and image count; a model has a limit of detections of an image and one of the
    proposals they are made of. `options` name the settings of the three, as they are told.
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
    """Warn if images hold more objects than a limit: a number, whether it holds for each class, and its name."""
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
    wrong = [label for label in result["labels"].tolist() if not 1 <= label <= len(category_ids)]
    if wrong:
        raise ValueError(f"labels: expected 1..{len(category_ids)}, one a category, got {wrong[0]}")
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
    plots: str | Path | None = None,
    check: bool = True,
) -> dict[str, float]:
    """pycocotools' figures for COCO results against a COCO annotation dict; neither is changed.

    For each kind: ``bbox/AP``, ``AP50``, ``AP75``, ``AP_small``, ``AP_medium``, ``AP_large`` and ``AR``, and all of
    them of each class, ``bbox/AP50/<class name>``, in 0..1, with up to `max_detections` detections of each image and
    class; -1 where there is no ground truth. Classes of the same name are told apart by their category id,
    ``name (id)``. No results give 0. Annotations without ``area`` or ``iscrowd`` get them. In ``segm`` a ground truth
    without a mask neither helps nor harms; if there is none with a mask, ``segm`` is left out. One warning counts the
    images that hold more than `max_detections` objects of a class.

    `boxes_only` are the ids of the categories whose masks the model did not learn from. If there are any, AP, AP50 and
    AP75 also come for them and for the others apart: ``segm/AP_boxes_only``, ``segm/AP_with_masks``...

    ``keypoints`` (to be named in `kinds`) goes by the similarity of keypoints, counts up to 20 detections an image, and
    has no ``AP_small``. `keypoint_sigmas` are the spreads of the skeleton, by default COCO's of a person. If no
    annotation has a keypoint it is left out.

    Ids may be any whole numbers, also those that no float holds, in which pycocotools counts.

    `plots`: a folder for pictures, ``precision-recall-KIND.png`` for each kind and ``confusion-KIND.png`` for boxes and
    masks, drawn by `tmask.engine.plots`.

    `check` False: the results are those of `detect`. They are not checked for values that the model does not give, and
    nothing is told of `max_detections`.

    Errors: ValueError for results of an image or a category that the ground truth lacks, without a field they need,
    with numbers that are not finite or a mask of another size, and for keypoints of another number than sigmas.
    """
    for kind in kinds:
        if kind not in _FIELDS:
            raise ValueError(f"kinds: expected {nearest(kind, _FIELDS)}, got {kind!r}")
    truth = _Truth.of(ground_truth)
    if check:
        _warn_limits(ground_truth, [(max_detections, True, "max_detections")], "the ground truth")
    sigmas = PERSON.sigmas if keypoint_sigmas is None else tuple(keypoint_sigmas)
    names = truth.class_names()
    apart = np.array([key in boxes_only for key in truth.categories]) if boxes_only else None
    metrics: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints at every step
        for kind in kinds:
            objects = _ground_truth(truth, kind, len(sigmas))
            if objects is None:
                continue
            if check:
                _check_results(truth, results, kind)
            found = _results(truth, results, kind, len(sigmas))
            evaluated = _run_cocoeval(objects, truth.coco(found), kind, max_detections, sigmas)
            metrics |= _summarize(evaluated, kind, names, apart)
            if plots is not None:
                from tmask.engine.plots import draw_confusion, draw_precision_recall

                draw_precision_recall(Path(plots, f"precision-recall-{kind}.png"), evaluated, names, kind)
                if kind != KEYPOINTS:
                    sure = (item for item in found if item["score"] >= CONFUSION_SCORE)
                    sure = truth.coco([{**item, "id": number} for number, item in enumerate(sure, start=1)])
                    counts = confusion_matrix(objects, sure, kind)
                    draw_confusion(
                        Path(plots, f"confusion-{kind}.png"), counts, names, kind, CONFUSION_SCORE, CONFUSION_IOU
                    )
    return metrics


class _Truth(NamedTuple):
    """A COCO annotation dict, and the number from 1 on that stands for each image and category id, in their order.

    pycocotools takes ids through float64, which holds no whole number beyond 2^53 for sure.
    """

    dataset: dict[str, Any]
    images: dict[int, int]
    categories: dict[int, int]
    sizes: dict[int, tuple[int, int]]  # height and width, by the number of the image

    @classmethod
    def of(cls, dataset: dict[str, Any]) -> _Truth:
        images, categories = (
            {key: number for number, key in enumerate(sorted(item["id"] for item in dataset[name]), start=1)}
            for name in ("images", "categories")
        )
        sizes = {images[item["id"]]: (item["height"], item["width"]) for item in dataset["images"]}
        return cls(dataset, images, categories, sizes)

    def numbers(self, item: Mapping[str, Any]) -> dict[str, int]:
        """``image_id`` and ``category_id`` of an annotation or a result as numbers."""
        known = {"image_id": self.images, "category_id": self.categories}
        return {key: ids[known_id(key, item[key], ids, where="the ground truth")] for key, ids in known.items()}

    def coco(self, annotations: list[dict[str, Any]]) -> Any:
        """A COCO object of annotations with numbers for ids."""
        from pycocotools.coco import COCO

        names = {item["id"]: str(item["name"]) for item in self.dataset["categories"]}
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i, "height": height, "width": width} for i, (height, width) in self.sizes.items()],
            "categories": [{"id": number, "name": names[key]} for key, number in self.categories.items()],
            "annotations": annotations,
        }
        coco.createIndex()
        return coco

    def class_names(self) -> list[str]:
        """The names of the categories in the order of their ids; those that occur twice with their id."""
        names = {item["id"]: str(item["name"]) for item in self.dataset["categories"]}
        count = Counter(names.values())
        return [names[key] if count[names[key]] == 1 else f"{names[key]} ({key})" for key in self.categories]


def _check_results(truth: _Truth, results: Sequence[Any], kind: str) -> None:
    """Raise ValueError unless all are of an image and a category of the ground truth, whole and finite."""
    field = _FIELDS[kind]
    for i, result in enumerate(results):
        try:
            if not isinstance(result, dict):
                raise ValueError(f"expected an object with fields, got {result!r}")
            for name in ("image_id", "category_id", "score", field):
                if result.get(name) is None:
                    raise ValueError(f"expected a field {name!r}, got none")
            image, value = truth.numbers(result)["image_id"], result[field]
            check_numbers("score", [result["score"]], limit=math.inf)
            if kind != "segm":
                check_numbers(field, list(value), limit=math.inf)
                if kind == "bbox" and len(value) != 4:
                    raise ValueError(f"bbox: expected four numbers [x, y, width, height], got {value!r}")
            elif not isinstance(value, dict):
                raise ValueError(f"segmentation: expected run lengths, got {type(value).__name__}")
            else:
                check_segmentation(value, truth.sizes[image])
        except (ValueError, TypeError) as error:
            raise ValueError(f"results[{i}]: {error}") from error


def _ground_truth(truth: _Truth, kind: str, num_keypoints: int) -> Any:
    """A COCO object of its own annotations (COCOeval changes them), or None if `kind` has no ground truth."""
    from pycocotools import mask as mask_utils

    annotations, usable = [], 0
    for number, source in enumerate(truth.dataset.get("annotations", ()), start=1):
        try:
            ids = truth.numbers(source)
        except ValueError as error:
            raise ValueError(f"annotations[{number - 1}]: {error}") from error
        size = truth.sizes[ids["image_id"]]
        item = {**source, **ids, "id": number, "iscrowd": int(source.get("iscrowd") or 0)}  # id 0 reads as "no match"
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
    return truth.coco(annotations)


def _keypoints(values: Sequence[float], count: int, name: str) -> Sequence[float]:
    if len(values) != 3 * count:
        raise ValueError(f"{name}: keypoints: expected {3 * count} numbers, three for each sigma, got {len(values)}")
    return values


def _results(truth: _Truth, results: list[dict[str, Any]], kind: str, num_keypoints: int) -> list[dict[str, Any]]:
    """The results as annotations. For ``segm`` area and box are the mask's, as when it is loaded alone.

    For ``keypoints`` they are those of the box around all of them, also as when they are loaded alone.
    """
    from pycocotools import mask as mask_utils

    annotations = []
    for number, result in enumerate(results, start=1):
        item = {**truth.numbers(result), "id": number, "iscrowd": 0, "score": result["score"]}
        if kind == "segm":
            item["segmentation"] = compressed(result["segmentation"], truth.sizes[item["image_id"]])
        elif kind == KEYPOINTS:
            keypoints = _keypoints(result["keypoints"], num_keypoints, f"results[{number - 1}]")
            x, y = keypoints[0::3], keypoints[1::3]
            box = [min(x), min(y), max(x) - min(x), max(y) - min(y)]
            item |= {"keypoints": keypoints, "bbox": box, "area": box[2] * box[3]}
        else:
            item |= {"bbox": result["bbox"], "area": result["bbox"][2] * result["bbox"][3]}
        annotations.append(item)
    for start in range(0, len(annotations) if kind == "segm" else 0, _CHUNK):
        chunk = annotations[start : start + _CHUNK]
        runs = [item["segmentation"] for item in chunk]
        areas, boxes = mask_utils.area(runs).tolist(), mask_utils.toBbox(runs).tolist()
        for item, area, box in zip(chunk, areas, boxes, strict=True):
            item |= {"area": float(area), "bbox": box}
    return annotations


def _corners(bbox: Sequence[float]) -> list[float]:
    x, y, w, h = bbox
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def _run_cocoeval(truth: Any, results: Any, kind: str, max_detections: int, sigmas: Sequence[float]) -> Any:
    from pycocotools.cocoeval import COCOeval

    from tmask.engine.matching import Evaluator

    evaluation = (COCOeval if kind == KEYPOINTS else Evaluator)(truth, results, kind)
    # One limit: `accumulate` would repeat its work for each, and the figures are of the largest alone.
    evaluation.params.maxDets = [max_detections if kind != KEYPOINTS else min(max_detections, KEYPOINT_DETECTIONS)]
    if kind == KEYPOINTS:
        evaluation.params.kpt_oks_sigmas = np.array(sigmas)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def _summarize(evaluation: Any, kind: str, names: Sequence[str], apart: Any) -> dict[str, float]:
    """The figures at the largest maxDets. (pycocotools' own `summarize` takes AP at 100 whatever is set.)

    `apart` [K] bool says of which classes no masks were learnt; None if all are alike.
    """
    precision = evaluation.eval["precision"][..., -1]  # [T thresholds, R recalls, K classes, A areas]
    recall = evaluation.eval["recall"][..., -1]  # [T, K, A]
    thresholds = evaluation.params.iouThrs
    at50, at75 = (int(np.argmin(np.abs(thresholds - value))) for value in (0.5, 0.75))

    def figures(chosen: Any) -> dict[str, float]:
        """Of some of the K classes, which an index, a slice or [K] bool names."""
        parts = {
            "AP": precision[:, :, chosen, 0],
            "AP50": precision[at50, :, chosen, 0],
            "AP75": precision[at75, :, chosen, 0],
            "AR": recall[:, chosen, 0],
        }
        sizes = enumerate(evaluation.params.areaRngLbl)
        parts |= {f"AP_{size}": precision[:, :, chosen, index] for index, size in sizes if index}
        return {name: _mean(values) for name, values in parts.items()}

    metrics = {f"{kind}/{name}": value for name, value in figures(slice(None)).items()}
    groups = [np.ones(len(names), dtype=bool), *([] if apart is None else [~apart, apart])]  # as those of GROUPS
    for suffix, chosen in zip(GROUPS.values(), groups, strict=False):
        found = figures(chosen)
        metrics |= {f"{kind}/{name}{suffix}": found[name] for name in ("AP", "AP50", "AP75")}
    for index, key in enumerate(names):
        metrics |= {f"{kind}/{name}/{key}": value for name, value in figures(index).items()}
    return metrics


def confusion_matrix(truth: Any, results: Any, kind: str) -> np.ndarray[Any, Any]:
    """How many objects of each class (row) were found as each class (column): [K + 1, K + 1].

    The last row has the detections without an object, the last column the objects without a detection. Detections of
    all classes compete for the objects by COCO's rule at an IoU of 0.5. Crowds, and what lies in them, do not count.
    `truth` and `results` are COCO objects with categories numbered from 1; all the results count.
    """
    from tmask.engine.matching import Evaluator

    evaluation = Evaluator(truth, results, kind)
    params = evaluation.params
    params.useCats, params.iouThrs = 0, np.array([CONFUSION_IOU])
    params.areaRng, params.maxDets = params.areaRng[:1], [max(1, len(results.anns))]
    evaluation.evaluate()
    background = len(truth.cats)
    counts = np.zeros((background + 1, background + 1), dtype=np.int64)
    of_truth, of_results = (
        np.array([background, *(coco.anns[i]["category_id"] - 1 for i in range(1, len(coco.anns) + 1))])
        for coco in (truth, results)
    )
    for image in evaluation.evalImgs:
        if image is None:
            continue
        matched, real = image["dtMatches"][0].astype(np.int64), ~image["dtIgnore"][0]
        np.add.at(counts, (of_truth[matched[real]], of_results[image["dtIds"][real]]), 1)
        missed = image["gtIds"][(image["gtMatches"][0] == 0) & ~image["gtIgnore"]]
        np.add.at(counts, (of_truth[missed], background), 1)
    return counts


def _mean(values: np.ndarray[Any, Any]) -> float:
    known = values[values > -1]  # -1 marks a class or size without ground truth
    return float(known.mean()) if known.size else -1.0


def results_table(metrics: dict[str, float]) -> str:
    """The metrics as a plain text table in percent, one for each kind.

    A row for all classes and for each group, then one a class; the columns are AP, at IoU 0.5 and 0.75, AR, and
    AP of small, medium and large objects.
    """
    kinds = [kind for kind in (*KINDS, KEYPOINTS) if f"{kind}/AP" in metrics]
    lines = []
    for kind in kinds:
        prefix = f"{kind}/AP/"
        classes = [key.removeprefix(prefix) for key in metrics if key.startswith(prefix)]
        rows = [(label, suffix) for label, suffix in GROUPS.items() if f"{kind}/AP{suffix}" in metrics]
        rows += [(label, f"/{label}") for label in classes]
        width = max(len(label) for label, _ in rows)
        heads = [f"{kind}/{name}" if name == head else head.rjust(6) for name, head in FIGURES.items()]
        lines.append(" ".join([" " * width, *heads]))
        for label, suffix in rows:
            values = [metrics.get(f"{kind}/{name}{suffix}") for name in FIGURES]
            cells = ["" if value is None else _percent(value) for value in values]
            cells = [cell.rjust(len(head)) for cell, head in zip(cells, heads, strict=True)]
            lines.append(" ".join([f"{label:<{width}}", *cells]).rstrip())
    if "images_left_out" in metrics:
        lines.append(f"{metrics['images_left_out']:.0f} images are left out: the figures are of the others")
    return "\n".join(lines)


def _percent(value: float) -> str:
    return "-" if value < 0 else f"{100 * value:.1f}"
