"""Anchors: the boxes that the RPN's outputs are relative to. Letters: A anchors of all levels, B of one cell.

An anchor is computed from its index, so a program that needs a few of 268,569 never stores the rest.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class AnchorSpec:
    """Shapes and places of the anchors; a convention is data.

    sizes: for each level, square roots of areas in pixels. aspect_ratios: height / width, of all levels. strides: for
    each level, pixels a cell; None: image side // grid side for each axis, as torchvision has it (800 // 13 = 61).
    offset: place of the anchor's centre inside its cell, in cells. rounded: half sides rounded to whole pixels, half to
    even, as torchvision has it. Errors: ValueError for empty or non-positive values.
    """

    sizes: tuple[tuple[float, ...], ...]
    aspect_ratios: tuple[float, ...]
    strides: tuple[int, ...] | None = None
    offset: float = 0.0
    rounded: bool = False
    # For each level and each anchor of a cell, half its width and half its height. For each ratio all sizes.
    half_sides: tuple[tuple[tuple[float, float], ...], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.sizes:
            raise ValueError("AnchorSpec: sizes: expected one tuple a level, at least one, got ()")
        for name, values in (("aspect_ratios", self.aspect_ratios), *(("sizes", level) for level in self.sizes)):
            if not values or min(values) <= 0:
                raise ValueError(f"AnchorSpec: {name}: expected positive numbers, at least one, got {values}")
        if self.strides is not None and (len(self.strides) != len(self.sizes) or min(self.strides, default=1) <= 0):
            raise ValueError(f"AnchorSpec: strides: expected {len(self.sizes)} positive numbers, got {self.strides}")
        half_sides = tuple(
            tuple(_half_sides(size, ratio, self.rounded) for ratio in self.aspect_ratios for size in level)
            for level in self.sizes
        )
        object.__setattr__(self, "half_sides", half_sides)

    def anchors_per_cell(self) -> tuple[int, ...]:
        """For each level the number B of anchors of one cell."""
        return tuple(len(level) for level in self.half_sides)


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
    strides = level_strides(spec, feature_sizes, image_size)
    levels = []
    for level, (height, width) in enumerate(feature_sizes):
        index = torch.arange(height * width * len(spec.half_sides[level]), device=device)  # [A of this level]
        levels.append(anchors_at(spec, level, index, width, strides[level]))
    return torch.cat(levels)


def level_strides(
    spec: AnchorSpec, feature_sizes: Sequence[tuple[int, int]], image_size: tuple[int, int]
) -> list[tuple[int, int]]:
    """For each level, pixels a cell along y and x."""
    if len(feature_sizes) != len(spec.sizes):
        raise ValueError(f"feature_sizes: expected {len(spec.sizes)} levels (AnchorSpec.sizes), got {feature_sizes}")
    if spec.strides is not None:
        return [(stride, stride) for stride in spec.strides]
    # An empty map has no anchors, so its stride does not matter.
    return [(image_size[0] // max(height, 1), image_size[1] // max(width, 1)) for height, width in feature_sizes]


def anchors_at(spec: AnchorSpec, level: int, index: Tensor, width: int, stride: tuple[int, int]) -> Tensor:
    """The anchors [..., 4] whose indices within a level are index [...] int64; `width` of the level's map in cells."""
    half = spec.half_sides[level]
    cell = index // len(half)  # [...]
    which = index % len(half)  # [...]
    x = (cell % width).float() * stride[1] + spec.offset * stride[1]
    y = (cell // width).float() * stride[0] + spec.offset * stride[0]
    half_width = _choose(which, [w for w, _ in half])
    half_height = _choose(which, [h for _, h in half])
    return torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], dim=-1)


def _choose(index: Tensor, values: Sequence[float]) -> Tensor:
    """values[index], without a table on the device: copying one there would stop a CUDA graph capture."""
    chosen = torch.full(index.shape, values[0], dtype=torch.float32, device=index.device)
    for i, value in enumerate(values[1:], start=1):
        chosen = torch.where(index == i, value, chosen)
    return chosen


def _half_sides(size: float, ratio: float, rounded: bool) -> tuple[float, float]:
    """Half width and half height of the anchor with area size^2, every step in float32."""
    root = _float32(math.sqrt(_float32(ratio)))
    width = _float32(_float32(1 / root) * _float32(size)) / 2
    height = _float32(root * _float32(size)) / 2
    return (float(round(width)), float(round(height))) if rounded else (width, height)


def _float32(value: float) -> float:
    """`value` rounded to float32. Of one +, *, / or square root done in double this is exactly the float32 result."""
    return float(struct.unpack("f", struct.pack("f", value))[0])
