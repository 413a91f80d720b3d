"""Keypoint decoding in plain PyTorch: resize each whole map to its box and take the largest pixel.

Letters: N images, D boxes of an image, J = N * D instances, K keypoints of an instance, H W cells of a heat map, GH GW
pixels of the grid of a box. Sources: He et al., Mask R-CNN (2017), section 5; Keys, Cubic convolution interpolation
(1981).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.reference import is_finite

KEYS = -0.75  # coefficient of Keys' kernel: that of torch's bicubic
MAX_GRID = 2**14  # pixels of a grid's side, so that the work for a box is bounded
MAX_LOGIT = 1e37  # beyond, interpolation in float32 might overflow

# Elements of the largest temporary: a box's rows of pixels are worked off in chunks of a size to match.
CHUNK_ELEMENTS = 1 << 22


def decode_keypoints_reference(heatmaps: Tensor, boxes: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `op.decode_keypoints`. [N, D, K, H, W], [N, D, 4] float32, [N, D] bool or None -> [N, D, K, 2], [N, D, K]."""
    N, D, K = heatmaps.shape[:3]
    maps = heatmaps.flatten(0, 1).to(torch.promote_types(heatmaps.dtype, torch.float32))  # [J, K, H, W]
    corners, sides, grids = pixel_grids(boxes, valid)  # [J, 2] each, x and y
    index = torch.zeros(maps.shape[:2], dtype=torch.int64, device=maps.device)  # [J, K]
    scores = maps.new_zeros(maps.shape[:2])
    for j, (columns, rows) in enumerate(grids.tolist()):
        if columns:
            scores[j], index[j] = arg_max(maps[j], rows, columns)
    whole = (maps.abs() <= MAX_LOGIT).flatten(2).all(2)  # [J, K]
    inside = grids[:, :1] > 0  # [J, 1]: of a box that is decoded
    width = grids[:, :1].clamp(min=1)
    pixel = torch.stack([index % width, index // width], -1)  # [J, K, 2]
    scale = sides / grids.clamp(min=1)  # [J, 2]
    xy = (pixel + 0.5) * scale[:, None] + corners[:, None]
    xy = torch.where((whole & inside)[..., None], xy, 0.0)
    scores = torch.where(whole | ~inside, scores, torch.nan)
    return xy.view(N, D, K, 2), scores.view(N, D, K)


def pixel_grids(boxes: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return corner x1 y1 and sides of each box, float32, and the pixels of its grid: [J, 2] each.

    A side is at least one pixel. The grid of a box that is not valid, or has a corner or side that is not finite, is 0
    x 0.
    """
    boxes = boxes.flatten(0, 1)
    low, high = boxes.split(2, 1)
    sides = (high - low).clamp(min=1)
    usable = is_finite(boxes)  # [J]
    if valid is not None:
        usable = usable & valid.flatten()
    grids = torch.where(usable[:, None], sides.ceil().clamp(max=MAX_GRID), 0)
    return low, sides, grids.long()


def arg_max(maps: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Resize maps [K, H, W] to rows x columns; return the largest values [K] and their places y * columns + x, int64
    [K].
    """
    along_x = interpolate(maps, 2, *taps(columns, maps.shape[2], maps))  # [K, H, columns]
    cells, weights = taps(rows, maps.shape[1], maps)
    best = torch.full_like(maps[:, 0, 0], -torch.inf)  # [K]
    index = torch.zeros_like(best, dtype=torch.int64)
    step = max(1, CHUNK_ELEMENTS // (len(maps) * columns + 1))
    for y in range(0, rows, step):
        part = slice(y, y + step)
        value, place = interpolate(along_x, 1, cells[:, part], weights[:, part]).flatten(1).max(1)
        index = torch.where(value > best, y * columns + place, index)
        best = torch.maximum(best, value)
    return best, index


def taps(pixels: int, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The cells around the centre of each pixel of an axis, clamped to the map: int64 [4, pixels], and their weights.

    Of the weights, [3, pixels] of the dtype of `like`, the second cell's is left out: it is 1 minus the others.
    """
    pixel = torch.arange(pixels, dtype=torch.float32, device=like.device)
    at = (pixel + 0.5) * (length / pixels) - 0.5  # in cells; float32 for every input, as in the kernel
    cell = at.floor()
    t = (at - cell).to(like.dtype)
    rest = 1 - t
    outer = KEYS * t * rest
    after = t * (t * (2 * KEYS + 3 - (KEYS + 2) * t) - KEYS)
    cells = torch.stack([cell - 1, cell, cell + 1, cell + 2]).clamp(0, length - 1)
    return cells.long(), torch.stack([outer * rest, after, outer * t])


def interpolate(values: Tensor, dim: int, cells: Tensor, weights: Tensor) -> Tensor:
    """Resize values [K, A, B] along `dim`. Written as differences to the second cell: a constant stays itself.

    Products and sums are rounded one by one, so that kernels can give the same bits.
    """
    first, base, third, fourth = (values.index_select(dim, cell) for cell in cells)
    before, after, beyond = weights[..., None] if dim == 1 else weights
    return base + (before * (first - base) + after * (third - base) + beyond * (fourth - base))
