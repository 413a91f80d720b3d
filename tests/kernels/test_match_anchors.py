"""match_anchors against torchvision's Matcher, the A x G matrix, hand-made answers; its edges, memory and mutants."""

import functools
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from bench.cases import CASES, MatchCase
from tests.model.sync import count_blocking
from tests.mutation import mutant
from tmask_kernels import AnchorSpec, make_anchors, match_anchors
from tmask_kernels.ops.match_anchors import kernels, op, reference
from tmask_kernels.testing import guarded, poisoned_empty, random_boxes

# The interpreter's numpy warns where the rules for NaN and inf are at work.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|All-NaN slice) encountered:RuntimeWarning")

RPN = {"high": 0.7, "low": 0.3, "allow_low_quality": True}
HEAD = {"high": 0.5, "low": 0.5, "allow_low_quality": False}
WIDE = {"high": 0.6, "low": 0.05, "allow_low_quality": False}
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def scene(count: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A grid of anchors [A, 4], boxes [2, count, 4] of which some repeat, and which are real [2, count]."""
    anchors = make_anchors(AnchorSpec(((16.0,), (48.0,)), (0.5, 1.0, 2.0)), [(10, 13), (4, 4)], (120, 156))
    boxes = torch.stack([random_boxes(count, height=120, width=156, min_size=6, seed=seed + i) for i in range(2)])
    generator = torch.Generator().manual_seed(seed)
    near = torch.randint(len(anchors), (2, count // 2), generator=generator)
    boxes[:, ::2] = anchors[near] + torch.randn(2, count // 2, 4, generator=generator)
    boxes[:, 3] = boxes[:, 1]
    boxes[:, 4] = anchors[400]
    valid = torch.arange(count).expand(2, -1) % 5 != 2
    valid = valid & (torch.arange(count) < torch.tensor([[count], [count // 2]]))
    return anchors, boxes, valid


def torchvision_matches(anchors, boxes, valid, *, high, low, allow_low_quality):
    """torchvision's matcher on the real boxes of one image, its indices mapped back."""
    rows = valid.nonzero()[:, 0]
    quality = box_iou(boxes[rows], anchors)  # [real, A]
    matches = Matcher(high, low, allow_low_quality)(quality)
    return torch.where(matches >= 0, rows[matches.clamp(min=0)], matches), quality.max(0).values


def matrix_matches(anchors, boxes, valid, crowd, *, high, low, allow_low_quality):
    """The rules on one image by the matrix of all IoUs [G, A]."""
    area, areas = ((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (anchors, boxes))
    sides = torch.minimum(boxes[:, None, 2:], anchors[:, 2:]) - torch.maximum(boxes[:, None, :2], anchors[:, :2])
    inter = sides.clamp(min=0).prod(2)
    iou = inter / (areas[:, None] + area - inter)
    iou = torch.where(valid[:, None] & (iou > 0), iou, 0.0)
    best, index = iou.max(0)
    positive = (best >= high) & (best > 0)
    if allow_low_quality:
        positive |= ((iou == iou.amax(1, keepdim=True)) & (iou > 0)).any(0)
    background = (best < low) | ~valid.any()
    background &= ~(crowd[:, None] & (inter > 0.7 * area) & (inter > 0)).any(0)
    return torch.where(positive, index, torch.where(background, -1, -2)), best


def check(function, device, settings) -> None:
    anchors, boxes, valid = scene()
    inputs = [guarded(t.to(device)) for t in (anchors, boxes, valid)]
    with poisoned_empty():
        matches, ious = function(*inputs, **settings)
    assert (matches.dtype, ious.dtype) == (torch.int64, torch.float32)
    assert matches.shape == ious.shape == (2, len(anchors))
    for n in range(2):
        expected, expected_ious = torchvision_matches(anchors, boxes[n], valid[n], **settings)
        assert torch.equal(matches[n].cpu(), expected)
        assert torch.equal(ious[n].cpu(), expected_ious)
        assert len(expected.clamp(min=-1).unique()) > 2
    assert (matches == -2).any() == (settings["low"] < settings["high"])


@pytest.mark.parametrize("allow_low_quality", [False, True], ids=["plain", "low quality"])
@pytest.mark.parametrize("limits", [(0.7, 0.3), (0.5, 0.5), (0.6, 0.05)], ids=["rpn", "head", "wide"])
def test_equals_torchvision(device, backend, limits, allow_low_quality):
    high, low = limits
    check(
        functools.partial(match_anchors, backend=backend),
        device,
        {"high": high, "low": low, "allow_low_quality": allow_low_quality},
    )


def odd_scene(count: int, boxes: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Anchors [2, count, 4], boxes [2, boxes, 4], valid, crowd [2, boxes]: small whole coordinates, so that overlaps
    are often equal, and odd ones among them: inverted, infinite, NaN, subnormal, huge."""
    generator = torch.Generator().manual_seed(seed)
    odd = torch.tensor([INF, -INF, NAN, -0.0, 1e-40, 3e-23, 1e25, -3e38])

    def draw(*shape: int) -> Tensor:
        corner = torch.randint(0, 9, (*shape, 2), generator=generator)
        made = torch.cat([corner, corner + torch.randint(-1, 7, (*shape, 2), generator=generator)], -1).float()
        strange = odd[torch.randint(len(odd), made.shape, generator=generator)]
        return torch.where(torch.rand(made.shape, generator=generator) < 0.03, strange, made)

    kind = torch.rand(2, boxes, generator=generator)
    return draw(2, count), draw(2, boxes), kind < 0.6, kind > 0.8


def check_matrix(function, device, scene, settings) -> None:
    inputs = [guarded(t.to(device)) for t in scene]
    with poisoned_empty():
        matches, ious = function(*inputs[:3], gt_crowd=inputs[3], **settings)
    for n, one_image in enumerate(zip(*scene, strict=True)):
        expected, expected_ious = matrix_matches(*one_image, **settings)
        assert torch.equal(matches[n].cpu(), expected)
        assert torch.equal(ious[n].cpu().view(torch.int32), expected_ious.view(torch.int32))
        assert len(expected.unique()) > 6


ODD_RPN = {"high": 0.7, "low": 0.5, "allow_low_quality": True}


@pytest.mark.parametrize("seed", [0, 1])
def test_odd_boxes_equal_the_matrix(device, backend, seed):
    """Two blocks of anchors and two words of boxes, neither of them full."""
    check_matrix(functools.partial(match_anchors, backend=backend), device, odd_scene(70, 40, seed), ODD_RPN)


@pytest.mark.parametrize("settings", [ODD_RPN, HEAD, WIDE], ids=["rpn", "head", "wide"])
def test_many_odd_boxes_equal_the_matrix(device, settings):
    backend = "reference" if device.type == "cpu" else "triton"
    check_matrix(functools.partial(match_anchors, backend=backend), device, odd_scene(5000, 90), settings)


whole_boxes = st.lists(st.tuples(*[st.integers(0, 6)] * 4), min_size=1, max_size=5)


@hypothesis_settings(max_examples=20, deadline=None)
@given(anchors=whole_boxes, boxes=whole_boxes, kinds=st.lists(st.integers(0, 2), min_size=5, max_size=5),
       limits=st.tuples(*[st.sampled_from([0.0, 0.25, 0.5, 1.0])] * 2), low_quality=st.booleans())  # fmt: skip
def test_any_boxes_equal_the_matrix(device, anchors, boxes, kinds, limits, low_quality):
    kind = torch.tensor(kinds[: len(boxes)])
    one_image = torch.tensor(anchors).float(), torch.tensor(boxes).float(), kind == 0, kind == 1
    rule = {"high": max(limits), "low": min(limits), "allow_low_quality": low_quality}
    expected = matrix_matches(*one_image, **rule)
    batch = [t[None].to(device) for t in one_image]
    for backend in ("reference", "triton"):
        matches, ious = match_anchors(*batch[:3], gt_crowd=batch[3], **rule, backend=backend)
        assert torch.equal(matches[0].cpu(), expected[0])
        assert torch.equal(ious[0].cpu(), expected[1])
    flipped, _ = match_anchors(batch[0].flip(1), *batch[1:3], gt_crowd=batch[3], **rule, backend="triton")
    assert torch.equal(flipped[0].flip(0).cpu(), expected[0]), "the order of the anchors matters"


@pytest.mark.parametrize("elements", [1, 1000, 2500, 10**7])
def test_chunks_do_not_matter(device, monkeypatch, elements):
    monkeypatch.setattr(reference, "_CHUNK_CPU", elements)
    monkeypatch.setattr(reference, "_CHUNK_GPU", elements)
    check(functools.partial(match_anchors, backend="reference"), device, RPN)


def test_anchors_of_each_image(device, backend):
    anchors, boxes, valid = (t.to(device) for t in scene())
    anchors = anchors[250:]
    both = torch.stack([anchors, anchors.flip(0)])
    matches, ious = match_anchors(both, boxes, valid, **RPN, backend=backend)
    for n in range(2):
        alone = match_anchors(both[n], boxes[n : n + 1], valid[n : n + 1], **RPN, backend=backend)
        assert torch.equal(matches[n], alone[0][0])
        assert torch.equal(ious[n], alone[1][0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes_and_strides(device, backend, dtype):
    """Boxes are taken in float32, wherever they lie."""
    anchors, boxes, valid = (t.to(device) for t in scene())
    anchors, boxes = anchors[350:].to(dtype), boxes.to(dtype)
    expected = match_anchors(anchors.float(), boxes.float(), valid, **RPN, backend="reference")
    strided = anchors.t().contiguous().t(), boxes.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    matches, ious = match_anchors(*strided, valid.t().contiguous().t(), **RPN, backend=backend)
    assert torch.equal(matches, expected[0])
    assert torch.equal(ious, expected[1])


@pytest.mark.parametrize("count", [0, 3], ids=["G0", "padding"])
def test_without_ground_truth_all_is_background(device, backend, count):
    anchors = scene()[0][:150].to(device)
    boxes = torch.tensor([0.0, 0.0, 100.0, 100.0], device=device).expand(2, count, 4)
    valid = torch.zeros(2, count, dtype=torch.bool, device=device)
    for settings in (RPN, HEAD, {"high": 0.5, "low": 0.0, "allow_low_quality": True}):
        matches, ious = match_anchors(anchors, boxes, valid, **settings, backend=backend)
        assert (matches == -1).all()
        assert not ious.any()


def test_no_anchors_and_no_images(device, backend):
    anchors, boxes, valid = (t.to(device) for t in scene())
    matches, ious = match_anchors(torch.empty(0, 4, device=device), boxes, valid, **RPN, backend=backend)
    assert matches.shape == ious.shape == (2, 0)
    matches, ious = match_anchors(anchors, boxes[:0], valid[:0], **RPN, backend=backend)
    assert matches.shape == ious.shape == (0, len(anchors))


UNIT = [0.0, 0.0, 10.0, 10.0]


def one(device, backend, anchors, boxes, crowd=None, **settings):
    boxes = torch.tensor([boxes], device=device)
    valid = torch.ones(boxes.shape[:2], dtype=torch.bool, device=device)
    if crowd is not None:
        crowd = torch.tensor([crowd], device=device)
        valid = ~crowd
    anchors = torch.tensor(anchors, device=device)
    matches, ious = match_anchors(anchors, boxes, valid, gt_crowd=crowd, backend=backend, **settings)
    return matches[0].tolist(), ious[0].tolist()


def test_low_quality_keeps_the_anchors_own_ground_truth(device, backend):
    """The second box gets its best IoU from the first anchor, which itself overlaps the first box more."""
    matches, _ = one(device, backend, [UNIT, [50.0, 50.0, 60.0, 60.0]], [UNIT, [0.0, 6.0, 10.0, 16.0]], **RPN)
    assert matches == [0, -1]


def test_low_quality_takes_every_anchor_that_ties(device, backend):
    anchors = [[0.0, 0.0, 10.0, 2.0], [0.0, 8.0, 10.0, 10.0], [0.0, 4.0, 10.0, 5.0]]
    matches, ious = one(device, backend, anchors, [UNIT], **RPN)
    assert matches == [0, 0, -1]
    assert ious[0] == ious[1] > ious[2]


def test_a_best_of_zero_never_matches(device, backend):
    """torchvision lets a ground truth that no anchor overlaps take all anchors of IoU 0."""
    far, between = [500.0, 500.0, 510.0, 510.0], [100.0, 100.0, 110.0, 110.0]
    assert one(device, backend, [UNIT, UNIT], [far], **RPN)[0] == [-1, -1]
    assert one(device, backend, [UNIT, far], [between], **RPN)[0] == [-1, -1]
    assert one(device, backend, [UNIT], [far], high=0.0, low=0.0, allow_low_quality=True)[0] == [-2]


def test_bounds_are_inclusive_and_lowest_index_wins(device, backend):
    half = [0.0, 0.0, 10.0, 5.0]
    assert one(device, backend, [half], [UNIT, UNIT], high=0.5, low=0.3, allow_low_quality=False) == ([0], [0.5])
    assert one(device, backend, [half], [UNIT], high=0.6, low=0.5, allow_low_quality=False)[0] == [-2]
    assert one(device, backend, [half], [UNIT], high=0.6, low=0.51, allow_low_quality=False)[0] == [-1]
    # Limits are rounded to float32, as IoUs are: 7 / 10 reaches 0.7, which float32 has not.
    assert one(device, backend, [[0.0, 0.0, 10.0, 7.0]], [UNIT], high=0.7, low=0.3, allow_low_quality=False)[0] == [0]


POINT = [5.0, 5.0, 5.0, 5.0]


@pytest.mark.parametrize(
    "bad",
    [POINT, [NAN] * 4, [10.0, 10.0, 0.0, 0.0], [10.0, 0.0, 0.0, 10.0], [-INF, -INF, INF, INF]],
    ids=["point", "NaN", "inverted", "inverted on one axis", "infinite"],
)
def test_degenerate_anchors_are_background(device, backend, bad):
    """A proposal of zeros beside a ground truth of zeros gives 0 / 0, which is 0 here."""
    matches, ious = one(device, backend, [bad, UNIT], [UNIT, POINT], **HEAD)
    assert matches == [-1, 0]
    assert ious == [0, 1]
    # The NaN of one pair must not hide the overlap of another.
    matches, ious = one(device, backend, [bad, UNIT], [bad, UNIT, bad], **RPN)
    assert matches == [-1, 1]
    assert ious == [0, 1]
    if bad[0] == -INF:
        return  # as a crowd it covers everything
    # Nor does a crowd, wherever it is, make one ignored.
    for crowd in ([-50.0, -50.0, 50.0, 50.0], [200.0, 200.0, 300.0, 300.0], bad):
        matches, ious = one(device, backend, [bad, UNIT], [crowd, UNIT], crowd=[True, False], **HEAD)
        assert matches == [-1, 1]
        assert ious == [0, 1]


def test_crowds(device, backend):
    crowd = [0.0, 0.0, 100.0, 100.0]
    inside, out = [10.0, 10.0, 30.0, 20.0], [200.0, 0.0, 220.0, 10.0]
    at, above = [93.0, 0.0, 103.0, 10.0], [92.9, 0.0, 102.9, 10.0]
    anchors, boxes = [inside, out, at, above, UNIT], [crowd, UNIT, crowd]
    matches, ious = one(device, backend, anchors, boxes, crowd=[True, False, True], **HEAD)
    assert matches == [-2, -1, -1, -2, 1], "inside, outside, 0.7 of the area, a little more, matched"
    assert ious[0] == 0
    assert one(device, backend, anchors, boxes, crowd=[False, False, False], **HEAD)[0] == [-1, -1, -1, -1, 1]


def test_crowds_do_not_add_up(device, backend):
    """Two crowds cover half of the anchor each."""
    halves = [[0.0, 0.0, 5.0, 10.0], [5.0, 0.0, 10.0, 10.0]]
    assert one(device, backend, [UNIT], halves, crowd=[True, True], **HEAD)[0] == [-1]


# Memory


class PeakBytes(TorchDispatchMode):
    """The most bytes that were alive at one time of all that was allocated inside."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in pytree.tree_leaves(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage not in self.seen:
                self.seen.add(storage)
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self.free, storage.nbytes())
        return out

    def free(self, size: int) -> None:
        self.alive -= size


def test_memory_of_the_reference_does_not_grow_with_anchors_times_boxes():
    """On a CPU; on a GPU its chunks are larger, and of a size of their own too."""

    def peak(count: int) -> int:
        anchors, boxes = torch.rand(20_000, 4), torch.rand(2, count, 4)
        valid = torch.ones(2, count, dtype=torch.bool)
        with PeakBytes() as bytes_alive:
            match_anchors(anchors, boxes, valid, gt_crowd=~valid, **RPN, backend="reference")
        return bytes_alive.peak

    few, many = peak(50), peak(150)
    assert few > 2 * 20_000 * 12, "the results alone"
    assert many < 1.1 * few < 2 * 20_000 * 150


def test_memory_of_the_kernels_is_the_results_and_a_number_for_each_box(device):
    """At full size: 12 bytes an anchor and image, 4 a box."""
    case = CASES["match-anchors"]
    assert isinstance(case, MatchCase)
    anchors = torch.empty(1, case.rpn.anchors, 4, device=device)
    boxes = torch.empty(case.images, case.gt, 4, device=device)
    valid = torch.empty(case.images, case.gt, dtype=torch.bool, device=device)
    launch = mock.MagicMock()  # indexed by a grid and called
    with mock.patch.multiple(kernels, _match_kernel=launch, _best_of_gt_kernel=launch), PeakBytes() as bytes_alive:
        kernels.match_anchors_fwd(anchors, boxes, valid, valid, 0.7, 0.3, True)
    assert launch.__getitem__.call_count == 2
    assert bytes_alive.peak == case.images * (12 * case.rpn.anchors + 4 * case.gt)


# Mutants: each must turn the battery red


def battery(function, device) -> None:
    def call(*inputs, gt_crowd=None, backend=None, **kwargs):
        with poisoned_empty():  # what a mutant writes outside its output harms nothing else
            crowd = None if gt_crowd is None else guarded(gt_crowd)
            return function(*(guarded(t.contiguous()) for t in inputs), gt_crowd=crowd, **kwargs)

    with mock.patch(f"{__name__}.match_anchors", call):
        test_bounds_are_inclusive_and_lowest_index_wins(device, None)
        test_a_best_of_zero_never_matches(device, None)
        test_without_ground_truth_all_is_background(device, None, 3)
        for bad in ([NAN] * 4, [10.0, 0.0, 0.0, 10.0]):
            test_degenerate_anchors_are_background(device, None, bad)
        test_crowds(device, None)
    check_matrix(function, device, odd_scene(70, 40), ODD_RPN)
    check(function, device, RPN)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("better = value > best", "better = value >= best"),
        ("index + rows.start", "index"),
        ("(best >= high)", "(best > high)"),
        ("(best < low)", "(best <= low)"),
        ("== wanted[:, rows, None]", ">= wanted[:, rows, None] * 0.9"),
        ("torch.where(best_of_gt > 0, best_of_gt, 2.0)", "best_of_gt"),
        ("real = torch.where(gt_valid[..., None], gt_boxes, 0.0)", "real = gt_boxes"),
        ("if allow_low_quality:", "if True:"),
        ("(x2 - x1) * (y2 - y1) + area", "(x2 - x1) * (x2 - x1) + area"),
        ("height = torch.minimum(ay2, y2)", "height = torch.minimum(ay2, x2)"),
        (".nan_to_num_(nan=0.0)", ""),
        ("CROWD_COVER = 0.7", "CROWD_COVER = 0.71"),
        ("background &= ~_inside_crowd", "background |= _inside_crowd"),
        ("| ~gt_valid.any(dim=1, keepdim=True)", ""),
    ],
    ids=["tie", "chunk", "high", "low", "equality", "best of 0", "valid", "low quality", "area", "axes", "NaN",
         "cover", "crowd", "no ground truth"],
)  # fmt: skip
def test_a_broken_reference_fails(tmp_path: Path, monkeypatch, old, new):
    broken = mutant(reference, old, new, tmp_path)
    broken._CHUNK_CPU = 2500
    monkeypatch.setattr(op, "match_anchors_reference", broken.match_anchors_reference)
    with pytest.raises(AssertionError):
        battery(functools.partial(match_anchors, backend="reference"), torch.device("cpu"))


