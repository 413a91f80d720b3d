"""Small kernels whose cost is known, to test the harness itself."""

import triton
import triton.language as tl


@triton.jit
def copy_kernel(out_ptr, in_ptr, count, BLOCK: tl.constexpr, ATOMIC: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    value = tl.load(in_ptr + offsets, mask=mask, other=0.0)
    if ATOMIC:
        tl.atomic_add(out_ptr + offsets, value, mask=mask)
    else:
        tl.store(out_ptr + offsets, value, mask=mask)


@triton.jit
def dot_kernel(out_ptr, a_ptr, b_ptr, PRECISION: tl.constexpr):
    offsets = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    product = tl.dot(tl.load(a_ptr + offsets), tl.load(b_ptr + offsets), input_precision=PRECISION)
    tl.store(out_ptr + offsets, product)


@triton.jit
def spill_kernel(out_ptr, in_ptr, SIDE: tl.constexpr):
    """Holds a SIDE x SIDE tile and its transpose: more registers than a thread has."""
    offsets = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    tile = tl.load(in_ptr + offsets)
    tl.store(out_ptr + offsets, tile * tl.trans(tile))
