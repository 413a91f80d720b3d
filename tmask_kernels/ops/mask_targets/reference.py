"""Mask targets in plain PyTorch: RoIAlign of bit masks as two matrix products a RoI.

Letters: N images, G ground-truth masks, S RoIs an image, K = N * S, H mask height, B words a mask row (W = 32 B),
P = size, the side of a target.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tmask_kernels.ops.roi_align.reference import axis_weights, box_sizes, is_finite
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
        axes = [torch.full((n,), length, device=packed.device) for length in (height, words * WORD)]  # [N] each
        limits = torch.stack(axes, dim=1)  # [N, 2]
    else:
        limits = image_sizes
    limits = limits.to(box_dtype).repeat_interleave(s, dim=0)  # [K, 2] mask height and width
    rois = boxes.reshape(n * s, 4).to(box_dtype)  # [K, 4]
    index = gt_index.reshape(n * s)  # [K]
    has_target = (index >= 0) & (index < g) & is_finite(rois)  # [K]
    start = rois[:, :2] - (0.5 if aligned else 0.0)  # [K, 2] x, y
    sides = box_sizes(rois)  # [K, 2]
    if not aligned:
        sides = sides.clamp(min=1.0)
    row = torch.arange(n, device=packed.device).repeat_interleave(s) * g + index.clamp(0, g - 1)  # [K]
    masks = packed.flatten(0, 1)  # [N * G, H, B]

    step = max(1, _CHUNK_PIXELS.get(packed.device.type, 2**20) // (height * words * WORD))
    for k in range(0, n * s, step):
        part = slice(k, k + step)
        mask = unpack_bits(masks.index_select(0, row[part]), dtype)  # [k, H, W]
        wy = axis_weights(start[part, 1], sides[part, 1], size, height, 0, limits[part, 0]).to(dtype)  # [k, P, H]
        wx = axis_weights(start[part, 0], sides[part, 0], size, words * WORD, 0, limits[part, 1]).to(dtype)  # [k, P, W]
        target = wy @ mask @ wx.mT  # [k, P, P]
        out[part] = torch.where(has_target[part, None, None], target, 0).to(box_dtype)
    if binary:
        out = (out >= 0.5).to(box_dtype)
    return out.view(n, s, size, size)
