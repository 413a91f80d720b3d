"""What holds for every op and backend: right to rounding, whole graphs, no waits, any layout, the same bits again.

The cases are the ops' own SPECS and a few more. The test file of an op holds what is special to the op. The files of
the ops that are slow here test more kinds of them.
"""

import dataclasses
import functools
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import tmask_kernels as K
from tests.kernels.tools import HALVES, assert_close_gradient, assert_same, deterministic_algorithms, tensors
from tests.model.sync import count_blocking
from tmask import validate
from tmask_kernels.namespace import NAMESPACE
from tmask_kernels.testing import Inputs, OpSpec, guarded, op_specs, poisoned_empty

BY_NAME = {spec.name: spec for spec in op_specs()}


def decode_in_images(x: Inputs, backend: str) -> Tensor:
    sizes = torch.tensor([[90, 80], [40, 30]], device=x["deltas"].device)[: len(x["deltas"])]
    return K.decode_boxes(x["deltas"], x["anchors"], image_size=sizes, backend=backend)


def decode_freely(x: Inputs, backend: str) -> Tensor:
    return K.decode_boxes(x["deltas"], x["anchors"], backend=backend)


def match_without_crowds(x: Inputs, backend: str) -> tuple[Tensor, ...]:
    return K.match_anchors(x["anchors"], x["gt"], x["valid"], **RPN, backend=backend)


def mean_focal_loss(x: Inputs, backend: str) -> Tensor:
    return K.sigmoid_focal_loss(x["logits"], x["targets"], 0.25, 0.5, "mean", backend=backend)


RPN = {"high": 0.6, "low": 0.3, "allow_low_quality": False}
MORE = {
    "decode_boxes": [decode_in_images, decode_freely],
    "match_anchors": [match_without_crowds],
    "sigmoid_focal_loss": [mean_focal_loss],
}
SPECS = [*BY_NAME.values()]
SPECS += [
    dataclasses.replace(BY_NAME[name], name=call.__name__, call=call) for name, calls in MORE.items() for call in calls
]
NMS = ("nms", "batched_nms", "padded_nms", "rpn_proposals", "detections")
RUN_LENGTHS = ("paste_masks (rle)", "paste_masks_batched (rle)", "masks_to_rle (logits)", "masks_to_rle (bool)")
# Cases that take the first image, and that name the sizes of three.
OF_SOME_IMAGES = ("nms", "batched_nms", "paste_masks_batched (bool)", "paste_masks_batched (rle)")
SLOW = ("roi_", "(rle)", "(packed)")
every_op = pytest.mark.parametrize(
    "spec", [pytest.param(s, marks=[pytest.mark.slow] * any(w in s.name for w in SLOW), id=s.name) for s in SPECS]
)


def leaves(spec: OpSpec, inputs: Inputs, device: torch.device) -> Inputs:
    """The inputs on the device, between guard bands; those that take gradients ask for one."""
    return {k: guarded(v.to(device)).requires_grad_(k in spec.gradients) for k, v in inputs.items()}


def forward_and_backward(spec: OpSpec, inputs: Inputs, backend: str) -> tuple[Any, tuple[Tensor, ...]]:
    """The outputs, and the gradients for an upstream gradient of small whole numbers."""
    out = spec.call(inputs, backend)
    if not spec.gradients:
        return out, ()
    upstream = torch.arange(out.numel(), device=out.device).view(out.shape) % 7 - 3.0
    return out, torch.autograd.grad(out, [inputs[k] for k in spec.gradients], upstream.to(out.dtype))


@functools.cache
def results(name: str, backend: str, device: torch.device) -> tuple[Any, tuple[Tensor, ...]]:
    """The outputs and gradients of a case, computed once, behind guard bands."""
    (spec,) = (spec for spec in SPECS if spec.name == name)
    with poisoned_empty():
        return forward_and_backward(spec, leaves(spec, spec.make(), device), backend)


@every_op
def test_the_kernels_agree_with_the_reference_in_float64(spec, device, monkeypatch):
    """In every dtype, forward and backward, as `tmask validate` compares them."""
    monkeypatch.setattr(validate, "NAMES", ("triton",))
    rows = validate.validate_op(spec, device)
    assert rows
    assert [row for row in rows if row.verdict == "fail"] == []


def across(x: Tensor) -> Tensor:
    """The same values with the first axis innermost in memory."""
    return guarded(x.movedim(0, -1).contiguous()).movedim(-1, 0)


def with_gaps(x: Tensor) -> Tensor:
    """The same values as every second element of a tensor that holds NaN or 1 between them."""
    wide = torch.stack([x, torch.full_like(x, torch.nan if x.is_floating_point() else 1)], -1)
    return guarded(wide.flatten(-2))[..., ::2]


