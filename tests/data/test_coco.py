import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from tmask.data.coco import CocoDataset


def test_items_carry_images_boxes_labels_and_masks(write, content, capsys):
    dataset = CocoDataset(*write(content))
    assert capsys.readouterr().out == ""  # pycocotools prints, we do not
    assert len(dataset) == 2
    assert dataset.num_classes == 3
    assert dataset.category_ids == [5, 90]
    assert [category["name"] for category in dataset.categories] == ["plane", "brush"]
    image, target = dataset[0]
    assert image.dtype == torch.uint8
    assert image.shape == (3, 10, 20)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.array(Image.open(dataset.image_path(0))))
    assert target["image_id"] == 7
    # The third box reaches beyond the image and is clipped.
    assert target["boxes"].tolist() == [[2, 3, 8, 7], [0, 0, 20, 10], [15, 5, 20, 10]]
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].tolist() == [2, 1, 1]
    assert target["iscrowd"].tolist() == [False, True, False]
    assert target["has_mask"].tolist() == [True, True, False]
    expected = torch.zeros(3, 10, 20, dtype=torch.uint8)
    expected[0, 3:7, 2:8] = 1
    expected[1, :, 3] = 1  # runs go down the columns
    assert torch.equal(target["masks"], expected)


def test_an_image_without_annotations_stays(write, content):
    image, target = CocoDataset(*write(content))[1]
    assert image.shape == (3, 12, 8)
    assert {name: tuple(value.shape) for name, value in target.items() if name != "image_id"} == {
        "boxes": (0, 4), "labels": (0,), "masks": (0, 12, 8), "iscrowd": (0,), "has_mask": (0,),
    }  # fmt: skip


def test_aspect_ratio_is_width_over_height(write, content):
    dataset = CocoDataset(*write(content))
    assert [dataset.aspect_ratio(i) for i in range(2)] == [2.0, 8 / 12]


def test_missing_crowd_flag_and_area_are_filled_in_for_the_evaluator(write, content):
    del content["annotations"][0]["area"]
    coco = CocoDataset(*write(content)).coco
    assert coco.anns[11]["area"] == 24  # the mask's
    assert coco.anns[13]["area"] == 81  # the box's
    assert coco.anns[13]["iscrowd"] == 0


def test_annotation_id_zero_does_not_reach_the_evaluator(write, content):
    """pycocotools' evaluator marks a detection that matched annotation id 0 as unmatched."""
    content["annotations"][0]["id"] = 0
    coco = CocoDataset(*write(content)).coco
    assert sorted(coco.anns) == [12, 13, 14]


@pytest.mark.parametrize("form", ["polygon", "numbers", "compressed", "two polygons", "degenerate polygon"])
def test_every_form_of_mask(write, content, form):
    expected = torch.zeros(10, 20, dtype=torch.uint8)
    expected[3:7, 2:8] = 1
    runs = coco_mask.encode(np.asfortranarray(expected.numpy()))
    segmentation = content["annotations"][0]["segmentation"]
    if form == "numbers":
        counts = [23, 4] + [6, 4] * 5 + [123]
        segmentation = {"size": [10, 20], "counts": counts}
    elif form == "compressed":
        segmentation = {"size": [10, 20], "counts": runs["counts"].decode()}
    elif form == "two polygons":
        segmentation = [[2, 3, 5, 3, 5, 7, 2, 7], [5, 3, 8, 3, 8, 7, 5, 7]]
    elif form == "degenerate polygon":
        segmentation = [*segmentation, [10, 1, 14, 5], []]  # a box, if pycocotools had its way
    content["annotations"][0]["segmentation"] = segmentation
    assert torch.equal(CocoDataset(*write(content))[0][1]["masks"][0], expected)


@pytest.mark.parametrize("segmentation", [[], None, [[1, 2, 3, 4]], {"size": [10, 20], "counts": [200]}], ids=str)
def test_masks_of_nothing_do_not_count(write, content, segmentation):
    content["annotations"][0]["segmentation"] = segmentation
    target = CocoDataset(*write(content))[0][1]
    assert target["has_mask"].tolist() == [False, True, False]
    assert not target["masks"][0].any()


def test_boxes_without_area_inside_are_left_out_with_one_warning(write, content):
    content["annotations"][0]["bbox"] = [2, 3, 0, 4]
    content["annotations"][2]["bbox"] = [20, 5, 4, 4]
    arguments = write(content)
    with pytest.warns(UserWarning, match=r"file.json: left out 2 of 3 .* first annotation id 11") as caught:
        dataset = CocoDataset(*arguments)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert dataset[0][1]["labels"].tolist() == [1]
    assert len(dataset.coco.anns) == 3  # the evaluator judges by the whole file


def test_transforms_run_on_each_item(write, content):
    dataset = CocoDataset(*write(content), transforms=lambda image, target: (image.flip(2), {**target, "seen": True}))
    plain = CocoDataset(*write(content))
    assert torch.equal(dataset[0][0], plain[0][0].flip(2))
    assert dataset[0][1]["seen"]


