"""Mask targets compile for every architecture: both conventions, sides of 28, 14 and 7, padded images or not."""

import pytest

from tests.compile_only.harness import CHIPS, Case, Target, check, every, registers
from tmask_kernels.ops.mask_targets import kernels

pytestmark = pytest.mark.compile_only

BOX_LOADS = 4
WORDS = 4  # loads of a sample


def _targets(side: int, *, convention: str, padded: bool = True) -> Case:
    """Of each of its samples a thread keeps two sums of a row, the sum of the bin in 64 bits, two weights and addresses
    of rows, and two words of bits or the four under way; of its bin the place, step and window on both axes, and of a
    sample its place and weights.
    """
    block_q = min(kernels.triton.next_power_of_2(side), kernels.MAX_BLOCK_Q)

    def target(arch: str) -> Target:
        share = kernels.TILE // CHIPS[arch].lanes  # samples of a thread
        return Target(
            registers=registers(
                values=share * (2 + 2 + 2) + 8 + 4, bytes_in_flight=share * WORDS * 4, pointers=share * 2
            ),
            # Lanes that share a bin add their sums by shuffles within the warp: nothing is shared.
            load_bytes=4,  # a word; a RoI's box and index are scalars
            store_bytes=4,
            atomic_bytes=0,
            loads=BOX_LOADS + 1 + 2 * padded + WORDS * share,
            bytes_in_flight=share * WORDS * 4,
        )

    return Case(
        name=f"mask_targets {side}x{side} {convention}" + ("" if padded else " whole"),
        kernel=kernels._mask_targets_kernel,
        signature={
            "out_ptr": "*fp32",
            "packed_ptr": "*i32",
            "boxes_ptr": "*fp32",
            "index_ptr": "*i64",
            "sizes_ptr": "*i64" if padded else "*fp32",
            **dict.fromkeys(("num_masks", "rois_an_image", "H", "B"), "i32"),
            **dict.fromkeys(("stride_n", "stride_g", "stride_h"), "i32"),
        },
        constexprs={
            "P": side,
            "BLOCK_Q": block_q,
            "ROWS": kernels.TILE // block_q,
            "SPAN": kernels.SPAN,
            "HAS_SIZES": padded,
            "ALIGNED": convention == "detectron2",
            "BINARY": convention == "detectron2",
        },
        divisible_by_16=["out_ptr", "packed_ptr", "boxes_ptr", "index_ptr", "sizes_ptr"],
        num_warps=1,
        enable_fp_fusion=False,
        target=target,
    )


CASES = [
    _targets(28, convention="detectron2"),
    _targets(28, convention="torchvision"),
    _targets(28, convention="torchvision", padded=False),
    _targets(14, convention="detectron2"),
    _targets(7, convention="torchvision"),
]


@every(CASES)
def test_budget(case: Case, arch: str) -> None:
    check(case, arch)
