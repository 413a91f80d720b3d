"""RoIAlign with the largest sample of each bin, in plain PyTorch: the truth the other backends must agree with.

A maximum is not separable, so the samples of all bins are compared one after the other; autograd sees only the one that
is kept. Of a bin of a huge box nearly all samples lie outside the map and are 0, and two of them stand for all.

Letters as in `reference`; R boxes that are worked off at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.pyramid import box_levels
from ...common.reference import bounded, in_cells, is_finite
from ...common.roi_geometry import RoIGeometry
from .reference import CHUNK_ELEMENTS, cubic_weight


def multiscale_roi_align_max_reference(
    features: list[Tensor],
    boxes: Tensor,
    valid: Tensor | None,
    output_size: tuple[int, int],
    geometry: RoIGeometry,
) -> Tensor:
    """As `multiscale_roi_align_reference`, of the largest sample of each bin in place of their mean.

    An adaptive grid is searched as far as the data say, which synchronises on a GPU and cannot be traced.
    """
    N, C = features[0].shape[:2]
    dtype = torch.float64 if features[0].dtype == torch.float64 else torch.float32
    boxes = boxes.to(dtype)
    if boxes.dim() == 3:
        images = torch.arange(N, device=boxes.device).repeat_interleave(boxes.shape[1])  # [K]
        corners, usable = boxes.flatten(0, 1), torch.ones_like(images, dtype=torch.bool)
    else:
        index, corners = boxes[:, 0].detach(), boxes[:, 1:]
        usable = (index > -1) & (index < N)  # false for NaN
        images = torch.where(usable, index, 0).long()
    if valid is not None:
        usable = usable & valid.flatten()
    usable = usable & is_finite(corners)
    corners = torch.where(usable[:, None], corners, 0.0)
    levels = box_levels(corners, geometry.thresholds)
    maps = [f.to(dtype) for f in features]

    chunk = max(1, CHUNK_ELEMENTS // max(1, C * output_size[0] * output_size[1]))
    chunks = []
    for image, part, level, mine in zip(
        images.split(chunk), corners.split(chunk), levels.split(chunk), usable.split(chunk), strict=True
    ):
        out = part.new_zeros(len(part), C, *output_size)
        for i, (feature, scale) in enumerate(zip(maps, geometry.scales, strict=True)):
            if not feature.numel():
                out = out + feature.sum()  # keeps the graph
                continue
            here = mine & (level == i) & is_finite(part * scale)  # [R]
            # The others are replaced before they are pooled: they may overflow, or have a grid without end.
            small = torch.where(here[:, None], part, 0.0)
            pooled = _pool(feature, image, small, output_size, scale, geometry)
            out = torch.where(here[:, None, None, None], pooled, out)
        chunks.append(out)
    return torch.cat(chunks).to(features[0].dtype)


def _pool(
    feature: Tensor,
    images: Tensor,
    boxes: Tensor,
    output_size: tuple[int, int],
    scale: float,
    geometry: RoIGeometry,
) -> Tensor:
    """Pool boxes [R, 4] of images [R] from one feature [N, C, H, W]: [R, C, PH, PW]."""
    C, H, W = feature.shape[1:]
    PH, PW = output_size
    ratio, cubic = geometry.sampling_ratio, geometry.cubic
    start, size = in_cells(boxes, scale, geometry.aligned)  # [R, 2] x, y
    rows = _Samples(start[:, 1], size[:, 1], PH, H, ratio, (1, PH, 1))
    columns = _Samples(start[:, 0], size[:, 0], PW, W, ratio, (1, 1, PW))
    flat = feature.reshape(-1)
    planes = ((images[:, None] * C + torch.arange(C, device=images.device)) * (H * W))[..., None, None]  # [R, C, 1, 1]
    best = flat.new_full((len(boxes), C, PH, PW), -torch.inf)
    row, column = torch.full_like(best, -1), torch.full_like(best, -1)  # of the sample that is kept
    with torch.no_grad():
        for i in range(rows.turns):
            y, row_inside, row_exists = rows.turn(i)
            for j in range(columns.turns):
                x, inside, exists = columns.turn(j)
                inside, exists = inside & row_inside, exists & row_exists
                value = _sample(flat, planes, rows.at(y), columns.at(x), H, W, cubic)
                value = torch.where(inside, value, 0.0)
                value = torch.where(exists, value, -torch.inf)
                stays = (value <= best) | best.isnan()  # of equals the first
                best = torch.where(stays, best, value)
                row = torch.where(stays, row, torch.where(inside, y, -1.0))
                column = torch.where(stays, column, torch.where(inside, x, -1.0))
    kept = _sample(flat, planes, rows.at(row.clamp(min=0)), columns.at(column.clamp(min=0)), H, W, cubic)
    result = torch.where(row >= 0, kept, best)
    return torch.where((rows.grid > 0) & (columns.grid > 0), result, 0.0)


class _Samples:
    """The samples of each bin along one axis. Tensors have the shape [R, *shape], in which the bins are one axis."""

    def __init__(
        self, start: Tensor, size: Tensor, bins: int, length: int, sampling_ratio: int, shape: tuple[int, int, int]
    ) -> None:
        index = torch.arange(bins, dtype=start.dtype, device=start.device)
        # By a tensor: CUDA divides by a number as a product with its inverse, which may add a sample to the grid.
        bin_size = (size / torch.full_like(size, bins))[:, None]  # [R, 1]
        self._bin_start = (start[:, None] + index * bin_size).view(-1, *shape)
        self._bin_size = bin_size[..., None, None]
        self._length = length
        if sampling_ratio > 0:
            self.grid = torch.full_like(self._bin_size, sampling_ratio)
            self._first, self._past, self._begin = torch.zeros_like(self._bin_start), self.grid, 0
            self.turns = sampling_ratio
            return
        self.grid = self._bin_size.detach().ceil()
        step = torch.where(self.grid > 0, self._bin_size / self.grid, 1.0).detach()
        low, high = ((end - self._bin_start.detach()) / step - 0.5 for end in (-1, length))
        self._past = torch.minimum(high.ceil() + 1, self.grid).clamp(min=0)
        self._first = torch.minimum(low.floor(), self._past).clamp(min=0)
        # And one on either side, which stands for all those beyond.
        self._begin, self.turns = -1, int((self._past - self._first).max()) + 2 if len(start) else 0

    def turn(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Index of the i-th sample to look at, whether it lies in the map, and whether there is such a sample."""
        step = self._begin + i
        index = self._first + step
        at = self._position(index)
        # A huge index is not changed by 1, so what is beyond the window is told by the step.
        visited = (step < self._past - self._first) if step >= 0 else torch.zeros_like(at, dtype=torch.bool)
        beyond = self._past < self.grid if step >= 0 else self._first > 0
        return index, visited & (at >= -1) & (at <= self._length), visited | beyond

    def at(self, index: Tensor) -> Tensor:
        """Where the samples of an index lie, moved onto the border's cell where they are beyond it."""
        return bounded(self._position(index), 0.0, self._length - 1)

    def _position(self, index: Tensor) -> Tensor:
        return self._bin_start + (index + 0.5) * self._bin_size / torch.where(self.grid > 0, self.grid, 1.0)


def _sample(flat: Tensor, planes: Tensor, y: Tensor, x: Tensor, H: int, W: int, cubic: float | None) -> Tensor:
    """Interpolate planes [R, C, 1, 1], which begin there in `flat`, at y and x in the map; broadcast together."""
    y_low, x_low = y.detach().floor(), x.detach().floor()
    ly, lx = y - y_low, x - x_low

    def cell(row: int, column: int) -> Tensor:
        h, w = (y_low + row).clamp(min=0).clamp(max=H - 1), (x_low + column).clamp(min=0).clamp(max=W - 1)
        return flat[planes + h.long() * W + w.long()]

    if cubic is None:
        # In the form a + t (b - a) samples of equal cells are equal to the last bit.
        top, bottom = (cell(row, 0) + lx * (cell(row, 1) - cell(row, 0)) for row in (0, 1))
        return top + ly * (bottom - top)
    total = torch.zeros((), dtype=flat.dtype, device=flat.device)
    for row in (-1, 0, 1, 2):
        for column in (-1, 0, 1, 2):
            weight = cubic_weight((ly - row).abs(), cubic) * cubic_weight((lx - column).abs(), cubic)
            total = total + weight * cell(row, column)
    return total
