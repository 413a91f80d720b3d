"""mask_targets: RoIAlign's values, the same bits from the kernel as from the reference, memory, mutants."""

from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import torchvision
import triton
from torch import Tensor

from tests.allocations import allocated
from tests.kernels.tools import assert_same, each_mutant, odd_boxes, slow
from tests.model.sync import count_blocking
from tests.mutation import mutant
from tmask_kernels import mask_targets, pack_masks
from tmask_kernels.backend import interpreter_enabled
from tmask_kernels.common import reference as common
from tmask_kernels.ops.mask_targets import kernels, reference
from tmask_kernels.ops.mask_targets.op import MAX_SIDE
from tmask_kernels.testing import Tolerance, assert_close, guarded, poisoned_empty, random_boxes

CONVENTIONS = ["detectron2", "torchvision"]
# torchvision places its samples in float32 too, and rounds them in another order.
ROUNDING = Tolerance(max=2e-5, rms=2e-6)
SIZE = (9, 45)  # two words a row


def blobs(*shape: int, seed: int = 0) -> Tensor:
    """Random masks with both smooth parts and ragged edges: bool [..., H, W]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(*shape, generator=generator).flatten(0, -3)
    smooth = torch.nn.functional.avg_pool2d(noise, 5, stride=1, padding=2, count_include_pad=False)
    return (smooth > 0.5).view(shape)


def whole_numbers(device: torch.device, *shape: int, fill: int = 0) -> Tensor:
    return torch.full(shape, fill, dtype=torch.int64, device=device)


# Against torchvision


def awkward_boxes(height: int, width: int) -> Tensor:
    """Boxes [11, 4] that touch or leave the image, are tiny, empty, inverted or far larger than it."""
    rows = [
        [0, 0, width, height],
        [-3.7, -2.2, width + 5.1, height + 9.4],
        [width - 2.5, height - 1.25, width, height],
        [0, 0, 1.5, 0.75],
        [5.0, 5.0, 5.0, 9.0],
        [9.0, 9.0, 4.0, 3.0],
        [width + 10.0, 0, width + 30.0, 8.0],
        [-400.0, -300.0, 900.0, 700.0],
        [3.3, 4.4, 3.3001, 4.4001],
        [0, 0, 28, 28],
        [0, 0, 28.001, 56.001],
    ]
    return torch.tensor(rows)


def check(
    device: torch.device,
    function: Any,
    convention: str,
    height: int = 61,
    width: int = 45,
    size: int = 28,
    seed: int = 0,
) -> None:
    """`function`, called as mask_targets, equals torchvision's RoIAlign of each RoI on its own mask in float64."""
    masks = blobs(2, 5, height, width, seed=seed)
    boxes = torch.cat([random_boxes(29, height=height, width=width, seed=seed), awkward_boxes(height, width)])
    boxes = boxes.view(2, 20, 4)
    index = torch.randint(-1, 5, (2, 20), generator=torch.Generator().manual_seed(seed))
    sizes = torch.tensor([[height, width]] * 2).to(device)
    args = (pack_masks(masks).to(device), boxes.to(device), index.to(device), size)
    got = function(*args, convention=convention, image_sizes=sizes).cpu()
    picked = masks[torch.arange(2)[:, None], index.clamp(min=0)].flatten(0, 1)[:, None]
    rois = torch.cat([torch.arange(40)[:, None], boxes.flatten(0, 1)], dim=1).double()
    soft = torchvision.ops.roi_align(picked.double(), rois, size, 1.0, -1, convention == "detectron2")
    soft = torch.where((index >= 0)[..., None, None], soft.view(got.shape), 0)
    assert got.dtype == torch.float32
    if convention == "torchvision":
        assert_close(got, soft, tolerance=ROUNDING)
        return
    # Strictly: where no bin of the float64 truth lies at the threshold, the bits must be equal.
    assert ((got == 0) | (got == 1)).all()
    clear = (soft - 0.5).abs() > ROUNDING.max
    assert clear.float().mean() > 0.97
    assert torch.equal(got[clear], (soft >= 0.5).float()[clear])


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("size", [1, 7, 28], ids=lambda s: f"size{s}")
@pytest.mark.parametrize(("height", "width"), [(61, 45), (64, 96), (1, 200), (130, 33)], ids=lambda v: str(v))
def test_equals_torchvision_roi_align(
    device: torch.device, convention: str, size: int, height: int, width: int
) -> None:
    check(device, mask_targets, convention, height, width, size, seed=size)


REFERENCE_MUTANTS = {
    "two samples": (common, "NEARBY_SAMPLES = 5", "NEARBY_SAMPLES = 2"),
    "half pixel": (common, "(0.5 if aligned else 0.0)", "0.0"),
    "one pixel": (common, "size if aligned else torch.where(size < 1, 1.0, size)", "size"),
    "low": (reference, "at >= -1", "at >= 0"),
    "high": (reference, "at <= limit", "at <= limit - 1"),
    "last pixel": (reference, "(limit - 1).clamp(min=0)", "limit.clamp(min=0)"),
    "grid": (reference, "bin_size.ceil()", "bin_size.round()"),
    "no target": (reference, "(index >= 0) &", "(index >= -1) &"),
    "unit": (reference, "UNIT = 2**18", "UNIT = 2**8"),
    "half": (reference, "mean >= 0.5", "mean > 0.6"),
}


