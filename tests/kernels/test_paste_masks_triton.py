"""paste_masks in Triton: the reference's bits in every output, odd boxes and images, run lengths, mutants."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.model.sync import count_blocking
from tests.mutation import mutant
from tmask_kernels import paste_masks, paste_masks_batched
from tmask_kernels.ops.paste_masks.kernels import dense as kernels
from tmask_kernels.ops.paste_masks.kernels import geometry
from tmask_kernels.ops.paste_masks.kernels import runs as kernels_runs
from tmask_kernels.ops.paste_masks.rle import strings
from tmask_kernels.testing import guarded, poisoned_empty

CONVENTIONS = ["detectron2", "torchvision"]
OUTPUTS = ["probability", "bool", "packed", "rle"]
SIZE = (9, 37)  # 333 elements: no mask but the first begins at a multiple of 16

# Of the interpreter: numpy's, of boxes that are NaN or overflow, and of a loop's bound that is an array of one number.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of a few hundred pixels then take several chunks and programs."""
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 64)
    monkeypatch.setattr(kernels, "STEPS", 2)


def ordinary(device: torch.device) -> tuple[Tensor, Tensor]:
    """Masks [4, 5, 5] between NaN and boxes: inside, past every border, full height, smaller than a pixel."""
    boxes = [[3.3, 1.2, 14.9, 7.4], [-6.0, -3.0, 41.0, 13.5], [20.45, -4.0, 22.05, 12.0], [30.3, 4.2, 30.9, 4.9]]
    masks = torch.rand(4, 5, 5, device=device)
    masks[1, 2:, 3:] = 1  # the last pixels, beside the next mask's first
    masks[2] = 1  # its runs go on from column to column
    masks[3] = 0.5  # the threshold itself
    return guarded(masks), guarded(torch.tensor(boxes, device=device))


def odd_boxes(device: torch.device) -> Tensor:
    inf, nan = math.inf, math.nan
    rows = [
        [nan, 1, 5, 5],
        [1, 1, inf, 5],
        [-inf, -inf, inf, inf],
        [7, 7, 2, 2],  # inverted
        [7, 2, 7, 8],  # no width
        [5, 2, 5.001, 9],
        [-1e9, -1e9, 1e9, 1e9],
        [-3e38, 0, 3e38, 9],  # its width overflows
        [36, 8, 37, 9],  # the last pixel
        [-900, -900, -800, -800],
        [2.0**24, 0, 2.0**24 + 8, 5],
        [1e-40, 1e-40, 2e-40, 2e-40],
    ]
    return torch.tensor(rows, device=device)


def runs_of(kernels: ModuleType, masks: Tensor, boxes: Tensor, convention: str) -> Any:
    """Run lengths of one image."""
    return kernels.paste_runs(masks[None], boxes[None], [len(masks)], [SIZE], 0.5, convention)


def check_same(masks: Tensor, boxes: Tensor, size: tuple[int, int], output: str, convention: str) -> Any:
    """Triton's output, after it was held against the reference's: the same bits, nothing beside them written."""
    with poisoned_empty():
        got = paste_masks(masks, boxes, size, output=output, convention=convention, backend="triton")
    expected = paste_masks(masks.cpu(), boxes.cpu(), size, output=output, convention=convention, backend="reference")
    if isinstance(got, Tensor):
        assert got.dtype == expected.dtype
        assert got.is_contiguous()
        torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    else:
        assert got == expected
    return got


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("convention", ["detectron2", pytest.param("torchvision", marks=pytest.mark.slow)])
def test_the_same_bits_as_the_reference(device: torch.device, convention: str, output: str) -> None:
    check_same(*ordinary(device), SIZE, output, convention)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("output", ["bool", *(pytest.param(o, marks=pytest.mark.slow) for o in OUTPUTS[::2])])
def test_several_chunks_and_programs(device: torch.device, output: str) -> None:
    assert SIZE[0] * SIZE[1] > kernels.CHUNK_BYTES * kernels.STEPS
    check_same(*ordinary(device), SIZE, output, "detectron2")


@pytest.mark.parametrize("size", [(5, 3), (1, 40), (40, 1)], ids=str)
@pytest.mark.parametrize("output", ["bool", "rle", *(pytest.param(o, marks=pytest.mark.slow) for o in OUTPUTS[::2])])
def test_narrow_images(device: torch.device, size: tuple[int, int], output: str) -> None:
    """Rows shorter than 16 bytes, and masks of fewer elements than lie before them in their first chunk."""
    masks, boxes = ordinary(device)
    boxes = boxes * torch.tensor([size[1] / SIZE[1], size[0] / SIZE[0]] * 2, device=device)
    check_same(masks[1:3], boxes[1:3], size, output, "torchvision")


