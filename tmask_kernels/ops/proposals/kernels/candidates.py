"""The boxes that go into NMS, by segment: of each level of an image, or of each class of an image.

For an RPN one kernel makes a key (`select`) of every logit of all levels, `torch.topk` picks each level's best,
and one kernel computes their anchors from the keys' indices, reads their deltas where these lie, decodes, clips and
filters. Rows of keys are as long as the largest level: padding costs less than a top-k a level. For detections one
kernel clips, filters and lays out by class. A program of the kernels serves BLOCK slots of one segment.
Letters: N images, L levels, A anchors of a cell, H W sides of a map, K candidates of a level, P proposals, Cls classes.
Deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....common.kernels.boxes import load4, store4
from ....common.kernels.numbers import decode_int
from ....common.kernels.pyramid import of_level
from ....common.launch import cdiv, encode_ints, on_device
from ....namespace import custom_op
from ...box_coding.kernels import clipped, decode_delta
from .select import PADDING, make_key, split_key

BLOCK_KEYS = 512
BLOCK = 128


@triton.jit
def _cell(index, widths, per_cell, level, NUM_LEVELS: tl.constexpr):
    """Anchor of its cell, row and column (int32) of the index of an anchor within its level."""
    A = decode_int(of_level(level, per_cell, NUM_LEVELS)).to(tl.int32)
    W = decode_int(of_level(level, widths, NUM_LEVELS)).to(tl.int32)
    cell = index // A
    return index % A, cell // W, cell % W


@triton.jit
def _offset(image, channel, y, x, strides, level, NUM_LEVELS: tl.constexpr):
    """Where an element of a level's map [N, C, H, W] lies; `strides` are (n, c, h, w) a level."""
    offset = image * decode_int(of_level(level, strides[0], NUM_LEVELS))
    offset += channel.to(tl.int64) * decode_int(of_level(level, strides[1], NUM_LEVELS))
    offset += y.to(tl.int64) * decode_int(of_level(level, strides[2], NUM_LEVELS))
    return offset + x.to(tl.int64) * decode_int(of_level(level, strides[3], NUM_LEVELS))


