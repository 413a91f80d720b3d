"""Contradictions inside an annotation file are told once, counted, when it is opened; sound files are not spoken of."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from tests.data.conftest import polygon
from tmask.data.coco import CocoDataset
from tmask.data.shapes import write_shapes
from tmask.engine.evaluate import coco_metrics

WIDTH, HEIGHT = 60, 40
BOXES = [(5, 20, 15, 18), (30, 3, 28, 7), (10, 4, 12, 9), (40, 22, 11, 16)]


@pytest.fixture
def sound(tmp_path: Path) -> dict[str, Any]:
    """Two images with four rectangles each, of two classes, and a category without any."""
    (tmp_path / "images").mkdir()
    for i in (1, 2):
        Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(tmp_path / f"images/{i}.png")
    places = [(image, box) for image in (1, 2) for box in BOXES]
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in (1, 2)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(("disc", "bar", "ring"), 1)],
        "annotations": [
            {
                "id": 10 + k,
                "image_id": image,
                "category_id": 1 + k % 2,
                "bbox": list(box),
                "segmentation": polygon(*box),
            }
            for k, (image, box) in enumerate(places)
        ],
    }


class Opened:
    """The data set of `content`, and what was told of it without the file's name."""

    def __init__(self, folder: Path, content: dict[str, Any], **options: Any) -> None:
        file = folder / "a.json"
        file.write_text(json.dumps(content))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.dataset = CocoDataset(folder / "images", file, **options)
        self.told = [str(item.message).removeprefix(f"{file}: ") for item in caught if item.category is UserWarning]
        self.summary = self.dataset.summary.removeprefix(f"{file}: ").split("\n  ")


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    return lambda content, **options: Opened(tmp_path, content, **options)


def mask_of(item: dict[str, Any]) -> np.ndarray:
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(item["segmentation"], HEIGHT, WIDTH)))


def runs(flat: np.ndarray) -> list[int]:
    """Run lengths of flat pixels, zeros first."""
    changes = np.flatnonzero(np.diff(np.concatenate([[0], flat])))
    return np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()


def rle(item: dict[str, Any], order: str = "F") -> dict[str, Any]:
    return {"size": [HEIGHT, WIDTH], "counts": runs(mask_of(item).ravel(order=order))}


def compressed(item: dict[str, Any], order: str = "F") -> dict[str, Any]:
    run = coco_mask.frPyObjects(rle(item, order), HEIGHT, WIDTH)
    return {"size": [HEIGHT, WIDTH], "counts": run["counts"].decode()}


@pytest.mark.parametrize("form", [None, rle, compressed])
def test_sound_data_gives_a_summary_and_no_warning(sound: dict[str, Any], opened: Any, form: Any) -> None:
    if form is not None:
        for item in sound["annotations"]:
            item["segmentation"] = form(item)
    found = opened(sound)
    assert found.told == []
    assert found.summary == [
        "2 images, 0 of them without annotations; 8 instances, 0 of them without a mask; 0 crowds",
        "IoU of a box and its mask's box: least 1.000, median 1.000",
        "instances a class: disc 4, bar 4",
        "1 of 3 classes have none: ring",
    ]


def test_the_summary_counts_what_there_is(sound: dict[str, Any], opened: Any) -> None:
    items = sound["annotations"]
    del items[4:], items[1]["segmentation"]
    items[0]["iscrowd"] = 1
    items[2]["bbox"] = [10, 4, 12, 12]
    found = opened(sound)
    assert found.told == []
    assert found.summary == [
        "2 images, 1 of them without annotations; 3 instances, 1 of them without a mask; 1 crowds",
        "IoU of a box and its mask's box: least 0.750, median 1.000",
        "instances a class: bar 2, disc 1",
        "1 of 3 classes have none: ring",
    ]


def test_a_long_list_of_classes_is_cut(sound: dict[str, Any], opened: Any) -> None:
    sound["categories"] += [{"id": i, "name": f"c{i}"} for i in range(4, 200)]
    *_, last = opened(sound).summary
    assert last.startswith("197 of 199 classes have none: ring, c4, c5, ")
    assert last.endswith(", c102, and 97 more")


