"""The shapes data set and its crossed variant: reproducible, and no easier or harder than they were."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from tmask.data import crossed, shapes
from tmask.data.coco import CocoDataset
from tmask.data.shapes import MIN_PIXELS, MIN_VISIBLE, ShapesImage, draw_image, write_shapes
from tmask.demo import make_data

CLASSES = {"mixed": shapes.CLASSES, "crossed": crossed.CLASSES}


@pytest.fixture(scope="module")
def images() -> list[ShapesImage]:
    return [draw_image(11, index) for index in range(300)]


@pytest.fixture(scope="module")
def crosses() -> list[ShapesImage]:
    return [draw_image(5, index, variant="crossed") for index in range(60)]


def boxes(masks: np.ndarray) -> np.ndarray:
    """y, x of the first pixel of each mask and beyond its last: [K, 4]."""
    pixels = [np.argwhere(mask) for mask in masks]
    return np.stack([np.concatenate([at.min(axis=0), at.max(axis=0) + 1]) for at in pixels])


def sides(masks: np.ndarray) -> np.ndarray:
    """Height and width of each mask's box: [K, 2]."""
    return boxes(masks)[:, 2:] - boxes(masks)[:, :2]


def iou(a: np.ndarray, b: np.ndarray) -> float:
    inter = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
    return float(inter / (sum(np.prod(box[2:] - box[:2]) for box in (a, b)) - inter))


@pytest.mark.parametrize(
    ("variant", "samples", "expected"),
    [
        ("mixed", [(0, 0), (0, 1), (1, 0), (7, 123), (2024, 3999)], "db370d00fd68cd50"),
        ("crossed", [(0, 0), (0, 1), (1, 0), (7, 123)], "2e0366b34838141e"),
    ],
)
def test_classes_and_masks_are_frozen(variant: str, samples: list[tuple[int, int]], expected: str) -> None:
    """Masks, not colours: their edges are far enough from any rounding to be the same on every machine.

    Where a digest has to change, raise GENERATOR_VERSION.
    """
    digest = hashlib.sha256()
    for seed, index in samples:
        drawn = draw_image(seed, index, variant=variant)
        digest.update(drawn.labels.tobytes())
        digest.update(np.packbits(drawn.masks).tobytes())
    assert (shapes.GENERATOR_VERSION, digest.hexdigest()[:16]) == (1, expected)
    names = ["disc", "square", "triangle", "star", "ring"]
    if variant == "crossed":
        names = [f"{turn} {kind}" for kind in ("bar", "leaf", "wedge", "dumbbell") for turn in ("rising", "falling")]
    assert CLASSES[variant] == tuple(names)


def test_same_seed_same_bytes_and_other_seeds_other_images() -> None:
    a, b = draw_image(3, 4), draw_image(3, 4)
    assert a.image.tobytes() == b.image.tobytes()
    assert a.masks.tobytes() == b.masks.tobytes()
    seen = {draw_image(seed, index).image.tobytes() for seed in range(4) for index in range(10)}
    assert len(seen) == 40


def test_counts_and_classes(images: list[ShapesImage]) -> None:
    counts = np.array([len(drawn.labels) for drawn in images])
    assert counts.min() == shapes.MIN_SHAPES
    assert counts.max() == shapes.MAX_SHAPES
    assert 3.5 < counts.mean() < 4.5
    labels = np.concatenate([drawn.labels for drawn in images])
    share = np.bincount(labels, minlength=6) / len(labels)
    assert share[0] == 0
    assert (np.abs(share[1:] - 1 / 5) < 0.05).all()


def test_shapes_hide_parts_of_one_another_but_never_too_much(
    images: list[ShapesImage], crosses: list[ShapesImage]
) -> None:
    for drawn in (*images, *crosses):
        assert (drawn.masks.sum((1, 2)) >= np.maximum(MIN_VISIBLE * drawn.full_areas, MIN_PIXELS)).all()
        assert drawn.masks.sum(axis=0).max() == 1  # a pixel shows one shape
    visible = np.concatenate([drawn.masks.sum((1, 2)) / drawn.full_areas for drawn in images])
    assert 0.2 < (visible < 0.98).mean() < 0.4
    assert 0.07 < (visible < 0.8).mean() < 0.2


def nearest_mean_accuracy(features: np.ndarray, labels: np.ndarray) -> float:
    """Share of the second half that is nearest to its own class's mean in the first half, in whitened features."""
    features = (features - features.mean(0)) / features.std(0)
    half = len(labels) // 2
    means = np.stack([features[:half][labels[:half] == label].mean(0) for label in np.unique(labels)])
    nearest = np.linalg.norm(features[half:, None] - means, axis=2).argmin(1)
    return float((np.unique(labels)[nearest] == labels[half:]).mean())


def test_colour_and_texture_do_not_tell_the_class_but_the_outline_does(images: list[ShapesImage]) -> None:
    colours, outlines = [], []
    for drawn in images:
        for mask, box_sides in zip(drawn.masks, sides(drawn.masks), strict=True):
            pixels = drawn.image[mask].astype(float)
            colours.append([*pixels.mean(0), *pixels.std(0)])
            y, x = np.nonzero(mask)
            spread = np.hypot(y - y.mean(), x - x.mean())
            area = mask.sum()
            outlines.append([area / box_sides.prod(), spread.min() / area**0.5, spread.max() / area**0.5])
    labels = np.concatenate([drawn.labels for drawn in images])
    assert nearest_mean_accuracy(np.array(colours), labels) < 1 / 5 + 0.07
    assert nearest_mean_accuracy(np.array(outlines), labels) > 3 / 5


