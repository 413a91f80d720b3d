"""Focal loss kernels: the loss or its sum in one pass over logits and targets, and the gradient in another.

Tensors are walked in memory order as one line of `count` elements. A program takes every so many-th block of it. For a
sum each program leaves one partial sum, which PyTorch adds up in a fixed order: no atomics, the same bits from run to
run. Arithmetic is float32; float64 for float64 logits, in the interpreter, where alpha and gamma are float32 still.

A block that lies wholly inside the line is loaded without a mask, without which the compiler could not prove that 16
bytes may go at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...backend import no_second_derivative
from ...common.kernels.numbers import cross_entropy_with_logits, sigmoids
from ...common.launch import cdiv, on_device
from ...namespace import custom_op

BLOCK = 1024  # elements at a time: eight a thread of four warps, 16 bytes of bf16
NUM_WARPS = 4
MAX_PROGRAMS = 2048  # about what an H100 holds at once: 16 on each of 132 SMs

PADDING = tl.constexpr(-1e4)  # a logit whose loss is exactly 0 beside a target of 0
ANY_GAMMA = -1  # FOCUS of a gamma other than 0, 1 and 2, for which the power needs a logarithm


@triton.jit
def _load(ptr, offs, count, whole, other: tl.constexpr, ACC: tl.constexpr):
    """Elements `offs` in ACC; `other` past the end, where not the `whole` block is inside."""
    if whole:
        values = tl.load(ptr + offs)
    else:
        values = tl.load(ptr + offs, mask=offs < count, other=other)
    return values.to(ACC)


@triton.jit
def _store(ptr, offs, count, whole, values):
    values = values.to(ptr.dtype.element_ty)
    if whole:
        tl.store(ptr + offs, values)
    else:
        tl.store(ptr + offs, values, mask=offs < count)


@triton.jit
def _power(miss, gamma, FOCUS: tl.constexpr, TINY: tl.constexpr):
    """miss ** gamma, and gamma * miss ** (gamma - 1); miss is held above TINY where its logarithm is needed."""
    if FOCUS == 0:
        power, slope = miss * 0 + 1.0, miss * 0
    elif FOCUS == 1:
        power, slope = miss, miss * 0 + 1.0
    elif FOCUS == 2:
        power, slope = miss * miss, 2.0 * miss
    else:
        miss = tl.maximum(miss, TINY)
        power = tl.exp2(gamma * tl.log2(miss))
        slope = gamma * (power / miss)
    return power, slope


@triton.jit
def _weight(t, alpha, WEIGHTED: tl.constexpr):
    if WEIGHTED:
        weight = alpha * t + (1.0 - alpha) * (1.0 - t)
    else:
        weight = t * 0 + 1.0
    return weight


@triton.jit(do_not_specialize=["count"])
def _focal_fwd_kernel(
    out_ptr,  # [count] losses, or [programs] partial sums
    inputs_ptr,  # [count]
    targets_ptr,  # [count]
    count,
    alpha,
    gamma,
    SUM: tl.constexpr,
    MEAN: tl.constexpr,
    FOCUS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), ACC)
    while block * BLOCK < count:
        offs = block * BLOCK + tl.arange(0, BLOCK)
        whole = (block + 1) * BLOCK <= count
        x = _load(inputs_ptr, offs, count, whole, PADDING, ACC)
        t = _load(targets_ptr, offs, count, whole, 0, ACC)
        p, q = sigmoids(x)
        power, _ = _power(p * (1.0 - t) + q * t, gamma, FOCUS, TINY)
        loss = _weight(t, alpha, WEIGHTED) * power * cross_entropy_with_logits(x, t)
        if SUM:
            total += loss
        else:
            _store(out_ptr, offs, count, whole, loss)
        block += tl.num_programs(0)
    if SUM:
        partial = tl.sum(total, 0)
        if MEAN:
            partial /= count.to(ACC)
        tl.store(out_ptr + tl.program_id(0), partial)


@triton.jit(do_not_specialize=["count"])
def _focal_bwd_kernel(
    grad_ptr,  # [count], of the logits
    upstream_ptr,  # [count], or one number
    inputs_ptr,  # [count]
    targets_ptr,  # [count]
    count,
    alpha,
    gamma,
    ONE_UPSTREAM: tl.constexpr,
    MEAN: tl.constexpr,
    FOCUS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    if ONE_UPSTREAM:
        upstream = tl.load(upstream_ptr).to(ACC)
        if MEAN:
            upstream /= count.to(ACC)
    block = tl.program_id(0).to(tl.int64)
    while block * BLOCK < count:
        offs = block * BLOCK + tl.arange(0, BLOCK)
        whole = (block + 1) * BLOCK <= count
        x = _load(inputs_ptr, offs, count, whole, PADDING, ACC)
        t = _load(targets_ptr, offs, count, whole, 0, ACC)
        p, q = sigmoids(x)
        too_high, too_low = p * (1.0 - t), q * t  # their difference is p - t, their sum 1 - p_t
        power, slope = _power(too_high + too_low, gamma, FOCUS, TINY)
        # The entropy of an infinite logit may be infinite; it grows slower than p q falls.
        entropy = tl.where(p * q == 0, 0.0, cross_entropy_with_logits(x, t))
        focus = entropy * (p * q * slope) * (2.0 * t - 1.0)
        grad = _weight(t, alpha, WEIGHTED) * (power * (too_high - too_low) - focus)
        if ONE_UPSTREAM:
            grad *= upstream
        else:
            grad *= _load(upstream_ptr, offs, count, whole, 0, ACC)
        _store(grad_ptr, offs, count, whole, grad)
        block += tl.num_programs(0)


def _arguments(inputs: Tensor, targets: Tensor, alpha: float, gamma: float) -> dict[str, Any]:
    """What both kernels take; inputs and targets lie alike."""
    acc = torch.promote_types(inputs.dtype, torch.float32)
    return {
        "inputs_ptr": inputs,
        "targets_ptr": targets.view(torch.uint8) if targets.dtype == torch.bool else targets,
        "count": inputs.numel(),
        "alpha": alpha,
        "gamma": gamma,
        "FOCUS": int(gamma) if gamma in (0, 1, 2) else ANY_GAMMA,
        "WEIGHTED": alpha >= 0,
        "TINY": torch.finfo(acc).tiny,
        "BLOCK": BLOCK,
        "ACC": tl.float64 if acc == torch.float64 else tl.float32,
        "num_warps": NUM_WARPS,
    }


def _grid(count: int) -> tuple[int]:
    return (min(cdiv(count, BLOCK), MAX_PROGRAMS),)


def _fills_its_memory(tensor: Tensor) -> bool:
    """Whether the elements lie side by side without gaps, in whatever order of the axes."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _side_by_side(tensor: Tensor) -> Tensor:
    return tensor if _fills_its_memory(tensor) else tensor.contiguous()


