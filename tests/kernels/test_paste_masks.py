"""paste_masks against torchvision's paste, detectron2's grid_sample rule, and pycocotools' run lengths."""

import functools
from contextlib import nullcontext
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torchvision.models.detection.roi_heads import paste_masks_in_image

from tests.allocations import allocated
from tests.kernels.tools import HALVES, NAN, each_mutant, run_patterns
from tests.mutation import mutant
from tmask.model.postprocess import to_list
from tmask.structures import Detections
from tmask_kernels import paste_masks, unpack_masks, use_backend
from tmask_kernels.common import rle as common_rle
from tmask_kernels.ops.paste_masks import reference, rle
from tmask_kernels.testing import Tolerance, assert_close, random_boxes

coco_mask = pytest.importorskip("pycocotools.mask")  # the oracle of run lengths

CONVENTIONS = ["detectron2", "torchvision"]
SIZES = [(61, 45), (1, 40), (40, 1), (96, 64)]
# Both sides place their samples in float32, in another order; a steep mask turns 1e-6 of a cell into 1e-5.
ROUNDING = Tolerance(max=2e-4, rms=1e-5)


def inputs(height: int, width: int, *, side: int = 28, count: int = 24, seed: int = 0):
    """Random probability masks [K, M, M] and boxes [K, 4], some of which touch, leave or lie outside the image."""
    generator = torch.Generator().manual_seed(seed)
    boxes = random_boxes(count, height=height, width=width, min_size=min(2.0, height, width), seed=seed)
    awkward = [
        [0, 0, width, height],
        [-6.3, -4.2, width * 0.5, height * 0.4],
        [width - 3.2, height - 7.9, width + 20.0, height + 1.0],
        [width + 50.0, 3.0, width + 70.0, 9.0],
        [-90.0, -80.0, width + 90.0, height + 70.0],
        [3.2, -5.0, 7.7, height + 5.0],  # full height: runs go on from column to column
        [0.3, 0.3, 1.1, 0.9],
    ]
    boxes = torch.cat([boxes, torch.tensor(awkward)])
    masks = torch.rand(len(boxes), side, side, generator=generator)
    masks[-2] = 1.0
    return masks, boxes


def expected(masks, boxes, size, convention):
    """[K, H, W] float64 by the original's own means."""
    height, width = size
    if convention == "torchvision":
        return torch.cat([torchvision_paste(m, b, size) for m, b in zip(masks, boxes, strict=True)])
    x1, y1, x2, y2 = boxes.double().split(1, dim=1)
    y = (torch.arange(height).double() + 0.5 - y1) / (y2 - y1) * 2 - 1  # [K, H]
    x = (torch.arange(width).double() + 0.5 - x1) / (x2 - x1) * 2 - 1  # [K, W]
    grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=3)
    return F.grid_sample(masks[:, None].double(), grid, align_corners=False)[:, 0]


def torchvision_paste(mask, box, size):
    """[1, H, W]. torchvision fails on a box that lies wholly outside the image, whose mask has no pixel."""
    try:
        return paste_masks_in_image(mask[None, None].double(), box[None], size)[:, 0]
    except RuntimeError:
        assert box[0] > size[1] or box[1] > size[0] or len(mask) == 1
        return torch.zeros(1, *size, dtype=torch.float64)


def check_probability(device, function, convention, size, side=28):
    masks, boxes = inputs(*size, side=side)
    got = function(masks.to(device), boxes.to(device), size, convention=convention)
    assert got.dtype == torch.float32
    assert_close(got.cpu(), expected(masks, boxes, size, convention), tolerance=ROUNDING)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("side", [1, 7, 28], ids=lambda m: f"side{m}")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_probabilities_equal_the_original(device, convention, side, size):
    check_probability(device, functools.partial(paste_masks, output="probability"), convention, size, side)


