"""Opening a file warns once of each contradiction inside it, with its count; sound files give no warning."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from tests.data.conftest import coco, polygon, told, write_coco
from tmask.data.coco import CocoDataset
from tmask.data.shapes import write_shapes
from tmask.engine.evaluate import coco_metrics

WIDTH, HEIGHT = 60, 40
SIZE = np.array([WIDTH, HEIGHT])
BOXES = [(5, 20, 15, 18), (30, 3, 28, 7), (10, 4, 12, 9), (40, 22, 11, 16)]
Content = dict[str, Any]
Change = Callable[[Content], object]


@pytest.fixture
def sound(tmp_path: Path) -> Content:
    """Two images with four rectangles each, of two classes, and a category without any."""
    (tmp_path / "images").mkdir()
    for i in (1, 2):
        Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(tmp_path / f"images/{i}.png")
    places = [(image, box) for image in (1, 2) for box in BOXES]
    items = [
        {"image_id": i, "category_id": 1 + k % 2, "bbox": list(box), "segmentation": polygon(*box), "id": 10 + k}
        for k, (i, box) in enumerate(places)
    ]
    return coco([(f"{i}.png", WIDTH, HEIGHT) for i in (1, 2)], items, ("disc", "bar", "ring"))


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    """The data set of a content, and what was told of it without the file's name."""

    def opened(content: Content, **options: Any) -> tuple[CocoDataset, list[str]]:
        images, file = write_coco(tmp_path, content)
        with told() as messages:
            dataset = CocoDataset(images, file, **options)
        return dataset, [text.removeprefix(f"{file}: ") for text in messages]

    return opened


def each(start: int = 0, stop: int | None = None, **fields: Any) -> Change:
    """Give the annotations from `start` to `stop` other fields, which may be functions of the annotation."""

    def change(content: Content) -> None:
        for item in content["annotations"][start:stop]:
            item.update({name: value(item) if callable(value) else value for name, value in fields.items()})

    return change


def xyxy(item: Content) -> list[float]:
    x, y, w, h = item["bbox"]
    return [x, y, x + w, y + h]


def parts(values: list[float]) -> list[float]:
    """Pairs of x and y in parts of the image's size."""
    return (np.reshape(values, (-1, 2)) / SIZE).flatten().tolist()


def centred(item: Content) -> list[float]:
    x, y, w, h = item["bbox"]
    return [x + w / 2, y + h / 2, w, h]


def rle(item: Content, order: str = "F") -> Content:
    pixels = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(item["segmentation"], HEIGHT, WIDTH)))
    flat = pixels.ravel(order=order)
    changes = np.flatnonzero(np.diff(np.concatenate([[0], flat])))
    return {"size": [HEIGHT, WIDTH], "counts": np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()}


def compressed(item: Content, order: str = "F") -> Content:
    run = coco_mask.frPyObjects(rle(item, order), HEIGHT, WIDTH)
    return {"size": [HEIGHT, WIDTH], "counts": run["counts"].decode()}


def summary_of(dataset: CocoDataset) -> list[str]:
    return dataset.summary.partition(".json: ")[2].split("\n  ")


@pytest.mark.parametrize("form", [None, rle, compressed])
def test_sound_data_gives_a_summary_and_no_warning(sound: Content, opened: Any, form: Any) -> None:
    if form is not None:
        each(segmentation=form)(sound)
    dataset, messages = opened(sound)
    assert messages == []
    assert summary_of(dataset) == [
        "2 images, 0 of them without annotations; 8 instances, 0 of them without a mask; 0 crowds",
        "IoU of a box and its mask's box: least 1.000, median 1.000",
        "instances a class: disc 4, bar 4",
        "1 of 3 classes have none: ring",
    ]


def test_the_summary_counts_what_there_is(sound: Content, opened: Any) -> None:
    items = sound["annotations"]
    del items[4:]
    items[0]["iscrowd"], items[1]["segmentation"], items[2]["bbox"] = 1, None, [10, 4, 12, 12]
    sound["categories"] += [{"id": i, "name": f"c{i}"} for i in range(4, 200)]
    dataset, messages = opened(sound)
    assert messages == []
    *lines, last = summary_of(dataset)
    assert lines == [
        "2 images, 1 of them without annotations; 3 instances, 1 of them without a mask; 1 crowds",
        "IoU of a box and its mask's box: least 0.750, median 1.000",
        "instances a class: bar 2, disc 1",
    ]
    assert last.startswith("197 of 199 classes have none: ring, c4, c5, ")
    assert last.endswith(", c102, and 97 more")


