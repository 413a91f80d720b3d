"""RoIAlign's backward compiles for every architecture: the launch that marks tiles, and the gather of each tile."""

import pytest

from tests.compile_only.harness import CHIPS, Case, Target, check, every, registers
from tmask_kernels.ops.roi_align.kernels import backward as kernels_backward
from tmask_kernels.ops.roi_align.kernels import touch as kernels_touch

pytestmark = pytest.mark.compile_only

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
BOX_LOADS = 5  # four corners, and whether the box is valid or which image it is of
LEVELS = 4
CHANNELS = 256

_PYRAMID = {
    "heights": ("fp32",) * LEVELS,
    "widths": ("fp32",) * LEVELS,
    "scales": ("fp32",) * LEVELS,
    "tiles_across": ("fp32",) * LEVELS,
    "first_tiles": ("fp32",) * LEVELS,
}
_BOXES = {"boxes_ptr": "*fp32", "valid_ptr": "*u8", "num_images": "i32", "boxes_an_image": "i32"}
_COUNTS = {"num_tiles": "i32", "num_words": "i32"}


def _gather_target(
    arch: str, tile: kernels_backward.GatherTile, dtype: str, *, channels_last: bool, sampling_ratio: int
) -> Target:
    """A thread keeps `sums` of the tile, all rows of its cells, and the product of a row of bins for each column.

    It loads its part of a row of bins, which reaches all threads through shared memory, as do the products.
    """
    item = _BYTES[dtype]
    threads = tile.num_warps * CHIPS[arch].lanes
    sums = tile.height * tile.width * tile.block_c // threads
    bins = kernels_backward.MIN_DOT * tile.block_c // threads  # elements of a row of bins
    width = 16 if channels_last else item
    loads = max(1, bins * item // width)
    return Target(
        registers=registers(
            # Weights along y, one a row, and along x, where an adaptive grid keeps its first sample too.
            values=sums + sums // tile.height + tile.height + (4 if sampling_ratio == 0 else 2),
            bytes_in_flight=bins * item,
            pointers=loads,
        ),
        shared=tile.width * tile.block_c * 4,
        load_bytes=width,
        store_bytes=width,
        atomic_bytes=0,
        loads=1 + BOX_LOADS + loads,  # a word of the mask, a box, a row of bins
        bytes_in_flight=bins * item,
    )


def _gather(
    name: str,
    *,
    dtype: str,
    size: int = 7,
    channels_last: bool = True,
    sampling_ratio: int = 2,
    cubic: float | None = None,
) -> Case:
    tile = kernels_backward.pick_gather_tile(CHANNELS, _BYTES[dtype], channels_last)
    strides = ("i32", "=1", "i32", "i32") if channels_last else ("i32", "i32", "i32", "=1")
    divisible = ["grad_ptrs", "out_grad_ptr", "touch_ptr", "boxes_ptr", "valid_ptr", "C"]
    return Case(
        name=f"roi_align backward {name}",
        kernel=kernels_backward._gather_kernel,
        signature={
            "grad_ptrs": (f"*{dtype}",) * LEVELS,
            "out_grad_ptr": f"*{dtype}",
            "touch_ptr": "*i32",
            "C": "i32",
            "out_grad_strides": strides,
            "grad_strides": (strides,) * LEVELS,
            **_BOXES,
            **_PYRAMID,
            **_COUNTS,
        },
        constexprs={
            "PH": size,
            "PW": size,
            "BLOCK_PW": kernels_backward.MIN_DOT,
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
            "WEIGHT_TERMS": {"bf16": 3, "fp16": 2, "fp32": 1}[dtype],
            "ACC": kernels_backward.tl.float32,
        },
        divisible_by_16=divisible + (["out_grad_strides", "grad_strides"] if channels_last else []),
        num_warps=tile.num_warps,
        max_registers=tile.max_registers,
        enable_fp_fusion=False,
        wide=channels_last,
        target=lambda arch: _gather_target(
            arch, tile, dtype, channels_last=channels_last, sampling_ratio=sampling_ratio
        ),
    )


def _touch() -> Case:
    """A program tests 32 tiles against 32 boxes: 1,024 answers, which become the bits of one word a tile."""
    tile = kernels_backward.pick_gather_tile(CHANNELS, 2, True)
    answers = kernels_touch.BLOCK_TILES * kernels_touch.WORD
    return Case(
        name="roi_align backward tiles",
        kernel=kernels_touch._touch_kernel,
        signature={"touch_ptr": "*i32", "thresholds": ("fp32",) * (LEVELS - 1), **_BOXES, **_PYRAMID, **_COUNTS},
        constexprs={
            "PH": 7,
            "PW": 7,
            "TILE_H": tile.height,
            "TILE_W": tile.width,
            "BLOCK_T": kernels_touch.BLOCK_TILES,
            "NUM_LEVELS": LEVELS,
            "SAMPLING_RATIO": 2,
            "CUBIC": None,
            "ALIGNED": True,
            "PADDED": True,
            "HAS_VALID": True,
        },
        divisible_by_16=["touch_ptr", "boxes_ptr", "valid_ptr"],
        enable_fp_fusion=False,
        target=lambda arch: Target(
            registers=registers(values=answers // (4 * CHIPS[arch].lanes) + 9, pointers=2),  # and nine facts of a box
            shared=answers // 8,
            load_bytes=4,
            store_bytes=4,
            atomic_bytes=0,
            loads=BOX_LOADS,
        ),
    )


CASES = [
    _gather("bf16 channels_last 7x7", dtype="bf16"),
    _gather("fp16 channels_last 7x7", dtype="fp16"),
    _gather("fp32 channels_last 7x7", dtype="fp32"),
    _gather("bf16 channels_last 14x14", dtype="bf16", size=14),
    _gather("bf16 channels_last 7x7 adaptive", dtype="bf16", sampling_ratio=0),
    _gather("fp32 channels_last 7x7 adaptive", dtype="fp32", sampling_ratio=0),
    _gather("bf16 contiguous 7x7", dtype="bf16", channels_last=False),
    _gather("bf16 contiguous 7x7 adaptive", dtype="bf16", channels_last=False, sampling_ratio=0),
    _gather("fp32 contiguous 7x7", dtype="fp32", channels_last=False),
    _gather("fp32 contiguous 7x7 adaptive", dtype="fp32", channels_last=False, sampling_ratio=0),
    _gather("bf16 channels_last 7x7 bicubic", dtype="bf16", cubic=-0.5),
    _gather("fp32 channels_last 7x7 bicubic", dtype="fp32", cubic=-0.5),
    _gather("bf16 channels_last 7x7 bicubic adaptive", dtype="bf16", cubic=-0.5, sampling_ratio=0),
    _gather("fp32 contiguous 7x7 bicubic", dtype="fp32", channels_last=False, cubic=-0.5),
    _touch(),
]


@every(CASES)
def test_budget(case: Case, arch: str) -> None:
    check(case, arch)
