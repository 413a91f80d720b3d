"""The shapes data set: reproducible, and no easier or harder than it was."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from tmask.data import shapes
from tmask.data.coco import CocoDataset
from tmask.data.shapes import CLASSES, draw_image, write_shapes

COUNT = 300


@pytest.fixture(scope="module")
def images():
    return [draw_image(11, index) for index in range(COUNT)]


def test_classes_are_frozen():
    assert CLASSES == ("disc", "square", "triangle", "star", "ring")


def test_same_seed_same_bytes_and_other_seeds_other_images():
    a, b = draw_image(3, 4), draw_image(3, 4)
    assert a.image.tobytes() == b.image.tobytes()
    assert a.masks.tobytes() == b.masks.tobytes()
    seen = {draw_image(seed, index).image.tobytes() for seed in range(4) for index in range(10)}
    assert len(seen) == 40


def test_masks_of_a_few_samples_are_frozen():
    """Masks, not colours: their edges are far enough from any rounding to be the same on every machine.

    Where this digest has to change, raise GENERATOR_VERSION.
    """
    digest = hashlib.sha256()
    for seed, index in [(0, 0), (0, 1), (1, 0), (7, 123), (2024, 3999)]:
        drawn = draw_image(seed, index)
        digest.update(drawn.labels.tobytes())
        digest.update(np.packbits(drawn.masks).tobytes())
    assert (shapes.GENERATOR_VERSION, digest.hexdigest()[:16]) == (1, "db370d00fd68cd50")


def test_counts_sizes_and_classes(images):
    counts = np.array([len(drawn.labels) for drawn in images])
    assert counts.min() == shapes.MIN_SHAPES
    assert counts.max() == shapes.MAX_SHAPES
    assert 3.5 < counts.mean() < 4.5
    labels = np.concatenate([drawn.labels for drawn in images])
    share = np.bincount(labels, minlength=len(CLASSES) + 1) / len(labels)
    assert share[0] == 0
    assert (np.abs(share[1:] - 1 / len(CLASSES)) < 0.05).all()
    sides = np.concatenate([box_sides(drawn.masks).max(axis=1) for drawn in images])
    assert sides.max() <= shapes.MAX_SIDE + 1
    assert np.quantile(sides, 0.1) < 16
    assert np.quantile(sides, 0.9) > 42


def box_sides(masks):
    """Height and width of each mask's box: [K, 2]."""
    return np.stack([np.ptp(np.argwhere(mask), axis=0) + 1 for mask in masks])


def test_shapes_hide_parts_of_one_another_but_never_too_much(images):
    visible = np.concatenate([drawn.masks.sum((1, 2)) / drawn.full_areas for drawn in images])
    pixels = np.concatenate([drawn.masks.sum((1, 2)) for drawn in images])
    assert (visible >= shapes.MIN_VISIBLE).all()
    assert (pixels >= shapes.MIN_PIXELS).all()
    assert 0.2 < (visible < 0.98).mean() < 0.4
    assert 0.07 < (visible < 0.8).mean() < 0.2
    assert all(drawn.masks.sum(axis=0).max() == 1 for drawn in images)  # a pixel shows one shape


def nearest_mean_accuracy(features, labels):
    """Share of the second half that is nearest to its own class's mean in the first half, in whitened features."""
    features = (features - features.mean(0)) / features.std(0)
    half = len(labels) // 2
    means = np.stack([features[:half][labels[:half] == label].mean(0) for label in np.unique(labels)])
    nearest = np.linalg.norm(features[half:, None] - means, axis=2).argmin(1)
    return (np.unique(labels)[nearest] == labels[half:]).mean()


def test_colour_and_texture_do_not_tell_the_class_but_the_outline_does(images):
    colours, outlines, labels = [], [], []
    for drawn in images:
        for mask, label, sides in zip(drawn.masks, drawn.labels, box_sides(drawn.masks), strict=True):
            pixels = drawn.image[mask].astype(float)
            colours.append([*pixels.mean(0), *pixels.std(0)])
            y, x = np.nonzero(mask)
            spread = np.hypot(y - y.mean(), x - x.mean())
            area = mask.sum()
            outlines.append([area / sides.prod(), spread.min() / area**0.5, spread.max() / area**0.5])
            labels.append(label)
    labels = np.array(labels)
    chance = 1 / len(CLASSES)
    assert nearest_mean_accuracy(np.array(colours), labels) < chance + 0.07
    assert nearest_mean_accuracy(np.array(outlines), labels) > 3 * chance


def test_outlines_are_the_named_ones():
    """Area of the whole shape over that of its circumscribed circle, and the hole of the ring."""
    side, size = 60.0, 128
    for label, name in enumerate(CLASSES, start=1):
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


def test_written_files_hold_the_images_and_masks(tmp_path):
    folder, file = write_shapes(tmp_path / "set", num_images=5, seed=9, size=96)
    again, same = write_shapes(tmp_path / "again", num_images=3, seed=9, size=96)
    dataset = CocoDataset(folder, file)
    assert [category["name"] for category in dataset.categories] == list(CLASSES)
    assert len(dataset) == 5
    for i in range(5):
        drawn = draw_image(9, i, 96)
        image, target = dataset[i]
        assert np.array_equal(image.permute(1, 2, 0).numpy(), drawn.image)
        assert np.array_equal(target["masks"].numpy(), drawn.masks)
        assert target["labels"].tolist() == drawn.labels.tolist()
        assert np.array_equal(target["boxes"][:, 2:] - target["boxes"][:, :2], box_sides(drawn.masks)[:, ::-1])
    annotations = json.loads(file.read_text())["annotations"]
    assert [item["id"] for item in annotations] == list(range(1, len(annotations) + 1))
    assert all(item["area"] == coco_mask.area(item["segmentation"]) for item in annotations)
    for name in ("000000.png", "000002.png"):  # an image does not depend on how many are made
        assert (folder / name).read_bytes() == (again / name).read_bytes()
    assert Image.open(folder / "000000.png").size == (96, 96)
    assert same.parent == again.parent


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: write_shapes(folder, num_images=0, seed=1), "num_images: expected at least 1, got 0"),
        (lambda folder: draw_image(-1, 0), "seed: expected at least 0, got -1"),
        (lambda folder: draw_image(0, 0, 16), "size: expected at least 32, got 16"),
    ],
    ids=["num_images", "seed", "size"],
)
def test_wrong_arguments_are_named(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path)
