"""roi_pool: hand-made answers, torchvision, the fp64 reference, gradients, edges, mutants."""

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from tests.mutation import mutant
from tmask_kernels import roi_align, roi_pool
from tmask_kernels.common.kernels import numbers
from tmask_kernels.ops.roi_pool.kernels import backward as kernels_backward
from tmask_kernels.ops.roi_pool.kernels import cells
from tmask_kernels.ops.roi_pool.kernels import forward as kernels
from tmask_kernels.testing import assert_close, guarded, poisoned_empty, random_boxes

BACKENDS = ("reference", "torchvision", "triton")
SIDE = 70.0  # pixels; at a scale of 1/4 the map has 13 x 18 cells, so boxes reach beyond it
SCALE = 0.25


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    if request.param == "torchvision" and device.type != "cpu":
        pytest.skip("the torchvision backend serves the CPU only")
    return str(request.param)


def feature_map(
    device: torch.device, *, C: int = 21, dtype: torch.dtype = torch.float32, channels_last: bool = False
) -> Tensor:
    """[2, C, 13, 18] between guard bands of NaN."""
    x = torch.randn(2, C, 13, 18, device=device).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return guarded(x).requires_grad_()


def odd_boxes(device: torch.device) -> Tensor:
    """[12, 4]: ordinary ones, then the degenerate."""
    inf, nan = math.inf, math.nan
    rows = [
        [10.3, 12.1, 30.2, 41.7],
        [0.0, 0.0, 71.0, 51.0],
        [60.0, 40.0, 90.0, 80.0],  # half outside
        [50.0, 40.0, 50.0, 40.0],  # zero size: one cell
        [60.2, 50.1, 40.3, 30.4],  # inverted: one cell
        [60.2, 30.1, 40.3, 50.4],  # inverted on one axis
        [-900.0, -900.0, -700.0, -800.0],  # wholly outside
        [-3e4, -2e4, 5e4, 3e4],
        [-1e9, -1e9, 2e9, 2e9],  # more cells than float32 counts
        [nan, 10.0, 20.0, 30.0],
        [10.0, 10.0, inf, 30.0],
        [-inf, 10.0, 20.0, nan],
    ]
    return torch.tensor(rows, device=device)


