"""Padded NMS of few long segments in Triton: each is spread over the whole GPU. Letters as in `kernels`.

A segment is taken in steps of STEP boxes by falling score, one launch a step. Most of a launch is many small programs.
Each holds TILE boxes of the step against its part of the boxes kept so far, and clears the state of those that one of
them removes; and it writes, for pairs inside the step, one bit: whether the earlier box would remove the later one.
Which of the step's boxes are kept follows from states and bits alone: the program of the segment that comes last, by a
counter, iterates keep[j] = alive[j] and no i with keep[i] and bit[j, i] from keep = alive to its fixed point, the
greedy result (see `kernels`), and appends the kept boxes to the list that the next launch reads.

No program ever waits for another, and the launches are as many as the shape says: those behind `max_output` kept boxes
return at once. States are only ever cleared and counters only count, so the result does not depend on who comes first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....common.kernels.boxes import box_iou, load_boxes
from ....common.launch import cdiv, on_device
from .sort import BOX, NO_BOX, sort_boxes, store_kept


@dataclass(frozen=True)
class Launch:
    """Not tuned on a GPU yet. `tile` is a multiple of 32, `step` a multiple of `tile`, both powers of two.

    The last program holds the step's bits in registers, 64 a thread with these numbers. `programs` are those of a
    launch, about two for each SM of an H100; more where `segments` x `step` / `tile` are more.

    A tile of 32 boxes takes one warp: of a larger one the states go through shared memory, so that all warps see the
    same while other programs clear them, and agree on whether to enter a loop with barriers in it.
    """

    step: int = 1024
    tile: int = 64
    programs: int = 256
    num_warps: int = 16

    def __post_init__(self) -> None:
        assert self.tile >= 64 or self.num_warps == 1, self


LAUNCH = Launch()


@triton.jit
def _bits(over, TILE: tl.constexpr):
    """over [TILE, TILE] of 0 and 1 as words of 32 bits [TILE, TILE // 32], least significant first."""
    return tl.sum(tl.reshape(over, (TILE, TILE // 32, 32)) << tl.arange(0, 32)[None, None, :], axis=2)


@triton.jit
def _hold_against_earlier(
    bits_ptr, kept_ptr, kept_groups_ptr, boxes_ptr, state_ptr, groups_ptr, threshold, start, total, K, chunk, split,
    splits, HAS_GROUPS: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Every `splits`-th tile of what stands before the boxes of `chunk`: in its own step, and in the kept list."""
    offs = tl.arange(0, TILE)
    place = chunk * TILE + offs  # within the step
    rows = (start + place).to(tl.int64)
    mask = rows < K
    state = tl.load(state_ptr + rows, mask=mask, other=NO_BOX)
    x1, y1, x2, y2 = load_boxes(boxes_ptr, rows, mask)
    if HAS_GROUPS:
        group = tl.load(groups_ptr + rows, mask=mask, other=0)
    some = tl.max(state.to(tl.int32), axis=0) > 0  # without a box there is nothing to find out

    words = tl.arange(0, TILE // 32)
    first = split
    while some & (first <= chunk):
        rows_i = (start + first * TILE + offs).to(tl.int64)
        mask_i = rows_i < K
        # Another program may be clearing a state: of a box that is removed the bits are not asked for.
        state_i = tl.load(state_ptr + rows_i, mask=mask_i, other=NO_BOX)
        x1_i, y1_i, x2_i, y2_i = load_boxes(boxes_ptr, rows_i, mask_i)
        iou = box_iou(
            x1[:, None], y1[:, None], x2[:, None], y2[:, None],
            x1_i[None, :], y1_i[None, :], x2_i[None, :], y2_i[None, :],
        )  # fmt: skip
        over = (iou > threshold) & (state_i[None, :] == BOX)
        if HAS_GROUPS:
            group_i = tl.load(groups_ptr + rows_i, mask=mask_i, other=0)
            over = over & (group_i[None, :] == group[:, None])
        word = first * (TILE // 32) + words
        bits = _bits(over.to(tl.int32), TILE)
        tl.store(bits_ptr + place[:, None] * (STEP // 32) + word[None, :], bits)
        first += splits

    hits = tl.zeros([TILE, TILE], dtype=tl.int32)  # reduced once, after the loop: a reduction is a barrier
    first = split * TILE
    while some & (first < total):
        cols = (first + offs).to(tl.int64)
        mask_k = cols < total
        x1_k, y1_k, x2_k, y2_k = load_boxes(kept_ptr, cols, mask_k)
        iou = box_iou(
            x1[:, None], y1[:, None], x2[:, None], y2[:, None],
            x1_k[None, :], y1_k[None, :], x2_k[None, :], y2_k[None, :],
        )  # fmt: skip
        over = iou > threshold
        if HAS_GROUPS:
            group_k = tl.load(kept_groups_ptr + cols, mask=mask_k, other=0)
            over = over & (group_k[None, :] == group[:, None])
        hits = hits | over.to(tl.int32)
        first += splits * TILE
    removed = tl.max(hits, axis=1) > 0
    tl.store(state_ptr + rows, tl.full([TILE], NO_BOX, tl.int8), mask=mask & removed)


@triton.jit
def _decide(
    indices_ptr, count_ptr, kept_ptr, kept_groups_ptr, bits_ptr, boxes_ptr, order_ptr, state_ptr, groups_ptr, start,
    total, K, M, HAS_GROUPS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Of the step's boxes that are still alive, append those that are kept."""
    place = tl.arange(0, STEP)
    rows = (start + place).to(tl.int64)
    mask = rows < K
    # What other programs of this launch wrote is read past the first-level cache, which is not coherent.
    state = tl.load(state_ptr + rows, mask=mask, other=NO_BOX, cache_modifier=".cg")
    alive = (state > NO_BOX).to(tl.int32)
    words = tl.arange(0, STEP // 32)
    # Words of later tiles, and all of a box that is removed, may be unwritten.
    asked = (words[None, :] <= place[:, None] // 32) & (alive[:, None] > 0)
    bits = tl.load(
        bits_ptr + place[:, None] * (STEP // 32) + words[None, :], mask=asked, other=0, cache_modifier=".cg"
    )  # [STEP, STEP // 32]
    # Bits of the box itself and of later ones do not count: only so is there one fixed point, and an end.
    own_word = words[None, :] == place[:, None] // 32
    bits = tl.where(own_word, bits & (0x7FFFFFFF >> (31 - place[:, None] % 32)), bits)
    keep = alive
    changed = tl.max(alive, axis=0)
    while changed > 0:
        packed = tl.sum(tl.reshape(keep, (STEP // 32, 32)) << tl.arange(0, 32)[None, :], axis=1)  # [STEP // 32]
        after = alive * (1 - tl.max(((bits & packed[None, :]) != 0).to(tl.int32), axis=1))
        changed = tl.max((after != keep).to(tl.int32), axis=0)
        keep = after

    rank = (total + tl.cumsum(keep, axis=0) - keep).to(tl.int64)
    out = (keep > 0) & (rank < M)
    tl.store(indices_ptr + rank, tl.load(order_ptr + rows, mask=mask, other=0), mask=out)
    x1, y1, x2, y2 = load_boxes(boxes_ptr, rows, mask)
    store_kept(kept_ptr, rank, x1, y1, x2, y2, state, out)
    if HAS_GROUPS:
        tl.store(kept_groups_ptr + rank, tl.load(groups_ptr + rows, mask=mask, other=0), mask=out)
    tl.store(count_ptr, tl.minimum(total + tl.sum(keep, axis=0), M).to(tl.int64))


@triton.jit(do_not_specialize=["start", "chunks", "splits", "K", "M", "width"])
def _step_kernel(
    indices_ptr,  # [S, width] int64
    counts_ptr,  # [S] int64: kept in the steps before
    arrived_ptr,  # [S] int64: programs of this launch that are done; 0 before and after it
    kept_ptr,  # [S, M, 4] float32, scratch: the kept boxes by falling score
    kept_groups_ptr,  # [S, M] int64, scratch, only with groups
    bits_ptr,  # [S, STEP, STEP // 32] int32, scratch: bit i of row j says that box i of the step would remove box j
    boxes_ptr,  # [S, K, 4] float32 by falling score
    order_ptr,  # [S, K] int64: position in the caller's tensors
    state_ptr,  # [S, K] int8
    groups_ptr,  # [S, K] int64 by falling score, only with groups
    thresholds_ptr,  # [S] float32
    start,  # the step's first box
    chunks,  # of TILE boxes in the step
    splits,  # programs that share the tiles of a chunk
    K,
    M,
    width,
    HAS_GROUPS: tl.constexpr,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
):
    segment = (tl.program_id(0) // splits // chunks).to(tl.int64)
    chunk = tl.program_id(0) // splits % chunks
    split = tl.program_id(0) % splits
    total = tl.load(counts_ptr + segment).to(tl.int32)
    if total < M:
        kept_ptr += segment * M * 4
        kept_groups_ptr += segment * M
        bits_ptr += segment * STEP * (STEP // 32)
        boxes_ptr += segment * K * 4
        state_ptr += segment * K
        groups_ptr += segment * K
        threshold = tl.load(thresholds_ptr + segment)
        _hold_against_earlier(
            bits_ptr, kept_ptr, kept_groups_ptr, boxes_ptr, state_ptr, groups_ptr, threshold, start, total, K, chunk,
            split, splits, HAS_GROUPS, STEP, TILE,
        )  # fmt: skip
        # The barrier puts the stores of all threads before the counter's release, whose acquire the last one reads.
        tl.debug_barrier()
        arrived = tl.atomic_add(arrived_ptr + segment, 1, sem="acq_rel", scope="gpu")
        if arrived == chunks * splits - 1:
            tl.store(arrived_ptr + segment, 0)
            _decide(
                indices_ptr + segment * width, counts_ptr + segment, kept_ptr, kept_groups_ptr, bits_ptr, boxes_ptr,
                order_ptr + segment * K, state_ptr, groups_ptr, start, total, K, M, HAS_GROUPS, STEP,
            )  # fmt: skip


def padded_nms_blocks(
    boxes: Tensor,
    scores: Tensor,
    thresholds: Tensor,
    valid: Tensor | None,
    groups: Tensor | None,
    max_output: int,
    launch: Launch = LAUNCH,
) -> tuple[Tensor, Tensor]:
    """Many programs a segment; arguments and results as `padded_nms_reference`."""
    S, K = scores.shape
    M, device = min(max_output, K), boxes.device
    indices = torch.empty((S, max_output), dtype=torch.int64, device=device)
    counters = torch.empty((2, S), dtype=torch.int64, device=device)
    segments = sort_boxes(boxes, scores, valid, groups, indices, counters)
    counts, arrived = counters
    kept = torch.empty((S, M, 4), dtype=torch.float32, device=device)
    bits = torch.empty((S, launch.step, launch.step // 32), dtype=torch.int32, device=device)
    grouped = segments.groups is not None
    # Without groups their pointers are never read; any int64 tensor serves.
    kept_groups = torch.empty((S, M), dtype=torch.int64, device=device) if grouped else indices
    with on_device(kept):
        for start in range(0, K, launch.step):
            chunks = cdiv(min(launch.step, K - start), launch.tile)
            most = chunks + cdiv(min(start, M), launch.tile)  # tiles before a chunk
            splits = min(cdiv(launch.programs, S * chunks), most)
            _step_kernel[(S * chunks * splits,)](
                indices_ptr=indices,
                counts_ptr=counts,
                arrived_ptr=arrived,
                kept_ptr=kept,
                kept_groups_ptr=kept_groups,
                bits_ptr=bits,
                boxes_ptr=segments.boxes,
                order_ptr=segments.order,
                state_ptr=segments.state,
                groups_ptr=segments.groups if grouped else segments.order,
                thresholds_ptr=thresholds,
                start=start,
                chunks=chunks,
                splits=splits,
                K=K,
                M=M,
                width=max_output,
                HAS_GROUPS=grouped,
                STEP=launch.step,
                TILE=launch.tile,
                num_warps=launch.num_warps,
                # A fused multiply-add would round the union differently from the reference.
                enable_fp_fusion=False,
            )
    return indices, counts
