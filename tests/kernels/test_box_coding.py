"""Anchors and box coding against torchvision, the Triton kernels against the reference in float64, and the edges."""

import math

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import clip_boxes_to_image

from tests.allocations import allocated
from tests.kernels.tools import HALVES, INF, NAN, each_mutant, needs_the_interpreter
from tests.model.sync import count_blocking
from tests.mutation import mutant
from tmask_kernels import AnchorSpec, decode_boxes, encode_boxes, make_anchors
from tmask_kernels.common.kernels import boxes
from tmask_kernels.ops.box_coding import kernels, reference
from tmask_kernels.testing import assert_close, guarded, poisoned_empty, random_boxes

HEAD = (10.0, 10.0, 5.0, 5.0)

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


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), HEAD, (10, 10, 5, 5)], ids=["rpn", "head", "integers"])
def test_coding_equals_torchvision(device, backend, weights):
    anchors = random_boxes(301, height=200, width=300).to(device)
    boxes = random_boxes(301, height=200, width=300, seed=1).to(device)
    coder = BoxCoder(weights=weights)
    deltas = encode_boxes(boxes, anchors, weights, backend=backend)
    assert_close(deltas, coder.encode_single(boxes, anchors).double())
    again = decode_boxes(deltas, anchors, weights=weights, scale_clamp=10.0, backend=backend)
    assert_close(again, boxes.double(), name="decoded again")
    noise = torch.randn(301, 4, generator=torch.Generator().manual_seed(0)).to(device) * 4
    decoded = decode_boxes(noise, anchors, weights=weights, image_size=(200, 300), backend=backend)
    expected = coder.decode_single(noise, anchors)
    assert_close(decoded, clip_boxes_to_image(expected, (200, 300)).double())
    if backend == "reference":
        assert torch.equal(decode_boxes(noise, anchors, weights=weights, backend=backend), expected)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_kernels_equal_the_reference(device, shapes, dtype):
    if dtype == torch.float64:
        needs_the_interpreter(device)
    check_coding(kernels, device, shapes, dtype)


IMAGE_SIZES = {"tuple": (50, 80), "tensor": torch.tensor([[50, 80], [40, 30]])}


@pytest.mark.parametrize("image_size", IMAGE_SIZES.values(), ids=IMAGE_SIZES.keys())
def test_kernels_clip(device, image_size):
    check_coding(kernels, device, SHAPES["anchors shared by classes"], torch.float32, image_size)


MUTANTS = {
    "delta order": (boxes, "first, third = tl.split(even)", "third, first = tl.split(even)"),
    "centre": (kernels, "y1 + 0.5 * height, width, height", "y1, width, height"),
    "stride": (kernels, "rows // d2 % d1 * stride_1", "rows // d2 * stride_1"),
    "clamp": (kernels, "tl.minimum(dw, scale_clamp)", "dw"),
    "height": (kernels, "tl.exp(tl.minimum(dh, scale_clamp)) * ah", "tl.exp(tl.minimum(dh, scale_clamp)) * aw"),
    "weight": (kernels, "dx = tl.where(proper, wx *", "dx = tl.where(proper, wy * 2 *"),
    "log": (kernels, "ww * tl.log(", "wh * tl.log(1e-3 + "),
    "width and height": (kernels, "sizes_ptr + image * 2 + 1", "sizes_ptr + image * 2"),
    "clip": (kernels, "clipped(y2, limit_y)", "clipped(y2, limit_y + 1)"),
    "clip grad": (kernels, "g_x1 = tl.where((x - half_w >= 0) &", "g_x1 = tl.where("),
    "sign": (kernels, "(g_x2 - g_x1) * half_w / ww", "(g_x1 - g_x2) * half_w / ww"),
    "clamp grad": (kernels, "bad | (free_h == 0)", "bad"),
    "image": (kernels, "image = rows // rows_per_image", "image = rows * 0"),
    "mask": (
        boxes,
        "tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=mask[:, None])",
        "tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty))",
    ),
}


@each_mutant(MUTANTS)
def test_a_broken_kernel_fails(device, tmp_path, name):
    broken = mutant(*MUTANTS[name], tmp_path, seen_from=kernels)
    with pytest.raises((AssertionError, IndexError)):  # noqa: PT012 - either check may be the one that fails
        for image_size in IMAGE_SIZES.values():
            check_coding(broken, device, SHAPES["anchors shared by both"], torch.float32, image_size)


