"""The best of what NMS kept, by the kernels as by the reference: order, ties, padding."""

import pytest
import torch

from tests.kernels.tools import INF, NAN, assert_same, each_mutant
from tests.mutation import mutant
from tmask_kernels.ops.proposals.kernels import select as kernels_select
from tmask_kernels.ops.proposals.reference import select_best_reference
from tmask_kernels.testing import guarded, poisoned_empty


def inputs(images: int = 2, segments: int = 3, count: int = 9, kept: int = 5, seed: int = 0):
    """Boxes [S, K, 4], scores [S, K] that tie often, and kept [S, M] by falling score, -1 behind."""
    generator = torch.Generator().manual_seed(seed)
    S = images * segments
    scores = torch.randint(-3, 4, (S, count), generator=generator) / 4
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :kept]
    filled = torch.randint(0, kept + 1, (S, 1), generator=generator)
    kept_rows = torch.where(torch.arange(order.shape[1]) < filled, order, -1)
    return torch.rand(S, count, 4, generator=generator), scores, kept_rows


def check(module, device, boxes, scores, kept, images: int, limit: int) -> None:
    boxes, scores, kept = (guarded(t.to(device)) for t in (boxes, scores, kept))
    for box_first in (False, True):
        with poisoned_empty():
            got = module.select_best_fwd(boxes, scores, kept, images, limit, box_first)
        expected = select_best_reference(boxes, scores, kept, images, limit, box_first)
        assert [t.dtype for t in got] == [torch.float32, torch.float32, torch.int64, torch.int64]
        assert_same(got, expected)


SIZES = {
    "plain": ({}, 7),
    "one": ({}, 1),
    "more than there are": ({}, 40),
    "blocks": ({"images": 1, "segments": 2, "count": 400, "kept": 300}, 200),
    "no images": ({"images": 0}, 5),
    "no segments": ({"segments": 0}, 5),
    "no outputs": ({"kept": 0}, 5),
    "no boxes": ({"count": 0, "kept": 0}, 5),
}


@pytest.mark.parametrize("name", SIZES)
def test_equals_the_reference(device, name):
    sizes, limit = SIZES[name]
    check(kernels_select, device, *inputs(**sizes), sizes.get("images", 2), limit)


def test_nothing_is_kept(device):
    boxes, scores, kept = inputs()
    kept[:3] = -1
    check(kernels_select, device, boxes, scores, kept, 2, 7)


def test_scores_of_every_kind(device):
    """Signed zeros tie, a number that is not normal stands over them."""
    scores = torch.tensor([[-0.0, 1e-40, INF, 0.0, -1e-40, 3.4e38, -0.0, -3.4e38, -1.5, 2.0]])
    kept = torch.sort(scores, dim=1, descending=True, stable=True).indices
    check(kernels_select, device, torch.rand(1, 10, 4), scores, kept, 1, 10)


def test_keys_give_back_what_they_were_made_of(device):
    """A NaN of either sign goes behind -inf, where the reference has no rule."""
    scores = torch.tensor([[1.0, -NAN, -INF, NAN, -2.0]])
    kept = torch.tensor([[0, 1, 2, 3, 4]], device=device)
    boxes = torch.arange(20.0, device=device).view(1, 5, 4)
    got, found, _, counts = kernels_select.select_best_fwd(boxes, scores.to(device), kept, 1, 6, False)
    assert got[0, :, 0].tolist() == [0, 16, 8, 4, 12, 0]
    assert found[0, :3].tolist() == [1, -2, -INF]
    assert found[0, 3:5].isnan().all()
    assert counts.tolist() == [5]


BROKEN = {
    "signed zero": ("rank = tl.where(rank == -1, 0, rank)", "rank += 0"),
    "negative": ("rank = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)", "rank = bits"),
    "negative back": ("bits = tl.where(rank < 0, rank ^ 0x7FFFFFFF, rank)", "bits = rank"),
    "ties": ("(rank.to(tl.int64) << 32) - index", "(rank.to(tl.int64) << 32) + index"),
    "order": ("kept * G + segment % G if BOX_FIRST", "segment % G * K + kept if BOX_FIRST"),
    "segment": ("segment % G * K + kept\n", "kept\n"),
    "image": ("row = (image * G + segment) * K + kept", "row = segment * K + kept"),
    "none": (" | ((slot == 0) & (key == PADDING))", ""),
    "count": ("tl.where(real, slot + 1, 0).to", "tl.where(real, slot, 0).to"),
    "mask": ("tl.store(segments_ptr + out, tl.where(real, segment, 0).to(tl.int64), mask=mask)",
             "tl.store(segments_ptr + out, tl.where(real, segment, 0).to(tl.int64))"),
}  # fmt: skip


@each_mutant(BROKEN)
def test_a_broken_kernel_fails(device, tmp_path, name):
    module = mutant(kernels_select, *BROKEN[name], tmp_path)
    boxes, scores, kept = inputs()
    kept[:3] = -1
    scores[3, :4] = torch.tensor([-0.0, 1.0, 0.0, -1.0])
    kept[3] = torch.tensor([1, 0, 2, 3, -1])
    with pytest.raises((AssertionError, IndexError)):
        check(module, device, boxes, scores, kept, 2, 20)
