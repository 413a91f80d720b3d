"""Anchors and box coding against torchvision, the Triton kernels against the reference in float64, and the edges."""

import math
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import clip_boxes_to_image

from tests.model.sync import count_blocking
from tests.mutation import mutant
from tmask_kernels import AnchorSpec, decode_boxes, encode_boxes, make_anchors
from tmask_kernels.common.kernels import boxes
from tmask_kernels.ops.box_coding import kernels, reference
from tmask_kernels.testing import assert_close, guarded, poisoned_empty, random_boxes

# The interpreter's numpy warns where the rules for NaN and inf are at work.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")

BACKENDS = ["reference", "triton"]
HEAD = (10.0, 10.0, 5.0, 5.0)
NAN, INF = float("nan"), float("inf")

# --- anchors ---------------------------------------------------------------------------------------------------------

FPN = ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,))


def torchvision_anchors(sizes, ratios, grids, image_size) -> torch.Tensor:
    generator = AnchorGenerator(sizes, (ratios,) * len(sizes))
    images = ImageList(torch.zeros(1, 3, *image_size), [image_size])
    return generator(images, [torch.zeros(1, 1, *grid) for grid in grids])[0]


@pytest.mark.parametrize(
    ("sizes", "ratios", "grids", "image_size"),
    [
        (FPN, (0.5, 1.0, 2.0), [(200, 272), (100, 136), (50, 68), (25, 34), (13, 17)], (800, 1088)),
        (FPN, (0.5, 1.0, 2.0), [(13, 7), (7, 4), (4, 2), (2, 1), (1, 1)], (50, 27)),
        (((32.0, 64.0, 128.0, 256.0, 512.0),), (0.33, 0.5, 1.0, 2.0, 3.0), [(7, 11)], (112, 176)),
        (((24.0, 31.7), (100.0,)), (0.7,), [(5, 3), (3, 2)], (40, 24)),
    ],
    ids=["fpn", "odd", "one-level", "uneven"],
)
def test_anchors_equal_torchvision(device, sizes, ratios, grids, image_size):
    got = make_anchors(AnchorSpec(sizes, ratios, rounded=True), grids, image_size, device=device)
    assert got.dtype == torch.float32
    assert torch.equal(got.cpu(), torchvision_anchors(sizes, ratios, grids, image_size))


def test_stride_is_image_over_grid_unless_given(device):
    sizes, ratios = ((512.0,),), (1.0,)
    derived = make_anchors(AnchorSpec(sizes, ratios, rounded=True), [(13, 17)], (800, 1088), device=device)
    given = make_anchors(AnchorSpec(sizes, ratios, strides=(64,), rounded=True), [(13, 17)], (800, 1088), device=device)
    assert (derived[17] - derived[0]).tolist() == [0, 61, 0, 61]
    assert (given[17] - given[0]).tolist() == [0, 64, 0, 64]
    assert (given[1] - given[0]).tolist() == [64, 0, 64, 0]


def test_unrounded_anchors_have_the_exact_area_and_ratio(device):
    """detectron2's definition: width sqrt(size^2 / ratio), height ratio * width, centre (cell + offset) * stride."""
    spec = AnchorSpec(((30.0, 50.0),), (0.5, 3.0), strides=(8,), offset=0.5)
    anchors = make_anchors(spec, [(2, 3)], (16, 24), device=device).cpu().double().view(2, 3, 4, 4)
    sides = anchors[..., 2:] - anchors[..., :2]
    expected = [(math.sqrt(s * s / r), r * math.sqrt(s * s / r)) for r in (0.5, 3.0) for s in (30.0, 50.0)]
    assert_close(sides.float(), torch.tensor(expected).expand(2, 3, 4, 2).double())
    centres = (anchors[..., 2:] + anchors[..., :2]) / 2
    assert_close(centres[1, 2].float(), torch.tensor([20.0, 12.0]).expand(4, 2).double())


def test_anchors_of_an_empty_map(device):
    spec = AnchorSpec(((8.0,), (16.0,)), (1.0,))
    assert make_anchors(spec, [(0, 4), (1, 1)], (16, 16), device=device).shape == (1, 4)


