"""RoIAlign's forward compiles for every architecture: box head (7 x 7), mask head (14 x 14), one map of 512 channels.

What a thread should cost follows from its share of the tile, see `_target`.
"""

import pytest

from tests.compile_only.harness import CHIPS, Case, Target, check, every, registers
from tmask_kernels.ops.roi_align.kernels import forward as kernels

pytestmark = pytest.mark.compile_only

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
TAPS = 4  # of a bilinear sample, and of a row of a bicubic one
BOX_LOADS = 5  # four corners, and whether the box is valid or which image it is of


def _target(
    arch: str,
    tile: kernels.Tile,
    dtype: str,
    size: int,
    *,
    channels_last: bool,
    sampling_ratio: int,
    cubic: float | None,
) -> Target:
    """A thread owns `share` elements of the tile; each tap of them is `accesses` loads, one address each.

    It keeps a sum of each element, for each access a weight and a position, and the taps of one sample as they arrive,
    of a bicubic one those of one of its four rows.
    """
    item = _BYTES[dtype]
    share = tile.block_pw * tile.block_c // (tile.num_warps * CHIPS[arch].lanes)
    width = 16 if channels_last else item
    accesses = max(1, share * item // width)
    under_way = TAPS * share * item  # taps requested
    # Ratio 0 keeps the first sample and the number of samples of each bin.
    values = share + 2 * accesses + (2 * accesses if sampling_ratio == 0 else 0)
    samples = sampling_ratio**2
    rows = 1 if cubic is None else 4
    executed = BOX_LOADS + accesses * TAPS * rows * samples
    outputs = share * size / tile.block_pw  # the tile is a power of two wide
    return Target(
        registers=registers(values=values, bytes_in_flight=under_way, pointers=TAPS * accesses),
        load_bytes=width,
        store_bytes=width,
        loads=BOX_LOADS + TAPS * accesses if sampling_ratio == 0 else None,
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
    channels: int = 256,
    channels_last: bool = True,
    sampling_ratio: int = 2,
    levels: int = 4,
    cubic: float | None = None,
    known_spills: int = 0,
) -> Case:
    """Four levels take padded boxes [N, P, 4] with a mask, one takes boxes [K, 5]."""
    tile = kernels.pick_tile(channels, size, channels_last)
    padded = levels > 1
    level = ("i32", "=1", "i32", "i32") if channels_last else ("i32", "i32", "i32", "=1")
    signature = {
        "out_ptr": f"*{dtype}",
        "feature_ptrs": (f"*{dtype}",) * levels,
        "boxes_ptr": "*fp32",
        "valid_ptr": "*u8" if padded else "*fp32",
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
        "CUBIC": cubic,
        "ALIGNED": True,
        "PADDED": padded,
        "HAS_VALID": padded,
        "FEATURE_STRIDE_C_IS_1": channels_last,
        "OUT_STRIDE_C_IS_1": channels_last,
        "ACC": kernels.tl.float32,
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
        wide=channels_last,
        known_spills=known_spills,
        target=lambda arch: _target(
            arch, tile, dtype, size, channels_last=channels_last, sampling_ratio=sampling_ratio, cubic=cubic
        ),
    )


CASES = [
    _case("forward bf16 channels_last 7x7", dtype="bf16"),
    _case("forward fp16 channels_last 7x7", dtype="fp16"),
    _case("forward fp32 channels_last 7x7", dtype="fp32"),
    _case("forward bf16 channels_last 14x14", dtype="bf16", size=14),
    _case("forward fp32 channels_last 14x14", dtype="fp32", size=14),
    _case("forward bf16 channels_last 7x7 adaptive", dtype="bf16", sampling_ratio=0),
    _case("forward bf16 contiguous 7x7", dtype="bf16", channels_last=False),
    _case("forward fp32 contiguous 7x7", dtype="fp32", channels_last=False),
    # For the A100 ptxas spills one register to have 28 warps on an SM in place of 24; the source decides nothing here.
    _case("forward bf16 channels_last 7x7 one level", dtype="bf16", channels=512, levels=1, known_spills=8),
    _case("forward fp32 contiguous 7x7 one level", dtype="fp32", channels=512, channels_last=False, levels=1),
    _case("forward fp32 contiguous 7x7 one level adaptive", dtype="fp32", channels=512, channels_last=False, levels=1,
          sampling_ratio=0),
    _case("forward bf16 channels_last 7x7 bicubic", dtype="bf16", cubic=-0.5),
    _case("forward fp32 channels_last 7x7 bicubic", dtype="fp32", cubic=-0.5),
    # The same under Triton 3.8: 28 warps in place of 20.
    _case("forward bf16 channels_last 7x7 bicubic adaptive", dtype="bf16", cubic=-0.5, sampling_ratio=0,
          known_spills=8),
    # The same under Triton 3.6: 20 warps in place of 16.
    _case("forward fp32 contiguous 7x7 bicubic", dtype="fp32", channels_last=False, cubic=-0.5, known_spills=16),
]  # fmt: skip


@every(CASES)
def test_budget(case: Case, arch: str) -> None:
    check(case, arch)
