"""Budgets of the RoIAlign kernel: the pyramid of the box head (7 x 7) and of the mask head (14 x 14), 256 channels."""

import pytest

from tests.compile_only.harness import Budget, Case, check, every
from tmask_kernels.ops.roi_align import kernels

pytestmark = pytest.mark.compile_only


def _case(
    name: str,
    budget: Budget,
    *,
    dtype: str,
    size: int,
    channels_last: bool,
    sampling_ratio: int = 2,
    levels: int = 4,
    backward: bool = False,
) -> Case:
    tile = kernels.pick_tile(256, size, channels_last)
    # The backward adds to fp32 sums.
    level = ("i32", "=1", "i32", "i32") if channels_last else ("i32", "i32", "i32", "=1")
    signature = {
        "out_ptr": f"*{dtype}",
        "feature_ptrs": ("*fp32" if backward else f"*{dtype}",) * levels,
        "boxes_ptr": "*fp32",
        "valid_ptr": "*u8",
        "num_images": "i32",
        "boxes_an_image": "i32",
        "C": "i32",
        "heights": ("fp32",) * levels,
        "widths": ("fp32",) * levels,
        "out_strides": level,
        "feature_strides": (level,) * levels,
        "scales": ("fp32",) * levels,
        "thresholds": ("fp32",) * max(1, levels - 1),
    }
    constexprs = {
        "PH": size,
        "PW": size,
        "BLOCK_PW": tile.block_pw,
        "BLOCK_C": tile.block_c,
        "NUM_LEVELS": levels,
        "SAMPLING_RATIO": sampling_ratio,
        "ALIGNED": True,
        "PADDED": True,
        "HAS_VALID": True,
        "FEATURE_STRIDE_C_IS_1": channels_last,
        "OUT_STRIDE_C_IS_1": channels_last,
        "ACC": kernels.tl.float32,
        "BACKWARD": backward,
    }
    # 256 channels divide every stride of a channels_last tensor; of the others, widths may be odd.
    divisible = ["out_ptr", "feature_ptrs", "boxes_ptr", "valid_ptr", "C"]
    divisible += ["out_strides", "feature_strides"] if channels_last else []
    return Case(
        name=f"roi_align {name}",
        kernel=kernels._roi_align_kernel,
        signature=signature,
        constexprs=constexprs,
        divisible_by_16=divisible,
        num_warps=tile.num_warps,
        enable_fp_fusion=False,
        budget=budget,
    )


CASES = [
    _case(
        "forward bf16 channels_last 7x7",
        Budget(registers=96, load_bytes=16, store_bytes=16),
        dtype="bf16",
        size=7,
        channels_last=True,
    ),
    _case(
        "forward fp32 channels_last 14x14",
        Budget(registers=136, load_bytes=16, store_bytes=16),
        dtype="fp32",
        size=14,
        channels_last=True,
    ),
    _case(
        "forward bf16 channels_last 7x7 adaptive",
        Budget(registers=104, load_bytes=16, store_bytes=16),
        dtype="bf16",
        size=7,
        channels_last=True,
        sampling_ratio=0,
    ),
    _case(
        "forward fp32 contiguous 7x7 one level",
        Budget(registers=128, load_bytes=4, store_bytes=4),
        dtype="fp32",
        size=7,
        channels_last=False,
        levels=1,
    ),
    _case(
        "backward bf16 channels_last 7x7",
        Budget(registers=120, shared=4096, load_bytes=16, atomic_bytes={"sm_90": 16, "sm_100": 16}),
        dtype="bf16",
        size=7,
        channels_last=True,
        backward=True,
    ),
]


@every(CASES)
def test_budget(case: Case, target: str) -> None:
    check(case, target)
