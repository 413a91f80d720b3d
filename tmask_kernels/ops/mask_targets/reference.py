"""Mask targets in plain PyTorch: RoIAlign of bit masks as two matrix products a RoI.

Letters: N images, G ground-truth masks, S RoIs an image, K = N * S, H mask height, B words a mask row (W = 32 B),
P = size, the side of a target.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tmask_kernels.packed import WORD, unpack_bits

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
    box_dtype = torch.promote_types(boxes.dtype, torch.float32)
    # Matrix products of float32 may run in TF32 on a GPU, which moves a target by 1e-3; float64 never does.
    dtype = torch.float64 if packed.is_cuda else box_dtype
    out = torch.zeros(n * s, size, size, dtype=box_dtype, device=packed.device)  # [K, P, P]
    if not (out.numel() and g and height and words):
        return out.view(n, s, size, size)

    if image_sizes is None:
        # Made where they are needed: a tensor from a list would be copied there, and the host would wait.
        sides = [torch.full((n,), side, device=packed.device) for side in (height, words * WORD)]  # [N] each
        limits = torch.stack(sides, dim=1)  # [N, 2]
    else:
        limits = image_sizes
    limits = limits.to(box_dtype).repeat_interleave(s, dim=0)  # [K, 2] mask height and width
    rois = boxes.reshape(n * s, 4).to(box_dtype)  # [K, 4]
    index = gt_index.reshape(n * s)  # [K]
    has_target = (index >= 0) & (index < g)  # [K]
    row = torch.arange(n, device=packed.device).repeat_interleave(s) * g + index.clamp(0, g - 1)  # [K]
    masks = packed.flatten(0, 1)  # [N * G, H, B]

    step = max(1, _CHUNK_PIXELS.get(packed.device.type, 2**20) // (height * words * WORD))
    for k in range(0, n * s, step):
        part = slice(k, k + step)
        mask = unpack_bits(masks.index_select(0, row[part]), dtype)  # [k, H, W]
        y1, x1, y2, x2 = rois[part, 1], rois[part, 0], rois[part, 3], rois[part, 2]
        wy = axis_weights(y1, y2, limits[part, 0], size, height, aligned=aligned).to(dtype)  # [k, P, H]
        wx = axis_weights(x1, x2, limits[part, 1], size, words * WORD, aligned=aligned).to(dtype)  # [k, P, W]
        target = wy @ mask @ wx.mT  # [k, P, P]
        out[part] = torch.where(has_target[part, None, None], target, 0).to(box_dtype)
    if binary:
        out = (out >= 0.5).to(box_dtype)
    return out.view(n, s, size, size)


def axis_weights(low: Tensor, high: Tensor, limit: Tensor, bins: int, length: int, *, aligned: bool) -> Tensor:
    """What each pixel of one axis adds to each bin of a RoI, under RoIAlign's adaptive grid: [K, bins, length].

    RoI k spans low[k]..high[k] ([K] each) on an axis of limit[k] pixels, padded to `length`. A bin of b pixels is the
    mean of g = ceil(b) samples, d = b / g pixels apart; a sample at y gives max(0, 1 - |y - i|) to pixel i. g depends
    on the RoI, but the shapes must not: d > 1/2 for g > 1, so at most 4 samples of a bin lie within one pixel of i,
    and looking at 5 from the first that may (rounding can be one off) finds them all, whatever g is.
    """
    offset = 0.5 if aligned else 0.0
    start = (low - offset)[:, None, None]  # [K, 1, 1]
    extent = (high - low)[:, None, None]
    if not aligned:
        extent = extent.clamp(min=1)
    limit = limit[:, None, None]
    bin_size = extent / bins
    grid = bin_size.ceil()  # g; 0 or less for an empty or inverted RoI, whose weights are all 0
    step = bin_size / grid.clamp(min=1)
    begin = start + bin_size * torch.arange(bins, dtype=low.dtype, device=low.device)[:, None]  # [K, bins, 1]
    pixel = torch.arange(length, dtype=low.dtype, device=low.device)  # [length]
    first = ((pixel - 1 - begin) / step - 0.5).floor().clamp(min=0)  # [K, bins, length]

    weights = torch.zeros_like(first)
    for i in range(5):
        k = first + i
        y = begin + (k + 0.5) * step
        valid = (k < grid) & (y >= -1) & (y <= limit)  # a NaN is not
        near = 1 - (y.clamp(min=0).minimum(limit - 1) - pixel).abs()
        weights += near.clamp(min=0).masked_fill(~valid, 0)
    return torch.where(grid >= 1, weights / grid, 0)