# --- coding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), HEAD, (10, 10, 5, 5)], ids=["rpn", "head", "integers"])
def test_coding_equals_torchvision(device, backend, weights):
    anchors = random_boxes(301, height=200, width=300).to(device)
    boxes = random_boxes(301, height=200, width=300, seed=1).to(device)
    coder = BoxCoder(weights=weights)
    deltas = encode_boxes(boxes, anchors, weights, backend=backend)
    assert_close(deltas, coder.encode_single(boxes, anchors).double())
    noise = torch.randn(301, 4, generator=torch.Generator().manual_seed(0)).to(device) * 4
    decoded = decode_boxes(noise, anchors, weights=weights, image_size=(200, 300), backend=backend)
    assert_close(decoded, clip_boxes_to_image(coder.decode_single(noise, anchors), (200, 300)).double())


def test_reference_has_torchvision_bits(device):
    anchors = random_boxes(301, height=200, width=300).to(device)
    noise = torch.randn(301, 4, generator=torch.Generator().manual_seed(0)).to(device) * 4
    expected = BoxCoder(weights=HEAD).decode_single(noise, anchors)
    assert torch.equal(decode_boxes(noise, anchors, weights=HEAD, backend="reference"), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_undoes_encode(device, backend):
    anchors = random_boxes(65, height=90, width=90).to(device)
    boxes = random_boxes(65, height=90, width=90, seed=1).to(device)
    deltas = encode_boxes(boxes, anchors, HEAD, backend=backend)
    again = decode_boxes(deltas, anchors, weights=HEAD, scale_clamp=10.0, backend=backend)
    assert_close(again, boxes.double())


SHAPES = {
    "rows": ((257, 4), (257, 4)),
    "anchors shared by images": ((2, 70, 4), (70, 4)),
    "anchors shared by classes": ((2, 70, 3, 4), (2, 70, 1, 4)),
    "anchors shared by both": ((2, 35, 3, 4), (35, 1, 4)),
    "one anchor": ((5, 7, 4), (4,)),
    "deltas shared": ((4,), (129, 4)),
    "four axes": ((2, 3, 2, 3, 4), (1, 3, 1, 3, 4)),
    "five axes": ((2, 3, 2, 3, 2, 4), (2, 1, 2, 1, 2, 4)),
    "empty": ((2, 0, 4), (0, 4)),
}


def check_coding(module, device, shapes, dtype, image_size=None) -> None:
    """The kernels of `module` against the reference in float64: encode, decode, and decode's gradient."""
    generator = torch.Generator().manual_seed(3)
    deltas = (torch.randn(shapes[0], generator=generator) * torch.tensor([3.0, 3.0, 4.0, 4.0])).to(dtype)
    anchors = random_boxes(torch.Size(shapes[1][:-1]).numel(), height=60, width=90).view(shapes[1])
    anchors = anchors.double() if dtype == torch.float64 else anchors
    sizes = image_size if isinstance(image_size, torch.Tensor) else None
    size = list(image_size) if isinstance(image_size, tuple) else None
    arguments = HEAD, 0.5, image_size
    leaf = deltas.double().requires_grad_()
    expected = reference.decode_boxes_reference(leaf, anchors.double(), *arguments)
    grad = torch.randn(expected.shape, generator=generator).double()
    (expected_grad,) = torch.autograd.grad(expected, leaf, grad)
    boxes = random_boxes(expected[..., 0].numel(), height=60, width=90, seed=5).view(expected.shape)
    boxes = boxes.to(anchors.dtype)
    expected_deltas = reference.encode_boxes_reference(boxes.double(), anchors.double(), HEAD)

    deltas, anchors, boxes = (guarded(t.to(device)) for t in (deltas, anchors, boxes))
    grad = guarded(grad.to(device, anchors.dtype))
    sizes = None if sizes is None else sizes.to(device)
    with poisoned_empty():
        got = module.decode_boxes_fwd(deltas, anchors, HEAD, 0.5, size, sizes)
        got_grad = module.decode_boxes_bwd(grad, deltas, anchors, HEAD, 0.5, size, sizes)
        got_deltas = module.encode_boxes_fwd(boxes, anchors, HEAD)
    assert_close(got.cpu(), expected, name="decode")
    assert_close(got_grad.cpu(), expected_grad, name="gradient")
    assert_close(got_deltas.cpu(), expected_deltas, name="encode")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_kernels_equal_the_reference(device, shapes, dtype):
    if dtype == torch.float64 and device.type == "cuda":
        pytest.skip("float64 is for the interpreter")
    check_coding(kernels, device, shapes, dtype)


IMAGE_SIZES = {"tuple": (50, 80), "tensor": torch.tensor([[50, 80], [40, 30]])}


@pytest.mark.parametrize("image_size", IMAGE_SIZES.values(), ids=IMAGE_SIZES.keys())
def test_kernels_clip(device, image_size):
    check_coding(kernels, device, SHAPES["anchors shared by classes"], torch.float32, image_size)


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        (boxes, "first, third = tl.split(even)", "third, first = tl.split(even)"),
        (kernels, "y1 + 0.5 * height, width, height", "y1, width, height"),
        (kernels, "rows // d2 % d1 * stride_1", "rows // d2 * stride_1"),
        (kernels, "tl.minimum(dw, scale_clamp)", "dw"),
        (kernels, "tl.exp(tl.minimum(dh, scale_clamp)) * ah", "tl.exp(tl.minimum(dh, scale_clamp)) * aw"),
        (kernels, "dx = tl.where(proper, wx *", "dx = tl.where(proper, wy * 2 *"),
        (kernels, "ww * tl.log(", "wh * tl.log(1e-3 + "),
        (kernels, "sizes_ptr + image * 2 + 1", "sizes_ptr + image * 2"),
        (kernels, "clipped(y2, limit_y)", "clipped(y2, limit_y + 1)"),
        (kernels, "g_x1 = tl.where((x - half_w >= 0) &", "g_x1 = tl.where("),
        (kernels, "(g_x2 - g_x1) * half_w / ww", "(g_x1 - g_x2) * half_w / ww"),
        (kernels, "bad | (free_h == 0)", "bad"),
        (kernels, "image = rows // rows_per_image", "image = rows * 0"),
        (boxes, "tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=mask[:, None])",
         "tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty))"),
    ],
    ids=["delta order", "centre", "stride", "clamp", "height", "weight", "log", "width and height", "clip", "clip grad",
         "sign", "clamp grad", "image", "mask"],
)  # fmt: skip
def test_a_broken_kernel_fails(device, tmp_path: Path, module, old, new):
    broken = mutant(module, old, new, tmp_path, seen_from=kernels)

    def both() -> None:
        for image_size in IMAGE_SIZES.values():
            check_coding(broken, device, SHAPES["anchors shared by both"], torch.float32, image_size)

    with pytest.raises((AssertionError, IndexError)):
        both()


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_deltas(device, backend):
    anchors = torch.tensor([[10.0, 10.0, 30.0, 20.0]], device=device).expand(5, 4)
    deltas = torch.tensor(
        [[INF, 0, 0, 0], [-INF, -INF, 0, 0], [0, 0, INF, 0], [0, 0, -INF, -INF], [0, 0, 1e30, 0]], device=device
    )
    got = decode_boxes(deltas, anchors, image_size=(64, 96), backend=backend)
    wide = 20.0 * 1000 / 16
    assert got.isfinite().all()
    assert got[0].tolist() == [96, 10, 96, 20]
    assert got[1].tolist() == [0, 0, 0, 0]
    assert got[3].tolist() == [20, 15, 20, 15]
    free = decode_boxes(deltas[[2, 4]], anchors[:2], backend=backend)
    assert_close(free[:, 2] - free[:, 0], torch.full((2,), wide, dtype=torch.float64, device=device))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("column", range(4))