@each_mutant(REFERENCE_MUTANTS)
def test_a_broken_reference_fails(device: torch.device, tmp_path: Path, name: str) -> None:
    copy = mutant(*REFERENCE_MUTANTS[name], tmp_path, seen_from=reference)

    def function(*args: Any, convention: str, image_sizes: Tensor) -> Tensor:
        binary = convention == "detectron2"
        return copy.mask_targets_reference(*args, image_sizes, aligned=binary, binary=binary)

    def both() -> None:
        for convention in CONVENTIONS:
            check(device, function, convention)

    with pytest.raises(AssertionError):
        both()


# Worked answers


def test_rows_that_are_not_there_give_zeros(device: torch.device, backend: str) -> None:
    packed = guarded(pack_masks(torch.ones(1, 2, 4, 32, dtype=torch.bool)).to(device))
    boxes = torch.tensor([4.0, 1.0, 6.0, 3.0], device=device).expand(1, 5, 4)
    index = torch.tensor([[-1, 1, 2, 2**40, -(2**40)]], device=device)
    out = mask_targets(packed, boxes, index, 1, convention="detectron2", backend=backend)
    assert out.flatten().tolist() == [0, 1, 0, 0, 0]


def test_padding_of_a_smaller_image_does_not_leak_in(device: torch.device) -> None:
    """Two images of unequal size in one batch: each as if it were alone, with its own borders."""
    masks = torch.zeros(2, 1, 60, 90, dtype=torch.bool)
    masks[0, 0, :50, :70] = True
    masks[1, 0] = True
    sizes = torch.tensor([[50, 70], [60, 90]], device=device)
    boxes = torch.tensor([[[10.0, 10.0, 70.0, 50.0]], [[10.0, 10.0, 90.0, 60.0]]], device=device)
    args = (pack_masks(masks).to(device), boxes, whole_numbers(device, 2, 1), 28)
    out = mask_targets(*args, convention="torchvision", image_sizes=sizes)
    assert_close(out, torch.ones_like(out))
    assert mask_targets(*args, convention="torchvision")[0, 0, -1].max() < 1


def test_half_a_bin_is_inside(device: torch.device, backend: str) -> None:
    """Bins of 3 x 2 pixels, of which three are set: means that float32 would round to either side of 0.5."""
    masks = torch.zeros(1, 1, 4, 40, dtype=torch.bool)
    masks[..., 0::2, 28:34] = True
    boxes = torch.tensor([[[28.0, 0.0, 34.0, 4.0]]], device=device)
    args = pack_masks(masks).to(device), boxes, whole_numbers(device, 1, 1), 2
    assert mask_targets(*args, convention="detectron2", backend=backend).all()
    masks[..., 0, 30] = masks[..., 0, 31] = False
    args = pack_masks(masks).to(device), *args[1:]
    got = mask_targets(*args, convention="detectron2", backend=backend)
    assert got[0, 0].tolist() == [[0, 0], [1, 1]]


# Any argument: the kernel has the reference's bits


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
        slow("detectron2", False),
        slow("detectron2", True),
        slow("torchvision", False),
    ],
)
def test_the_same_bits_as_the_reference(device: torch.device, convention: str, padded: bool) -> None:
    packed, boxes, index, sizes = ordinary(device)
    got = check_same(packed, boxes, index, 3, convention, sizes if padded else None)
    assert got[0].any()
    assert got[1, :2].any()
    assert not got[1, 2].any()


@pytest.mark.parametrize("convention", ["detectron2", slow("torchvision")])
def test_odd_boxes(device: torch.device, convention: str) -> None:
    """The last one has thousands of samples, of which few are inside."""
    packed = pack_masks(torch.ones(1, 1, 4, 37, dtype=torch.bool)).to(device)
    boxes = torch.cat([odd_boxes(4, device), torch.tensor([[-2e4, -3e5, 9e4, 1e5]], device=device)])
    sizes = torch.tensor([[4, 37]], device=device)
    index = whole_numbers(device, 1, len(boxes))
    got = check_same(packed, boxes[None], index, 1, convention, sizes).flatten()
    assert not got[[0, 1, 2, 6, 8, 9]].any()
    assert got[7] == 1
    assert got[[3, 4]].any() == (convention == "torchvision")  # whose boxes are a pixel wide at least


def test_boxes_far_larger_than_the_image_end(device: torch.device) -> None:
    """Up to 1e30 pixels: the loops go over the samples inside the image, not over all."""
    ends = torch.tensor([1e7, 1e9, 1e12, 1e30], device=device)
    boxes = torch.stack([-ends, -ends, ends, ends], dim=1)[None]
    packed = pack_masks(torch.ones(1, 1, 3, 5, dtype=torch.bool)).to(device)
    with poisoned_empty():
        got = kernels.mask_targets(packed, boxes, whole_numbers(device, 1, 4), 1, False, None)
    assert torch.isfinite(got).all()
    assert got.max() < 1e-9


