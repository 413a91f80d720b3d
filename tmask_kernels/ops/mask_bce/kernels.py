"""Mask loss kernels: the own channel of each RoI is read where it lies; the whole gradient is written in one launch.

Forward: one program is one RoI x a block of its pixels, and leaves one partial sum, already divided by the number of
pixels that count; PyTorch adds them up in a fixed order. Backward: a program owns a run of the gradient in memory
order, channels and pixels of one RoI, and writes zeros wherever the channel is not the RoI's own. No atomics: the same
bits from run to run. Letters as in `reference`. Arithmetic is float32; float64 for float64 logits, in the interpreter.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...backend import no_second_derivative
from ...common.kernels.numbers import cross_entropy_with_logits, sigmoids
from ...common.launch import cdiv, next_power_of_2, on_device
from ...namespace import custom_op

MAX_BLOCK = 1024  # pixels of a program of the forward: the 784 of a 28 x 28 mask are one block
BLOCK_GRAD = 2048  # elements of a program of the backward: two stores of 16 bytes a thread in half precision
BLOCK_K = 512  # RoIs that are counted at a time
NUM_WARPS = 4


@triton.jit
def _pixels(offs, stride_h, stride_w, M: tl.constexpr, FLAT: tl.constexpr):
    """Where pixels `offs` of an M x M map lie; FLAT: rows follow one another at the stride of the columns."""
    if FLAT:
        at = offs.to(tl.int64) * stride_w
    else:
        at = (offs // M).to(tl.int64) * stride_h + (offs % M).to(tl.int64) * stride_w
    return at


@triton.jit(do_not_specialize=["K"])
def _mask_bce_fwd_kernel(
    partial_ptr,  # [K * blocks of pixels]
    share_ptr,  # [1]: 1 / (number of valid RoIs * M * M)
    logits_ptr,  # [K, C, M, M]
    classes_ptr,  # [K] int64
    targets_ptr,  # [K, M, M]
    valid_ptr,  # [K] bytes
    K,
    logits_strides,  # (k, c, h, w)
    targets_strides,  # (k, h, w)
    C: tl.constexpr,
    M: tl.constexpr,
    FLAT_LOGITS: tl.constexpr,
    FLAT_TARGETS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    counts = tl.zeros((BLOCK_K,), tl.int32)
    first = tl.full((), 0, tl.int32)
    while first < K:
        offs_k = first + tl.arange(0, BLOCK_K)
        counts += tl.load(valid_ptr + offs_k, mask=offs_k < K, other=0).to(tl.int32)
        first += BLOCK_K
    share = 1.0 / (tl.maximum(tl.sum(counts, 0), 1).to(ACC) * (M * M))

    blocks: tl.constexpr = (M * M + BLOCK - 1) // BLOCK
    k = (tl.program_id(0) // blocks).to(tl.int64)
    offs = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    valid = tl.load(valid_ptr + k) != 0
    channel = tl.load(classes_ptr + k)
    known = (channel >= 0) & (channel < C)
    usable = tl.zeros_like(offs) + (valid & known).to(tl.int32)  # of one number Triton 3.9's interpreter makes no mask
    mask = (offs < M * M) & (usable != 0)
    x_ptr = logits_ptr + k * logits_strides[0] + tl.where(known, channel, 0) * logits_strides[1]
    x = tl.load(x_ptr + _pixels(offs, logits_strides[2], logits_strides[3], M, FLAT_LOGITS), mask=mask, other=0)
    t_ptr = targets_ptr + k * targets_strides[0]
    t = tl.load(t_ptr + _pixels(offs, targets_strides[1], targets_strides[2], M, FLAT_TARGETS), mask=mask, other=0)
    loss = tl.where(mask, cross_entropy_with_logits(x.to(ACC), t.to(ACC)), 0.0)
    total = tl.where(valid & (known == 0), float("nan"), tl.sum(loss, 0) * share)
    tl.store(partial_ptr + tl.program_id(0), total)
    if tl.program_id(0) == 0:
        tl.store(share_ptr, share)


@triton.jit
def _mask_bce_bwd_kernel(
    grad_ptr,  # [K, C, M, M], contiguous or channels_last
    upstream_ptr,  # one number
    share_ptr,  # [1]
    logits_ptr,
    classes_ptr,
    targets_ptr,
    valid_ptr,
    logits_strides,
    targets_strides,
    C: tl.constexpr,
    M: tl.constexpr,
    FLAT_LOGITS: tl.constexpr,
    FLAT_TARGETS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,  # of the gradient
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    elements: tl.constexpr = C * M * M
    blocks: tl.constexpr = (elements + BLOCK - 1) // BLOCK
    k = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * BLOCK
    offs = start + tl.arange(0, BLOCK)
    channel = tl.load(classes_ptr + k)
    has_own = (channel >= 0) & (channel < C) & (tl.load(valid_ptr + k) != 0)
    channel = tl.where(has_own, channel, 0).to(tl.int32)
    if not CHANNELS_LAST:  # most runs lie in other channels
        has_own = has_own & (start < (channel + 1) * (M * M)) & (start + BLOCK > channel * (M * M))

    grad = tl.zeros((BLOCK,), ACC)
    if has_own:
        if CHANNELS_LAST:
            own, pixel = offs % C == channel, offs // C
        else:
            pixel = offs - channel * (M * M)
            own = (pixel >= 0) & (pixel < M * M)
        own = own & (offs < elements)
        x_ptr = logits_ptr + k * logits_strides[0] + channel.to(tl.int64) * logits_strides[1]
        x = tl.load(x_ptr + _pixels(pixel, logits_strides[2], logits_strides[3], M, FLAT_LOGITS), mask=own, other=0)
        t_ptr = targets_ptr + k * targets_strides[0]
        t_at = _pixels(pixel, targets_strides[1], targets_strides[2], M, FLAT_TARGETS)
        t = tl.load(t_ptr + t_at, mask=own, other=0).to(ACC)
        p, q = sigmoids(x.to(ACC))
        scale = tl.load(upstream_ptr).to(ACC) * tl.load(share_ptr)
        grad = tl.where(own, (p * (1.0 - t) - q * t) * scale, 0.0)  # sigmoid(x) - t
    tl.store(grad_ptr + k * elements + offs, grad.to(grad_ptr.dtype.element_ty), mask=offs < elements)


def _arguments(logits: Tensor, classes: Tensor, targets: Tensor, valid: Tensor) -> dict[str, Any]:
    """What both kernels take."""
    if targets.dtype == torch.bool:
        targets = targets.view(torch.uint8)
    C, M = logits.shape[1], logits.shape[2]
    return {
        "logits_ptr": logits,
        "classes_ptr": classes.contiguous(),
        "targets_ptr": targets,
        "valid_ptr": valid.contiguous().view(torch.uint8),
        "logits_strides": tuple(logits.stride()),
        "targets_strides": tuple(targets.stride()),
        "C": C,
        "M": M,
        "FLAT_LOGITS": logits.stride(2) == M * logits.stride(3),
        "FLAT_TARGETS": targets.stride(1) == M * targets.stride(2),
        "ACC": tl.float64 if logits.dtype == torch.float64 else tl.float32,
        "num_warps": NUM_WARPS,
    }


@custom_op("mask_bce")
def mask_bce(logits: Tensor, classes: Tensor, targets: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """[K, C, M, M], [K] int64, [K, M, M], [K] bool to the loss and, for the backward, the share [1] of one pixel."""
    loss, share = _empty_loss(logits)
    if not logits.numel():
        return loss.zero_(), share.zero_()
    K, M = logits.shape[0], logits.shape[2]
    block = min(MAX_BLOCK, next_power_of_2(M * M))
    partial = torch.empty(K * cdiv(M * M, block), dtype=share.dtype, device=share.device)
    with on_device(logits):
        _mask_bce_fwd_kernel[(len(partial),)](
            partial_ptr=partial,
            share_ptr=share,
            K=K,
            BLOCK=block,
            BLOCK_K=BLOCK_K,
            enable_fp_fusion=True,
            **_arguments(logits, classes, targets, valid),
        )
    return partial.sum(), share


def _empty_loss(logits: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty((), dtype=dtype), logits.new_empty((1,), dtype=dtype)


@mask_bce.register_fake
def _(logits, classes, targets, valid):
    return _empty_loss(logits)


@custom_op("mask_bce_backward")
def mask_bce_backward(
    upstream: Tensor, share: Tensor, logits: Tensor, classes: Tensor, targets: Tensor, valid: Tensor
) -> Tensor:
    """Gradient of `mask_bce` to the logits [K, C, M, M], in their dtype."""
    grad = _empty_gradient(logits)
    if not grad.numel():
        return grad
    blocks = cdiv(grad[0].numel(), BLOCK_GRAD)
    with on_device(logits):
        _mask_bce_bwd_kernel[(len(grad) * blocks,)](
            grad_ptr=grad,
            upstream_ptr=upstream,
            share_ptr=share,
            CHANNELS_LAST=not grad.is_contiguous(),
            BLOCK=BLOCK_GRAD,
            enable_fp_fusion=True,
            **_arguments(logits, classes, targets, valid),
        )
    return grad


def _empty_gradient(logits: Tensor) -> Tensor:
    channels_last = logits.stride(1) == 1 and logits.shape[1] > 1
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device, memory_format=layout)


mask_bce_backward.register_autograd(no_second_derivative("mask_bce"))


@mask_bce_backward.register_fake
def _(upstream, share, logits, classes, targets, valid):
    return _empty_gradient(logits)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[1], *inputs)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else a gradient of the share would be filled with zeros


def _backward(ctx, upstream, _):
    if upstream is None:
        return None, None, None, None
    return mask_bce_backward(upstream, *ctx.saved_tensors), None, None, None


mask_bce.register_autograd(_backward, setup_context=_setup_context)
