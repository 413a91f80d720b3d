"""What launches share, without triton: the device, arguments of kernels, layouts of outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch on the device of `tensor`: Triton launches on the current CUDA device, whatever its arguments say."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def unspecialized(numbers: Iterable[int]) -> tuple[int, ...]:
    """Integers for a tuple argument, to be read with `plain`: 4 n + 3, which is never 1 nor a multiple of 16.

    In a tuple Triton compiles a kernel anew for each pattern of such numbers, whatever `do_not_specialize` says; sizes
    and strides of the levels of a pyramid have a great many.
    """
    return tuple(4 * number + 3 for number in numbers)


def box_arguments(boxes: Tensor, valid: Tensor | None, num_images: int) -> dict[str, Any]:
    """The arguments by which kernels read boxes with `load_box`: [N, P, 4], of which `valid` count, or [K, 5]."""
    boxes = boxes.contiguous()
    return {
        "boxes_ptr": boxes,
        "valid_ptr": boxes if valid is None else valid.contiguous().view(torch.uint8),
        "num_images": num_images,
        "boxes_an_image": boxes.shape[-2],  # of boxes [K, 5] each image sees all K
        "PADDED": boxes.dim() == 3,
        "HAS_VALID": valid is not None,
    }


def side_arguments(maps: Sequence[Tensor]) -> dict[str, Any]:
    """Heights and widths of one map [N, C, H, W] a level: floats, for which Triton does not compile a new kernel."""
    return {"heights": tuple(float(m.shape[2]) for m in maps), "widths": tuple(float(m.shape[3]) for m in maps)}


def is_channels_last(maps: Sequence[Tensor]) -> bool:
    """Whether every map has its channels side by side; then so have the output and the gradients."""
    return all(m.stride(1) == 1 and m.shape[1] > 1 for m in maps)


def empty_map(shape: Sequence[int], like: Tensor, channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised [N, C, H, W] of the device and dtype (or `dtype`) of `like`."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device, memory_format=layout)


def empty_pooled(maps: Sequence[Tensor], boxes: Tensor, height: int, width: int) -> Tensor:
    """An uninitialised output [K, C, PH, PW] of boxes [N, P, 4] or [K, 5] pooled from `maps`, in their layout."""
    num_boxes = boxes.shape[0] * (boxes.shape[1] if boxes.dim() == 3 else 1)
    return empty_map((num_boxes, maps[0].shape[1], height, width), maps[0], is_channels_last(maps))