def test_nan_deltas_give_a_zero_box_and_no_gradient(device, backend, column):
    deltas = torch.zeros(3, 4, device=device)
    deltas[1, column] = NAN
    deltas.requires_grad_()
    anchors = torch.tensor([[10.0, 10.0, 30.0, 20.0]], device=device).expand(3, 4)
    boxes = decode_boxes(deltas, anchors, backend=backend)
    assert boxes.tolist() == [[10, 10, 30, 20], [0, 0, 0, 0], [10, 10, 30, 20]]
    boxes.square().sum().backward()
    assert deltas.grad[1].tolist() == [0, 0, 0, 0]
    assert (deltas.grad[[0, 2]] != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_delta_of_a_flat_anchor_gives_a_zero_box(device, backend):
    anchors = torch.tensor([[10.0, 10.0, 10.0, 20.0]], device=device)
    boxes = decode_boxes(torch.tensor([[INF, 0.0, 0.0, 0.0]], device=device), anchors, backend=backend)
    assert boxes.tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_coordinates_that_are_no_number_pass_the_clip(device, backend):
    """Compiled, the smaller of two numbers is the one that is a number; Triton's interpreter cannot show that."""
    anchors = torch.tensor([[-3e38, 0.0, 3e38, 10.0], [0.0, 0.0, 20.0, 10.0]], device=device)
    deltas = torch.tensor([[INF, 0.0, 0.0, 0.0], [0.0] * 4], device=device)
    boxes = decode_boxes(deltas, anchors, image_size=(64, 96), backend=backend)
    assert boxes[0].isnan().tolist() == [True, False, False, False]
    assert boxes[1].tolist() == [0, 0, 20, 10]


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_encodes_to_zeros(device, backend):
    unit, flat, inverted = [0.0, 0.0, 4.0, 2.0], [0.0, 0.0, 0.0, 2.0], [4.0, 2.0, 0.0, 0.0]
    pairs = [(flat, unit), (unit, flat), (flat, flat), (inverted, unit), (unit, inverted), ([NAN] * 4, unit)]
    boxes = torch.tensor([a for a, _ in pairs], device=device)
    anchors = torch.tensor([b for _, b in pairs], device=device)
    assert encode_boxes(boxes, anchors, backend=backend).tolist() == [[0.0] * 4] * len(pairs)


def test_gradcheck(device):
    if device.type == "cuda":
        pytest.skip("float64 is for the interpreter")
    deltas = (torch.randn(6, 4) * 0.3).double().requires_grad_()
    anchors = random_boxes(6, height=60, width=90).double()
    for backend in BACKENDS:
        assert torch.autograd.gradcheck(
            lambda d, backend=backend: decode_boxes(d, anchors, weights=HEAD, image_size=(50, 80), backend=backend),
            deltas,
        )


def test_half_deltas_are_decoded_in_float32(device):
    deltas = torch.tensor([[0.001, 0.0, 0.0, 0.0]], dtype=torch.bfloat16, device=device)
    anchors = torch.tensor([[1000.0, 0.0, 1100.0, 10.0]], device=device)
    for backend in BACKENDS:
        boxes = decode_boxes(deltas, anchors, backend=backend)
        assert boxes.dtype == torch.float32
        assert_close(boxes[0, 0], 1000 + deltas[0, 0].double() * 100)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [list, tuple, torch.Size])
