"""The NMS kernels compile for every architecture."""

import pytest

from tests.compile_only.harness import CHIPS, Case, Target, check, every, registers
from tmask_kernels.ops.nms.kernels import blocks as kernels_blocks
from tmask_kernels.ops.nms.kernels import padded as kernels
from tmask_kernels.ops.nms.kernels import sort as kernels_sort
from tmask_kernels.ops.soft_nms import kernels as kernels_soft

pytestmark = pytest.mark.compile_only

LAUNCH = kernels_blocks.LAUNCH
_BOXES = {"boxes_ptr": "*fp32", "order_ptr": "*i64", "state_ptr": "*i8", "groups_ptr": "*i64"}
_OUTPUTS = {"indices_ptr": "*i64", "counts_ptr": "*i64", "kept_ptr": "*fp32", "kept_groups_ptr": "*i64"}
_SIZES = {"K": "i32", "M": "i32", "width": "i32"}


def _tile(arch: str, side: int, num_warps: int) -> tuple[int, int]:
    """IoUs of a thread in a tile of side^2, and of r rows and c columns with r c as many the smallest r + c."""
    tile = side**2 // (num_warps * CHIPS[arch].lanes)
    return tile, min(rows + tile // rows for rows in range(1, tile + 1) if tile % rows == 0)


def _segment_target(arch: str, *, groups: bool) -> Target:
    tile, edge = _tile(arch, kernels.BLOCK, kernels.NUM_WARPS)
    # Of each IoU: hits, the comparison, the intersection and its two sides. Of each row and column: box and area.
    values = 5 * tile + (5 + 2 * groups) * edge
    return Target(
        registers=registers(values=values, pointers=10 + 2 * groups),
        # Reducing the tile over its rows, each warp hands one partial result a column to the others.
        shared=4 * kernels.BLOCK * kernels.NUM_WARPS,
        load_bytes=16,  # a box
        store_bytes=16,
        # The threshold; states; of the block state, box and position; of the kept list a box.
        loads=6 + 2 * groups,
    )


def _segments(name: str, *, groups: bool) -> Case:
    return Case(
        name=name,
        kernel=kernels._padded_nms_kernel,
        signature={**_OUTPUTS, **_BOXES, "thresholds_ptr": "*fp32", **_SIZES},
        constexprs={"HAS_GROUPS": groups, "BLOCK": kernels.BLOCK, "SCAN": kernels.SCAN},
        divisible_by_16=["boxes_ptr", "kept_ptr"],
        num_warps=kernels.NUM_WARPS,
        enable_fp_fusion=False,
        # Triton 3.8: two registers, stored and loaded once a block of boxes, outside the loops over IoUs.
        known_spills=8 if groups else 0,
        target=lambda arch: _segment_target(arch, groups=groups),
    )


def _step_target(arch: str, *, groups: bool) -> Target:
    tile, edge = _tile(arch, LAUNCH.tile, LAUNCH.num_warps)
    bits = LAUNCH.step**2 // 32 // (LAUNCH.num_warps * CHIPS[arch].lanes)  # words a thread holds in the last program
    boxes = max(1, LAUNCH.step // (LAUNCH.num_warps * CHIPS[arch].lanes))
    return Target(
        # The larger of the two parts: IoUs as in a program of one segment; bits, and of each box what it was and is.
        registers=registers(values=max(5 * tile + (5 + 2 * groups) * edge, bits + 4 * boxes), pointers=10 + 2 * groups),
        # A reduced tile as above; or the state of every box, which all threads need in turn.
        shared=4 * max(LAUNCH.tile * LAUNCH.num_warps, LAUNCH.step),
        load_bytes=16,
        store_bytes=16,
        # Count and threshold; state and box of the tile and of what stands before it, a box of the list; then, of the
        # last program, 16 bytes of bits at a time, and state, box and position of each of its boxes.
        loads=2 + 4 + 1 + 3 * groups + bits // 4 + (3 + groups) * boxes,
    )


def _step(name: str, *, groups: bool) -> Case:
    return Case(
        name=name,
        kernel=kernels_blocks._step_kernel,
        signature={
            **_OUTPUTS,
            **_BOXES,
            **_SIZES,
            "arrived_ptr": "*i64",
            "bits_ptr": "*i32",
            "thresholds_ptr": "*fp32",
            **dict.fromkeys(("start", "chunks", "splits"), "i32"),
        },
        constexprs={"HAS_GROUPS": groups, "STEP": LAUNCH.step, "TILE": LAUNCH.tile},
        divisible_by_16=["boxes_ptr", "kept_ptr", "bits_ptr"],
        num_warps=LAUNCH.num_warps,
        enable_fp_fusion=False,
        # Triton 3.8: the last program of a segment stores them once, beside the 64 words of bits a thread holds.
        known_spills=64 if groups else 48,
        target=lambda arch: _step_target(arch, groups=groups),
    )


def _gather(name: str, *, optional: bool) -> Case:
    def target(arch: str) -> Target:
        slots = kernels_sort.BLOCK // (4 * CHIPS[arch].lanes)
        return Target(
            # Of a slot its position, state, group and box; a pointer to each of its rows.
            registers=registers(values=slots * (4 + 4 + 2 * optional), pointers=slots * (4 + 2 * optional)),
            load_bytes=16,
            store_bytes=16,
            # Two positions at a time; score and box of each, and what else it has.
            loads=max(1, slots // 2) + slots * (2 + 2 * optional),
        )

    two = ("i32", "i32")
    return Case(
        name=name,
        kernel=kernels_sort._sorted_kernel,
        signature={
            "sorted_boxes_ptr": "*fp32",
            "state_ptr": "*i8",
            "sorted_groups_ptr": "*i64",
            "order_ptr": "*i64",
            "boxes_ptr": "*fp32",
            "scores_ptr": "*fp32",
            "valid_ptr": "*i1",
            "groups_ptr": "*i64",
            "box_strides": ("i32", "i32", "=1"),
            "score_strides": two,
            "valid_strides": two,
            "group_strides": two,
            "K": "i32",
            "slots": "i32",
        },
        constexprs={"HAS_VALID": optional, "HAS_GROUPS": optional, "BLOCK": kernels_sort.BLOCK},
        divisible_by_16=["sorted_boxes_ptr", "order_ptr", "boxes_ptr", "sorted_groups_ptr", "state_ptr", "box_strides"],
        target=target,
    )


def _soft(name: str, *, gaussian: bool) -> Case:
    def target(arch: str) -> Target:
        boxes = kernels_soft.BLOCK // (kernels_soft.NUM_WARPS * CHIPS[arch].lanes)
        return Target(
            # Of each box its corners, score, IoU and decay, and a pointer to each of these rows.
            registers=registers(values=7 * boxes + 5, pointers=2 * boxes),
            # Each warp hands its best score to the others.
            shared=4 * kernels_soft.NUM_WARPS,
            load_bytes=16,
            store_bytes=4,
            loads=1 + 2 * boxes,  # the box taken; box and score of each
        )

    return Case(
        name=name,
        kernel=kernels_soft._soft_nms_kernel,
        signature={
            "indices_ptr": "*i64",
            "taken_ptr": "*fp32",
            "count_ptr": "*i64",
            "left_ptr": "*fp32",
            "boxes_ptr": "*fp32",
            **dict.fromkeys(("iou_threshold", "sigma", "score_threshold"), "fp32"),
            "K": "i32",
        },
        constexprs={"GAUSSIAN": gaussian, "BLOCK": kernels_soft.BLOCK},
        divisible_by_16=["boxes_ptr", "left_ptr"],
        num_warps=kernels_soft.NUM_WARPS,
        enable_fp_fusion=False,
        target=target,
    )


CASES = [
    _segments("padded_nms", groups=False),
    _segments("padded_nms groups", groups=True),
    _step("padded_nms blocks", groups=False),
    _step("padded_nms blocks groups", groups=True),
    _gather("padded_nms gather", optional=False),
    _gather("padded_nms gather valid groups", optional=True),
    _soft("soft_nms linear", gaussian=False),
    _soft("soft_nms gaussian", gaussian=True),
]


@every(CASES)
def test_budget(case: Case, arch: str) -> None:
    check(case, arch)
