"""Matching anchors to ground truth in Triton. Letters: N images, A anchors, G ground-truth boxes (padded).

One program holds BLOCK anchors of one image. Most ground truth lies nowhere near them: it is held, 32 boxes at a time,
against the bounding box of the anchors, and only those that reach into it are gone through, each against all anchors of
the program at once. This gives each anchor its best ground truth, and each ground truth its best IoU among the anchors
of the program and, by an atomic maximum, among all: a maximum does not hang on the order, so it is deterministic. The
low-quality rule is a second launch, in which only programs that hold the best of any ground truth have work to do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.kernels.boxes import load4
from ...common.kernels.numbers import lowest_bit
from ...common.launch import cdiv, on_device
from ...namespace import custom_op
from .reference import BACKGROUND, CROWD_COVER, IGNORED

_BACKGROUND, _IGNORED, _CROWD_COVER = tl.constexpr(BACKGROUND), tl.constexpr(IGNORED), tl.constexpr(CROWD_COVER)


@triton.jit
def _load_anchors(anchors_ptr, num_images, A, anchors_an_image, BLOCK: tl.constexpr):
    """This program's image, its anchors, which of them exist, their corners and their bounding box."""
    n = (tl.program_id(0) % num_images).to(tl.int64)
    # The largest anchors come last and meet the most ground truth: they start first.
    block = tl.cdiv(A, BLOCK) - 1 - tl.program_id(0) // num_images
    rows = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < A
    x1, y1, x2, y2 = load4(anchors_ptr, n * anchors_an_image + rows, mask, BLOCK, tl.float32, float("nan"))
    # Minima and maxima pass over NaN.
    return n, rows, mask, x1, y1, x2, y2, tl.min(x1, 0), tl.min(y1, 0), tl.max(x2, 0), tl.max(y2, 0)


@triton.jit
def _reaches(gt_ptr, rows, mask, left, top, right, bottom):
    """Which boxes `rows` [32] overlap the bounding box. One whose area is NaN overlaps nothing."""
    x1, y1, x2, y2 = load4(gt_ptr, rows, mask, 32, tl.float32, float("nan"))
    area = (x2 - x1) * (y2 - y1)
    across = tl.minimum(x2, right) > tl.maximum(x1, left)
    return across & (tl.minimum(y2, bottom) > tl.maximum(y1, top)) & (area == area)


@triton.jit
def _to_bits(flags):
    """Flags [32] as the bits of a uint32."""
    return tl.sum(flags.to(tl.int32) << tl.arange(0, 32), 0).to(tl.uint32, bitcast=True)


@triton.jit
def _intersection(x1, y1, x2, y2, box_ptr):
    """Area of the overlap of anchors [BLOCK] and one box, and the area of that box."""
    bx1, by1, bx2, by2 = tl.load(box_ptr), tl.load(box_ptr + 1), tl.load(box_ptr + 2), tl.load(box_ptr + 3)
    width = tl.maximum(tl.minimum(x2, bx2) - tl.maximum(x1, bx1), 0.0)
    height = tl.maximum(tl.minimum(y2, by2) - tl.maximum(y1, by1), 0.0)
    return width * height, (bx2 - bx1) * (by2 - by1)


@triton.jit
def _iou(x1, y1, x2, y2, box_ptr):
    """IoU of anchors [BLOCK] and one box; 0 where it is no number."""
    inter, area = _intersection(x1, y1, x2, y2, box_ptr)
    union = area + (x2 - x1) * (y2 - y1) - inter
    overlaps = (inter > 0) & (union > 0)
    # IEEE division has a slow path for 0, NaN and inf, which one thread takes for its whole warp: no such input.
    return tl.where(overlaps, tl.math.div_rn(tl.where(overlaps, inter, 1.0), tl.where(overlaps, union, 1.0)), 0.0)


