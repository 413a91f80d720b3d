"""The padded path on tensors that say they are on a GPU, without one: shapes, dtypes and devices, but no values.

Fake tensors find what a CPU cannot show: a constant made on the CPU, a copy from the host to the device (which a CUDA
graph cannot capture), a mix of devices, and any read of a value.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests.model.conftest import VARIANTS, padded, small
from tmask.model import losses
from tmask_kernels.ops.box_coding import kernels as box_kernels
from tmask_kernels.ops.roi_align.kernels import forward as roi_align_kernels
from tmask_kernels.ops.roi_align.kernels import max as roi_align_max_kernels
from tmask_kernels.testing import OpSpec, op_specs

pytestmark = pytest.mark.filterwarnings("ignore:.*using the reference backend on CUDA")

CUDA = torch.device("cuda", 0)


class _Watch(TorchDispatchMode):
    """Names the ops that give or take a tensor that is not on the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.elsewhere: set[str] = set()
        self.calls: Counter[str] = Counter()

    @property
    def ops(self) -> set[str]:
        return set(self.calls)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        for tensor in pytree.tree_leaves((args, kwargs, out)):
            if isinstance(tensor, Tensor) and tensor.device != CUDA:
                self.elsewhere.add(f"{func}: {tensor.device}")
        return out


@contextmanager
def fake_gpu() -> Iterator[_Watch]:
    with FakeTensorMode(), _Watch() as watch:
        yield watch


def on_fake_gpu(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device=CUDA), value)


def run(mode: str, **settings: Any) -> _Watch:
    batch = padded(small(**{name: settings[name] for name in ("keypoints", "masks") if name in settings}))
    with FakeTensorMode():
        with CUDA:
            model = small(**settings)
        images, targets = on_fake_gpu(batch)
        with _Watch() as watch:
            if mode == "train":
                found = model.train().forward_padded(images, targets)
                assert {(t.device, t.dtype, t.shape) for t in found.values()} == {(CUDA, torch.float32, ())}
            else:
                with torch.no_grad():
                    found = [t for t in model.eval().forward_padded(images) if t is not None]
                assert {t.dtype for t in found if t.is_floating_point()} == {torch.float32}
                assert {t.device for t in found} == {CUDA}
    return watch


ALIKE = ("frozen_bn", "gn", "transfer of boxes", "fusion", "bicubic")  # they launch what other variants launch
# Ops of training that a variant has or has not, unlike the others.
OWN = {
    "no masks": {"mask_targets", "mask_bce"},
    "sigmoid focal": {"sigmoid_focal_loss"},
    "softmax focal": {"mask_bce", "sigmoid_focal_loss"},
    "MLP": {"mask_bce"},
}


@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ALIKE])
def test_everything_stays_on_the_gpu(variant: str, mode: str) -> None:
    watch = run(mode, **VARIANTS[variant])
    assert not watch.elsewhere
    pool = {"roi_pool": "roi_pool", "max": "multiscale_roi_align_max"}.get(variant, "multiscale_roi_align")
    expected = {pool, "rpn_candidates", "padded_nms", "select_best"}
    expected |= {"decode_boxes", "class_candidates"} if mode == "inference" else set()
    assert watch.ops >= expected, "auto takes the kernels on a GPU"
    assert watch.calls["match_anchors"] == (2 if mode == "train" else 0), "anchors, then RoIs, to the ground truth"
    assert "padded_nms_reference" not in watch.ops
    assert pool != "roi_pool" or "multiscale_roi_align" not in watch.ops
    training = {"mask_targets", "mask_bce"} ^ OWN.get(variant, set()) if mode == "train" else set()
    assert watch.ops & {"mask_targets", "mask_bce", "sigmoid_focal_loss"} == training


FAULTS = {
    "a constant of the CPU": lambda values, mask: values.sum() * torch.tensor(1.0),
    "a copy from the host": lambda values, mask: values.sum() * torch.tensor(1.0).to(values.device),
    "a shape that depends on values": lambda values, mask: values[mask].sum(),
    "a value that is read": lambda values, mask: values.sum() * float(mask.sum()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_loss_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_masked_sum", FAULTS[fault])
    try:
        found = bool(run("train").elsewhere)
    except (DynamicOutputShapeException, DataDependentOutputException):
        found = True
    assert found


STATIC = [check for check in op_specs() if not check.ragged]


@pytest.mark.parametrize("check", STATIC, ids=lambda check: check.name)
def test_every_op_stays_on_the_gpu(check: OpSpec) -> None:
    inputs = check.make()
    for dtype in check.dtypes:
        typed = {name: t.to(dtype) if name in check.features else t for name, t in inputs.items()}
        with fake_gpu() as watch:
            fake = {k: torch.empty(t.shape, dtype=t.dtype, device=CUDA) for k, t in typed.items()}
            for name in check.gradients:
                fake[name].requires_grad_()
            out = check.call(fake, "auto")
        real = check.call(typed, "reference")
        for got, expected in zip(pytree.tree_leaves(out), pytree.tree_leaves(real), strict=True):
            assert (got.device, got.dtype, got.shape) == (CUDA, expected.dtype, expected.shape)
        assert not watch.elsewhere


def test_gradients_of_the_kernels_stay_on_the_gpu() -> None:
    """Called as autograd calls them: its engine itself needs a real device."""
    with fake_gpu() as watch:
        maps = [torch.empty(2, 8, 16 // k, 12 // k, dtype=torch.bfloat16, device=CUDA) for k in (1, 2)]
        boxes, valid = torch.empty(2, 5, 4, device=CUDA), torch.empty(2, 5, dtype=torch.bool, device=CUDA)
        boxes.requires_grad_()
        context = SimpleNamespace(needs_input_grad=([True, True], True))
        context.save_for_backward = lambda *tensors: setattr(context, "saved_tensors", tensors)
        inputs = (maps, boxes, valid, 7, 7, [0.5, 0.25], [64.0], 2, True, None)
        out = roi_align_kernels.multiscale_roi_align(*inputs)
        roi_align_kernels._setup_context(context, inputs, out)
        gradients, to_boxes, *rest = roi_align_kernels._backward(context, torch.empty_like(out))
        assert [(g.shape, g.dtype, g.device) for g in gradients] == [(m.shape, m.dtype, CUDA) for m in maps]
        assert (to_boxes.shape, to_boxes.dtype, to_boxes.device) == (boxes.shape, boxes.dtype, CUDA)
        assert rest == [None] * 8
        context.mark_non_differentiable = context.set_materialize_grads = lambda _: None
        out, index = roi_align_max_kernels.multiscale_roi_align_max(*inputs, True)
        roi_align_max_kernels._setup_context(context, (*inputs, True), (out, index))
        gradients, *_ = roi_align_max_kernels._backward(context, torch.empty_like(out), None)
        assert [(g.shape, g.dtype, g.device) for g in gradients] == [(m.shape, m.dtype, CUDA) for m in maps]
        deltas, anchors = torch.empty(2, 9, 4, dtype=torch.bfloat16, device=CUDA), torch.empty(9, 4, device=CUDA)
        inputs = (deltas, anchors, [1.0] * 4, 4.0, None, torch.empty(2, 2, dtype=torch.int64, device=CUDA))
        box_kernels._setup_decode(context, inputs, out)
        gradient, *_ = box_kernels._decode_gradient(context, torch.empty(2, 9, 4, device=CUDA))
        assert (gradient.shape, gradient.dtype, gradient.device) == (deltas.shape, deltas.dtype, CUDA)
    assert not watch.elsewhere
