"""mask_targets in Triton: the reference's bits for any box, RoIAlign's values, exact halves, memory, mutants."""

import math
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.allocations import allocated
from tests.kernels.test_mask_targets import CONVENTIONS, ROUNDING, blobs, expected_targets
from tests.mutation import mutant
from tmask_kernels import mask_targets, pack_masks, unpack_masks
from tmask_kernels.backend import interpreter_enabled
from tmask_kernels.ops.mask_targets import kernels
from tmask_kernels.ops.mask_targets.op import MAX_SIDE
from tmask_kernels.ops.mask_targets.reference import mask_targets_reference
from tmask_kernels.testing import assert_close, guarded, poisoned_empty

# Of the interpreter: numpy's, of boxes that are NaN or overflow, and of a loop's bound that is an array of one number.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]

SIZE = (9, 45)  # two words a row
SLOW = pytest.mark.slow


def check_same(
    packed: Tensor,
    boxes: Tensor,
    index: Tensor,
    size: int,
    convention: str,
    sizes: Tensor | None = None,
    module: ModuleType = kernels,
) -> Tensor:
    """Triton's targets, after they were held against the reference's: the same bits, nothing beside them written."""
    with poisoned_empty():
        got = module.mask_targets(packed, boxes, index, size, convention == "detectron2", sizes)
    expected = mask_targets(packed, boxes, index, size, convention=convention, image_sizes=sizes, backend="reference")
    assert got.dtype == torch.float32
    assert_close(got, expected)
    assert torch.equal(got, expected)
    return got


