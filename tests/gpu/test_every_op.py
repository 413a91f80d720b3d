"""What every op does on a GPU: the reference's results, the same bits again, no waits, CUDA graphs, streams, devices.

The small cases are the `SPECS` of the ops, which `tmask validate` compares with the reference. The large ones are the
work of the benchmarks (work.py). Other inputs of the same shapes are the same ones in reverse order of rows.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from tests.gpu.tools import (
    assert_gradients_close,
    assert_same_bits,
    deterministic_algorithms,
    need_cuda,
    peak_bytes,
    random_like,
    recorded,
    tensors,
    to,
    waiting_is_an_error,
)
from tests.gpu.work import GRAPHS, MILLION, SPARE, WORK, Work
from tmask_kernels import use_backend
from tmask_kernels.testing import Inputs, OpSpec, assert_close, op_specs

pytestmark = [
    pytest.mark.gpu,
    # The interpreter's numpy, of padding that gives 0 / 0, and ops without a kernel yet.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*using the reference backend on CUDA"),
    pytest.mark.filterwarnings("ignore:.*has no triton backend"),
]

RAGGED = [spec for spec in op_specs() if spec.ragged]
STATIC = [spec for spec in op_specs() if not spec.ragged]
DTYPED = [(spec, dtype) for spec in STATIC for dtype in spec.dtypes]
every_static_op = pytest.mark.parametrize(
    ("spec", "dtype"), DTYPED, ids=[f"{spec.name}-{dtype}".replace("torch.", "") for spec, dtype in DTYPED]
)


@pytest.fixture(autouse=True)
def _kernels_where_there_are(device: torch.device) -> Iterator[None]:
    """The backend that ``auto`` takes on a GPU; in a rehearsal too, where it would take torchvision."""
    with use_backend("auto" if device.type == "cuda" else "triton"):
        yield


@pytest.fixture(autouse=True)
def _one_type_is_enough_to_rehearse(request: pytest.FixtureRequest, device: torch.device) -> None:
    given = request.node.callspec.params
    if device.type != "cuda" and "dtype" in given and given["dtype"] != given["spec"].dtypes[0]:
        pytest.skip("a rehearsal is of one type")


def make(spec: OpSpec, dtype: torch.dtype, device: torch.device) -> Inputs:
    return {k: v.to(device, dtype if k in spec.features else v.dtype) for k, v in spec.make().items()}


def forward_and_backward(spec: OpSpec, inputs: Inputs, backend: str | None = None, scale: float = 1) -> list[Tensor]:
    leaves = {k: v.detach().requires_grad_(k in spec.gradients) for k, v in inputs.items()}
    outputs = tensors(spec.call(leaves, backend))
    if not spec.gradients:
        return outputs
    upstream = (torch.arange(outputs[0].numel(), device=outputs[0].device) % 7 - 3.0).view(outputs[0].shape)
    upstream = (upstream * scale).to(outputs[0].dtype)
    return outputs + list(torch.autograd.grad(outputs[0], [leaves[k] for k in spec.gradients], upstream))


@every_static_op
def test_replays_from_a_graph(spec: OpSpec, dtype: torch.dtype, device: torch.device) -> None:
    """Captured on one input, replayed on another written over it: what eager mode gives for that other."""
    static = make(spec, dtype, device)
    others = [{k: v.flip(0) for k, v in static.items()}, to(static, device)]
    with torch.no_grad():
        replay = recorded(lambda: spec.call(static, None), device)
        for other in others:
            expected = tensors(spec.call(other, None))
            for name, value in static.items():
                value.copy_(other[name])
            assert_same_bits(replay(), expected)


@every_static_op
def test_never_waits(spec: OpSpec, dtype: torch.dtype, device: torch.device) -> None:
    inputs = make(spec, dtype, device)
    first = forward_and_backward(spec, inputs)  # kernels compile
    with waiting_is_an_error(device):
        again = forward_and_backward(spec, inputs)
    assert [t.shape for t in again] == [t.shape for t in first]


@pytest.mark.parametrize("spec", RAGGED, ids=lambda spec: spec.name)
def test_the_guard_sees_a_ragged_op_wait(spec: OpSpec, device: torch.device) -> None:
    inputs = make(spec, torch.float32, device)
    assert len(spec.call(inputs, None))
    need_cuda(device, "sync debug mode")
    with pytest.raises(RuntimeError, match="synchronizing"), waiting_is_an_error(device):
        spec.call(inputs, None)


@every_static_op
def test_gives_the_same_bits_again(spec: OpSpec, dtype: torch.dtype, device: torch.device) -> None:
    """Forward and backward; only a backward of PyTorch's own may refuse deterministic algorithms, by name."""
    inputs, rounds = make(spec, dtype, device), 5 if device.type == "cuda" else 1
    with torch.no_grad():
        first = spec.call(inputs, None)
        for _ in range(rounds):
            assert_same_bits(spec.call(inputs, None), first)
    if not spec.gradients:
        return
    with deterministic_algorithms():
        try:
            gradients = forward_and_backward(spec, inputs)
        except RuntimeError as error:
            assert "eterministic" in str(error)  # noqa: PT017 - refusing is right, and so are equal bits
            return
        for _ in range(rounds):
            assert_same_bits(forward_and_backward(spec, inputs), gradients)