def test_outlines_are_the_named_ones() -> None:
    """Area of the whole shape over that of its circumscribed circle, and the hole of the ring."""
    side, size = 60.0, 128
    for label, name in enumerate(shapes.CLASSES, start=1):
        shape = shapes._rasterise(label, side, 0.3, np.array([20.0, 20.0]), size)
        rows, columns = np.nonzero(shape.inside)
        assert max(np.ptp(rows), np.ptp(columns)) + 1 == pytest.approx(side, abs=2.5)
        centre = shape.inside[shape.inside.shape[0] // 2, shape.inside.shape[1] // 2]
        assert centre == (name != "ring")
        soft = (shape.cover > 0) & (shape.cover < 1)
        assert 0 < soft.sum() < 0.35 * shape.inside.sum()  # smooth edges, and only edges
        assert shape.inside.sum() == pytest.approx(shape.cover.sum(), rel=0.02)
    disc, square, triangle = (shapes._rasterise(k, side, 0.0, np.array([20.0, 20.0]), size) for k in (1, 2, 3))
    assert disc.inside.sum() == pytest.approx(np.pi * 30**2, rel=0.01)
    assert square.inside.sum() == pytest.approx(60**2 / 2, rel=0.02)  # on its corner
    assert triangle.inside.sum() == pytest.approx(60**2 * 3**0.5 / 4, rel=0.02)


def test_the_direction_of_a_crossed_shape_is_that_of_its_class(crosses: list[ShapesImage]) -> None:
    """Rising: x grows as y, which points down, falls. By the sign of the covariance of x and y."""
    for drawn in crosses:
        for label, mask in zip(drawn.labels, drawn.masks, strict=True):
            y, x = np.nonzero(mask)
            rising = np.mean((x - x.mean()) * (y - y.mean())) < 0
            assert crossed.CLASSES[label - 1].startswith("rising" if rising else "falling")
    labels = np.concatenate([drawn.labels for drawn in crosses])
    assert (np.bincount(labels, minlength=9)[1:] > 0.08 * len(labels)).all()


def test_many_boxes_hold_two_crossed_shapes_of_other_directions(crosses: list[ShapesImage]) -> None:
    shared = []
    for drawn in crosses:
        placed = [*zip(boxes(drawn.masks), drawn.labels, strict=True)]
        shared += [any(iou(a, b) > 0.6 for b, other in placed if (other - label) % 2 == 1) for a, label in placed]
    assert np.mean(shared) > 0.4


@pytest.mark.parametrize("variant", CLASSES)
def test_written_files_hold_the_images_and_masks(tmp_path: Path, variant: str) -> None:
    folder, file = write_shapes(tmp_path / "set", num_images=5, seed=9, size=96, variant=variant)
    again, _ = write_shapes(tmp_path / "again", num_images=3, seed=9, size=96, variant=variant)
    dataset = CocoDataset(folder, file)
    assert tuple(category["name"] for category in dataset.categories) == CLASSES[variant]
    assert len(dataset) == 5
    for i in range(5):
        drawn = draw_image(9, i, 96, variant)
        image, target = dataset[i]
        assert np.array_equal(image.permute(1, 2, 0).numpy(), drawn.image)
        assert np.array_equal(target["masks"].numpy(), drawn.masks)
        assert target["labels"].tolist() == drawn.labels.tolist()
        assert np.array_equal(target["boxes"][:, 2:] - target["boxes"][:, :2], sides(drawn.masks)[:, ::-1])
    annotations = json.loads(file.read_text())["annotations"]
    assert [item["id"] for item in annotations] == list(range(1, len(annotations) + 1))
    assert all(item["area"] == coco_mask.area(item["segmentation"]) for item in annotations)
    for name in ("000000.png", "000002.png"):  # an image does not depend on how many are made
        assert (folder / name).read_bytes() == (again / name).read_bytes()
    with Image.open(folder / "000000.png") as image:
        assert image.size == (96, 96)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0), "seed: expected at least 0, got -1"),
        ((0, 0, 16), "size: expected at least 32, got 16"),
        ((0, 0, 64, "thick"), r"variant: expected one of mixed, .*crossed, got 'thick'"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_image(*arguments)
    with pytest.raises(ValueError, match="num_images: expected at least 1, got 0"):
        write_shapes(tmp_path, num_images=0, seed=1)


def test_the_demo_draws_its_data_anew_only_where_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (tmp_path / "images" / f"00000{i}.png" for i in (0, 1))
    first.parent.mkdir()

    def drawn_anew(num_images: int = 2) -> bool:
        first.write_text("kept")
        make_data(tmp_path, num_images=num_images, seed=1, size=64)
        return first.read_bytes() != b"kept"

    assert [drawn_anew(), drawn_anew()] == [True, False]
    second.unlink()  # no longer complete
    assert [drawn_anew(), drawn_anew()] == [True, False]
    monkeypatch.setattr(shapes, "GENERATOR_VERSION", shapes.GENERATOR_VERSION + 1)
    assert [drawn_anew(), drawn_anew(), drawn_anew(num_images=3)] == [True, False, True]