def test_several_blocks_of_columns(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MAX_BLOCK_Q", 2)
    monkeypatch.setattr(kernels, "TILE", 4)
    packed, boxes, index, sizes = ordinary(device)
    check_same(packed[1:], boxes[1:, :1], index[1:, :1], 3, "detectron2", sizes[1:])


def test_half_boxes_and_float_sizes(device: torch.device) -> None:
    packed, boxes, index, sizes = ordinary(device)
    args = packed, boxes.half()[:, :1], index[:, :1], 2
    expected = mask_targets(*args, convention="torchvision", image_sizes=sizes, backend="reference")
    got = mask_targets(*args, convention="torchvision", image_sizes=sizes.float(), backend="triton")
    assert_same(got, expected)


@pytest.mark.parametrize("shape", [(0, 3, 5, 1), (2, 0, 5, 1), (2, 3, 0, 1), (2, 3, 5, 0)], ids=str)
def test_empty_inputs(device: torch.device, backend: str, shape: tuple[int, ...]) -> None:
    n, g, s, words = shape
    packed = torch.zeros(n, g, 16, words, dtype=torch.int32, device=device)
    boxes, index = torch.rand(n, s, 4, device=device), whole_numbers(device, n, s)
    for convention in CONVENTIONS:
        out = mask_targets(packed, boxes, index, 28, convention=convention, backend=backend)
        assert out.shape == (n, s, 28, 28)
        assert not out.any()


def test_the_tallest_mask(device: torch.device) -> None:
    """Positions reach almost 2^31."""
    packed = torch.full((1, 1, MAX_SIDE, 1), -1, dtype=torch.int32, device=device)
    boxes = torch.tensor([[[3.0, MAX_SIDE - 5.5, 4.0, MAX_SIDE]]], device=device)
    assert check_same(packed, boxes, whole_numbers(device, 1, 1), 1, "torchvision").item() == 1


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, MAX_SIDE, 1), (1, 1, 1, MAX_SIDE // 32)], ids=["tall", "wide"])
def test_a_bin_as_large_as_the_largest_mask(device: torch.device, shape: tuple[int, ...]) -> None:
    """The sum of a row of samples reaches almost 2^31."""
    packed = torch.full(shape, -1, dtype=torch.int32, device=device)
    height, width = (MAX_SIDE, 1) if shape[3] == 1 else (1, MAX_SIDE)
    boxes = torch.tensor([[[0.0, 0.0, width, height], [0.0, 0.0, width + 4.0, height + 4.0]]], device=device)
    assert check_same(packed, boxes, whole_numbers(device, 1, 2), 1, "torchvision")[0, 0].item() == 1


# Waiting, memory


@pytest.mark.parametrize("given", [False, True], ids=["whole", "sizes"])
def test_nothing_waits(device: torch.device, given: bool, backend: str) -> None:
    masks, boxes = blobs(2, 3, 40, 64), random_boxes(4, height=40, width=64, max_size=9, device=device).view(2, 2, 4)
    args = pack_masks(masks).to(device), boxes, whole_numbers(device, 2, 2), 3
    sizes = torch.tensor([[40, 64]] * 2, device=device)
    options: dict[str, Any] = {"convention": "torchvision", "backend": backend}
    expected = mask_targets(*args, image_sizes=sizes, **options)
    # A GPU gets a tensor made from a list by a copy that the host waits for.
    with count_blocking() as found, mock.patch.object(torch, "tensor", wraps=torch.tensor) as from_host:
        got = mask_targets(*args, image_sizes=sizes if given else None, **options)
    assert not found
    assert not from_host.called
    assert torch.equal(got, expected)


def test_chunks_do_not_change_the_result(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    masks, boxes = blobs(2, 3, 40, 64), random_boxes(10, height=40, width=64, device=device).view(2, 5, 4)
    args = (pack_masks(masks).to(device), boxes, torch.tensor([[0, 1, 2, -1, 0]] * 2, device=device), 14)
    options: dict[str, Any] = {"convention": "torchvision", "backend": "reference"}
    whole = mask_targets(*args, **options)
    monkeypatch.setattr(reference, "_CHUNK_PIXELS", {device.type: 3 * 40 * 64})
    assert_close(mask_targets(*args, **options), whole)


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
        reference.mask_targets_reference(packed, boxes, index, 2, None, aligned=False, binary=False)
    assert max(sizes) == 8 * 800 * 1344


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


@pytest.mark.slow
def test_parity_is_green(device: torch.device) -> None:
    parity(kernels, device)


@each_mutant(MUTANTS, ["padding read"])  # it takes a second
def test_mutants_turn_parity_red(name: str, device: torch.device, tmp_path: Path) -> None:
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if name == "infinite boxes" and version >= (3, 8):
        # There, as on a GPU, the maximum of NaN and 1 is 1. Without the check loops are longer, the result is 0 too.
        pytest.skip("the interpreter of Triton 3.8 gives the right result without the check")
    broken = mutant(kernels, *MUTANTS[name], tmp_path)
    with pytest.raises(AssertionError):
        parity(broken, device)
