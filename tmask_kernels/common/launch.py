"""Helpers of kernel launches that do not import triton: device guard, kernel arguments, output tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context that makes the device of `tensor` the current CUDA device: Triton launches on that one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up. Triton's function of this name looks for its own types first, which takes longer."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is no less than n >= 1."""
    return 1 << (n - 1).bit_length()


def encode_ints(numbers: Iterable[int]) -> tuple[int, ...]:
    """Encode each integer n of a tuple argument as 4 n + 3; the kernel undoes it with `decode_int`.

    Triton specialises integers in a tuple on 1 and on multiples of 16, whatever `do_not_specialize` says, and would
    recompile for each image size. 4 n + 3 is never one of these.
    """
    return tuple(4 * number + 3 for number in numbers)


def box_arguments(boxes: Tensor, valid: Tensor | None, num_images: int) -> dict[str, Any]:
    """Return the keyword arguments from which a kernel reads boxes with `load_box`.

    Args:
        boxes: [N, P, 4], or [K, 5] with the image's index first.
        valid: bool [N, P], the boxes to pool; None means all.
        num_images: N.
    """
    boxes = boxes.contiguous()
    return {
        "boxes_ptr": boxes,
        "valid_ptr": boxes if valid is None else valid.contiguous().view(torch.uint8),
        "num_images": num_images,
        "boxes_an_image": boxes.shape[-2],  # boxes [K, 5] are not sorted by image: each image reads all K
        "PADDED": boxes.dim() == 3,
        "HAS_VALID": valid is not None,
    }


def side_arguments(maps: Sequence[Tensor]) -> dict[str, Any]:
    """Return heights and widths of the maps [N, C, H, W], one a level, as floats: Triton does not specialise these."""
    return {"heights": tuple(float(m.shape[2]) for m in maps), "widths": tuple(float(m.shape[3]) for m in maps)}


def is_channels_last(maps: Sequence[Tensor]) -> bool:
    """Return whether every map is channels_last in memory; outputs and gradients then are so too."""
    return all(m.stride(1) == 1 and m.shape[1] > 1 for m in maps)


def empty_map(shape: Sequence[int], like: Tensor, channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialised tensor [N, C, H, W] on the device of `like`, of its dtype unless `dtype` is given."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device, memory_format=layout)


def empty_pooled(maps: Sequence[Tensor], boxes: Tensor, height: int, width: int) -> Tensor:
    """Return an uninitialised output [K, C, PH, PW] for boxes [N, P, 4] or [K, 5], in the layout of `maps`."""
    num_boxes = boxes.shape[0] * (boxes.shape[1] if boxes.dim() == 3 else 1)
    return empty_map((num_boxes, maps[0].shape[1], height, width), maps[0], is_channels_last(maps))
