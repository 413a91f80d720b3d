"""Anchors: the boxes that the RPN's outputs are relative to. Letters: A anchors of all levels, B of one cell."""

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
    """All anchors of an image: [A, 4] xyxy float32; by level, then y, x, ratio, size.

    feature_sizes: (height, width) of each level's map. image_size: (height, width) of the padded image. Anchors may
    reach outside the image. Errors: ValueError if there are not as many feature sizes as levels.
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
    """That `spec` is one. Errors: ValueError."""
    if not isinstance(spec, AnchorSpec):
        raise wrong(op, "spec", "an AnchorSpec", spec)
