"""`launch_known`: a launch that is known passes what Triton would pass, to the kernel that Triton would take."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bench.host import Compiled, nothing_runs
from tmask_kernels import multiscale_roi_align, padded_nms, roi_align
from tmask_kernels.common import launch
from tmask_kernels.testing import OpSpec, op_specs

pytestmark = pytest.mark.compile_only

Launches = list[tuple[Any, ...]]


def described(value: Any) -> Any:
    """An argument without what differs from call to call."""
    return (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value


def launches(call: Callable[[], Any]) -> Launches:
    """What a call launches: the kernel, the grid and the arguments."""
    found: Launches = []

    def run(self: Compiled, *args: Any) -> None:
        found.append((id(self), args[:3], pytree.tree_map(described, args[9:])))

    with mock.patch.object(Compiled, "run", run), nothing_runs():
        call()
    return found


def forward_and_backward(spec: OpSpec) -> Callable[[], Any]:
    inputs = {k: v.clone().requires_grad_(k in spec.gradients) for k, v in spec.make().items()}

    def call() -> None:
        out = spec.call(inputs, "triton")
        if spec.gradients:
            torch.autograd.grad(out, [inputs[k] for k in spec.gradients], torch.ones_like(out))

    return call


@pytest.mark.parametrize("spec", op_specs(), ids=lambda spec: spec.name)
def test_the_second_launch_is_the_first(spec):
    call = forward_and_backward(spec)
    launch._known.clear()
    first = launches(call)
    known = set(launch._known)
    assert launches(call) == first
    assert first
    assert set(launch._known) == known
    assert known or not spec.name.startswith(("roi_align", "multiscale_roi_align", "nms"))


MAPS = [torch.rand(2, 16, side, side) for side in (32, 16)]
BOXES = torch.rand(2, 8, 4)
ODD = torch.rand(2 * 16 * 32 * 32 + 1)[1:].view(2, 16, 32, 32)  # begins 4 bytes past a multiple of 16
LAST = torch.channels_last


def pool(maps: list[Tensor] = MAPS, boxes: Tensor = BOXES, size: int = 7, **options: Any) -> Callable[[], Any]:
    leaves = [m.detach().requires_grad_() for m in maps]

    def call() -> None:
        out = multiscale_roi_align(leaves, boxes, size, [0.25, 0.125], **{"backend": "triton", **options})
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return call


def suppress(boxes: Tensor = BOXES, max_output: int = 5, **options: Any) -> Callable[[], Any]:
    scores = torch.arange(boxes[..., 0].numel()).float().view(boxes.shape[:-1])
    return lambda: padded_nms(boxes, scores, 0.5, max_output=max_output, backend="triton", **options)


VARIANTS = {
    "pool": [
        pool(),
        pool([m.bfloat16() for m in MAPS]),
        pool([m.contiguous(memory_format=LAST) for m in MAPS]),
        pool([ODD, MAPS[1]]),
        pool([m[:1] for m in MAPS], BOXES[:1]),
        pool([m[:, :, 1:] for m in MAPS]),
        pool([torch.rand(2, 16, 32, 48), MAPS[1]]),
        pool(boxes=BOXES[:, :7]),
        pool(boxes=BOXES[:, ::2]),
        pool(size=14),
        pool(valid=torch.ones(2, 8) > 0),
        pool(canonical_scale=100),
        pool(sampling_ratio=0),
        pool(aligned=False),
        pool(interpolation="bicubic"),
        pool(interpolation="bicubic", cubic_coeff=-0.75),
        pool(reduction="max"),
        lambda: roi_align(MAPS[0], torch.rand(9, 5), 7, 0.25, backend="triton"),
        lambda: roi_align(MAPS[0], torch.rand(9, 5), 7, 0.5, backend="triton"),
    ],
    "nms": [
        suppress(),
        suppress(max_output=6),
        suppress(BOXES.mT.contiguous().mT),
        suppress(BOXES[:, :7]),
        suppress(valid=torch.ones(2, 8) > 0),
        suppress(torch.rand(2, 600, 4)),
        suppress(torch.rand(2, 120, 4)),
    ],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_known_launch_is_taken_for_no_other(name):
    """Each variant by itself, and then after all others, twice."""
    alone = []
    for call in VARIANTS[name]:
        launch._known.clear()
        alone.append(launches(call))
    assert len({str(one) for one in alone}) == len(alone), "they differ"
    for _ in range(2):
        assert [launches(call) for call in VARIANTS[name]] == alone


def test_what_is_known_has_an_end(monkeypatch):
    monkeypatch.setattr(launch, "_MOST_KNOWN", 5)
    for call in VARIANTS["pool"]:
        launches(call)
        assert len(launch._known) <= 5
