import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image
from pycocotools import mask as coco_mask

from tests.data.conftest import told
from tmask.data.coco import CocoDataset
from tmask.data.segmentation import check_segmentation


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
    assert target["boxes"].tolist() == [[2, 3, 8, 7], [3, 0, 4, 10], [15, 5, 20, 10]]
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].tolist() == [2, 1, 2]
    assert target["iscrowd"].tolist() == [False, True, False]
    assert target["has_mask"].tolist() == [True, True, False]
    expected = torch.zeros(3, 10, 20, dtype=torch.uint8)
    expected[0, 3:7, 2:8] = 1
    expected[1, :, 3] = 1  # runs go down the columns
    assert torch.equal(target["masks"], expected)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[0][0], image)  # as loader workers do
    dataset.transforms = lambda image, target: (image.flip(2), {**target, "seen": True})
    assert torch.equal(dataset[0][0], image.flip(2))
    assert dataset[0][1]["seen"]


def test_an_image_without_annotations_stays(write, content):
    dataset = CocoDataset(*write(content))
    image, target = dataset[1]
    assert image.shape == (3, 12, 8)
    assert {name: tuple(value.shape) for name, value in target.items() if name != "image_id"} == {
        "boxes": (0, 4), "labels": (0,), "masks": (0, 12, 8), "iscrowd": (0,), "has_mask": (0,),
    }  # fmt: skip
    assert [dataset.aspect_ratio(i) for i in range(2)] == [20 / 10, 8 / 12], "width over height"


def test_the_evaluator_gets_crowd_flags_areas_and_ids_above_zero(write, content):
    """pycocotools' evaluator marks a detection that matched annotation id 0 as unmatched."""
    del content["annotations"][0]["area"]
    content["annotations"][0]["id"] = 0
    coco = CocoDataset(*write(content)).coco
    assert sorted(coco.anns) == [12, 13, 14]
    assert coco.anns[14]["area"] == 24  # the mask's
    assert coco.anns[13]["area"] == 81  # the box's
    assert coco.anns[13]["iscrowd"] == 0