def test_files_like_lvis_say_what_their_ap_is(sound: Content, opened: Any) -> None:
    for item in sound["images"]:
        item["neg_category_ids"] = [3]
    dataset, messages = opened(sound)
    assert messages == []
    last = summary_of(dataset)[-1]
    assert last.startswith("as LVIS: classes were looked for in some images alone, and AP counts them")


# Others: docs/bad-input.md.
CONTRADICTIONS: dict[str, tuple[dict[str, Any], str | None]] = {
    "of run lengths": ({"segmentation": compressed, "bbox": xyxy}, "bbox held x1, y1, x2, y2"),
    "y1, x1, y2, x2": ({"bbox": lambda i: [xyxy(i)[k] for k in (1, 0, 3, 2)]}, "bbox held y1, x1, y2, x2"),
    "divided": ({"bbox": lambda i: parts(i["bbox"])}, "bbox held x, y, width, height in parts of the image's size"),
    "divided corners": ({"bbox": lambda i: parts(xyxy(i))}, "bbox held x1, y1, x2, y2 in parts of the image's size"),
    "centre": ({"bbox": centred}, "bbox held centre x, centre y, width, height"),
    "compressed runs by rows": ({"segmentation": lambda i: compressed(i, "C")}, "run lengths went along the rows"),
    "divided polygons": (
        *({"segmentation": lambda i: [parts(i["segmentation"][0])]}, "polygons held parts of the image's size"),
    ),
    "elsewhere": ({"bbox": [0, 0, 5, 3]}, None),
}


