"""The kernels around the NMS of proposals and detections compile for every architecture."""

import pytest

from tests.compile_only.harness import CHIPS, Case, Target, check, every, registers
from tmask_kernels.ops.proposals.kernels import candidates as kernels_candidates
from tmask_kernels.ops.proposals.kernels import select as kernels_select

pytestmark = pytest.mark.compile_only

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
LEVELS, SHAPES = 5, 15  # a pyramid with three anchors a cell


def _levels(kind: str) -> tuple[str, ...]:
    return (kind,) * LEVELS


def _keys_target(arch: str, dtype: str) -> Target:
    """A thread makes `share` keys: of each it holds index, logit and key and the address of the logit."""
    share = kernels_candidates.BLOCK_KEYS // (4 * CHIPS[arch].lanes)
    item = _BYTES[dtype]
    return Target(
        # Of the level: a pointer and four strides in 64 bits, width, length, anchors of a cell.
        registers=registers(values=3 * share + 13, bytes_in_flight=share * item, pointers=share + 1),
        load_bytes=item,
        store_bytes=16,
        trips=(1,),
        outputs=share,
        loads_per_output=1,
        bytes_in_flight=share * item,
    )


def _keys(dtype: str) -> Case:
    return Case(
        name=f"rpn_proposals keys {dtype}",
        kernel=kernels_candidates._rpn_keys_kernel,
        signature={
            "keys_ptr": "*i64",
            "logits_ptrs": _levels(f"*{dtype}"),
            "strides": (_levels("i32"),) * 4,
            "widths": _levels("i32"),
            "per_cell": _levels("i32"),
            "lengths": _levels("i32"),
            "blocks": "i32",
        },
        constexprs={"NUM_LEVELS": LEVELS, "BLOCK": kernels_candidates.BLOCK_KEYS},
        divisible_by_16=["keys_ptr", "logits_ptrs"],
        target=lambda arch: _keys_target(arch, dtype),
    )


def _candidates_target(arch: str, dtype: str) -> Target:
    """A thread makes a candidate, on AMD every second does: deltas, anchor, box, score and key, and their addresses."""
    outputs = kernels_candidates.BLOCK / (4 * CHIPS[arch].lanes)
    return Target(
        # Of the level: a pointer and four strides in 64 bits, three integers, four floats; of the image its limits.
        registers=registers(values=4 + 4 + 4 + 4 + 10 + 3 + 4 + 2, pointers=4 + 1 + 3),
        load_bytes=8,
        store_bytes=16,
        trips=(1,),
        outputs=outputs,
        loads_per_output=7 / outputs,  # a key, two limits, four deltas
        bytes_in_flight=4 * _BYTES[dtype],
    )


def _candidates(dtype: str) -> Case:
    shapes = ("fp32",) * SHAPES
    floats = dict.fromkeys(("steps_y", "steps_x", "shifts_y", "shifts_x"), _levels("fp32"))
    integers = dict.fromkeys(("widths", "per_cell", "lengths", "first_shapes"), _levels("i32"))
    return Case(
        name=f"rpn_proposals candidates {dtype}",
        kernel=kernels_candidates._rpn_candidates_kernel,
        signature={
            "boxes_ptr": "*fp32",
            "scores_ptr": "*fp32",
            "valid_ptr": "*u8",
            "keys_ptr": "*i64",
            "sizes_ptr": "*i64",
            "deltas_ptrs": _levels(f"*{dtype}"),
            "strides": (_levels("i32"),) * 4,
            **integers,
            "half_widths": shapes,
            "half_heights": shapes,
            **floats,
            "K": "i32",
            "scale_clamp": "fp32",
            "min_size": "fp32",
            "score_threshold": "fp32",
        },
        constexprs={"NUM_LEVELS": LEVELS, "NUM_SHAPES": SHAPES, "BLOCK": kernels_candidates.BLOCK},
        divisible_by_16=["boxes_ptr", "scores_ptr", "valid_ptr", "keys_ptr", "sizes_ptr", "deltas_ptrs"],
        enable_fp_fusion=False,
        target=lambda arch: _candidates_target(arch, dtype),
    )


