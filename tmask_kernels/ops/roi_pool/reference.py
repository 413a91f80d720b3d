"""RoIPool in plain PyTorch: the truth the other backends must agree with.

A box is rounded to whole cells and cut into bins of whole cells; a bin takes the largest of its cells. Here the bins
are dense masks over rows and columns, so that no shape depends on data. The arg-max is found first, without a graph,
and the cells that it names are then read with one.

Letters: N images, P boxes an image, K boxes in all, C channels, H W feature size, PH PW bins.
Source: Girshick, Fast R-CNN (2015), section 2.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.reference import is_finite

# Elements of the largest temporary: boxes are worked off in chunks of a size to match.
CHUNK_ELEMENTS = 1 << 24


def roi_pool_reference(
    feature: Tensor, boxes: Tensor, valid: Tensor | None, output_size: tuple[int, int], scale: float
) -> Tensor:
    """Pool boxes from feature [N, C, H, W], any float dtype: [K, C, PH, PW] in its dtype, differentiable in it.

    boxes: float32, [N, P, 4] with valid [N, P] bool or None, or [K, 5] with the image's index first.
    """
    N, C, H, W = feature.shape
    PH, PW = output_size
    images, corners, usable = listed_boxes(boxes, valid, N, scale)
    if not feature.numel():
        return feature.new_zeros(len(images), C, PH, PW) + feature.sum()  # keeps the graph
    rows = bin_cells(corners[:, 1], corners[:, 3], usable, scale, PH, H)  # [K, PH, H]
    columns = bin_cells(corners[:, 0], corners[:, 2], usable, scale, PW, W)  # [K, PW, W]
    # Gradients of half precision are added up in float32.
    maps = feature.to(torch.promote_types(feature.dtype, torch.float32))
    cell = first_largest(maps.detach(), images, rows, columns)  # [K, C, PH, PW]
    planes = images[:, None] * C + torch.arange(C, device=feature.device)  # [K, C]
    values = maps.reshape(-1)[planes[..., None, None] * (H * W) + cell.clamp(min=0)]
    filled = rows.any(-1)[:, None, :, None] & columns.any(-1)[:, None, None, :]  # [K, 1, PH, PW]
    nothing = torch.where(filled, -torch.inf, 0.0).to(maps.dtype)
    return torch.where(cell >= 0, values, nothing).to(feature.dtype)


def listed_boxes(boxes: Tensor, valid: Tensor | None, num_images: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of each box its image [K] int64, its corners [K, 4], and whether it is pooled at all [K]: boxes that are not
    valid, not finite in pixels or cells, or of an image that does not exist, are not. Those have image and corners 0.
    """
    if boxes.dim() == 3:
        index = torch.arange(num_images, device=boxes.device).repeat_interleave(boxes.shape[1])
        corners, usable = boxes.flatten(0, 1), torch.ones_like(index, dtype=torch.bool)
    else:
        index, corners = boxes[:, 0], boxes[:, 1:]
        usable = (index > -1) & (index < num_images)  # false for NaN
    if valid is not None:
        usable = usable & valid.flatten()
    usable = usable & is_finite(corners) & is_finite(corners * scale)
    return torch.where(usable, index, 0).long(), torch.where(usable[:, None], corners, 0.0), usable


def round_half_away(x: Tensor) -> Tensor:
    """To the next whole number, halves away from zero, as C rounds and `torch.round` does not."""
    whole = x.trunc()
    return whole + x.sign() * ((x - whole).abs() >= 0.5)


def bin_cells(low: Tensor, high: Tensor, usable: Tensor, scale: float, bins: int, length: int) -> Tensor:
    """Which of `length` cells belong to each of `bins` bins along one axis: bool [K, bins, length].

    low, high [K]: sides of the boxes in pixels. A box includes the cells of both sides and has one at least. Bin ``b``
    reaches from ``floor(b * bin)`` to ``ceil((b + 1) * bin)``, so neighbours may share a cell.
    """
    start = round_half_away(low * scale)  # [K]
    size = (round_half_away(high * scale) - start + 1).clamp(min=1)
    # By a tensor: CUDA divides by a number as a product with its inverse, which may move a bin by a cell.
    bin_size = (size / torch.full_like(size, bins))[:, None]  # [K, 1]
    index = torch.arange(bins, dtype=size.dtype, device=size.device)
    first = (index * bin_size).floor() + start[:, None]  # [K, bins]
    past = ((index + 1) * bin_size).ceil() + start[:, None]
    cells = torch.arange(length, dtype=size.dtype, device=size.device)
    inside = (first[..., None] <= cells) & (cells < past[..., None])
    return inside & usable[:, None, None]


def first_largest(maps: Tensor, images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Cell y * W + x of the largest value of each bin, the first of equals: int64 [K, C, PH, PW].

    maps [N, C, H, W], images [K], rows bool [K, PH, H], columns bool [K, PW, W]. -1 where no cell is above -inf; NaN
    is not.
    """
    C, H, W = maps.shape[1:]
    maps = torch.where(maps.isnan(), -torch.inf, maps)
    chunk = max(1, CHUNK_ELEMENTS // (C * H * W))
    found = []
    for image, some_rows, some_columns in zip(
        images.split(chunk), rows.split(chunk), columns.split(chunk), strict=True
    ):
        cells = maps[image]  # [k, C, H, W]
        bins = []
        for inside in some_columns[:, None, None].unbind(3):  # [k, 1, 1, W] for each of PW
            # The first column of each row, then the first row: the first in row-major order.
            best, x = torch.where(inside, cells, -torch.inf).max(-1)  # [k, C, H]
            best, y = torch.where(some_rows[:, None], best[:, :, None], -torch.inf).max(-1)  # [k, C, PH]
            bins.append(torch.where(best > -torch.inf, y * W + x.gather(-1, y), -1))
        found.append(torch.stack(bins, -1))
    return torch.cat(found)
