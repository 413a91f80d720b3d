"""A procedural data set that a small Mask R-CNN learns from scratch in minutes: shapes on a textured ground.

What makes it a test of instance segmentation and not of colour: the class shows in the outline alone (colour and
texture are drawn independently of it), shapes turn freely, differ fivefold in size and hide parts of one another.
Image `index` of a set depends on (seed, index) only, so any part of a set can be made anywhere, bit for bit.
Variants: "mixed" is that set; "corners" the same with corners as keypoints; "crossed" has thin shapes that fill the
same box in pairs (`tmask.data.crossed`).
Letters: K shapes of an image, Kp keypoints of a shape, h w size of the window a shape is drawn in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tmask.data import crossed

Floats = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]

CLASSES = ("disc", "square", "triangle", "star", "ring")
VARIANTS = {"mixed": CLASSES, "corners": CLASSES, "crossed": crossed.CLASSES}  # and the classes of each

# The outermost corners of a shape, however it is turned; one corner may be two of them. Discs and rings have none.
KEYPOINTS = ("top", "left", "bottom", "right")
KEYPOINT_EDGES = ((0, 1), (1, 2), (2, 3), (3, 0))

# Raise by one with every change that gives other pixels, masks or files for the same arguments: kept pictures of
# another version are drawn anew.
GENERATOR_VERSION = 1

MIN_IMAGE_SIZE = 32  # pixels a side

# At side 128; another side scales them.
MIN_SIDE, MAX_SIDE = 12.0, 60.0  # longer side of a shape's box, log-uniform, pixels
MIN_SHAPES, MAX_SHAPES = 2, 6
OVERHANG = 0.1  # of its side a shape may reach beyond the image
NEIGHBOUR = 0.5  # chance that a shape is put next to an earlier one, so that some overlap
MIN_VISIBLE = 0.5  # a later shape leaves at least this part of an earlier one
MIN_PIXELS = 24  # and at least so many pixels
MIN_CONTRAST = 60.0  # between a shape's mean colour and the ground's, Euclidean in RGB 0..255
_TRIES = 20  # for a place that leaves every earlier shape visible enough
_RING_HOLE = 0.55  # inner radius / outer radius
_STAR_NOTCH = 0.42  # radius of a star's inner corners / of its tips


class ShapesImage(NamedTuple):
    """One image with its shapes, from back to front."""

    image: Bytes  # [size, size, 3]
    labels: npt.NDArray[np.int64]  # [K], 1..number of classes
    masks: Bools  # [K, size, size], the visible pixels
    full_areas: npt.NDArray[np.int64]  # [K], pixels of the whole shape inside the image
    keypoints: Floats  # [K, Kp, 3]: x, y (0.5 is the centre of the first pixel) and COCO's visibility


@dataclass(frozen=True)
class _Shape:
    label: int
    top: int  # window in the image
    left: int
    cover: Floats  # [h, w] how much of a pixel the shape covers, 0..1: soft only at the edge
    inside: Bools  # [h, w]
    corners: Floats = field(default_factory=lambda: np.zeros((0, 2)))  # y and x in the image of each

    def window(self) -> tuple[slice, slice]:
        h, w = self.cover.shape
        return slice(self.top, self.top + h), slice(self.left, self.left + w)


def draw_image(seed: int, index: int, size: int = 128, variant: str = "mixed") -> ShapesImage:
    """Image `index` of the set `seed`, `size` pixels a side. The same arguments give the same bytes.

    Errors: ValueError for an unknown variant, a negative seed or index, or a size below MIN_IMAGE_SIZE.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    for name, value, least in (("seed", seed, 0), ("index", index, 0), ("size", size, MIN_IMAGE_SIZE)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    rng = np.random.default_rng((seed, index))
    shapes, owner = _place(rng, size, _crossing if variant == "crossed" else _candidates)
    canvas, ground_colour = _ground(rng, size)
    for shape in shapes:
        window = shape.window()
        alpha = shape.cover[..., None]
        canvas[window] += alpha * (_paint(rng, shape.cover.shape, ground_colour) - canvas[window])
    image = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    labels = np.array([shape.label for shape in shapes], dtype=np.int64)
    areas = np.array([shape.inside.sum() for shape in shapes], dtype=np.int64)
    keypoints = np.stack([_keypoints(shape, k, owner) for k, shape in enumerate(shapes)])
    return ShapesImage(image, labels, owner == np.arange(len(shapes))[:, None, None], areas, keypoints)


def write_shapes(
    folder: str | Path, *, num_images: int, seed: int, size: int = 128, variant: str = "mixed"
) -> tuple[Path, Path]:
    """Write a COCO data set: ``images/*.png`` and ``annotations.json`` (masks as compressed RLE) under `folder`.

    Of variant "corners" the annotations also hold the outermost corners, and the categories their names, ``KEYPOINTS``.
    Returns both paths. Takes about 3 ms an image. Errors: ValueError for num_images < 1 and those of `draw_image`.
    """
    from PIL import Image
    from pycocotools import mask as coco_mask

    if num_images < 1:
        raise ValueError(f"num_images: expected at least 1, got {num_images}")
    images_folder, annotation_file = Path(folder) / "images", Path(folder) / "annotations.json"
    images_folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(num_images):
        drawn = draw_image(seed, index, size, variant)
        name = f"{index:06d}.png"
        # Level 1 is three times as fast as the default and a tenth larger.
        Image.fromarray(drawn.image).save(images_folder / name, compress_level=1)
        images.append({"id": index + 1, "file_name": name, "width": size, "height": size})
        runs = coco_mask.encode(np.asfortranarray(drawn.masks.transpose(1, 2, 0).astype(np.uint8)))
        columns = (drawn.labels, runs, coco_mask.toBbox(runs), coco_mask.area(runs), drawn.keypoints)
        for label, run, box, area, corners in zip(*columns, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": int(label),
                    "segmentation": {"size": run["size"], "counts": run["counts"].decode("ascii")},
                    "bbox": [float(value) for value in box],
                    "area": int(area),
                    "iscrowd": 0,
                }
            )
            if variant == "corners":
                annotations[-1] |= _coco_keypoints(corners)
    categories: list[dict[str, Any]] = [
        {"id": label, "name": name} for label, name in enumerate(VARIANTS[variant], start=1)
    ]
    if variant == "corners":
        edges = [[first + 1, second + 1] for first, second in KEYPOINT_EDGES]  # COCO counts from 1
        categories = [{**category, "keypoints": list(KEYPOINTS), "skeleton": edges} for category in categories]
    content = {"images": images, "annotations": annotations, "categories": categories}
    annotation_file.write_text(json.dumps(content), encoding="utf-8")
    return images_folder, annotation_file


