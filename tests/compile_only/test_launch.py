"""The real launch path without a GPU: our launchers bind their arguments and Triton compiles what they ask for.

The interpreter and `compile_kernel` both go around Triton's launcher, which turns Python arguments (tuples of tensors,
strides, numbers that specialise) into a signature. Here it runs on a driver that says it is an H100, up to the launch.
"""

import ast
import importlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.compile_only.harness import all_cases

pytestmark = pytest.mark.compile_only

ROOT = Path(__file__).parents[2]


class FakeH100:
    """As much of a Triton driver as binding and compiling ask for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that reached the launch, as the budgets have them; nothing is launched."""
    names: list[str] = []
    fusion = {case.kernel.fn.__name__: case.enable_fp_fusion for case in all_cases()}
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, warmup: bool = False, **kwargs: Any) -> None:
        compiled = run(self, *args, warmup=True, **kwargs)
        assert compiled.asm["cubin"]
        assert compiled.metadata.enable_fp_fusion == fusion[self.fn.__name__], "the budgets are for another variant"
        names.append(self.fn.__name__)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", FakeH100())
    return names


def test_every_launch_says_whether_products_and_sums_fuse() -> None:
    """Triton 3.10 turns the default of `enable_fp_fusion` off; results must not change with it."""
    launches = [
        (f"{path.name}:{node.lineno}", {keyword.arg for keyword in node.keywords})
        for path in ROOT.glob("tmask_kernels/**/*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    ]
    assert launches
    assert not [where for where, keywords in launches if "enable_fp_fusion" not in keywords]


def kernels_of(op: str) -> Any:
    """The kernels of "op", or one file of them, "op.file"."""
    op, _, file = op.partition(".")
    return importlib.import_module(".".join(["tmask_kernels.ops", op, "kernels", file]).rstrip("."))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("cubic", [None, -0.5], ids=["bilinear", "bicubic"])
def test_roi_align(dtype: torch.dtype, layout: torch.memory_format, cubic: float | None, launched: list[str]) -> None:
    kernels = kernels_of("roi_align.forward")
    maps = [
        torch.zeros(2, 40, 21 // k, 23 // k, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
        for k in (1, 2, 4, 8)
    ]
    boxes, valid = torch.rand(2, 6, 4), torch.ones(2, 6, dtype=torch.bool)
    scales, areas = [1 / 4, 1 / 8, 1 / 16, 1 / 32], [1.0, 2.0, 3.0]
    out = kernels.multiscale_roi_align(maps, boxes, valid, 7, 7, scales, areas, 0, True, cubic)
    out.backward(torch.ones_like(out))
    out = kernels.multiscale_roi_align(maps[:1], torch.rand(5, 5), None, 7, 7, scales[:1], [], 2, False, cubic)
    out.backward(torch.ones_like(out))
    assert launched == ["_roi_align_kernel", "_touch_kernel", "_gather_kernel"] * 2


@pytest.mark.parametrize(
    ("dtype", "layout", "cubic"),
    [(torch.float32, torch.contiguous_format, None), (torch.bfloat16, torch.channels_last, -0.5)],
    ids=["bilinear", "bicubic"],
)
def test_roi_align_boxes(
    dtype: torch.dtype, layout: torch.memory_format, cubic: float | None, launched: list[str]
) -> None:
    kernels = kernels_of("roi_align.forward")
    maps = [torch.zeros(2, 40, 21 // k, 23 // k, dtype=dtype).contiguous(memory_format=layout) for k in (1, 2, 4, 8)]
    boxes, valid = torch.rand(2, 6, 4, requires_grad=True), torch.ones(2, 6, dtype=torch.bool)
    scales, areas = [1 / 4, 1 / 8, 1 / 16, 1 / 32], [1.0, 2.0, 3.0]
    out = kernels.multiscale_roi_align(maps, boxes, valid, 7, 7, scales, areas, 0, True, cubic)
    out.backward(torch.ones_like(out))
    boxes = torch.rand(5, 5, requires_grad=True)
    out = kernels.multiscale_roi_align(maps[:1], boxes, None, 7, 7, scales[:1], [], 2, False, cubic)
    out.sum().backward()
    assert launched == ["_roi_align_kernel", "_box_gradient_kernel"] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_roi_align_max(dtype: torch.dtype, layout: torch.memory_format, launched: list[str]) -> None:
    kernels = kernels_of("roi_align.max")
    maps = [
        torch.zeros(2, 40, 21 // k, 23 // k, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
        for k in (1, 2)
    ]
    boxes, valid = torch.rand(2, 6, 4), torch.ones(2, 6, dtype=torch.bool)
    rest = (7, 7, [1 / 4, 1 / 8], [1.0])
    out, _ = kernels.multiscale_roi_align_max(maps, boxes, valid, *rest, 0, True, None, True)
    out.backward(torch.ones_like(out))
    out, _ = kernels.multiscale_roi_align_max(maps, boxes, valid, *rest, 2, True, -0.5, True)
    out.backward(torch.ones_like(out))
    kernels.multiscale_roi_align_max(maps[:1], torch.rand(5, 5), None, 7, 7, [0.25], [], 2, False, None, False)
    both_ways = ["_roi_align_max_kernel", "_touch_kernel", "_max_gather_kernel"]
    assert launched == [*both_ways, *both_ways, "_roi_align_max_kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_roi_pool(dtype: torch.dtype, layout: torch.memory_format, launched: list[str]) -> None:
    kernels = kernels_of("roi_pool.forward")
    feature = torch.zeros(2, 40, 21, 23, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    out, _ = kernels.roi_pool(feature, torch.rand(2, 6, 4), torch.ones(2, 6, dtype=torch.bool), 7, 7, 0.25, True)
    out.backward(torch.ones_like(out))
    kernels.roi_pool(feature.detach(), torch.rand(5, 5), None, 7, 7, 0.25, False)
    assert launched == ["_roi_pool_kernel", "_touch_kernel", "_gather_kernel", "_roi_pool_kernel"]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("scores", [torch.float32, torch.bfloat16], ids=str)
def test_padded_nms(grouped: bool, scores: torch.dtype, launched: list[str]) -> None:
    run = kernels_of("nms.padded").padded_nms
    for K, kernels in ((70, ["_padded_nms_kernel"]), (1100, ["_step_kernel"] * 2)):
        groups = torch.zeros(3, K, dtype=torch.int64) if grouped else None
        valid = torch.ones(K, 3, dtype=torch.bool).T if grouped else None
        run(torch.rand(3, K, 4), torch.rand(3, K, dtype=scores), torch.full((3,), 0.5), valid, groups, 20)
        assert launched == ["_sorted_kernel", *kernels]
        launched.clear()


@pytest.mark.parametrize("gaussian", [False, True])
def test_soft_nms(gaussian: bool, launched: list[str]) -> None:
    kernels = kernels_of("soft_nms")
    kernels.soft_nms(torch.rand(70, 4), torch.rand(70), gaussian, 0.3, 0.5, 0.001)
    assert launched == ["_soft_nms_kernel"]


@pytest.mark.parametrize("crowds", [False, True])
@pytest.mark.parametrize("anchors", [(1, 300, 4), (2, 300, 4), (2, 1, 4)], ids=["shared", "of each image", "one"])
def test_match_anchors(anchors: tuple[int, int, int], crowds: bool, launched: list[str]) -> None:
    valid = torch.ones(2, 40, dtype=torch.bool)
    arguments = torch.rand(anchors), torch.rand(2, 40, 4), valid, valid if crowds else None
    match = kernels_of("match_anchors").match_anchors
    match(*arguments, 0.7, 0.3, True)
    match(*arguments, 1.0, 0.0, False)
    assert launched == ["_best_of_gt_kernel", "_match_kernel", "_match_kernel"]


def test_decode_keypoints(launched: list[str]) -> None:
    """One variant serves all counts of boxes and images; and maps of one cell, whose sizes are all 1, compile too."""
    kernels = kernels_of("decode_keypoints")
    for images, boxes in ((2, 3), (1, 7), (3, 5)):
        valid = torch.ones(images, boxes, dtype=torch.bool)
        kernels.decode_keypoints(torch.zeros(images, boxes, 17, 56, 56), torch.rand(images, boxes, 4), valid)
    assert len(kernels._decode_keypoints_kernel.device_caches[0][0]) == 1
    kernels.decode_keypoints(torch.zeros(1, 1, 1, 1, 1), torch.rand(1, 1, 4), None)
    strided = torch.zeros(6, 5, 9, 7, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    kernels.decode_keypoints(strided.view(2, 3, 5, 9, 7), torch.rand(2, 3, 4), None)
    assert launched == ["_decode_keypoints_kernel"] * 5


@pytest.mark.parametrize("size", [None, [30, 40]], ids=["free", "clipped"])
def test_boxes(size: list[int] | None, launched: list[str]) -> None:
    kernels = kernels_of("box_coding")
    weights, anchors = [1.0, 1.0, 1.0, 1.0], torch.rand(9, 4)
    kernels.encode_boxes(torch.rand(9, 4), anchors, weights)
    deltas = torch.rand(9, 4, requires_grad=True)
    out: Tensor = kernels.decode_boxes(deltas, anchors, weights, 4.0, size, None)
    out.sum().backward()
    kernels.decode_boxes(torch.rand(2, 9, 4), anchors, weights, 4.0, None, torch.full((2, 2), 30))
    decode = "_decode_boxes_fwd_kernel"
    assert launched == ["_encode_boxes_kernel", decode, "_decode_boxes_bwd_kernel", decode]


def proposal_maps(height: int, width: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    sizes = [(height // k, width // k) for k in (1, 2, 4)]
    return tuple([torch.zeros(2, channels, *size, dtype=dtype) for size in sizes] for channels in (3, 12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rpn_proposals(dtype: torch.dtype, launched: list[str]) -> None:
    """One variant serves all sizes of images: a training draws many, and each level's strides differ with them."""
    candidates = kernels_of("proposals.candidates")
    select = kernels_of("proposals.select")
    sizes, half_sides, steps = torch.full((2, 2), 30), [4.0, 3.0] * 9, [4.0, 4.0, 8.0, 8.0, 16.0, 16.0]
    variants = set()
    for height, width in ((24, 20), (33, 17), (64, 48), (11, 4)):
        maps = proposal_maps(height, width, dtype)
        boxes, scores, _ = candidates.rpn_candidates(*maps, sizes, half_sides, steps, 0.0, 50, 4.0, 1.0, 0.1)
        select.select_best(boxes, scores, torch.zeros(6, 20, dtype=torch.int64), 2, 25, False)
        kernels = (candidates._rpn_keys_kernel, candidates._rpn_candidates_kernel, select._take_kernel)
        variants.add(tuple(len(kernel.device_caches[0][0]) for kernel in kernels))
    one_size = ["_rpn_keys_kernel", "_rpn_candidates_kernel", "_kept_keys_kernel", "_take_kernel"]
    assert launched == one_size * 4
    assert len(variants) == 1


@pytest.mark.parametrize("shared", [False, True], ids=["boxes of each class", "shared boxes"])
def test_detections(shared: bool, launched: list[str]) -> None:
    candidates = kernels_of("proposals.candidates")
    select = kernels_of("proposals.select")
    scores, boxes = torch.rand(2, 30, 4)[:, :, 1:], torch.rand(2, 30, 4, 4)[:, :, 1 : 2 if shared else 4]
    valid, sizes = torch.ones(2, 30, dtype=torch.bool), torch.full((2, 2), 30)
    boxes, scores, _ = candidates.class_candidates(scores, boxes, valid, sizes, 0.05, 0.01)
    select.select_best(boxes, scores, torch.zeros(6, 20, dtype=torch.int64), 2, 25, True)
    assert launched == ["_class_candidates_kernel", "_kept_keys_kernel", "_take_kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("gamma", [2.0, 1.5])
def test_sigmoid_focal_loss(dtype: torch.dtype, reduction: str, gamma: float, launched: list[str]) -> None:
    logits = torch.zeros(3, 7, dtype=dtype, requires_grad=True)
    for targets in (torch.zeros(3, 7), torch.zeros(3, 7, dtype=torch.bool)):
        loss = kernels_of("focal_loss").sigmoid_focal_loss(logits, targets, 0.25, gamma, reduction)
        loss.backward(torch.ones_like(loss))
    assert launched == ["_focal_fwd_kernel", "_focal_bwd_kernel"] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_mask_bce(dtype: torch.dtype, layout: torch.memory_format, launched: list[str]) -> None:
    logits = torch.zeros(5, 3, 28, 28, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    classes, valid = torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.bool)
    for targets in (torch.zeros(5, 28, 28), torch.zeros(5, 28, 56, dtype=torch.bool)[:, :, ::2].transpose(1, 2)):
        loss, _ = kernels_of("mask_bce").mask_bce(logits, classes, targets, valid)
        loss.backward(torch.ones_like(loss))
    assert launched == ["_mask_bce_fwd_kernel", "_mask_bce_bwd_kernel"] * 2


@pytest.mark.parametrize("convention", ["detectron2", "torchvision"])
@pytest.mark.parametrize("size", [7, 28])
def test_mask_targets(size: int, convention: str, launched: list[str]) -> None:
    """One variant serves masks of all sizes: each batch of a training has its own."""
    kernels, variants = kernels_of("mask_targets"), set()
    for n, g, s, height, words in ((2, 3, 5, 16, 2), (1, 1, 1, 33, 1), (3, 16, 32, 64, 16)):
        packed = torch.zeros(n, g, height, words, dtype=torch.int32)
        boxes, index = torch.rand(n, s, 4), torch.zeros(n, s, dtype=torch.int64)
        kernels.mask_targets(packed, boxes, index, size, convention == "detectron2", torch.full((n, 2), 9))
        variants.add(len(kernels._mask_targets_kernel.device_caches[0][0]))
    assert launched == ["_mask_targets_kernel"] * 3
    assert len(variants) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("convention", ["detectron2", "torchvision"])
def test_paste_masks(dtype: torch.dtype, convention: str, launched: list[str]) -> None:
    """Run lengths are written by the second launch of their kernel, here of the sums that the first left: ones."""
    masks, boxes = torch.zeros(3, 28, 28, dtype=dtype), torch.rand(3, 4)
    for output in ("bool", "packed", "probability"):
        kernels_of("paste_masks.dense").paste_masks(masks, boxes, 17, 41, 0.5, output, convention)
    with mock.patch.object(torch, "empty", torch.ones):
        kernels_of("paste_masks.runs").paste_runs(masks[None], boxes[None], [3], [(17, 41)], 0.5, convention)
    assert launched == ["_paste_kernel"] * 3 + ["_runs_kernel"] * 2