@triton.jit
def _store_candidates(
    boxes_ptr, scores_ptr, valid_ptr, sizes_ptr, image, rows, mask, x1, y1, x2, y2, score, good, min_size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Clip boxes to their image and write them; valid are those that are `good` and have no side under min_size."""
    limit_y = tl.load(sizes_ptr + image * 2).to(tl.float32)
    limit_x = tl.load(sizes_ptr + image * 2 + 1).to(tl.float32)
    x1, y1, x2, y2 = clipped(x1, limit_x), clipped(y1, limit_y), clipped(x2, limit_x), clipped(y2, limit_y)
    good = good & (x2 - x1 >= min_size) & (y2 - y1 >= min_size)
    store4(boxes_ptr, rows, mask, x1, y1, x2, y2, BLOCK)
    tl.store(scores_ptr + rows, score, mask=mask)
    tl.store(valid_ptr + rows, good.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["blocks"])
def _rpn_keys_kernel(
    keys_ptr,  # [N * L, blocks * BLOCK] int64
    logits_ptrs,  # one [N, A, H, W] a level, any strides
    strides,  # n, c, h, w: each a level's
    widths,
    per_cell,  # anchors of a cell
    lengths,  # anchors of a level
    blocks,  # programs of a row
    NUM_LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    index = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    image, level = row // NUM_LEVELS, row % NUM_LEVELS
    real = index < decode_int(of_level(level, lengths, NUM_LEVELS))
    anchor, y, x = _cell(index, widths, per_cell, level, NUM_LEVELS)
    logits_ptr = of_level(level, logits_ptrs, NUM_LEVELS)
    logit = tl.load(logits_ptr + _offset(image, anchor, y, x, strides, level, NUM_LEVELS), mask=real, other=0.0)
    out = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(keys_ptr + out, tl.where(real, make_key(logit.to(tl.float32), index), PADDING))


@triton.jit(do_not_specialize=["K"])
def _rpn_candidates_kernel(
    boxes_ptr,  # [N * L, K, 4] float32
    scores_ptr,  # [N * L, K] float32
    valid_ptr,  # [N * L, K] bytes
    keys_ptr,  # [N * L, K] int64, falling
    sizes_ptr,  # [N, 2] height, width
    deltas_ptrs,  # one [N, 4A, H, W] a level, any strides
    strides,  # n, c, h, w: each a level's
    widths,
    per_cell,  # anchors of a cell
    lengths,  # anchors of a level
    first_shapes,  # of each level: where its half sides begin
    half_widths,  # of all anchors of a cell of all levels
    half_heights,
    steps_y,  # of each level: pixels a cell
    steps_x,
    shifts_y,  # of each level: pixels from a cell's corner to its anchors' centre
    shifts_x,
    K,
    scale_clamp,
    min_size,
    score_threshold,
    NUM_LEVELS: tl.constexpr,
    NUM_SHAPES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(K, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    slot = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    image, level = row // NUM_LEVELS, row % NUM_LEVELS
    mask = slot < K
    real = mask & (slot < decode_int(of_level(level, lengths, NUM_LEVELS)))  # padding's keys are behind a level's own
    logit, index = split_key(tl.load(keys_ptr + row * K + slot, mask=real, other=0))
    anchor, y, x = _cell(index, widths, per_cell, level, NUM_LEVELS)

    # The anchor, rounded as a stored one would be.
    shape = anchor + decode_int(of_level(level, first_shapes, NUM_LEVELS)).to(tl.int32)
    half_w = tl.zeros((BLOCK,), tl.float32)
    half_h = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(NUM_SHAPES):
        half_w = tl.where(shape == i, half_widths[i], half_w)
        half_h = tl.where(shape == i, half_heights[i], half_h)
    ax = x.to(tl.float32) * of_level(level, steps_x, NUM_LEVELS) + of_level(level, shifts_x, NUM_LEVELS)
    ay = y.to(tl.float32) * of_level(level, steps_y, NUM_LEVELS) + of_level(level, shifts_y, NUM_LEVELS)
    left, top = ax - half_w, ay - half_h
    aw, ah = ax + half_w - left, ay + half_h - top

    deltas_ptr = of_level(level, deltas_ptrs, NUM_LEVELS)
    deltas_ptr += _offset(image, anchor * 4, y, x, strides, level, NUM_LEVELS)
    next_delta = decode_int(of_level(level, strides[1], NUM_LEVELS))
    dx = tl.load(deltas_ptr, mask=real, other=0.0)
    dy = tl.load(deltas_ptr + next_delta, mask=real, other=0.0)
    dw = tl.load(deltas_ptr + next_delta * 2, mask=real, other=0.0)
    dh = tl.load(deltas_ptr + next_delta * 3, mask=real, other=0.0)
    dx, dy, dw, dh = dx.to(tl.float32), dy.to(tl.float32), dw.to(tl.float32), dh.to(tl.float32)
    x, y, half_w, half_h, bad, _, _ = decode_delta(
        dx, dy, dw, dh, left + 0.5 * aw, top + 0.5 * ah, aw, ah, 1.0, 1.0, 1.0, 1.0, scale_clamp
    )
    empty = bad | (real == 0)
    x1, y1 = tl.where(empty, 0.0, x - half_w), tl.where(empty, 0.0, y - half_h)
    x2, y2 = tl.where(empty, 0.0, x + half_w), tl.where(empty, 0.0, y + half_h)

    shrunk = tl.exp(-tl.abs(logit))  # at most 1, so that nothing overflows
    score = tl.math.div_rn(tl.where(logit < 0, shrunk, 1.0), 1.0 + shrunk)
    score = tl.where(real, score, 0.0)
    is_nan = (logit != logit) | (dx != dx) | (dy != dy) | (dw != dw) | (dh != dh)
    good = real & (is_nan == 0) & (score >= score_threshold)
    _store_candidates(
        boxes_ptr, scores_ptr, valid_ptr, sizes_ptr, image, row * K + slot, mask, x1, y1, x2, y2, score, good,
        min_size, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["P", "Cls", "score_n", "score_p", "score_c", "box_n", "box_p", "box_c"])
def _class_candidates_kernel(
    out_boxes_ptr,  # [N * Cls, P, 4] float32
    out_scores_ptr,  # [N * Cls, P] float32
    out_valid_ptr,  # [N * Cls, P] bytes
    scores_ptr,  # [N, P, Cls], any strides
    boxes_ptr,  # [N, P, Cls, 4], strides in boxes
    valid_ptr,  # [N, P] bytes
    sizes_ptr,  # [N, 2] height, width
    P,
    Cls,
    score_n,
    score_p,
    score_c,
    box_n,
    box_p,
    box_c,  # 0: the classes share their boxes
    min_size,
    score_threshold,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(P, BLOCK)
    segment = (tl.program_id(0) // blocks).to(tl.int64)
    slot = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    image, label = segment // Cls, segment % Cls
    mask = slot < P
    score = tl.load(scores_ptr + image * score_n + slot * score_p + label * score_c, mask=mask, other=0.0)
    score = score.to(tl.float32)
    good = (tl.load(valid_ptr + image * P + slot, mask=mask, other=0) != 0) & (score > score_threshold)
    x1, y1, x2, y2 = load4(boxes_ptr, image * box_n + slot * box_p + label * box_c, mask, BLOCK, tl.float32)
    _store_candidates(
        out_boxes_ptr, out_scores_ptr, out_valid_ptr, sizes_ptr, image, segment * P + slot, mask, x1, y1, x2, y2,
        score, good, min_size, BLOCK,
    )  # fmt: skip


def _level_strides(maps: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    """(n, c, h, w), each of all levels."""
    return tuple(encode_ints(x.stride(axis) for x in maps) for axis in range(4))


def _one_dtype(maps: Sequence[Tensor]) -> list[Tensor]:
    """A kernel picks one of several pointers, which must be of one type."""
    return list(maps) if len({x.dtype for x in maps}) == 1 else [x.float() for x in maps]


def _empty_candidates(segments: int, slots: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty((segments, slots, 4), dtype=torch.float32, device=like.device),
        torch.empty((segments, slots), dtype=torch.float32, device=like.device),
        torch.empty((segments, slots), dtype=torch.bool, device=like.device),
    )


def _num_candidates(objectness: Sequence[Tensor], top_n: int) -> int:
    return max(min(top_n, x.shape[1:].numel()) for x in objectness)


def _falling_keys(objectness: Sequence[Tensor], geometry: dict[str, tuple[int, ...]], K: int) -> Tensor:
    """The keys [N * L, K] of each level's K best logits, best first; padding behind those of a smaller level."""
    objectness = _one_dtype(objectness)
    rows = len(objectness) * objectness[0].shape[0]
    blocks = cdiv(max(x.shape[1:].numel() for x in objectness), BLOCK_KEYS)
    keys = torch.empty((rows, blocks * BLOCK_KEYS), dtype=torch.int64, device=objectness[0].device)
    _rpn_keys_kernel[(rows * blocks,)](
        keys_ptr=keys,
        logits_ptrs=tuple(objectness),
        strides=_level_strides(objectness),
        **geometry,
        blocks=blocks,
        NUM_LEVELS=len(objectness),
        BLOCK=BLOCK_KEYS,
        enable_fp_fusion=True,
    )
    return keys.topk(K, dim=1).values


def rpn_candidates_fwd(
    objectness: Sequence[Tensor],
    deltas: Sequence[Tensor],
    image_sizes: Tensor,
    half_sides: Sequence[float],
    steps: Sequence[float],
    offset: float,
    top_n: int,
    scale_clamp: float,
    min_size: float,
    score_threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch; as `rpn_candidates`."""
    L, K = len(objectness), _num_candidates(objectness, top_n)
    boxes, scores, valid = _empty_candidates(L * objectness[0].shape[0], K, objectness[0])
    if not scores.numel():
        return boxes, scores, valid
    deltas = _one_dtype(deltas)
    per_cell = [x.shape[1] for x in objectness]
    geometry = {
        "widths": encode_ints(max(x.shape[3], 1) for x in objectness),  # divisors, even of an empty map
        "per_cell": encode_ints(per_cell),
        "lengths": encode_ints(x.shape[1:].numel() for x in objectness),
    }
    with on_device(boxes):
        _rpn_candidates_kernel[(len(boxes) * cdiv(K, BLOCK),)](
            boxes_ptr=boxes,
            scores_ptr=scores,
            valid_ptr=valid.view(torch.uint8),
            keys_ptr=_falling_keys(objectness, geometry, K),
            sizes_ptr=image_sizes.contiguous(),
            deltas_ptrs=tuple(deltas),
            strides=_level_strides(deltas),
            **geometry,
            first_shapes=encode_ints(sum(per_cell[:level]) for level in range(L)),
            half_widths=tuple(half_sides[::2]),
            half_heights=tuple(half_sides[1::2]),
            steps_y=tuple(steps[::2]),
            steps_x=tuple(steps[1::2]),
            shifts_y=tuple(offset * step for step in steps[::2]),
            shifts_x=tuple(offset * step for step in steps[1::2]),
            K=K,
            scale_clamp=scale_clamp,
            min_size=min_size,
            score_threshold=score_threshold,
            NUM_LEVELS=L,
            NUM_SHAPES=sum(per_cell),
            BLOCK=BLOCK,
            enable_fp_fusion=False,  # anchors and boxes are rounded product by product, as the reference's
        )
    return boxes, scores, valid


def class_candidates_fwd(
    class_scores: Tensor,
    boxes: Tensor,
    valid: Tensor,
    image_sizes: Tensor,
    score_threshold: float,
    min_size: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch; as `class_candidates`."""
    N, P, Cls = class_scores.shape
    out_boxes, out_scores, out_valid = _empty_candidates(N * Cls, P, class_scores)
    if not out_scores.numel():
        return out_boxes, out_scores, out_valid
    if boxes.stride(3) != 1 or any(stride % 4 for stride in boxes.stride()[:3]):
        boxes = boxes.contiguous()
    with on_device(boxes):
        _class_candidates_kernel[(N * Cls * cdiv(P, BLOCK),)](
            out_boxes_ptr=out_boxes,
            out_scores_ptr=out_scores,
            out_valid_ptr=out_valid.view(torch.uint8),
            scores_ptr=class_scores,
            boxes_ptr=boxes,
            valid_ptr=valid.contiguous().view(torch.uint8),
            sizes_ptr=image_sizes.contiguous(),
            P=P,
            Cls=Cls,
            score_n=class_scores.stride(0),
            score_p=class_scores.stride(1),
            score_c=class_scores.stride(2),
            box_n=boxes.stride(0) // 4,
            box_p=boxes.stride(1) // 4,
            box_c=boxes.stride(2) // 4 if boxes.shape[2] > 1 else 0,
            min_size=min_size,
            score_threshold=score_threshold,
            BLOCK=BLOCK,
            enable_fp_fusion=True,
        )
    return out_boxes, out_scores, out_valid


@custom_op("rpn_candidates")
def rpn_candidates(
    objectness: Sequence[Tensor],
    deltas: Sequence[Tensor],
    image_sizes: Tensor,
    half_sides: Sequence[float],
    steps: Sequence[float],
    offset: float,
    top_n: int,
    scale_clamp: float,
    min_size: float,
    score_threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, A, H, W] and deltas [N, 4A, H, W] a level -> boxes [N * L, K, 4], scores, valid [N * L, K].

    half_sides: half width and half height of each anchor of a cell, level by level; steps: pixels a cell along y and x
    of each level; offset: of the anchors' centre inside its cell, in cells.
    """
    return rpn_candidates_fwd(
        objectness, deltas, image_sizes, half_sides, steps, offset, top_n, scale_clamp, min_size, score_threshold
    )


@rpn_candidates.register_fake
def _(
    objectness: Sequence[Tensor],
    deltas: Sequence[Tensor],
    image_sizes: Tensor,
    half_sides: Sequence[float],
    steps: Sequence[float],
    offset: float,
    top_n: int,
    scale_clamp: float,
    min_size: float,
    score_threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    segments = len(objectness) * objectness[0].shape[0]
    return _empty_candidates(segments, _num_candidates(objectness, top_n), objectness[0])


@custom_op("class_candidates")
def class_candidates(
    class_scores: Tensor,
    boxes: Tensor,
    valid: Tensor,
    image_sizes: Tensor,
    score_threshold: float,
    min_size: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """class_scores [N, P, Cls], boxes [N, P, Cls or 1, 4], valid [N, P] -> boxes [N * Cls, P, 4], scores, valid."""
    return class_candidates_fwd(class_scores, boxes, valid, image_sizes, score_threshold, min_size)


@class_candidates.register_fake
def _(
    class_scores: Tensor,
    boxes: Tensor,
    valid: Tensor,
    image_sizes: Tensor,
    score_threshold: float,
    min_size: float,
) -> tuple[Tensor, Tensor, Tensor]:
    N, P, Cls = class_scores.shape
    return _empty_candidates(N * Cls, P, class_scores)
