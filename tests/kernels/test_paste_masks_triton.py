"""paste_masks in Triton: the reference's bits in every output, odd boxes and images, run lengths, mutants."""

import importlib
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.allocations import allocated
from tests.kernels.tools import HALVES, INF, NAN, assert_same, each_mutant, odd_boxes, run_patterns, slow
from tests.model.sync import count_blocking
from tests.mutation import mutant
from tmask_kernels import paste_masks, paste_masks_batched
from tmask_kernels.common import rle
from tmask_kernels.common.rle import strings
from tmask_kernels.ops.paste_masks import op as paste_op
from tmask_kernels.ops.paste_masks.kernels import dense as kernels
from tmask_kernels.ops.paste_masks.kernels import geometry
from tmask_kernels.ops.paste_masks.kernels import runs as kernels_runs
from tmask_kernels.testing import guarded, poisoned_empty

CONVENTIONS = ["detectron2", "torchvision"]
OUTPUTS = ["probability", "bool", "packed", "rle"]  # run_lengths is rle, read later
SIZE = (9, 37)  # 333 elements: no mask but the first begins at a multiple of 16


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of a few hundred pixels then take several chunks and programs."""
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 64)
    monkeypatch.setattr(kernels, "ROWS", 4)
    monkeypatch.setattr(kernels, "BLOCK_X", 32)


def ordinary(device: torch.device) -> tuple[Tensor, Tensor]:
    """Masks [4, 5, 5] between NaN and boxes: inside, past every border, full height, smaller than a pixel."""
    boxes = [[3.3, 1.2, 14.9, 7.4], [-6.0, -3.0, 41.0, 13.5], [20.45, -4.0, 22.05, 12.0], [30.3, 4.2, 30.9, 4.9]]
    masks = torch.rand(4, 5, 5, device=device)
    masks[1, 2:, 3:] = 1  # the last pixels, beside the next mask's first
    masks[2] = 1  # its runs go on from column to column
    masks[3] = 0.5  # the threshold itself
    return guarded(masks), guarded(torch.tensor(boxes, device=device))


def check_same(masks: Tensor, boxes: Tensor, size: tuple[int, int], output: str, convention: str) -> Any:
    """Triton's output, after it was held against the reference's: the same bits, nothing beside them written."""
    with poisoned_empty():
        got = paste_masks(masks, boxes, size, output=output, convention=convention, backend="triton")
    expected = paste_masks(masks.cpu(), boxes.cpu(), size, output=output, convention=convention, backend="reference")
    assert_same(got, expected)
    assert output == "rle" or got.is_contiguous()
    return got


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("convention", ["detectron2", slow("torchvision")])
def test_the_same_bits_as_the_reference(device, convention, output):
    check_same(*ordinary(device), SIZE, output, convention)


@pytest.mark.parametrize("size", [(5, 3), (1, 40), (40, 1)], ids=str)
@pytest.mark.parametrize("output", ["bool", "rle", *map(slow, OUTPUTS[::2])])
def test_narrow_images(device, size, output):
    """Rows shorter than 16 bytes, and masks of fewer elements than lie before them in their first chunk."""
    masks, boxes = ordinary(device)
    boxes = boxes * torch.tensor([size[1] / SIZE[1], size[0] / SIZE[0]] * 2, device=device)
    check_same(masks[1:3], boxes[1:3], size, output, "torchvision")


@pytest.mark.parametrize("output", ["bool", *map(slow, OUTPUTS[::3])])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_odd_boxes(device, convention, output):
    boxes = torch.cat([odd_boxes(SIZE[0], device), torch.tensor([[-1e9, -1e9, 1e9, 1e9]], device=device)])
    got = check_same(torch.ones(len(boxes), 3, 3, device=device), boxes, SIZE, output, convention)
    if output == "bool":
        assert not got[[0, 1, 2, 6, 8, 9, *((3, 4) if convention == "detectron2" else ())]].any()
        assert got[[7, 11]].flatten(1).any(1).all()


@pytest.mark.parametrize("output", ["probability", "rle"])
def test_masks_with_nan_and_infinity(device, output):
    """A NaN spreads to the pixels that sample it and no further, and is not inside."""
    masks, boxes = ordinary(device)
    masks = masks[:2].clone()
    masks[:, 0, 0], masks[:, 2, 3] = NAN, INF
    check_same(masks, boxes[:2], SIZE, output, "detectron2")


@pytest.mark.parametrize("output", ["probability", slow("rle")])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_is_read_as_it_is(device, dtype, output):
    masks, boxes = ordinary(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        check_same(masks[:2].to(dtype), boxes[:2], SIZE, output, "detectron2")


def test_strided_masks_and_half_boxes(device):
    masks, boxes = ordinary(device)
    check_same(masks.mT[::2], boxes[::2].half(), SIZE, "bool", "detectron2")


@pytest.mark.parametrize("threshold", [0.25, 1.0])
def test_thresholds_and_logits(device, threshold):
    masks, boxes = ordinary(device)
    logits = masks[:2] * 10 - 5
    settings: dict[str, Any] = {"logits": True, "threshold": threshold, "convention": "torchvision"}
    got = paste_masks(logits, boxes[:2], SIZE, **settings, backend="triton")
    value = paste_masks(logits, boxes[:2], SIZE, **settings, output="probability", backend="triton")
    assert torch.equal(got, value > threshold)


def patterns() -> Tensor:
    """Bits [25, 6, 6]."""
    return torch.cat([run_patterns(6, 0, 5, 2), run_patterns(6, 5, 0, 1), torch.rand(3, 6, 6) < 0.5])


@pytest.mark.parametrize(
    ("place", "chosen"),
    [
        ((0, 0, 6, 6), [0, 1, 5, 9, 15, 17, -1]),
        ((2, 3, 11, 13), [1, 15, -1]),
        slow((0, 0, 6, 6), list(range(25))),
        slow((2, 0, 6, 9), list(range(25))),
    ],
    ids=["whole image", "inside", "all", "all, full columns"],
)
def test_run_lengths_of_every_kind(device, place, chosen):
    """A pixel a cell. test_paste_masks.py holds those of the reference to pycocotools'."""
    left, top, *size = place
    masks = patterns()[chosen].float().to(device)
    boxes = torch.tensor([left, top, left + 6.0, top + 6.0], device=device).expand(len(masks), 4)
    check_same(masks, boxes, tuple(size), "rle", "detectron2")


