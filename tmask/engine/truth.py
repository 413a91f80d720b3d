"""COCO ground truth and results in the form that pycocotools evaluates: own copies, small ids, checked values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tmask.data.annotations import known_id
from tmask.data.segmentation import check_numbers, check_segmentation, compressed, run_length

KEYPOINTS = "keypoints"  # the kind of figures of models with keypoints
FIELDS = {"bbox": "bbox", "segm": "segmentation", KEYPOINTS: "keypoints"}  # the field of a result, for each kind
_CHUNK = 255  # run lengths in one call; pycocotools refuses more with numpy 2


class Truth(NamedTuple):
    """A COCO annotation dict, and a number from 1 on for each image id and category id, in the order of the ids.

    pycocotools converts ids to float64, which does not hold every integer beyond 2^53.
    """

    dataset: dict[str, Any]
    images: dict[int, int]
    categories: dict[int, int]
    sizes: dict[int, tuple[int, int]]  # height and width, by the number of the image

    @classmethod
    def of(cls, dataset: dict[str, Any]) -> Truth:
        """Number the ids of `dataset`."""
        images, categories = (
            {key: number for number, key in enumerate(sorted(item["id"] for item in dataset[name]), start=1)}
            for name in ("images", "categories")
        )
        sizes = {images[item["id"]]: (item["height"], item["width"]) for item in dataset["images"]}
        return cls(dataset, images, categories, sizes)

    def numbers(self, item: Mapping[str, Any]) -> dict[str, int]:
        """The numbers of ``image_id`` and ``category_id`` of an annotation or a result. Raises ValueError."""
        known = {"image_id": self.images, "category_id": self.categories}
        return {key: ids[known_id(key, item[key], ids, where="the ground truth")] for key, ids in known.items()}

    def names(self) -> list[str]:
        """The names of the categories in the order of their ids; a name that occurs twice gets the id."""
        names = {item["id"]: str(item["name"]) for item in self.dataset["categories"]}
        count = Counter(names.values())
        return [names[key] if count[names[key]] == 1 else f"{names[key]} ({key})" for key in self.categories]

    def coco(self, annotations: list[dict[str, Any]]) -> Any:
        """A COCO object of `annotations`, which have numbers for ids."""
        from pycocotools.coco import COCO

        coco = COCO()
        coco.dataset = {
            "images": [{"id": i, "height": height, "width": width} for i, (height, width) in self.sizes.items()],
            "categories": [{"id": i, "name": name} for i, name in enumerate(self.names(), start=1)],
            "annotations": annotations,
        }
        coco.createIndex()
        return coco

    def objects(self, kind: str, num_keypoints: int) -> Any:
        """A COCO object of copies of the annotations (COCOeval changes them); None without ground truth of `kind`.

        For ``segm`` an annotation without a mask becomes a crowd of the shape of its box: a detection inside the box is
        neither right nor wrong.
        """
        from pycocotools import mask as mask_utils

        annotations, usable = [], 0
        for number, source in enumerate(self.dataset.get("annotations", ()), start=1):
            try:
                ids = self.numbers(source)
            except ValueError as error:
                raise ValueError(f"annotations[{number - 1}]: {error}") from error
            size = self.sizes[ids["image_id"]]
            # Not the id of the annotation: pycocotools reads a match with id 0 as no match.
            item = {**source, **ids, "id": number, "iscrowd": int(source.get("iscrowd") or 0)}
            rle = run_length(item.get("segmentation"), size) if kind == "segm" or item.get("area") is None else None
            if item.get("area") is None:
                item["area"] = float(mask_utils.area(rle)) if rle else float(item["bbox"][2] * item["bbox"][3])
            if kind == "segm":
                usable += rle is not None
                if rle is None:
                    x, y, w, h = item["bbox"]
                    rle, item["iscrowd"] = run_length([[x, y, x + w, y, x + w, y + h, x, y + h]], size), 1
                item["segmentation"] = rle
            if kind == KEYPOINTS:
                keypoints = _keypoints(item.get("keypoints") or [0] * (3 * num_keypoints), num_keypoints, "annotations")
                item["keypoints"] = keypoints
                item.setdefault("num_keypoints", sum(value > 0 for value in keypoints[2::3]))
                usable += item["num_keypoints"] > 0
            annotations.append(item)
        if not usable and (kind == KEYPOINTS or (kind == "segm" and annotations)):
            return None
        return self.coco(annotations)

    def found(self, results: list[dict[str, Any]], kind: str, num_keypoints: int) -> list[dict[str, Any]]:
        """The results as annotations, with the area and the box that pycocotools computes for `kind`.

        For ``segm`` both are the mask's; for ``keypoints`` the box encloses all keypoints.
        """
        from pycocotools import mask as mask_utils

        annotations = []
        for number, result in enumerate(results, start=1):
            item = {**self.numbers(result), "id": number, "iscrowd": 0, "score": result["score"]}
            if kind == "segm":
                item["segmentation"] = compressed(result["segmentation"], self.sizes[item["image_id"]])
            else:
                box: Any = result.get("bbox")
                if kind == KEYPOINTS:
                    item["keypoints"] = _keypoints(result["keypoints"], num_keypoints, f"results[{number - 1}]")
                    x, y = item["keypoints"][0::3], item["keypoints"][1::3]
                    box = [min(x), min(y), max(x) - min(x), max(y) - min(y)]
                item |= {"bbox": box, "area": box[2] * box[3]}
            annotations.append(item)
        for start in range(0, len(annotations) if kind == "segm" else 0, _CHUNK):
            chunk = annotations[start : start + _CHUNK]
            runs = [item["segmentation"] for item in chunk]
            areas, boxes = mask_utils.area(runs).tolist(), mask_utils.toBbox(runs).tolist()
            for item, area, box in zip(chunk, areas, boxes, strict=True):
                item |= {"area": float(area), "bbox": box}
        return annotations

    def check(self, results: Sequence[Any], kind: str) -> None:
        """Raise ValueError unless each result is whole, finite, and of a known image and category."""
        field = FIELDS[kind]
        for i, result in enumerate(results):
            try:
                if not isinstance(result, dict):
                    raise ValueError(f"expected an object with fields, got {result!r}")
                for name in ("image_id", "category_id", "score", field):
                    if result.get(name) is None:
                        raise ValueError(f"expected a field {name!r}, got none")
                image, value = self.numbers(result)["image_id"], result[field]
                check_numbers("score", [result["score"]], limit=math.inf)
                if kind != "segm":
                    check_numbers(field, list(value), limit=math.inf)
                    if kind == "bbox" and len(value) != 4:
                        raise ValueError(f"bbox: expected four numbers [x, y, width, height], got {value!r}")
                elif not isinstance(value, dict):
                    raise ValueError(f"segmentation: expected run lengths, got {type(value).__name__}")
                else:
                    check_segmentation(value, self.sizes[image])
            except (ValueError, TypeError) as error:
                raise ValueError(f"results[{i}]: {error}") from error


def _keypoints(values: Sequence[float], count: int, name: str) -> Sequence[float]:
    if len(values) != 3 * count:
        raise ValueError(f"{name}: keypoints: expected {3 * count} numbers, three for each sigma, got {len(values)}")
    return values
