"""RoIAlign's max compiles for every architecture: the largest sample with and without its index, and the gather."""

import pytest

from tests.compile_only.harness import CHIPS, Case, Target, check, every, registers
from tests.compile_only.test_roi_align import BOX_LOADS, TAPS
from tests.compile_only.test_roi_align_backward import _BOXES, _BYTES, _COUNTS, _PYRAMID, CHANNELS, LEVELS
from tmask_kernels.ops.roi_align.kernels import forward as kernels
from tmask_kernels.ops.roi_align.kernels import max as kernels_max
from tmask_kernels.ops.roi_align.kernels import max_backward as kernels_max_backward

pytestmark = pytest.mark.compile_only

tl = kernels_max.tl


def _forward_target(arch: str, tile: kernels.Tile, dtype: str, *, channels_last: bool, sampling_ratio: int) -> Target:
    """As of the mean: a thread owns `share` elements of the tile; each tap of them is `accesses` loads.

    It keeps the largest value of each element and its index, and for each access a position.
    """
    item = _BYTES[dtype]
    share = tile.block_pw * tile.block_c // (tile.num_warps * CHIPS[arch].lanes)
    width = 16 if channels_last else item
    accesses = max(1, share * item // width)
    under_way = TAPS * share * item  # taps requested
    values = 2 * share + 2 * accesses + (3 * accesses if sampling_ratio == 0 else 0)
    return Target(
        registers=registers(values=values, bytes_in_flight=under_way, pointers=TAPS * accesses),
        load_bytes=width,
        store_bytes=width,
        atomic_bytes=0,
        loads=BOX_LOADS + TAPS * accesses,
        bytes_in_flight=under_way,
    )


def _strides(channels_last: bool) -> tuple[str, ...]:
    return ("i32", "=1", "i32", "i32") if channels_last else ("i32", "i32", "i32", "=1")


def _index(sampling_ratio: int) -> str:
    return "*i8" if kernels_max.index_dtype(sampling_ratio).itemsize == 1 else "*i32"


def _forward(
    name: str,
    *,
    dtype: str,
    channels_last: bool = True,
    sampling_ratio: int = 2,
    cubic: float | None = None,
    keep_index: bool = True,
    known_spills: int = 0,
) -> Case:
    tile = kernels.pick_tile(CHANNELS, 7, channels_last)
    strides = _strides(channels_last)
    divisible = ["out_ptr", "index_ptr", "feature_ptrs", "boxes_ptr", "valid_ptr", "C"]
    return Case(
        name=f"roi_align max {name}",
        kernel=kernels_max._roi_align_max_kernel,
        signature={
            "out_ptr": f"*{dtype}",
            "index_ptr": _index(sampling_ratio) if keep_index else f"*{dtype}",
            "feature_ptrs": (f"*{dtype}",) * LEVELS,
            "C": "i32",
            "heights": ("fp32",) * LEVELS,
            "widths": ("fp32",) * LEVELS,
            "out_strides": strides,
            "feature_strides": (strides,) * LEVELS,
            "scales": ("fp32",) * LEVELS,
            "thresholds": ("fp32",) * (LEVELS - 1),
            **_BOXES,
        },
        constexprs={
            "PH": 7,
            "PW": 7,
            "BLOCK_PW": tile.block_pw,
            "BLOCK_C": tile.block_c,
            "NUM_LEVELS": LEVELS,
            "SAMPLING_RATIO": sampling_ratio,
            "CUBIC": cubic,
            "ALIGNED": True,
            "PADDED": True,
            "HAS_VALID": True,
            "KEEP_INDEX": keep_index,
            "FEATURE_STRIDE_C_IS_1": channels_last,
            "OUT_STRIDE_C_IS_1": channels_last,
            "ACC": tl.float32,
        },
        divisible_by_16=divisible + (["out_strides", "feature_strides"] if channels_last else []),
        num_warps=tile.num_warps,
        enable_fp_fusion=False,
        wide=channels_last,
        known_spills=known_spills,
        target=lambda arch: _forward_target(
            arch, tile, dtype, channels_last=channels_last, sampling_ratio=sampling_ratio
        ),
    )


def _gather_target(
    arch: str, tile: kernels_max_backward.GatherTile, dtype: str, *, channels_last: bool, sampling_ratio: int
) -> Target:
    """A thread keeps `sums` of the tile, and the weights of its channels in a row and a column of cells.

    It loads its part of the gradients and indices of a bin.
    """
    item = _BYTES[dtype]
    threads = tile.num_warps * CHIPS[arch].lanes
    sums = tile.height * tile.width * tile.block_c // threads
    bins = max(1, tile.block_c // threads)  # channels of a thread
    width = 16 if channels_last else item
    index = 1 if sampling_ratio else 4
    loads = max(1, bins * item // width) + max(1, bins * index // width)
    return Target(
        registers=registers(
            values=sums + (tile.height + tile.width) * bins, bytes_in_flight=bins * (item + index), pointers=loads
        ),
        load_bytes=width,
        store_bytes=width,
        atomic_bytes=0,
        loads=1 + BOX_LOADS + loads,  # a word of the mask, a box, a bin
        bytes_in_flight=bins * (item + index),
    )


def _gather(
    name: str, *, dtype: str, channels_last: bool = True, sampling_ratio: int = 2, cubic: float | None = None
) -> Case:
    tile = kernels_max_backward.pick_gather_tile(CHANNELS, channels_last, cubic)
    strides = _strides(channels_last)
    divisible = ["grad_ptrs", "out_grad_ptr", "index_ptr", "touch_ptr", "boxes_ptr", "valid_ptr", "C"]
    names = ["out_grad_strides", "index_strides", "grad_strides"]
    return Case(
        name=f"roi_align max backward {name}",
        kernel=kernels_max_backward._max_gather_kernel,
        signature={
            "grad_ptrs": (f"*{dtype}",) * LEVELS,
            "out_grad_ptr": f"*{dtype}",
            "index_ptr": _index(sampling_ratio),
            "touch_ptr": "*i32",
            "C": "i32",
            "out_grad_strides": strides,
            "index_strides": strides,
            "grad_strides": (strides,) * LEVELS,
            **_BOXES,
            **_PYRAMID,
            **_COUNTS,
        },
        constexprs={
            "PH": 7,
            "PW": 7,
            "TILE_H": tile.height,
            "TILE_W": tile.width,
            "BLOCK_C": tile.block_c,
            "NUM_LEVELS": LEVELS,
            "SAMPLING_RATIO": sampling_ratio,
            "CUBIC": cubic,
            "ALIGNED": True,
            "PADDED": True,
            "HAS_VALID": True,
            "GRAD_STRIDE_C_IS_1": channels_last,
            "OUT_GRAD_STRIDE_C_IS_1": channels_last,
            "INDEX_STRIDE_C_IS_1": channels_last,
            "ACC": tl.float32,
        },
        divisible_by_16=divisible + (names if channels_last else []),
        num_warps=tile.num_warps,
        max_registers=tile.max_registers,
        enable_fp_fusion=False,
        wide=channels_last,
        target=lambda arch: _gather_target(
            arch, tile, dtype, channels_last=channels_last, sampling_ratio=sampling_ratio
        ),
    )


CASES = [
    _forward("forward bf16 channels_last 7x7", dtype="bf16"),
    _forward("forward bf16 channels_last 7x7 no index", dtype="bf16", keep_index=False),
    _forward("forward fp32 channels_last 7x7", dtype="fp32"),
    _forward("forward bf16 channels_last 7x7 adaptive", dtype="bf16", sampling_ratio=0),
    # Of Triton 3.8, on the RTX 50 series alone: ptxas spills one register to stay at 80.
    _forward("forward fp32 contiguous 7x7", dtype="fp32", channels_last=False, known_spills=8),
    _forward("forward bf16 channels_last 7x7 bicubic", dtype="bf16", cubic=-0.5),
    _gather("bf16 channels_last 7x7", dtype="bf16"),
    _gather("fp32 channels_last 7x7", dtype="fp32"),
    _gather("bf16 channels_last 7x7 adaptive", dtype="bf16", sampling_ratio=0),
    _gather("fp32 contiguous 7x7", dtype="fp32", channels_last=False),
    _gather("bf16 channels_last 7x7 bicubic", dtype="bf16", cubic=-0.5),
    _gather("fp32 contiguous 7x7 bicubic", dtype="fp32", channels_last=False, cubic=-0.5),
]


@every(CASES)
def test_budget(case: Case, arch: str) -> None:
    check(case, arch)
