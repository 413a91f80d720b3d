"""The work of the benchmarks at full size: right, the same bits again, from CUDA graphs, in little memory, compiled.

A benchmark (`bench.cases`) makes the inputs, its providers the call, and its gate holds the result to the truth.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.cases import (
    box_coding,
    decode_keypoints,
    focal_loss,
    mask_bce,
    mask_targets,
    masks_to_rle,
    match_anchors,
    nms,
    paste_masks,
    proposals,
    roi_align,
    roi_pool,
)
from bench.cases._shared import Bench
from tests.gpu.tools import peak_bytes, random_like, recorded, to, waiting_is_an_error
from tests.kernels.test_proposals import LOOSE, check_candidates
from tests.kernels.tools import assert_same, deterministic_algorithms, tensors
from tmask_kernels.ops.proposals.kernels import candidates as kernels_candidates
from tmask_kernels.testing import Tolerance, assert_close

pytestmark = pytest.mark.gpu

MEBIBYTE = 2**20
FORWARD, BOTH = ("forward",), ("forward", "backward")
FLOAT, TWO, THREE = ("fp32",), ("fp32", "bf16"), ("fp32", "bf16", "fp16")
ANY, LAYOUTS = ("-",), ("nchw", "nhwc")
# The benchmark of each op, and the modes, dtypes and layouts that it runs in here.
WORK: Mapping[str, tuple[Bench, Sequence[str], Sequence[str], Sequence[str]]] = {
    "roi_align": (roi_align.BENCH, BOTH, THREE, LAYOUTS),
    "roi_pool": (roi_pool.BENCH, BOTH, THREE, LAYOUTS),
    "focal_loss": (focal_loss.BENCH, BOTH, TWO, ANY),
    "mask_bce": (mask_bce.BENCH, BOTH, TWO, ANY),
    "decode_boxes": (box_coding.BENCH, BOTH, FLOAT, ANY),
    "mask_targets": (mask_targets.BENCH, ("targets",), FLOAT, ANY),
    "match_anchors": (match_anchors.BENCH, FORWARD, FLOAT, ANY),
    "masks_to_rle": (masks_to_rle.BENCH, FORWARD, TWO, ANY),
    "paste_masks": (paste_masks.BENCH, ("bool", "packed", "probability", "rle"), FLOAT, ANY),
    "decode_keypoints": (decode_keypoints.BENCH, FORWARD, THREE, ANY),
    "nms": (nms.PADDED, FORWARD, FLOAT, ANY),
    "proposals": (proposals.PROPOSALS, FORWARD, THREE, ANY),
    "detections": (proposals.DETECTIONS, FORWARD, FLOAT, ANY),
}
# Ours equals the reference on the CPU bit for bit.
EXACT = ("mask_targets", "match_anchors", "masks_to_rle", "paste_masks", "decode_keypoints", "detections")
Variant = tuple[str, str, str, str, str]  # op, case, mode, dtype, layout
VARIANTS: list[Variant] = [
    (op, *row) for op, (bench, *axes) in WORK.items() for row in itertools.product(bench.cases, *axes)
]
BOX_HEAD = [("roi_align", "roi-align-box-head", *row) for row in itertools.product(BOTH, ("bf16",), LAYOUTS)]
LOSSES = [("focal_loss", "focal-rpn", mode, "bf16", "-") for mode in BOTH]
LOSSES += [("mask_bce", "mask-loss", mode, "bf16", "-") for mode in BOTH]
MATCHING = ("match_anchors", "match-anchors", "forward", "fp32", "-")
# Captured in a CUDA graph.
GRAPHS: list[Variant] = [
    *BOX_HEAD,
    *LOSSES,
    MATCHING,
    *(("nms", name, "forward", "fp32", "-") for name in ("nms-rpn", "nms-classes", "nms-1k")),
    ("proposals", "proposals-rpn", "forward", "bf16", "-"),
    ("detections", "nms-classes", "forward", "fp32", "-"),
]
# Bytes that a call may take beyond its results.
SPARE: dict[Variant, int] = {
    **dict.fromkeys(BOX_HEAD, 2 * MEBIBYTE),
    **dict.fromkeys(LOSSES, MEBIBYTE),
    ("roi_align", "roi-align-bicubic", "forward", "bf16", "nhwc"): 2 * MEBIBYTE,
    ("mask_targets", "mask-loss", "targets", "fp32", "-"): 512,  # PyTorch's blocks are of 512 bytes
    MATCHING: 12 * MEBIBYTE,  # what the low-quality rule takes, 5.3 MiB; the allocator rounds up to 2 MiB at most
    ("paste_masks", "paste-masks", "bool", "fp32", "-"): int(1.3 * MEBIBYTE),
    ("paste_masks", "paste-masks", "packed", "fp32", "-"): int(1.1 * MEBIBYTE),
    ("paste_masks", "paste-masks", "rle", "fp32", "-"): 32 * MEBIBYTE,
    ("nms", "nms-100k", "forward", "fp32", "-"): int(0.1 * 100_000**2 / 8),  # a tenth of a matrix of bits
}
SLOW = {"nms-1m": [pytest.mark.slow]}
# In a rehearsal a case is smaller than its `small`: the interpreter runs one program after another.
REHEARSED: dict[type[Any], dict[str, Any]] = {
    roi_align.RoICase: {"height": 64, "width": 96, "channels": 6, "rois": 4, "pooled": 3},
    mask_bce.MaskLossCase: {"rois": 2, "gt": 2, "height": 30, "width": 40, "side": 3},
    match_anchors.MatchCase: {"height": 32, "width": 64},
    paste_masks.PasteCase: {"masks": 2, "height": 24, "width": 40},
    decode_keypoints.KeypointCase: {"boxes": 2, "keypoints": 1, "side": 6},
}


def each(variants: Sequence[Variant]) -> pytest.MarkDecorator:
    """Parametrise a test by ``variant``."""
    rows = [pytest.param(row, id="-".join(row[1:]), marks=SLOW.get(row[1], [])) for row in variants]
    return pytest.mark.parametrize("variant", rows)


def case_of(op: str, name: str, full: bool) -> Any:
    case = WORK[op][0].cases[name]
    if full:
        return case
    small = case.small()
    if isinstance(small, nms.NMSCase):  # a list of 140 boxes and more is taken in steps
        few = 140 if small.kind == "list" else 100
        return replace(small, lengths=tuple(min(n, few) for n in small.lengths[-3:]))
    changes = [change for kind, change in REHEARSED.items() if isinstance(small, kind)]
    return replace(small, **changes[0]) if changes else small


def prepare(variant: Variant, full: bool) -> tuple[Bench, Any]:
    """The benchmark of a variant and its inputs."""
    op, name, mode, dtype, layout = variant
    if not full and dtype not in ("fp32", "bf16" if variant in GRAPHS or variant in SPARE else ""):
        pytest.skip("a rehearsal is of one type")
    bench = WORK[op][0]
    return bench, bench.inputs(case_of(op, name, full), mode, dtype, layout)


@each(VARIANTS)
def test_is_right_and_gives_the_same_bits_again(variant: Variant, full: bool) -> None:
    """A backward with PyTorch's deterministic algorithms; NMS whichever of its programs is the last."""
    op, name, mode, *_ = variant
    bench, given = prepare(variant, full)
    call = bench.providers["triton"](given)
    with deterministic_algorithms() if mode == "backward" else nullcontext():
        got = call()
        for _ in range(100 if full and name in ("nms-rpn", "nms-10k") else 2 if full else 1):
            assert_same(call(), got)
    if op in EXACT:
        expected = bench.providers["reference"](to(given, torch.device("cpu")))()
        assert_same(got, expected)
        assert any(t.count_nonzero() for t in tensors(got)) or mode == "rle" or op == "masks_to_rle"
        return
    truth = bench.truth(given)
    if (name, mode) != ("roi-align-max", "backward"):
        bench.check(got, truth, "triton")
        return
    # Of two samples that differ by less than float32 tells apart either may be the largest: a few in a million.
    for gradient, expected in zip(got, truth, strict=True):
        assert_close(gradient, expected, tolerance=Tolerance(max=math.inf, rms=0.01))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_candidates_are_those_of_the_reference(dtype: torch.dtype, full: bool, device: torch.device) -> None:
    """All of them; the gate of the proposals, which are made of these, passes over a few boxes."""
    case = case_of("proposals", "proposals-rpn", full)
    logits, deltas, sizes = case.inputs(dtype, device)
    limits = {"padded": (case.height, case.width), "top_n": case.pre_nms_top_n, **LOOSE}
    check_candidates(kernels_candidates, device, logits, deltas, case.spec, sizes=sizes, **limits)


