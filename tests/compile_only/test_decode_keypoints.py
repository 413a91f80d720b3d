"""Keypoint decoding compiles for every architecture."""

import pytest

from tests.compile_only.harness import CHIPS, Case, Target, check, every, registers
from tmask_kernels.ops.decode_keypoints import kernels

pytestmark = pytest.mark.compile_only

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
BOX_LOADS = 5  # four corners, and whether the box is valid
TAPS = 4
SIDE = 56


def _case(name: str, *, dtype: str, contiguous: bool = True) -> Case:
    """A lane keeps the largest of its cells, their places and whether they are numbers, while others come in; or, in
    the search, a value and a place of its pixels, with the taps of one row of cells under way; or, of its patches, the
    bounds of four rows and four columns' offsets.
    """
    block_w = 64
    item = _BYTES[dtype]

    def target(arch: str) -> Target:
        lanes = CHIPS[arch].lanes
        cells, pixels = kernels.BLOCK // lanes, kernels.TILE_Y * kernels.TILE_X // lanes
        patches = max(1, block_w // lanes)
        width = min(16, cells * item) if contiguous else item
        return Target(
            registers=registers(values=3 * cells, bytes_in_flight=cells * item, pointers=0 if contiguous else cells),
            load_bytes=width,
            store_bytes=4,
            atomic_bytes=0,
            # The largest cell; two searches of 4 x 4 taps; the first row's bounds, and each other's.
            loads=BOX_LOADS + cells * item // width + 2 * TAPS * TAPS * pixels + 2 * TAPS * patches,
            bytes_in_flight=cells * item,
        )

    return Case(
        name=f"decode_keypoints {name}",
        kernel=kernels._decode_keypoints_kernel,
        signature={
            "xy_ptr": "*fp32",
            "scores_ptr": "*fp32",
            "maps_ptr": f"*{dtype}",
            "boxes_ptr": "*fp32",
            "valid_ptr": "*u8",
            **dict.fromkeys(("D", "K", "H", "W", "num_cells", "stride_n", "stride_d", "stride_k"), "i32"),
            **({} if contiguous else {"stride": "i32"}),
        },
        constexprs={
            **({"stride": 1} if contiguous else {}),
            "HAS_VALID": True,
            "A": kernels.KEYS,
            "OVERSHOOT": kernels.OVERSHOOT,
            "MARGIN": kernels.MARGIN,
            "MAX_GRID": kernels.MAX_GRID,
            "MAX_LOGIT": kernels.MAX_LOGIT,
            "BLOCK": kernels.BLOCK,
            "BLOCK_W": block_w,
            "TILE_Y": kernels.TILE_Y,
            "TILE_X": kernels.TILE_X,
        },
        # Maps of 56 x 56 cells are a multiple of 16 elements apart.
        divisible_by_16=["xy_ptr", "scores_ptr", "maps_ptr", "boxes_ptr", "valid_ptr", "num_cells"]
        + (["stride_n", "stride_d", "stride_k"] if contiguous else []),
        num_warps=1,
        enable_fp_fusion=False,
        wide=contiguous,
        target=target,
    )


CASES = [
    _case("fp32", dtype="fp32"),
    _case("bf16", dtype="bf16"),
    _case("fp16", dtype="fp16"),
    _case("bf16 channels_last", dtype="bf16", contiguous=False),
]


@every(CASES)
def test_budget(case: Case, arch: str) -> None:
    check(case, arch)