@pytest.mark.parametrize(("fields", "hint"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_boxes_that_contradict_their_masks(sound: Content, opened: Any, fields: Any, hint: str | None) -> None:
    each(2, **fields)(sound)
    message = next(text for text in opened(sound)[1] if "contradict" in text)  # some boxes have no area inside, too
    count, first = int(message.split()[4]), message.rpartition(" ")[2]
    assert count >= 4  # of six; some are near enough
    assert first in ("12", "13")
    reason = f"IoU of the box and the mask's box below 0.5{'' if hint is None else '; as if ' + hint}"
    reason += ", and not down the columns" * ("along the rows" in reason)
    told_ = f"bbox and mask of {count} of 8 annotations contradict each other ({reason}); first annotation id {first}"
    assert message == told_


def test_polygons_of_y_x_and_boxes_of_y_x_look_alike(sound: Content, opened: Any) -> None:
    each(segmentation=lambda i: [np.reshape(i["segmentation"][0], (-1, 2))[:, ::-1].flatten().tolist()])(sound)
    assert "y, x" in next(text for text in opened(sound)[1] if "contradict" in text)


BOXES_ALONE = (
    "none of 8 annotations has a mask: boxes alone are learnt from and evaluated; a model trained with --model.masks "
    "false predicts no masks"
)
BEYOND = "reach beyond their images: expected x, y, width, height in pixels of the image; first annotation id 10"
PARTS = (
    "bbox of 8 of 8 annotations lies in 0..1: expected pixels, got parts of the image's size; first annotation id 10"
)
CORNERS = (
    "8 of 8 boxes without a mask fit their images only as x1, y1, x2, y2: expected x, y, width, height; first "
    "annotation id 10"
)
OUTSIDE = "left out 6 of 8 annotations, whose box has no area inside the image; first annotation id 10"
MADE = "the box of 8 of 8 annotations is missing and made from the mask; first annotation id 10"


def every_other_is_a_crowd(content: Content) -> None:
    for item in content["annotations"][::2]:
        item |= {"iscrowd": 1, "segmentation": rle(item), "category_id": 2}


def a_class_has_no_mask(content: Content) -> None:
    for item in content["annotations"][1::2]:
        item["segmentation"] = None


def boxes_as(bbox: Any, stop: int | None = None) -> Change:
    """Other boxes, and no masks at all."""
    return lambda content: (each(0, stop, bbox=bbox)(content), each(segmentation=None)(content))


# What changes, what is told, and options that silence it. Others: docs/bad-input.md.
TOLD: dict[str, tuple[Change, list[str], Content]] = {
    "no mask": (each(segmentation=None), [BOXES_ALONE], {"masks": False}),
    "no polygon": (each(segmentation=[]), [BOXES_ALONE], {"masks": False}),
    "an empty polygon": (each(segmentation=[[]]), [BOXES_ALONE], {"masks": False}),
    "corners and no mask": (boxes_as(xyxy), [CORNERS, BOXES_ALONE], {}),
    "corners in one image": (boxes_as(xyxy, 4), [f"3 of 8 boxes without a mask {BEYOND}", BOXES_ALONE], {}),
    "boxes of a larger image": (
        boxes_as(lambda i: [2 * value for value in i["bbox"]]),
        [f"6 of 8 boxes without a mask {BEYOND}", BOXES_ALONE, OUTSIDE],
        {},
    ),
    "boxes in parts of the image": (boxes_as(lambda i: parts(i["bbox"])), [PARTS, BOXES_ALONE], {}),
    "a pixel in the corner": (each(0, 1, bbox=[0, 0, 1, 1], segmentation=polygon(0, 0, 1, 1)), [], {}),
    # A quarter of the mask's box, as the mask has 2 x 2 pixels.
    "a box of pixel centres": (each(0, 1, segmentation=polygon(5, 6, 2, 2), bbox=[5, 6, 1, 1]), [], {}),
    "a class without a mask": (
        a_class_has_no_mask,
        ["no instance of bar (id 2) has a mask; first annotation id 11"],
        {"mask_classes": "disc"},  # as it is meant
    ),
    "a single crowd": (each(0, 1, iscrowd=1, segmentation=rle), [], {}),
    "no box": (each(bbox=None), [MADE], {}),
    "no number": (each(bbox=[]), [MADE], {}),
    "zeros": (each(bbox=[0, 0, 0, 0]), [MADE], {}),
    "no box of run lengths": (each(segmentation=rle, bbox=None), [MADE], {}),
    "no box of compressed ones": (each(segmentation=compressed, bbox=None), [MADE], {}),
}


@pytest.mark.parametrize(("change", "expected", "silent"), TOLD.values(), ids=TOLD)
def test_what_is_told(sound: Content, opened: Any, change: Change, expected: list[str], silent: Content) -> None:
    whole = copy.deepcopy(sound)["annotations"]
    change(sound)
    dataset, messages = opened(sound)
    assert messages == expected
    if BOXES_ALONE in expected:
        assert not dataset[0][1]["has_mask"].any()
    if silent:
        assert opened(sound, **silent)[1] == []
    if expected == [MADE]:
        assert dataset[0][1]["boxes"].tolist() == [xyxy(item) for item in whole[:4]]
        assert [item["bbox"] for item in dataset.coco.anns.values()] == [item["bbox"] for item in whole]


@pytest.mark.parametrize(
    "empty",
    [[[1, 2, 3, 4]], {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}, polygon(100, 100, 9, 9), [[5, 5] * 3]],
    ids=["two points", "no pixel", "outside", "one place"],
)
def test_masks_that_are_all_empty_are_an_error(sound: Content, opened: Any, empty: Any) -> None:
    each(0, 7, segmentation=empty)(sound)
    dataset, messages = opened(sound)
    expected = "the mask of 7 of 8 annotations is empty and left out, their boxes count; first annotation id 10"
    assert expected in messages
    last = sound["annotations"][-1]
    mask = coco_mask.merge(coco_mask.frPyObjects(last["segmentation"], HEIGHT, WIDTH))
    metrics = coco_metrics(dataset.coco.dataset, [{**last, "segmentation": mask, "score": 0.9}], kinds=["segm"])
    assert metrics["segm/AP"] == pytest.approx(1)  # an empty mask is no object that is missed
    last["segmentation"] = empty
    expected = "segmentation: expected masks that cover pixels, got 8 that are all empty, first annotation id 10"
    with pytest.raises(ValueError, match=f"file.json: {expected}$"):
        opened(sound)


def test_crowds_are_instances_on_request(sound: Content, opened: Any) -> None:
    every_other_is_a_crowd(sound)
    assert opened(sound)[0].num_instances == 4
    taken, messages = opened(sound, crowds="instances")
    assert messages == []
    assert taken.num_instances == 8
    assert not taken[0][1]["iscrowd"].any()
    assert {item["iscrowd"] for item in taken.coco.anns.values()} == {0}
    with pytest.raises(ValueError, match="crowds: expected 'instances'\\?, got 'instance'"):
        opened(sound, crowds="instance")


def test_a_box_is_around_all_polygons_and_an_annotation_of_nothing_is_left_out(sound: Content, opened: Any) -> None:
    several = [*polygon(5, 20, 4, 18), *polygon(12, 22, 8, 6), [50, 1, 51, 2]]
    each(0, 1, bbox=None, segmentation=several)(sound)
    assert opened(sound)[0][0][1]["boxes"][0].tolist() == [5, 20, 20, 38]
    each(0, 1, bbox=[], segmentation=[])(sound)
    dataset, messages = opened(sound)
    assert any(text.startswith("left out 1 of 8 annotations, whose box has no area") for text in messages)
    assert len(dataset[0][1]["boxes"]) == 3


@pytest.mark.parametrize(
    "field", ["iscrowd", "area", "segmentation", "keypoints", "num_keypoints", "attributes", "bbox"]
)
def test_null_is_as_if_the_field_were_missing(sound: Content, opened: Any, field: str) -> None:
    for item in sound["annotations"][:2]:
        item.pop(field, None)
    missing, told_of_it = opened(sound)
    each(0, 2, **{field: None})(sound)
    found, messages = opened(sound)
    assert messages == told_of_it
    assert found.coco.anns == missing.coco.anns


@pytest.mark.parametrize("kind", [str, float])
def test_numbers_of_another_type_are_those_they_name(sound: Content, opened: Any, kind: Any) -> None:
    each(0, 1, area=270)(sound)
    expected, _ = opened(sound)
    each(image_id=lambda i: kind(i["image_id"]), category_id=lambda i: kind(i["category_id"]))(sound)
    each(0, 1, area=[270])(sound)
    found, messages = opened(sound)
    assert messages == []
    assert found.coco.anns == expected.coco.anns
    each(0, 1, area=[270, 3])(sound)
    with pytest.raises(ValueError, match=r"annotation id 10: area: expected finite numbers, got \[270, 3\]"):
        opened(sound)


@pytest.mark.parametrize("number", [0, 7])
def test_a_root_category_is_left_out(sound: Content, opened: Any, number: int) -> None:
    for item in sound["categories"]:
        item["supercategory"] = "shapes"
    sound["categories"].insert(0, {"id": number, "name": "shapes", "supercategory": "none"})
    dataset, messages = opened(sound)
    assert dataset.num_classes == 4
    reason = "which has no annotation and is the supercategory of all others"
    assert messages == [f"left out the category 'shapes' (id {number}), {reason}"]
    each(0, 1, category_id=number)(sound)
    assert opened(sound)[0].num_classes == 5


def test_a_class_that_never_occurs_is_no_root(sound: Content, opened: Any) -> None:
    """As COCO's person, which names its supercategory as others do not, in a part of COCO."""
    for item, name in zip(sound["categories"], ("ring", "bar", "ring"), strict=True):
        item["supercategory"] = name
    assert opened(sound)[0].num_classes == 4


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("variant", ["mixed", "corners"])
def test_the_shapes_are_sound(tmp_path: Path, variant: str) -> None:
    files = write_shapes(tmp_path, num_images=30, seed=3, size=96, variant=variant)
    assert "least 0.9" in (text := CocoDataset(*files).summary) or "least 1.0" in text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", ["nuclei/instances", "coco-mini/instances", "coco-mini/person_keypoints"])
def test_real_data_are_sound(real_data: Path, name: str, split: str) -> None:
    file = real_data / f"{name}_{split}.json"
    summary = CocoDataset(file.parent / "images", file).summary
    assert float(summary.partition("least ")[2].partition(",")[0]) >= 0.946
