"""Classes with masks and classes of boxes alone: the splits, and what a data set shows of each."""

import dataclasses
from typing import Any

import pytest
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from tests.data.conftest import CONTENT, polygon, told
from tmask.config import DataConfig
from tmask.data.coco import CocoDataset
from tmask.data.mask_classes import mask_category_ids
from tmask.engine.dataset import open_dataset

COCO = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
NAMES = [name for name in COCO if name not in ("__background__", "N/A")]
EIGHTY = [{"id": 100 + place, "name": name} for place, name in enumerate(NAMES)]
# Of the 80, from 0: the published split.
VOC = {*range(7), 8, *range(14, 20), 39, 56, 57, 58, 60, 62}


def places(chosen: str) -> set[int]:
    return {number - 100 for number in mask_category_ids(chosen, EIGHTY)}


def test_voc_and_the_others() -> None:
    assert len(EIGHTY) == 80
    assert places("voc") == VOC
    assert places("non_voc") == set(range(80)) - VOC
    assert mask_category_ids("voc", EIGHTY[5:9]) == {105, 106, 108}, "by name, also in a part of COCO"


def test_random_splits() -> None:
    drawn = [places(f"random:20:{seed}") for seed in range(5)]
    assert [len(split) for split in drawn] == [20] * 5
    assert len(set(map(frozenset, drawn))) == 5
    assert mask_category_ids("random:20:3", EIGHTY[::-1]) == mask_category_ids("random:20:3", EIGHTY)
    assert places("random:80:0") == set(range(80))
    assert places("random:3:1") == {17, 72, 8}, "the same for ever"


@pytest.mark.parametrize("chosen", ["brush", "90", " brush ", "brush,90"])
def test_names_and_ids(chosen: str) -> None:
    assert mask_category_ids(chosen, CONTENT["categories"]) == {90}


@pytest.mark.parametrize(("chosen", "ids"), [("1,2", {2, 3}), ("0", {1}), ("10", {10}), ("9,10", {10})])
def test_a_number_that_is_a_name_is_no_id(chosen: str, ids: set[int]) -> None:
    """Digits, as of street numbers: of ten classes "1" is the second."""
    assert mask_category_ids(chosen, [{"id": digit + 1, "name": str(digit)} for digit in range(10)]) == ids


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("brush,", "unknown category '': expected one of brush, plane"),
        ("random:0:0", r"expected a count in 1..2, got 'random:0:0'"),
        ("random:1", "unknown category 'random:1'"),
    ],
)
def test_what_is_refused(chosen: str, message: str) -> None:
    """Others: docs/bad-input.md."""
    with pytest.raises(ValueError, match=f"^mask_classes: {message}"):
        mask_category_ids(chosen, CONTENT["categories"])


@pytest.mark.parametrize("chosen", ["voc", "non_voc"])
def test_vocs_classes_alone_are_no_split(chosen: str) -> None:
    with pytest.raises(ValueError, match=f"for '{chosen}', some but not all of them VOC's, got 2 of 2 that are VOC's"):
        mask_category_ids(chosen, EIGHTY[5:7])


@pytest.fixture
def masked(content: dict[str, Any]) -> dict[str, Any]:
    """The file with a mask of every annotation; the last one is of a plane."""
    content["annotations"][2]["category_id"] = 5
    for item in content["annotations"]:
        item["segmentation"] = polygon(*item["bbox"])
    return content


def test_a_split_leaves_out_the_masks_of_the_others(write, masked) -> None:
    whole, part = CocoDataset(*write(masked)), CocoDataset(*write(masked), mask_classes="plane")
    assert (whole.boxes_only, part.boxes_only) == (frozenset(), {90})
    everything, target = whole[0][1], part[0][1]
    assert everything["has_mask"].tolist() == [True, True, True]
    assert target["has_mask"].tolist() == [False, True, True]
    assert not target["masks"][0].any()
    assert target["masks"][1:].equal(everything["masks"][1:])
    for name in ("boxes", "labels", "iscrowd"):
        assert target[name].equal(everything[name])
    assert (whole.mask_counts, part.mask_counts) == ({90: 1, 5: 1}, {5: 1}), "one is of a crowd"
    assert all("segmentation" in item for item in part.coco.dataset["annotations"]), "what is evaluated keeps them"


FAULTS: dict[str, dict[str, Any]] = {
    "without": {"segmentation": None},
    "empty": {"segmentation": []},
    "crowd": {"iscrowd": 1},
    "outside": {"bbox": [500, 500, 5, 5]},
    "runs of no pixel": {"segmentation": {"size": [10, 20], "counts": [200]}},
    "an empty run": {"segmentation": {"size": [10, 20], "counts": [200, 0]}},
    "compressed": {"segmentation": {"size": [10, 20], "counts": "X6"}},
}


@pytest.mark.parametrize("chosen", ["plane", "brush,5"], ids=["alone", "beside one with masks"])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_classes_without_a_mask_are_refused(write, masked, fault: dict[str, Any], chosen: str) -> None:
    """They would train a mask head that learns nothing, and without a word."""
    images, file = map(str, write(masked))
    data = DataConfig(train_images=images, train_annotations=file, mask_classes=chosen)
    assert open_dataset(data, "train").mask_counts[5] == 1
    for item in masked["annotations"][1:]:
        item.update(fault)
    write(masked)
    expected = rf": expected masks of each of mask_classes '{chosen}' to train on, got none of plane \(id 5\)$"
    with told():  # some faults have a warning of their own: test_summary.py
        with pytest.raises(ValueError, match=expected):
            open_dataset(data, "train")
        both = dataclasses.replace(data, val_images=images, val_annotations=file)
        open_dataset(both, "val")  # masks of all classes are evaluated


def test_of_a_split_one_class_with_masks_is_enough(write, content) -> None:
    """A part of COCO need not have masks of every class."""
    content["categories"] += [{"id": 91, "name": "person"}, {"id": 92, "name": "dog"}]
    content["annotations"][0]["category_id"] = 91
    del content["annotations"][2]
    images, file = map(str, write(content))
    data = DataConfig(train_images=images, train_annotations=file)
    for split in ("voc", "random:4:0"):
        assert open_dataset(dataclasses.replace(data, mask_classes=split), "train").mask_counts == {91: 1}
    expected = r": expected a mask of mask_classes 'non_voc' to train on, got none$"
    with pytest.raises(ValueError, match=expected):
        open_dataset(dataclasses.replace(data, mask_classes="non_voc"), "train")
    expected = r"each of mask_classes 'dog,person,90' to train on, got none of brush \(id 90\), dog \(id 92\)$"
    with pytest.raises(ValueError, match=expected):
        open_dataset(dataclasses.replace(data, mask_classes="dog,person,90"), "train")
