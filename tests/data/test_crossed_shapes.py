"""The crossed shapes: thin, in pairs that fill one box, of classes that share their parts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from tmask.data import crossed
from tmask.data.coco import CocoDataset
from tmask.data.shapes import MIN_PIXELS, MIN_VISIBLE, ShapesImage, draw_image, write_shapes

COUNT = 60


@pytest.fixture(scope="module")
def images() -> list[ShapesImage]:
    return [draw_image(5, index, variant="crossed") for index in range(COUNT)]


def box(mask: np.ndarray) -> np.ndarray:
    """y, x of its first and beyond its last pixel."""
    pixels = np.argwhere(mask)
    return np.concatenate([pixels.min(axis=0), pixels.max(axis=0) + 1])


def iou(a: np.ndarray, b: np.ndarray) -> float:
    sides = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
    areas = [np.prod(c[2:] - c[:2]) for c in (a, b)]
    return float(sides.prod() / (sum(areas) - sides.prod()))


def test_classes_are_frozen() -> None:
    assert crossed.CLASSES == (
        "rising bar", "falling bar", "rising leaf", "falling leaf", "rising wedge", "falling wedge",
        "rising dumbbell", "falling dumbbell",
    )  # fmt: skip


def test_masks_of_a_few_samples_are_frozen() -> None:
    """Where this digest has to change, raise GENERATOR_VERSION."""
    digest = hashlib.sha256()
    for seed, index in [(0, 0), (0, 1), (1, 0), (7, 123)]:
        drawn = draw_image(seed, index, variant="crossed")
        digest.update(drawn.labels.tobytes())
        digest.update(np.packbits(drawn.masks).tobytes())
    assert digest.hexdigest()[:16] == "2e0366b34838141e"


def test_the_direction_is_that_of_the_class(images: list[ShapesImage]) -> None:
    """Rising: x grows as y, which points down, falls. By the sign of the covariance of x and y."""
    for drawn in images:
        for label, mask in zip(drawn.labels, drawn.masks, strict=True):
            y, x = np.nonzero(mask)
            rising = np.mean((x - x.mean()) * (y - y.mean())) < 0
            assert crossed.CLASSES[label - 1].startswith("rising" if rising else "falling")


def test_shapes_are_thin_inside_their_image_and_visible(images: list[ShapesImage]) -> None:
    sides, fill = [], []
    for drawn in images:
        assert (drawn.masks.sum((1, 2)) >= np.maximum(MIN_VISIBLE * drawn.full_areas, MIN_PIXELS)).all()
        boxes = np.stack([box(mask) for mask in drawn.masks])
        sides += (boxes[:, 2:] - boxes[:, :2]).max(axis=1).tolist()
        fill += (drawn.masks.sum((1, 2)) / (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)).tolist()
    assert max(sides) <= 1.1 * crossed.MAX_SIDE + 1
    assert np.quantile(sides, 0.1) > 18
    assert np.quantile(fill, 0.9) < 0.45
    labels = np.concatenate([drawn.labels for drawn in images])
    assert (np.bincount(labels, minlength=9)[1:] > 0.08 * len(labels)).all()


def test_many_boxes_hold_two_shapes_of_other_directions(images: list[ShapesImage]) -> None:
    shared = total = 0
    for drawn in images:
        boxes = [box(mask) for mask in drawn.masks]
        for i, label in enumerate(drawn.labels):
            total += 1
            shared += any(
                iou(boxes[i], boxes[j]) > 0.6 for j, other in enumerate(drawn.labels) if (other - label) % 2 == 1
            )
    assert shared / total > 0.4


def test_outlines_are_the_named_ones() -> None:
    """Area over that of the bar, whose is 4 times half length times half width."""
    length = 40.0
    u, v = np.meshgrid(np.arange(-50, 50) + 0.5, np.arange(-50, 50) + 0.5)
    area = {name: (crossed.beyond(name, u, v, length) < 0).sum() for name in crossed.OUTLINES}
    assert area["bar"] == pytest.approx(4 * length**2 * crossed.THICKNESS, rel=0.02)
    assert area["leaf"] / area["bar"] == pytest.approx(np.pi / 4, rel=0.03)
    assert area["wedge"] / area["bar"] == pytest.approx(0.55, rel=0.03)
    assert 0.4 < area["dumbbell"] / area["bar"] < 0.7
    assert crossed.beyond("leaf", np.array([60.0]), np.array([0.0]), length) == pytest.approx(20, rel=0.3)
    assert crossed.beyond("bar", np.array([0.0]), np.array([10.0]), length) == pytest.approx(2)


def test_written_files_have_their_classes(tmp_path: Path) -> None:
    folder, file = write_shapes(tmp_path, num_images=2, seed=5, size=64, variant="crossed")
    dataset = CocoDataset(folder, file)
    assert [category["name"] for category in dataset.categories] == list(crossed.CLASSES)
    drawn = draw_image(5, 1, 64, "crossed")
    assert np.array_equal(dataset[1][1]["masks"].numpy(), drawn.masks)
    assert dataset[1][1]["labels"].tolist() == drawn.labels.tolist()
    assert len(json.loads(file.read_text())["categories"]) == 8


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ValueError, match=r"variant: expected one of mixed, .*crossed, got 'thick'"):
        draw_image(0, 0, variant="thick")
