"""Which level of a feature pyramid a box is pooled from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor

from tmask_kernels.ops.roi_align.reference import box_levels

# Factor on a box's scale sqrt(area) before its level is taken. torchvision adds 1e-6 to the logarithm. detectron2 adds
# 1e-8 inside it, less than half a unit in the last place of fp32: it only keeps log2(0) finite, which is level 0 here.
LEVEL_FACTOR = {"detectron2": 1.0, "torchvision": 2.0**1e-6}


def pyramid_levels(
    boxes: Tensor,
    spatial_scales: Sequence[float],
    *,
    canonical_scale: float = 224,
    canonical_level: int = 4,
    level_convention: str = "detectron2",
) -> Tensor:
    """Index of the level that `multiscale_roi_align` pools each box [..., 4] from: int64 [...], 0 the finest.

    The arguments are those of `multiscale_roi_align`; areas are fp32, as there of features that are not fp64. A box
    whose area is NaN or negative is of level 0. No host synchronisation.
    Errors: ValueError for impossible scales and an unknown convention.
    """
    thresholds = level_thresholds(spatial_scales, canonical_scale, canonical_level, level_convention)
    return box_levels(boxes.float(), thresholds)


def level_thresholds(
    spatial_scales: Sequence[float], canonical_scale: float, canonical_level: int, convention: str
) -> list[float]:
    """Area in px^2 from which a box leaves level i for level i + 1. Comparing areas needs no logarithm.

    sqrt(area) / canonical_scale * factor >= 2 ** (level - canonical_level), squared. Errors: ValueError.
    """
    if convention not in LEVEL_FACTOR:
        raise ValueError(f"level_convention: expected one of {', '.join(LEVEL_FACTOR)}, got {convention!r}")
    if not canonical_scale > 0:
        raise ValueError(f"canonical_scale: expected more than 0, got {canonical_scale}")
    scales = [float(scale) for scale in spatial_scales]
    if not scales or not all(scale > 0 for scale in scales):
        raise ValueError(f"spatial_scales: expected one or more numbers above 0, got {scales}")
    if any(b * 2 != a for a, b in itertools.pairwise(scales)):
        raise ValueError(f"spatial_scales: expected each half the one before, got {scales}")
    finest = -math.log2(scales[0])
    if len(scales) > 1 and finest != int(finest):
        raise ValueError(f"spatial_scales: expected powers of two, got {scales}")
    unit = float(canonical_scale) / LEVEL_FACTOR[convention]
    return [unit**2 * 4.0 ** (finest + i - canonical_level) for i in range(1, len(scales))]
