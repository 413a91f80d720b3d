"""How training and evaluation open a COCO data set: checks, the labels of training, augmentation."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection, Sequence
from typing import Any

from tmask.config import DataConfig, ModelConfig
from tmask.engine.log import progress


def open_dataset(data: DataConfig, split: str, *, masks: bool = True) -> Any:
    """Open a split, print its summary and check its images as ``data.check`` says.

    Args:
        data: Settings of the data. With ``skip_bad`` bad images are left out.
        split: ``"train"`` or ``"val"``.
        masks: False for a model without masks.

    Returns:
        A CocoDataset with packed masks, or None if `data` names no such split.

    Raises:
        ValueError: As CocoDataset and `check_images`; or the training split has no instance, or no mask of the
            ``mask_classes`` (of any listed class, or of a whole split of COCO).
    """
    from tmask.data.check import check_images
    from tmask.data.coco import CocoDataset, check_instances, check_masks

    images, annotations = getattr(data, f"{split}_images"), getattr(data, f"{split}_annotations")
    if images is None:
        return None
    mask_classes = data.mask_classes if split == "train" else None  # the masks of all classes are evaluated
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
    watch = functools.partial(progress, task=f"checking {split} images", unit="image")
    check_images(dataset, data.check, skip_bad=data.skip_bad, num_workers=data.num_workers, watch=watch)
    check_instances(dataset, train=split == "train")
    if mask_classes is not None:
        check_masks(dataset, mask_classes)
    return dataset


def check_categories(num_classes: int, categories: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError unless `num_classes` is the number of `categories` and background."""
    if num_classes != len(categories) + 1:
        need = f"{len(categories) + 1} (the {len(categories)} categories and background)"
        raise ValueError(f"num_classes: expected {need}, got {num_classes}")


def use_labels(dataset: Any, categories: Sequence[dict[str, Any]], boxes_only: Collection[int]) -> set[int]:
    """Number the labels of `dataset` as the `categories` of training do.

    Args:
        dataset: The CocoDataset to evaluate on. Its ids may differ from the ids of training; the names must agree.
        categories: Categories of training.
        boxes_only: Ids in `categories` whose masks were not learnt.

    Returns:
        `boxes_only` as ids of `dataset`.
    """
    dataset.use_labels(categories)
    pairs = zip(categories, dataset.category_ids, strict=True)
    return {own for learnt, own in pairs if learnt["id"] in boxes_only}


def augment(train_set: Any, data: DataConfig, model: ModelConfig) -> None:
    """Add the random transforms of `data` to `train_set`. A flip swaps the keypoints of `model`.

    Warns if flips swap no keypoints because the names of several keypoints show no left and right.

    Raises:
        ValueError: The model has keypoints and ``data.vflip`` is above 0.
    """
    from tmask.data.transforms import train_transforms

    order: tuple[int, ...] = ()
    if model.keypoints is not None:
        if data.vflip > 0:  # an up-down flip swaps left and right too, and top and bottom
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
        data.hflip, data.vflip, min_crop=data.min_crop, min_sizes=data.min_sizes, flip_order=order
    )