PIXELS = np.zeros((10, 20), dtype=np.uint8)
PIXELS[3:7, 2:8] = 1
CORNERS = [[2, 3], [8, 3], [8, 7], [2, 7]]
FORMS = {
    "polygon": [[2, 3, 8, 3, 8, 7, 2, 7]],
    "numbers": {"size": [10, 20], "counts": [23, 4] + [6, 4] * 5 + [123]},
    "compressed": {"size": [10, 20], "counts": coco_mask.encode(np.asfortranarray(PIXELS))["counts"].decode()},
    "two polygons": [[2, 3, 5, 3, 5, 7, 2, 7], [5, 3, 8, 3, 8, 7, 5, 7]],
    "degenerate polygon": [[2, 3, 8, 3, 8, 7, 2, 7], [10, 1, 14, 5], []],  # a box, if pycocotools had its way
    "pairs": CORNERS,
    "pairs of two polygons": [[[2, 3], [5, 3], [5, 7], [2, 7]], [[5, 3], [8, 3], [8, 7], [5, 7]]],
    "nested pairs": [CORNERS],
    "nested deeper": [[[2, 3, 8, 3, 8, 7, 2, 7]]],
    "OpenCV's contours": [[[point] for point in CORNERS]],
    "pairs beside a flat one": [[2, 3, 5, 3, 5, 7, 2, 7], [[5, 3], [8, 3], [8, 7], [5, 7]]],
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_mask(write, content, form):
    content["annotations"][0]["segmentation"] = form
    with told() as messages:
        assert np.array_equal(CocoDataset(*write(content))[0][1]["masks"][0], PIXELS)
    assert messages == []


@pytest.mark.parametrize("segmentation", [[], [[]], None, [[1, 2, 3, 4]], {"size": [10, 20], "counts": [200]}], ids=str)
def test_masks_of_nothing_do_not_count(write, content, segmentation):
    content["annotations"][0]["segmentation"] = segmentation
    with told() as messages:
        target = CocoDataset(*write(content))[0][1]
    empty = "the mask of 1 of 3 annotations is empty and left out, their boxes count; first annotation id 11"
    assert sum(f"file.json: {empty}" in text for text in messages) == (segmentation is not None)
    assert target["has_mask"].tolist() == [False, True, False]
    assert not target["masks"][0].any()


def test_boxes_without_area_inside_are_left_out_with_one_warning(write, content):
    assert CocoDataset(*write(content)).num_instances == 2  # a crowd is none
    content["annotations"][0]["bbox"], content["annotations"][2]["bbox"] = [2, 3, 0, 4], [20, 5, 4, 4]
    with told() as messages:
        dataset = CocoDataset(*write(content))
    (message,) = [text for text in messages if "file.json: left out 2 of 3 " in text]
    assert message.endswith("first annotation id 11")
    with told() as messages:
        assert dataset[0][1]["labels"].tolist() == [1]
    assert messages == []
    assert len(dataset.coco.anns) == 3  # the evaluator judges by the whole file


def annotation(**fields):
    """Give the first annotation other fields."""
    return lambda content: content["annotations"][0].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: "[" * 100_000, r"file.json: cannot be read: maximum recursion depth"),
        (lambda c: "9" * 5000, r"file.json: cannot be read: Exceeds the limit"),
        (lambda c: c.pop("categories"), r"file.json: expected .* list 'categories'"),
        (lambda c: c["images"][1].update(height=0), r"images\[1\]: expected a size in whole pixels, got 8 x 0"),
        (lambda c: c["images"][1].update(file_name=3), r"images\[1\]: file_name: expected a text, got 3"),
        (annotation(bbox=[1, math.inf, -math.inf, 4]), r"annotation id 11: bbox: expected finite numbers, got inf"),
        (annotation(bbox=[1, 2, 3, 1e30]), r"annotation id 11: bbox: expected pixels within 1e\+06, got 1e\+30"),
        (annotation(bbox=[1, 2, 3, 10**400]), r"annotation id 11: bbox: expected finite numbers, got 1000"),
        (annotation(iscrowd="0"), r"annotation id 11: iscrowd: expected 0 or 1, got '0'"),
        (annotation(area=math.nan), r"annotation id 11: area: expected finite numbers, got nan"),
        (annotation(image_id="8"), r"file.json: annotation id 11: image_id: expected a whole number, got '8'"),
        (annotation(image_id="07"), r"file.json: annotation id 11: image_id: expected a whole number, got '07'"),
        (annotation(image_id=7.5), r"file.json: annotation id 11: image_id: expected a whole number, got 7.5"),
        (annotation(image_id=True), r"file.json: annotation id 11: image_id: expected a whole number, got True"),
        (annotation(category_id=[5]), r"annotation id 11: category_id: expected a whole number, got \[5\]"),
    ],
)
def test_faults_of_the_file_are_found_on_opening(write, content, change, message):
    """`change` changes the content in place, or returns another text. Other faults: docs/bad-input.md."""
    text = change(content)
    with pytest.raises(ValueError, match=message):
        CocoDataset(*write(text if isinstance(text, str) else content))


WHOLE = coco_mask.encode(np.asfortranarray(np.eye(10, 20, dtype=np.uint8)))["counts"].decode()


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [20, 10], "counts": [200]}, r"expected run lengths of size \(10, 20\), got \(20, 10\)"),
        ({"size": 10, "counts": [200]}, r"expected run lengths of size \(10, 20\), got 10"),
        ({"size": [10, 20], "counts": [3, 4]}, "expected runs of 200 pixels in all, got 7"),
        ({"size": [10, 20], "counts": [300, -100]}, "expected runs of 200 pixels in all, got damaged ones"),
        ({"size": [10, 20], "counts": [100, "100"]}, "expected runs of 200 pixels in all, got damaged ones"),
        ({"size": [10, 20], "counts": WHOLE[:-2]}, r"expected runs of 200 pixels in all, got \d+"),
        ({"size": [10, 20], "counts": WHOLE + "4"}, r"expected runs of 200 pixels in all, got \d+"),
        ({"size": [10, 20], "counts": WHOLE[::-1]}, "expected runs of 200 pixels in all, got "),
        ({"size": [10, 20], "counts": ""}, "got damaged ones"),
        ({"size": [10, 20], "counts": "o" * 40}, "got damaged ones"),
        ({"size": [10, 20], "counts": "]6K"}, "got damaged ones"),  # 205, -5
        ({"size": [10, 20], "counts": "XV" + "P" * 12 + "0"}, "got damaged ones"),  # 200, by way of twelve zeros
        ({"size": [10, 20], "counts": 5}, "expected run lengths as a list or a text, got 5"),
        ({"size": [10, 20]}, "expected polygons or run lengths"),
        ([[1, 2, 3, 4, 5, None]], "expected finite numbers, got None"),
        ([[1, 2, 3, 4, 5, -2e9]], "expected pixels within 1e\\+06, got -2"),
        ("square", "expected polygons or run lengths, got str"),
    ],
)
def test_faults_of_a_mask_are_found_on_opening_and_name_the_annotation(write, content, segmentation, message):
    content["annotations"][0]["segmentation"] = segmentation
    with pytest.raises(ValueError, match=f"file.json: annotation id 11: segmentation: .*{message}"):
        CocoDataset(*write(content))
    bare = CocoDataset(*write(content), masks=False)  # which uses none
    assert bare[0][1]["boxes"].tolist() == [[2, 3, 8, 7], [3, 0, 4, 10], [15, 5, 20, 10]]
    del content["annotations"][0]["bbox"]
    with pytest.raises(ValueError, match=f"file.json: annotation id 11: segmentation: .*{message}"):
        CocoDataset(*write(content), masks=False)


