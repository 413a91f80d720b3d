"""The box coding kernels compile for every architecture; a box is one 16-byte load and store."""

import pytest

from tests.compile_only.harness import CHIPS, Case, Target, check, every, registers
from tmask_kernels.ops.box_coding import kernels

pytestmark = pytest.mark.compile_only

_ANCHORS = dict.fromkeys(("d1", "d2", "stride_0", "stride_1", "stride_2"), "i32")
_WEIGHTS = dict.fromkeys(("wx", "wy", "ww", "wh"), "fp32")
_IMAGE = {"sizes_ptr": "*i64", "rows_per_image": "i32", "height": "fp32", "width": "fp32"}
_POINTERS = ("out_ptr", "boxes_ptr", "anchors_ptr", "deltas_ptr", "grad_ptr", "grad_deltas_ptr")
_BYTES = {"*fp32": 4, "*bf16": 2}


def _case(name: str, kernel: object, out: str, *inputs: str, image: bool, dtype: str = "*fp32") -> Case:
    """`out` and `inputs` name the pointers to boxes; `dtype` is that of the deltas and of their gradient."""
    of = {pointer: dtype if "deltas" in pointer else "*fp32" for pointer in (out, *inputs, "anchors_ptr")}
    signature = {**of, "count": "i32", **_ANCHORS, **_WEIGHTS}
    constexprs: dict[str, object] = {"BLOCK": kernels.BLOCK}
    if image:
        signature |= {**_IMAGE, "scale_clamp": "fp32"}
        constexprs |= {"CLIP": True, "HAS_SIZES": True}
    read = [*inputs, "anchors_ptr"]
    # A thread holds a box: four numbers of each input, whose place the output takes, and the limits of its image.
    boxes = max(1, kernels.BLOCK // (4 * 32))
    limits = 2 if image else 0

    def target(arch: str) -> Target:
        # A wave of 64 lanes has two for each box, one of which idles.
        outputs = 4 * kernels.BLOCK / (4 * CHIPS[arch].lanes)
        loads = boxes * len(read) + limits
        pointers = boxes * (len(read) + 1) + image
        return Target(
            registers=registers(values=boxes * 4 * len(read) + limits, pointers=pointers),
            load_bytes=16,
            store_bytes=4 * _BYTES[of[out]],
            trips=(1,),
            outputs=outputs,
            loads_per_output=loads / outputs,
            bytes_in_flight=boxes * sum(4 * _BYTES[of[pointer]] for pointer in read),
        )

    return Case(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        divisible_by_16=[pointer for pointer in _POINTERS if pointer in signature],
        target=target,
    )


_DECODE, _BACKWARD = kernels._decode_boxes_fwd_kernel, kernels._decode_boxes_bwd_kernel

CASES = [
    _case("encode_boxes", kernels._encode_boxes_kernel, "out_ptr", "boxes_ptr", image=False),
    _case("decode_boxes", _DECODE, "out_ptr", "deltas_ptr", image=True),
    _case("decode_boxes bf16 deltas", _DECODE, "out_ptr", "deltas_ptr", image=True, dtype="*bf16"),
    _case("decode_boxes backward", _BACKWARD, "grad_deltas_ptr", "grad_ptr", "deltas_ptr", image=True),
    _case(
        "decode_boxes backward bf16 deltas",
        _BACKWARD,
        "grad_deltas_ptr",
        "grad_ptr",
        "deltas_ptr",
        image=True,
        dtype="*bf16",
    ),
]


@every(CASES)
def test_budget(case: Case, arch: str) -> None:
    check(case, arch)