def _classes_target(arch: str, dtype: str) -> Target:
    """A thread makes a candidate: a box, its score, and whether it is valid."""
    outputs = kernels_candidates.BLOCK / (4 * CHIPS[arch].lanes)
    return Target(
        registers=registers(values=4 + 2 + 2 + 2, pointers=3 + 3),  # and two limits, and the segment
        load_bytes=16,
        store_bytes=16,
        trips=(1,),
        outputs=outputs,
        loads_per_output=5 / outputs,  # a box, a score, whether it is valid, two limits
        bytes_in_flight=16 + _BYTES[dtype] + 1,
    )


def _classes(dtype: str) -> Case:
    integers = ("P", "Cls", "score_n", "score_p", "score_c", "box_n", "box_p", "box_c")
    pointers = {
        "out_boxes_ptr": "*fp32",
        "out_scores_ptr": "*fp32",
        "out_valid_ptr": "*u8",
        "scores_ptr": f"*{dtype}",
        "boxes_ptr": "*fp32",
        "valid_ptr": "*u8",
        "sizes_ptr": "*i64",
    }
    return Case(
        name=f"detections candidates {dtype}",
        kernel=kernels_candidates._class_candidates_kernel,
        signature={**pointers, **dict.fromkeys(integers, "i32"), "min_size": "fp32", "score_threshold": "fp32"},
        constexprs={"BLOCK": kernels_candidates.BLOCK},
        # The scores are a softmax without its first column.
        divisible_by_16=[name for name in pointers if name != "scores_ptr"],
        target=lambda arch: _classes_target(arch, dtype),
    )


def _kept_target(arch: str) -> Target:
    """A thread makes `share` keys: of each it holds position, score and key, and the address of the score."""
    share = kernels_select.BLOCK_KEYS // (4 * CHIPS[arch].lanes)
    return Target(
        registers=registers(values=5 * share, pointers=share + 2),
        load_bytes=16,  # two positions
        store_bytes=16,
        trips=(1,),
        outputs=share,
        loads_per_output=1.5,
        bytes_in_flight=share * 12,
    )


def _take_target(arch: str) -> Target:
    """A thread takes a row, on AMD every second does: its key, the next key, its box."""
    outputs = kernels_select.BLOCK / (4 * CHIPS[arch].lanes)
    return Target(
        registers=registers(values=4 + 4 + 3, pointers=2 + 4),
        load_bytes=16,
        store_bytes=16,
        trips=(1,),
        outputs=outputs,
        loads_per_output=3 / outputs,
        bytes_in_flight=16,
    )


def _kept(box_first: bool) -> Case:
    return Case(
        name="detections kept" if box_first else "rpn_proposals kept",
        kernel=kernels_select._kept_keys_kernel,
        signature={"keys_ptr": "*i64", "kept_ptr": "*i64", "scores_ptr": "*fp32"}
        | dict.fromkeys(("K", "M", "G", "count"), "i32"),
        constexprs={"BOX_FIRST": box_first, "BLOCK": kernels_select.BLOCK_KEYS},
        divisible_by_16=["keys_ptr", "kept_ptr", "scores_ptr", "count"],
        target=_kept_target,
    )


def _take(box_first: bool) -> Case:
    pointers = {
        "out_boxes_ptr": "*fp32",
        "out_scores_ptr": "*fp32",
        "segments_ptr": "*i64",
        "counts_ptr": "*i64",
        "keys_ptr": "*i64",
        "boxes_ptr": "*fp32",
    }
    return Case(
        name="detections take" if box_first else "rpn_proposals take",
        kernel=kernels_select._take_kernel,
        signature=pointers | dict.fromkeys(("K", "G", "D", "num_keys"), "i32"),
        constexprs={"BOX_FIRST": box_first, "BLOCK": kernels_select.BLOCK},
        divisible_by_16=list(pointers),
        target=_take_target,
    )


CASES = [
    *(_keys(dtype) for dtype in ("fp32", "bf16")),
    *(_candidates(dtype) for dtype in ("fp32", "bf16")),
    *(_classes(dtype) for dtype in ("fp32", "bf16")),
    *(_kept(box_first) for box_first in (False, True)),
    *(_take(box_first) for box_first in (False, True)),
]


@every(CASES)
def test_budget(case: Case, arch: str) -> None:
    check(case, arch)