def _keypoints(shape: _Shape, k: int, owner: npt.NDArray[np.int64]) -> Floats:
    """The outermost corners of shape k of an image: [len(KEYPOINTS), 3], visibility 0 beyond the image, 1 if hidden."""
    out = np.zeros((len(KEYPOINTS), 3))
    for row, (axis, sign) in enumerate(((0, -1), (1, -1), (0, 1), (1, 1)) if len(shape.corners) else ()):
        y, x = shape.corners[np.argmax(sign * shape.corners[:, axis])]
        if 0 <= y < owner.shape[0] and 0 <= x < owner.shape[1]:
            out[row] = x, y, 1 if owner[int(y), int(x)] > k else 2  # later shapes lie on top
    return out


def _coco_keypoints(corners: Floats) -> dict[str, Any]:
    """Keypoints [Kp, 3] as fields of a COCO annotation, which counts pixels from their centres."""
    seen = corners[:, 2] > 0
    xy = np.where(seen[:, None], corners[:, :2] - 0.5, 0).round(2)
    triples = [[float(x), float(y), int(v)] for (x, y), v in zip(xy, corners[:, 2], strict=True)]
    return {"keypoints": [value for triple in triples for value in triple], "num_keypoints": int(seen.sum())}


def _place(
    rng: np.random.Generator, size: int, candidates: Callable[..., Iterator[_Shape]]
) -> tuple[list[_Shape], npt.NDArray[np.int64]]:
    """Shapes from back to front, and which of them each pixel shows ([size, size], -1 the ground).

    `candidates(rng, size, shapes)` gives the places that are tried for the next one.
    """
    shapes: list[_Shape] = []
    owner = np.full((size, size), -1)
    for _ in range(int(rng.integers(MIN_SHAPES, MAX_SHAPES + 1))):
        for candidate in candidates(rng, size, shapes):
            covered = owner[candidate.window()][candidate.inside]
            hidden = np.bincount(covered[covered >= 0], minlength=len(shapes))
            visible = np.bincount(owner[owner >= 0], minlength=len(shapes)) - hidden
            full = np.array([shape.inside.sum() for shape in shapes])
            if (visible >= np.maximum(MIN_VISIBLE * full, MIN_PIXELS)).all():
                owner[candidate.window()][candidate.inside] = len(shapes)
                shapes.append(candidate)
                break
    return shapes, owner


