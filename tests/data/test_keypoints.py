"""Keypoints from the file to the flipped target, and the shapes whose corners are keypoints."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from tmask.data.coco import CocoDataset, check_keypoint_names
from tmask.data.shapes import CLASSES, KEYPOINTS, draw_image, write_shapes
from tmask.data.transforms import JointTransform, train_transforms

NAMES = ["nose", "left_ear", "right_ear"]


def fault_of(files: tuple[Path, Path]) -> str:
    """What a training of keypoints is told of a file that opens without them, with a warning."""
    with pytest.warns(UserWarning, match="; all keypoints are left out$"):
        dataset = CocoDataset(*files)
    assert dataset.keypoint_names == ()
    assert "keypoints" not in dataset[0][1]
    for train in (True, False):
        with pytest.raises(ValueError, match=r"(keypoints|skeleton): expected") as error:
            check_keypoint_names(dataset, NAMES, train=train)
    return str(error.value)


@pytest.fixture
def with_keypoints(content: dict[str, Any]) -> dict[str, Any]:
    """Planes have three keypoints, brushes have none."""
    content["categories"][1] |= {"keypoints": NAMES, "skeleton": [[1, 2], [3, 1]]}
    content["annotations"][0]["keypoints"] = [3, 4, 2, 0, 0, 0, 7.5, 6, 1]
    return content


def test_targets_have_keypoints(write: Any, with_keypoints: dict[str, Any]) -> None:
    dataset = CocoDataset(*write(with_keypoints))
    assert dataset.keypoint_names == tuple(NAMES)
    assert dataset.keypoint_edges == ((0, 1), (2, 0))
    keypoints = dataset[0][1]["keypoints"]
    assert keypoints.dtype == torch.float32
    # Pixels are counted by their centres; an annotation without keypoints has unknown ones.
    assert keypoints[0].tolist() == [[3.5, 4.5, 2], [0.5, 0.5, 0], [8, 6.5, 1]]
    assert keypoints.shape == (3, 3, 3)
    assert not keypoints[1:, :, 2].any()
    assert dataset[1][1]["keypoints"].shape == (0, 3, 3)
    with_keypoints["annotations"][0]["keypoints"] = []
    assert not CocoDataset(*write(with_keypoints))[0][1]["keypoints"][..., 2].any()


OF_11 = "file.json: annotation id 11: keypoints: expected"
OF_PLANES = "categories[1]: skeleton: expected pairs of numbers in 1..3, got"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("annotations", {"keypoints": "left"}, f"{OF_11} 9 numbers, x, y and visibility of each of 3, got 'left'"),
        ("annotations", {"keypoints": [1, 2, 2, float("nan"), 0, 0, 1, 1, 1]}, f"{OF_11} finite numbers, got nan"),
        ("annotations", {"keypoints": [1, 2, 2, "4", 0, 0, 1, 1, 1]}, f"{OF_11} finite numbers, got '4'"),
        ("annotations", {"keypoints": [1, 2, 2, 4, 0, 3, 1, 1, 1]}, f"{OF_11} a visibility of 0, 1 or 2, got 3"),
        ("categories", {"keypoints": "nose"}, "categories[1]: keypoints: expected a list of names"),
        ("categories", {"keypoints": ["a", "a", "b"]}, "keypoints: expected a list of names, none of them twice"),
        ("categories", {"skeleton": [[1, 4]]}, f"{OF_PLANES} [1, 4]"),
        ("categories", {"skeleton": [[0, 1]]}, f"{OF_PLANES} [0, 1]"),
        ("categories", {"skeleton": [[1, 2, 3]]}, f"{OF_PLANES} [1, 2, 3]"),
        ("categories", {"skeleton": 3}, f"{OF_PLANES} 3"),
    ],
    ids=str,
)
def test_wrong_keypoints_and_skeletons_are_named(
    write: Any, with_keypoints: Any, name: str, value: Any, message: str
) -> None:
    with_keypoints[name][{"annotations": 0, "categories": 1}[name]] |= value
    assert message in fault_of(write(with_keypoints))


def test_categories_cannot_have_different_keypoints(write: Any, with_keypoints: dict[str, Any]) -> None:
    with_keypoints["categories"][0]["keypoints"] = NAMES[::-1]
    assert "keypoints: expected those of the other categories" in fault_of(write(with_keypoints))
    with_keypoints["categories"][0]["keypoints"] = NAMES
    assert CocoDataset(*write(with_keypoints)).keypoint_edges == ((0, 1), (2, 0))


def test_a_model_and_its_data_must_have_the_same_keypoints(write: Any, with_keypoints: dict[str, Any]) -> None:
    dataset = CocoDataset(*write(with_keypoints))
    check_keypoint_names(dataset, NAMES, train=True)
    with pytest.raises(ValueError, match=r"expected the keypoints a, b, got nose, left_ear, right_ear"):
        check_keypoint_names(dataset, ["a", "b"], train=False)
    del with_keypoints["categories"][1]["keypoints"], with_keypoints["categories"][1]["skeleton"]
    bare = CocoDataset(*write(with_keypoints))
    assert bare.keypoint_names == bare.keypoint_edges == ()
    assert "keypoints" not in bare[0][1]
    check_keypoint_names(bare, NAMES, train=False)
    with pytest.raises(ValueError, match=r"expected the keypoints nose, left_ear, right_ear, got none"):
        check_keypoint_names(bare, NAMES, train=True)


def item() -> tuple[torch.Tensor, dict[str, Any]]:
    """An image of 9 x 14 whose bright pixel is under the left ear."""
    image = torch.zeros(3, 9, 14, dtype=torch.uint8)
    image[:, 2, 3] = 255
    keypoints = torch.tensor([[[1.0, 2.0, 0.0], [3.5, 2.5, 2.0], [9.0, 7.0, 1.0]]])
    masks = torch.zeros(1, 9, 14, dtype=torch.uint8)
    return image, {"boxes": torch.tensor([[1.0, 2.0, 5.0, 6.0]]), "masks": masks, "keypoints": keypoints}


FLIPPED = {
    "left-right": ((1, 0, (0, 2, 1)), [[13, 2, 0], [5, 7, 1], [10.5, 2.5, 2]]),
    "left-right, names stay": ((1, 0, ()), [[13, 2, 0], [10.5, 2.5, 2], [5, 7, 1]]),
    "up-down": ((0, 1, (0, 2, 1)), [[1, 7, 0], [3.5, 6.5, 2], [9, 2, 1]]),
}


@pytest.mark.parametrize("case", FLIPPED)
def test_flips_mirror_keypoints_and_swap_left_and_right(case: str) -> None:
    (hflip, vflip, order), expected = FLIPPED[case]
    image, target = item()
    before = target["keypoints"].clone()
    flipped, out = train_transforms(hflip, vflip, flip_order=order)(image, target)
    assert out["keypoints"].tolist() == [expected]
    assert type(out["keypoints"]) is torch.Tensor
    assert "visibility" not in out
    ((x, y, _),) = (point for point in out["keypoints"][0].int().tolist() if point[2] == 2)
    assert (flipped[:, y, x] == 255).all()
    assert torch.equal(target["keypoints"], before)


def test_a_crop_moves_keypoints_and_drops_those_of_instances_it_drops() -> None:
    at = torch.tensor([[3, 4], [11, 15], [18, 2]])  # x, y: one keypoint of each instance, in the middle of its box
    image = torch.stack([torch.arange(20).expand(20, 20), torch.arange(20)[:, None].expand(20, 20)])
    image = torch.cat([image, image[:1]]).to(torch.uint8)  # a pixel's colour says where it was
    target = {"boxes": torch.cat([at - 1, at + 2], dim=1).float(), "labels": torch.tensor([1, 2, 3])}
    target |= {"masks": torch.zeros(3, 20, 20, dtype=torch.uint8), "has_mask": torch.zeros(3, dtype=torch.bool)}
    target["keypoints"] = torch.cat([at + 0.5, torch.tensor([[2], [1], [2]])], dim=1)[:, None]
    counts = set()
    for seed in range(12):
        torch.manual_seed(seed)
        cropped, out = train_transforms(0.5, 0, min_crop=0.4)(image, target)
        counts.add(len(out["labels"]))
        assert len(out["keypoints"]) == len(out["labels"])
        for label, ((x, y, visibility),) in zip(out["labels"].tolist(), out["keypoints"].tolist(), strict=True):
            assert visibility == target["keypoints"][label - 1, 0, 2]
            if 0 <= x < cropped.shape[2] and 0 <= y < cropped.shape[1]:
                assert cropped[:2, int(y), int(x)].tolist() == at[label - 1].tolist()
    assert counts >= {2, 3}


def test_transforms_of_v2_move_keypoints() -> None:
    transform = JointTransform(v2.Compose([v2.Pad([2, 1, 0, 0])]))
    assert transform(*item())[1]["keypoints"].tolist() == [[[3, 3, 0], [5.5, 3.5, 2], [11, 8, 1]]]


def test_corners_of_shapes_are_keypoints() -> None:
    names = []
    for index in range(12):
        drawn = draw_image(5, index)
        for label, mask, (top, left, bottom, right), area in zip(
            drawn.labels, drawn.masks, drawn.keypoints, drawn.full_areas, strict=True
        ):
            name = CLASSES[label - 1]
            corners = np.stack([top, left, bottom, right])
            if name in ("disc", "ring"):
                assert not corners.any()
            elif mask.sum() == area and corners[:, 2].all():  # the whole shape is in the picture, nothing hides it
                names.append(name)
                rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
                edges = top[1], bottom[1], left[0], right[0]
                ends = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
                # A star's tip is narrower than a pixel.
                assert np.abs(np.subtract(edges, ends)).max() < (3.5 if name == "star" else 1.5)
                assert (corners[:, 2] == 2).all()
    assert set(names) == {"square", "triangle", "star"}


def test_corners_beyond_the_image_are_unknown_and_covered_ones_hidden() -> None:
    seen = set()
    for index in range(20):
        drawn = draw_image(5, index, 64)
        for k, corners in enumerate(drawn.keypoints):
            for x, y, visibility in corners[corners[:, 2] > 0]:
                seen.add(int(visibility))
                on_top = drawn.masks[k + 1 :, int(y), int(x)].any()
                assert visibility == (1 if on_top else 2)
        seen |= {0} if (drawn.keypoints[drawn.labels == 2][..., 2] == 0).any() else set()  # squares have four
    assert seen == {0, 1, 2}


def test_the_shapes_variant_differs_by_its_keypoints_alone(tmp_path: Path) -> None:
    plain = write_shapes(tmp_path / "plain", num_images=3, seed=1, size=64)
    corners = write_shapes(tmp_path / "corners", num_images=3, seed=1, size=64, variant="corners")
    for path in sorted(plain[0].iterdir()):
        assert path.read_bytes() == (corners[0] / path.name).read_bytes()
    content, without = (json.loads(path.read_text()) for path in (corners[1], plain[1]))
    dataset = CocoDataset(*corners)
    assert dataset.keypoint_names == KEYPOINTS
    for entry in content["annotations"]:
        assert entry.pop("num_keypoints") == sum(value > 0 for value in entry["keypoints"][2::3])
        del entry["keypoints"]
    for entry in content["categories"]:
        del entry["keypoints"], entry["skeleton"]
    assert content == without
    drawn = draw_image(1, 0, 64).keypoints
    visible = drawn[..., 2] > 0
    assert visible.any()
    assert np.abs(dataset[0][1]["keypoints"].numpy() - drawn)[visible].max() < 0.01
