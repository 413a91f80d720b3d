"""Run lengths of thousands of masks are pycocotools' to the letter, and no K x H x W tensor is made on the way."""

from contextlib import nullcontext
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.allocations import allocated
from tests.kernels.tools import run_patterns
from tests.mutation import mutant
from tmask.model.postprocess import to_list
from tmask.structures import Detections
from tmask_kernels import paste_masks, use_backend
from tmask_kernels.ops.paste_masks import rle

coco_mask = pytest.importorskip("pycocotools.mask")

Bits = npt.NDArray[np.bool_]
SIDE = 12
MASKS = 50  # of an example


@st.composite
def bits(draw: st.DrawFn) -> Bits:
    """[K, M, M]: one shape of each kind that a coder may stumble over, then noise of any density."""
    shapes = run_patterns(SIDE, *(draw(st.integers(0, SIDE - 1)) for _ in range(3))).numpy()
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    noise = generator.random((MASKS - len(shapes), SIDE, SIDE)) < draw(st.floats(0, 1))
    return np.concatenate([shapes, noise])


def check_coder(coder: ModuleType, masks: Bits, left: int, top: int, height: int, width: int) -> None:
    """A box of a pixel a cell puts each mask into the image as it is. `coder` is a copy of `rle`."""
    box = torch.tensor([left, top, left + SIDE, top + SIDE]).float()
    values, boxes = torch.from_numpy(masks).float(), box.expand(len(masks), 4)
    full = np.zeros((height, width, len(masks)), dtype=np.uint8, order="F")
    full[top : top + SIDE, left : left + SIDE] = masks.transpose(1, 2, 0)
    dense = paste_masks(values, boxes, (height, width), backend="reference")
    assert np.array_equal(dense.numpy(), full.transpose(2, 0, 1))
    runs = coder.paste_rle(values, boxes, (height, width), 0.5, convention="detectron2")
    assert [one["counts"] for one in runs] == [one["counts"].decode() for one in coco_mask.encode(full)]
    assert np.array_equal(coco_mask.decode(runs), full)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(masks=bits(), margins=st.tuples(*[st.sampled_from([0, 0, 1, 5, 700])] * 4))
def test_run_lengths_equal_pycocotools(masks, margins):
    """Three thousand masks; half of them touch a border, and some are so far from one that counts take many digits."""
    left, top, right, bottom = margins
    if min(left + right, top + bottom) > 100:
        bottom, top = 3, 0
    check_coder(rle, masks, left, top, top + SIDE + bottom, left + SIDE + right)


MUTANTS = {
    "first counts": ("for place in range(3)", "for place in range(2)"),
    "two before": ("value[2:] -= counts[:-2]", "value[3:] -= counts[:-3]"),
    "group": ("limit <<= 5", "limit <<= 6"),
    "more": ("0x20 * more", "0x20"),
    "sign": ("~value, value)", "-value, value)"),
    "cuts": ("joined[a:b]", "joined[: b - a]"),
    "full columns": ("goes_on[1:] =", "goes_on[1:] &="),
}


@pytest.mark.parametrize("name", ["", *MUTANTS])
def test_a_broken_coder_is_found(name, tmp_path):
    """Without a name the coder is the sound one, which passes."""
    random = np.random.default_rng(0)
    masks = random.random((90, SIDE, SIDE)) < random.random((90, 1, 1))
    masks[::3, :, 4:8] = True
    coder = mutant(rle, *MUTANTS[name], tmp_path) if name else rle
    with pytest.raises(AssertionError) if name else nullcontext():
        for height, width in ((SIDE, 99), (SIDE + 9, SIDE), (SIDE + 700, SIDE)):
            check_coder(coder, masks, 0, 0, height, width)


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
    count, size = 2, (30, 150)
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
