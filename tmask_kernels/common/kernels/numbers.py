"""Jit functions on numbers: encoded integers, bits, small matrix products, sigmoids."""

from __future__ import annotations

import triton
import triton.language as tl

from ...backend import interpreter_enabled

# The interpreter multiplies bf16 values as integers. Products in float32 are the same as on a GPU.
DOT_IN_FP32 = tl.constexpr(interpreter_enabled())


@triton.jit
def decode_int(number):
    """Return the int64 that `encode_ints` encoded."""
    return tl.cast(number, tl.int64) >> 2


@triton.jit
def lowest_bit(bits):
    """Return the position of the lowest set bit of a uint32 or int64 in 1..2^32 - 1, and `bits` with it cleared."""
    lowest = bits & (0 - bits)
    # A float32 holds a power of two exactly, and its exponent is the position.
    return (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127, bits ^ lowest


@triton.jit
def count_bits(bits):
    """Return how many bits of each uint32 are set, as uint32."""
    bits -= bits >> 1 & 0x55555555
    bits = (bits & 0x33333333) + (bits >> 2 & 0x33333333)
    return (bits + (bits >> 4) & 0x0F0F0F0F) * 0x01010101 >> 24


@triton.jit
def weighted_sum(weights, values, total, TERMS: tl.constexpr, PRECISION: tl.constexpr):
    """Add weights [M, K] of the dtype of `total` times values [K, N] to `total` [M, N].

    Half-precision values use the tensor cores: each weight is split into a sum of TERMS numbers of the values' dtype,
    whose products are exact. PRECISION is that of a product of float32: "ieee", or "tf32x3", which splits both factors
    into two TF32 numbers and drops the product of the two small ones, at most 2^-21 of the whole.
    """
    for _ in tl.static_range(TERMS):
        term = weights.to(values.dtype)
        weights -= term.to(weights.dtype)
        if DOT_IN_FP32 and values.dtype == tl.bfloat16:
            total += tl.dot(term.to(tl.float32), values.to(tl.float32), input_precision="ieee", out_dtype=total.dtype)
        else:
            total = tl.dot(term, values, total, input_precision=PRECISION, out_dtype=total.dtype)
    return total


@triton.jit
def sigmoids(x):
    """Return sigmoid(x) and sigmoid(-x), both to full relative precision."""
    small = tl.exp(-tl.abs(x))
    larger = 1.0 / (1.0 + small)
    smaller = small * larger
    return tl.where(x >= 0, larger, smaller), tl.where(x >= 0, smaller, larger)


@triton.jit
def cross_entropy_with_logits(x, t):
    """Return the cross-entropy of targets t in 0..1 under sigmoid(x): max(x, 0) - x t + log(1 + exp(-|x|)).

    The first two terms are computed as |x| times the distance of t from the class that x predicts. A distance of 0
    gives 0, for an infinite x too.
    """
    distance = tl.where(x >= 0, 1.0 - t, t)
    small = tl.exp(-tl.abs(x))
    whole = 1.0 + small
    # `whole` is rounded; the ratio corrects log(whole) for it (Goldberg 1991, theorem 4).
    ratio = small / tl.where(whole == 1.0, 1.0, whole - 1.0)
    return tl.where(distance == 0, 0.0, tl.abs(x)) * distance + tl.where(whole == 1.0, small, tl.log(whole) * ratio)
