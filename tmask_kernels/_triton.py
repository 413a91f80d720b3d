"""What the kernels of several ops share: the device guard and small jit helpers. Imports triton."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch on the device of `tensor`: Triton launches on the current CUDA device, whatever its arguments say."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@triton.jit
def box_iou(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2):
    """IoU of boxes a and b, any broadcastable shapes. IEEE division; sides of the overlap clamped at 0, areas not."""
    width = tl.maximum(tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1), 0.0)
    height = tl.maximum(tl.minimum(ay2, by2) - tl.maximum(ay1, by1), 0.0)
    inter = width * height
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - inter
    return tl.math.div_rn(inter, union)