ANCHOR, WIDE = [10.0, 10.0, 30.0, 20.0], 20 * 1000 / 16 / 2  # half the width of a clamped scale
# Deltas, anchor, image size, box.
EDGES = {
    "infinite dx": ([INF, 0.0, 0.0, 0.0], ANCHOR, (64, 96), [96, 10, 96, 20]),
    "infinite centre": ([-INF, -INF, 0.0, 0.0], ANCHOR, (64, 96), [0, 0, 0, 0]),
    "infinite dw, clipped": ([0.0, 0.0, INF, 0.0], ANCHOR, (64, 96), [0, 10, 96, 20]),
    "infinite dw": ([0.0, 0.0, INF, 0.0], ANCHOR, None, [20 - WIDE, 10, 20 + WIDE, 20]),
    "large dw": ([0.0, 0.0, 1e30, 0.0], ANCHOR, None, [20 - WIDE, 10, 20 + WIDE, 20]),
    "sides of 0": ([0.0, 0.0, -INF, -INF], ANCHOR, (64, 96), [20, 15, 20, 15]),
    "infinite times a side of 0": ([INF, 0.0, 0.0, 0.0], [10.0, 10.0, 10.0, 20.0], None, [0, 0, 0, 0]),
    # Compiled, the smaller of two numbers is the one that is a number; Triton's interpreter cannot show that.
    "a coordinate that is no number": ([INF, 0.0, 0.0, 0.0], [-3e38, 0.0, 3e38, 10.0], (64, 96), [NAN, 0, 96, 10]),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges_of_decoding(device, backend, name):
    delta, anchor, image_size, expected = EDGES[name]
    delta, anchor = torch.tensor([delta], device=device), torch.tensor([anchor], device=device)
    got = decode_boxes(delta, anchor, image_size=image_size, backend=backend)
    atol = 1e-3 if WIDE + 20 in expected else 0
    torch.testing.assert_close(got.cpu(), torch.tensor([expected]).float(), rtol=0, atol=atol, equal_nan=True)


@pytest.mark.parametrize("column", range(4))
def test_nan_deltas_give_a_zero_box_and_no_gradient(device, backend, column):
    deltas = torch.zeros(3, 4, device=device)
    deltas[1, column] = NAN
    deltas.requires_grad_()
    boxes = decode_boxes(deltas, torch.tensor([ANCHOR], device=device).expand(3, 4), backend=backend)
    assert boxes.tolist() == [ANCHOR, [0, 0, 0, 0], ANCHOR]
    boxes.square().sum().backward()
    assert deltas.grad[1].tolist() == [0, 0, 0, 0]
    assert (deltas.grad[[0, 2]] != 0).all()


def test_padding_encodes_to_zeros(device, backend):
    unit, flat, inverted = [0.0, 0.0, 4.0, 2.0], [0.0, 0.0, 0.0, 2.0], [4.0, 2.0, 0.0, 0.0]
    pairs = [(flat, unit), (unit, flat), (flat, flat), (inverted, unit), (unit, inverted), ([NAN] * 4, unit)]
    boxes = torch.tensor([a for a, _ in pairs], device=device)
    anchors = torch.tensor([b for _, b in pairs], device=device)
    assert encode_boxes(boxes, anchors, backend=backend).tolist() == [[0.0] * 4] * len(pairs)


def test_half_deltas_are_decoded_in_float32(device, backend):
    deltas = torch.tensor([[0.001, 0.0, 0.0, 0.0]], dtype=torch.bfloat16, device=device)
    boxes = decode_boxes(deltas, torch.tensor([[1000.0, 0.0, 1100.0, 10.0]], device=device), backend=backend)
    assert boxes.dtype == torch.float32
    assert_close(boxes[0, 0], 1000 + deltas[0, 0].double() * 100)


def test_triton_reads_half_precision_without_a_copy(device):
    deltas, anchors = torch.randn(9, 4, device=device), random_boxes(9, height=60, width=90).to(device)
    for given in ((deltas.bfloat16(), anchors), (deltas, anchors.bfloat16())):
        with allocated(*given) as sizes:
            decode_boxes(*given, backend="triton")
        assert set(sizes) == {9 * 16}  # of the boxes


def test_make_anchors_never_waits(device):
    with count_blocking() as found:
        make_anchors(AnchorSpec(((8.0,),), (1.0, 2.0)), [(3, 3)], (24, 24), device=device)
    assert not found
