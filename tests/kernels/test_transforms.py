"""Function transforms of every op on every backend: the right result, or one error that names a backend that can.

A derivative is compared with the plain backward of the same backend, which other tests hold to the truth: J u with J' w
by <w, J u> = <J' w, u>. vmap is compared with a loop.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.func import grad, jacrev, jvp, vjp, vmap

from tests.kernels.tools import tensors
from tmask_kernels import roi_align, roi_pool, sigmoid_focal_loss
from tmask_kernels.testing import OpSpec, op_specs

pytestmark = pytest.mark.filterwarnings("ignore:.*using the reference backend on CUDA")

# encode_boxes has no kernel for gradients; the custom ops of the others are those of roi_align.
NO_KERNEL_OF_THEIR_OWN = ("encode_boxes", "roi_align (bicubic)", "multiscale_roi_align")
GRADIENTS = {c.name: c.gradients for c in op_specs() if c.gradients} | {"encode_boxes": ("boxes", "anchors")}
CHECKS = {check.name: check for check in op_specs()}
TORCHVISIONS = ("roi_align", "roi_pool", "multiscale_roi_align")
NMS = ("nms", "batched_nms", "padded_nms", "padded_nms (long segments)", "rpn_proposals", "detections")
Point = tuple[Tensor, ...]


def inputs_of(check: OpSpec, backend: str, device: torch.device) -> dict[str, Tensor]:
    if backend == "torchvision" and device.type != "cpu":
        pytest.skip("torchvision's backends serve the CPU")
    return {k: v.to(device) for k, v in check.make().items()}


def function_of(check: OpSpec, backend: str, inputs: dict[str, Tensor], names: Sequence[str]) -> Callable[..., Any]:
    """The op as a function of the inputs of these names."""
    return lambda *given: check.call({**inputs, **dict(zip(names, given, strict=True))}, backend)


def differentiable(check: OpSpec, backend: str, device: torch.device) -> tuple[Callable[..., Tensor], Point, Point]:
    """The op as a function of what it is differentiable in, a point, and a direction."""
    inputs = inputs_of(check, backend, device)
    if backend == "reference":
        inputs = {k: v.double() if k in check.features else v for k, v in inputs.items()}
    names = GRADIENTS[check.name]
    point = tuple(inputs[name] for name in names)
    direction = tuple(torch.randn_like(p) for p in point)
    if "rois" in names:
        direction[names.index("rois")][:, 0] = 0  # the image's index
    return function_of(check, backend, inputs, names), point, direction


def pull(op: Callable[..., Tensor], point: Point, upstream: Tensor) -> Point:
    """J' upstream, by the plain backward."""
    leaves = [p.detach().clone().requires_grad_() for p in point]
    return torch.autograd.grad(op(*leaves), leaves, upstream)


def dot(a: Point, b: Point) -> Tensor:
    return torch.stack([(x * y).double().sum() for x, y in zip(a, b, strict=True)]).sum()


def dual(op: Callable[..., Tensor], point: Point, direction: Point) -> Tensor:
    with forward_ad.dual_level():
        out = op(*[forward_ad.make_dual(p, d) for p, d in zip(point, direction, strict=True)])
        return forward_ad.unpack_dual(out).tangent


def transformed(
    name: str, op: Callable[..., Tensor], point: Point, u: Point, w: Tensor
) -> tuple[Tensor | Point, Callable[[], Tensor | Point]]:
    """What the transform gives, and how to get what it should."""
    every = tuple(range(len(point)))

    def scalar(*given: Tensor) -> Tensor:
        return (op(*given) * w).sum()

    def push() -> Tensor:
        return dot(pull(op, point, w), u)

    def of_two(function: Callable[..., Any]) -> Callable[[], Any]:
        rows = [tuple(t[i] for t in two) for i in range(2)]
        return lambda: torch.stack([function(*row) for row in rows])

    def pulls() -> Point:
        rows = [pull(op, tuple(t[i] for t in two), w) for i in range(2)]
        return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))

    two = tuple(torch.stack([p, p + 0.01 * d]) for p, d in zip(point, u, strict=True))
    both = tuple(torch.stack([d, -2 * d]) for d in u)
    match name:
        case "jvp":
            return dot((w,), (jvp(op, point, u)[1],)), push
        case "dual tensors":
            return dot((w,), (dual(op, point, u),)), push
        case "vmap of jvp, as jacfwd":
            got = vmap(lambda *d: (w * jvp(op, point, d)[1]).double().sum())(*both)
            return got, lambda: push() * torch.tensor([1.0, -2.0], device=w.device)
        case "vjp":
            return vjp(op, *point)[1](w), lambda: pull(op, point, w)
        case "grad":
            return grad(scalar, every)(*point), lambda: pull(op, point, w)
        case "jacrev":
            got = jacrev(lambda *given: torch.stack([scalar(*given), 3 * scalar(*given)]), every)(*point)
            return got, lambda: tuple(torch.stack([g, 3 * g]) for g in pull(op, point, w))
        case "vmap":
            return vmap(op)(*two), of_two(op)
        case "vmap of grad":
            return vmap(grad(scalar, every))(*two), pulls
        case "grad of vmap":
            return grad(lambda *given: vmap(scalar)(*given).sum(), every)(*two), pulls
        case "backward of vmap":
            leaves = [t.clone().requires_grad_() for t in two]
            return torch.autograd.grad(vmap(scalar)(*leaves).sum(), leaves), pulls
    raise AssertionError(name)