def truth(feature: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The reference in float64, and its input to read the gradient from."""
    exact = feature.detach().double().requires_grad_()
    return roi_pool(exact, *args, **kwargs, backend="reference"), exact


def check_forward_and_backward(
    run: Callable[[Tensor], Tensor], feature: Tensor, expected: Tensor, exact: Tensor
) -> None:
    with poisoned_empty():
        out = run(feature)
    assert out.dtype == feature.dtype
    assert_close(out, expected)
    weights = torch.randn_like(out)
    with poisoned_empty():
        (got,) = torch.autograd.grad(out, feature, weights)
    assert got.dtype == feature.dtype
    assert_close(got, torch.autograd.grad(expected, exact, weights.double())[0], name="gradient")


# Hand-made answers


def test_bins_share_cells_and_the_first_of_equals_takes_the_gradient(backend: str, device: torch.device) -> None:
    rows = [[1, 2, 9, 9, 0], [3, 7, 7, 5, 0], [6, 8, 8, 4, 0], [0, 0, 0, 0, 0.0]]
    cells = torch.tensor(rows, device=device)[None, None].requires_grad_()
    # 3 x 4 cells in 2 x 2 bins: rows 0-1 and 1-2, columns 0-1 and 2-3.
    box = torch.tensor([[0, 0.0, 0.0, 3.0, 2.0]], device=device)
    out = roi_pool(cells, box, 2, backend=backend)
    assert out[0, 0].tolist() == [[7, 9], [8, 8]]
    (gradient,) = torch.autograd.grad(out, cells, torch.tensor([[[[1.0, 2.0], [4.0, 8.0]]]], device=device))
    expected = torch.zeros(4, 5, device=device)
    expected[1, 1], expected[0, 2], expected[2, 1], expected[2, 2] = 1, 2, 4, 8
    assert_close(gradient[0, 0], expected)


@pytest.mark.parametrize(("x", "cell"), [(0.5, 1), (1.5, 2), (2.5, 3), (2.4999, 2), (0.49999997, 0), (-0.5, None)])
def test_coordinates_round_half_away_from_zero(backend: str, device: torch.device, x: float, cell: int | None) -> None:
    """A point is one cell: torch.round would take 0.5 and 2.5 to the even number, and floor(x + 0.5) the last to 1."""
    cells = torch.arange(1.0, 7.0, device=device).expand(1, 1, 6, 6)
    out = roi_pool(cells, torch.tensor([[0, x, 0.0, x, 0.0]], device=device), 1, backend=backend)
    assert out.item() == (0 if cell is None else cell + 1)


def test_a_ramp_shows_the_misalignment(backend: str, device: torch.device) -> None:
    """On a ramp in x a bin's largest cell is its last, up to a cell and a half from the centre that RoIAlign gives."""
    ramp = torch.arange(40.0, device=device).expand(1, 1, 40, 40)
    box = torch.tensor([[0, 13.0, 13.0, 42.0, 42.0]], device=device)  # at 1/2: 6.5 to 21 cells
    centres = 6.5 - 0.5 + 14.5 / 5 * (torch.arange(5.0, device=device) + 0.5)
    aligned = roi_align(ramp, box, (1, 5), 0.5, 2, aligned=True, backend=backend)
    assert_close(aligned[0, 0, 0], centres)
    pooled = roi_pool(ramp, box, (1, 5), 0.5, backend=backend)[0, 0, 0]
    # Rounded to cells 7..21, 15 of them in 5 bins of 3: the last of each.
    assert pooled.tolist() == [9, 12, 15, 18, 21]
    assert_close(pooled - centres, torch.tensor([1.55, 1.65, 1.75, 1.85, 1.95], device=device))
    # Moved by 0.4 of a cell, the pixels under the box are others, and RoIPool sees no difference.
    moved = box + torch.tensor([0, 0.8, 0.8, 0.8, 0.8], device=device)
    assert torch.equal(roi_pool(ramp, moved, (1, 5), 0.5, backend=backend)[0, 0, 0], pooled)
    assert_close(roi_align(ramp, moved, (1, 5), 0.5, 2, True, backend=backend)[0, 0, 0], centres + 0.4)


def brute_force(feature: Tensor, box: list[float], size: tuple[int, int], scale: float) -> Tensor:
    """One box on [C, H, W] by loops, straight from the definition."""
    C, H, W = feature.shape
    x1, y1, x2, y2 = (math.copysign(math.floor(abs(c * scale) + 0.5), c) for c in box)
    h, w = max(y2 - y1 + 1, 1.0), max(x2 - x1 + 1, 1.0)
    out = torch.zeros(C, *size, dtype=feature.dtype)
    for ph in range(size[0]):
        for pw in range(size[1]):
            rows = range(int(y1 + ph * h // size[0]), int(y1 - (-(ph + 1) * h) // size[0]))
            columns = range(int(x1 + pw * w // size[1]), int(x1 - (-(pw + 1) * w) // size[1]))
            inside = [x for x in columns if 0 <= x < W]
            cells = [feature[:, y, x] for y in rows if 0 <= y < H for x in inside]
            if cells:
                out[:, ph, pw] = torch.stack(cells).amax(0)
    return out


@pytest.mark.parametrize("size", [(3, 2), (1, 1), (4, 5)], ids=str)
def test_reference_follows_the_definition(size: tuple[int, int]) -> None:
    feature = torch.randn(1, 3, 11, 13)
    for box in odd_boxes(torch.device("cpu"))[:8].tolist():
        out = roi_pool(feature, torch.tensor([[0.0, *box]]), size, 0.125, backend="reference")
        assert torch.equal(out[0], brute_force(feature[0], box, size, 0.125))


# Against torchvision, and against the reference in float64


@pytest.mark.parametrize("size", [(7, 7), (3, 5), (1, 1)], ids=str)
def test_equals_torchvision(backend: str, device: torch.device, size: tuple[int, int]) -> None:
    """Bit for bit, also where float32 gives the last of 7 bins a cell more: boxes of 57 cells are among these."""
    count = 5 if backend == "triton" and device.type == "cpu" else 40
    feature = torch.randn(2, 3, 15, 64, device=device, requires_grad=True)
    boxes = random_boxes(count, height=30, width=130, min_size=0.5, max_size=20)
    boxes += torch.randn(count, 1) * 10  # some hang over the border
    boxes[0] = torch.tensor([0.0, 2.0, 112.0, 2.0])
    rois = torch.cat([torch.arange(count)[:, None] % 2, boxes], 1).to(device)
    expected = torchvision.ops.roi_pool(feature, rois, size, 0.5)
    out = roi_pool(feature, rois, size, 0.5, backend=backend)
    assert torch.equal(out, expected)
    weights = torch.randn_like(out)
    (got,), (want,) = (torch.autograd.grad(x, feature, weights) for x in (out, expected))
    assert_close(got, want.double())


def test_float64_takes_the_cells_of_float32(device: torch.device) -> None:
    """29 cells in 7 bins: float64 would give the last bin one more."""
    feature = torch.zeros(1, 1, 40, 40, device=device)
    feature[..., 29] = 1
    box = torch.tensor([[0, 0.0, 0.0, 28.0, 28.0]], device=device)
    assert torchvision.ops.roi_pool(feature.double(), box.double(), 7).any()
    for backend in ("reference", "triton"):
        assert not roi_pool(feature, box, 7, backend=backend).any()
        if device.type == "cpu" or backend == "reference":
            assert not roi_pool(feature.double(), box.double(), 7, backend=backend).any()


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=lambda d: str(d).removeprefix("torch.")
)
def test_backends_equal_the_truth(backend: str, device: torch.device, dtype: torch.dtype, channels_last: bool) -> None:
    if dtype == torch.float64 and (backend == "torchvision" or (device.type == "cuda" and backend == "triton")):
        pytest.skip("no float64")
    feature = feature_map(device, dtype=dtype, channels_last=channels_last)
    boxes = random_boxes(4, height=SIDE, width=SIDE, min_size=4, device=device).view(2, 2, 4)
    check_forward_and_backward(
        lambda f: roi_pool(f, boxes, (2, 5), SCALE, backend=backend), feature, *truth(feature, boxes, (2, 5), SCALE)
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN boxes in the interpreter
@pytest.mark.parametrize("cells", [(9, 11), (1, 1)], ids=str)
def test_odd_boxes(backend: str, device: torch.device, cells: tuple[int, int]) -> None:
    feature = feature_map(device, C=4)[:1, :, : cells[0], : cells[1]].detach().contiguous().requires_grad_()
    boxes = odd_boxes(device)[None]
    expected, exact = truth(feature, boxes, 2, SCALE)
    check_forward_and_backward(lambda f: roi_pool(f, boxes, 2, SCALE, backend=backend), feature, expected, exact)
    assert not expected[~torch.isfinite(boxes).all(-1).flatten()].any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflows in the interpreter
def test_boxes_that_overflow_once_scaled_give_zeros(backend: str, device: torch.device) -> None:
    feature = torch.ones(1, 3, 8, 8, device=device, requires_grad=True)
    rows = [[1e30, 1e30, 2e30, 2e30], [-1e30, 0.0, 1e30, 2e-10], [0.0, -3e28, 2e-10, 3e28], [0.0, 0.0, 4e-10, 4e-10]]
    out = roi_pool(feature, torch.tensor([rows], device=device), 2, 1e10, backend=backend)
    assert out.flatten(1).sum(1).tolist() == [0, 0, 0, 12]
    (gradient,) = torch.autograd.grad(out.sum(), feature)
    assert gradient.sum().item() == 12


def test_nan_is_passed_over_and_nothing_above_minus_inf_is_minus_inf(backend: str, device: torch.device) -> None:
    feature = torch.ones(1, 2, 4, 6, device=device)
    feature[:, 0, :, :3], feature[:, 0, 1, 1] = -math.inf, math.nan
    feature[:, 1, 0, 0] = math.nan
    feature.requires_grad_()
    out = roi_pool(feature, torch.tensor([[0, 0.0, 0.0, 5.0, 3.0]], device=device), (1, 2), backend=backend)
    assert out.flatten(1).tolist() == [[-math.inf, 1, 1, 1]]
    (gradient,) = torch.autograd.grad(out, feature, torch.ones_like(out))
    expected = torch.zeros_like(gradient)
    expected[0, 0, 0, 3] = expected[0, 1, 0, 1] = expected[0, 1, 0, 3] = 1
    assert_close(gradient, expected)


# Forms of the arguments, empty inputs, layouts


def test_forms_of_boxes_agree(backend: str, device: torch.device) -> None:
    feature = feature_map(device, C=3).detach()
    boxes = random_boxes(4, height=SIDE, width=SIDE, min_size=4, device=device).view(2, 2, 4)
    padded = roi_pool(feature, boxes, 2, SCALE, backend=backend)
    assert torch.equal(roi_pool(feature, list(boxes), 2, SCALE, backend=backend), padded)
    index = torch.tensor([1.0] * 2 + [0.0] * 2, device=device)[:, None]
    flat = roi_pool(feature, torch.cat([index, boxes.flip(0).flatten(0, 1)], 1), 2, SCALE, backend=backend)
    assert torch.equal(flat, padded.view(2, 2, 3, 2, 2).flip(0).flatten(0, 1))


def test_invalid_rows_are_zero_and_take_no_gradient(backend: str, device: torch.device) -> None:
    feature = feature_map(device, C=3)
    boxes = random_boxes(8, height=SIDE, width=SIDE, min_size=4, device=device).view(2, 4, 4)
    valid = torch.tensor([[True] * 2 + [False] * 2, [False] * 4], device=device)
    boxes[~valid] = math.nan
    out = roi_pool(feature, boxes, 2, SCALE, valid=valid, backend=backend)
    assert torch.equal(out[:2], roi_pool(feature, [boxes[0, :2], boxes[1, :0]], 2, SCALE, backend=backend))
    assert not out[2:].any()
    assert not torch.autograd.grad(out[2:].sum(), feature)[0].any()


@pytest.mark.parametrize("shape", [(2, 0, 4), (0, 5)], ids=str)
def test_no_boxes_keep_the_graph(backend: str, device: torch.device, shape: tuple[int, ...]) -> None:
    feature = feature_map(device, C=3)
    out = roi_pool(feature, torch.zeros(shape, device=device), (4, 2), SCALE, backend=backend)
    assert out.shape == (0, 3, 4, 2)
    (gradient,) = torch.autograd.grad(out.sum(), feature)
    assert gradient.shape == feature.shape
    assert not gradient.any()


@pytest.mark.parametrize("chosen", ["auto", "reference", "triton"])
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (1, 3, 0, 8), (1, 3, 8, 0), (1, 0, 8, 8)], ids=str)
def test_maps_without_cells_give_zeros(device: torch.device, chosen: str, shape: tuple[int, ...]) -> None:
    feature = torch.zeros(shape, device=device, requires_grad=True)
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]], device=device).expand(shape[0], 1, 4)
    out = roi_pool(feature, boxes, 2, backend=chosen)
    assert out.shape == (shape[0], shape[1], 2, 2)
    assert not out.any()
    assert torch.autograd.grad(out.sum(), feature)[0].shape == feature.shape