def test_pickles_for_loader_workers(write, content):
    dataset = pickle.loads(pickle.dumps(CocoDataset(*write(content))))
    assert torch.equal(dataset[0][0], CocoDataset(*write(content))[0][0])


def broken(change):
    """A case: how to change the content (in place, or by giving another)."""

    def apply(content):
        result = change(content)
        return content if result is None else result

    return apply


def annotation(**fields):
    return broken(lambda content: content["annotations"][0].update(fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (broken(lambda c: '{"images": [\n1,, 2]}'), r"file.json: broken JSON at line 2, column 3"),
        (broken(lambda c: "[]"), r"file.json: expected a COCO file, .* list 'images'"),
        (broken(lambda c: c.pop("categories") and c), r"file.json: expected .* list 'categories'"),
        (broken(lambda c: c["categories"].clear()), r"file.json: expected at least one category"),
        (broken(lambda c: c["images"][1].pop("width") and c), r"file.json: images\[1\]: expected a field 'width'"),
        (broken(lambda c: c["images"][1].update(id=7)), r"file.json: images\[1\]: id 7 occurs twice"),
        (broken(lambda c: c["images"][1].update(height=0)), r"images\[1\]: expected a positive size, got 8x0"),
        (broken(lambda c: c["annotations"][0].pop("bbox") and c), r"annotations\[0\]: expected a field 'bbox'"),
        (annotation(bbox=[1, 2, 3]), r"annotation id 11: bbox: expected four finite numbers .* got \[1, 2, 3\]"),
        (annotation(bbox=[1, 2, 3, float("nan")]), r"annotation id 11: bbox: expected four finite numbers"),
        (annotation(image_id=99), r"file.json: annotation id 11: image_id 99 is not in the file"),
        (annotation(category_id=1), r"file.json: annotation id 11: category_id 1 is not in the file"),
        (
            broken(lambda c: c["images"][0].update(file_name="gone.png")),
            r"file.json: 1 of 2 images do not exist, first .*gone.png \(image id 7\)",
        ),
    ],
    ids=[
        "broken JSON", "no object", "no categories", "empty categories", "no width", "same id", "no height", "no box",
        "short box", "NaN box", "unknown image", "unknown category", "missing image",
    ],
)  # fmt: skip
def test_faults_of_the_file_are_found_on_opening(write, content, change, message):
    with pytest.raises(ValueError, match=message):
        CocoDataset(*write(change(content)))


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [20, 10], "counts": [200]}, r"expected run lengths of size \(10, 20\), got \(20, 10\)"),
        ({"size": [10, 20], "counts": [3, 4]}, "expected runs of 200 pixels in all"),
        ({"size": [10, 20]}, "expected polygons or run lengths"),
        ([[1, 2, 3, 4, 5, 6, 7]], "odd number of values"),
        ("square", "expected polygons or run lengths, got str"),
    ],
    ids=["size", "short", "no counts", "odd", "text"],
)
def test_faults_of_a_mask_name_the_annotation(write, content, segmentation, message):
    content["annotations"][0]["segmentation"] = segmentation
    dataset = CocoDataset(*write(content))
    with pytest.raises(ValueError, match=f"file.json: annotation id 11: segmentation: .*{message}"):
        dataset[0]
    del content["annotations"][0]["area"]  # then the mask is needed on opening
    with pytest.raises(ValueError, match=f"file.json: annotation id 11: segmentation: .*{message}"):
        CocoDataset(*write(content))


@pytest.mark.parametrize("segmentation", [{"size": [10, 20], "counts": 5}, [3, 4]], ids=["counts", "flat list"])
@pytest.mark.parametrize("number", [11, 0])
def test_a_broken_mask_without_area_names_the_annotation(write, content, segmentation, number):
    """Also one that only pycocotools finds; by the id that stands in the file, which a 0 does not keep."""
    content["annotations"][0] |= {"segmentation": segmentation, "id": number}
    del content["annotations"][0]["area"]
    with pytest.raises(ValueError, match=f"file.json: annotation id {number}: "):
        CocoDataset(*write(content))


def test_missing_folder_and_file_are_named(write, content, tmp_path):
    images, file = write(content)
    with pytest.raises(ValueError, match=r"images_folder: no such folder: .*nowhere"):
        CocoDataset(tmp_path / "nowhere", file)
    with pytest.raises(ValueError, match=r"annotation_file: no such file: .*nowhere.json"):
        CocoDataset(images, tmp_path / "nowhere.json")


def test_an_image_of_another_size_is_named(write, content):
    content["images"][0]["width"] = 21
    dataset = CocoDataset(*write(content))
    with pytest.raises(ValueError, match=r"wide.png: expected 21x10 pixels by .*file.json, got 20x10"):
        dataset[0]


def test_unreadable_images_are_named(write, content):
    dataset = CocoDataset(*write(content))
    path = dataset.image_path(0)
    whole = path.read_bytes()
    for damaged in (b"no image", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"wide.png: cannot be read as an image"):
            dataset[0]
    path.unlink()
    with pytest.raises(ValueError, match=r"wide.png: no such file"):
        dataset[0]
