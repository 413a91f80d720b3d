"""Numbers in Triton: integers and bits, products, sigmoids."""

from __future__ import annotations

import triton
import triton.language as tl

from ...backend import interpreter_enabled

# The interpreter multiplies the bits of bf16 as if they were integers; in float32 it gets the same products.
DOT_IN_FP32 = tl.constexpr(interpreter_enabled())


@triton.jit
def plain(number):
    """The int64 that `unspecialized` took."""
    return tl.cast(number, tl.int64) >> 2


@triton.jit
def lowest_bit(bits):
    """Place of the lowest set bit of an int64 from 1 to 2^32 - 1, and the bits without it."""
    lowest = bits & (0 - bits)
    # A power of two is exact as a float, and its exponent is the bit's place.
    return (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127, bits ^ lowest


@triton.jit
def small_dot(weights, values, TERMS: tl.constexpr, ACC: tl.constexpr):
    """weights [M, K] of type ACC times values [K, N], to full ACC precision: [M, N].

    Half-precision values take the tensor cores: the weights go in as a sum of TERMS numbers of the values' type, whose
    products are exact. Others are multiplied as they are, never rounded to TF32.
    """
    product = tl.zeros((weights.shape[0], values.shape[1]), ACC)
    for _ in tl.static_range(TERMS):
        term = weights.to(values.dtype)
        weights -= term.to(ACC)
        if DOT_IN_FP32 and values.dtype == tl.bfloat16:
            product += tl.dot(term.to(tl.float32), values.to(tl.float32), input_precision="ieee", out_dtype=ACC)
        else:
            product = tl.dot(term, values, product, input_precision="ieee", out_dtype=ACC)
    return product


@triton.jit
def sigmoids(x):
    """sigmoid(x) and sigmoid(-x), the smaller of them to full relative precision too."""
    small = tl.exp(-tl.abs(x))
    larger = 1.0 / (1.0 + small)
    smaller = small * larger
    return tl.where(x >= 0, larger, smaller), tl.where(x >= 0, smaller, larger)


@triton.jit
def cross_entropy_with_logits(x, t):
    """max(x, 0) - x t + log(1 + exp(-|x|)): the entropy of targets t in 0..1 under sigmoid(x).

    The first two terms are |x| times the distance of t from the side of x, and 0 at no distance, if x is infinite too.
    """
    distance = tl.where(x >= 0, 1.0 - t, t)
    small = tl.exp(-tl.abs(x))
    whole = 1.0 + small
    # log(whole) belongs to a rounded sum; this ratio mends it (Goldberg 1991, theorem 4).
    ratio = small / tl.where(whole == 1.0, 1.0, whole - 1.0)
    return tl.where(distance == 0, 0.0, tl.abs(x)) * distance + tl.where(whole == 1.0, small, tl.log(whole) * ratio)
