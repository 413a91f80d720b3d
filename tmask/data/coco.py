"""Data sets in COCO's instance format: a folder of images and one JSON file.

Everything that can be wrong in the files but the images' pixels is found when the data set is opened, and named; a
training run does not die of a missing image in its third hour. Letters: G annotations of an image, H W its size.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tmask.checks import nearest
from tmask.data.annotations import fill_annotations, naming, read_coco
from tmask.data.categories import match_categories, root_category
from tmask.data.image_files import find_image_files
from tmask.data.images import BadImageError, read_picture, warn_transparent, warn_turned
from tmask.data.keypoints import read_keypoints
from tmask.data.mask_classes import is_split, mask_category_ids
from tmask.data.segmentation import compressed, covers_pixels
from tmask.data.summary import summarize
from tmask.model.transform import mask_chunks, num_words
from tmask_kernels import pack_masks

Target = dict[str, Any]
Transforms = Callable[[Tensor, Target], tuple[Tensor, Target]]

# Pixels. Of a narrower box float32 may lose the area when the image is resized.
_MIN_SIDE = 0.01


class CocoDataset(Dataset[tuple[Tensor, Target]]):
    """Item i: the image, uint8 [3, H, W] RGB, and its target, a dict of

    ``image_id`` int, ``boxes`` [G, 4] float32 xyxy clipped to the image, ``labels`` [G] int64, ``masks`` [G, H, W]
    uint8 0/1, ``iscrowd`` [G] bool, ``has_mask`` [G] bool (False where there is no polygon and no run length, or it
    covers no pixel; the mask is zeros then).

    If a category names keypoints, ``keypoint_names`` and ``keypoint_edges`` (pairs of numbers from 0) hold them and the
    target also has ``keypoints`` [G, Kp, 3] float32: x, y and visibility (0 unknown, 1 hidden, 2 visible). COCO counts
    pixels; in the target, as for boxes, the centre of the first one is at 0.5.

    Label i in 1..num_classes-1 stands for ``category_ids[i - 1]``; 0 is the background. Images without annotations
    are kept. Annotations whose box has no area inside the image (is less than 0.01 pixels wide or high) are left out
    of the targets. A missing ``iscrowd`` means 0, a missing ``area`` is the mask's, or the box's without a mask, a
    missing ``bbox`` the mask's. A category that is only the heading of all others is left out. An image whose file
    has another name is found if one file alone can be meant.

    ``summary`` is a text of what the file holds. Every contradiction in it, and all that is left out or made, is
    counted in one warning with the id of the first annotation.

    `crowds` is ``ignore`` or ``instances``: what crowd annotations are taken for. Annotation tools mark masks of single
    objects as crowds.

    With `packed_masks` the masks are bits, [G, H, ceil(W / 32)] int32 (`tmask_kernels.pack_masks`), and never are all
    of an image's held as bytes: what training uses.

    `mask_classes` (see `mask_category_ids`) names the categories whose masks are used; those of the others, whose ids
    ``boxes_only`` has, are left out of the targets, ``has_mask`` is False. None: all are used.

    `masks`: False for a model without masks. Targets then have neither ``masks`` nor ``has_mask``, no mask is decoded,
    and masks that are damaged, empty or missing are no fault. A missing ``bbox`` is still the mask's.

    `transforms` (image, target) -> (image, target) runs on each item.

    `apply_exif`: turn images upright by their EXIF orientation (True), as the annotations of most tools are drawn, or
    read them as they are stored (False), as COCO's are. None: as stored, with one warning at the first image that has
    an orientation. One more warning tells of alpha that is dropped though not opaque.

    `allow_missing`: leave out the images whose files do not exist, unless that is all of them. ``left_out`` has the
    numbers of the images that are left out, here or by `leave_out`, each with the reason. Items keep their numbers;
    the loader skips these, and ``coco`` does not have them.

    ``coco`` is the `pycocotools.coco.COCO` of the whole file for evaluation. There an annotation id of 0 is replaced,
    since its evaluator takes a match with id 0 for none.

    Errors: ValueError, naming file and entry, for a missing folder, file or image, broken JSON, no image or category,
    missing or wrong fields, masks that are all empty, and unknown `mask_classes`; on reading an item, for an image that
    cannot be decoded or is not of the size the file says.
    """

    def __init__(
        self,
        images_folder: str | Path,
        annotation_file: str | Path,
        *,
        transforms: Transforms | None = None,
        masks: bool = True,
        packed_masks: bool = False,
        mask_classes: str | None = None,
        apply_exif: bool | None = None,
        crowds: str = "ignore",
        allow_missing: bool = False,
    ) -> None:
        from pycocotools.coco import COCO

        if crowds not in ("ignore", "instances"):
            raise ValueError(f"crowds: expected {nearest(crowds, ('ignore', 'instances'))}, got {crowds!r}")
        if mask_classes is not None and not masks:
            raise ValueError(f"mask_classes: expected none with masks false, got {mask_classes!r}")
        self.images_folder, self.annotation_file = Path(images_folder), Path(annotation_file)
        self.masks = masks
        self.transforms, self.packed_masks, self.apply_exif = transforms, packed_masks, apply_exif
        self.told: set[str] = set()  # of "exif" and "alpha": what a warning has told of
        if not self.images_folder.is_dir():
            fault = "expected a folder, got a file" if self.images_folder.exists() else "no such folder"
            raise ValueError(f"images_folder: {fault}: {self.images_folder}")
        content = read_coco(self.annotation_file, masks=masks)
        if crowds == "instances":
            for item in content["annotations"]:
                item["iscrowd"] = 0
        self._leave_out_root(content)
        self.images: list[dict[str, Any]] = content["images"]
        self.categories: list[dict[str, Any]] = sorted(content["categories"], key=lambda category: category["id"])
        self.category_ids: list[int] = [category["id"] for category in self.categories]
        self.keypoint_names, self.keypoint_edges, self.keypoint_fault = read_keypoints(content, self.annotation_file)
        if self.keypoint_fault is not None:
            warnings.warn(f"{self.keypoint_fault}; all keypoints are left out", stacklevel=2)
        masked = self.category_ids if mask_classes is None else mask_category_ids(mask_classes, self.categories)
        self.boxes_only = frozenset(self.category_ids) - frozenset(masked)
        self.left_out: dict[int, str] = {}
        self._found, missing = find_image_files(
            self.images_folder, self.images, self.annotation_file, allow_missing=allow_missing
        )
        self.summary, faults = summarize(self.annotation_file, content, self.boxes_only, masks_used=masks)
        for fault in faults:
            warnings.warn(fault, stacklevel=2)
        self._annotations, self._boxes = self._sort_annotations(content["annotations"])
        fill_annotations(content)
        self.coco = COCO()
        self.coco.dataset = content
        self.leave_out(missing)

    def leave_out(self, faults: Mapping[int, str]) -> None:
        """Leave out the images of these numbers, for these reasons, with their annotations."""
        self.left_out |= faults
        for i in faults:
            self._annotations[i], self._boxes[i] = [], self._boxes[i][:0]
        gone = {self.images[i]["id"] for i in faults}
        whole = self.coco.dataset
        self.coco.dataset = whole | {
            "images": [record for record in whole["images"] if record["id"] not in gone],
            "annotations": [item for item in whole["annotations"] if item["image_id"] not in gone],
        }
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            self.coco.createIndex()

    @property
    def num_classes(self) -> int:
        """The number of categories, plus one for the background."""
        return len(self.categories) + 1

    @property
    def num_instances(self) -> int:
        """The number of annotations to learn from: those that are neither left out nor crowds."""
        return sum(not item["iscrowd"] for items in self._annotations for item in items)

    @property
    def mask_counts(self) -> dict[int, int]:
        """Maps a category id to its number of instances with a usable mask."""
        return Counter(
            item["category_id"]
            for items in self._annotations
            for item in items
            if not item["iscrowd"]
            and item["category_id"] not in self.boxes_only
            and covers_pixels(item.get("segmentation"))
        )

    def use_labels(self, categories: Sequence[dict[str, Any]]) -> None:
        """Number the labels as in training: `match_categories` matches the file with `categories`, those of training.

        Raises:
            ValueError: the categories do not match.
        """
        used = {item["category_id"] for item in self.coco.anns.values()}
        self.categories = match_categories(categories, self.categories, used, self.annotation_file)
        self.category_ids = [category["id"] for category in self.categories]
        self.coco.dataset["categories"] = self.categories
        self.coco.cats = {category["id"]: category for category in self.categories}

    def __len__(self) -> int:
        return len(self.images)

    def image_path(self, i: int) -> Path:
        """Return the file of image i."""
        return self.images_folder / self._found.get(i, self.images[i]["file_name"])

    def aspect_ratio(self, i: int) -> float:
        """Return width / height of image i without reading the image."""
        return float(self.images[i]["width"] / self.images[i]["height"])

    def __getitem__(self, i: int) -> tuple[Tensor, Target]:
        record, annotations = self.images[i], self._annotations[i]
        image, orientation, transparent = read_picture(self.image_path(i), apply_exif=bool(self.apply_exif))
        self.check_size(i, image.shape[1], image.shape[2], orientation)
        if orientation != 1 and self.apply_exif is None and "exif" not in self.told:
            self.told.add("exif")
            warn_turned([self.image_path(i)])
        if transparent and "alpha" not in self.told:
            self.told.add("alpha")
            warn_transparent([self.image_path(i)])
        labels = {category_id: label for label, category_id in enumerate(self.category_ids, start=1)}
        target = {
            "image_id": record["id"],
            "boxes": torch.from_numpy(self._boxes[i].copy()),
            "labels": torch.tensor([labels[item["category_id"]] for item in annotations], dtype=torch.int64),
            "iscrowd": torch.tensor([bool(item["iscrowd"]) for item in annotations], dtype=torch.bool),
        }
        if self.masks:
            masks = self._masks(annotations, (record["height"], record["width"]))
            has_mask = masks.flatten(1).any(1).to(torch.bool)  # of bytes it would be bytes
            target |= {"masks": masks, "has_mask": has_mask}
        if self.keypoint_names:
            target["keypoints"] = self._keypoints(annotations)
        return (image, target) if self.transforms is None else self.transforms(image, target)

    def check_size(self, i: int, height: int, width: int, orientation: int) -> None:
        """Raise BadImageError unless image i, read with its EXIF `orientation`, has the size of the annotation file."""
        record = self.images[i]
        if (height, width) == (record["height"], record["width"]):
            return
        hint = ""
        if (width, height) == (record["height"], record["width"]):
            hint = ", width and height swapped"
            if orientation > 4:  # a quarter turn
                other = "--data.exif true (eval: --exif true) turns it by its EXIF orientation"
                if self.apply_exif:
                    other = "--data.exif false (eval: --exif false) reads it without its EXIF orientation"
                hint += f"; {other}"
        expected, got = f"{record['width']}x{record['height']}", f"{width}x{height}"
        raise BadImageError(
            f"{self.image_path(i)}: expected {expected} pixels by {self.annotation_file}, got {got}{hint}"
        )

    def _leave_out_root(self, content: dict[str, Any]) -> None:
        root = root_category(content["categories"], {item["category_id"] for item in content["annotations"]})
        if root is not None:
            content["categories"].remove(root)
            warnings.warn(
                f"{self.annotation_file}: left out the category {root['name']!r} (id {root['id']}), which has no "
                "annotation and is the supercategory of all others",
                stacklevel=3,
            )

    def _sort_annotations(
        self, annotations: Sequence[dict[str, Any]]
    ) -> tuple[list[list[dict[str, Any]]], list[np.ndarray[Any, np.dtype[np.float32]]]]:
        """Return each image's annotations with a box inside the image, and the clipped boxes, [G, 4] an image."""
        row = {record["id"]: i for i, record in enumerate(self.images)}
        kept: list[list[dict[str, Any]]] = [[] for _ in self.images]
        boxes: list[list[tuple[float, ...]]] = [[] for _ in self.images]
        dropped = []
        for item in annotations:
            i = row[item["image_id"]]
            x, y, width, height = item["bbox"]
            right, bottom = self.images[i]["width"], self.images[i]["height"]
            box = (max(x, 0), max(y, 0), min(x + width, right), min(y + height, bottom))
            if box[2] - box[0] >= _MIN_SIDE and box[3] - box[1] >= _MIN_SIDE:
                kept[i].append(item)
                boxes[i].append(box)
            else:
                dropped.append(item["id"])
        if dropped:
            warnings.warn(
                f"{self.annotation_file}: left out {len(dropped)} of {len(annotations)} annotations, whose box has no "
                f"area inside the image; first annotation id {dropped[0]}",
                stacklevel=3,
            )
        return kept, [np.array(item, dtype=np.float32).reshape(-1, 4) for item in boxes]

    def _keypoints(self, annotations: Sequence[dict[str, Any]]) -> Tensor:
        """Return keypoints [G, Kp, 3]; an annotation without keypoints gets unknown ones."""
        count = len(self.keypoint_names)
        rows = [item.get("keypoints") or [0] * (3 * count) for item in annotations]
        keypoints = torch.tensor(rows, dtype=torch.float32).reshape(-1, count, 3)
        keypoints[..., :2] += 0.5
        return keypoints

    def _masks(self, annotations: Sequence[dict[str, Any]], size: tuple[int, int]) -> Tensor:
        """Decode the annotations of an image of `size` (H, W): [G, H, W] uint8 or packed."""
        from pycocotools import mask as coco_mask

        width, dtype = (num_words(size[1]), torch.int32) if self.packed_masks else (size[1], torch.uint8)
        masks = torch.zeros(len(annotations), size[0], width, dtype=dtype)
        runs, rows = [], []
        for g, item in enumerate(annotations):
            if item["category_id"] in self.boxes_only:
                continue
            with naming(self.annotation_file, item):
                run = compressed(item.get("segmentation"), size)
            if run is not None:
                runs.append(run)
                rows.append(g)
        for chunk in mask_chunks(len(runs), size[0] * size[1]):
            decoded = coco_mask.decode(runs[chunk])  # [H, W, rows], column by column
            part = torch.from_numpy(decoded.transpose(2, 1, 0)).mT  # [rows, H, W]
            masks[rows[chunk]] = pack_masks(part) if self.packed_masks else part
        return masks


