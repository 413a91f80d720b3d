"""Box coding in Triton: encode, decode with clip, and decode's gradient in the deltas. Elementwise, deterministic.

One program codes BLOCK boxes; a box is one 16-byte load and one 16-byte store. Rows are boxes of the output, flattened.
An anchor's row follows from the output's by up to three strides (0 where it is broadcast), so anchors shared by images
or classes are read where they lie. Arithmetic is float32; float64 for float64 deltas, in the interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...backend import no_second_derivative
from ...common.kernels.boxes import load4, store4
from ...common.launch import cdiv, on_device
from ...namespace import custom_op

BLOCK = 128


@triton.jit
def _load_anchor(ptr, rows, mask, d1, d2, stride_0, stride_1, stride_2, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Centre and size of the anchors of output boxes `rows`; strides are in boxes."""
    anchor = rows // d2 // d1 * stride_0 + rows // d2 % d1 * stride_1 + rows % d2 * stride_2
    x1, y1, x2, y2 = load4(ptr, anchor, mask, BLOCK, DTYPE)
    width = x2 - x1
    height = y2 - y1
    return x1 + 0.5 * width, y1 + 0.5 * height, width, height


@triton.jit
def _encode_boxes_kernel(
    out_ptr,  # [count, 4]
    boxes_ptr,  # [count, 4]
    anchors_ptr,
    count,
    d1,
    d2,
    stride_0,
    stride_1,
    stride_2,
    wx,
    wy,
    ww,
    wh,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < count
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    ax, ay, aw, ah = _load_anchor(anchors_ptr, rows, mask, d1, d2, stride_0, stride_1, stride_2, BLOCK, DTYPE)
    x1, y1, x2, y2 = load4(boxes_ptr, rows, mask, BLOCK, DTYPE)
    bw = x2 - x1
    bh = y2 - y1
    proper = (aw > 0) & (ah > 0) & (bw > 0) & (bh > 0)
    aw = tl.where(proper, aw, 1.0)
    ah = tl.where(proper, ah, 1.0)
    dx = tl.where(proper, wx * (x1 + 0.5 * bw - ax) / aw, 0.0)
    dy = tl.where(proper, wy * (y1 + 0.5 * bh - ay) / ah, 0.0)
    dw = tl.where(proper, ww * tl.log(tl.where(proper, bw, 1.0) / aw), 0.0)
    dh = tl.where(proper, wh * tl.log(tl.where(proper, bh, 1.0) / ah), 0.0)
    store4(out_ptr, rows, mask, dx, dy, dw, dh, BLOCK)


@triton.jit
def decode_delta(dx, dy, dw, dh, ax, ay, aw, ah, wx, wy, ww, wh, scale_clamp):
    """Unclipped boxes as centre and half sides, whether they are NaN, and whether their scales are not clamped."""
    bad = (dx != dx) | (dy != dy) | (dw != dw) | (dh != dh)
    x = dx / wx * aw + ax
    y = dy / wy * ah + ay
    dw = dw / ww
    dh = dh / wh
    half_w = 0.5 * (tl.exp(tl.minimum(dw, scale_clamp)) * aw)
    half_h = 0.5 * (tl.exp(tl.minimum(dh, scale_clamp)) * ah)
    bad = bad | (x != x) | (y != y)
    return x, y, half_w, half_h, bad, dw <= scale_clamp, dh <= scale_clamp


@triton.jit
def _decode(deltas_ptr, anchors_ptr, rows, mask, d1, d2, stride_0, stride_1, stride_2, wx, wy, ww, wh, scale_clamp,
            BLOCK: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """`decode_delta` of the output boxes `rows`, and the sides of their anchors."""
    ax, ay, aw, ah = _load_anchor(anchors_ptr, rows, mask, d1, d2, stride_0, stride_1, stride_2, BLOCK, DTYPE)
    dx, dy, dw, dh = load4(deltas_ptr, rows, mask, BLOCK, DTYPE)
    x, y, half_w, half_h, bad, free_w, free_h = decode_delta(
        dx, dy, dw, dh, ax, ay, aw, ah, wx, wy, ww, wh, scale_clamp
    )
    return x, y, half_w, half_h, bad, aw, ah, free_w, free_h


@triton.jit
def _limits(sizes_ptr, rows, mask, rows_per_image, height, width, HAS_SIZES: tl.constexpr, DTYPE: tl.constexpr):
    """Largest x and y of each box's image."""
    if HAS_SIZES:
        image = rows // rows_per_image
        limit_y = tl.load(sizes_ptr + image * 2, mask=mask, other=0).to(DTYPE)
        limit_x = tl.load(sizes_ptr + image * 2 + 1, mask=mask, other=0).to(DTYPE)
    else:
        limit_x = tl.full(rows.shape, width, DTYPE)
        limit_y = tl.full(rows.shape, height, DTYPE)
    return limit_x, limit_y


@triton.jit
def clipped(at, limit):
    """A coordinate brought inside the image. NaN stays, which the smaller and larger of two numbers do not promise."""
    at = tl.where(at < 0.0, 0.0, at)
    return tl.where(at > limit, limit, at)


@triton.jit
def _decode_boxes_fwd_kernel(
    out_ptr,  # [count, 4]
    deltas_ptr,  # [count, 4]
    anchors_ptr,
    sizes_ptr,  # [N, 2] height, width; only with HAS_SIZES
    count,
    rows_per_image,
    height,
    width,
    d1,
    d2,
    stride_0,
    stride_1,
    stride_2,
    wx,
    wy,
    ww,
    wh,
    scale_clamp,
    CLIP: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < count
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    x, y, half_w, half_h, bad, _, _, _, _ = _decode(
        deltas_ptr, anchors_ptr, rows, mask, d1, d2, stride_0, stride_1, stride_2, wx, wy, ww, wh, scale_clamp,
        BLOCK, DTYPE,
    )  # fmt: skip
    x1 = x - half_w
    y1 = y - half_h
    x2 = x + half_w
    y2 = y + half_h
    if CLIP:
        limit_x, limit_y = _limits(sizes_ptr, rows, mask, rows_per_image, height, width, HAS_SIZES, DTYPE)
        x1, y1, x2, y2 = clipped(x1, limit_x), clipped(y1, limit_y), clipped(x2, limit_x), clipped(y2, limit_y)
    x1 = tl.where(bad, 0.0, x1)
    y1 = tl.where(bad, 0.0, y1)
    x2 = tl.where(bad, 0.0, x2)
    y2 = tl.where(bad, 0.0, y2)
    store4(out_ptr, rows, mask, x1, y1, x2, y2, BLOCK)


@triton.jit
def _decode_boxes_bwd_kernel(
    grad_deltas_ptr,  # [count, 4]
    grad_ptr,  # [count, 4]
    deltas_ptr,  # [count, 4]
    anchors_ptr,
    sizes_ptr,  # [N, 2] height, width; only with HAS_SIZES
    count,
    rows_per_image,
    height,
    width,
    d1,
    d2,
    stride_0,
    stride_1,
    stride_2,
    wx,
    wy,
    ww,
    wh,
    scale_clamp,
    CLIP: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < count
    DTYPE: tl.constexpr = grad_ptr.dtype.element_ty
    x, y, half_w, half_h, bad, aw, ah, free_w, free_h = _decode(
        deltas_ptr, anchors_ptr, rows, mask, d1, d2, stride_0, stride_1, stride_2, wx, wy, ww, wh, scale_clamp,
        BLOCK, DTYPE,
    )  # fmt: skip
    g_x1, g_y1, g_x2, g_y2 = load4(grad_ptr, rows, mask, BLOCK, DTYPE)
    if CLIP:
        limit_x, limit_y = _limits(sizes_ptr, rows, mask, rows_per_image, height, width, HAS_SIZES, DTYPE)
        g_x1 = tl.where((x - half_w >= 0) & (x - half_w <= limit_x), g_x1, 0.0)
        g_y1 = tl.where((y - half_h >= 0) & (y - half_h <= limit_y), g_y1, 0.0)
        g_x2 = tl.where((x + half_w >= 0) & (x + half_w <= limit_x), g_x2, 0.0)
        g_y2 = tl.where((y + half_h >= 0) & (y + half_h <= limit_y), g_y2, 0.0)
    dx = tl.where(bad, 0.0, (g_x1 + g_x2) * aw / wx)
    dy = tl.where(bad, 0.0, (g_y1 + g_y2) * ah / wy)
    dw = tl.where(bad | (free_w == 0), 0.0, (g_x2 - g_x1) * half_w / ww)
    dh = tl.where(bad | (free_h == 0), 0.0, (g_y2 - g_y1) * half_h / wh)
    store4(grad_deltas_ptr, rows, mask, dx, dy, dw, dh, BLOCK)


def _anchor_strides(anchors: Tensor, shape: Sequence[int]) -> tuple[Tensor, dict[str, int]]:
    """Where the anchor of an output row lies: contiguous anchors, and the kernel's d1, d2, stride_0..2 in boxes.

    `shape` [..., 4] is the output's. Neighbouring axes with one common stride are merged; should more than three
    remain, the anchors are copied to the full shape.
    """
    anchors = anchors.contiguous()
    expanded = anchors.expand(shape)
    merged: list[tuple[int, int]] = []  # (size, stride in boxes), innermost first
    for size, stride in zip(reversed(shape[:-1]), reversed(expanded.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if merged and stride // 4 == merged[-1][0] * merged[-1][1]:
            merged[-1] = (merged[-1][0] * size, merged[-1][1])
        else:
            merged.append((size, stride // 4))
    if len(merged) > 3:
        return _anchor_strides(expanded.contiguous(), shape)
    merged += [(1, 0)] * (3 - len(merged))
    (d2, stride_2), (d1, stride_1), (_, stride_0) = merged
    return anchors, {"d1": d1, "d2": d2, "stride_0": stride_0, "stride_1": stride_1, "stride_2": stride_2}


def _weights(weights: Sequence[float]) -> dict[str, float]:
    return dict(zip(("wx", "wy", "ww", "wh"), weights, strict=True))


def _clip_arguments(
    shape: Sequence[int], count: int, size: Sequence[int] | None, sizes: Tensor | None, spare: Tensor
) -> dict[str, Any]:
    """The kernels' arguments about the image; `spare` stands for a sizes pointer that is not read."""
    height, width = (0, 0) if size is None else size
    return {
        "sizes_ptr": spare if sizes is None else sizes.contiguous(),
        "rows_per_image": count if sizes is None else count // shape[0],
        "height": float(height),
        "width": float(width),
        "CLIP": size is not None or sizes is not None,
        "HAS_SIZES": sizes is not None,
    }


def _double_or_float(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def encode_boxes_fwd(boxes: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    """Launch; boxes and anchors broadcast to the output [..., 4]."""
    shape = torch.broadcast_shapes(boxes.shape, anchors.shape)
    out = torch.empty(shape, dtype=_double_or_float(boxes), device=boxes.device)
    count = out.numel() // 4
    if count == 0:
        return out
    anchors, strides = _anchor_strides(anchors, shape)
    with on_device(boxes):
        _encode_boxes_kernel[(cdiv(count, BLOCK),)](
            out_ptr=out,
            boxes_ptr=boxes.expand(shape).contiguous(),
            anchors_ptr=anchors,
            count=count,
            **strides,
            **_weights(weights),
            BLOCK=BLOCK,
            enable_fp_fusion=True,
        )
    return out


def decode_boxes_fwd(
    deltas: Tensor,
    anchors: Tensor,
    weights: Sequence[float],
    scale_clamp: float,
    size: Sequence[int] | None,
    sizes: Tensor | None,
) -> Tensor:
    """Launch; deltas and anchors broadcast to the output [..., 4]. `size` is (H, W); sizes [N, 2]."""
    shape = torch.broadcast_shapes(deltas.shape, anchors.shape)
    out = torch.empty(shape, dtype=_double_or_float(deltas), device=deltas.device)
    count = out.numel() // 4
    if count == 0:
        return out
    anchors, strides = _anchor_strides(anchors, shape)
    with on_device(deltas):
        _decode_boxes_fwd_kernel[(cdiv(count, BLOCK),)](
            out_ptr=out,
            deltas_ptr=deltas.expand(shape).contiguous(),
            anchors_ptr=anchors,
            count=count,
            **_clip_arguments(shape, count, size, sizes, out),
            **strides,
            **_weights(weights),
            scale_clamp=scale_clamp,
            BLOCK=BLOCK,
            enable_fp_fusion=True,
        )
    return out


def decode_boxes_bwd(
    grad: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    weights: Sequence[float],
    scale_clamp: float,
    size: Sequence[int] | None,
    sizes: Tensor | None,
) -> Tensor:
    """Launch; the gradient of deltas from grad [..., 4], in the shape and dtype of deltas."""
    shape = grad.shape
    out = torch.empty(shape, dtype=deltas.dtype, device=deltas.device)
    count = out.numel() // 4
    if count == 0:
        return out.sum_to_size(deltas.shape)
    anchors, strides = _anchor_strides(anchors, shape)
    with on_device(deltas):
        _decode_boxes_bwd_kernel[(cdiv(count, BLOCK),)](
            grad_deltas_ptr=out,
            grad_ptr=grad.contiguous(),
            deltas_ptr=deltas.expand(shape).contiguous(),
            anchors_ptr=anchors,
            count=count,
            **_clip_arguments(shape, count, size, sizes, out),
            **strides,
            **_weights(weights),
            scale_clamp=scale_clamp,
            BLOCK=BLOCK,
            enable_fp_fusion=True,
        )
    return out if out.shape == deltas.shape else out.sum_to_size(deltas.shape)


@custom_op("encode_boxes")
def encode_boxes(boxes: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    """boxes [..., 4], anchors [..., 4] -> deltas [..., 4]."""
    return encode_boxes_fwd(boxes, anchors, weights)


@encode_boxes.register_fake
def _(boxes: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    shape = torch.broadcast_shapes(boxes.shape, anchors.shape)
    return boxes.new_empty(shape, dtype=_double_or_float(boxes))


@custom_op("decode_boxes")
def decode_boxes(
    deltas: Tensor,
    anchors: Tensor,
    weights: Sequence[float],
    scale_clamp: float,
    size: Sequence[int] | None,
    sizes: Tensor | None,
) -> Tensor:
    """deltas [..., 4], anchors [..., 4] -> boxes [..., 4], clipped to `size` (H, W) or sizes [N, 2]."""
    return decode_boxes_fwd(deltas, anchors, weights, scale_clamp, size, sizes)


@decode_boxes.register_fake
def _(
    deltas: Tensor,
    anchors: Tensor,
    weights: Sequence[float],
    scale_clamp: float,
    size: Sequence[int] | None,
    sizes: Tensor | None,
) -> Tensor:
    shape = torch.broadcast_shapes(deltas.shape, anchors.shape)
    return deltas.new_empty(shape, dtype=_double_or_float(deltas))


@custom_op("decode_boxes_backward")
def decode_boxes_backward(
    grad: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    weights: Sequence[float],
    scale_clamp: float,
    size: Sequence[int] | None,
    sizes: Tensor | None,
) -> Tensor:
    """The gradient of `decode_boxes` in deltas."""
    return decode_boxes_bwd(grad, deltas, anchors, weights, scale_clamp, size, sizes)


decode_boxes_backward.register_autograd(no_second_derivative("decode_boxes"))


@decode_boxes_backward.register_fake
def _(
    grad: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    weights: Sequence[float],
    scale_clamp: float,
    size: Sequence[int] | None,
    sizes: Tensor | None,
) -> Tensor:
    return torch.empty_like(deltas, memory_format=torch.contiguous_format)


def _setup_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    deltas, anchors, ctx.weights, ctx.scale_clamp, ctx.size, sizes = inputs
    ctx.save_for_backward(deltas, anchors, sizes)


def _decode_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    deltas, anchors, sizes = ctx.saved_tensors
    grad_deltas = decode_boxes_backward(grad, deltas, anchors, ctx.weights, ctx.scale_clamp, ctx.size, sizes)
    return grad_deltas, None, None, None, None, None


decode_boxes.register_autograd(_decode_gradient, setup_context=_setup_decode)