def test_positions_beyond_32_bits(device):
    """Six masks of 2^30 pixels: positions in all of them would pass 2^32, in a mask they do not."""
    height, width, y = 2**26, 16, 8
    boxes = torch.tensor([2.0, y, 5.0, y + 4.0], device=device).expand(6, 4)
    masks = torch.ones(6, 2, 2, device=device)
    got = paste_masks(masks, boxes, (height, width), output="rle", backend="triton")
    gap = height - 4
    counts = np.array([2 * height + y, 4, gap, 4, gap, 4, 12 * height - y - 4])
    assert counts.sum() == height * width
    assert [one["counts"] for one in got] == strings(counts, np.array([7])) * 6


def test_memory_follows_columns(device):
    """12 bytes a part of a column, and room for two runs a column and the mask's end."""
    masks, boxes = ordinary(device)
    with allocated(masks, boxes) as sizes:
        kernels_runs.paste_runs(masks[None], boxes[None], [len(masks)], [SIZE], 0.5, "detectron2")
    room = 4 * len(masks) * (2 * SIZE[1] + 1)
    least = 12 * kernels_runs.PARTS * len(masks) * SIZE[1] + room + 12  # 12: its size and count
    copies = 8 * len(masks) + room + 12  # what goes to the host and comes from it, at most
    assert sum(sizes) == least if device.type == "cpu" else least <= sum(sizes) <= least + copies


