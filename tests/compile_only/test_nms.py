"""The NMS kernel compiles for every architecture."""

import pytest

from tests.compile_only.harness import CHIPS, Case, Target, check, every, registers
from tmask_kernels.ops.nms import kernels

pytestmark = pytest.mark.compile_only


def _target(arch: str, *, groups: bool) -> Target:
    """The tile of IoUs decides: t of them a thread, of the r rows and c columns with r c = t and the smallest r + c."""
    tile = kernels.BLOCK**2 // (kernels.NUM_WARPS * CHIPS[arch].lanes)
    edge = min(rows + tile // rows for rows in range(1, tile + 1) if tile % rows == 0)
    # Of each IoU: hits, the comparison, the intersection and its two sides. Of each row and column: box and area.
    values = 5 * tile + (5 + 2 * groups) * edge
    return Target(
        registers=registers(values=values, pointers=10 + 2 * groups),
        # Reducing the tile over its rows, each warp hands one partial result a column to the others.
        shared=4 * kernels.BLOCK * kernels.NUM_WARPS,
        load_bytes=16,  # a box
        store_bytes=16,
        # The threshold; of the block state, box and position; of the kept list a box.
        loads=5 + 2 * groups,
    )


def _case(name: str, *, groups: bool) -> Case:
    return Case(
        name=name,
        kernel=kernels._padded_nms_kernel,
        signature={
            "indices_ptr": "*i64",
            "counts_ptr": "*i64",
            "kept_ptr": "*fp32",
            "kept_groups_ptr": "*i64",
            "boxes_ptr": "*fp32",
            "order_ptr": "*i64",
            "state_ptr": "*i8",
            "groups_ptr": "*i64",
            "thresholds_ptr": "*fp32",
            "K": "i32",
            "M": "i32",
        },
        constexprs={"HAS_GROUPS": groups, "BLOCK": kernels.BLOCK},
        divisible_by_16=["boxes_ptr", "kept_ptr"],
        num_warps=kernels.NUM_WARPS,
        enable_fp_fusion=False,
        target=lambda arch: _target(arch, groups=groups),
    )


CASES = [_case("padded_nms", groups=False), _case("padded_nms groups", groups=True)]


@every(CASES)
def test_budget(case: Case, arch: str) -> None:
    check(case, arch)
