"""Mask targets in plain PyTorch: RoIAlign of bit masks as two matrix products a RoI.

Samples stand at whole multiples of 1 / UNIT pixels, so the weights, their products and the sums are exact in float64,
and any order of summing gives the same bits.

Letters: N images, G ground-truth masks, S RoIs an image, K = N * S, H mask height, B words a mask row (W = 32 B),
P = size, the side of a target.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.reference import NEARBY_SAMPLES, in_cells, is_finite
from ...packed import WORD, unpack_bits

# Where a sample may stand in a pixel. A float32 coordinate of 32 or more is no finer than that. The sum over a bin is
# exact up to 2^53 / UNIT^2 = 2^17 samples, that is bins of 362 x 362 pixels.
UNIT = 2**18

# Unpacked mask pixels held at once: small enough for a CPU's cache, large enough to fill a GPU.
_CHUNK_PIXELS = {"cpu": 2**20, "cuda": 2**25}


def mask_targets_reference(
    packed: Tensor,
    boxes: Tensor,
    gt_index: Tensor,
    size: int,
    image_sizes: Tensor | None,
    *,
    aligned: bool,
    binary: bool,
) -> Tensor:
    """See `op.mask_targets`. [N, G, H, B], [N, S, 4], [N, S], [N, 2] -> [N, S, P, P]."""
    n, g, height, words = packed.shape
    s = boxes.shape[1]
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    out = torch.zeros(n * s, size, size, dtype=dtype, device=packed.device)  # [K, P, P]
    if not (out.numel() and g and height and words):
        return out.view(n, s, size, size)

    # Made where it is needed: a tensor from a list would be copied there, and the host would wait.
    lengths = [torch.full((n,), length, dtype=dtype, device=packed.device) for length in (height, words * WORD)]
    limits = torch.stack(lengths, dim=1)  # [N, 2]
    if image_sizes is not None:
        limits = torch.minimum(limits, image_sizes.to(dtype))
    limits = limits.repeat_interleave(s, dim=0)  # [K, 2] mask height and width
    rois = boxes.reshape(n * s, 4).to(dtype)  # [K, 4]
    index = gt_index.reshape(n * s)  # [K]
    has_target = (index >= 0) & (index < g) & is_finite(rois)  # [K]
    start, sides = in_cells(rois, 1.0, aligned)  # [K, 2] x, y
    row = torch.arange(n, device=packed.device).repeat_interleave(s) * g + index.clamp(0, g - 1)  # [K]
    masks = packed.flatten(0, 1)  # [N * G, H, B]

    step = max(1, _CHUNK_PIXELS.get(packed.device.type, 2**20) // (height * words * WORD))
    for k in range(0, n * s, step):
        part = slice(k, k + step)
        mask = unpack_bits(masks.index_select(0, row[part]), torch.float64)  # [k, H, W]
        wy, grid_y = _axis_weights(start[part, 1], sides[part, 1], size, height, limits[part, 0])  # [k, P, H], [k]
        wx, grid_x = _axis_weights(start[part, 0], sides[part, 0], size, words * WORD, limits[part, 1])
        total = wy @ mask @ wx.mT  # [k, P, P]
        mean = total / (grid_y * grid_x)[:, None, None]
        target = (mean >= 0.5).to(dtype) if binary else mean.to(dtype)
        out[part] = torch.where(has_target[part, None, None], target, 0)
    return out.view(n, s, size, size)


def _axis_weights(start: Tensor, size: Tensor, bins: int, length: int, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Weight of each of `length` pixels in the sum of a bin's samples, and how many those are, both float64.

    start, size [K]: where the box begins and how long it is, in pixels. Bin ``b`` has samples at
    ``start + b * bin + (i + 0.5) * (bin / grid)`` with ``bin = size / bins`` and ``grid = ceil(bin)``. limit [K]: how
    many pixels are no padding; a sample outside [-1, limit] weighs 0 and counts. Returns [K, bins, length] and [K].
    """
    limit = limit[:, None, None]  # [K, 1, 1]
    cells = torch.arange(length, dtype=start.dtype, device=start.device)  # [length]
    index = torch.arange(bins, dtype=start.dtype, device=start.device)[:, None]  # [bins, 1]
    # By a tensor: CUDA divides by a number as a product with its inverse, and 21 pixels in 7 bins would take 4 samples.
    bin_size = (size / torch.full_like(size, bins))[:, None, None]  # [K, 1, 1]
    bin_start = start[:, None, None] + index * bin_size  # [K, bins, 1]
    grid = bin_size.ceil()
    count = grid.clamp(min=1)
    step = torch.where(grid > 0, bin_size / count, 1.0)
    # As in RoIAlign's reference, a pixel is reached by samples within a pixel of it, of which there are few.
    first = ((cells - 1 - bin_start) / step - 0.5).floor()  # [K, bins, length]
    first = torch.minimum(first, grid - 1).clamp(min=0)
    weights = torch.zeros((), dtype=start.dtype, device=start.device)
    for candidate in range(NEARBY_SAMPLES):
        i = first + candidate
        at = bin_start + (i + 0.5) * step
        inside = (i < grid) & (at >= -1) & (at <= limit)
        at = _rounded(torch.minimum(at.clamp(min=0), (limit - 1).clamp(min=0)))
        weights = weights + torch.where(inside, (1 - (at - cells).abs()).clamp(min=0), 0.0)
    return weights.double(), count[:, 0, 0].double()


def _rounded(at: Tensor) -> Tensor:
    """float32 positions, any shape, to the nearest multiple of 1 / UNIT, halves up; float64 ones as they are."""
    if at.dtype == torch.float64:
        return at
    whole = (at * UNIT).floor()
    return (whole + (at * UNIT - whole >= 0.5)) / UNIT
