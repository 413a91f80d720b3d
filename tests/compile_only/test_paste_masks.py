"""Pasting compiles for every architecture: bool, packed and probability, and run lengths counted and written."""

import pytest

from tests.compile_only.harness import CHIPS, Case, Target, check, every, registers
from tmask_kernels.ops.paste_masks.kernels import dense as kernels
from tmask_kernels.ops.paste_masks.kernels import runs as kernels_runs
from tmask_kernels.packed import WORD

pytestmark = pytest.mark.compile_only

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
BOX_LOADS = 4
TAPS = 4  # loads of a pixel
SIDE = 28


def _dense(output: str, *, dtype: str = "fp32", convention: str = "detectron2") -> Case:
    """A warp stores CHUNK_BYTES. Of each element a thread keeps the value, its cells and weights on both axes, and two
    taps of a row with their addresses: the compiler may go element by element, so only one more is under way.
    """
    kind, item = {"bool": ("u8", 1), "packed": ("i32", 4), "probability": ("fp32", 4)}[output]
    block = kernels.CHUNK_BYTES // item

    def target(arch: str) -> Target:
        share = block // CHIPS[arch].lanes  # elements of a thread
        return Target(
            registers=registers(values=share * 5, bytes_in_flight=share * 2 * 4, pointers=2 * 2),
            load_bytes=_BYTES[dtype],
            store_bytes=share * item,
            atomic_bytes=0,
            loads=BOX_LOADS + TAPS * share,
            bytes_in_flight=TAPS * share * _BYTES[dtype],
        )

    return Case(
        name=f"paste_masks {output} {dtype} {convention}",
        kernel=kernels._paste_kernel,
        signature={
            "out_ptr": f"*{kind}",
            "masks_ptr": f"*{dtype}",
            "boxes_ptr": "*fp32",
            **dict.fromkeys(("H", "W", "L", "programs"), "i32"),
            "threshold": "fp32",
        },
        constexprs={
            "SIDE": SIDE,
            "PIXELS": WORD if output == "packed" else 1,
            "BINARY": output != "probability",
            "BLOCK": block,
            "GROUP": 16 // item,
            "STEPS": kernels.STEPS,
            "TORCHVISION": convention == "torchvision",
        },
        divisible_by_16=["out_ptr", "masks_ptr", "boxes_ptr"],
        num_warps=1,
        enable_fp_fusion=False,
        wide=True,
        target=target,
    )


def _runs(write: bool, *, dtype: str = "fp32", convention: str = "detectron2") -> Case:
    """A thread goes down one column: two rows interpolated along x, its cell and weight, the bit before, its slot and
    place (64 bits each), and the four taps under way; the box and the rows' geometry are another dozen.
    """
    return Case(
        name=f"paste_masks runs {'written' if write else 'counted'} {dtype} {convention}",
        kernel=kernels_runs._runs_kernel,
        signature={
            "changes_ptr": "*i64",
            "ends_ptr": "*i32" if write else "*i64",
            "masks_ptr": f"*{dtype}",
            "boxes_ptr": "*fp32",
            "images_ptr": "*i32",
            **dict.fromkeys(("D", "rows", "columns"), "i32"),
            "threshold": "fp32",
        },
        constexprs={
            "SIDE": SIDE,
            "BLOCK_X": kernels_runs.BLOCK_X,
            "TORCHVISION": convention == "torchvision",
            "WRITE": write,
        },
        divisible_by_16=["changes_ptr", "ends_ptr", "masks_ptr", "boxes_ptr", "images_ptr"],
        num_warps=1,
        enable_fp_fusion=False,
        wide=True,
        target=lambda arch: Target(
            registers=registers(values=5 + 4 + 12, bytes_in_flight=TAPS * _BYTES[dtype], pointers=2),
            load_bytes=8 if write else 4,  # a slot, or a box
            store_bytes=4 if write else 8,
            atomic_bytes=0,
            loads=3 + BOX_LOADS + 2 * TAPS + write,  # the image, the pixel before the column, then the rows
            bytes_in_flight=TAPS * _BYTES[dtype],
        ),
    )


CASES = [
    _dense("bool"),
    _dense("bool", dtype="bf16"),
    _dense("bool", convention="torchvision"),
    _dense("packed"),
    _dense("packed", convention="torchvision"),
    _dense("probability"),
    _dense("probability", dtype="fp16"),
    _runs(False),
    _runs(True),
    _runs(False, convention="torchvision"),
    _runs(True, convention="torchvision"),
    _runs(True, dtype="fp16"),
]


@every(CASES)
def test_budget(case: Case, arch: str) -> None:
    check(case, arch)