def test_without_masks_none_is_decoded(write, content, monkeypatch):
    del content["annotations"][0]["bbox"]  # is that of the mask
    made = "the box of 1 of 3 annotations is missing and made from the mask"
    with pytest.warns(UserWarning, match=made):
        dataset = CocoDataset(*write(content))
    expected = dataset[0][1]
    monkeypatch.setattr("pycocotools.mask.decode", lambda *_: pytest.fail("decoded"))
    with pytest.warns(UserWarning, match=made):
        dataset = CocoDataset(*write(content), masks=False)
    target = dataset[0][1]
    assert target.keys() == expected.keys() - {"masks", "has_mask"}
    for name in ("boxes", "labels", "iscrowd"):
        assert torch.equal(target[name], expected[name])
    with pytest.raises(ValueError, match=r"^mask_classes: expected none with masks false, got 'plane'$"):
        CocoDataset(*write(content), masks=False, mask_classes="plane")


@given(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.integers(0, 1)), st.data())
def test_damage_of_compressed_run_lengths_is_found(mask, data):
    """What is let through decodes to as many pixels as the image has, of 0 and 1 alone."""
    size, counts = mask.shape, bytearray(coco_mask.encode(np.asfortranarray(mask))["counts"])
    check_segmentation({"size": list(size), "counts": bytes(counts)}, size)
    place = data.draw(st.integers(0, len(counts) - 1))
    counts[place] = data.draw(st.integers(0, 255))
    damaged = {"size": list(size), "counts": bytes(counts[: data.draw(st.integers(0, len(counts)))])}
    try:
        check_segmentation(damaged, size)
    except ValueError:
        return
    decoded = coco_mask.decode(damaged)
    assert decoded.shape == size
    assert decoded.max() <= 1
    again = coco_mask.encode(decoded)
    assert coco_mask.area(again) == coco_mask.area(damaged) == decoded.sum()


def test_a_broken_mask_is_named_by_the_id_of_the_file(write, content):
    content["annotations"][0] |= {"segmentation": [3, 4], "id": 0}  # the evaluator gets another id than 0
    with pytest.raises(ValueError, match=r"file.json: annotation id 0: "):
        CocoDataset(*write(content))


def test_missing_folder_and_file_are_named(write, content, tmp_path):
    images, file = write(content)
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ((tmp_path / "nowhere", file), r"images_folder: no such folder: .*nowhere"),
        ((images, tmp_path / "nowhere.json"), r"annotation_file: no such file: .*nowhere.json"),
        ((file, file), r"images_folder: expected a folder, got a file: .*file.json"),
        ((images, images), r"annotation_file: expected a file, got a folder: .*images"),
        (
            (tmp_path / "empty", file),
            r"none of the 2 images of .*file.json is in .*empty, first wide.png \(image id 7\)$",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            CocoDataset(*arguments)


def test_what_the_system_says_names_the_file_once(write, content, monkeypatch):
    images, file = write(content)

    def denied(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(file), "read_text", denied)
    with pytest.raises(ValueError, match=f"^{file}: cannot be read: Permission denied$"):
        CocoDataset(images, file)


def test_category_ids_may_have_holes_and_be_zero(write, content):
    content["categories"] = [{"id": 1000, "name": "brush"}, {"id": 0, "name": "plane"}, {"id": 5, "name": "saw"}]
    for item, category in zip(content["annotations"], (1000, 0, 1000), strict=True):
        item["category_id"] = category
    dataset = CocoDataset(*write(content))
    assert dataset.category_ids == [0, 5, 1000]
    assert dataset[0][1]["labels"].tolist() == [3, 1, 3]
