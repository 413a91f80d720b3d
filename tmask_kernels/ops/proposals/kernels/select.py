"""The best of what NMS kept: all segments of an image in one list, by falling score, then rising index.

A score and an index become one 64-bit key that falls as they rank, so that a library's top-k, which promises no order
among equals, orders them. One kernel makes the keys of what NMS kept, `torch.topk` picks, one kernel takes the rows.
Letters: S segments, G segments of an image, K candidates of a segment, M of them kept, N images, D rows taken.
Deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....common.kernels.boxes import load4, store4
from ....common.launch import cdiv, on_device
from ....namespace import custom_op

BLOCK_KEYS = 512
BLOCK = 128

PADDING = tl.constexpr(-(2**63))  # the key of an empty slot, behind every other
_NAN = tl.constexpr(-(2**31) + 1)  # the rank of a score that is NaN, behind -inf


@triton.jit
def make_key(score, index):
    """int64 that falls with the score (float32, NaN last), then rises with the index (at least 0, under 2^31)."""
    bits = score.to(tl.int32, bitcast=True)
    rank = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # the bits of negative floats rise as they fall
    rank = tl.where(rank == -1, 0, rank)  # -0 ranks as 0
    rank = tl.where(score != score, _NAN, rank)
    return (rank.to(tl.int64) << 32) - index


@triton.jit
def split_key(key):
    """Score and index (int32) of a key that is no padding."""
    index = (-key).to(tl.int32)
    rank = ((key + index) >> 32).to(tl.int32)
    bits = tl.where(rank < 0, rank ^ 0x7FFFFFFF, rank)
    score = bits.to(tl.float32, bitcast=True)
    return tl.where(rank == _NAN, float("nan"), score), index


@triton.jit(do_not_specialize=["K", "M", "G"])
def _kept_keys_kernel(
    keys_ptr,  # [S, M] int64
    kept_ptr,  # [S, M] int64, -1 where nothing is
    scores_ptr,  # [S, K] float32
    K,
    M,
    G,
    count,  # S * M
    BOX_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    kept = tl.load(kept_ptr + offs, mask=mask, other=-1)
    real = kept >= 0
    segment = offs // M
    score = tl.load(scores_ptr + segment * K + kept, mask=real, other=0.0)
    index = kept * G + segment % G if BOX_FIRST else segment % G * K + kept
    tl.store(keys_ptr + offs, tl.where(real, make_key(score, index), PADDING), mask=mask)


@triton.jit(do_not_specialize=["K", "G", "D", "num_keys"])
def _take_kernel(
    out_boxes_ptr,  # [N, D, 4] float32
    out_scores_ptr,  # [N, D] float32
    segments_ptr,  # [N, D] int64
    counts_ptr,  # [N] int64
    keys_ptr,  # [N, num_keys] int64, falling; at most D
    boxes_ptr,  # [N, G, K, 4] float32
    K,
    G,
    D,
    num_keys,
    BOX_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(D, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    slot = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = slot < D
    keys_ptr += image * num_keys
    key = tl.load(keys_ptr + slot, mask=slot < num_keys, other=PADDING)
    following = tl.load(keys_ptr + slot + 1, mask=slot + 1 < num_keys, other=PADDING)
    real = key != PADDING
    score, index = split_key(key)
    divisor = G if BOX_FIRST else K
    quotient, rest = index // divisor, index % divisor
    segment = rest if BOX_FIRST else quotient
    kept = quotient if BOX_FIRST else rest
    row = (image * G + segment) * K + kept
    x1, y1, x2, y2 = load4(boxes_ptr, row, real, BLOCK, tl.float32)  # zeros where nothing is
    out = image * D + slot
    store4(out_boxes_ptr, out, mask, x1, y1, x2, y2, BLOCK)
    tl.store(out_scores_ptr + out, tl.where(real, score, 0.0), mask=mask)
    tl.store(segments_ptr + out, tl.where(real, segment, 0).to(tl.int64), mask=mask)
    # The last real slot knows how many there are; if there is none, the first slot does.
    last = (real & (following == PADDING)) | ((slot == 0) & (key == PADDING))
    tl.store(counts_ptr + image + slot * 0, tl.where(real, slot + 1, 0).to(tl.int64), mask=last)


def select_best_fwd(
    boxes: Tensor, scores: Tensor, kept: Tensor, images: int, limit: int, box_first: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch; arguments and results as `select_best_reference`, boxes and scores contiguous float32."""
    S, K = scores.shape
    G = S // max(images, 1)
    M = kept.shape[1]
    device = boxes.device
    out_boxes = torch.empty((images, limit, 4), dtype=torch.float32, device=device)
    out_scores = torch.empty((images, limit), dtype=torch.float32, device=device)
    segments = torch.empty((images, limit), dtype=torch.int64, device=device)
    counts = torch.empty((images,), dtype=torch.int64, device=device)
    if S * M == 0 or limit == 0:
        return out_boxes.zero_(), out_scores.zero_(), segments.zero_(), counts.zero_()
    keys = torch.empty((images, G * M), dtype=torch.int64, device=device)
    with on_device(boxes):
        _kept_keys_kernel[(cdiv(S * M, BLOCK_KEYS),)](
            keys_ptr=keys,
            kept_ptr=kept,
            scores_ptr=scores,
            K=K,
            M=M,
            G=G,
            count=S * M,
            BOX_FIRST=box_first,
            BLOCK=BLOCK_KEYS,
            enable_fp_fusion=True,
        )
        keys = keys.topk(min(limit, G * M), dim=1).values
        _take_kernel[(images * cdiv(limit, BLOCK),)](
            out_boxes_ptr=out_boxes,
            out_scores_ptr=out_scores,
            segments_ptr=segments,
            counts_ptr=counts,
            keys_ptr=keys,
            boxes_ptr=boxes,
            K=K,
            G=G,
            D=limit,
            num_keys=keys.shape[1],
            BOX_FIRST=box_first,
            BLOCK=BLOCK,
            enable_fp_fusion=True,
        )
    return out_boxes, out_scores, segments, counts


@custom_op("select_best")
def select_best(
    boxes: Tensor, scores: Tensor, kept: Tensor, images: int, limit: int, box_first: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """boxes [S, K, 4], scores [S, K], kept [S, M] -> boxes [N, D, 4], scores, segments [N, D], counts [N]."""
    return select_best_fwd(boxes.contiguous(), scores.contiguous(), kept.contiguous(), images, limit, box_first)


@select_best.register_fake
def _(
    boxes: Tensor, scores: Tensor, kept: Tensor, images: int, limit: int, box_first: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        boxes.new_empty(images, limit, 4, dtype=torch.float32),
        boxes.new_empty(images, limit, dtype=torch.float32),
        boxes.new_empty(images, limit, dtype=torch.int64),
        boxes.new_empty(images, dtype=torch.int64),
    )