@pytest.mark.parametrize("chosen", [[1], [10], [1, 10]], ids=str)
def test_run_lengths_read_later(device, backend, chosen):
    """The caller's tensors may change before. Pattern 10, a chessboard, has more runs than there is room for."""
    masks, boxes = (
        patterns()[chosen].float().to(device),
        torch.tensor([0.0, 0, 6, 6], device=device).repeat(len(chosen), 1),
    )
    expected = paste_masks(masks, boxes, (6, 6), output="rle", backend="reference")
    with poisoned_empty():
        got = paste_masks(masks, boxes, (6, 6), output="run_lengths", backend=backend)
        masks.zero_()
        boxes.zero_()
        assert len(got) == len(chosen)
        assert got.to_coco() == expected
    assert got.to_coco() == expected, "read twice"


def test_run_lengths_are_read_after_the_copy(device):
    """Rehearses a GPU: the copies hold nothing of use until the wait is over."""
    masks, boxes = ordinary(device)
    expected = paste_masks(masks, boxes, SIZE, output="rle", backend="triton")

    def copy(*tensors: Tensor) -> tuple[list[Tensor], Any]:
        copies = [torch.full_like(t, -1, device="cpu") for t in tensors]
        return copies, lambda: [c.copy_(t) for c, t in zip(copies, tensors, strict=True)]

    with mock.patch.object(rle, "_copy_to_host", copy):
        assert paste_masks(masks, boxes, SIZE, output="run_lengths", backend="triton").to_coco() == expected


def batch(device: torch.device) -> tuple[Tensor, Tensor, list[int], list[tuple[int, int]]]:
    """Five images of four sizes, one without masks, none with all three; what is past a count is full, or NaN."""
    masks, boxes = torch.rand(5, 3, 4, 4, device=device), torch.rand(5, 3, 4, device=device)
    boxes = boxes * torch.tensor([12.0, 3.0, 12.0, 4.0], device=device) - 1
    boxes[..., 2:] += boxes[..., :2]
    masks[1], boxes[1] = 1, torch.tensor([-9.0, -9.0, 40.0, 40.0], device=device)  # up to the last pixel of its image
    boxes[4, 2:] = NAN
    return guarded(masks), guarded(boxes), [2, 1, 0, 2, 2], [(6, 20), (5, 3), (7, 2), (6, 20), (4, 11)]


def one_by_one(masks: Tensor, boxes: Tensor, counts: Any, sizes: Any, output: str, convention: str) -> list[Any]:
    """What the reference gives for each image by itself."""
    return [
        paste_masks(m[:c].cpu(), b[:c].cpu(), size, output=output, convention=convention, backend="reference")
        for m, b, c, size in zip(masks, boxes, counts, sizes, strict=True)
    ]


@pytest.mark.parametrize("output", ["rle", "bool", *map(slow, OUTPUTS[::2])])
@pytest.mark.parametrize("convention", ["detectron2", slow("torchvision")])
def test_a_batch_is_its_images(device, convention, backend, output):
    images = batch(device)
    with poisoned_empty():
        got = paste_masks_batched(*images, output=output, convention=convention, backend=backend)
    expected = one_by_one(*images, output, convention)
    assert_same(got, expected)


def test_a_batch_of_run_lengths_takes_the_launches_and_waits_of_an_image(device):
    masks, boxes, counts, sizes = batch(device)
    counted, found = torch.tensor(counts, device=device), []
    for n in (1, 5):
        kernel, batched = kernels_runs._runs_kernel, (masks[:n], boxes[:n], counts[:n], sizes[:n])
        with mock.patch.object(kernels_runs, "_runs_kernel") as launches:
            launches.__getitem__.side_effect = kernel.__getitem__
            with count_blocking() as waits:
                results = paste_masks_batched(*batched, output="run_lengths", backend="triton")
            assert not waits
            with count_blocking() as waits:
                got = [one.to_coco() for one in results]
        assert launches.__getitem__.call_count == 2
        assert got == one_by_one(*batched, "rle", "detectron2")
        found.append(waits)
    again = paste_masks_batched(masks[:1], boxes[:1], counted[:1], sizes[:1], output="rle", backend="triton")
    assert again == one_by_one(masks[:1], boxes[:1], counts[:1], sizes[:1], "rle", "detectron2")
    assert found[0] == found[1]


