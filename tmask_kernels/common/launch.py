"""Helpers of kernel launches that do not import triton: device guard, kernel arguments, output tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context that makes the device of `tensor` the current CUDA device: Triton launches on that one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


_known: dict[Hashable, tuple[Callable[..., None], list[Any], list[tuple[int, str]]]] = {}
_MOST_KNOWN = 4096  # launches: as many shapes as a data set has, times the kernels


def launch_known(
    kernel: Any,
    tensors: Mapping[str, Tensor | tuple[Tensor, ...]],
    settings: Hashable,
    plan: Callable[[], tuple[tuple[int, ...], dict[str, Any]]],
) -> None:
    """Launch a kernel whose grid and other arguments follow from sizes and settings; find them once.

    At batch 1 the host decides the time of small ops. To build the arguments of a launch and Triton's look-up of the
    compiled kernel take longer than all else. Both give the same for the same sizes, strides, dtypes and devices, if
    every tensor begins at a multiple of 16 bytes; then this calls the compiled kernel.

    Args:
        kernel: the jit function.
        tensors: its arguments that are tensors, or tuples of them. All are on one device.
        settings: whatever else the grid and the arguments follow from, also constants that a sweep changes.
        plan: returns the grid, and the arguments by name, `enable_fp_fusion` among them; those that are tensors may be
            left out.
    """
    flat = [t for value in tensors.values() for t in (value if isinstance(value, tuple) else (value,))]
    key = kernel.fn, settings, *[(t.shape, t.stride(), t.dtype, t.device) for t in flat]
    aligned = not any(t.data_ptr() % 16 for t in flat)
    known = _known.get(key) if aligned else None
    with on_device(flat[0]):
        if known is not None:
            launch, template, places = known
            arguments = template.copy()
            for place, name in places:
                arguments[place] = tensors[name]
            launch(*arguments)
            return
        grid, others = plan()
        fuse = others.pop("enable_fp_fusion")
        compiled = kernel[grid](enable_fp_fusion=fuse, **{**others, **tensors})
        if not (aligned and _is_compiled(compiled)):
            return
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        names = kernel.arg_names
        template = [None if name in tensors else others[name] for name in names]
        places = [(place, name) for place, name in enumerate(names) if name in tensors]
        _known[key] = compiled[(*grid, 1, 1)[:3]], template, places  # it wants all three axes


def _is_compiled(kernel: object) -> bool:
    """Return whether a launch returned a compiled kernel: Triton's interpreter has none, nor has a test's stand-in."""
    return any(base.__name__ == "CompiledKernel" for base in type(kernel).__mro__)


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


def box_tensors(boxes: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
    """Return the tensors from which a kernel reads boxes with `load_box`; see `box_arguments`."""
    boxes = boxes.contiguous()
    return {"boxes_ptr": boxes, "valid_ptr": boxes if valid is None else valid.contiguous().view(torch.uint8)}


def box_arguments(boxes: Tensor, valid: Tensor | None, num_images: int) -> dict[str, Any]:
    """Return the keyword arguments from which a kernel reads boxes with `load_box`.

    Args:
        boxes: [N, P, 4], or [K, 5] with the image's index first.
        valid: bool [N, P], the boxes to pool; None means all.
        num_images: N.
    """
    return {
        **box_tensors(boxes, valid),
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
