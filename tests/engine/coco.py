"""Ground truth and results for the tests of evaluation, and pycocotools' own figures for them."""

import contextlib
import copy
import io
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

H, W = 120, 150
CATEGORIES = [{"id": 3, "name": "disc"}, {"id": 8, "name": "bar"}]


def rle(mask: np.ndarray[Any, Any]) -> dict[str, Any]:
    encoded = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def rectangle(x: float, y: float, w: float, h: float) -> np.ndarray[Any, Any]:
    mask = np.zeros((H, W), bool)
    mask[int(y) : int(y + h), int(x) : int(x + w)] = True
    mask[int(y), int(x)] = False  # mask and box differ
    return mask


def fixture() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth of 12 images with crowds, polygons and RLEs, and results that are partly right."""
    rng = np.random.default_rng(0)
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image_id in range(1, 13):
        for _ in range(rng.integers(0, 7)):
            x, y = rng.integers(0, W - 60), rng.integers(0, H - 60)
            w, h = rng.integers(4, 60, 2)
            mask = rectangle(x, y, w, h)
            crowd = int(rng.random() < 0.1)
            polygon = [[float(v) for v in (x, y, x + w, y, x + w, y + h, x, y + h)]]
            ids = {"image_id": image_id, "category_id": int(rng.choice([3, 8]))}
            item = {"id": len(annotations) + 1, **ids, "bbox": [float(v) for v in (x, y, w, h)], "iscrowd": crowd}
            segmentation = polygon if not crowd and rng.random() < 0.5 else rle(mask)
            annotations.append(item | {"area": float(mask.sum()), "segmentation": segmentation})
            for _ in range(rng.integers(0, 3)):
                dx, dy, dw, dh = rng.integers(-4, 5, 4)
                box = [float(v) for v in (max(0, x + dx), max(0, y + dy), max(1, w + dw), max(1, h + dh))]
                found = {"bbox": box, "score": float(rng.random()), "segmentation": rle(rectangle(*box))}
                results.append(ids | found)
    images = [{"id": i, "height": H, "width": W, "file_name": f"{i}.png"} for i in range(1, 13)]
    return {"images": images, "categories": CATEGORIES, "annotations": annotations}, results


def keypoint_fixture(num_keypoints: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth of 8 images, with crowds, persons without keypoints and one image of 25; results near and far."""
    rng = np.random.default_rng(1)
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image_id in range(1, 9):
        ids = {"image_id": image_id, "category_id": 1}
        for _ in range(25 if image_id == 8 else int(rng.integers(1, 5))):
            side = rng.uniform(20, 180)
            corner = rng.uniform(0, 300, 2)
            xy = corner + side * rng.random((num_keypoints, 2))
            visibility = rng.integers(0, 3, (num_keypoints, 1)) * (rng.random() < 0.85)
            item = {"id": len(annotations) + 1, **ids, "bbox": [*corner.tolist(), side, side], "area": 0.6 * side**2}
            item |= {"iscrowd": int(rng.random() < 0.1), "num_keypoints": int((visibility > 0).sum())}
            keypoints = np.concatenate([xy * (visibility > 0), visibility], axis=1)
            annotations.append(item | {"keypoints": keypoints.ravel().tolist()})
            for _ in range(int(rng.integers(0, 3))):
                near = xy + side * rng.choice([0.01, 0.05, 0.3]) * rng.standard_normal(xy.shape)
                keypoints = np.concatenate([near, np.ones((num_keypoints, 1))], axis=1)
                results.append({**ids, "score": float(rng.random()), "keypoints": keypoints.ravel().tolist()})
    images = [{"id": i, "height": 500, "width": 500, "file_name": f"{i}.png"} for i in range(1, 9)]
    return {"images": images, "categories": [{"id": 1, "name": "person"}], "annotations": annotations}, results


def as_coco(content: dict[str, Any]) -> COCO:
    """pycocotools' object of a copy."""
    coco = COCO()
    coco.dataset = copy.deepcopy(content)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def part(truth: dict[str, Any], results: list[dict[str, Any]], ids: set[int]) -> tuple[Any, list[dict[str, Any]]]:
    """What there is of some categories."""
    content = {**truth, "categories": [item for item in truth["categories"] if item["id"] in ids]}
    content["annotations"] = [item for item in truth["annotations"] if item["category_id"] in ids]
    return content, [item for item in results if item["category_id"] in ids]


def pycocotools_stats(
    truth: dict[str, Any], results: list[dict[str, Any]], kind: str, sigmas: tuple[float, ...] | None = None
) -> dict[str, float]:
    coco, loaded = as_coco(truth), copy.deepcopy(results)
    if kind == "segm":
        for item in loaded:
            del item["bbox"]  # else loadRes takes the area of the box
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes(loaded), kind)
        if sigmas is not None:
            evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    stats = dict(
        zip([name for name in names if kind != "keypoints" or name != "AP_small"], evaluation.stats, strict=False)
    )
    stats["AR"] = evaluation.stats[5 if kind == "keypoints" else 8]
    return {f"{kind}/{name}": float(value) for name, value in stats.items()}