def _lying_as(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor` in the memory order of `other`, which fills its memory; copied only where it lies otherwise."""
    if tensor.stride() == other.stride():
        return tensor
    return torch.empty_like(other, dtype=tensor.dtype).copy_(tensor)


@custom_op("sigmoid_focal_loss")
def sigmoid_focal_loss(inputs: Tensor, targets: Tensor, alpha: float, gamma: float, reduction: str) -> Tensor:
    """Logits and targets of one shape to the losses of that shape, or to their sum or mean."""
    inputs = _side_by_side(inputs)
    out = _empty_loss(inputs, reduction)
    if not inputs.numel():
        return out.zero_()
    targets = _lying_as(targets, inputs)
    summed = reduction != "none"
    grid = _grid(inputs.numel())
    if summed:
        partial = torch.empty(grid, dtype=out.dtype, device=out.device)
    with on_device(inputs):
        _focal_fwd_kernel[grid](
            out_ptr=partial if summed else out,
            SUM=summed,
            MEAN=reduction == "mean",
            enable_fp_fusion=True,
            **_arguments(inputs, targets, alpha, gamma),
        )
    return partial.sum() if summed else out


def _empty_loss(inputs: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return torch.empty_like(inputs)
    return torch.empty((), dtype=torch.promote_types(inputs.dtype, torch.float32), device=inputs.device)


@sigmoid_focal_loss.register_fake
def _(inputs, targets, alpha, gamma, reduction):
    return _empty_loss(_side_by_side(inputs), reduction)


@custom_op("sigmoid_focal_loss_backward")
def sigmoid_focal_loss_backward(
    upstream: Tensor, inputs: Tensor, targets: Tensor, alpha: float, gamma: float, reduction: str
) -> Tensor:
    """Gradient of `sigmoid_focal_loss` to the logits, in their dtype; upstream is of the shape of the loss."""
    inputs = _side_by_side(inputs)
    grad = torch.empty_like(inputs)
    if not inputs.numel():
        return grad
    targets = _lying_as(targets, inputs)
    # One number, also where autograd has spread it over all losses without copying it.
    one = upstream.dim() == 0 or not any(upstream.stride())
    with on_device(inputs):
        _focal_bwd_kernel[_grid(inputs.numel())](
            grad_ptr=grad,
            upstream_ptr=upstream if one else _lying_as(upstream, inputs),
            ONE_UPSTREAM=one,
            MEAN=reduction == "mean",
            enable_fp_fusion=True,
            **_arguments(inputs, targets, alpha, gamma),
        )
    return grad


sigmoid_focal_loss_backward.register_autograd(no_second_derivative("sigmoid_focal_loss, softmax_focal_loss"))


@sigmoid_focal_loss_backward.register_fake
def _(upstream, inputs, targets, alpha, gamma, reduction):
    return torch.empty_like(_side_by_side(inputs))


def _setup_context(ctx, inputs, output):
    logits, targets, ctx.alpha, ctx.gamma, ctx.reduction = inputs
    ctx.save_for_backward(logits, targets)


def _backward(ctx, upstream):
    grad = sigmoid_focal_loss_backward(upstream, *ctx.saved_tensors, ctx.alpha, ctx.gamma, ctx.reduction)
    return grad, None, None, None, None


sigmoid_focal_loss.register_autograd(_backward, setup_context=_setup_context)