def _candidates(rng: np.random.Generator, size: int, shapes: list[_Shape]) -> Iterator[_Shape]:
    """Up to `_TRIES` random shapes of one class."""
    label = int(rng.integers(1, len(CLASSES) + 1))
    for _ in range(_TRIES):
        side = math.exp(rng.uniform(math.log(MIN_SIDE), math.log(MAX_SIDE))) * size / 128
        low, high = -OVERHANG * side, size - (1 - OVERHANG) * side
        corner = rng.uniform(low, high, size=2)  # y, x of the shape's box
        if shapes and rng.random() < NEIGHBOUR:
            other = shapes[int(rng.integers(len(shapes)))]
            centre = np.array([other.top, other.left]) + np.array(other.cover.shape) / 2
            reach = (max(other.cover.shape) + side) / 2
            corner = np.clip(centre - side / 2 + rng.uniform(-reach, reach, size=2), low, high)
        yield _rasterise(label, side, rng.uniform(0, 2 * math.pi), corner, size)


def _crossing(rng: np.random.Generator, size: int, shapes: list[_Shape]) -> Iterator[_Shape]:
    """Up to `_TRIES` random shapes of variant "crossed": every second one may cross the one before it."""
    partner = None
    if len(shapes) % 2 == 1 and rng.random() < crossed.CROSSING:
        last = shapes[-1]  # inside the image, so its window is whole: a pixel wider than its box on either side
        h, w = last.cover.shape
        partner = last.label, np.array([last.top + h / 2, last.left + w / 2]), max(h, w) - 2.5
    for _ in range(_TRIES):
        stroke = crossed.random_stroke(rng, size, partner)
        top, left, cover = crossed.rasterise(stroke, size)
        yield _Shape(stroke.label, top, left, cover, cover >= 0.5)