def test_any_pair_clips(device, backend, kind):
    deltas = torch.zeros(2, 4, device=device)
    anchors = torch.tensor([[10.0, 10.0, 300.0, 200.0]], device=device)
    boxes = decode_boxes(deltas, anchors, image_size=kind([64, 96]), backend=backend)
    assert boxes.tolist() == [[10, 10, 96, 64]] * 2
    assert decode_boxes(deltas[0], anchors[0], image_size=kind([64, 96]), backend=backend).tolist() == [10, 10, 96, 64]


class Conversions(TorchDispatchMode):
    """Dtypes of the tensors that are converted."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.found.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_triton_reads_half_deltas_without_a_copy(device):
    anchors = random_boxes(9, height=60, width=90).to(device)
    with Conversions() as conversions:
        decode_boxes(torch.randn(9, 4, device=device).bfloat16(), anchors, backend="triton")
        assert conversions.found == [torch.float32]  # the test's own
        decode_boxes(torch.randn(9, 4, device=device), anchors.bfloat16(), backend="triton")
    assert conversions.found == [torch.float32, torch.float32, torch.bfloat16]


def test_triton_refuses_float64_on_a_gpu():
    with FakeTensorMode():
        boxes = torch.zeros(2, 4, dtype=torch.float64, device="cuda")
        for call in (encode_boxes, decode_boxes):
            with pytest.raises(ValueError, match="float64 runs in the interpreter only"):
                call(boxes, boxes, backend="triton")
            assert call(boxes, boxes, backend="reference").dtype == torch.float64


def test_float64_with_weights_that_float32_does_not_hold(device):
    """The kernels take weights and scale_clamp in float32; so float64 agrees to float32's precision then."""
    if device.type == "cuda":
        pytest.skip("float64 is for the interpreter")
    weights = (0.1, 0.3, 0.7, 1.1)
    anchors, boxes = (random_boxes(20, height=60, width=90, seed=i).double() for i in range(2))
    deltas = encode_boxes(boxes, anchors, weights, backend="reference")
    again = decode_boxes(deltas, anchors, weights=weights, backend="reference").float()
    assert_close(encode_boxes(boxes, anchors, weights, backend="triton").float(), deltas)
    assert_close(decode_boxes(deltas, anchors, weights=weights, backend="triton").float(), again.double())


