"""What an anchor is, and how to compute an anchor from its index, so that no caller stores all anchors."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...common.checks import check_flag, check_list, check_number, check_numbers, check_whole, wrong


@dataclass(frozen=True)
class AnchorSpec:
    """Shapes and places of the anchors. Lists are kept as tuples.

    Attributes:
        sizes: for each level, square roots of areas in pixels.
        aspect_ratios: height / width, the same for all levels.
        strides: for each level, pixels a cell. None: image side // map side for each axis, as torchvision (800 // 13 =
            61).
        offset: place of the centre of an anchor inside its cell, in cells.
        rounded: rounds half sides to whole pixels, half to even, as torchvision.

    Raises:
        ValueError: a value is empty or not positive.
    """

    sizes: tuple[tuple[float, ...], ...]
    aspect_ratios: tuple[float, ...]
    strides: tuple[int, ...] | None = None
    offset: float = 0.0
    rounded: bool = False
    # For each level and each anchor of a cell, half its width and half its height. For each ratio all sizes.
    half_sides: tuple[tuple[tuple[float, float], ...], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        levels = check_list("AnchorSpec", "sizes", self.sizes, "one tuple a level")
        if not levels:
            raise wrong("AnchorSpec", "sizes", "one tuple a level, at least one", self.sizes)
        sizes = (check_numbers("AnchorSpec", f"sizes[{i}]", level, above=0) for i, level in enumerate(levels))
        ratios = check_numbers("AnchorSpec", "aspect_ratios", self.aspect_ratios, above=0)
        checked = {
            "sizes": tuple(tuple(level) for level in sizes),
            "aspect_ratios": tuple(ratios),
            "offset": check_number("AnchorSpec", "offset", self.offset),
            "rounded": check_flag("AnchorSpec", "rounded", self.rounded),
        }
        if self.strides is not None:
            strides = check_list("AnchorSpec", "strides", self.strides, f"{len(levels)} whole numbers", len(levels))
            checked["strides"] = tuple(check_whole("AnchorSpec", f"strides[{i}]", s, 1) for i, s in enumerate(strides))
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        try:
            half_sides = tuple(
                tuple(_half_sides(size, ratio, self.rounded) for ratio in self.aspect_ratios for size in level)
                for level in self.sizes
            )
            held = all(side < math.inf for level in half_sides for pair in level for side in pair)
        except (OverflowError, ZeroDivisionError):
            held = False
        if not held:
            got = (self.sizes, self.aspect_ratios)
            raise wrong("AnchorSpec", "sizes, aspect_ratios", "anchors that float32 can hold", got)
        object.__setattr__(self, "half_sides", half_sides)

    def anchors_per_cell(self) -> tuple[int, ...]:
        """Return the number of anchors of one cell, for each level."""
        return tuple(len(level) for level in self.half_sides)


def level_strides(
    spec: AnchorSpec, feature_sizes: Sequence[tuple[int, int]], image_size: tuple[int, int]
) -> list[tuple[int, int]]:
    """Return pixels a cell along y and x, for each level."""
    if spec.strides is not None:
        return [(stride, stride) for stride in spec.strides]
    # An empty map has no anchors, so its stride does not matter.
    return [(image_size[0] // max(height, 1), image_size[1] // max(width, 1)) for height, width in feature_sizes]


def anchors_at(spec: AnchorSpec, level: int, index: Tensor, width: int, stride: tuple[int, int]) -> Tensor:
    """Return the anchors [..., 4] of indices [...] int64 within a level, whose map is `width` cells wide."""
    half = spec.half_sides[level]
    cell = index // len(half)  # [...]
    which = index % len(half)  # [...]
    x = (cell % width).float() * stride[1] + spec.offset * stride[1]
    y = (cell // width).float() * stride[0] + spec.offset * stride[0]
    half_width = _choose(which, [w for w, _ in half])
    half_height = _choose(which, [h for _, h in half])
    return torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], dim=-1)


def _choose(index: Tensor, values: Sequence[float]) -> Tensor:
    """Return values[index] without a table on the device: copying a table would stop the capture of a CUDA graph."""
    chosen = torch.full(index.shape, values[0], dtype=torch.float32, device=index.device)
    for i, value in enumerate(values[1:], start=1):
        chosen = torch.where(index == i, value, chosen)
    return chosen


def _half_sides(size: float, ratio: float, rounded: bool) -> tuple[float, float]:
    """Return half width and half height of the anchor with area size^2, computed in float32."""
    root = _float32(math.sqrt(_float32(ratio)))
    width = _float32(_float32(1 / root) * _float32(size)) / 2
    height = _float32(root * _float32(size)) / 2
    return (float(round(width)), float(round(height))) if rounded else (width, height)


def _float32(value: float) -> float:
    """Round `value` to float32. For one +, *, / or square root in double this equals the float32 result."""
    return float(struct.unpack("f", struct.pack("f", value))[0])