@pytest.mark.parametrize("output", OUTPUTS)
def test_batches_without_masks(device, backend, output):
    for n, d in ((0, 3), (2, 0), (2, 3)):
        masks, boxes = torch.rand(n, d, 4, 4, device=device), torch.rand(n, d, 4, device=device)
        got = paste_masks_batched(masks, boxes, [0] * n, [(5, 6)] * n, output=output, backend=backend)
        assert [len(one) for one in got] == [0] * n


@pytest.mark.parametrize("output", OUTPUTS)
def test_bool_masks_are_probabilities_of_0_and_1(device, backend, output):
    masks, boxes = ordinary(device)
    masks, boxes = masks[:2] > 0.5, boxes[:2]
    options: dict[str, Any] = {"output": output, "backend": backend, "threshold": 0.7}
    got, expected = (paste_masks(m, boxes, (9, 12), **options) for m in (masks, masks.float()))
    batch = paste_masks_batched(masks[None], boxes[None], [2], [(9, 12)], **options)[0]
    assert output == "rle" or got.any()
    assert_same([got, batch], [expected, expected])
    with pytest.raises(ValueError, match=r"paste_masks: masks: expected float \[K, M, M\], got torch.bool"):
        paste_masks(masks, boxes, (9, 12), logits=True, **options)


def parity(op: ModuleType, device: torch.device, output: str) -> None:
    """`op` is the module of the public functions or a copy with an error below it."""
    masks, boxes = ordinary(device)
    for convention in CONVENTIONS:
        with poisoned_empty():
            got = op.paste_masks(masks, boxes, SIZE, output=output, convention=convention, backend="triton")
        assert_same(got, paste_masks(masks.cpu(), boxes.cpu(), SIZE, output=output, convention=convention))
    if output == "rle":
        images = batch(device)
        got = op.paste_masks_batched(*images, output="rle", backend="triton")
        assert_same(got, one_by_one(*images, "rle", "detectron2"))
        dense, box = patterns()[[10]].float().to(device), torch.tensor([[0.0, 0, 6, 6]], device=device)
        with poisoned_empty():
            got = op.paste_masks(dense, box, (6, 6), output="rle", backend="triton")
        assert_same(got, paste_masks(dense.cpu(), box.cpu(), (6, 6), output="rle"))


