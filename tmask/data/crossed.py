"""Thin shapes that cross: two of them fill the same box, so only the class says which pixels are meant.

The classes are outlines x directions: a bar, leaf, wedge or dumbbell that rises to the right or falls. Parts are
shared: who knows what rising means for a bar knows it for a wedge. Flips left to right turn one class into another.
Letters: h w size of the window a shape is drawn in, u v coordinates along and across a shape.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

OUTLINES = ("bar", "leaf", "wedge", "dumbbell")
DIRECTIONS = ("rising", "falling")
CLASSES = tuple(f"{direction} {outline}" for outline in OUTLINES for direction in DIRECTIONS)

MIN_SIDE, MAX_SIDE = 24.0, 64.0  # of a shape's box at image side 128, log-uniform, pixels
THICKNESS = 0.2  # half width / half length
MAX_TURN = math.radians(12)  # off the diagonal
CROSSING = 0.75  # chance that a second shape crosses the first
JITTER = 0.06  # of its side, between the centres of two that cross


class Stroke(NamedTuple):
    """Where one shape lies: label, centre (y, x) and side of its box in pixels, angle of its length from x to y."""

    label: int
    centre: Floats
    side: float
    angle: float


def random_stroke(rng: np.random.Generator, size: int, crossed: tuple[int, Floats, float] | None) -> Stroke:
    """A shape wholly inside an image of `size` pixels.

    With `crossed`, the label, centre and side of another one, it lies over that one in the other direction.
    """
    if crossed is None:
        outline, direction = int(rng.integers(len(OUTLINES))), int(rng.integers(2))
        side = math.exp(rng.uniform(math.log(MIN_SIDE), math.log(MAX_SIDE))) * size / 128
        centre = rng.uniform(side / 2, size - side / 2, size=2)
    else:
        label, middle, reach = crossed
        outline, direction = int(rng.integers(len(OUTLINES))), label % 2  # labels begin at 1: the other direction
        side = min(reach * rng.uniform(0.9, 1.1), float(size))
        centre = np.clip(middle + rng.uniform(-JITTER, JITTER, size=2) * side, side / 2, size - side / 2)
    diagonal = math.radians(-45 if direction == 0 else 45)  # y points down
    turned = diagonal + rng.uniform(-MAX_TURN, MAX_TURN) + math.pi * int(rng.integers(2))
    return Stroke(1 + 2 * outline + direction, centre, side, turned)


def rasterise(stroke: Stroke, size: int) -> tuple[int, int, Floats]:
    """Top, left and cover (0..1 of each pixel, [h, w]) of the window that holds the shape."""
    first = np.clip(np.floor(stroke.centre - stroke.side / 2 - 1), 0, size).astype(int)
    last = np.clip(np.ceil(stroke.centre + stroke.side / 2 + 1), 0, size).astype(int)
    y = np.arange(first[0], last[0])[:, None] + 0.5 - stroke.centre[0]
    x = np.arange(first[1], last[1])[None, :] + 0.5 - stroke.centre[1]
    along, across = math.cos(stroke.angle), math.sin(stroke.angle)
    low, high = sorted((abs(along), abs(across)))
    length = stroke.side / 2 / (high + THICKNESS * low)  # the half: a rectangle of it has a box of that side
    outside = beyond(OUTLINES[(stroke.label - 1) // 2], x * along + y * across, y * along - x * across, length)
    return int(first[0]), int(first[1]), np.clip(0.5 - outside, 0.0, 1.0)


def beyond(outline: str, u: Floats, v: Floats, length: float) -> Floats:
    """Signed distance to an outline of half length `length`, to first order; below 0 inside."""
    width = THICKNESS * length
    if outline == "leaf":  # an ellipse: the value of its equation over the length of that one's gradient
        value = np.hypot(u / length, v / width)
        slope = np.hypot(u / length**2, v / width**2) / np.maximum(value, 1e-6)
        return (value - 1) / np.maximum(slope, 1 / length)
    ends = np.abs(u) - length
    if outline == "bar":
        return np.maximum(ends, np.abs(v) - width)
    if outline == "wedge":  # from a tenth of its end's width up
        return np.maximum(ends, np.abs(v) - width * (0.55 + 0.45 * u / length))
    centre = length - width  # of the discs at the ends
    return np.minimum(np.maximum(np.abs(u) - centre, np.abs(v) - 0.4 * width), np.hypot(np.abs(u) - centre, v) - width)