def check_instances(dataset: CocoDataset, *, train: bool) -> None:
    """Raise ValueError if there is no instance to train on; warn if there is none to evaluate with."""
    if dataset.num_instances:
        return
    total = len(dataset.coco.anns)
    got = f"{total}, all crowds or without area inside their image" if total else "none"
    if train:
        raise ValueError(f"{dataset.annotation_file}: annotations: expected at least one to train on, got {got}")
    warnings.warn(f"{dataset.annotation_file}: no annotation to evaluate with: no average precision", stacklevel=2)


def check_masks(dataset: CocoDataset, mask_classes: str) -> None:
    """Raise ValueError if a class listed in `mask_classes` has no mask to train on, or no class of a split has one."""
    counts = dataset.mask_counts
    without = [item for item in dataset.categories if item["id"] not in dataset.boxes_only | counts.keys()]
    file, to_train = dataset.annotation_file, f"of mask_classes {mask_classes!r} to train on"
    if is_split(mask_classes):  # of a part of COCO
        if not counts:
            raise ValueError(f"{file}: expected a mask {to_train}, got none")
    elif without:
        names = ", ".join(f"{item['name']} (id {item['id']})" for item in without)
        raise ValueError(f"{file}: expected masks of each {to_train}, got none of {names}")


def check_keypoint_names(dataset: CocoDataset, names: Sequence[str], *, train: bool) -> None:
    """Raise ValueError unless the data set has the keypoints `names`; to evaluate with it may also have none."""
    if dataset.keypoint_fault is not None:
        raise ValueError(dataset.keypoint_fault)
    if dataset.keypoint_names == tuple(names) or (not train and not dataset.keypoint_names):
        return
    got = ", ".join(dataset.keypoint_names) or "none"
    raise ValueError(f"{dataset.annotation_file}: categories: expected the keypoints {', '.join(names)}, got {got}")
