"""pycocotools' evaluator with two faster parts, the overlaps and the matching; confusion matrix; matches of one image.

pycocotools keeps the IoU of every detection with every object of its image until the end, and matches in a loop over
area ranges, thresholds, detections and objects. For an image with 2,000 objects that is 32 MB and 160 million steps.
This module keeps only pairs that can match and matches all detections at once, in a few steps. The matches, and so all
figures that pycocotools computes from the matches, are the same.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval

from tmask.engine.detect import coco_results
from tmask.engine.truth import Truth
from tmask.visualize import CROWD, FALSE

Array = npt.NDArray[Any]

_CHUNK_PAIRS = 2**18  # IoUs in one call


class _Image(NamedTuple):
    """D detections, best first, and G objects of one image and class, and the pairs whose IoU allows a match."""

    detection: Array  # [pairs] in 0..D-1
    object: Array  # [pairs] in 0..G-1
    iou: Array  # [pairs]
    detection_ids: Array  # [D]
    scores: Array  # [D]
    detection_areas: Array  # [D]
    object_ids: Array  # [G]
    object_areas: Array  # [G]
    crowd: Array  # [G] bool


class Evaluator(COCOeval):
    """COCOeval of ``bbox`` or ``segm`` with memory linear in the detections, and no Python loop over detections.

    Only `computeIoU` and `evaluateImg` differ from pycocotools. Ids of annotations must not be 0.
    """

    def computeIoU(self, imgId: int, catId: int) -> _Image | None:  # noqa: N802
        """The pairs of an image and class whose IoU reaches the lowest threshold; None for an empty image."""
        params = self.params
        classes = [catId] if params.useCats else params.catIds
        objects = [item for number in classes for item in self._gts[imgId, number]]
        found = [item for number in classes for item in self._dts[imgId, number]]
        if not objects and not found:
            return None
        scores = np.array([item["score"] for item in found], dtype=np.float64)
        order = np.argsort(-scores, kind="mergesort")[: params.maxDets[-1]]
        found = [found[k] for k in order]
        crowd = [int(item["iscrowd"]) for item in objects]
        field = "segmentation" if params.iouType == "segm" else "bbox"
        shapes = [item[field] for item in objects]
        least = min(params.iouThrs.min(), 1 - 1e-10)
        detection, object_, iou = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0)]
        rows = max(1, _CHUNK_PAIRS // max(1, len(objects)))
        for start in range(0, len(found) if objects else 0, rows):
            ious = coco_mask.iou([item[field] for item in found[start : start + rows]], shapes, crowd)  # [rows, G]
            d, g = np.nonzero(ious >= least)
            detection.append(d + start)
            object_.append(g)
            iou.append(ious[d, g])
        return _Image(
            np.concatenate(detection),
            np.concatenate(object_),
            np.concatenate(iou),
            np.array([item["id"] for item in found], dtype=np.int64),
            scores[order],
            np.array([item["area"] for item in found], dtype=np.float64),
            np.array([item["id"] for item in objects], dtype=np.int64),
            np.array([item["area"] for item in objects], dtype=np.float64),
            np.array(crowd, dtype=bool),
        )

    def evaluateImg(  # noqa: N802
        self, imgId: int, catId: int, aRng: tuple[float, float], maxDet: int
    ) -> dict[str, Any] | None:
        """The matches of an image and class, as pycocotools returns them."""
        image: _Image | None = self.ious[imgId, catId]
        if image is None:
            return None
        low, high = aRng
        ignored = image.crowd | (image.object_areas < low) | (image.object_areas > high)  # [G]
        shape = len(self.params.iouThrs), len(image.scores)
        found, objects = np.zeros(shape), np.zeros((shape[0], len(ignored)))  # [T, D], [T, G]: id of the match
        is_ignored = np.zeros(shape, dtype=bool)
        t, d, g = _match(image, ignored, np.minimum(self.params.iouThrs, 1 - 1e-10))
        found[t, d] = image.object_ids[g]
        objects[t, g] = image.detection_ids[d]
        is_ignored[t, d] = ignored[g]
        outside = (image.detection_areas < low) | (image.detection_areas > high)  # [D]
        order = np.argsort(ignored, kind="stable")  # pycocotools lists ignored objects last
        return {
            "image_id": imgId,
            "category_id": catId,
            "aRng": aRng,
            "maxDet": maxDet,
            "dtIds": image.detection_ids,
            "gtIds": image.object_ids[order],
            "dtMatches": found,
            "gtMatches": objects[:, order],
            "dtScores": image.scores,
            "gtIgnore": ignored[order],
            "dtIgnore": is_ignored | ((found == 0) & outside),
        }


def _match(image: _Image, ignored: Array, thresholds: Array) -> tuple[Array, Array, Array]:
    """COCO's matches at all thresholds: indices of threshold, detection and object, [matches] each.

    COCO's rule: each detection, best first, takes the free object with the largest IoU at or above the threshold. Of
    equal objects it takes the last one; it takes an ignored object only if no other is free. A crowd is always free.
    The result is the stable matching (Gale and Shapley 1962) where every object prefers the best detection. Deferred
    acceptance finds it in rounds: each detection asks the next object on its list, each object keeps the best asker.
    """
    prefer = np.lexsort((-image.object, -image.iou, ignored[image.object], image.detection))
    t, pair = np.nonzero(image.iou[prefer] >= thresholds[:, None])  # sorted by threshold, then detection
    pair = prefer[pair]
    num_detections, num_objects = len(image.scores), len(ignored)
    asking = t * num_detections + image.detection[pair]  # ascending; of one threshold the better detection is lower
    asked = t * num_objects + image.object[pair]
    crowd = image.crowd[image.object[pair]]
    kept = np.full(len(thresholds) * num_objects, np.iinfo(np.int64).max)  # best asker of each object
    at = np.flatnonzero(np.diff(asking, prepend=-1))  # the present pair of each detection
    while True:
        np.minimum.at(kept, asked[at], asking[at])
        refused = ~crowd[at] & (kept[asked[at]] < asking[at])
        if not refused.any():
            return t[at], image.detection[pair[at]], image.object[pair[at]]
        after = np.minimum(at + refused, len(asking) - 1)
        more = ~refused | ((after > at) & (asking[after] == asking[at]))
        at = after[more]


def confusion_matrix(truth: Any, results: Any, kind: str, iou: float) -> Array:
    """Count the objects of each class (row) that were found as each class (column).

    Detections of all classes compete for the objects by COCO's rule at the threshold `iou`. Crowds, and detections in
    crowds, do not count. `truth` and `results` are COCO objects with categories numbered from 1; all results count.

    Returns:
        [Cls + 1, Cls + 1] int64. The last row: detections without object. The last column: objects without detection.
    """
    background = len(truth.cats)
    counts = np.zeros((background + 1, background + 1), dtype=np.int64)
    of_truth, of_results = (
        np.array([background, *(coco.anns[i]["category_id"] - 1 for i in range(1, len(coco.anns) + 1))])
        for coco in (truth, results)
    )
    for image in _matched(truth, results, kind, iou, by_class=False):
        matched, real = image["dtMatches"][0].astype(np.int64), ~image["dtIgnore"][0]
        np.add.at(counts, (of_truth[matched[real]], of_results[image["dtIds"][real]]), 1)
        missed = image["gtIds"][(image["gtMatches"][0] == 0) & ~image["gtIgnore"]]
        np.add.at(counts, (of_truth[missed], background), 1)
    return counts


def match_instances(
    truth: Mapping[str, Any], found: Mapping[str, Any], size: tuple[int, int], iou: float = 0.5
) -> list[int]:
    """Match the detections in an image to its objects, within each class, by COCO's rule at the threshold `iou`.

    Args:
        truth: ``boxes`` [G, 4] xyxy and ``labels`` [G]. Optional: ``masks`` (G run lengths), ``has_mask`` [G] and
            ``iscrowd`` [G].
        found: ``boxes`` [D, 4], ``labels`` [D] and ``scores`` [D]. Optional: ``masks`` (D run lengths).
        size: Height and width of the image.
        iou: Least IoU of a match: of masks, or of boxes if one side has no masks.

    Returns:
        For each detection the number of its object, from 0; `FALSE` for none, and `CROWD` for a detection in a crowd or
        in the box of an object without a mask.
    """
    numbers = range(1, 1 + max([0, *truth["labels"].tolist(), *found["labels"].tolist()]))
    boxes = truth["boxes"].tolist()
    annotations: list[dict[str, Any]] = [
        {"image_id": 1, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for label, (x1, y1, x2, y2) in zip(truth["labels"].tolist(), boxes, strict=True)
    ]
    for g, item in enumerate(annotations):
        item["iscrowd"] = int(truth["iscrowd"][g]) if "iscrowd" in truth else 0
        if "masks" in truth and ("has_mask" not in truth or truth["has_mask"][g]):
            item["segmentation"] = truth["masks"][g]
    image = {"id": 1, "height": size[0], "width": size[1]}
    categories = [{"id": number, "name": str(number)} for number in numbers]
    source = Truth.of({"images": [image], "categories": categories, "annotations": annotations})
    matches = np.full(len(found["labels"]), FALSE)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints at every step
        objects = source.objects("segm", 0) if "masks" in found else None
        kind = "bbox" if objects is None else "segm"
        results = source.found(coco_results(1, dict(found), numbers), kind, 0)
        for part in _matched(objects or source.objects("bbox", 0), source.coco(results), kind, iou, by_class=True):
            # Ids count from 1, and id 0 is no match.
            matches[part["dtIds"] - 1] = np.where(part["dtIgnore"][0], CROWD, part["dtMatches"][0] - 1)
    return [int(match) for match in matches]


def _matched(truth: Any, results: Any, kind: str, iou: float, *, by_class: bool) -> list[dict[str, Any]]:
    """Return `Evaluator.evaluateImg` at the threshold `iou` of each image, and of each class or of all together."""
    evaluation = Evaluator(truth, results, kind)
    params = evaluation.params
    params.useCats, params.iouThrs = int(by_class), np.array([iou])
    params.areaRng, params.maxDets = params.areaRng[:1], [max(1, len(results.anns))]
    evaluation.evaluate()
    return [image for image in evaluation.evalImgs if image is not None]
