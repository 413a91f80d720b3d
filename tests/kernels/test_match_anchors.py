"""match_anchors against torchvision's Matcher, the A x G matrix, hand-made answers; its edges, memory and mutants."""

import functools
from unittest import mock

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from bench.cases.match_anchors import CASES
from tests.allocations import peak_allocated
from tests.kernels.tools import INF, NAN, UNIT, each_mutant
from tests.mutation import mutant
from tmask_kernels import AnchorSpec, make_anchors, match_anchors
from tmask_kernels.ops.match_anchors import kernels, op, reference
from tmask_kernels.testing import guarded, poisoned_empty, random_boxes

RPN = {"high": 0.7, "low": 0.3, "allow_low_quality": True}
HEAD = {"high": 0.5, "low": 0.5, "allow_low_quality": False}
WIDE = {"high": 0.6, "low": 0.05, "allow_low_quality": False}


def scene(count: int = 12, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
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
    settings = {"high": limits[0], "low": limits[1], "allow_low_quality": allow_low_quality}
    check(functools.partial(match_anchors, backend=backend), device, settings)


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


@pytest.mark.parametrize("elements", [1, 1000, 2500, 10**7])
def test_chunks_do_not_matter(device, monkeypatch, elements):
    monkeypatch.setattr(reference, "_CHUNK_CPU", elements)
    monkeypatch.setattr(reference, "_CHUNK_GPU", elements)
    check(functools.partial(match_anchors, backend="reference"), device, RPN)


@pytest.mark.parametrize("count", [0, 3], ids=["G0", "padding"])
def test_without_ground_truth_all_is_background(device, backend, count):
    anchors = scene()[0][:150].to(device)
    boxes = torch.tensor([0.0, 0.0, 100.0, 100.0], device=device).expand(2, count, 4)
    valid = torch.zeros(2, count, dtype=torch.bool, device=device)
    for settings in (RPN, HEAD, {"high": 0.5, "low": 0.0, "allow_low_quality": True}):
        matches, ious = match_anchors(anchors, boxes, valid, **settings, backend=backend)
        assert (matches == -1).all()
        assert not ious.any()


POINT = [5.0, 5.0, 5.0, 5.0]
FAR, BETWEEN, LOWER = [500.0, 500.0, 510.0, 510.0], [100.0, 100.0, 110.0, 110.0], [0.0, 6.0, 10.0, 16.0]
HALF, LONG = [0.0, 0.0, 10.0, 5.0], [0.0, 0.0, 10.0, 7.0]
STRIPES = [[0.0, 0.0, 10.0, 2.0], [0.0, 8.0, 10.0, 10.0], [0.0, 4.0, 10.0, 5.0]]
# Anchors inside a crowd, outside, of 0.7 of their area inside, of a little more, and one with a box of its own.
CROWDED = [[10.0, 10.0, 30.0, 20.0], [200.0, 0.0, 220.0, 10.0], [93.0, 0.0, 103.0, 10.0], [92.9, 0.0, 102.9, 10.0]]
CROWD = [[0.0, 0.0, 100.0, 100.0], UNIT, [0.0, 0.0, 100.0, 100.0]]
HALVES = [[0.0, 0.0, 5.0, 10.0], [5.0, 0.0, 10.0, 10.0]]
BAD = {
    "point": POINT,
    "NaN": [NAN] * 4,
    "inverted": [10.0, 10.0, 0.0, 0.0],
    "inverted on one axis": [10.0, 0.0, 0.0, 10.0],
    "infinite": [-INF, -INF, INF, INF],
}


def rule(high, low, allow_low_quality=False):
    return {"high": high, "low": low, "allow_low_quality": allow_low_quality}


# Anchors, boxes, which of them are crowds (None: no such argument), the rule, matches, and IoUs where they matter.
EDGES = {
    # The second box gets its best IoU from the first anchor, which itself overlaps the first box more.
    "low quality keeps the anchor's own": ([UNIT, FAR], [UNIT, LOWER], None, RPN, [0, -1]),
    "low quality takes every tie": (STRIPES, [UNIT], None, RPN, [0, 0, -1], [0.2, 0.2, 0.1]),
    # torchvision lets a ground truth that no anchor overlaps take all anchors of IoU 0.
    "a best of 0 never matches": ([UNIT, UNIT], [FAR], None, RPN, [-1, -1]),
    "a best of 0 between": ([UNIT, FAR], [BETWEEN], None, RPN, [-1, -1]),
    "a best of 0 with a limit of 0": ([UNIT], [FAR], None, rule(0.0, 0.0, True), [-2]),
    "high is inclusive, the first wins": ([HALF], [UNIT, UNIT], None, rule(0.5, 0.3), [0], [0.5]),
    "low is inclusive": ([HALF], [UNIT], None, rule(0.6, 0.5), [-2]),
    "below low": ([HALF], [UNIT], None, rule(0.6, 0.51), [-1]),
    # Limits are rounded to float32, as IoUs are: 7 / 10 reaches 0.7, which float32 has not.
    "limits in float32": ([LONG], [UNIT], None, rule(0.7, 0.3), [0]),
    "crowds": ([*CROWDED, UNIT], CROWD, [True, False, True], HEAD, [-2, -1, -1, -2, 1]),
    "no crowds": ([*CROWDED, UNIT], CROWD, [False] * 3, HEAD, [-1, -1, -1, -1, 1]),
    "two crowds do not add up": ([UNIT], HALVES, [True, True], HEAD, [-1]),
    **{
        # A proposal of zeros beside a ground truth of zeros is 0 / 0, and no NaN hides the overlap of another pair.
        f"{name} anchor": ([bad, UNIT], [UNIT, POINT], None, HEAD, [-1, 0], [0, 1])
        for name, bad in BAD.items()
    },
    **{f"{name} box": ([bad, UNIT], [bad, UNIT, bad], None, RPN, [-1, 1], [0, 1]) for name, bad in BAD.items()},
    **{
        f"{name} anchor, {where} crowd": ([bad, UNIT], [crowd, UNIT], [True, False], HEAD, [-1, 1], [0, 1])
        for name, bad in BAD.items()
        if name != "infinite"  # as a crowd it covers everything
        for where, crowd in (("near", [-50.0, -50.0, 50.0, 50.0]), ("far", [200.0, 200.0, 300.0, 300.0]), ("bad", bad))
    },
}


@pytest.mark.parametrize("name", EDGES)
def test_edges(device, backend, name):
    anchors, boxes, crowd, settings, expected, *expected_ious = EDGES[name]
    boxes = torch.tensor([boxes], device=device)
    valid = torch.ones(boxes.shape[:2], dtype=torch.bool, device=device)
    crowd = None if crowd is None else torch.tensor([crowd], device=device)
    valid = valid if crowd is None else ~crowd
    anchors = torch.tensor(anchors, device=device)
    matches, ious = match_anchors(anchors, boxes, valid, gt_crowd=crowd, backend=backend, **settings)
    assert matches[0].tolist() == expected
    assert not expected_ious or ious[0].tolist() == torch.tensor(expected_ious[0]).tolist()


def test_memory_of_the_reference_does_not_grow_with_anchors_times_boxes():
    """On a CPU; on a GPU its chunks are larger, and of a size of their own too."""

    def peak(count: int) -> int:
        anchors, boxes = torch.rand(20_000, 4), torch.rand(2, count, 4)
        valid = torch.ones(2, count, dtype=torch.bool)
        with peak_allocated() as found:
            match_anchors(anchors, boxes, valid, gt_crowd=~valid, **RPN, backend="reference")
        return found.bytes

    few, many = peak(50), peak(150)
    assert few > 2 * 20_000 * 12, "the results alone"
    assert many < 1.1 * few < 2 * 20_000 * 150


def test_memory_of_the_kernels():
    """At full size: 16 bytes an anchor and image, 4 a box, and 4 a box for every 64 anchors."""
    case = CASES["match-anchors"]
    anchors = torch.empty(1, case.rpn.anchors, 4)
    boxes = torch.empty(case.images, case.gt, 4)
    valid = torch.empty(case.images, case.gt, dtype=torch.bool)
    launch = mock.MagicMock()  # indexed by a grid and called
    with mock.patch.multiple(kernels, _match_kernel=launch, _lift_kernel=launch), peak_allocated() as peak:
        kernels.match_anchors_fwd(anchors, boxes, valid, valid, 0.7, 0.3, True)
    assert launch.__getitem__.call_count == 2
    assert peak.bytes == case.images * (16 * case.rpn.anchors + 4 * case.gt * (1 + -(-case.rpn.anchors // 64)))


def battery(function, device) -> None:
    def call(*inputs, gt_crowd=None, backend=None, **kwargs):
        with poisoned_empty():  # what a mutant writes outside its output harms nothing else
            crowd = None if gt_crowd is None else guarded(gt_crowd)
            return function(*(guarded(t.contiguous()) for t in inputs), gt_crowd=crowd, **kwargs)

    with mock.patch(f"{__name__}.match_anchors", call):
        test_without_ground_truth_all_is_background(device, None, 3)
        for name in EDGES:
            test_edges(device, None, name)
    check_matrix(function, device, odd_scene(70, 40), ODD_RPN)
    check(function, device, RPN)


REFERENCE_MUTANTS = {
    "tie": ("better = value > best", "better = value >= best"),
    "chunk": ("index + rows.start", "index"),
    "high": ("(best >= high)", "(best > high)"),
    "low": ("(best < low)", "(best <= low)"),
    "equality": ("== wanted[:, rows, None]", ">= wanted[:, rows, None] * 0.9"),
    "best of 0": ("torch.where(best_of_gt > 0, best_of_gt, 2.0)", "best_of_gt"),
    "valid": ("real = torch.where(gt_valid[..., None], gt_boxes, 0.0)", "real = gt_boxes"),
    "low quality": ("if allow_low_quality:", "if True:"),
    "area": ("(x2 - x1) * (y2 - y1) + area", "(x2 - x1) * (x2 - x1) + area"),
    "axes": ("height = torch.minimum(ay2, y2)", "height = torch.minimum(ay2, x2)"),
    "NaN": (".nan_to_num_(nan=0.0)", ""),
    "cover": ("CROWD_COVER = 0.7", "CROWD_COVER = 0.71"),
    "crowd": ("background &= ~_inside_crowd", "background |= _inside_crowd"),
    "no ground truth": ("| ~gt_valid.any(dim=1, keepdim=True)", ""),
}


@each_mutant(REFERENCE_MUTANTS)
def test_a_broken_reference_fails(tmp_path, monkeypatch, name):
    broken = mutant(reference, *REFERENCE_MUTANTS[name], tmp_path)
    broken._CHUNK_CPU = 2500
    monkeypatch.setattr(op, "match_anchors_reference", broken.match_anchors_reference)
    with pytest.raises(AssertionError):
        battery(functools.partial(match_anchors, backend="reference"), torch.device("cpu"))


MUTANTS = {
    "last of equals": ("better = iou > best", "better = iou >= best"),
    "place in the word": ("better, start + place, index", "better, place, index"),
    "one box of a word": ("better = iou > best", "better, bits = iou > best, bits * 0"),
    "second word left out": ("start += 32\n\n    background", "start += 64\n\n    background"),
    "second word left out of the rule": ("mask=lifted)\n        start += 32", "mask=lifted)\n        start += 64"),
    "high": ("best >= high", "best > high"),
    "low": ("best < low", "best <= low"),
    "near the best": ("lifted = iou == tl.load(best_ptr + first + place)", "lifted = iou > 0x3F000000"),
    "best of 0": ("(here == best) & (here > 0)", "(here == best)"),
    "the rule gives the first": ("index_ptr + at, mask=lifted", "index_ptr + at * 0, mask=lifted"),
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


@each_mutant(MUTANTS, QUICK)
def test_a_broken_kernel_fails(tmp_path, device, name):
    broken = mutant(kernels, *MUTANTS[name], tmp_path)

    def run(anchors, boxes, valid, *, gt_crowd=None, high, low, allow_low_quality):
        anchors = anchors[None] if anchors.ndim == 2 else anchors
        return broken.match_anchors(anchors, boxes, valid, gt_crowd, high, low, allow_low_quality)

    with pytest.raises(AssertionError):
        battery(run, device)