def test_strided_features_and_gradients(backend: str, device: torch.device) -> None:
    """A view with odd strides is read where it lies; so is a gradient that is one number repeated."""
    feature = torch.randn(2, 40, 30, 8, device=device)[:, ::2, 3:, ::2].permute(0, 3, 1, 2)  # [2, 4, 20, 27]
    feature = feature.requires_grad_()
    boxes = random_boxes(6, height=40, width=50, min_size=4, device=device).view(2, 3, 4)
    expected, exact = truth(feature, boxes, 3, 0.5)
    out = roi_pool(feature, boxes, 3, 0.5, backend=backend)
    assert_close(out, expected)
    assert_close(torch.autograd.grad(out.sum(), feature)[0], torch.autograd.grad(expected.sum(), exact)[0])


def test_more_channels_than_a_block(device: torch.device) -> None:
    assert kernels.pick_tile(300, 7, True).block_c < 300
    assert kernels_backward.pick_gather_tile(300, True).block_c < 300
    feature = torch.randn(1, 300, 5, 6, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
    boxes = random_boxes(3, height=10, width=12, min_size=2, device=device)[None]
    out = roi_pool(feature, boxes, (2, 7), 0.5, backend="triton")
    assert out.is_contiguous(memory_format=torch.channels_last)
    expected, exact = truth(feature, boxes, (2, 7), 0.5)
    assert_close(out, expected)
    (gradient,) = torch.autograd.grad(out.sum(), feature)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    assert_close(gradient, torch.autograd.grad(expected.sum(), exact)[0])


def test_the_index_is_kept_only_for_a_gradient(device: torch.device) -> None:
    feature, boxes = torch.randn(1, 3, 8, 8, device=device), torch.tensor([[[0.0, 0.0, 5.0, 5.0]]], device=device)
    out, index = kernels.roi_pool(feature, boxes, None, 2, 2, 1.0, False)
    kept, cells = kernels.roi_pool(feature, boxes, None, 2, 2, 1.0, True)
    assert not index.numel()
    assert cells.dtype == torch.int32
    assert torch.equal(out, kept)
    assert torch.equal(feature.flatten(2).gather(2, cells.long().flatten(2)).view_as(out), out)


def test_autocast_keeps_fp32(backend: str, device: torch.device) -> None:
    feature = feature_map(device, C=3).detach()
    boxes = random_boxes(6, height=SIDE, width=SIDE, min_size=4, device=device).view(2, 3, 4)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = roi_pool(feature, boxes, 2, SCALE, backend=backend)
    assert_close(out, truth(feature, boxes, 2, SCALE)[0])


# Gradients


@pytest.mark.parametrize("chosen", ["reference", "triton"])
def test_gradcheck(device: torch.device, chosen: str) -> None:
    if device.type == "cuda" and chosen == "triton":
        pytest.skip("float64 runs in the interpreter only")
    # Far enough apart that no small step makes another cell the largest.
    feature = (torch.randperm(24, device=device).double().view(1, 2, 3, 4) / 10).requires_grad_()
    boxes = torch.tensor([[0, -1.2, 2.1, 5.7, 8.2]], device=device)
    assert torch.autograd.gradcheck(
        lambda f: roi_pool(f, boxes, (1, 2), 0.5, backend=chosen), feature, fast_mode=chosen == "triton"
    )


def test_many_gradients_of_one_cell_are_summed_in_fp32(backend: str, device: torch.device) -> None:
    """256 and eight ones on one cell: in bfloat16 256 + 1 is 256."""
    feature = torch.zeros(1, 1, 4, 4, device=device, dtype=torch.bfloat16)
    feature[..., 2, 1] = 1
    feature.requires_grad_()
    boxes = torch.tensor([0.0, 0.0, 3.0, 3.0], device=device).expand(1, 9, 4)
    upstream = torch.tensor([256.0] + [1.0] * 8, device=device, dtype=torch.bfloat16).view(9, 1, 1, 1)
    (gradient,) = torch.autograd.grad(roi_pool(feature, boxes, 1, backend=backend), feature, upstream)
    expected = torch.zeros_like(gradient)
    expected[..., 2, 1] = 264
    assert torch.equal(gradient, expected)


def test_gradient_is_deterministic(device: torch.device) -> None:
    """The same bits twice, and no refusal in deterministic mode; more boxes than one word of the mask holds."""
    boxes = random_boxes(33, height=50, width=SIDE, max_size=12, device=device)[None]
    feature = feature_map(device, C=3).detach()[:1].requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        out = roi_pool(feature, boxes, (1, 2), SCALE, backend="triton")
        weights = torch.randn_like(out)
        (first,), (second,) = (torch.autograd.grad(out, feature, weights, retain_graph=True) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)
    expected, exact = truth(feature, boxes, (1, 2), SCALE)
    assert_close(first, torch.autograd.grad(expected, exact, weights.double())[0])


# Errors, the choice of a backend, tracing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(2, 3, 8, 8).double(), "backend": "torchvision"}, "rounds the bins of float64"),
        ({"input": torch.zeros(2, 3, 0, 8), "backend": "torchvision"}, "serves maps of 1 to"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments = {"input": torch.zeros(2, 3, 8, 8), "boxes": torch.zeros(2, 3, 4), "output_size": 2} | change
    with pytest.raises(ValueError, match=message):
        roi_pool(**arguments)


def test_a_backward_without_the_index_is_refused(device: torch.device) -> None:
    feature = torch.zeros(1, 1, 4, 4, device=device, requires_grad=True)
    out, _ = kernels.roi_pool(feature, torch.zeros(1, 1, 4, device=device), None, 1, 1, 1.0, False)
    with pytest.raises(RuntimeError, match="keep_index=True"):
        out.sum().backward()


def test_unknown_images_give_zeros_where_they_cannot_be_seen(device: torch.device) -> None:
    feature = torch.ones(2, 3, 8, 8, device=device)
    boxes = torch.tensor([[-1.0, 1, 1, 5, 5], [1, 1, 1, 5, 5], [2, 1, 1, 5, 5], [math.nan, 1, 1, 5, 5]], device=device)
    expected = torch.tensor([0.0, 1, 0, 0], device=device)[:, None, None, None].expand(4, 3, 2, 2)
    compiled = torch.compile(roi_pool, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(feature, boxes, 2, backend="reference"), expected)
    assert torch.equal(kernels.roi_pool(feature, boxes, None, 2, 2, 1.0, False)[0], expected)


@pytest.mark.parametrize("chosen", ["reference", "triton", "auto"])
def test_compiles_whole(device: torch.device, chosen: str) -> None:
    feature = feature_map(device, C=3)
    boxes = random_boxes(6, height=SIDE, width=SIDE, min_size=4, device=device).view(2, 3, 4)
    valid = torch.tensor([[True, True, False]] * 2, device=device)

    def run(feature: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
        return roi_pool(feature, boxes, 2, SCALE, valid=valid, backend=chosen)

    out = torch.compile(run, fullgraph=True, backend="aot_eager")(feature, boxes, valid)
    expected = run(feature, boxes, valid)
    assert torch.equal(out, expected)
    weights = torch.randn_like(out)
    (got,), (want,) = (torch.autograd.grad(x, feature, weights) for x in (out, expected))
    assert_close(got, want.double())


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_opcheck(device: torch.device, channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    feature = torch.randn(1, 3, 8, 6, device=device).contiguous(memory_format=layout).requires_grad_()
    boxes = random_boxes(2, height=16, width=12, min_size=4, device=device)[None]
    valid = torch.tensor([[True, False]], device=device)
    torch.library.opcheck(kernels.roi_pool, (feature, boxes, valid, 2, 3, 0.5, True))
    grad = torch.randn(2, 3, 2, 3, device=device)
    index = torch.randint(-1, 48, (2, 3, 2, 3), device=device, dtype=torch.int32)
    torch.library.opcheck(
        kernels_backward.roi_pool_backward, (grad, index, boxes, valid, [1, 3, 8, 6], channels_last, 0.5)
    )


# Mutants: each must turn the parity check red


def parity(kernels: ModuleType, device: torch.device) -> None:
    """Cells of few values, so that equal ones are everywhere."""
    feature = (feature_map(device, C=5).detach() * 2).round().requires_grad_()
    boxes = torch.cat(
        [odd_boxes(device)[[0, 2, 3, 4, 5]], random_boxes(5, height=50, width=SIDE, max_size=9).to(device)]
    )
    boxes = torch.cat([torch.arange(10.0, device=device)[:, None] % 2, boxes], 1)
    expected, exact = truth(feature, boxes, (2, 3), SCALE)
    check_forward_and_backward(
        lambda f: kernels.roi_pool(f, boxes, None, 2, 3, SCALE, True)[0], feature, expected, exact
    )


MUTANTS = {
    "last of equals": (kernels, "larger = value > best", "larger = value >= best"),
    "empty bin not 0": (kernels, "(first_x < past_x)[:, None], best, 0.0", "(first_x < past_x)[:, None], best, 1.0"),
    "cells beyond the bin": (kernels, "mask = (x < past_x)[:, None] & mask_c", "mask = (x < W)[:, None] & mask_c"),
    "every other column": (kernels, "x = first_x + (i + j)", "x = first_x + (i + 2 * j)"),
    "swapped sizes": (kernels, "offs_pw.to(tl.float32), W.to(tl.float32)", "offs_pw.to(tl.float32), H.to(tl.float32)"),
    "index of the column alone": (kernels, "(y * W + x)[:, None]", "x[:, None]"),
    "rounded down": (cells, "size - whole >= 0.5", "size - whole >= 1.5"),
    "half towards zero": (cells, "size - whole >= 0.5", "size - whole > 0.5"),
    "without the last cell": (cells, "- start + 1.0, 1.0)", "- start, 1.0)"),
    "no cell of inverted boxes": (cells, "- start + 1.0, 1.0)", "- start + 1.0, 0.0)"),
    "bins not rounded up": (cells, "tl.ceil((index + 1.0)", "tl.floor((index + 1.0)"),
    "a gradient for each cell": (kernels_backward, "kept[None, None, :] == cells", "kept[None, None, :] >= 0 * cells"),
    "a box a word": (numbers, "bits ^ lowest", "bits * 0"),
    "boxes of another image": (kernels_backward, " & (image == n)", ""),
    "last row of bins left out": (kernels_backward, "tl.ceil(high + slack)", "tl.floor(high - 1.0)"),
    "first bins left out": (kernels_backward, "tl.floor(low - slack)", "tl.ceil(low + slack)"),
    "tiles at the box's end left out": (kernels_backward, "(end_x[None, :] > left)", "(end_x[None, :] > left + 4)"),
}  # fmt: skip


def test_parity_is_green(device: torch.device) -> None:
    parity(kernels, device)


# One of each module; `make test-slow` breaks the rest.
FAST = {"last of equals", "half towards zero", "a gradient for each cell", "a box a word"}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of a division by the 0 cells of a mutant
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in MUTANTS]
)
def test_mutants_turn_parity_red(name: str, device: torch.device, tmp_path: Path) -> None:
    module, old, new = MUTANTS[name]
    broken = mutant(module, old, new, tmp_path, seen_from=kernels)
    with pytest.raises(AssertionError):
        parity(broken, device)
