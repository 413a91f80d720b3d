"""Two files that name the same classes are used together, whatever their ids, order and unused classes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tmask.data.categories import match_categories
from tmask.data.coco import CocoDataset

FILE = Path("val.json")


def named(*classes: tuple[int, str]) -> list[dict[str, Any]]:
    return [{"id": number, "name": name} for number, name in classes]


TRAIN = named((1, "disc"), (2, "ring"), (5, "bar"))
TWICE = named((1, "disc"), (2, "disc"))


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (TRAIN, [1, 2, 5]),
        (TRAIN[::-1], [1, 2, 5]),
        (named((12, "bar"), (5, "disc"), (0, "ring")), [5, 0, 12]),
        (named((1, "disc"), (5, "bar")), [1, 2, 5]),
        (named((2, "disc"), (1, "bar")), [2, 3, 1]),  # 2 is taken
        (named((2, "disc")), [2, 3, 5]),
        (named((2, " disc "), (5, "never seen")), [2, 6, 7]),
    ],
    ids=["same", "order", "ids", "one missing", "its id taken", "two missing", "unused"],
)
def test_names_decide(own: list[dict[str, Any]], expected: list[int]) -> None:
    used = {item["id"] for item in own if item["name"] != "never seen"}
    matched = match_categories(TRAIN, own, used, FILE)
    assert [item["id"] for item in matched] == expected
    assert [item["name"].strip() for item in matched] == ["disc", "ring", "bar"]


def test_unicode_forms_of_a_name_are_one() -> None:
    matched = match_categories(named((1, "caf\u00e9")), named((4, "cafe\u0301")), {4}, FILE)
    assert [item["id"] for item in matched] == [4]


def test_a_class_that_training_lacks_is_an_error_with_the_nearest() -> None:
    own = [*TRAIN, *named((9, "Ring"))]
    expected = r"^val.json: categories: expected those of training, 'ring'\?, got 'Ring' \(id 9\)$"
    with pytest.raises(ValueError, match=expected):
        match_categories(TRAIN, own, {1, 9}, FILE)
    matched = match_categories(TRAIN, own, {1}, FILE)  # no annotation has it
    assert named(*[(item["id"], item["name"]) for item in matched]) == TRAIN


def test_where_names_occur_twice_all_must_be_the_same() -> None:
    assert match_categories(TWICE, TWICE, {1, 2}, FILE) == TWICE
    for own, message in (
        (TWICE[::-1], r"where label 1 is \(1, 'disc'\), got \(2, 'disc'\)"),
        (TWICE[:1], r"where label 2 is \(2, 'disc'\), got None"),
        ([*TWICE, *named((3, "bar"))], r"where label 3 is None, got \(3, 'bar'\)"),
    ):
        with pytest.raises(ValueError, match="categories: expected those of training, " + message):
            match_categories(TWICE, own, {1, 2}, FILE)


def test_targets_and_results_go_by_the_labels_of_training(write: Any, content: dict[str, Any]) -> None:
    """The fixture has 5 plane and 90 brush: labels 1 and 2, as training has them 3 and 1."""
    dataset = CocoDataset(*write(content))
    assert dataset[0][1]["labels"].tolist() == [2, 1, 2]
    dataset.use_labels(named((1, "brush"), (2, "saw"), (3, "plane")))
    assert torch.equal(dataset[0][1]["labels"], torch.tensor([1, 3, 1]))
    # Results keep the ids of the file they are of.
    assert dataset.category_ids == [90, 2, 5]
    assert dataset.num_classes == 4
    assert {number: item["name"] for number, item in dataset.coco.cats.items()} == {90: "brush", 2: "saw", 5: "plane"}
    assert dataset.coco.dataset["categories"] == dataset.categories
