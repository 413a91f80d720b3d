"""pycocotools' evaluator with its two slow parts replaced: overlaps that are kept, and the matching of detections.

pycocotools keeps the IoU of every detection with every object of its image until the end, and matches in a loop over
area ranges, thresholds, detections and objects. With 2,000 objects an image that is 32 MB and 160 million steps. Here
only pairs that can match are kept, and the matching takes a few steps for all detections at once. Matches, and so every
figure that pycocotools computes from them, are the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval

Array = npt.NDArray[Any]

_CHUNK_PAIRS = 2**18  # IoUs that are computed at once


class _Image(NamedTuple):
    """The D detections, best first, and the G objects of one image and class; P pairs whose IoU may be a match."""

    detection: Array  # [P] in 0..D-1
    object: Array  # [P] in 0..G-1
    iou: Array  # [P]
    detection_ids: Array  # [D]
    scores: Array  # [D]
    detection_areas: Array  # [D]
    object_ids: Array  # [G]
    object_areas: Array  # [G]
    crowd: Array  # [G] bool


class Evaluator(COCOeval):
    """COCOeval of ``bbox`` or ``segm`` whose memory grows with the detections, without a loop over them to match.

    Everything but `computeIoU` and `evaluateImg` is pycocotools' own code. Ids of annotations must not be 0.
    """

    def computeIoU(self, imgId: int, catId: int) -> _Image | None:  # noqa: N802
        """The pairs of an image and class whose IoU reaches the lowest threshold; None if there is nothing."""
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
        self,
        imgId: int,
        catId: int,
        aRng: tuple[float, float],
        maxDet: int,
    ) -> dict[str, Any] | None:
        """The matches of an image and class, as pycocotools returns them."""
        image: _Image | None = self.ious[imgId, catId]
        if image is None:
            return None
        low, high = aRng
        ignored = image.crowd | (image.object_areas < low) | (image.object_areas > high)  # [G]
        shape = len(self.params.iouThrs), len(image.scores)
        found, objects = np.zeros(shape), np.zeros((shape[0], len(ignored)))  # [T, D], [T, G]: ids of the other one
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
    """COCO's matches at each threshold: indices of threshold, detection and object, [M] each.

    In COCO's rule each detection, best first, takes the free object of the largest IoU at or above the threshold (the
    last of equals), and one that is ignored only if there is no other. A crowd is never taken up. That is the stable
    matching (Gale and Shapley 1962) in which every object prefers the best detection. Deferred acceptance finds it
    in rounds: every detection asks for the next object on its list, and every object keeps the best that asked.
    """
    prefer = np.lexsort((-image.object, -image.iou, ignored[image.object], image.detection))
    t, pair = np.nonzero(image.iou[prefer] >= thresholds[:, None])  # of each t and detection one after another
    pair = prefer[pair]
    num_detections, num_objects = len(image.scores), len(ignored)
    asking = t * num_detections + image.detection[pair]  # rises; within a threshold the better one is lower
    asked = t * num_objects + image.object[pair]
    crowd = image.crowd[image.object[pair]]
    kept = np.full(len(thresholds) * num_objects, np.iinfo(np.int64).max)  # the best that asked, for each object
    at = np.flatnonzero(np.diff(asking, prepend=-1))  # the pair that each detection asks with
    while True:
        np.minimum.at(kept, asked[at], asking[at])
        refused = ~crowd[at] & (kept[asked[at]] < asking[at])
        if not refused.any():
            return t[at], image.detection[pair[at]], image.object[pair[at]]
        after = np.minimum(at + refused, len(asking) - 1)
        more = ~refused | ((after > at) & (asking[after] == asking[at]))
        at = after[more]