DENSE, RUNS = kernels, kernels_runs
# The module to break, the texts, and the output that shows it.
MUTANTS = {
    "corner for centre": (geometry, "+ 0.5 - start", "- start", "bool"),
    "shift": (geometry, "1.5 if TORCHVISION else 0.5\n    at =", "0.5\n    at =", "bool"),
    "floor for truncate": (geometry, "tl.where(x < 0, tl.ceil(x), tl.floor(x))", "tl.floor(x)", "bool"),
    "growth": (geometry, "* ((SIDE + 2) / SIDE)", "* 1.0", "bool"),
    "last pixel": (geometry, "past = last + 1.0", "past = last", "bool"),
    "window too narrow": (geometry, "2.0**-20 + 1.0", "2.0**-20 - 2.5", "bool"),
    "border is not 0": (geometry, "exists & (cell >= 0)", "exists", "bool"),
    "row below wraps": (geometry, "(row >= 0) & (row < SIDE)", "row >= -1", "bool"),
    "weights": (geometry, "upper * (1.0 - weight) + lower * weight", "upper * weight + lower", "rle"),
    "same threshold": (geometry, "inside = value > threshold", "inside = value >= threshold", "bool"),
    "no zeros before the first 16": (DENSE, "offs < tl.minimum(first * GROUP, end)", "offs < begin", "bool"),
    "no zeros after the last 16": (DENSE, "(tail >= begin) & (tail < end)", "(tail >= end) & (tail < end)", "bool"),
    "a chunk of zeros too few": (DENSE, "range(0, groups, CHUNK", "range(0, groups - 1, CHUNK", "bool"),
    "first column": (DENSE, "first_x = left\n", "first_x = left + 1\n", "bool"),
    "last column": (DENSE, ".to(tl.uint8), mask=x < right", ".to(tl.uint8), mask=x < right - 1", "bool"),
    "stale rows of a band": (DENSE, "if cell != held:", "if cell > held + 1:", "probability"),
    "first row of the box": (DENSE, "tl.maximum(first_y, top)", "tl.maximum(first_y, top + 1)", "probability"),
    "bits": (DENSE, "<< tl.arange(0, BLOCK_X) % 32", "<< 31 - tl.arange(0, BLOCK_X) % 32", "packed"),
    "words of another block": (DENSE, "word = block_x // 32 +", "word = first_x // 32 +", "packed"),
    "column goes on": (RUNS, "first_y == 0, x - 1, x)", "first_y == 0, x - 2, x)", "rle"),
    "no column after the box": (RUNS, "first_x <= right", "first_x < right - 40", "rle"),
    "no row after the box": (RUNS, "tl.minimum(bottom + 1, H)", "tl.minimum(bottom - 2, H)", "rle"),
    "stale rows": (RUNS, "if cell != held:", "if cell > held + 1:", "rle"),
    "sure by the upper row": (geometry, "tl.minimum(upper, lower) - margin", "upper - margin", "rle"),
    "sure of a rise": (geometry, "tl.maximum(upper, lower) + margin", "upper + margin", "rle"),
    "sure if one column is": (geometry, "tl.min((inside | outside)", "tl.max((inside | outside)", "rle"),
    "skips a cell": (RUNS, "tl.where(far_cell == cell, tl.maximum(y, far), y)", "tl.maximum(y, far + 2)", "rle"),
    "guess unchecked": (RUNS, "tl.where(far_cell == cell, tl.maximum(y, far), y)", "tl.maximum(y, past - 1)", "rle"),
    "the row before a part": (RUNS, "tl.where(first_y == 0, H, first_y) - 1", "H - 1", "rle"),
    "a row of no part": (RUNS, "top + (part + 1) * part_rows)", "top + (part + 1) * part_rows - 1)", "rle"),
    "an end in each part": (RUNS, "tl.where(part == PARTS - 1, W - 1, -1)", "W - 1", "rle"),
    "no end": (RUNS, "x * H + H, mask=ends", "x * H + H - 1, mask=ends", "rle"),
    "beyond the room": (RUNS, "mask=changes & (slot < room)", "mask=changes", "rle"),
    "no first run": (rle, "counts[first] = end[first]", "", "rle"),
    "rows of an image": (RUNS, "k = n * rows + d", "k = slot_k", "rle"),
    "masks beyond the count": (RUNS, "x < tl.where(exists, W, 0)", "x < W", "rle"),
    "columns beyond the image": (RUNS, "tl.where(exists, W, 0)", "tl.where(exists, columns, 0)", "rle"),
    "size of the first image": (RUNS, "H = tl.load(images_ptr + n * 3)", "H = tl.load(images_ptr)", "rle"),
}  # fmt: skip
FAST = ("no zeros after the last 16", "stale rows of a band", "column goes on", "rows of an image")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("output", OUTPUTS)
def test_parity_is_green(output, device):
    assert SIZE[0] > kernels.ROWS, "several programs of a mask"
    assert SIZE[1] > kernels.BLOCK_X, "several blocks of a row"
    parity(paste_op, device, output)


@each_mutant(MUTANTS, FAST)
def test_mutants_turn_parity_red(name, device, tmp_path):
    module, old, new, output = MUTANTS[name]
    broken = mutant(module, old, new, tmp_path, seen_from=paste_op)
    dense = importlib.import_module(f"{broken.__package__}.kernels.dense")
    dense.CHUNK_BYTES, dense.ROWS, dense.BLOCK_X = 64, 4, 32
    with pytest.raises(AssertionError):
        parity(broken, device, output)