def _rasterise(label: int, side: float, angle: float, corner: Floats, size: int) -> _Shape:
    """Cover of a shape whose box has its top left at `corner` (y, x) and a longer side of `side` pixels."""
    name = CLASSES[label - 1]
    corners = {"square": 4, "triangle": 3, "star": 5}.get(name)
    tip = np.zeros((2, 0))
    if corners is None:
        low, high = np.array([-1.0, -1.0]), np.array([1.0, 1.0])
    else:
        tips = angle + 2 * math.pi * np.arange(corners) / corners
        tip = np.stack([np.sin(tips), np.cos(tips)])  # y, x at radius 1
        low, high = tip.min(axis=1), tip.max(axis=1)
    radius = side / (high - low).max()
    centre = corner - low * radius
    first = np.clip(np.floor(corner - 1), 0, size).astype(int)
    last = np.clip(np.ceil(corner + (high - low) * radius + 1), 0, size).astype(int)
    y = np.arange(first[0], last[0])[:, None] + 0.5 - centre[0]
    x = np.arange(first[1], last[1])[None, :] + 0.5 - centre[1]
    distance = np.hypot(y, x)
    if name == "disc":
        outside = distance - radius
    elif name == "ring":
        outside = np.abs(distance - radius * (1 + _RING_HOLE) / 2) - radius * (1 - _RING_HOLE) / 2
    else:
        assert corners is not None
        notch = _STAR_NOTCH if name == "star" else math.cos(math.pi / corners)
        outside = _beyond_polygon(distance, np.arctan2(y, x) - angle, corners, radius, notch * radius)
    cover = np.clip(0.5 - outside, 0.0, 1.0)  # a pixel whose centre is on the edge is half covered
    return _Shape(label, int(first[0]), int(first[1]), cover, cover >= 0.5, (centre[:, None] + radius * tip).T)


def _beyond_polygon(distance: Floats, angle: Floats, corners: int, radius: float, notch: float) -> Floats:
    """Signed distance to the edge lines of a figure with `corners` tips at `radius` and notches at `notch` between.

    All 2 * corners edges are one another's images under turns and reflections, so fold the plane onto one of them.
    """
    half = math.pi / corners
    folded = np.abs((angle + half) % (2 * half) - half)  # 0 at a tip, `half` at a notch
    run, rise = notch * math.cos(half) - radius, notch * math.sin(half)
    normal = np.array([rise, -run]) / math.hypot(run, rise)
    return (distance * np.cos(folded) - radius) * normal[0] + distance * np.sin(folded) * normal[1]


def _ground(rng: np.random.Generator, size: int) -> tuple[Floats, Floats]:
    """A cloudy two-colour ground [size, size, 3] and its mean colour [3]."""
    colours = rng.uniform(40, 215, size=(2, 3))
    blend = _clouds(rng, size, size, int(rng.integers(3, 9)))[..., None]
    grain = rng.uniform(4, 14) * (_clouds(rng, size, size, 40)[..., None] - 0.5)
    canvas = colours[0] + 0.6 * blend * (colours[1] - colours[0]) + grain
    return canvas, canvas.mean(axis=(0, 1))


def _paint(rng: np.random.Generator, window: tuple[int, ...], ground_colour: Floats) -> Floats:
    """Colour and texture of one shape [h, w, 3]: stripes, clouds or a slope between two shades; blind to its class."""
    colour = rng.uniform(20, 235, size=3)
    while np.linalg.norm(colour - ground_colour) < MIN_CONTRAST:
        colour = rng.uniform(20, 235, size=3)
    h, w = window
    texture = int(rng.integers(3))
    if texture == 0:
        pattern = _clouds(rng, h, w, 5)
    else:
        turn = rng.uniform(0, math.pi)
        along = math.sin(turn) * np.arange(h)[:, None] + math.cos(turn) * np.arange(w)[None, :]
        if texture == 1:
            pattern = 0.5 + 0.5 * np.sin(along * (2 * math.pi / rng.uniform(4, 12)))
        else:
            pattern = (along - along.min()) / max(1.0, float(np.ptp(along)))
    shade = rng.uniform(-30, 30, size=3)
    return colour + (pattern - 0.5)[..., None] * shade


def _clouds(rng: np.random.Generator, height: int, width: int, cells: int) -> Floats:
    """Smooth noise in 0..1: cells x cells random values, interpolated linearly to [height, width]."""
    coarse = rng.random((cells, cells))
    return _stretch(height, cells) @ coarse @ _stretch(width, cells).T


def _stretch(length: int, cells: int) -> Floats:
    """Linear interpolation weights [length, cells]."""
    position = np.linspace(0, cells - 1, length)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(cells)))