TRANSFORMS = ("jvp", "dual tensors", "vmap of jvp, as jacfwd", "vjp", "grad", "jacrev", "vmap", "vmap of grad",
              "grad of vmap", "backward of vmap")  # fmt: skip


def named(check: OpSpec) -> str:
    return check.name.split(" ")[0]


# What auto takes is the reference, which one transform shows.
@pytest.mark.parametrize(
    ("backend", "transform"),
    [("auto", "jvp")]
    + [("reference", name) for name in TRANSFORMS]
    + [pytest.param("auto", name, marks=pytest.mark.slow) for name in TRANSFORMS[1:]],
)
@pytest.mark.parametrize("name", GRADIENTS)
def test_the_reference_is_right(name: str, backend: str, transform: str, device: torch.device) -> None:
    op, point, direction = differentiable(CHECKS[name], backend, device)
    weights = torch.randn_like(op(*point))
    got, expected = transformed(transform, op, point, direction, weights)
    torch.testing.assert_close(got, expected(), rtol=1e-3, atol=1e-3 if backend == "auto" else 1e-7, check_dtype=False)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "triton") for name in GRADIENTS), *((name, "torchvision") for name in TORCHVISIONS)]
)
def test_other_backends_are_refused(name: str, backend: str, transform: str, device: torch.device) -> None:
    op, point, direction = differentiable(CHECKS[name], backend, device)
    weights = differentiable(CHECKS[name], "reference", device)[0](*point)  # no kernel runs here
    message = f"{named(CHECKS[name])}: backend='{backend}' .* no rule for .*torch.*backend='reference' can"
    with pytest.raises(NotImplementedError, match=message):
        transformed(transform, op, point, direction, weights)


@pytest.mark.parametrize("name", GRADIENTS)
def test_second_derivatives_of_the_reference(name: str, device: torch.device) -> None:
    """The gradient J' w is linear in w, so its derivative in w is J, and that in the point a finite difference."""
    op, point, direction = differentiable(CHECKS[name], "reference", device)
    weights = torch.randn_like(op(*point)).requires_grad_()
    leaves = tuple(p.clone().requires_grad_() for p in point)
    first = torch.autograd.grad(op(*leaves), leaves, weights, create_graph=True)
    *to_point, to_weights = torch.autograd.grad(dot(first, direction), (*leaves, weights), materialize_grads=True)
    along = torch.randn_like(weights)
    torch.testing.assert_close(dot((to_weights,), (along,)), dot(pull(op, point, along), direction))
    if all(p.dtype == torch.float64 for p in point):
        step = 1e-5
        moved = [tuple(p + s * d for p, d in zip(point, direction, strict=True)) for s in (step, -step)]
        ahead, behind = (pull(op, at, weights.detach()) for at in moved)
        difference = tuple((a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True))
        torch.testing.assert_close(dot(tuple(to_point), direction), dot(difference, direction), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, "triton") for name in GRADIENTS if name not in NO_KERNEL_OF_THEIR_OWN]
    + [(name, "torchvision") for name in TORCHVISIONS],
)
def test_second_derivatives_of_others_are_refused(name: str, backend: str, device: torch.device) -> None:
    """Also where the second derivative is one term of several, which autograd would leave out."""
    op, point, direction = differentiable(CHECKS[name], backend, device)
    leaves = tuple(p.clone().requires_grad_() for p in point)
    out = op(*leaves)
    upstream = out.detach() * 0 + dot(leaves, direction).to(out.dtype)  # depends on the point
    first = torch.autograd.grad(out, leaves, upstream, create_graph=True)
    message = f"{named(CHECKS[name])}.*: backend='{backend}' has no second derivative; backend='reference'"
    with pytest.raises(NotImplementedError, match=message):
        torch.autograd.grad(dot(first, direction) + dot(leaves, leaves), leaves, allow_unused=True)