def test_encode_by_triton_refuses_a_gradient(device):
    boxes = torch.tensor([[0.0, 0.0, 4.0, 2.0]], device=device, requires_grad=True)
    with pytest.raises(ValueError, match="no Triton backward"):
        encode_boxes(boxes, boxes.detach(), backend="triton")
    assert encode_boxes(boxes, boxes.detach() + 1, backend="reference").requires_grad


@pytest.mark.parametrize(
    "image_size",
    [
        pytest.param(None, id="free", marks=pytest.mark.slow),
        pytest.param((50, 80), id="one", marks=pytest.mark.slow),
        pytest.param(torch.tensor([[50, 80], [40, 30]]), id="each"),
    ],
)
def test_opcheck_and_compile(device, image_size):
    deltas, anchors = torch.randn(2, 9, 4, device=device), random_boxes(9, height=60, width=90).to(device)
    sizes = image_size.to(device) if isinstance(image_size, torch.Tensor) else None
    size = list(image_size) if isinstance(image_size, tuple) else None
    weights = list(HEAD)
    torch.library.opcheck(kernels.encode_boxes, (deltas, anchors, weights))
    torch.library.opcheck(kernels.decode_boxes, (deltas.requires_grad_(), anchors, weights, 4.0, size, sizes))
    torch.library.opcheck(
        kernels.decode_boxes_backward, (deltas.detach(), deltas.detach(), anchors, weights, 4.0, size, sizes)
    )

    def whole(deltas, anchors, image_size, backend):
        boxes = decode_boxes(deltas, anchors, weights=HEAD, image_size=image_size, backend=backend)
        return boxes, encode_boxes(boxes.detach(), anchors, HEAD, backend=backend)

    clip = image_size if sizes is None else sizes
    for backend in BACKENDS:
        compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
        for got, expected in zip(
            compiled(deltas, anchors, clip, backend), whole(deltas, anchors, clip, backend), strict=True
        ):
            assert torch.equal(got, expected)


def test_nothing_waits(device):
    deltas, anchors = torch.randn(2, 9, 4, device=device), random_boxes(9, height=60, width=90).to(device)
    with count_blocking() as found:
        make_anchors(AnchorSpec(((8.0,),), (1.0, 2.0)), [(3, 3)], (24, 24), device=device)
        boxes = decode_boxes(
            deltas, anchors, image_size=torch.tensor([[5, 6], [7, 8]], device=device), backend="reference"
        )
        encode_boxes(boxes, anchors, backend="reference")
    assert not found
