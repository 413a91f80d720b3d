"""Two files that name the same classes are used together, whatever their ids, order and unused classes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tmask.data.categories import match_categories
from tmask.data.coco import CocoDataset

FILE = Path("val.json")
TRAIN = [{"id": 1, "name": "disc"}, {"id": 2, "name": "ring"}, {"id": 5, "name": "bar"}]


def pairs(categories: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(item["id"], item["name"]) for item in categories]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (TRAIN, [1, 2, 5]),
        (TRAIN[::-1], [1, 2, 5]),
        ([{"id": 12, "name": "bar"}, {"id": 5, "name": "disc"}, {"id": 0, "name": "ring"}], [5, 0, 12]),
        ([{"id": 1, "name": "disc"}, {"id": 5, "name": "bar"}], [1, 2, 5]),
        ([{"id": 2, "name": "disc"}, {"id": 1, "name": "bar"}], [2, 3, 1]),  # 2 is taken
        ([{"id": 2, "name": "disc"}], [2, 3, 5]),
        ([{"id": 2, "name": " disc "}, {"id": 5, "name": "never seen"}], [2, 6, 7]),
    ],
    ids=["same", "order", "ids", "one missing", "its id taken", "two missing", "unused"],
)
def test_names_decide(own: list[dict[str, Any]], expected: list[int]) -> None:
    used = {item["id"] for item in own if item["name"] != "never seen"}
    matched = match_categories(TRAIN, own, used, FILE)
    assert [item["id"] for item in matched] == expected
    assert [item["name"].strip() for item in matched] == ["disc", "ring", "bar"]


def test_unicode_forms_of_a_name_are_one() -> None:
    matched = match_categories([{"id": 1, "name": "caf\u00e9"}], [{"id": 4, "name": "cafe\u0301"}], {4}, FILE)
    assert [item["id"] for item in matched] == [4]


def test_a_class_that_training_lacks_is_an_error_with_the_nearest() -> None:
    own = [*TRAIN, {"id": 9, "name": "Ring"}]
    expected = r"^val.json: categories: expected those of training, 'ring'\?, got 'Ring' \(id 9\)$"
    with pytest.raises(ValueError, match=expected):
        match_categories(TRAIN, own, {1, 9}, FILE)
    assert pairs(match_categories(TRAIN, own, {1}, FILE)) == pairs(TRAIN)  # no annotation has it


TWICE = [{"id": 1, "name": "disc"}, {"id": 2, "name": "disc"}]


def test_where_names_occur_twice_all_must_be_the_same() -> None:
    assert match_categories(TWICE, TWICE, {1, 2}, FILE) == TWICE
    for own, message in (
        (TWICE[::-1], r"where label 1 is \(1, 'disc'\), got \(2, 'disc'\)"),
        (TWICE[:1], r"where label 2 is \(2, 'disc'\), got None"),
        ([*TWICE, {"id": 3, "name": "bar"}], r"where label 3 is None, got \(3, 'bar'\)"),
    ):
        with pytest.raises(ValueError, match="categories: expected those of training, " + message):
            match_categories(TWICE, own, {1, 2}, FILE)


def test_targets_and_results_go_by_the_labels_of_training(write: Any, content: dict[str, Any]) -> None:
    """The fixture has 5 plane and 90 brush: labels 1 and 2, as training has them 3 and 1."""
    dataset = CocoDataset(*write(content))
    assert dataset[0][1]["labels"].tolist() == [2, 1, 1]
    dataset.use_labels([{"id": 1, "name": "brush"}, {"id": 2, "name": "saw"}, {"id": 3, "name": "plane"}])
    assert torch.equal(dataset[0][1]["labels"], torch.tensor([1, 3, 3]))
    # Results keep the ids of the file they are of.
    assert dataset.category_ids == [90, 2, 5]
    assert dataset.num_classes == 4
    assert {number: item["name"] for number, item in dataset.coco.cats.items()} == {90: "brush", 2: "saw", 5: "plane"}
    assert dataset.coco.dataset["categories"] == dataset.categories
