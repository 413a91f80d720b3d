"""What launches share, without triton: the device, and integers that do not specialise a kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from contextlib import AbstractContextManager

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