@pytest.mark.parametrize("output", ["bool", *(pytest.param(o, marks=pytest.mark.slow) for o in OUTPUTS[::3])])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_odd_boxes(device: torch.device, convention: str, output: str) -> None:
    boxes = odd_boxes(device)
    got = check_same(torch.ones(len(boxes), 3, 3, device=device), boxes, SIZE, output, convention)
    if output == "bool":
        none = [0, 1, 2, 7, 9, 10, *((3, 4) if convention == "detectron2" else ())]
        assert not got[none].any()
        assert got[[6, 8]].flatten(1).any(1).all()


@pytest.mark.parametrize("output", ["probability", "rle"])
def test_masks_with_nan_and_infinity(device: torch.device, output: str) -> None:
    """A NaN spreads to the pixels that sample it and no further, and is not inside."""
    masks, boxes = ordinary(device)
    masks = masks[:2].clone()
    masks[:, 0, 0], masks[:, 2, 3] = math.nan, math.inf
    check_same(masks, boxes[:2], SIZE, output, "detectron2")


@pytest.mark.parametrize("output", ["probability", pytest.param("rle", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_read_as_it_is(device: torch.device, dtype: torch.dtype, output: str) -> None:
    masks, boxes = ordinary(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        check_same(masks[:2].to(dtype), boxes[:2], SIZE, output, "detectron2")


def test_strided_masks_and_half_boxes(device: torch.device) -> None:
    masks, boxes = ordinary(device)
    check_same(masks.mT[::2], boxes[::2].half(), SIZE, "bool", "detectron2")


@pytest.mark.parametrize("threshold", [0.25, 1.0])
def test_thresholds_and_logits(device: torch.device, threshold: float) -> None:
    masks, boxes = ordinary(device)
    logits = masks[:2] * 10 - 5
    settings: dict[str, Any] = {"logits": True, "threshold": threshold, "convention": "torchvision"}
    got = paste_masks(logits, boxes[:2], SIZE, **settings, backend="triton")
    value = paste_masks(logits, boxes[:2], SIZE, **settings, output="probability", backend="triton")
    assert torch.equal(got, value > threshold)


@pytest.mark.parametrize("output", OUTPUTS)
def test_no_instances(device: torch.device, output: str) -> None:
    none = torch.zeros(0, 28, 28, device=device), torch.zeros(0, 4, device=device)
    out = paste_masks(*none, (9, 40), output=output, backend="triton")
    assert len(out) == 0
    assert output == "rle" or out.shape[1:] == (9, 2 if output == "packed" else 40)


# Run lengths


def patterns() -> Tensor:
    """Bits [K, 6, 6] that a coder may stumble over."""
    y, x = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    bits = [
        torch.zeros(6, 6),
        torch.ones(6, 6),
        (y + x) % 2,
        (y + x + 1) % 2,
        x == 0,
        x == 5,
        (x > 1) & (x < 4),  # two full columns are one run
        y == 5,  # every column ends with a one, the next begins with a zero
        y == 0,
        (y == 5) | (y == 0),
        (y == x),
    ]
    corners = [(y == a) & (x == b) for a in (0, 5) for b in (0, 5)]
    random = list(torch.rand(3, 6, 6) < 0.5)
    return torch.stack([one.bool() for one in bits + corners + random])


@pytest.mark.parametrize(
    ("place", "chosen"),
    [
        ((0, 0, 6, 6), [0, 1, 2, 6, 7, 9, -1]),
        ((2, 3, 11, 13), [1, 7, -1]),
        pytest.param((0, 0, 6, 6), list(range(18)), marks=pytest.mark.slow),
        pytest.param((2, 0, 6, 9), list(range(18)), marks=pytest.mark.slow),
    ],
    ids=["whole image", "inside", "all", "all, full columns"],
)
def test_run_lengths_equal_pycocotools(device: torch.device, place: tuple[int, ...], chosen: list[int]) -> None:
    coco_mask = pytest.importorskip("pycocotools.mask")
    bits = patterns()[chosen]
    left, top, height, width = place
    box = torch.tensor([left, top, left + 6.0, top + 6.0], device=device)  # a pixel a cell
    got = paste_masks(
        bits.float().to(device), box.expand(len(bits), 4), (height, width), output="rle", backend="triton"
    )
    full = np.zeros((height, width, len(bits)), dtype=np.uint8, order="F")
    full[top : top + 6, left : left + 6] = bits.permute(1, 2, 0).numpy()
    assert [one["counts"] for one in got] == [one["counts"].decode() for one in coco_mask.encode(full)]
    assert np.array_equal(coco_mask.decode(got), full)


def test_positions_beyond_32_bits(device: torch.device) -> None:
    """Six masks of 2^30 pixels: positions in all of them would pass 2^32, in a mask they do not."""
    height, width, y = 2**26, 16, 8
    boxes = torch.tensor([2.0, y, 5.0, y + 4.0], device=device).expand(6, 4)
    masks = torch.ones(6, 2, 2, device=device)
    got = paste_masks(masks, boxes, (height, width), output="rle", backend="triton")
    gap = height - 4
    counts = np.array([2 * height + y, 4, gap, 4, gap, 4, 12 * height - y - 4])
    assert counts.sum() == height * width
    assert [one["counts"] for one in got] == strings(counts, np.array([7])) * 6


def test_memory_follows_columns_and_changes(device: torch.device) -> None:
    """16 bytes a column and 4 a run; for a hundred masks like a detector's far below 32 MB."""
    from bench.cases import CASES, PasteCase
    from tests.allocations import allocated

    def formula(K: int, W: int, runs: int) -> int:
        return 16 * K * W + 4 * runs

    masks, boxes = ordinary(device)
    with allocated(masks, boxes) as sizes:
        _, per_mask = runs_of(kernels_runs, masks, boxes, "detectron2")
    least = formula(len(masks), SIZE[1], int(per_mask.sum())) + 12  # 12: the image's size and count
    copies = 16 * len(masks) + 4 * int(per_mask.sum()) + 12  # what goes to the host and comes from it, at most
    assert sum(sizes) == least if device.type == "cpu" else least <= sum(sizes) <= least + copies

    case = CASES["paste-masks"]
    assert isinstance(case, PasteCase)
    masks, boxes = case.inputs(torch.device("cpu"))
    with allocated() as sizes:
        found = paste_masks(masks, boxes, (case.height, case.width), output="rle", backend="reference")
    assert max(sizes) < 8 * 2**20  # the reference goes by chunks of crops
    runs = sum(len(one["counts"]) for one in found)  # a character a run at least
    assert formula(len(masks), case.width, runs) < 4 * 2**20


# Batches


def batch(device: torch.device) -> tuple[Tensor, Tensor, list[int], list[tuple[int, int]]]:
    """Five images of four sizes, one without masks, none with all three; what is past a count is full, or NaN."""
    masks, boxes = torch.rand(5, 3, 4, 4, device=device), torch.rand(5, 3, 4, device=device)
    boxes = boxes * torch.tensor([12.0, 3.0, 12.0, 4.0], device=device) - 1
    boxes[..., 2:] += boxes[..., :2]
    masks[1], boxes[1] = 1, torch.tensor([-9.0, -9.0, 40.0, 40.0], device=device)  # up to the last pixel of its image
    boxes[4, 2:] = math.nan
    return guarded(masks), guarded(boxes), [2, 1, 0, 2, 2], [(6, 20), (5, 3), (7, 2), (6, 20), (4, 11)]


@contextmanager
def counting_launches(module: ModuleType, name: str) -> Iterator[list[int]]:
    """How many launches of a kernel there were, once the block ends."""
    found, kernel, grids = [], getattr(module, name), []

    class Counted:
        def __getitem__(self, grid: Any) -> Any:
            grids.append(grid)
            return kernel[grid]

    with mock.patch.object(module, name, Counted()):
        yield found
    found.append(len(grids))


def one_by_one(masks: Tensor, boxes: Tensor, counts: Any, sizes: Any, output: str, convention: str) -> list[Any]:
    """What the reference gives for each image by itself."""
    return [
        paste_masks(m[:c].cpu(), b[:c].cpu(), size, output=output, convention=convention, backend="reference")
        for m, b, c, size in zip(masks, boxes, counts, sizes, strict=True)
    ]


def flat(lists: Sequence[Any]) -> list[Any]:
    return [item for part in lists for item in part]


@pytest.mark.parametrize("output", ["rle", "bool", *(pytest.param(o, marks=pytest.mark.slow) for o in OUTPUTS[::2])])
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("convention", ["detectron2", pytest.param("torchvision", marks=pytest.mark.slow)])
def test_a_batch_is_its_images(device: torch.device, convention: str, backend: str, output: str) -> None:
    images = batch(device)
    with poisoned_empty():
        got = paste_masks_batched(*images, output=output, convention=convention, backend=backend)
    expected = one_by_one(*images, output, convention)
    if output == "rle":
        assert got == expected
    else:
        for one, own in zip(got, expected, strict=True):
            assert torch.equal(one.cpu(), own)
            assert one.dtype == own.dtype


def test_a_batch_of_run_lengths_takes_the_launches_and_waits_of_an_image(device: torch.device) -> None:
    masks, boxes, counts, sizes = batch(device)
    counted, found = torch.tensor(counts, device=device), []
    for n in (1, 5):
        with count_blocking() as waits, counting_launches(kernels_runs, "_runs_kernel") as launches:
            paste_masks_batched(masks[:n], boxes[:n], counts[:n], sizes[:n], output="rle", backend="triton")
        assert launches == [2]
        found.append(waits)
    again = paste_masks_batched(masks[:1], boxes[:1], counted[:1], sizes[:1], output="rle", backend="triton")
    assert again == one_by_one(masks[:1], boxes[:1], counts[:1], sizes[:1], "rle", "detectron2")
    assert found[0] == found[1]
    assert found[0]["Tensor.cpu"] == 2


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_batches_without_masks(device: torch.device, backend: str, output: str) -> None:
    for n, d in ((0, 3), (2, 0), (2, 3)):
        masks, boxes = torch.rand(n, d, 4, 4, device=device), torch.rand(n, d, 4, device=device)
        got = paste_masks_batched(masks, boxes, [0] * n, [(5, 6)] * n, output=output, backend=backend)
        assert [len(one) for one in got] == [0] * n


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_bool_masks_are_probabilities_of_0_and_1(device: torch.device, backend: str, output: str) -> None:
    masks, boxes = ordinary(device)
    masks, boxes = masks[:2] > 0.5, boxes[:2]
    options: dict[str, Any] = {"output": output, "backend": backend, "threshold": 0.7}
    got, expected = (paste_masks(m, boxes, (9, 12), **options) for m in (masks, masks.float()))
    batch = paste_masks_batched(masks[None], boxes[None], [2], [(9, 12)], **options)[0]
    if output == "rle":
        assert got == expected == batch
    else:
        assert got.any()  # type: ignore[union-attr]
        assert got.dtype == expected.dtype  # type: ignore[union-attr]
        assert torch.equal(got, expected)  # type: ignore[arg-type]
        assert torch.equal(batch, expected)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"paste_masks: masks: expected float \[K, M, M\], got torch.bool"):
        paste_masks(masks, boxes, (9, 12), logits=True, **options)


# The custom op


@pytest.mark.parametrize("output", ["probability", "bool", pytest.param("packed", marks=pytest.mark.slow)])
def test_custom_op_is_sound_and_traces(device: torch.device, output: str) -> None:
    masks, boxes = ordinary(device)
    masks, boxes = masks[:1].clone(), boxes[:1].clone()
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        kernels.paste_masks, (masks, boxes, 4, 6, 0.5, output, "detectron2"), test_utils=tests
    )  # fmt: skip
    compiled = torch.compile(
        lambda m, b: paste_masks(m, b, (4, 6), output=output, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(masks, boxes), paste_masks(masks, boxes, (4, 6), output=output))


def test_refuses_what_it_cannot_serve(device: torch.device) -> None:
    masks, boxes = ordinary(device)
    with pytest.raises(ValueError, match="computes in float32, not float64"):
        paste_masks(masks.double(), boxes, SIZE, backend="triton")
    with pytest.raises(ValueError, match="up to 2\\^30 pixels"):
        paste_masks(masks, boxes, (2**15, 2**15 + 1), backend="triton")


# Mutants: each must turn the parity check red


def parity(kernels: ModuleType, device: torch.device, name: str) -> None:
    """`kernels` is a copy of the module of the dense outputs or of that of run lengths."""
    masks, boxes = ordinary(device)
    for convention in CONVENTIONS:
        if hasattr(kernels, "paste_runs"):
            expected: Any = paste_masks(masks.cpu(), boxes.cpu(), SIZE, output="rle", convention=convention)
            got = strings(*runs_of(kernels, masks, boxes, convention))
            assert got == [one["counts"] for one in expected]
            if convention == "torchvision":
                continue
            images = batch(device)
            runs = kernels.paste_runs(*images, 0.5, convention)
            assert strings(*runs) == [one["counts"] for one in flat(one_by_one(*images, "rle", convention))]
            continue
        output = "packed" if name == "bits" else "bool"
        with poisoned_empty():
            out = kernels.paste_masks(masks, boxes, *SIZE, 0.5, output, convention)
        expected = paste_masks(masks.cpu(), boxes.cpu(), SIZE, output=output, convention=convention)
        assert torch.equal(out.cpu(), expected)


DENSE, RUNS = kernels, kernels_runs
# The module to break, the texts, and the module whose op is checked.
MUTANTS = {
    "corner for centre": (geometry, "+ 0.5 - start", "- start", DENSE),
    "shift": (geometry, "1.5 if TORCHVISION else 0.5", "0.5", DENSE),
    "floor for truncate": (geometry, "tl.where(x < 0, tl.ceil(x), tl.floor(x))", "tl.floor(x)", DENSE),
    "growth": (geometry, "* ((SIDE + 2) / SIDE)", "* 1.0", DENSE),
    "last pixel": (geometry, "past = last + 1.0", "past = last", DENSE),
    "window too narrow": (geometry, "2.0**-20 + 1.0", "2.0**-20 - 2.5", DENSE),
    "border is not 0": (geometry, "exists & (cell >= 0)", "exists", DENSE),
    "row below wraps": (geometry, "(row >= 0) & (row < SIDE)", "row >= -1", DENSE),
    "weights": (geometry, "upper * (1.0 - weight) + lower * weight", "upper * weight + lower", RUNS),
    "same threshold": (geometry, "inside = value > threshold", "inside = value >= threshold", DENSE),
    "no second row": (DENSE, "tl.where(wraps, column - L, column)", "column", DENSE),
    "second row's weight": (DENSE, "tl.where(wraps, next_weight, this_weight)", "this_weight", DENSE),
    "neighbours overwritten": (DENSE, "(first + offs >= 0) & ", "", DENSE),
    "not aligned": (DENSE, "origin // 16 * 16", "(origin + 15) // 16 * 16", DENSE),
    "columns of one row": (DENSE, "after & before, after | before", "after & before, after & before", DENSE),
    "bits": (DENSE, "column * PIXELS + i", "column * PIXELS + 31 - i", DENSE),
    "column goes on": (RUNS, "taps(x - 1, x_start", "taps(x - 2, x_start", RUNS),
    "no column after the box": (RUNS, "first_x <= right", "first_x < right - 40", RUNS),
    "no row after the box": (RUNS, "tl.minimum(bottom + 1, H)", "tl.minimum(bottom - 2, H)", RUNS),
    "stale rows": (RUNS, "if cell != held:", "if cell > held + 1:", RUNS),
    "no end": (RUNS, "x * H + H, mask=ends", "x * H + H - 1, mask=ends", RUNS),
    "no first run": (RUNS, "counts[first] = end[first]", "", RUNS),
    "rows of an image": (RUNS, "k = n * rows + d", "k = slot_k", RUNS),
    "masks beyond the count": (RUNS, "x < tl.where(exists, W, 0)", "x < W", RUNS),
    "columns beyond the image": (RUNS, "tl.where(exists, W, 0)", "tl.where(exists, columns, 0)", RUNS),
    "size of the first image": (RUNS, "H = tl.load(images_ptr + n * 3)", "H = tl.load(images_ptr)", RUNS),
}  # fmt: skip
FAST = ("not aligned", "columns of one row", "column goes on", "rows of an image")


@pytest.mark.parametrize("module", [kernels, kernels_runs], ids=["dense", "runs"])
def test_parity_is_green(module: ModuleType, device: torch.device, small_chunks: None) -> None:
    parity(module, device, "")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in MUTANTS])
def test_mutants_turn_parity_red(name: str, device: torch.device, tmp_path: Path) -> None:
    module, old, new, seen_from = MUTANTS[name]
    broken = mutant(module, old, new, tmp_path, seen_from=seen_from)
    if hasattr(broken, "CHUNK_BYTES"):
        broken.CHUNK_BYTES, broken.STEPS = 64, 2
    with pytest.raises(AssertionError):
        parity(broken, device, name)