PLAIN = [check for check in op_specs() if check.name not in GRADIENTS]


def backends_of(check: OpSpec) -> tuple[str, ...]:
    return ("triton", "reference", "torchvision", "auto") if check.name in NMS else ("triton", "reference", "auto")


EVERY_PLAIN_OP = pytest.mark.parametrize(
    ("check", "backend"),
    [(check, backend) for check in PLAIN for backend in backends_of(check)],
    ids=[f"{check.name}-{backend}" for check in PLAIN for backend in backends_of(check)],
)


def without_derivative(check: OpSpec, backend: str, device: torch.device) -> tuple[Callable[..., Any], Point]:
    inputs = inputs_of(check, backend, device)
    names = [name for name, value in inputs.items() if value.is_floating_point()]
    return function_of(check, backend, inputs, names), tuple(inputs[name] for name in names)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@EVERY_PLAIN_OP
def test_vmap_of_ops_without_derivatives(check: OpSpec, backend: str, device: torch.device) -> None:
    op, point = without_derivative(check, backend, device)
    two = [torch.stack([p, p.flip(0)]) for p in point]
    if check.ragged or check.name == "rpn_proposals":  # it takes a batch of images itself
        with pytest.raises(NotImplementedError, match=rf"{named(check)}: no backend= .*vmap"):
            vmap(op)(*two)
        return
    if backend == "torchvision":
        with pytest.raises(ValueError, match=r"torch\.func\.vmap .*backend='reference' can"):
            vmap(op)(*two)
        return
    rows = [tensors(op(*[t[i] for t in two])) for i in range(2)]
    for got, *expected in zip(tensors(vmap(op)(*two)), *rows, strict=True):
        torch.testing.assert_close(got, torch.stack(expected), equal_nan=True)


@EVERY_PLAIN_OP
def test_no_tangent_passes_ops_without_derivatives(check: OpSpec, backend: str, device: torch.device) -> None:
    """As no gradient does, on every backend."""
    op, point = without_derivative(check, backend, device)
    if "rle" in check.name:
        with pytest.raises(NotImplementedError, match=rf"{named(check)}: no backend= .*jvp.*rle"):
            jvp(op, point, point)
        return
    values, tangents = jvp(lambda *given: tuple(tensors(op(*given))), point, point)
    for value, tangent, plain in zip(values, tangents, tensors(op(*point)), strict=True):
        torch.testing.assert_close(value, plain, equal_nan=True)
        assert not tangent.any()


def test_compiled_code_is_made_anew_for_dual_tensors() -> None:
    x, t = torch.randn(5), torch.ones(5)
    compiled = torch.compile(lambda x: sigmoid_focal_loss(x, t, backend="triton"), backend="aot_eager", fullgraph=True)
    compiled(x)
    with pytest.raises(Exception, match=r"forward_ad|dual tensor"), forward_ad.dual_level():
        compiled(forward_ad.make_dual(x, t))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_compiled_jvp(backend: str) -> None:
    x, t, u = torch.randn(5), torch.ones(5), torch.randn(5)

    def push(x: Tensor, u: Tensor) -> Tensor:
        return jvp(lambda x: sigmoid_focal_loss(x, t, backend=backend), (x,), (u,))[1]

    torch.testing.assert_close(torch.compile(push, backend="aot_eager", fullgraph=True)(x, u), push(x, u))


@pytest.mark.parametrize("op", [roi_align, roi_pool], ids=["roi_align", "roi_pool"])
def test_boxes_under_vmap_need_no_values(op: Callable[..., Tensor]) -> None:
    """Eager mode on a CPU reads the images' indices; an index that does not exist gives zeros here."""
    feature = torch.rand(1, 2, 9, 9)
    boxes = torch.tensor([[[0, 1, 1, 6, 5.0]], [[7, 0, 2, 8, 8.0]]])
    got = vmap(lambda b: op(feature, b, 2, backend="reference"))(boxes)
    torch.testing.assert_close(got[0], op(feature, boxes[0], 2, backend="reference"))
    assert not got[1].any()