def test_files_like_lvis_say_what_their_ap_is(sound: dict[str, Any], opened: Any) -> None:
    for item in sound["images"]:
        item["neg_category_ids"] = [3]
    found = opened(sound)
    assert found.told == []
    assert found.summary[-1].startswith("as LVIS: classes were looked for in some images alone, and AP counts them")


def xyxy(x: float, y: float, w: float, h: float) -> list[float]:
    return [x, y, x + w, y + h]


def swapped(points: list[float]) -> list[float]:
    return [value for x, y in zip(points[::2], points[1::2], strict=True) for value in (y, x)]


CONTRADICTIONS = {
    "x1, y1, x2, y2": (lambda i: {"bbox": xyxy(*i["bbox"])}, "as if bbox held x1, y1, x2, y2"),
    "of run lengths": (
        lambda i: {"bbox": xyxy(*i["bbox"]), "segmentation": compressed(i)},
        "as if bbox held x1, y1, x2, y2",
    ),
    "y1, x1, y2, x2": (
        lambda i: {"bbox": [xyxy(*i["bbox"])[k] for k in (1, 0, 3, 2)]},
        "as if bbox held y1, x1, y2, x2",
    ),
    "divided": (
        lambda i: {"bbox": [v / s for v, s in zip(i["bbox"], (WIDTH, HEIGHT) * 2, strict=True)]},
        "as if bbox held x, y, width, height in parts of the image's size",
    ),
    "divided corners": (
        lambda i: {"bbox": [v / s for v, s in zip(xyxy(*i["bbox"]), (WIDTH, HEIGHT) * 2, strict=True)]},
        "as if bbox held x1, y1, x2, y2 in parts of the image's size",
    ),
    "centre": (
        lambda i: {"bbox": [i["bbox"][0] + i["bbox"][2] / 2, i["bbox"][1] + i["bbox"][3] / 2, *i["bbox"][2:]]},
        "as if bbox held centre x, centre y, width, height",
    ),
    "runs by rows": (
        lambda i: {"segmentation": rle(i, "C")},
        "as if run lengths went along the rows, and not down the columns",
    ),
    "compressed runs by rows": (
        lambda i: {"segmentation": compressed(i, "C")},
        "as if run lengths went along the rows, and not down the columns",
    ),
    "divided polygons": (
        lambda i: {"segmentation": [[v / s for v, s in zip(i["segmentation"][0], (WIDTH, HEIGHT) * 4, strict=True)]]},
        "as if polygons held parts of the image's size",
    ),
    "elsewhere": (lambda i: {"bbox": [0, 0, 5, 3]}, None),
}


