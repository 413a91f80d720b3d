"""What holds for every op on a GPU: it can be captured, never waits, and works on any stream and device.

The cases are those of `tmask validate`; other inputs of the same shapes are the same ones in reverse order of rows.
"""

from collections.abc import Iterator

import pytest
import torch

from tests.gpu.tools import (
    assert_same_bits,
    deterministic_algorithms,
    need_cuda,
    recorded,
    tensors,
    to,
    waiting_is_an_error,
)
from tmask_kernels import use_backend
from tmask_kernels.testing import Inputs, OpSpec, op_specs

pytestmark = [
    pytest.mark.gpu,
    # The interpreter's numpy, of padding that gives 0 / 0, and ops without a kernel yet.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*using the reference backend on CUDA"),
    pytest.mark.filterwarnings("ignore:.*has no triton backend"),
]

RAGGED = ("nms", "batched_nms", "soft_nms", "paste_masks (rle)", "paste_masks_batched (rle)")
STATIC = [check for check in op_specs() if check.name not in RAGGED]
DTYPED = [(check, dtype) for check in STATIC for dtype in check.dtypes]
every_static_op = pytest.mark.parametrize(
    ("check", "dtype"), DTYPED, ids=[f"{c.name}-{d}".replace("torch.", "") for c, d in DTYPED]
)


@pytest.fixture(autouse=True)
def _kernels_where_there_are(device: torch.device) -> Iterator[None]:
    """What ``auto`` takes on a GPU; in a rehearsal too, where it would take torchvision."""
    with use_backend("auto" if device.type == "cuda" else "triton"):
        yield


@pytest.fixture(autouse=True)
def _one_type_is_enough_to_rehearse(request: pytest.FixtureRequest, device: torch.device) -> None:
    given = request.node.callspec.params
    if device.type != "cuda" and "dtype" in given and given["dtype"] != given["check"].dtypes[0]:
        pytest.skip("a rehearsal is of one type")


def make(check: OpSpec, dtype: torch.dtype, device: torch.device) -> Inputs:
    return {k: v.to(device, dtype if k in check.features else v.dtype) for k, v in check.make().items()}


def forward_and_backward(check: OpSpec, inputs: Inputs) -> list[torch.Tensor]:
    leaves = {k: v.detach().requires_grad_(k in check.gradients) for k, v in inputs.items()}
    outputs = tensors(check.call(leaves, None))
    if not check.gradients:
        return outputs
    upstream = torch.arange(outputs[0].numel(), device=outputs[0].device).view(outputs[0].shape) % 7 - 3.0
    return outputs + list(
        torch.autograd.grad(outputs[0], [leaves[k] for k in check.gradients], upstream.to(outputs[0].dtype))
    )


@every_static_op
def test_replays_from_a_graph(check: OpSpec, dtype: torch.dtype, device: torch.device) -> None:
    """Captured on one input, replayed on another written over it: what eager mode gives for that other."""
    static = make(check, dtype, device)
    others = [{k: v.flip(0) for k, v in static.items()}, to(static, device)]
    with torch.no_grad():
        replay = recorded(lambda: check.call(static, None), device)
        for other in others:
            expected = tensors(check.call(other, None))
            for name, value in static.items():
                value.copy_(other[name])
            assert_same_bits(replay(), expected)


@every_static_op
def test_never_waits(check: OpSpec, dtype: torch.dtype, device: torch.device) -> None:
    inputs = make(check, dtype, device)
    first = forward_and_backward(check, inputs)  # kernels compile
    with waiting_is_an_error(device):
        again = forward_and_backward(check, inputs)
    assert [t.shape for t in again] == [t.shape for t in first]


@pytest.mark.parametrize("name", RAGGED)
def test_the_guard_sees_a_ragged_op_wait(name: str, device: torch.device) -> None:
    check = next(check for check in op_specs() if check.name == name)
    inputs = make(check, torch.float32, device)
    assert len(check.call(inputs, None))
    need_cuda(device, "sync debug mode")
    with pytest.raises(RuntimeError, match="synchronizing"), waiting_is_an_error(device):
        check.call(inputs, None)


@every_static_op
def test_gives_the_same_bits_again(check: OpSpec, dtype: torch.dtype, device: torch.device) -> None:
    """Forward and backward; only a backward of PyTorch's own may refuse deterministic algorithms, by name."""
    inputs, rounds = make(check, dtype, device), 5 if device.type == "cuda" else 1
    with torch.no_grad():
        first = check.call(inputs, None)
        for _ in range(rounds):
            assert_same_bits(check.call(inputs, None), first)
    if not check.gradients:
        return
    with deterministic_algorithms():
        try:
            gradients = forward_and_backward(check, inputs)
        except RuntimeError as error:
            assert "eterministic" in str(error)  # noqa: PT017 - refusing is right, and so are equal bits
            return
        for _ in range(rounds):
            assert_same_bits(forward_and_backward(check, inputs), gradients)


@pytest.mark.parametrize("check", op_specs(), ids=lambda check: check.name)
def test_works_on_the_current_stream(check: OpSpec, device: torch.device) -> None:
    """Inputs that a busy stream is still writing: an op launched on any other stream would read what stood there."""
    expected = forward_and_backward(check, make(check, torch.float32, device))
    late = make(check, torch.float32, device)
    garbage = {k: v.flip(0).contiguous() for k, v in late.items()}
    need_cuda(device, "streams")
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles: about 30 ms
        for name, value in garbage.items():
            value.copy_(late[name])
        got = check.call(garbage, None)
    torch.cuda.current_stream(device).wait_stream(stream)
    count = len(tensors(got))
    if count:
        assert_same_bits(got, expected[:count])
    else:
        assert got == check.call(late, None)


@pytest.mark.parametrize("check", op_specs(), ids=lambda check: check.name)
def test_works_on_a_device_that_is_not_the_current_one(check: OpSpec, device: torch.device) -> None:
    expected = forward_and_backward(check, make(check, torch.float32, device))
    need_cuda(device, "second device")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.cuda.device(0):
        got = forward_and_backward(check, make(check, torch.float32, torch.device("cuda", 1)))
        assert {t.device.index for t in got} <= {1}
        assert torch.cuda.current_device() == 0
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.to(b.device), b, rtol=1e-4, atol=1e-4, equal_nan=True)
