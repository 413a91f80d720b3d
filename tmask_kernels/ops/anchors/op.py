"""Anchors: the boxes that the outputs of the RPN are relative to. Letters: A anchors of all levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...common.checks import check_list, check_size, wrong
from .reference import AnchorSpec, anchors_at, level_strides


def make_anchors(
    spec: AnchorSpec,
    feature_sizes: Sequence[tuple[int, int]],
    image_size: tuple[int, int],
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return all anchors of an image. Anchors may reach beyond the image.

    Args:
        spec: sizes, aspect ratios and strides.
        feature_sizes: (height, width) of the map of each level.
        image_size: (height, width) of the padded image.
        device: where the anchors are made.

    Returns:
        [A, 4] float32, xyxy; ordered by level, then y, x, aspect ratio, size.

    Raises:
        ValueError: `feature_sizes` does not have one entry a level, or an argument has a wrong type.
    """
    check_spec("make_anchors", spec)
    expected = f"{len(spec.sizes)} (height, width), one a level (AnchorSpec.sizes)"
    maps = check_list("make_anchors", "feature_sizes", feature_sizes, expected, len(spec.sizes))
    feature_sizes = [check_size("make_anchors", f"feature_sizes[{i}]", size, 0) for i, size in enumerate(maps)]
    image_size = check_size("make_anchors", "image_size", image_size)
    if device is not None and not isinstance(device, torch.device):
        try:
            device = torch.device(device)
        except (RuntimeError, TypeError):
            raise wrong("make_anchors", "device", "a device such as 'cpu' or 'cuda:0'", device) from None
    strides = level_strides(spec, feature_sizes, image_size)
    levels = []
    for level, (height, width) in enumerate(feature_sizes):
        index = torch.arange(height * width * len(spec.half_sides[level]), device=device)  # [A of this level]
        levels.append(anchors_at(spec, level, index, width, strides[level]))
    return torch.cat(levels)


def check_spec(op: str, spec: AnchorSpec) -> None:
    """Check that `spec` is an AnchorSpec. Raises ValueError."""
    if not isinstance(spec, AnchorSpec):
        raise wrong(op, "spec", "an AnchorSpec", spec)
