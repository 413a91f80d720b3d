"""W1 to W4: pooling RoIs, and boxes that stand as proposals do. Letters as in `bench.cases`."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.cases.case import ITEM, STRIDES
from bench.work import Work
from tmask_kernels.common.pyramid import box_levels
from tmask_kernels.ops.roi_align.reference import axis_weights
from tmask_kernels.testing import random_boxes


@dataclass(frozen=True, kw_only=True)
class RoICase:
    """Pooling RoIs from one or several FPN levels of N images of height x width pixels, channels innermost or not."""

    name: str
    images: int = 2
    height: int = 800
    width: int = 1344
    strides: tuple[int, ...] = STRIDES[:4]
    channels: int = 256
    rois: int  # of all images
    pooled: int = 7
    sampling_ratio: int = 2
    aligned: bool = False  # torchvision's MultiScaleRoIAlign cannot
    clustered: bool = True
    interpolation: str = "bilinear"
    reduction: str = "mean"

    def small(self) -> RoICase:
        # Of a pyramid several levels are to be used; of one map an adaptive grid has few samples.
        height, width = (384, 448) if len(self.strides) > 1 else (128, 160)
        return replace(self, height=height, width=width, channels=16, rois=8 * self.images)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each level in cells."""
        return [(self.height // s, self.width // s) for s in self.strides]

    @property
    def scales(self) -> list[float]:
        return [1 / s for s in self.strides]

    @property
    def cubic(self) -> float | None:
        """Coefficient of bicubic samples, the default; None: bilinear ones."""
        return -0.5 if self.interpolation == "bicubic" else None

    @property
    def thresholds(self) -> list[float]:
        """Area in px^2 from which a RoI leaves level i for the next (Lin et al. 2017, equation 1)."""
        return [(224 * s / 16) ** 2 for s in self.strides[1:]]

    def boxes(self) -> Tensor:
        """[N, P, 4] float32 xyxy in pixels, on the CPU."""
        each = self.rois // self.images
        if self.clustered:
            return rois(self.images, each, self.height, self.width)
        size = min(800.0, float(min(self.height, self.width)))
        flat = random_boxes(self.rois, height=self.height, width=self.width, min_size=16, max_size=size)
        return flat.view(self.images, each, 4)

    def features(self, dtype: torch.dtype, memory_format: torch.memory_format, where: torch.device) -> list[Tensor]:
        """Random features [N, C, H / stride, W / stride] of each level."""
        generator = torch.Generator(where).manual_seed(1)
        return [
            torch.randn(self.images, self.channels, h, w, generator=generator, device=where)
            .to(dtype)
            .contiguous(memory_format=memory_format)
            for h, w in self.sizes
        ]

    def work(self, dtype: str, mode: str) -> Work:
        """Forward: RoIs, each cell that any sample touches, and the output. Backward: RoIs, the gradient of the output,
        and every cell's gradient written, since those that no RoI touches are zero.

        Operations: 4 taps of a bilinear sample, 16 of a bicubic one, each a product and a sum; the definition's, not
        those of a separable form.
        """
        samples, cells = count_touched(self)
        item = ITEM[dtype]
        out = self.rois * self.channels * self.pooled**2 * item
        maps = self.images * sum(h * w for h, w in self.sizes)
        moved = (cells if mode == "forward" else maps) * self.channels * item
        taps = 4 if self.cubic is None else 16
        return Work(bytes=out + moved + self.rois * 16, flops=2 * taps * samples * self.channels)


@functools.cache
def count_touched(case: RoICase) -> tuple[int, int]:
    """Samples of all RoIs, and the distinct cells that they touch."""
    boxes = case.boxes()
    levels = box_levels(boxes, case.thresholds)  # [N, P]
    samples = cells = 0
    for level, ((height, width), scale) in enumerate(zip(case.sizes, case.scales, strict=True)):
        for image in range(case.images):
            corners = boxes[image][levels[image] == level] * scale - (0.5 if case.aligned else 0.0)  # [P', 4]
            sides = corners[:, 2:] - corners[:, :2]
            if not case.aligned:
                sides = sides.clamp(min=1)
            # A bin mixes the rows of its samples with their columns, so a RoI touches all its rows x all its columns.
            x, y = (
                axis_weights(corners[:, i], sides[:, i], case.pooled, length, case.sampling_ratio, cubic=case.cubic)
                for i, length in enumerate((width, height))
            )  # [P', bins, W], [P', bins, H]
            x, y = (weights.ne(0).any(1).float() for weights in (x, y))
            cells += int((y.T @ x).gt(0).sum())
            ratio = float(case.sampling_ratio)
            grid = torch.full_like(sides, ratio) if ratio > 0 else (sides / case.pooled).ceil()
            samples += int(grid.prod(1).sum()) * case.pooled**2
    return samples, cells


def rois(
    num_images: int,
    per_image: int,
    height: int,
    width: int,
    *,
    smallest: float = 16,
    largest: float = 800,
    objects: tuple[int, int] = (10, 50),
    spread: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Proposal-like boxes [N, K, 4], xyxy float32 pixels, clustered around 10-50 objects an image.

    `smallest` and `largest` bound the scale sqrt(w h) of the objects. A box has almost the shape and place of its
    object; `spread` is how far it is off.
    """
    generator = torch.Generator().manual_seed(seed)
    boxes = [
        cluster(per_image, height, width, (smallest, largest), objects, spread, generator)[0] for _ in range(num_images)
    ]
    return torch.stack(boxes)


def cluster(
    count: int,
    height: int,
    width: int,
    scales: tuple[float, float],
    objects: tuple[int, int],
    spread: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Boxes [K, 4] of one image, and the number of each one's object [K]."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def normal(deviation: float) -> Tensor:
        return torch.randn(count, 2, generator=generator) * deviation * spread

    number = int(torch.randint(objects[0], objects[1] + 1, (1,), generator=generator))
    centre = uniform(number, 2) * torch.tensor([width, height])
    smallest, largest = scales[0], max(scales[0], min(scales[1], height, width))
    scale = smallest * (largest / smallest) ** uniform(number)
    aspect = 0.3 * 10 ** uniform(number)  # 0.3 to 3
    side = torch.stack([scale / aspect.sqrt(), scale * aspect.sqrt()], dim=1)
    owner = torch.randint(number, (count,), generator=generator)
    near_side = side[owner] * torch.exp(normal(0.2))
    near_centre = centre[owner] + normal(0.15) * side[owner]
    boxes = torch.cat([near_centre - near_side / 2, near_centre + near_side / 2], dim=1)
    return boxes.clamp(min=0).minimum(torch.tensor([width, height] * 2, dtype=torch.float32)), owner