@each(GRAPHS)
def test_replays_from_a_graph(variant: Variant, full: bool, device: torch.device) -> None:
    """Of a backward the forward too. Other inputs are written over those of the capture; no wait outside of it."""
    bench, given = prepare(variant, full)

    def run() -> Any:
        return bench.providers["triton"](given)()

    run()
    with waiting_is_an_error(device):
        run()
    replay = recorded(run, device)
    with torch.no_grad():
        for value in tensors(given):
            value.copy_(value.flip(0 if len(value) > 1 else 1))
    expected = to(run(), device)
    assert_same(replay(), expected)


@each(list(SPARE))
def test_memory(variant: Variant, full: bool, device: torch.device) -> None:
    bench, given = prepare(variant, full)
    call = bench.providers["triton"](given)
    peak = peak_bytes(call, device)
    results = sum(t.nbytes for t in tensors(call()))
    assert peak is None or peak <= results + SPARE[variant], f"{peak} bytes for results of {results}"


def compiled(call: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """By inductor; in a rehearsal traced alone, as a CPU has no such backend for Triton kernels."""
    return torch.compile(call, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")


@each(GRAPHS[-2:])
def test_boxes_compile(variant: Variant, full: bool, device: torch.device) -> None:
    bench, given = prepare(variant, full)
    call = bench.providers["triton"](given)
    assert_same(compiled(call, device)(), call())


def test_roi_align_compiles_between_other_ops(full: bool, device: torch.device) -> None:
    _, given = prepare(("roi_align", "roi-align-box-head", "forward", "fp32", "nhwc"), full)
    features, triton = [f.requires_grad_() for f in given.features], roi_align.BENCH.providers["triton"]

    def run(features: list[Tensor]) -> Tensor:
        return triton(given._replace(features=[f * 2 for f in features]))().relu()

    eager, out = run(features), compiled(run, device)(features)
    assert_close(out, eager)
    upstream = random_like(eager)
    both = [torch.autograd.grad(result, features, upstream) for result in (out, eager)]
    for got, want in zip(*both, strict=True):
        assert_close(got, want, tolerance=roi_align.FLOAT_COORDINATES)
