"""The matching kernels compile for every architecture; a box is one 16-byte load."""

import pytest

from tests.compile_only.harness import CHIPS, Case, Target, check, every, registers
from tmask_kernels.ops.match_anchors import kernels

pytestmark = pytest.mark.compile_only

_BLOCK = kernels.pick_block()
_SHARED = {
    "anchors_ptr": "*fp32",
    "gt_ptr": "*fp32",
    "valid_ptr": "*u8",
    "num_images": "i32",
    "A": "i32",
    "G": "i32",
    "anchors_an_image": "i32",
}
_MATCH = {
    "matches_ptr": "*i64",
    "ious_ptr": "*fp32",
    **_SHARED,
    "crowd_ptr": "*u8",
    "best_of_gt_ptr": "*fp32",
    "high": "fp32",
    "low": "fp32",
}


def _target(arch: str, *, matching: bool, low_quality: bool, crowd: bool) -> Target:
    """A thread holds t anchors, and in the loop over ground truth a box and its IoU with each of them."""
    t = _BLOCK.anchors // (_BLOCK.num_warps * CHIPS[arch].lanes)
    # Of each anchor: corners, area, and of its IoU the intersection, the union and two terms of the quotient. Matching
    # also keeps the best, its index, and whether the rules of low quality and of crowds lift it (predicates or not).
    anchor = 9 + (2 + low_quality + crowd if matching else 0)
    box = 5 + 5  # corners and area; bounds of the anchors, the bits left
    pointers = 4 + matching * (1 + low_quality + crowd)
    return Target(
        registers=registers(values=t * anchor + box, pointers=pointers),
        load_bytes=16,
        # Neighbouring anchors belong to neighbouring threads.
        store_bytes=8 if matching else None,
        atomic_bytes=None if matching or arch.startswith("gfx") else 4,  # amdgcn names no width in global_atomic_smax
        # The anchors; of 32 boxes one a thread and its flags; the box at hand by its numbers, and its best IoU.
        loads=t + 2 + 4 + matching * (low_quality + 5 * crowd),
    )


def _case(name: str, *, matching: bool, low_quality: bool = True, crowd: bool = False) -> Case:
    constexprs: dict[str, object] = {"BLOCK": _BLOCK.anchors}
    if matching:
        constexprs |= {"LOW_QUALITY": low_quality, "HAS_CROWD": crowd}
    return Case(
        name=name,
        kernel=kernels._match_kernel if matching else kernels._best_of_gt_kernel,
        signature=_MATCH if matching else {"best_ptr": "*i32", **_SHARED},
        constexprs=constexprs,
        divisible_by_16=["anchors_ptr", "gt_ptr", "matches_ptr", "ious_ptr"] if matching else ["anchors_ptr", "gt_ptr"],
        num_warps=_BLOCK.num_warps,
        enable_fp_fusion=False,
        target=lambda arch: _target(arch, matching=matching, low_quality=low_quality, crowd=crowd),
    )


CASES = [
    _case("match_anchors best of gt", matching=False),
    _case("match_anchors", matching=True),
    _case("match_anchors crowd", matching=True, crowd=True),
    _case("match_anchors plain", matching=True, low_quality=False),
]


@every(CASES)
def test_budget(case: Case, arch: str) -> None:
    check(case, arch)