MUTANTS = {
    "last of equals": ("better = iou > best", "better = iou >= best"),
    "place in the word": ("better, start + place, index", "better, place, index"),
    "one box of a word": ("better = iou > best", "better, bits = iou > best, bits * 0"),
    "second word left out": ("start += 32\n\n    positive", "start += 64\n\n    positive"),
    "second word left out of the best": ('relaxed")\n        start += 32', 'relaxed")\n        start += 64'),
    "high": ("best >= high", "best > high"),
    "low": ("best < low", "best <= low"),
    "near the best": ("(iou == tl.load(best_of_gt_ptr + first + place))", "(iou > 0.5)"),
    "best of 0": ("+ place)) & (iou > 0)", "+ place))"),
    "worst of a ground truth": ("tl.max(iou.to", "tl.min(iou.to"),
    "best of the last block": ("tl.atomic_max(", "tl.atomic_xchg("),
    "padding counts": ("_to_bits(reaches & valid)", "_to_bits(reaches)"),
    "area": ("union = area + (x2 - x1) * (y2 - y1)", "union = area + (x2 - x1) * (x2 - x1)"),
    "axes": ("tl.minimum(y2, by2)", "tl.minimum(y2, bx2)"),
    "bounds of the left": ("tl.min(x1, 0)", "tl.max(x1, 0)"),
    "bounds of the bottom": ("tl.max(y2, 0)", "tl.min(y2, 0)"),
    "cover": ("* _CROWD_COVER", "* 0.71"),
    "negative areas are covered": ("* _CROWD_COVER) & (inter > 0)", "* _CROWD_COVER)"),
    "no crowd": (" & (covered == 0)", ""),
    "no ground truth": ("(best < low) | (tl.max(any_valid, 0) == 0)", "(best < low)"),
    "one anchor too many": ("mask = rows < A", "mask = rows <= A"),
    "block left out": ("tl.cdiv(A, BLOCK) - 1", "tl.cdiv(A, BLOCK) - 2"),
    "another image": ("n * A + anchors, match", "anchors, match"),
    "anchors of the first image": ("n * anchors_an_image + rows", "rows"),
}
QUICK = {"last of equals", "high", "best of 0", "bounds of the left", "cover", "no ground truth"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in MUTANTS]
)
def test_a_broken_kernel_fails(tmp_path: Path, device, name):
    broken = mutant(kernels, *MUTANTS[name], tmp_path)

    def run(anchors, boxes, valid, *, gt_crowd=None, high, low, allow_low_quality):
        anchors = anchors[None] if anchors.ndim == 2 else anchors
        return broken.match_anchors(anchors, boxes, valid, gt_crowd, high, low, allow_low_quality)

    with pytest.raises(AssertionError):
        battery(run, device)


# Tracing and errors


def test_opcheck_compile_and_no_waiting(device, backend):
    anchors, boxes, valid = (t.to(device) for t in scene())
    anchors = anchors[400:]
    traced = kernels.match_anchors if backend == "triton" else op._match_anchors_traced
    torch.library.opcheck(traced, (anchors[None], boxes, valid, ~valid, 0.7, 0.3, True))
    for crowd in (None, ~valid):

        def whole(anchors, boxes, valid, crowd=crowd):
            return match_anchors(anchors * 1.0, boxes, valid, gt_crowd=crowd, **RPN, backend=backend)

        with count_blocking() as found:
            expected = whole(anchors, boxes, valid)
        assert not found
        got = torch.compile(whole, fullgraph=True, backend="aot_eager")(anchors, boxes, valid)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
