"""Colours of classes, and shades that tell touching instances of one class apart."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Colour = tuple[int, int, int]

WHITE: Colour = (255, 255, 255)
INK: Colour = (20, 20, 20)
WRONG_COLOUR: Colour = (255, 20, 20)  # outline of misses and false detections; no class has a hue near red

# The hues of classes take equal steps around the circle, and the tones take turns. Of the steps that were tried, among
# them the golden ratio, this one of Roberts' R2 sequence keeps the first 5, 10 and 20 classes apart best in CIELAB.
_FIRST_HUE, _HUE_STEP = 0.28, 0.5698403
_TONES = ((0.8, 1.0), (0.95, 0.6), (0.4, 1.0))  # saturation and brightness
# Shades of a class: turn of the hue, factors of saturation and brightness. The first is the colour of the class.
SHADES = ((0.0, 1.0, 1.0), (1.0, 0.9, 0.8), (-1.0, 0.9, 1.0), (0.5, 0.4, 1.0), (1.5, 0.6, 1.0), (-0.5, 1.0, 0.55))


def colour_of(label: int, num_classes: int, shade: int = 0) -> Colour:
    """Return the colour of a class, or a shade of it. No class is red, the colour of misses and false detections."""
    turn, *factors = SHADES[shade]
    hue = 0.1 + 0.82 * ((_FIRST_HUE + (label - 1) * _HUE_STEP) % 1.0)  # red is at 0 and 1
    hue += turn * max(0.03, 0.13 / num_classes)
    tone = _TONES[(label - 1) % len(_TONES)]
    red, green, blue = colorsys.hsv_to_rgb(hue, tone[0] * factors[0], tone[1] * factors[1])
    return int(red * 255), int(green * 255), int(blue * 255)


def choose_shades(boxes: Array, labels: Array) -> Array:
    """Return a number of `SHADES` for each box [K, 4]: the first that no touching box of its class has.

    The boxes choose from the top to the bottom of the image. Where touching boxes have all shades, a box takes the one
    that the fewest of them have.
    """
    shades = np.full(len(boxes), -1)
    for k in np.lexsort((boxes[:, 0], boxes[:, 1])):
        taken = shades[meeting(boxes, boxes[k]) & (labels == labels[k]) & (shades >= 0)]
        shades[k] = np.argmin(np.bincount(taken, minlength=len(SHADES)))
    return shades


def meeting(boxes: Array, box: Array) -> Array:
    """Return which of `boxes` [K, 4] have a point in common with `box` [4]: [K] bool."""
    x1, y1, x2, y2 = box
    return (boxes[:, 0] <= x2) & (boxes[:, 2] >= x1) & (boxes[:, 1] <= y2) & (boxes[:, 3] >= y1)