@pytest.mark.parametrize("spec", op_specs(), ids=lambda spec: spec.name)
def test_works_on_the_current_stream(spec: OpSpec, device: torch.device) -> None:
    """Inputs that a busy stream is still writing: an op on any other stream would read what they held before."""
    expected = forward_and_backward(spec, make(spec, torch.float32, device))
    late = make(spec, torch.float32, device)
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
    count = len(tensors(got))
    if count:
        assert_same_bits(got, expected[:count])
    else:
        assert got == spec.call(late, None)


@pytest.mark.parametrize("spec", op_specs(), ids=lambda spec: spec.name)
def test_works_on_a_device_that_is_not_the_current_one(spec: OpSpec, device: torch.device) -> None:
    need_cuda(device, "second device")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    expected = forward_and_backward(spec, make(spec, torch.float32, device))
    with torch.cuda.device(0):
        got = forward_and_backward(spec, make(spec, torch.float32, torch.device("cuda", 1)))
        assert {t.device.index for t in got} <= {1}
        assert torch.cuda.current_device() == 0
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.to(b.device), b, rtol=1e-4, atol=1e-4, equal_nan=True)


def work_of(name: str, full: bool, device: torch.device, dtype: str = "bfloat16") -> tuple[Work, Inputs]:
    """The work and its inputs, in `dtype` if it has features; in a rehearsal in float32."""
    work = WORK[name](full, device)
    if getattr(torch, dtype) not in work.spec.dtypes and work.spec.features:
        pytest.skip(f"has no {dtype}")
    return work, make(work.spec, getattr(torch, dtype) if full else torch.float32, device)


SLOW = {MILLION: [pytest.mark.slow]}
DTYPES = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("dtype_name", DTYPES)
@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, [])) for name in WORK])
def test_equals_the_reference(name: str, dtype_name: str, full: bool, device: torch.device) -> None:
    """And the same bits again; a backward with PyTorch's deterministic algorithms."""
    if dtype_name != DTYPES[0] and (not full or not WORK[name](full, device).spec.features):
        pytest.skip("of one type")
    work, inputs = work_of(name, full, device, dtype_name)
    spec = work.spec
    with deterministic_algorithms() if spec.gradients else nullcontext():
        got = forward_and_backward(spec, inputs, "triton", work.scale)
        for _ in range(2 if full else 1):
            assert_same_bits(forward_and_backward(spec, inputs, "triton", work.scale), got)
    outputs = spec.call(inputs, "triton")
    if work.check:
        work.check(inputs, outputs)
    elif spec.gradients:
        exact = {k: v.double() if k in spec.features else v for k, v in inputs.items()}
        expected = forward_and_backward(spec, exact, "reference", work.scale)
        tolerance = (work.tolerances or {}).get(got[0].dtype)
        assert_close(got[0], expected[0], tolerance=tolerance)
        for gradient, want, leaf in zip(got[1:], expected[1:], [inputs[k] for k in spec.gradients], strict=True):
            assert (gradient.dtype, gradient.stride()) == (leaf.dtype, leaf.stride())
            assert_gradients_close(gradient, want, tolerance=work.gradient_tolerance or tolerance)
    else:
        expected = spec.call(to(inputs, torch.device("cpu")), "reference")
        assert_same_bits(to(outputs, torch.device("cpu")), expected)
        assert expected if not tensors(outputs) else any(t.count_nonzero() for t in tensors(outputs))
        assert tensors(outputs) or outputs == expected


@pytest.mark.parametrize("name", GRAPHS)
def test_full_size_replays_from_a_graph(name: str, full: bool, device: torch.device) -> None:
    """Forward and backward in one graph, to the bit, and no wait outside of it."""
    work, inputs = work_of(name, full, device)
    static = {k: v.clone() for k, v in inputs.items()}

    def run() -> list[Tensor]:
        return forward_and_backward(work.spec, static, "triton", work.scale)

    run()
    with waiting_is_an_error(device):
        run()
    replay = recorded(run, device)
    with torch.no_grad():
        for value in static.values():
            value.copy_(value.flip(0 if len(value) > 1 else 1))
    expected = to(run(), device)
    assert_same_bits(replay(), expected)


@pytest.mark.parametrize("name", SPARE)
def test_memory(name: str, full: bool, device: torch.device) -> None:
    """The forward takes its outputs, the backward its gradients, and either a little more."""
    work, inputs = work_of(name, full, device)
    spec = work.spec
    peak = peak_bytes(lambda: spec.call(inputs, "triton"), device)
    outputs = sum(t.nbytes for t in tensors(spec.call(inputs, "triton")))
    assert peak is None or peak <= outputs + SPARE[name], f"{peak} bytes for outputs of {outputs}"
    if not spec.gradients:
        return
    leaves = {k: v.detach().requires_grad_(k in spec.gradients) for k, v in inputs.items()}
    out = spec.call(leaves, "triton")
    upstream, wanted = random_like(out), [leaves[k] for k in spec.gradients]
    peak = peak_bytes(lambda: torch.autograd.grad(out, wanted, upstream, retain_graph=True), device)
    gradients = sum(leaf.nbytes for leaf in wanted)
    assert peak is None or peak <= gradients + SPARE[name], f"{peak} bytes for gradients of {gradients}"