@pytest.mark.parametrize(("change", "hint"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_boxes_that_contradict_their_masks(sound: dict[str, Any], opened: Any, change: Any, hint: str | None) -> None:
    for item in sound["annotations"][2:]:
        item.update(change(item))
    told = next(text for text in opened(sound).told if "contradict" in text)  # some boxes have no area inside, too
    count = int(told.split()[4])
    assert count >= 4  # of six; some are near enough
    reason = f"IoU of the box and the mask's box below 0.5{'' if hint is None else '; ' + hint}"
    first = told.rpartition(" ")[2]
    assert first in ("12", "13")
    assert (
        told
        == f"bbox and mask of {count} of 8 annotations contradict each other ({reason}); first annotation id {first}"
    )


def test_polygons_of_y_x_and_boxes_of_y_x_look_alike(sound: dict[str, Any], opened: Any) -> None:
    for item in sound["annotations"]:
        item["segmentation"] = [swapped(item["segmentation"][0])]
    told = next(text for text in opened(sound).told if "contradict" in text)
    assert "y, x" in told


def test_a_box_of_pixel_centres_is_no_contradiction(sound: dict[str, Any], opened: Any) -> None:
    """Of a mask of 2 x 2 pixels it is a quarter."""
    item = sound["annotations"][0]
    item |= {"segmentation": polygon(5, 6, 2, 2), "bbox": [5, 6, 1, 1]}
    found = opened(sound)
    assert found.told == []
    assert "least 0.250" in found.summary[1]


@pytest.mark.parametrize("masks", [True, False], ids=["masks too", "boxes alone"])
def test_boxes_in_parts_of_the_image(sound: dict[str, Any], opened: Any, masks: bool) -> None:
    """Box and mask agree, in the first pixel."""
    for item in sound["annotations"]:
        item["bbox"] = [v / s for v, s in zip(item["bbox"], (WIDTH, HEIGHT) * 2, strict=True)]
        if masks:
            item["segmentation"] = polygon(*item["bbox"])
        else:
            del item["segmentation"]
    told = opened(sound).told
    expected = "bbox of 8 of 8 annotations lies in 0..1: expected pixels, got parts of the image's size; "
    assert told[0] == expected + "first annotation id 10"
    assert len(told) == 1 + (not masks)


def test_a_pixel_in_the_corner_is_no_part_of_an_image(sound: dict[str, Any], opened: Any) -> None:
    sound["annotations"][0] |= {"bbox": [0, 0, 1, 1], "segmentation": polygon(0, 0, 1, 1)}
    assert opened(sound).told == []


BOXES_ALONE = (
    "none of 8 annotations has a mask: boxes alone are learnt from and evaluated; a model trained with --model.masks "
    "false predicts no masks"
)


@pytest.mark.parametrize("segmentation", [[], [[]], None, "left out"], ids=str)
def test_boxes_alone_are_said_once(sound: dict[str, Any], opened: Any, segmentation: Any) -> None:
    for item in sound["annotations"]:
        item["segmentation"] = segmentation
        if segmentation == "left out":
            del item["segmentation"]
    found = opened(sound)
    assert found.told == [BOXES_ALONE]
    assert not found.dataset[0][1]["has_mask"].any()
    assert opened(sound, masks=False).told == []


def test_boxes_alone_that_hold_corners(sound: dict[str, Any], opened: Any) -> None:
    for item in sound["annotations"]:
        item["bbox"] = xyxy(*item["bbox"])
        del item["segmentation"]
    reading = "only as x1, y1, x2, y2: expected x, y, width, height"
    assert opened(sound).told == [
        f"8 of 8 boxes without a mask fit their images {reading}; first annotation id 10",
        BOXES_ALONE,
    ]


def test_boxes_alone_that_reach_beyond_their_images(sound: dict[str, Any], opened: Any) -> None:
    """Corners in one image, or boxes of a larger image in both."""
    for item in sound["annotations"]:
        del item["segmentation"]
    one, all_ = copy.deepcopy(sound), copy.deepcopy(sound)
    for item in one["annotations"][:4]:
        item["bbox"] = xyxy(*item["bbox"])
    for item in all_["annotations"]:
        item["bbox"] = [2 * value for value in item["bbox"]]
    expected = "reach beyond their images: expected x, y, width, height in pixels of the image; first annotation id"
    for content, count, first in ((one, 3, 10), (all_, 6, 10)):
        told = opened(content).told
        assert told[0] == f"{count} of 8 boxes without a mask {expected} {first}"
        assert BOXES_ALONE in told


def test_a_class_without_any_mask(sound: dict[str, Any], opened: Any) -> None:
    for item in sound["annotations"]:
        if item["category_id"] == 2:
            del item["segmentation"]
    assert opened(sound).told == ["no instance of bar (id 2) has a mask; first annotation id 11"]
    assert opened(sound, mask_classes="disc").told == []  # as it is meant


@pytest.mark.parametrize(
    "empty",
    [[[1, 2, 3, 4]], {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}, polygon(100, 100, 9, 9), [[5, 5] * 3]],
    ids=["two points", "no pixel", "outside", "one place"],
)
def test_masks_that_are_all_empty_are_an_error(sound: dict[str, Any], opened: Any, empty: Any) -> None:
    *most, last = sound["annotations"]
    for item in most:
        item["segmentation"] = empty
    found = opened(sound)
    expected = "the mask of 7 of 8 annotations is empty and left out, their boxes count; first annotation id 10"
    assert expected in found.told
    mask = coco_mask.merge(coco_mask.frPyObjects(last["segmentation"], HEIGHT, WIDTH))
    metrics = coco_metrics(found.dataset.coco.dataset, [{**last, "segmentation": mask, "score": 0.9}], kinds=["segm"])
    assert metrics["segm/AP"] == pytest.approx(1)  # an empty mask is no object that is missed
    last["segmentation"] = empty
    expected = (
        r"a.json: segmentation: expected masks that cover pixels, got 8 that are all empty, first annotation id 10$"
    )
    with pytest.raises(ValueError, match=expected):
        opened(sound)


def test_many_crowds_are_said_and_taken_as_instances_on_request(sound: dict[str, Any], opened: Any) -> None:
    for item in sound["annotations"][::2]:
        item |= {"iscrowd": 1, "segmentation": rle(item), "category_id": 2}
    found = opened(sound)
    assert found.dataset.num_instances == 4
    expected = (
        "are crowds (iscrowd 1), which are not learnt; if they are single objects, set --data.crowds (eval: --crowds) "
        "instances"
    )
    assert found.told == [f"4 of 8 annotations {expected}; first annotation id 10"]
    taken = opened(sound, crowds="instances")
    assert taken.told == []
    assert taken.dataset.num_instances == 8
    assert not taken.dataset[0][1]["iscrowd"].any()
    assert {item["iscrowd"] for item in taken.dataset.coco.anns.values()} == {0}
    with pytest.raises(ValueError, match="crowds: expected 'instances'\\?, got 'instance'"):
        opened(sound, crowds="instance")


def test_a_single_crowd_is_as_it_should_be(sound: dict[str, Any], opened: Any) -> None:
    sound["annotations"][0] |= {"iscrowd": 1, "segmentation": rle(sound["annotations"][0])}
    assert opened(sound).told == []


@pytest.mark.parametrize("box", ["left out", None, [], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("form", [None, rle, compressed])
def test_boxes_are_made_from_masks(sound: dict[str, Any], opened: Any, box: Any, form: Any) -> None:
    expected = copy.deepcopy(sound)
    for item in sound["annotations"]:
        item["segmentation"] = item["segmentation"] if form is None else form(item)
        item["bbox"] = box
        if box == "left out":
            del item["bbox"]
    found = opened(sound)
    assert found.told == ["the box of 8 of 8 annotations is missing and made from the mask; first annotation id 10"]
    boxes = [xyxy(*item["bbox"]) for item in expected["annotations"][:4]]
    assert found.dataset[0][1]["boxes"].tolist() == boxes
    assert [item["bbox"] for item in found.dataset.coco.anns.values()] == [i["bbox"] for i in expected["annotations"]]


def test_a_box_of_several_polygons_is_around_all(sound: dict[str, Any], opened: Any) -> None:
    item = sound["annotations"][0]
    item["segmentation"] = [*polygon(5, 20, 4, 18), *polygon(12, 22, 8, 6), [50, 1, 51, 2]]
    item["bbox"] = None
    assert opened(sound).dataset[0][1]["boxes"][0].tolist() == [5, 20, 20, 38]


def test_an_annotation_of_nothing_is_left_out(sound: dict[str, Any], opened: Any) -> None:
    sound["annotations"][0] |= {"bbox": [], "segmentation": []}
    found = opened(sound)
    assert any(text.startswith("left out 1 of 8 annotations, whose box has no area") for text in found.told)
    assert len(found.dataset[0][1]["boxes"]) == 3


POLYGON = [[5, 20], [20, 20], [20, 38], [5, 38]]
FORMS = {
    "pairs": POLYGON,
    "pairs of two polygons": [[[5, 20], [12, 20], [12, 38], [5, 38]], [[12, 20], [20, 20], [20, 38], [12, 38]]],
    "nested pairs": [POLYGON],
    "nested deeper": [[[value for point in POLYGON for value in point]]],
    "OpenCV's contours": [[[point] for point in POLYGON]],
    "beside a flat one": [[5, 20, 12, 20, 12, 38, 5, 38], [[12, 20], [20, 20], [20, 38], [12, 38]]],
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_polygons_of_other_forms_are_the_same_mask(sound: dict[str, Any], opened: Any, form: Any) -> None:
    expected = opened(sound).dataset[0][1]["masks"][0]
    sound["annotations"][0]["segmentation"] = form
    found = opened(sound)
    assert found.told == []
    assert found.dataset[0][1]["masks"][0].equal(expected)


@pytest.mark.parametrize("field", ["iscrowd", "area", "segmentation", "keypoints", "num_keypoints", "attributes"])
def test_null_is_as_if_the_field_were_missing(sound: dict[str, Any], opened: Any, field: str) -> None:
    for item in sound["annotations"][:2]:
        item.pop(field, None)
    missing = opened(sound)
    for item in sound["annotations"][:2]:
        item[field] = None
    found = opened(sound)
    assert found.told == missing.told
    assert found.dataset.coco.anns == missing.dataset.coco.anns


def test_an_area_in_a_list_of_one_is_that_area(sound: dict[str, Any], opened: Any) -> None:
    sound["annotations"][0]["area"] = [270]
    assert opened(sound).dataset.coco.anns[10]["area"] == 270
    sound["annotations"][0]["area"] = [270, 3]
    with pytest.raises(ValueError, match=r"annotation id 10: area: expected finite numbers, got \[270, 3\]"):
        opened(sound)


@pytest.mark.parametrize("kind", [str, float])
def test_ids_of_another_type_are_the_numbers_they_name(sound: dict[str, Any], opened: Any, kind: Any) -> None:
    expected = opened(sound).dataset
    for item in sound["annotations"]:
        item |= {"image_id": kind(item["image_id"]), "category_id": kind(item["category_id"])}
    found = opened(sound)
    assert found.told == []
    assert found.dataset.coco.anns == expected.coco.anns


@pytest.mark.parametrize("number", [0, 7])
def test_a_root_category_is_left_out(sound: dict[str, Any], opened: Any, number: int) -> None:
    for item in sound["categories"]:
        item["supercategory"] = "shapes"
    sound["categories"].insert(0, {"id": number, "name": "shapes", "supercategory": "none"})
    found = opened(sound)
    assert found.dataset.num_classes == 4
    reason = "which has no annotation and is the supercategory of all others"
    assert found.told == [f"left out the category 'shapes' (id {number}), {reason}"]
    sound["annotations"][0]["category_id"] = number
    assert opened(sound).dataset.num_classes == 5


def test_a_class_that_never_occurs_is_no_root(sound: dict[str, Any], opened: Any) -> None:
    """As COCO's person, which names its supercategory as others do not, in a part of COCO."""
    for item, name in zip(sound["categories"], ("ring", "bar", "ring"), strict=True):
        item["supercategory"] = name
    assert opened(sound).dataset.num_classes == 4


@pytest.mark.parametrize("variant", ["mixed", "corners"])
def test_the_shapes_are_sound(tmp_path: Path, variant: str) -> None:
    files = write_shapes(tmp_path, num_images=30, seed=3, size=96, variant=variant)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "least 0.9" in (text := CocoDataset(*files).summary) or "least 1.0" in text


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", ["nuclei/instances", "coco-mini/instances", "coco-mini/person_keypoints"])
def test_real_data_are_sound(real_data: Path, name: str, split: str) -> None:
    file = real_data / f"{name}_{split}.json"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary = CocoDataset(file.parent / "images", file).summary
    assert float(summary.partition("least ")[2].partition(",")[0]) >= 0.946
