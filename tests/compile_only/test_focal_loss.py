"""The focal loss compiles for every architecture: the loss of each element, a partial sum, and both gradients."""

import pytest

from tests.compile_only.harness import CHIPS, Case, Target, check, every, registers
from tmask_kernels.ops.focal_loss import kernels

pytestmark = pytest.mark.compile_only

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "u8": 1}


def _target(arch: str, *read: str, written: str | None, power: int, numbers: int = 0) -> Target:
    """A thread owns `share` elements of a block, and of each the types `read`; of a sum it writes one number at last.

    For each element it keeps the logit, the target, both sigmoids and the entropy, or the sum; a power of any exponent
    and its slope are two more. Where a block is cut off at the end, every element is a load of its own. `numbers` are
    read once.
    """
    share = kernels.BLOCK // (kernels.NUM_WARPS * CHIPS[arch].lanes)
    widths = [min(16, share * _BYTES[dtype]) for dtype in read]
    under_way = sum(share * _BYTES[dtype] for dtype in read)
    return Target(
        registers=registers(
            values=(5 + 2 * (power == kernels.ANY_GAMMA)) * share,
            bytes_in_flight=under_way,
            pointers=len(read) + (written is not None),
        ),
        shared=4 * kernels.NUM_WARPS if written is None else 0,  # each warp hands over its sum
        load_bytes=max(widths),
        store_bytes=4 if written is None else min(16, share * _BYTES[written]),
        atomic_bytes=0,
        loads=numbers + sum(share * _BYTES[dtype] // width + share for dtype, width in zip(read, widths, strict=True)),
        bytes_in_flight=under_way,
    )


_NUMBERS = {"count": "i32", "alpha": "fp32", "gamma": "fp32"}


def _constexprs(power: int) -> dict[str, object]:
    tl = kernels.tl
    return {"FOCUS": power, "WEIGHTED": True, "TINY": 2.0**-126, "BLOCK": kernels.BLOCK, "ACC": tl.float32}


def _forward(name: str, *, dtype: str, targets: str | None = None, summed: bool = True, power: int = 2) -> Case:
    targets = targets or dtype
    return Case(
        name=f"sigmoid_focal_loss {name}",
        kernel=kernels._focal_fwd_kernel,
        signature={
            "out_ptr": "*fp32" if summed else f"*{dtype}",
            "inputs_ptr": f"*{dtype}",
            "targets_ptr": f"*{targets}",
            **_NUMBERS,
        },
        constexprs={"SUM": summed, "MEAN": False, **_constexprs(power)},
        divisible_by_16=["out_ptr", "inputs_ptr", "targets_ptr"],
        num_warps=kernels.NUM_WARPS,
        wide=True,
        target=lambda arch: _target(arch, dtype, targets, written=None if summed else dtype, power=power),
    )


def _backward(name: str, *, dtype: str, targets: str | None = None, summed: bool = True, power: int = 2) -> Case:
    targets = targets or dtype
    read = (dtype, targets) if summed else (dtype, targets, dtype)
    return Case(
        name=f"sigmoid_focal_loss backward {name}",
        kernel=kernels._focal_bwd_kernel,
        signature={
            "grad_ptr": f"*{dtype}",
            "upstream_ptr": "*fp32" if summed else f"*{dtype}",
            "inputs_ptr": f"*{dtype}",
            "targets_ptr": f"*{targets}",
            **_NUMBERS,
        },
        constexprs={"ONE_UPSTREAM": summed, "MEAN": False, **_constexprs(power)},
        divisible_by_16=["grad_ptr", "upstream_ptr", "inputs_ptr", "targets_ptr"],
        num_warps=kernels.NUM_WARPS,
        wide=True,
        target=lambda arch: _target(arch, *read, written=dtype, power=power, numbers=int(summed)),
    )


CASES = [
    make(name, **variant)  # type: ignore[arg-type]
    for make in (_forward, _backward)
    for name, variant in {
        "fp32 sum": {"dtype": "fp32"},
        "bf16 sum": {"dtype": "bf16"},
        "fp16 sum": {"dtype": "fp16"},
        "bf16 sum, fp32 targets": {"dtype": "bf16", "targets": "fp32"},
        "bf16 sum, bool targets": {"dtype": "bf16", "targets": "u8"},
        "bf16 sum, any gamma": {"dtype": "bf16", "power": kernels.ANY_GAMMA},
        "bf16": {"dtype": "bf16", "summed": False},
    }.items()
]


@every(CASES)
def test_budget(case: Case, arch: str) -> None:
    check(case, arch)
