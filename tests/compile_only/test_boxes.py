"""The box coding kernels compile for every target within their budgets; a box is one 16-byte load and store."""

import pytest

from tests.compile_only.harness import NVIDIA, Budget, Case, check, every
from tmask_kernels.ops.boxes import kernels

pytestmark = pytest.mark.compile_only

_ANCHORS = dict.fromkeys(("d1", "d2", "stride_0", "stride_1", "stride_2"), "i32")
_WEIGHTS = dict.fromkeys(("wx", "wy", "ww", "wh"), "fp32")
_IMAGE = {"sizes_ptr": "*i64", "rows_per_image": "i32", "height": "fp32", "width": "fp32"}
_POINTERS = ("out_ptr", "boxes_ptr", "anchors_ptr", "deltas_ptr", "grad_ptr", "grad_deltas_ptr")


def _widths(nvidia: int) -> dict[str, int]:
    # AMD's compiler splits a box over two threads of its wider wave.
    return {**dict.fromkeys(NVIDIA, nvidia), "gfx942": nvidia // 2}


def _case(name: str, kernel: object, pointers: dict[str, str], *, image: bool, store: int = 16) -> Case:
    signature = {**pointers, "anchors_ptr": "*fp32", "count": "i32", **_ANCHORS, **_WEIGHTS}
    constexprs: dict[str, object] = {"BLOCK": kernels.BLOCK}
    if image:
        signature |= {**_IMAGE, "scale_clamp": "fp32"}
        constexprs |= {"CLIP": True, "HAS_SIZES": True}
    return Case(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        divisible_by_16=[pointer for pointer in _POINTERS if pointer in signature],
        budget=Budget(registers=40, load_bytes=_widths(16), store_bytes=_widths(store)),
    )


CASES = [
    _case("encode_boxes", kernels._encode_boxes_kernel, {"out_ptr": "*fp32", "boxes_ptr": "*fp32"}, image=False),
    _case("decode_boxes", kernels._decode_boxes_fwd_kernel, {"out_ptr": "*fp32", "deltas_ptr": "*fp32"}, image=True),
    _case(
        "decode_boxes bf16 deltas",
        kernels._decode_boxes_fwd_kernel,
        {"out_ptr": "*fp32", "deltas_ptr": "*bf16"},
        image=True,
    ),
    _case(
        "decode_boxes backward",
        kernels._decode_boxes_bwd_kernel,
        {"grad_deltas_ptr": "*fp32", "grad_ptr": "*fp32", "deltas_ptr": "*fp32"},
        image=True,
    ),
    _case(
        "decode_boxes backward bf16 deltas",
        kernels._decode_boxes_bwd_kernel,
        {"grad_deltas_ptr": "*bf16", "grad_ptr": "*fp32", "deltas_ptr": "*bf16"},
        image=True,
        store=8,
    ),
]


@every(CASES)
def test_budget(case: Case, target: str) -> None:
    check(case, target)