@triton.jit(do_not_specialize=["num_images", "A", "G", "anchors_an_image"])
def _match_kernel(
    matches_ptr,  # [N, A] int64
    ious_ptr,  # [N, A] float32
    index_ptr,  # [N, A] int32: the best ground truth of each anchor; this and the next two only with LOW_QUALITY
    best_ptr,  # [N, G] int32: the bits of float32, which rise with a number that is not negative; zeros before
    here_ptr,  # [programs, G] int32: the best of each ground truth among the anchors of one program, as bits
    anchors_ptr,  # [N or 1, A, 4] float32
    gt_ptr,  # [N, G, 4] float32
    valid_ptr,  # [N, G] bytes
    crowd_ptr,  # [N, G] bytes, only with HAS_CROWD
    num_images,
    A,
    G,
    anchors_an_image,  # A; 0 if all images share the same
    high,
    low,
    LOW_QUALITY: tl.constexpr,
    HAS_CROWD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, anchors, exists, x1, y1, x2, y2, left, top, right, bottom = _load_anchors(
        anchors_ptr, num_images, A, anchors_an_image, BLOCK
    )
    offs = tl.arange(0, 32)
    here_ptr += tl.program_id(0).to(tl.int64) * G
    best = tl.zeros((BLOCK,), tl.float32)
    index = tl.zeros((BLOCK,), tl.int32)
    covered = tl.zeros((BLOCK,), tl.int1)  # by a crowd
    any_valid = tl.zeros((32,), tl.int32)  # reduced once, after the loop
    start = tl.full((), 0, tl.int32)
    while start < G:
        first = n * G + start
        rows, mask = first + offs, start + offs < G
        valid = tl.load(valid_ptr + rows, mask=mask, other=0) != 0
        any_valid |= valid.to(tl.int32)
        reaches = _reaches(gt_ptr, rows, mask, left, top, right, bottom)
        bits = _to_bits(reaches & valid)
        here = tl.zeros((32,), tl.int32)
        while bits != 0:
            place, bits = lowest_bit(bits)
            iou = _iou(x1, y1, x2, y2, gt_ptr + (first + place) * 4)
            better = iou > best  # the first of equals
            best = tl.where(better, iou, best)
            index = tl.where(better, start + place, index)
            if LOW_QUALITY:
                largest = tl.max(iou.to(tl.int32, bitcast=True), 0)  # of integers one instruction
                here = tl.where(offs == place, largest, here)
        if LOW_QUALITY:
            tl.store(here_ptr + start + offs, here, mask=mask)
            tl.atomic_max(best_ptr + rows, here, mask=here > 0, sem="relaxed")
        if HAS_CROWD:
            bits = _to_bits(reaches & (tl.load(crowd_ptr + rows, mask=mask, other=0) != 0))
            while bits != 0:
                place, bits = lowest_bit(bits)
                inter, _ = _intersection(x1, y1, x2, y2, gt_ptr + (first + place) * 4)
                # An anchor inverted on one axis has a negative area, and overlaps nothing.
                covered |= (inter > (x2 - x1) * (y2 - y1) * _CROWD_COVER) & (inter > 0)
        start += 32

    background = ((best < low) | (tl.max(any_valid, 0) == 0)) & (covered == 0)
    match = tl.where((best >= high) & (best > 0), index, tl.where(background, _BACKGROUND, _IGNORED))
    tl.store(matches_ptr + n * A + anchors, match.to(tl.int64), mask=exists)
    tl.store(ious_ptr + n * A + anchors, best, mask=exists)
    if LOW_QUALITY:
        tl.store(index_ptr + n * A + anchors, index, mask=exists)


@triton.jit(do_not_specialize=["num_images", "A", "G", "anchors_an_image"])
def _lift_kernel(
    matches_ptr,
    index_ptr,
    best_ptr,
    here_ptr,
    anchors_ptr,
    gt_ptr,
    num_images,
    A,
    G,
    anchors_an_image,
    BLOCK: tl.constexpr,
):
    """Apply the low-quality rule: an anchor that has the best IoU of any ground truth gets its own best one."""
    n = (tl.program_id(0) % num_images).to(tl.int64)
    offs = tl.arange(0, 32)
    here_ptr += tl.program_id(0).to(tl.int64) * G
    start = tl.full((), 0, tl.int32)
    while start < G:
        first = n * G + start
        mask = start + offs < G
        here = tl.load(here_ptr + start + offs, mask=mask, other=0)
        best = tl.load(best_ptr + first + offs, mask=mask, other=0)
        bits = _to_bits((here == best) & (here > 0))  # few programs have any
        while bits != 0:
            place, bits = lowest_bit(bits)
            _, anchors, _, x1, y1, x2, y2, _, _, _, _ = _load_anchors(
                anchors_ptr, num_images, A, anchors_an_image, BLOCK
            )
            # The same operations as before give the same bits.
            iou = _iou(x1, y1, x2, y2, gt_ptr + (first + place) * 4).to(tl.int32, bitcast=True)
            lifted = iou == tl.load(best_ptr + first + place)
            at = n * A + anchors
            tl.store(matches_ptr + at, tl.load(index_ptr + at, mask=lifted, other=0).to(tl.int64), mask=lifted)
        start += 32


class Block(NamedTuple):
    """Launch parameters: anchors of a program, and its warps."""

    anchors: int
    num_warps: int


def pick_block() -> Block:
    """One warp: no barrier for each ground truth. Few anchors: few boxes reach into their bounds, and one IoU after
    another, the time of the programs that every box reaches into, is short.

    64 anchors of an RPN in a row are 21 cells. In bench's `match-anchors` 10.5 of the 100 boxes reach into the bounds
    of 64 anchors, 14.9 into the bounds of 128 and 7.9 into the bounds of 32.
    """
    return Block(64, num_warps=1)


def match_anchors_fwd(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    gt_crowd: Tensor | None,
    high: float,
    low: float,
    allow_low_quality: bool,
) -> tuple[Tensor, Tensor]:
    """Launch; arguments and results as `match_anchors_reference`."""
    N, G = gt_valid.shape
    A = anchors.shape[1]
    matches, ious = _empty_out(anchors, gt_valid)
    if N * A == 0:
        return matches, ious
    anchors, gt_boxes = anchors.contiguous(), gt_boxes.contiguous()
    block = pick_block()
    grid = (N * cdiv(A, block.anchors),)
    valid = gt_valid.contiguous().view(torch.uint8)
    rule = {}  # what only the low-quality rule needs
    if allow_low_quality:
        rule = {
            "index_ptr": torch.empty_like(matches, dtype=torch.int32),
            "best_ptr": torch.zeros(N, G, dtype=torch.int32, device=anchors.device),
            "here_ptr": torch.empty(*grid, G, dtype=torch.int32, device=anchors.device),
        }
    shared = {
        "matches_ptr": matches,
        "anchors_ptr": anchors,
        "gt_ptr": gt_boxes,
        "num_images": N,
        "A": A,
        "G": G,
        "anchors_an_image": A if len(anchors) > 1 else 0,
        "BLOCK": block.anchors,
        "num_warps": block.num_warps,
    }
    # A fused multiply-add would round the union differently from the reference, and in one launch only.
    with on_device(anchors):
        _match_kernel[grid](
            enable_fp_fusion=False,
            ious_ptr=ious,
            valid_ptr=valid,
            crowd_ptr=valid if gt_crowd is None else gt_crowd.contiguous().view(torch.uint8),
            high=high,
            low=low,
            LOW_QUALITY=allow_low_quality,
            HAS_CROWD=gt_crowd is not None,
            **(rule or dict.fromkeys(("index_ptr", "best_ptr", "here_ptr"), matches)),
            **shared,
        )
        if allow_low_quality:
            _lift_kernel[grid](enable_fp_fusion=False, **rule, **shared)
    return matches, ious


def _empty_out(anchors: Tensor, gt_valid: Tensor) -> tuple[Tensor, Tensor]:
    shape, device = (gt_valid.shape[0], anchors.shape[1]), anchors.device
    return torch.empty(shape, dtype=torch.int64, device=device), torch.empty(shape, device=device)


@custom_op("match_anchors")
def match_anchors(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    gt_crowd: Tensor | None,
    high: float,
    low: float,
    allow_low_quality: bool,
) -> tuple[Tensor, Tensor]:
    """anchors [N or 1, A, 4], gt_boxes [N, G, 4] float32, gt_valid, gt_crowd [N, G] -> matches, ious [N, A]."""
    return match_anchors_fwd(anchors, gt_boxes, gt_valid, gt_crowd, high, low, allow_low_quality)


@match_anchors.register_fake
def _(anchors, gt_boxes, gt_valid, gt_crowd, high, low, allow_low_quality):
    return _empty_out(anchors, gt_valid)
