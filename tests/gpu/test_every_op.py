"""What every op does on a GPU, in the small cases of its `SPECS`: no waits, CUDA graphs, streams, devices.

The tests of the kernels compare these cases with the reference there. Other inputs of the same shapes are the same ones
in reverse order of rows.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.gpu.tools import need_cuda, recorded, to, waiting_is_an_error
from tests.kernels.tools import assert_same, tensors
from tmask_kernels import use_backend
from tmask_kernels.testing import Inputs, OpSpec, op_specs

pytestmark = pytest.mark.gpu

DTYPED = [(spec, dtype) for spec in op_specs() if not spec.ragged for dtype in spec.dtypes]
every_op = pytest.mark.parametrize("spec", op_specs(), ids=lambda spec: spec.name)


@pytest.fixture(autouse=True)
def _kernels_where_there_are(device: torch.device) -> Iterator[None]:
    """The backend that ``auto`` takes on a GPU; in a rehearsal too, where it would take torchvision."""
    with use_backend("auto" if device.type == "cuda" else "triton"):
        yield


def make(spec: OpSpec, dtype: torch.dtype, device: torch.device) -> Inputs:
    return {k: v.to(device, dtype if k in spec.features else v.dtype) for k, v in spec.make().items()}


def forward_and_backward(spec: OpSpec, inputs: Inputs) -> list[Tensor]:
    leaves = {k: v.detach().requires_grad_(k in spec.gradients) for k, v in inputs.items()}
    outputs = tensors(spec.call(leaves, None))
    if not spec.gradients:
        return outputs
    upstream = (torch.arange(outputs[0].numel(), device=outputs[0].device) % 7 - 3.0).view(outputs[0].shape)
    wanted = [leaves[k] for k in spec.gradients]
    return outputs + list(torch.autograd.grad(outputs[0], wanted, upstream.to(outputs[0].dtype)))


@pytest.mark.parametrize(
    ("spec", "dtype"), DTYPED, ids=[f"{spec.name}-{dtype}".replace("torch.", "") for spec, dtype in DTYPED]
)
def test_never_waits_and_replays_from_a_graph(spec: OpSpec, dtype: torch.dtype, device: torch.device) -> None:
    """Captured on one input, replayed on another written over it: what eager mode gives for that other."""
    if device.type != "cuda" and dtype != spec.dtypes[0]:
        pytest.skip("a rehearsal is of one type")
    static = make(spec, dtype, device)
    others = [{k: v.flip(0) for k, v in static.items()}, to(static, device)]
    forward_and_backward(spec, static)  # kernels compile
    with waiting_is_an_error(device):
        forward_and_backward(spec, static)
    replay = recorded(lambda: forward_and_backward(spec, static), device)
    for other in others:
        for name, value in static.items():
            value.copy_(other[name])
        assert_same(replay(), forward_and_backward(spec, other))


@every_op
def test_works_on_the_current_stream(spec: OpSpec, device: torch.device) -> None:
    """Inputs that a busy stream is still writing: an op on any other stream would read what they held before."""
    late = make(spec, torch.float32, device)
    expected = spec.call(late, None)
    garbage = {k: v.flip(0).contiguous() for k, v in late.items()}
    need_cuda(device, "streams")
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles: about 30 ms
        for name, value in garbage.items():
            value.copy_(late[name])
        got = spec.call(garbage, None)
    torch.cuda.current_stream(device).wait_stream(stream)
    assert_same(got, expected)


@every_op
def test_works_on_a_device_that_is_not_the_current_one(spec: OpSpec, device: torch.device) -> None:
    need_cuda(device, "second device")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    expected = forward_and_backward(spec, make(spec, torch.float32, device))
    with torch.cuda.device(0):
        got = forward_and_backward(spec, make(spec, torch.float32, torch.device("cuda", 1)))
        assert {t.device.index for t in got} <= {1}
        assert torch.cuda.current_device() == 0
    torch.testing.assert_close(to(got, device), expected, rtol=1e-4, atol=1e-4, equal_nan=True)
