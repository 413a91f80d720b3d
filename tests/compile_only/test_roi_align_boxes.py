"""RoIAlign's gradient to the boxes compiles for every architecture. What a thread should cost: see `_target`."""

import pytest

from tests.compile_only.harness import CHIPS, Case, Target, check, every, registers
from tmask_kernels.ops.roi_align.kernels import boxes as kernels_boxes

pytestmark = pytest.mark.compile_only

_BYTES = {"fp32": 4, "bf16": 2}
TAPS = 4  # of a bilinear sample, and of a row of a bicubic one
SUMS = 4  # of slopes along y and x, with the start and with the end of the box
BOX_LOADS = 5  # four corners, and whether the box is valid or which image it is of
CHANNELS = 256


def _target(
    arch: str,
    tile: kernels_boxes.SlopeTile,
    dtype: str,
    size: int,
    *,
    channels_last: bool,
    sampling_ratio: int,
    cubic: float | None,
) -> Target:
    """A thread owns `share` elements of the tile; each tap of them is `accesses` loads, one address each.

    It keeps the gradient of the output of each element and four sums of each access; for each access a position, a
    weight and how far the sample moves with either corner; the taps of one sample as they arrive and the two slopes
    made of them. Of a bicubic sample the taps are those of one of its four rows, whose value and slope come to the
    sample's two, and each weight has a slope. In the end the four results are summed over the warps in shared memory,
    one after another.
    """
    item = _BYTES[dtype]
    share = tile.block_pw * tile.block_c // (tile.num_warps * CHIPS[arch].lanes)
    width = min(16, share * item) if channels_last else item  # half as much of bf16 by the 64 lanes of AMD
    accesses = max(1, share * item // width)
    under_way = TAPS * share * item  # taps requested
    values = share * item // 4 + SUMS * accesses + 4 * accesses + 2 * share
    if sampling_ratio == 0:  # the first sample and the number of samples of each bin
        values += 2 * accesses
    if cubic is not None:
        values += 2 * share + accesses
    samples = sampling_ratio**2
    rows = 1 if cubic is None else 4
    executed = BOX_LOADS + accesses + accesses * TAPS * rows * samples
    outputs = share * size / tile.block_pw  # the tile is a power of two wide
    return Target(
        registers=registers(values=values, bytes_in_flight=under_way, pointers=TAPS * accesses),
        shared=4 * tile.num_warps,
        load_bytes=width,
        store_bytes=4,
        atomic_bytes=0,
        loads=BOX_LOADS + accesses + TAPS * accesses if sampling_ratio == 0 else None,
        trips=None if sampling_ratio == 0 else (1, sampling_ratio, samples, rows * samples),
        outputs=outputs,
        loads_per_output=None if sampling_ratio == 0 else executed / outputs,
        bytes_in_flight=under_way,
    )


def _case(
    name: str,
    *,
    dtype: str,
    size: int = 7,
    channels_last: bool = True,
    sampling_ratio: int = 2,
    levels: int = 4,
    cubic: float | None = None,
    aligned: bool = True,
) -> Case:
    """Four levels take padded boxes [N, P, 4] with a mask, one takes boxes [K, 5]."""
    tile = kernels_boxes.pick_slope_tile(CHANNELS, size, _BYTES[dtype], channels_last, cubic)
    padded = levels > 1
    strides = ("i32", "=1", "i32", "i32") if channels_last else ("i32", "i32", "i32", "=1")
    divisible = ["sums_ptr", "out_grad_ptr", "feature_ptrs", "boxes_ptr", "valid_ptr", "C"]
    return Case(
        name=f"roi_align boxes {name}",
        kernel=kernels_boxes._box_gradient_kernel,
        signature={
            "sums_ptr": "*fp32",
            "out_grad_ptr": f"*{dtype}",
            "feature_ptrs": (f"*{dtype}",) * levels,
            "boxes_ptr": "*fp32",
            "valid_ptr": "*u8" if padded else "*fp32",
            "num_images": "i32",
            "boxes_an_image": "i32",
            "C": "i32",
            "heights": ("fp32",) * levels,
            "widths": ("fp32",) * levels,
            "out_grad_strides": strides,
            "feature_strides": (strides,) * levels,
            "scales": ("fp32",) * levels,
            "thresholds": ("fp32",) * max(1, levels - 1),
        },
        constexprs={
            "PH": size,
            "PW": size,
            "BLOCK_PW": tile.block_pw,
            "BLOCK_C": tile.block_c,
            "NUM_LEVELS": levels,
            "SAMPLING_RATIO": sampling_ratio,
            "CUBIC": cubic,
            "ALIGNED": aligned,
            "PADDED": padded,
            "HAS_VALID": padded,
            "FEATURE_STRIDE_C_IS_1": channels_last,
            "OUT_GRAD_STRIDE_C_IS_1": channels_last,
            "GROUP": 16 // _BYTES[dtype] if channels_last else 1,
            "ACC": kernels_boxes.tl.float32,
        },
        # 256 channels divide every stride of a channels_last tensor; of the others, widths may be odd.
        divisible_by_16=divisible + (["out_grad_strides", "feature_strides"] if channels_last else []),
        num_warps=tile.num_warps,
        max_registers=tile.max_registers,
        enable_fp_fusion=False,
        wide=channels_last,
        target=lambda arch: _target(
            arch, tile, dtype, size, channels_last=channels_last, sampling_ratio=sampling_ratio, cubic=cubic
        ),
    )


CASES = [
    _case("bf16 channels_last 7x7", dtype="bf16"),
    _case("fp32 channels_last 7x7", dtype="fp32"),
    _case("bf16 channels_last 14x14", dtype="bf16", size=14),
    _case("bf16 channels_last 7x7 adaptive", dtype="bf16", sampling_ratio=0),
    _case("fp32 contiguous 7x7", dtype="fp32", channels_last=False),
    _case("fp32 contiguous 7x7 one level, not aligned", dtype="fp32", channels_last=False, levels=1, aligned=False),
    _case("bf16 channels_last 7x7 bicubic", dtype="bf16", cubic=-0.5),
    _case("bf16 channels_last 7x7 bicubic adaptive", dtype="bf16", cubic=-0.5, sampling_ratio=0),
    _case("fp32 contiguous 7x7 bicubic", dtype="fp32", channels_last=False, cubic=-0.5),
]


@every(CASES)
def test_budget(case: Case, arch: str) -> None:
    check(case, arch)
