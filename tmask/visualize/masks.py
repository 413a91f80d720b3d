"""A mask as a tint with a smooth outline."""

from __future__ import annotations

import functools
import math
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter
from torch import Tensor

from tmask.data.segmentation import run_counts
from tmask.visualize.colours import Colour
from tmask.visualize.instances import to_numpy

MASK_ALPHA = 0.45  # weight of an instance's colour over the image
_SMOOTH = 0.8  # standard deviation, in image pixels, of the blur that rounds the corners of an enlarged mask
_PEAK = 190  # least brightness, of 255, of a blurred mask at its brightest pixel: masks of few pixels stay visible


def draw_mask(canvas: Image.Image, mask: Any, scale: float, fill: Colour, outline: Colour, line: float) -> None:
    """Tint the pixels of a mask and draw a line of `line` pixels inside its outline, both anti-aliased.

    A blurred straight edge is the normal distribution function of the distance to the edge. So its inverse is a table
    from the brightness of the blurred mask to the distance, and from there to the weight of the colour.
    """
    dense, top, left = crop_mask(mask)
    height, width = dense.shape
    if not height:
        return
    line = round(2 * line) / 2
    sigma = max(0.75, line / 2, _SMOOTH * scale)
    margin = math.ceil(3 * sigma)
    pad = math.ceil((margin + 1) / scale)  # pixels of the mask
    x1, y1 = math.floor(left * scale) - margin, math.floor(top * scale) - margin
    x2, y2 = math.ceil((left + width) * scale) + margin, math.ceil((top + height) * scale) + margin
    window = [value / scale + pad for value in (x1, y1, x2, y2)]
    window = [value - start for value, start in zip(window, (left, top, left, top), strict=True)]
    padded = Image.fromarray(np.pad(dense, pad).astype(np.uint8) * 255)
    soft = padded.resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR, box=tuple(window))
    resized = max(scale, 1.0) ** 2 / 6 if scale != 1 else 0.0  # variance of the kernel of the resize, a triangle
    soft = soft.filter(ImageFilter.GaussianBlur(math.sqrt(sigma**2 - resized)))
    peak = soft.getextrema()[1]
    if peak < _PEAK:
        soft = soft.point([min(255, value * _PEAK // max(1, peak)) for value in range(256)])
    for colour, table in zip((fill, outline), _weights(sigma, line), strict=True):
        canvas.paste(colour, (x1, y1, x2, y2), soft.point(table))


@functools.lru_cache(256)
def _weights(sigma: float, line: float) -> tuple[list[int], list[int]]:
    """Return the tables of `draw_mask`, from brightness to weight (0..255): of the tint and of the outline."""
    inside = NormalDist(0, sigma).inv_cdf
    distances = [-math.inf, *(inside(value / 255) for value in range(1, 255)), math.inf]
    tint = [round(255 * MASK_ALPHA * min(max(d + 0.5, 0.0), 1.0)) for d in distances]
    return tint, [round(255 * min(max(min(d, line - d) + 0.5, 0.0), 1.0)) for d in distances]


def crop_mask(mask: Any) -> tuple[npt.NDArray[np.bool_], int, int]:
    """Return a mask of any form, cut to its pixels: bool [h, w], and row and column of its corner. It may be empty."""
    left = 0
    if isinstance(mask, Tensor):
        mask = mask[0] if mask.dim() == 3 else mask
        dense = to_numpy(mask >= 0.5 if mask.is_floating_point() else mask != 0)
    else:
        height, counts = int(mask["size"][0]), mask["counts"]
        runs = run_counts(counts.encode() if isinstance(counts, str) else counts)
        if runs is None:
            raise ValueError("masks: expected COCO's compressed run lengths, got damaged ones")
        ends = runs.cumsum()  # of zeros and of ones in turn, along the columns
        ones = runs[1::2] > 0
        if not ones.any():
            return np.zeros((0, 0), dtype=bool), 0, 0
        left, right = int(ends[0::2][: len(ones)][ones][0]) // height, -(-int(ends[1::2][ones][-1]) // height)
        inside = np.clip(ends, left * height, right * height)
        values = np.repeat(np.arange(len(runs)) % 2 == 1, np.diff(inside, prepend=left * height))
        dense = values.reshape(right - left, height).T
    rows, columns = (np.flatnonzero(dense.any(axis)) for axis in (1, 0))
    if not len(rows):
        return dense[:0, :0], 0, 0
    y, x = int(rows[0]), int(columns[0])
    return dense[y : rows[-1] + 1, x : columns[-1] + 1], y, left + x