def ordinary(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed masks [2, 2, 9, 2] of images of two sizes and RoIs [2, 3, 4]: small, over a word's end, past borders."""
    boxes = torch.tensor(
        [
            [[29.3, 1.2, 35.9, 4.4], [-2.5, -3.0, 9.25, 11.5], [7.1, 3.3, 7.9, 3.4]],
            [[30.0, 2.0, 36.0, 8.0], [31.75, 2.5, 39.5, 9.5], [0.0, 0.0, 45.0, 9.0]],
        ],
        device=device,
    )
    index = torch.tensor([[0, 1, 1], [1, 0, -1]], device=device)
    sizes = torch.tensor([[9, 45], [7, 34]], device=device)
    masks = blobs(2, 2, *SIZE)
    masks[1, :, 5:] = True  # on both sides of a border
    masks[1, 1, 4, 30:36] = False  # with the row below: bins of 2 x 2 pixels that are half set
    return guarded(pack_masks(masks).to(device)), guarded(boxes), guarded(index), guarded(sizes)


@pytest.mark.parametrize(
    ("convention", "padded"),
    [
        ("torchvision", True),
        pytest.param("detectron2", False, marks=SLOW),
        pytest.param("detectron2", True, marks=SLOW),
        pytest.param("torchvision", False, marks=SLOW),
    ],
)
def test_the_same_bits_as_the_reference(device: torch.device, convention: str, padded: bool) -> None:
    packed, boxes, index, sizes = ordinary(device)
    got = check_same(packed, boxes, index, 3, convention, sizes if padded else None)
    assert got[0].any()
    assert got[1, :2].any()
    assert not got[1, 2].any()


@pytest.mark.parametrize("convention", ["detectron2", pytest.param("torchvision", marks=SLOW)])
def test_equals_torchvision_roi_align(device: torch.device, convention: str) -> None:
    packed, boxes, index, _ = ordinary(device)
    masks, sizes = unpack_masks(packed.cpu(), SIZE[1]), torch.tensor([SIZE] * 2, device=device)
    got = mask_targets(packed, boxes, index, 3, convention=convention, image_sizes=sizes, backend="triton")
    soft = expected_targets(masks, boxes.cpu(), index.cpu(), 3, aligned=convention == "detectron2")
    if convention == "torchvision":
        assert_close(got.cpu(), soft, tolerance=ROUNDING)
    else:
        clear = (soft - 0.5).abs() > ROUNDING.max
        assert clear.float().mean() > 0.9
        assert torch.equal(got.cpu()[clear], (soft >= 0.5).float()[clear])


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_half_a_bin_is_inside(device: torch.device, backend: str) -> None:
    """Bins of 3 x 2 pixels, of which three are set: means that float32 would round to either side of 0.5."""
    masks = torch.zeros(1, 1, 4, 40, dtype=torch.bool)
    masks[..., 0::2, 28:34] = True
    boxes, index = torch.tensor([[[28.0, 0.0, 34.0, 4.0]]], device=device), torch.zeros(1, 1, dtype=torch.int64)
    args = pack_masks(masks).to(device), boxes, index.to(device), 2
    assert mask_targets(*args, convention="detectron2", backend=backend).all()
    masks[..., 0, 30] = masks[..., 0, 31] = False
    args = pack_masks(masks).to(device), *args[1:]
    got = mask_targets(*args, convention="detectron2", backend=backend)
    assert got[0, 0].tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("convention", ["detectron2", pytest.param("torchvision", marks=SLOW)])
def test_odd_boxes(device: torch.device, convention: str) -> None:
    inf, nan = math.inf, math.nan
    rows = [
        [nan, 1, 5, 5],
        [1, 1, inf, 5],
        [-inf, -inf, inf, inf],
        [7, 7, 2, 2],  # inverted
        [7, 2, 7, 8],  # no width
        [5, 2, 5.001, 9],
        [-3e38, 0, 3e38, 9],  # its width overflows
        [36, 3, 37, 4],  # the last pixel
        [-900, -900, -800, -800],
        [2.0**24, 0, 2.0**24 + 8, 5],
        [1e-40, 1e-40, 2e-40, 2e-40],
        [-2e4, -3e5, 9e4, 1e5],  # thousands of samples, of which few are inside
    ]
    packed = pack_masks(torch.ones(1, 1, 4, 37, dtype=torch.bool)).to(device)
    boxes = torch.tensor([rows], device=device)
    index, sizes = torch.zeros(1, len(rows), dtype=torch.int64), torch.tensor([[4, 37]])
    got = check_same(packed, boxes, index.to(device), 1, convention, sizes.to(device)).flatten()
    assert not got[[0, 1, 2, 6, 8, 9]].any()
    assert got[7] == 1
    assert got[[3, 4]].any() == (convention == "torchvision")  # whose boxes are a pixel wide at least


def test_boxes_far_larger_than_the_image_end(device: torch.device) -> None:
    """Up to 1e30 pixels: the loops go over the samples inside the image, not over all."""
    ends = torch.tensor([1e7, 1e9, 1e12, 1e30], device=device)
    boxes = torch.stack([-ends, -ends, ends, ends], dim=1)[None]
    packed = pack_masks(torch.ones(1, 1, 3, 5, dtype=torch.bool)).to(device)
    index = torch.zeros(1, 4, dtype=torch.int64, device=device)
    with poisoned_empty():
        got = kernels.mask_targets(packed, boxes, index, 1, False, None)
    assert torch.isfinite(got).all()
    assert got.max() < 1e-9


def test_rows_that_are_not_there(device: torch.device) -> None:
    packed = guarded(pack_masks(torch.ones(1, 2, 4, 32, dtype=torch.bool)).to(device))
    boxes = torch.tensor([4.0, 1.0, 6.0, 3.0], device=device).expand(1, 5, 4)
    index = torch.tensor([[-1, 1, 2, 2**40, -(2**40)]], device=device)
    assert check_same(packed, boxes, index, 1, "detectron2").flatten().tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("size", [(1, 33), *(pytest.param(size, marks=SLOW) for size in ((6, 3), (2, 64)))], ids=str)
def test_narrow_masks(device: torch.device, size: tuple[int, int]) -> None:
    height, width = size
    packed = guarded(pack_masks(blobs(1, 2, height, width)).to(device))
    boxes = torch.tensor([[[0.0, 0, width, height], [width - 2.5, -0.4, width + 0.7, 0.9]]], device=device)
    index = torch.tensor([[1, 0]], device=device)
    check_same(packed, boxes, index, 2, "torchvision", torch.tensor([size], device=device))


def test_several_blocks_of_columns(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MAX_BLOCK_Q", 2)
    monkeypatch.setattr(kernels, "TILE", 4)
    packed, boxes, index, sizes = ordinary(device)
    check_same(packed[1:], boxes[1:, :1], index[1:, :1], 3, "detectron2", sizes[1:])


def test_strided_masks_half_boxes_and_float_sizes(device: torch.device) -> None:
    packed, boxes, index, sizes = ordinary(device)
    wide = torch.stack([packed, packed.flip(1)], dim=-1).transpose(1, 2)[..., 0].transpose(1, 2)
    assert not wide.is_contiguous()
    args = wide, boxes.half()[:, :1], index.mT.contiguous().mT[:, :1]
    expected = mask_targets(*args, 2, convention="torchvision", image_sizes=sizes, backend="reference")
    got = mask_targets(*args, 2, convention="torchvision", image_sizes=sizes.float(), backend="triton")
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
    assert expected.any()


@pytest.mark.parametrize("shape", [(0, 3, 5, 1), (2, 0, 5, 1), (2, 3, 0, 1), (2, 3, 5, 0)], ids=str)
def test_empty_inputs(device: torch.device, shape: tuple[int, ...]) -> None:
    n, g, s, words = shape
    packed = torch.zeros(n, g, 16, words, dtype=torch.int32, device=device)
    boxes, index = torch.rand(n, s, 4, device=device), torch.zeros(n, s, dtype=torch.int64, device=device)
    out = mask_targets(packed, boxes, index, 28, convention="detectron2", backend="triton")
    assert out.shape == (n, s, 28, 28)
    assert not out.any()


def test_the_tallest_mask(device: torch.device) -> None:
    """Positions reach almost 2^31."""
    packed = torch.full((1, 1, MAX_SIDE, 1), -1, dtype=torch.int32, device=device)
    boxes = torch.tensor([[[3.0, MAX_SIDE - 5.5, 4.0, MAX_SIDE]]], device=device)
    index = torch.zeros(1, 1, dtype=torch.int64, device=device)
    assert check_same(packed, boxes, index, 1, "torchvision").item() == 1


@SLOW
@pytest.mark.parametrize("shape", [(1, 1, MAX_SIDE, 1), (1, 1, 1, MAX_SIDE // 32)], ids=["tall", "wide"])
def test_a_bin_as_large_as_the_largest_mask(device: torch.device, shape: tuple[int, ...]) -> None:
    """The sum of a row of samples reaches almost 2^31."""
    packed = torch.full(shape, -1, dtype=torch.int32, device=device)
    height, width = (MAX_SIDE, 1) if shape[3] == 1 else (1, MAX_SIDE)
    boxes = torch.tensor([[[0.0, 0.0, width, height], [0.0, 0.0, width + 4.0, height + 4.0]]], device=device)
    index = torch.zeros(1, 2, dtype=torch.int64, device=device)
    assert check_same(packed, boxes, index, 1, "torchvision")[0, 0].item() == 1


coordinate = st.floats(-12, 60, width=32) | st.integers(-3, 48).map(float)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    n, g, s = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    height, width = draw(st.integers(1, 9)), draw(st.sampled_from([1, 31, 32, 33, 45, 64]))
    seed = draw(st.integers(0, 2**31))
    masks = torch.rand(n, g, height, width, generator=torch.Generator().manual_seed(seed)) < draw(st.floats(0, 1))
    boxes = torch.tensor(draw(st.lists(coordinate, min_size=n * s * 4, max_size=n * s * 4))).view(n, s, 4)
    index = torch.tensor(draw(st.lists(st.integers(-1, g), min_size=n * s, max_size=n * s))).view(n, s)
    limits = [[draw(st.integers(0, height)), draw(st.integers(0, width))] for _ in range(n)]
    return masks, boxes, index, torch.tensor(limits), draw(st.integers(1, 3))


def check_case(case: tuple[Tensor, Tensor, Tensor, Tensor, int], convention: str, device: torch.device) -> None:
    masks, boxes, index, sizes, size = case
    check_same(pack_masks(masks).to(device), boxes.to(device), index.to(device), size, convention, sizes.to(device))


@settings(max_examples=4, deadline=None, derandomize=True)
@given(case=cases(), convention=st.sampled_from(CONVENTIONS))
def test_random_cases(device: torch.device, case: tuple[Tensor, Tensor, Tensor, Tensor, int], convention: str) -> None:
    check_case(case, convention, device)


@SLOW
@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=cases(), convention=st.sampled_from(CONVENTIONS))
def test_many_random_cases(
    device: torch.device, case: tuple[Tensor, Tensor, Tensor, Tensor, int], convention: str
) -> None:
    check_case(case, convention, device)


# Memory


@pytest.mark.skipif(not interpreter_enabled(), reason="replaces the interpreter's launch")
@pytest.mark.parametrize(
    ("count", "height", "width", "packed_bytes"),
    [(250, 256, 256, 2_048_000), (100, 800, 1344, 13_440_000)],
    ids=["250 of 256x256", "100 of 800x1344"],
)
def test_the_output_is_all_that_is_allocated(count: int, height: int, width: int, packed_bytes: int) -> None:
    """128 RoIs: 401 kB, with no copy of masks that are 2 and 13.4 MB as bits, 16 and 107 MB as bytes."""
    from triton.runtime.interpreter import GridExecutor

    packed = torch.zeros(1, count, height, -(-width // 32), dtype=torch.int32)
    assert packed.nbytes == packed_bytes
    boxes, index = torch.rand(1, 128, 4), torch.zeros(1, 128, dtype=torch.int64)
    with allocated(packed, boxes, index) as sizes, mock.patch.object(GridExecutor, "__call__") as launch:
        mask_targets(packed, boxes, index, 28, convention="detectron2", backend="triton")
    assert launch.call_count == 1
    assert sizes == [128 * 28 * 28 * 4]


def test_the_reference_takes_a_chunk_at_a_time() -> None:
    """8 MiB of pixels in float64 at a time or one mask, where that is more: 100 masks of 800 x 1344 are 860 MB."""
    packed = torch.zeros(1, 100, 800, 42, dtype=torch.int32)
    boxes, index = 99 * torch.rand(1, 6, 4), torch.arange(6)[None]
    with allocated(packed, boxes, index) as sizes:
        mask_targets_reference(packed, boxes, index, 2, None, aligned=False, binary=False)
    assert max(sizes) == 8 * 800 * 1344


# The custom op


def test_custom_op_is_sound_and_traces(device: torch.device) -> None:
    packed, boxes, index, sizes = (t[:1].clone() for t in ordinary(device))
    boxes, index = boxes[:, :1].clone(), index[:, :1].clone()
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernels.mask_targets, (packed, boxes, index, 1, False, sizes), test_utils=tests)

    def call(packed: Tensor, boxes: Tensor, index: Tensor) -> Tensor:
        return mask_targets(packed, boxes, index, 1, convention="torchvision", backend="triton")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(packed, boxes, index), call(packed, boxes, index))


def test_refuses_what_it_cannot_serve(device: torch.device) -> None:
    packed, boxes, index, _ = ordinary(device)
    with pytest.raises(ValueError, match="computes in float32, not float64"):
        mask_targets(packed, boxes.double(), index, 2, convention="detectron2", backend="triton")
    for shape in ((1, 1, MAX_SIDE + 1, 1), (1, 1, 1, MAX_SIDE // 32 + 1)):
        large = torch.zeros(shape, dtype=torch.int32, device=device)
        with pytest.raises(ValueError, match="serves masks of up to 8,160 pixels a side"):
            mask_targets(large, boxes[:1], index[:1], 2, convention="detectron2", backend="triton")


# Mutants


def parity(module: ModuleType, device: torch.device) -> None:
    """All that the mutants break, in as few programs as show it."""
    packed, boxes, index, sizes = ordinary(device)
    last, outside = slice(1, 2), torch.tensor([[2, -1]], device=device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_BLOCK_Q", 2)
        patch.setattr(module, "TILE", 4)
        check_same(packed[last], boxes[last, :2], index[last, :2], 3, "detectron2", sizes[last], module)
        check_same(packed, boxes[:, :2], index[:, :2], 2, "torchvision", sizes, module)
    odd = torch.tensor([[[-1e4, -1e4, 2e4, 2e4], [10.0, 0.0, 10.0 + 2.0**-20, 6.0]]], device=device)
    check_same(packed[:1], odd, index[:1, :2], 1, "torchvision", None, module)
    check_same(packed[:1], boxes[:1, :2] / 0, index[:1, :2], 1, "torchvision", None, module)
    check_same(packed[:1], boxes[:1, :2], outside, 1, "torchvision", None, module)


MUTANTS = {
    "first image": ("n = (k // rois_an_image)", "n = (k // rois_an_image * 0)"),
    "padding read": ("tl.minimum(tl.load(sizes_ptr + 2 * n).to(tl.float32), height)", "height"),
    "height for width": ("tl.load(sizes_ptr + 2 * n + 1)", "tl.load(sizes_ptr + 2 * n)"),
    "row past the last": ("(g < num_masks)", "(g <= num_masks)"),
    "row -1": ("(g >= 0)", "(g >= -1)"),
    "infinite boxes": (" & is_finite(x1, y1, x2, y2)", ""),
    "first row of bins": ("y_start += p.to(tl.float32) * bin_h", "y_start += 0.0 * bin_h"),
    "first block": ("% NUM_BLOCKS * BLOCK_Q +", "% NUM_BLOCKS * 0 +"),
    "columns of the first bin": ("tl.where(offs_q < P, count_x, 0.0), 0)", "tl.where(offs_q < 1, count_x, 0.0), 0)"),
    "one tile of rows": ("range(0, num_rows, ROWS)", "range(0, tl.minimum(num_rows, ROWS), ROWS)"),
    "one span": ("range(0, num_columns, SPAN)", "range(0, tl.minimum(num_columns, SPAN), SPAN)"),
    "span of more than a word": ("SPAN = 30", "SPAN = 40"),
    "first sample's pixel": ("pair = upper >> place", "pair = upper"),
    "whole words": ("(low >> shift)", "low"),
    "first word twice": ("tl.minimum(word + 1, B - 1)", "word"),
    "upper row twice": ("next_y.to(tl.int64) * stride_h", "y.to(tl.int64) * stride_h"),
    "rows' weights swapped": ("y, upper_weight, lower_weight =", "y, lower_weight, upper_weight ="),
    "columns' weights swapped": ("x, left_weight, right_weight =", "x, right_weight, left_weight ="),
    "samples that are not there": ("inside = exists & ", "inside = "),
    "low border": ("(at >= -1.0)", "(at >= 0.0)"),
    "high border": ("(at <= limit)", "(at <= limit - 1.0)"),
    "beyond the last pixel": ("tl.maximum(limit - 1.0, 0.0)) * _UNIT", "limit) * _UNIT"),
    "not rounded": ("+ (at - whole >= 0.5).to(tl.int32)", ""),
    "mean of those inside": ("tl.maximum(grid_x, 1.0).to", "tl.maximum(count_x, 1.0).to"),
    "threshold": ("mean >= 0.5", "mean > 0.5"),
    "columns past the target": ("mask=offs_q < P", "mask=offs_q <= P"),
    "other convention": ("ALIGNED=detectron2", "ALIGNED=not detectron2"),
}
QUICK = ("padding read",)  # it takes a second


@SLOW
def test_parity_is_green(device: torch.device) -> None:
    parity(kernels, device)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else SLOW) for name in MUTANTS])
def test_mutants_turn_parity_red(name: str, device: torch.device, tmp_path: Path) -> None:
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if name == "infinite boxes" and version >= (3, 8):
        # There, as on a GPU, the maximum of NaN and 1 is 1. Without the check loops are longer, the result is 0 too.
        pytest.skip("the interpreter of Triton 3.8 gives the right result without the check")
    broken = mutant(kernels, *MUTANTS[name], tmp_path)
    with pytest.raises(AssertionError):
        parity(broken, device)
