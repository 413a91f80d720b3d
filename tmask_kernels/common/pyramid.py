"""The level of a feature pyramid that a box is pooled from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_choice, check_number, check_numbers, check_tensor, check_whole, wrong
from .reference import box_sizes

# Factor on a box's scale sqrt(area) before its level is taken. torchvision adds 1e-6 to the logarithm. detectron2 adds
# 1e-8 inside it, less than half a unit in the last place of fp32: it only keeps log2(0) finite, which is level 0 here.
LEVEL_FACTOR = {"detectron2": 1.0, "torchvision": 2.0**1e-6}

MAX_EXPONENT = 100  # of scales and levels: an area from 4^-300 to 4^300 is a normal float64


def pyramid_levels(
    boxes: Tensor,
    spatial_scales: Sequence[float],
    *,
    canonical_scale: float = 224,
    canonical_level: int = 4,
    level_convention: str = "detectron2",
) -> Tensor:
    """Return the index of the level that `multiscale_roi_align` pools each box from.

    Args:
        boxes: [..., 4] xyxy in image pixels. Areas are float32, as in `multiscale_roi_align` of features that are not
            float64.
        spatial_scales, canonical_scale, canonical_level, level_convention: those of `multiscale_roi_align`.

    Returns:
        int64 [...], 0 for the finest level. A NaN or negative area gives 0. No host synchronisation.

    Raises:
        ValueError: scales that no pyramid has, or an unknown convention.
    """
    op = "pyramid_levels"
    check_tensor(op, "boxes", boxes, ("...", 4))
    thresholds = level_thresholds(spatial_scales, canonical_scale, canonical_level, level_convention, op=op)
    return box_levels(boxes.float(), thresholds)


def level_thresholds(
    spatial_scales: Sequence[float],
    canonical_scale: float,
    canonical_level: int,
    convention: str,
    *,
    op: str = "multiscale_roi_align",
) -> list[float]:
    """Return for each level but the last the area in px^2 from which a box belongs to the next level.

    The definition, sqrt(area) / canonical_scale * factor >= 2 ** (level - canonical_level), is squared, so that
    comparing areas needs no logarithm.

    Raises:
        ValueError: scales that no pyramid has, or an unknown convention.
    """
    check_choice(op, "level_convention", convention, tuple(LEVEL_FACTOR))
    canonical_scale = check_number(op, "canonical_scale", canonical_scale, above=0)
    canonical_level = check_whole(op, "canonical_level", canonical_level)
    scales = check_numbers(op, "spatial_scales", spatial_scales, above=0)
    if any(b * 2 != a for a, b in itertools.pairwise(scales)):
        raise wrong(op, "spatial_scales", "each half the one before", scales)
    finest = -math.log2(scales[0])
    if len(scales) > 1 and finest != int(finest):
        raise wrong(op, "spatial_scales", "powers of two", scales)
    # With these the thresholds are normal floats.
    if not 2.0**-MAX_EXPONENT <= canonical_scale <= 2.0**MAX_EXPONENT:
        raise wrong(op, "canonical_scale", f"a number in 2^-{MAX_EXPONENT}..2^{MAX_EXPONENT}", canonical_scale)
    if abs(canonical_level) > MAX_EXPONENT:
        raise wrong(op, "canonical_level", f"a whole number in -{MAX_EXPONENT}..{MAX_EXPONENT}", canonical_level)
    if abs(finest) > MAX_EXPONENT:
        raise wrong(op, "spatial_scales", f"numbers in 2^-{MAX_EXPONENT}..2^{MAX_EXPONENT}", scales)
    unit = canonical_scale / LEVEL_FACTOR[convention]
    return [unit**2 * 4.0 ** (finest + i - canonical_level) for i in range(1, len(scales))]


def box_levels(boxes: Tensor, level_thresholds: Sequence[float]) -> Tensor:
    """Return the level index of boxes [..., 4], int64 [...]: the number of thresholds that the area reaches."""
    sides = box_sizes(boxes.detach())
    area = sides[..., 0] * sides[..., 1]
    level = torch.zeros_like(area, dtype=torch.int64)
    for threshold in level_thresholds:
        level = level + (area >= threshold)
    return level
