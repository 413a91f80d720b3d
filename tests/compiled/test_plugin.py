"""The level finds what it is for: a fault planted in a small kernel, one for each kind, and what allowed.txt names."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from ttsem.sanitize import KernelFault

from tests.compiled import plugin
from tmask_kernels.ops.nms.kernels.blocks import Launch, padded_nms_blocks
from tmask_kernels.testing import random_boxes


@triton.jit
def _row_sums(out_ptr, x_ptr, width, SHARED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    inside = offs < width if MASKED else offs < BLOCK
    x = tl.load(x_ptr + row * width + offs, mask=offs < width, other=0.0)
    tl.store(out_ptr + (0 if SHARED else row) * width + offs, tl.cumsum(x, axis=0), mask=inside)


def row_sums(x: Tensor, *, shared: bool = False, masked: bool = True) -> Tensor:
    """Running sums of rows. `shared`: all programs write the first row; `masked`: a block ends where its row does."""
    out = torch.zeros_like(x)
    _row_sums[(len(x),)](out, x, x.shape[1], SHARED=shared, MASKED=masked, BLOCK=8)
    return out


def test_without_a_fault_the_small_kernel_is_right(device: torch.device) -> None:
    x = torch.randn(3, 5, device=device)
    torch.testing.assert_close(row_sums(x), x.cumsum(1))


def test_a_race_between_programs_is_found(device: torch.device) -> None:
    with pytest.raises(KernelFault, match=r"tl.store\(out_ptr .*instances .* both touch element 0 of `out_ptr`"):
        row_sums(torch.randn(3, 5, device=device), shared=True)


def test_a_store_out_of_bounds_is_found(device: torch.device) -> None:
    with pytest.raises(KernelFault, match=r"tl.store\(out_ptr .* writes 3 element\(s\) past the end .* `out_ptr`"):
        row_sums(torch.randn(1, 5, device=device), masked=False)


@triton.jit
def _accumulate(out_ptr, x_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N, other=0)
    tl.store(out_ptr + offs, tl.load(out_ptr + offs, mask=offs < N, other=0) + x, mask=offs < N)


@torch.library.custom_op("tmask_planted::accumulate", mutates_args=())
def accumulate(x: Tensor) -> Tensor:
    """`x`, were memory that nobody wrote zero."""
    out = torch.empty_like(x)
    _accumulate[(1,)](out, x, len(x), BLOCK=8)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32], ids=str)
def test_a_read_of_unwritten_memory_is_found(dtype: torch.dtype, device: torch.device) -> None:
    """In a custom op too."""
    got = accumulate(torch.zeros(5, dtype=dtype, device=device))
    assert (got.isnan() if dtype.is_floating_point else got == torch.iinfo(dtype).max).all(), got


@triton.jit
def _two_before(out_ptr, x_ptr, N):
    last = tl.load(x_ptr)
    before = last
    for i in range(1, N):
        tl.store(out_ptr + i, before)
        before, last = last, tl.load(x_ptr + i)


def test_what_the_compiler_alone_does_is_seen(device: torch.device) -> None:
    """It does not carry `before`, which is `last` when the loop begins; an interpreter would store 1, 1, 5, 3."""
    out = torch.zeros(5, device=device)
    _two_before[(1,)](out, torch.tensor([1.0, 5.0, 3.0, 4.0, 2.0], device=device), 5)
    assert out.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0]


def test_every_allowed_race_is_found_and_changes_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its line in allowed.txt has to go. The programs of a launch run in three orders."""
    boxes = random_boxes(300, height=100, width=100, min_size=12.0).view(2, 150, 4).to(device)
    scores, groups = torch.rand(2, 150, device=device), (torch.arange(150, device=device) % 3).expand(2, 150)
    results = []
    for order in ("", "reverse", "shuffle:0"):
        monkeypatch.setenv("TTSEM_GRID_ORDER", order)
        thresholds = torch.full((2,), 0.5, device=device)
        results.append(padded_nms_blocks(boxes, scores, thresholds, None, groups, 150, Launch(64, 32, 4, 1)))
    assert plugin.raced == set(plugin.RACES)
    for indices, counts in results[1:]:
        assert torch.equal(indices, results[0][0])
        assert torch.equal(counts, results[0][1])
