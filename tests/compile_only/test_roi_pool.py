"""RoIPool compiles for every architecture: forward with and without the index of a backward, tiles, and gather."""

import pytest

from tests.compile_only.harness import CHIPS, Case, Target, check, every, registers
from tmask_kernels.ops.roi_pool.kernels import backward as kernels_backward
from tmask_kernels.ops.roi_pool.kernels import forward as kernels

pytestmark = pytest.mark.compile_only

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
BOX_LOADS = 5  # four corners, and whether the box is valid or which image it is of
CHANNELS, SIZE = 512, 7
_BOXES = {"boxes_ptr": "*fp32", "valid_ptr": "*u8", "num_images": "i32", "boxes_an_image": "i32", "scale": "fp32"}
_TILES = {"tiles_across": "i32", "num_tiles": "i32", "num_words": "i32"}


def _strides(channels_last: bool) -> tuple[str, ...]:
    return ("i32", "=1", "i32", "i32") if channels_last else ("i32", "i32", "i32", "=1")


def _forward_target(arch: str, tile: kernels.Tile, dtype: str, *, channels_last: bool, keep_index: bool) -> Target:
    """A thread owns `share` elements of the tile; each cell of them is `accesses` loads, one address each.

    It keeps the largest of each element, its place, for each access the cells of its bin, and the cells under way.
    """
    item = _BYTES[dtype]
    share = tile.block_pw * tile.block_c // (tile.num_warps * CHIPS[arch].lanes)
    width = 16 if channels_last else item
    accesses = max(1, share * item // width)
    under_way = kernels.UNDER_WAY * share * item
    return Target(
        registers=registers(
            values=share * (2 if keep_index else 1) + 2 * accesses,
            bytes_in_flight=under_way,
            pointers=kernels.UNDER_WAY * accesses,
        ),
        load_bytes=width,
        store_bytes=width,
        loads=BOX_LOADS + kernels.UNDER_WAY * accesses,
        bytes_in_flight=under_way,
    )


def _forward(
    name: str, *, dtype: str, channels_last: bool = True, keep_index: bool = True, known_spills: int = 0
) -> Case:
    tile = kernels.pick_tile(CHANNELS, SIZE, channels_last)
    strides = _strides(channels_last)
    # 512 channels divide every stride of a channels_last tensor; of the others, widths may be odd.
    divisible = ["out_ptr", "index_ptr", "feature_ptr", "boxes_ptr", "valid_ptr", "C"]
    return Case(
        name=f"roi_pool forward {name}",
        kernel=kernels._roi_pool_kernel,
        signature={
            "out_ptr": f"*{dtype}",
            "index_ptr": "*i32" if keep_index else f"*{dtype}",
            "feature_ptr": f"*{dtype}",
            **_BOXES,
            "C": "i32",
            "H": "i32",
            "W": "i32",
            "out_strides": strides,
            "feature_strides": strides,
        },
        constexprs={
            "PH": SIZE,
            "PW": SIZE,
            "BLOCK_PW": tile.block_pw,
            "BLOCK_C": tile.block_c,
            "UNDER_WAY": kernels.UNDER_WAY,
            "PADDED": True,
            "HAS_VALID": True,
            "KEEP_INDEX": keep_index,
            "FEATURE_STRIDE_C_IS_1": channels_last,
            "OUT_STRIDE_C_IS_1": channels_last,
            "ACC": kernels.tl.float32,
        },
        divisible_by_16=divisible + (["out_strides", "feature_strides"] if channels_last else []),
        num_warps=tile.num_warps,
        enable_fp_fusion=False,
        wide=channels_last,
        known_spills=known_spills,
        target=lambda arch: _forward_target(arch, tile, dtype, channels_last=channels_last, keep_index=keep_index),
    )


def _gather_target(arch: str, tile: kernels_backward.GatherTile, dtype: str, *, channels_last: bool) -> Target:
    """A thread keeps `sums` of the tile and the number of each of their cells; of a bin it loads its own channels,
    gradient and place, which it needs for all its cells.
    """
    item = _BYTES[dtype]
    threads = tile.num_warps * CHIPS[arch].lanes
    sums = tile.height * tile.width * tile.block_c // threads
    channels = max(1, tile.block_c // threads)
    width = 16 if channels_last else item
    loads = max(1, channels * item // width) + max(1, channels * 4 // (16 if channels_last else 4))
    return Target(
        registers=registers(values=sums + sums // channels, bytes_in_flight=channels * (item + 4), pointers=loads),
        load_bytes=width,
        store_bytes=width,
        atomic_bytes=0,
        loads=1 + BOX_LOADS + loads,  # a word of the mask, a box, a bin
        bytes_in_flight=channels * (item + 4),
    )


def _gather(name: str, *, dtype: str, channels_last: bool = True) -> Case:
    tile = kernels_backward.pick_gather_tile(CHANNELS, channels_last)
    strides = _strides(channels_last)
    divisible = ["grad_ptr", "out_grad_ptr", "index_ptr", "touch_ptr", "boxes_ptr", "valid_ptr", "C"]
    all_strides = ["grad_strides", "out_grad_strides", "index_strides"]
    return Case(
        name=f"roi_pool backward {name}",
        kernel=kernels_backward._gather_kernel,
        signature={
            "grad_ptr": f"*{dtype}",
            "out_grad_ptr": f"*{dtype}",
            "index_ptr": "*i32",
            "touch_ptr": "*i32",
            **_BOXES,
            **_TILES,
            "C": "i32",
            "H": "i32",
            "W": "i32",
            **dict.fromkeys(all_strides, strides),
        },
        constexprs={
            "PH": SIZE,
            "PW": SIZE,
            "TILE_H": tile.height,
            "TILE_W": tile.width,
            "BLOCK_C": tile.block_c,
            "PADDED": True,
            "HAS_VALID": True,
            "GRAD_STRIDE_C_IS_1": channels_last,
            "OUT_GRAD_STRIDE_C_IS_1": channels_last,
            "INDEX_STRIDE_C_IS_1": channels_last,
            "ACC": kernels_backward.tl.float32,
        },
        divisible_by_16=divisible + (all_strides if channels_last else []),
        num_warps=tile.num_warps,
        enable_fp_fusion=False,
        wide=channels_last,
        target=lambda arch: _gather_target(arch, tile, dtype, channels_last=channels_last),
    )


def _touch() -> Case:
    """A program tests 32 tiles against 32 boxes: 1,024 answers, which become the bits of one word a tile."""
    tile = kernels_backward.pick_gather_tile(CHANNELS, True)
    answers = kernels_backward.BLOCK_TILES * kernels_backward.WORD
    return Case(
        name="roi_pool backward tiles",
        kernel=kernels_backward._touch_kernel,
        signature={"touch_ptr": "*i32", **_BOXES, **_TILES},
        constexprs={
            "PH": SIZE,
            "PW": SIZE,
            "TILE_H": tile.height,
            "TILE_W": tile.width,
            "BLOCK_T": kernels_backward.BLOCK_TILES,
            "PADDED": True,
            "HAS_VALID": True,
        },
        divisible_by_16=["touch_ptr", "boxes_ptr", "valid_ptr"],
        enable_fp_fusion=False,
        target=lambda arch: Target(
            registers=registers(values=answers // (4 * CHIPS[arch].lanes) + 6, pointers=2),  # and six facts of a box
            shared=answers // 8,
            load_bytes=4,
            store_bytes=4,
            atomic_bytes=0,
            loads=BOX_LOADS,
        ),
    )


CASES = [
    _forward("bf16 channels_last", dtype="bf16"),
    _forward("fp16 channels_last", dtype="fp16"),
    _forward("fp32 channels_last", dtype="fp32"),
    _forward("bf16 channels_last no index", dtype="bf16", keep_index=False),
    _forward("bf16 contiguous", dtype="bf16", channels_last=False),
    # For the A100 ptxas 12.9 spills one register to have 40 warps on an SM in place of 32.
    _forward("fp32 contiguous", dtype="fp32", channels_last=False, known_spills=8),
    _gather("bf16 channels_last", dtype="bf16"),
    _gather("fp16 channels_last", dtype="fp16"),
    _gather("fp32 channels_last", dtype="fp32"),
    _gather("bf16 contiguous", dtype="bf16", channels_last=False),
    _gather("fp32 contiguous", dtype="fp32", channels_last=False),
    _touch(),
]


@every(CASES)
def test_budget(case: Case, arch: str) -> None:
    check(case, arch)
