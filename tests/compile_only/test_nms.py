"""The NMS kernel compiles for every target within its budget."""

import pytest

from tests.compile_only.harness import Budget, Case, check, every
from tmask_kernels.ops.nms import kernels

pytestmark = pytest.mark.compile_only


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
        budget=Budget(registers=128, shared=2048),
    )


CASES = [_case("padded_nms", groups=False), _case("padded_nms groups", groups=True)]


@every(CASES)
def test_budget(case: Case, target: str) -> None:
    check(case, target)