MUTANTS = {
    "centre": ("pixel + 0.5 - low", "pixel - low", "detectron2"),
    "corners": ("_divide(side, extent) - 0.5", "_divide(side - 1, extent)", "detectron2"),
    "floor": ("first, last = (centre - half).trunc(), ", "first, last = (centre - half).floor(), ", "torchvision"),
    "end": ("last - first + 1", "last - first", "torchvision"),
    "growth": ("((side + 2) / side)", "1", "torchvision"),
    "ring": ("- 1.5", "- 0.5", "torchvision"),
    "last pixel": ("& (pixel <= last)", "& (pixel < last)", "torchvision"),
    "one cell": ("first + 1, first)", "first, first)", "detectron2"),
    "weights": ("coordinate - cell", "cell - coordinate + 1", "detectron2"),
    "border": (
        "F.pad(masks, (1, 1, 1, 1))",
        "F.pad(masks[None], (1, 1, 1, 1), mode='replicate')[0]",
        "detectron2",
    ),
}


@each_mutant(MUTANTS)
def test_a_broken_reference_fails(tmp_path, name):
    old, new, convention = MUTANTS[name]
    broken = mutant(reference, old, new, tmp_path).paste_masks_reference
    with pytest.raises(AssertionError):
        check_probability(
            torch.device("cpu"), functools.partial(broken, threshold=0.5, output="probability"), convention, (61, 45)
        )


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("threshold", [0.5, 0.3, 1.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_all_outputs_say_the_same(device, convention, threshold, size):
    masks, boxes = (t.to(device) for t in inputs(*size))

    def call(output):
        return paste_masks(masks, boxes, size, output=output, threshold=threshold, convention=convention)

    value, inside = call("probability"), call("bool")
    assert torch.equal(inside, value >= threshold if convention == "detectron2" else value > threshold)
    assert torch.equal(unpack_masks(call("packed"), size[1]), inside)
    runs = call("rle")
    full = np.asfortranarray(inside.permute(1, 2, 0).cpu().numpy().astype(np.uint8))
    theirs = coco_mask.encode(full)
    assert runs == [{"size": list(size), "counts": item["counts"].decode()} for item in theirs]
    assert np.array_equal(coco_mask.decode(runs), full)


def test_conventions_differ_at_the_threshold_itself(device):
    """A box of one pixel a cell: every value is exactly the mask's."""
    masks, boxes = torch.full((1, 4, 4), 0.5, device=device), torch.tensor([[2.0, 2.0, 6.0, 6.0]], device=device)
    assert paste_masks(masks, boxes, (12, 12), convention="detectron2").sum() == 16
    assert paste_masks(masks, boxes, (12, 12), convention="torchvision").sum() == 0


@pytest.mark.parametrize("chunk", [1, 500, 5000])
def test_chunks_do_not_change_the_result(device, monkeypatch, chunk):
    masks, boxes = (t.to(device) for t in inputs(61, 45))
    paste = functools.partial(paste_masks, masks, boxes, (61, 45), backend="reference")
    dense, runs = (paste(output=output) for output in ("bool", "rle"))
    monkeypatch.setattr(reference, "_CHUNK_PIXELS", chunk)
    monkeypatch.setattr(rle, "_CHUNK_PIXELS", chunk)
    assert torch.equal(paste(output="bool"), dense)
    assert paste(output="rle") == runs


def test_logits_pass_through_the_sigmoid_first(device):
    masks, boxes = (t.to(device) for t in inputs(30, 30))
    logits = torch.logit(masks.clamp(0.01, 0.99))
    got = paste_masks(logits, boxes, (30, 30), logits=True, output="probability")
    assert_close(got, paste_masks(logits.sigmoid(), boxes, (30, 30), output="probability"))


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
def test_every_dtype_computes_in_float32_at_least(device, dtype, convention):
    masks, boxes = inputs(30, 30)
    masks = masks.to(dtype)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = paste_masks(masks.to(device), boxes.to(device), (30, 30), output="probability", convention=convention)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(got.cpu(), expected(masks.double(), boxes, (30, 30), convention), tolerance=ROUNDING)


@pytest.mark.parametrize("output", ["probability", "bool", "packed", "rle"])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_boxes_without_a_pixel(device, output, convention):
    boxes = torch.tensor([[NAN, 1, 5, 5], [90.0, 90, 99, 99], [7.0, 7, 2, 2]], device=device)
    out = paste_masks(torch.ones(3, 28, 28, device=device), boxes, (9, 40), output=output, convention=convention)
    if output == "rle":
        # One run of zeros over 9 * 40 pixels: 360 is 8 + 32 * 11, so "X;" in groups of five bits.
        assert out == [{"size": [9, 40], "counts": "X;"}] * 3
    else:
        assert not out.any()


# Run lengths of thousands of masks are pycocotools' to the letter, and no K x H x W tensor is made on the way

Bits = npt.NDArray[np.bool_]
SIDE = 12


def check_coder(coder: ModuleType, masks: Bits, left: int, top: int, height: int, width: int) -> None:
    """A box of a pixel a cell puts each mask into the image as it is. `coder` is a copy of `rle`."""
    box = torch.tensor([left, top, left + SIDE, top + SIDE]).float()
    values, boxes = torch.from_numpy(masks).float(), box.expand(len(masks), 4)
    full = np.zeros((height, width, len(masks)), dtype=np.uint8, order="F")
    full[top : top + SIDE, left : left + SIDE] = masks.transpose(1, 2, 0)
    dense = paste_masks(values, boxes, (height, width), backend="reference")
    assert np.array_equal(dense.numpy(), full.transpose(2, 0, 1))
    texts = coder.paste_rle(values, boxes, (height, width), 0.5, convention="detectron2")
    assert texts == [one["counts"].decode() for one in coco_mask.encode(full)]


CODER_MUTANTS = {
    "first counts": ("for place in range(3)", "for place in range(2)"),
    "two before": ("value[2:] -= counts[:-2]", "value[3:] -= counts[:-3]"),
    "group": ("limit <<= 5", "limit <<= 6"),
    "more": ("0x20 * more", "0x20"),
    "sign": ("~value, value)", "-value, value)"),
    "cuts": ("joined[a:b]", "joined[: b - a]"),
    "full columns": ("goes_on[1:] =", "goes_on[1:] &="),
}


@pytest.mark.parametrize("name", ["", *CODER_MUTANTS])
def test_run_lengths_equal_pycocotools_unless_the_coder_is_broken(name, tmp_path):
    """Runs of every kind and noise of any density. Far from a border counts take many digits."""
    random = np.random.default_rng(0)
    masks = random.random((90, SIDE, SIDE)) < random.random((90, 1, 1))
    masks[::3, :, 4:8] = True
    masks[1:12], masks[13:24] = run_patterns(SIDE, 0, 5, 2), run_patterns(SIDE, SIDE - 1, 0, 1)
    coder = mutant(common_rle, *CODER_MUTANTS[name], tmp_path, seen_from=rle) if name else rle
    with pytest.raises(AssertionError) if name else nullcontext():
        for left, top, right, bottom in ((0, 0, 87, 0), (0, 0, 0, 9), (0, 0, 0, 700), (5, 1, 1, 0), (1, 700, 0, 5)):
            check_coder(coder, masks, left, top, top + SIDE + bottom, left + SIDE + right)


def detections(count: int) -> Detections:
    boxes = torch.tensor([[10.0, 8.0, 18.0, 14.0]]).repeat(1, count, 1) + torch.arange(count)[:, None]
    return Detections(
        boxes=boxes,
        scores=torch.rand(1, count),
        labels=torch.ones(1, count, dtype=torch.int64),
        counts=torch.tensor([count]),
        masks=torch.rand(1, count, 4, 4),
    )


def test_results_for_evaluation_hold_no_full_mask(device, backend):
    """What `evaluate` and `predict` ask for; asked for bytes, the same call does hold K x H x W."""
    count, size = 2, (60, 150)
    found = Detections(*(None if t is None else t.to(device) for t in detections(count)))
    sizes = torch.tensor([size], device=device)
    with use_backend(backend):
        with allocated() as run_lengths:
            (result,) = to_list(found, sizes, [size], masks="rle")
        with allocated() as as_bytes:
            (dense,) = to_list(found, sizes, [size], masks="bool")
    assert max(as_bytes) >= count * size[0] * size[1]
    assert max(run_lengths) < size[0] * size[1]
    full = np.asfortranarray(dense["masks"].permute(1, 2, 0).cpu().numpy().astype(np.uint8))
    assert np.array_equal(coco_mask.decode(result["masks"]), full)
