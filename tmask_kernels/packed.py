"""Masks as packed bits: an eighth of a byte a pixel, so that an image's ground truth stays small on the device.

Pixel x of a row is bit x % 32 of int32 word x // 32, least significant bit first; bits past the width are 0.
Letters: H W mask size, B = ceil(W / 32) words a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .common.checks import check_tensor, check_whole

WORD = 32


def pack_masks(masks: Tensor) -> Tensor:
    """Pack masks into bits: [..., H, W] bool or uint8 (anything but 0 is inside) -> [..., H, ceil(W / 32)] int32.

    No sync, any device. Errors: ValueError for another dtype or fewer than two dimensions.
    """
    check_tensor("pack_masks", "masks", masks, ("...", "H", "W"), "bool or uint8")
    inside = masks if masks.dtype == torch.bool else masks != 0
    inside = F.pad(inside, (0, -masks.shape[-1] % WORD)).contiguous()  # [..., H, B * 32]
    # The lowest byte stands first, as every machine that PyTorch supports stores its integers. So eight pixels are an
    # int64 of bytes 0 or 1, and the product shifts byte i by 7 (8 - i), where it is bit i of the highest byte.
    eights = inside.unflatten(-1, (-1, 8)).view(torch.int64)[..., 0]  # [..., H, B * 4]
    packed = ((eights * 0x0102040810204080) >> 56).to(torch.uint8)
    return packed.unflatten(-1, (-1, WORD // 8)).view(torch.int32)[..., 0]  # [..., H, B]


def unpack_masks(packed: Tensor, width: int) -> Tensor:
    """Undo `pack_masks`: [..., H, B] int32 -> [..., H, width] bool.

    No sync, any device. Errors: ValueError for another dtype, or a width that does not need exactly B words.
    """
    check_packed("unpack_masks", packed, "...", "H")
    width = check_whole("unpack_masks", "width", width, 0)
    words = packed.shape[-1]
    if not 0 <= words * WORD - width < WORD:
        raise ValueError(f"unpack_masks: width: expected one that needs {words} words of {WORD} pixels, got {width}")
    return unpack_bits(packed, torch.bool)[..., :width]


def unpack_bits(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """All bits of the words: [..., B] int32 -> [..., B * 32] of `dtype`, 0 or 1."""
    # By bytes, lowest first as in `pack_masks`: an int32 for each pixel on the way would be four times the result.
    value = 1 << torch.arange(8, dtype=torch.uint8, device=packed.device)
    octets = packed.contiguous()[..., None].view(torch.uint8)  # [..., B, 4]; a single word may have any stride
    return ((octets[..., None] & value) != 0).to(dtype).flatten(-3)


def check_packed(op: str, packed: Tensor, *axes: str) -> None:
    """That the argument `packed` of `op` can be the output of `pack_masks`, with `axes` before the words of a row."""
    check_tensor(op, "packed", packed, (*axes, f"ceil(W / {WORD})"), "int32", hint=", packed masks")
