"""The mask loss compiles for every architecture: one channel read in 16 bytes, the gradient written in 16 bytes."""

import pytest

from tests.compile_only.harness import CHIPS, Case, Target, check, every, registers
from tmask_kernels.ops.mask_bce import kernels

pytestmark = pytest.mark.compile_only

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
CLASSES, SIDE = 81, 28
_POINTERS = ["logits_ptr", "classes_ptr", "targets_ptr", "valid_ptr"]


def _shared(*, dtype: str, channels_last: bool) -> tuple[dict[str, object], dict[str, object]]:
    """Signature and constexprs that both kernels have."""
    logits = ("i32", "=1", "i32", "i32") if channels_last else ("i32", "i32", "i32", "=1")
    signature: dict[str, object] = {
        "logits_ptr": f"*{dtype}",
        "classes_ptr": "*i64",
        "targets_ptr": "*fp32",
        "valid_ptr": "*u8",
        "logits_strides": logits,
        "targets_strides": ("i32", "i32", "=1"),
    }
    constexprs = {"C": CLASSES, "M": SIDE, "FLAT_LOGITS": True, "FLAT_TARGETS": True, "ACC": kernels.tl.float32}
    return signature, constexprs


def _forward(name: str, *, dtype: str, channels_last: bool = False) -> Case:
    """A thread owns `share` pixels: logit, target, entropy and what leads to it; and counts its share of the RoIs."""
    signature, constexprs = _shared(dtype=dtype, channels_last=channels_last)
    item = _BYTES[dtype]

    def target(arch: str) -> Target:
        threads = kernels.NUM_WARPS * CHIPS[arch].lanes
        share, counted = kernels.MAX_BLOCK // threads, kernels.BLOCK_K // threads
        width = item if channels_last else min(16, share * item)
        return Target(
            registers=registers(values=4 * share, bytes_in_flight=share * (item + 4), pointers=3),
            shared=4 * kernels.NUM_WARPS,  # each warp hands over its sum
            load_bytes=16,
            store_bytes=4,
            atomic_bytes=0,
            loads=counted + 2 + share * item // width + share * 4 // 16,  # two: channel, and whether it is valid
            bytes_in_flight=share * (item + 4),
        )

    return Case(
        name=f"mask_bce {name}",
        kernel=kernels._mask_bce_fwd_kernel,
        signature={"partial_ptr": "*fp32", "share_ptr": "*fp32", **signature, "K": "i32"},
        constexprs={**constexprs, "BLOCK": kernels.MAX_BLOCK, "BLOCK_K": kernels.BLOCK_K},
        # 784 pixels divide every stride of contiguous maps; of channels_last ones C pixels apart they divide two.
        divisible_by_16=[*_POINTERS, "targets_strides"] + ([] if channels_last else ["logits_strides"]),
        num_warps=kernels.NUM_WARPS,
        wide=True,
        target=target,
    )


def _backward(name: str, *, dtype: str, channels_last: bool = False) -> Case:
    """A thread owns `share` elements of the gradient, and of each, if it is its own, logit, target and sigmoids."""
    signature, constexprs = _shared(dtype=dtype, channels_last=channels_last)
    item = _BYTES[dtype]

    def target(arch: str) -> Target:
        share = kernels.BLOCK_GRAD // (kernels.NUM_WARPS * CHIPS[arch].lanes)
        # Neighbours in a channels_last map belong to other channels: each element would be a load of its own.
        loads = 2 * share if channels_last else share * item // 16 + share * 4 // 16
        return Target(
            registers=registers(
                values=4 * share, bytes_in_flight=share * (item + 4), pointers=loads if channels_last else 3
            ),
            shared=0,
            load_bytes=4 if channels_last else 16,
            store_bytes=16,
            atomic_bytes=0,
            loads=4 + loads,  # four: channel, whether it is valid, two factors
        )

    return Case(
        name=f"mask_bce backward {name}",
        kernel=kernels._mask_bce_bwd_kernel,
        signature={"grad_ptr": f"*{dtype}", "upstream_ptr": "*fp32", "share_ptr": "*fp32", **signature},
        constexprs={**constexprs, "CHANNELS_LAST": channels_last, "BLOCK": kernels.BLOCK_GRAD},
        divisible_by_16=["grad_ptr", *_POINTERS, "targets_strides"] + ([] if channels_last else ["logits_strides"]),
        num_warps=kernels.NUM_WARPS,
        wide=True,
        target=target,
    )


CASES = [
    make(name, **variant)  # type: ignore[arg-type]
    for make in (_forward, _backward)
    for name, variant in {
        "fp32": {"dtype": "fp32"},
        "bf16": {"dtype": "bf16"},
        "fp16": {"dtype": "fp16"},
        "bf16 channels_last": {"dtype": "bf16", "channels_last": True},
    }.items()
]


@every(CASES)
def test_budget(case: Case, arch: str) -> None:
    check(case, arch)