@pytest.mark.parametrize("layout", [across, with_gaps])
@every_op
def test_the_layout_of_the_inputs_does_not_matter(spec, backend, layout, device):
    laid = {k: layout(v.to(device)).requires_grad_(k in spec.gradients) for k, v in spec.make().items()}
    with poisoned_empty():
        out, gradients = forward_and_backward(spec, laid, backend)
    expected, others = results(spec.name, backend, device)
    torch.testing.assert_close(tensors(out), tensors(expected), equal_nan=True)
    for a, b in zip(gradients, others, strict=True):
        assert_close_gradient(a, b.double())


@every_op
def test_autocast_and_inference_mode_change_nothing(spec, backend, device):
    """float16 stays so, where an op takes it."""
    inputs = {k: v.to(spec.dtypes[-1]) if k in spec.features else v for k, v in spec.make().items()}
    with torch.autocast(device.type, torch.bfloat16), torch.inference_mode():
        out = spec.call(leaves(spec, inputs, device), backend)
    assert_same(out, spec.call(leaves(spec, inputs, device), backend))


@every_op
def test_gives_the_same_bits_again(spec, device):
    with deterministic_algorithms():
        again = forward_and_backward(spec, leaves(spec, spec.make(), device), "triton")
    assert_same(again, results(spec.name, "triton", device))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64], ids=str)
@pytest.mark.parametrize("name", [*NMS, "soft_nms", "match_anchors"])
def test_selection_computes_in_float32(name, dtype, nms_backend, device):
    """Under autocast too: the inputs are rounded, and nothing else."""
    if nms_backend == "torchvision" and name not in NMS:
        pytest.skip("has no such backend")
    rounded = {k: v.to(dtype) if v.is_floating_point() else v for k, v in BY_NAME[name].make().items()}
    given = {k: v.to(device) for k, v in rounded.items()}
    with torch.autocast(device.type, torch.bfloat16):
        got = BY_NAME[name].call(given, nms_backend)
    full = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
    assert_same(got, BY_NAME[name].call(full, nms_backend))


@pytest.mark.parametrize(
    "name", [name for name, spec in BY_NAME.items() if not spec.gradients and name != "encode_boxes"]
)
def test_no_gradient_passes(name, device):
    inputs = {k: v.to(device) for k, v in BY_NAME[name].make().items()}
    given = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}
    assert not any(out.requires_grad for out in tensors(BY_NAME[name].call(given, "triton")))


@every_op
def test_nothing_in_nothing_out(spec, backend, device):
    """The first axis of all inputs is empty: the shapes follow from the others, and the graph is kept."""
    if spec.name in OF_SOME_IMAGES:
        pytest.skip("test_arguments and test_paste_masks_triton have their empty inputs")
    given = leaves(spec, {k: v[:0] for k, v in spec.make().items()}, device)
    out, gradients = forward_and_backward(spec, given, backend)
    assert not any(got.any() for got in (*tensors(out), *gradients))
    assert_same(gradients, tuple(given[k] for k in spec.gradients))
    assert_same(out, spec.call(given, "reference"))


@every_op
def test_compiles_whole(spec, backend, device):
    if spec.name in RUN_LENGTHS:
        pytest.skip("strings are no graph")
    given = leaves(spec, spec.make(), device)
    torch.compiler.reset()
    whole = dataclasses.replace(
        spec, call=torch.compile(lambda x, b: spec.call(x, b), fullgraph=True, backend="aot_eager")
    )
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=spec.ragged):
        got = forward_and_backward(whole, given, backend)
    torch.testing.assert_close(tensors(got), tensors(results(spec.name, backend, device)), equal_nan=True)


class CustomOps(TorchFunctionMode):
    """The package's custom ops that are called inside, each with the arguments of its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.found = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "namespace", "") == NAMESPACE:
            self.found.setdefault(func, (args, kwargs))
        return func(*args, **(kwargs or {}))


@every_op
def test_custom_ops_are_sound(spec, backend, device):
    """As in a traced graph, by opcheck; of a backward, which nothing differentiates, schema and shapes."""
    given = leaves(spec, spec.make(), device)
    with CustomOps() as ops, mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        forward_and_backward(spec, given, backend)
    if not ops.found:
        assert backend == "reference" or spec.name in RUN_LENGTHS
        pytest.skip("plain PyTorch")
    for op, (args, kwargs) in ops.found.items():
        tests = {"test_utils": ("test_schema", "test_faketensor")} if "backward" in op._name else {}
        torch.library.opcheck(op, args, kwargs, **tests)


@every_op
def test_nothing_waits(spec, backend, device):
    """But a result whose length depends on values waits once for that length."""
    if spec.name in RUN_LENGTHS:
        pytest.skip("test_paste_masks_triton and test_masks_to_rle count their waits")
    if (spec.name, backend) == ("decode_keypoints", "reference"):
        pytest.skip("reads the sizes of the boxes")
    given = leaves(spec, spec.make(), device)
    with count_blocking() as found:
        spec.call(given, backend)
    waits = {"_local_scalar_dense": 1, "Tensor.__int__": 1} if spec.ragged else {}
    if device.type == "cpu" and "rois" in given:
        waits = {"_local_scalar_dense": 1, "Tensor.__bool__": 1}  # on a CPU the image indices of a list are read
    assert found == waits
