"""RoIAlign in plain PyTorch: the truth the other backends must agree with.

The mean of bilinear or bicubic samples is separable: for one channel ``out = Wy F Wx^T``, where row ``ph`` of ``Wy``
[PH, H] holds the weight of every feature row in bin row ``ph``, and ``Wx`` [PW, W] likewise. Both are built here
densely, in closed form, so that no shape depends on data, not even for the adaptive grid.

Letters: N images, P boxes an image, K boxes in all, C channels, H W feature size, PH PW bins.
Source: He et al., Mask R-CNN (2017), section 3; levels: Lin et al., Feature Pyramid Networks (2017), equation 1;
bicubic: Keys, Cubic convolution interpolation for digital image processing (1981).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.pyramid import box_levels
from ...common.reference import NEARBY_SAMPLES, bounded, in_cells, is_finite, no_autocast
from ...common.roi_geometry import RoIGeometry

# Elements of the largest temporary: boxes are worked off in chunks of a size to match.
CHUNK_ELEMENTS = 1 << 24

# Bicubic taps are less than 2 cells from their sample. The g samples of a bin, which is longer than g - 1 cells, are
# more than (g - 1) / g apart: at most 5 lie within 2 cells of a given cell (where g is more than 5, a sixth would be
# over 5 x 5/6 cells from the first). And one more, for the same reason.
NEARBY_CUBIC_SAMPLES = 6


def multiscale_roi_align_reference(
    features: list[Tensor],
    boxes: Tensor,
    valid: Tensor | None,
    output_size: tuple[int, int],
    geometry: RoIGeometry,
) -> Tensor:
    """Pool every box from the feature map of its level.

    features: one [N, C, H, W] a level, any float dtype. boxes [N, P, 4] with valid [N, P] bool or None, or [K, 5] with
    the image's index first. Returns [N * P, C, PH, PW] or [K, C, PH, PW] in the features' dtype. Differentiable in the
    features and the boxes; a box that is not valid, or not finite in pixels or in cells of its level, or whose image
    does not exist, gives zeros and takes no gradient.
    """
    N, C = features[0].shape[:2]
    dtype = torch.float64 if features[0].dtype == torch.float64 else torch.float32
    boxes = boxes.to(dtype)
    flat = boxes.dim() == 2
    if flat:
        # Every image sees every box, and owns those of its index: [K, 5] -> [N, K, 4].
        images = torch.arange(N, device=boxes.device)
        valid = boxes[:, 0].detach().trunc() == images[:, None]  # [N, K]
        boxes = boxes[:, 1:].expand(N, -1, -1)
    elif valid is None:
        valid = torch.ones(boxes.shape[:2], dtype=torch.bool, device=boxes.device)

    valid = valid & is_finite(boxes)  # [N, P]
    boxes = torch.where(valid[..., None], boxes, 0.0)
    levels = box_levels(boxes, geometry.thresholds)  # [N, P]

    chunk = max(1, CHUNK_ELEMENTS // max(1, max(N * C * output_size[0] * f.shape[-1] for f in features)))
    chunks = []
    with no_autocast(boxes.device.type):
        maps = [f.to(dtype) for f in features]
        for part, part_levels, part_valid in zip(
            boxes.split(chunk, 1), levels.split(chunk, 1), valid.split(chunk, 1), strict=True
        ):
            out = torch.zeros((), dtype=dtype, device=boxes.device)
            for level, (feature, scale) in enumerate(zip(maps, geometry.scales, strict=True)):
                fits = is_finite(part * scale)  # [N, p]
                mine = (part_levels == level) & part_valid & fits  # [N, p]
                # What overflows is replaced before it is pooled: it would turn gradients into NaN.
                small = torch.where(fits[..., None], part, 0.0)  # [N, p, 4]
                pooled = _pool(feature, small, output_size, scale, geometry)  # [N, p, C, PH, PW]
                out = out + torch.where(mine[..., None, None, None], pooled, 0.0)
            chunks.append(out)
    result = torch.cat(chunks, 1)  # [N, P, C, PH, PW]
    result = result.sum(0) if flat else result.flatten(0, 1)
    return result.to(features[0].dtype)


def _pool(
    feature: Tensor,
    boxes: Tensor,
    output_size: tuple[int, int],
    scale: float,
    geometry: RoIGeometry,
) -> Tensor:
    """Pool boxes [N, P, 4] from one feature [N, C, H, W] of the same dtype: [N, P, C, PH, PW]."""
    N, C, H, W = feature.shape
    P = boxes.shape[1]
    PH, PW = output_size
    ratio, cubic = geometry.sampling_ratio, geometry.cubic
    start, size = in_cells(boxes, scale, geometry.aligned)  # [N, P, 2] x, y
    weight_x = axis_weights(start[..., 0], size[..., 0], PW, W, ratio, cubic)  # [N, P, PW, W]
    weight_y = axis_weights(start[..., 1], size[..., 1], PH, H, ratio, cubic)  # [N, P, PH, H]
    rows = feature.permute(0, 2, 1, 3).reshape(N, H, C * W)
    rows = torch.bmm(weight_y.reshape(N, P * PH, H), rows)  # [N, P * PH, C * W]
    rows = rows.reshape(N * P, PH * C, W)
    pooled = torch.bmm(rows, weight_x.reshape(N * P, PW, W).transpose(1, 2))  # [N * P, PH * C, PW]
    return pooled.reshape(N, P, PH, C, PW).transpose(2, 3)


def axis_weights(
    start: Tensor,
    size: Tensor,
    bins: int,
    length: int,
    sampling_ratio: int,
    cubic: float | None = None,
) -> Tensor:
    """Weight of each of `length` cells in each of `bins` bins along one axis: [..., bins, length].

    start, size [...]: where the box begins and how long it is, in cells. Bin ``b`` averages samples
    ``start + b * bin + (i + 0.5) * bin / grid`` with ``bin = size / bins``; ``grid`` is `sampling_ratio`, or
    ``ceil(bin)`` where that is 0 or less. A sample outside [-1, length] weighs 0 but counts in the mean. cubic: Keys'
    coefficient of bicubic samples; None: bilinear ones.
    """
    index = torch.arange(bins, dtype=start.dtype, device=start.device)[:, None]  # [bins, 1]
    cells = torch.arange(length, dtype=start.dtype, device=start.device)  # [length]
    # By a tensor: CUDA divides by a number as a product with its inverse, and 21 cells in 7 bins would take 4 samples
    # a bin instead of 3.
    bin_size = (size / torch.full_like(size, bins))[..., None, None]
    bin_start = start[..., None, None] + index * bin_size  # [..., bins, 1]
    if sampling_ratio > 0:
        grid = torch.full_like(bin_size, sampling_ratio)
        first, candidates = torch.zeros_like(bin_size), sampling_ratio
    else:
        grid = bin_size.detach().ceil()
        # The samples whose taps can be a cell c lie in [c - 1, c + 1], of bicubic ones in [c - 2, c + 2]; those clamped
        # to the border do so too.
        reach = 1 if cubic is None else 2
        step = torch.where(grid > 0, bin_size / grid, 1.0).detach()
        first = ((cells - reach - bin_start.detach()) / step - 0.5).floor()  # [..., bins, length]
        first = torch.minimum(first, grid - 1).clamp(min=0)
        candidates = NEARBY_SAMPLES if cubic is None else NEARBY_CUBIC_SAMPLES
    total = torch.zeros((), dtype=start.dtype, device=start.device)
    for candidate in range(candidates):
        i = first + candidate
        at = bin_start + (i + 0.5) * bin_size / torch.where(grid > 0, grid, 1.0)
        total = total + torch.where(i < grid, _tap_weights(at, cells, cubic), 0.0)
    return total / grid.clamp(min=1)


def _tap_weights(at: Tensor, cells: Tensor, cubic: float | None) -> Tensor:
    """Weight of each of the `cells` [length] for samples `at` [..., 1 or length]: [..., length]."""
    last = len(cells) - 1
    inside = (at >= -1) & (at <= last + 1)
    at = bounded(at, 0.0, last)
    low = at.detach().floor()
    fraction = at - low  # 0 at the last cell
    if cubic is None:
        taps = {0: 1 - fraction, 1: fraction}
    else:
        taps = {tap: cubic_weight((fraction - tap).abs(), cubic) for tap in (-1, 0, 1, 2)}
    weight = torch.zeros((), dtype=at.dtype, device=at.device)
    for tap, tap_weight in taps.items():
        cell = (low + tap).clamp(0, last)
        weight = weight + torch.where(cells == cell, tap_weight, 0.0)
    return torch.where(inside, weight, 0.0)


def cubic_weight(distance: Tensor, coefficient: float) -> Tensor:
    """Keys' convolution kernel at a distance of 0 to 2 cells, any shape (Keys 1981, equation 8, factored).

    It is 1 at 0, and 0 at 1 and 2. A coefficient of -0.5 reproduces quadratics; -0.75 is that of torch's bicubic.
    """
    near = (1 - distance) * (1 + distance - (coefficient + 2) * distance**2)
    far = coefficient * (distance - 1) * (distance - 2) ** 2
    return torch.where(distance <= 1, near, far)
