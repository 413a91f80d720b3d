"""match_anchors against torchvision's Matcher, and the rules that are ours."""

from pathlib import Path

import pytest
import torch
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from tests.model.sync import count_blocking
from tests.mutation import mutant
from tmask_kernels import AnchorSpec, make_anchors, match_anchors
from tmask_kernels.ops.matcher import op, reference
from tmask_kernels.testing import random_boxes

RPN = {"high": 0.7, "low": 0.3, "allow_low_quality": True}
HEAD = {"high": 0.5, "low": 0.5, "allow_low_quality": False}
NAN = float("nan")


def scene(count: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A grid of anchors [A, 4], boxes [2, count, 4] of which some repeat, and which are real [2, count]."""
    anchors = make_anchors(AnchorSpec(((16.0,), (48.0,)), (0.5, 1.0, 2.0)), [(16, 20), (5, 6)], (128, 160))
    boxes = torch.stack([random_boxes(count, height=128, width=160, min_size=6, seed=seed + i) for i in range(2)])
    generator = torch.Generator().manual_seed(seed)
    near = torch.randint(len(anchors), (2, count // 2), generator=generator)
    boxes[:, ::2] = anchors[near] + torch.randn(2, count // 2, 4, generator=generator)
    boxes[:, 3] = boxes[:, 1]
    boxes[:, 4] = anchors[400]
    valid = torch.arange(count).expand(2, -1) % 5 != 2
    valid = valid & (torch.arange(count) < torch.tensor([[count], [count // 2]]))
    return anchors, boxes, valid


def expected_matches(anchors, boxes, valid, *, high, low, allow_low_quality):
    """torchvision's matcher on the real boxes of one image, its indices mapped back."""
    rows = valid.nonzero()[:, 0]
    quality = box_iou(boxes[rows], anchors)  # [real, A]
    matches = Matcher(high, low, allow_low_quality)(quality)
    return torch.where(matches >= 0, rows[matches.clamp(min=0)], matches), quality.max(0).values


def check(function, device, settings) -> None:
    anchors, boxes, valid = scene()
    matches, ious = function(anchors.to(device), boxes.to(device), valid.to(device), **settings)
    assert (matches.dtype, ious.dtype) == (torch.int64, torch.float32)
    assert matches.shape == ious.shape == (2, len(anchors))
    for n in range(2):
        expected, expected_ious = expected_matches(anchors, boxes[n], valid[n], **settings)
        assert torch.equal(matches[n].cpu(), expected)
        assert torch.equal(ious[n].cpu(), expected_ious)
        assert len(expected.clamp(min=-1).unique()) > 2
    assert (matches == -2).any() == (settings["low"] < settings["high"])


@pytest.mark.parametrize("allow_low_quality", [False, True], ids=["plain", "low quality"])
@pytest.mark.parametrize("limits", [(0.7, 0.3), (0.5, 0.5), (0.6, 0.05)], ids=["rpn", "head", "wide"])
def test_equals_torchvision(device, limits, allow_low_quality):
    high, low = limits
    check(match_anchors, device, {"high": high, "low": low, "allow_low_quality": allow_low_quality})


@pytest.mark.parametrize("elements", [1, 1000, 2500, 10**7])
def test_chunks_do_not_matter(device, monkeypatch, elements):
    monkeypatch.setattr(reference, "_CHUNK_CPU", elements)
    monkeypatch.setattr(reference, "_CHUNK_GPU", elements)
    check(match_anchors, device, RPN)


def test_anchors_of_each_image(device):
    anchors, boxes, valid = (t.to(device) for t in scene())
    both = torch.stack([anchors, anchors.flip(0)])
    matches, ious = match_anchors(both, boxes, valid, **RPN)
    for n in range(2):
        alone = match_anchors(both[n], boxes[n : n + 1], valid[n : n + 1], **RPN)
        assert torch.equal(matches[n], alone[0][0])
        assert torch.equal(ious[n], alone[1][0])


@pytest.mark.parametrize("count", [0, 3], ids=["G0", "padding"])
def test_without_ground_truth_all_is_background(device, count):
    anchors = scene()[0].to(device)
    boxes = torch.tensor([0.0, 0.0, 100.0, 100.0], device=device).expand(2, count, 4)
    valid = torch.zeros(2, count, dtype=torch.bool, device=device)
    for settings in (RPN, HEAD, {"high": 0.5, "low": 0.0, "allow_low_quality": True}):
        matches, ious = match_anchors(anchors, boxes, valid, **settings)
        assert (matches == -1).all()
        assert not ious.any()


def test_no_anchors(device):
    _, boxes, valid = (t.to(device) for t in scene())
    matches, ious = match_anchors(torch.empty(0, 4, device=device), boxes, valid, **RPN)
    assert matches.shape == ious.shape == (2, 0)


UNIT = [0.0, 0.0, 10.0, 10.0]


def one(device, anchors, boxes, crowd=None, **settings):
    boxes = torch.tensor([boxes], device=device)
    valid = torch.ones(boxes.shape[:2], dtype=torch.bool, device=device)
    if crowd is not None:
        crowd = torch.tensor([crowd], device=device)
        valid = ~crowd
    matches, ious = match_anchors(torch.tensor(anchors, device=device), boxes, valid, gt_crowd=crowd, **settings)
    return matches[0].tolist(), ious[0].tolist()


def test_low_quality_keeps_the_anchors_own_ground_truth(device):
    """The second box gets its best IoU from the first anchor, which itself overlaps the first box more."""
    matches, _ = one(device, [UNIT, [50.0, 50.0, 60.0, 60.0]], [UNIT, [0.0, 6.0, 10.0, 16.0]], **RPN)
    assert matches == [0, -1]


def test_low_quality_takes_every_anchor_that_ties(device):
    matches, ious = one(device, [[0.0, 0.0, 10.0, 2.0], [0.0, 8.0, 10.0, 10.0], [0.0, 4.0, 10.0, 5.0]], [UNIT], **RPN)
    assert matches == [0, 0, -1]
    assert ious[0] == ious[1] > ious[2]


def test_a_best_of_zero_never_matches(device):
    """torchvision lets a ground truth that no anchor overlaps take all anchors of IoU 0."""
    far = [500.0, 500.0, 510.0, 510.0]
    assert one(device, [UNIT, UNIT], [far], **RPN)[0] == [-1, -1]
    assert one(device, [UNIT], [far], high=0.0, low=0.0, allow_low_quality=True)[0] == [-2]


def test_bounds_are_inclusive_and_lowest_index_wins(device):
    half = [0.0, 0.0, 10.0, 5.0]
    assert one(device, [half], [UNIT, UNIT], high=0.5, low=0.3, allow_low_quality=False) == ([0], [0.5])
    assert one(device, [half], [UNIT], high=0.6, low=0.5, allow_low_quality=False)[0] == [-2]
    assert one(device, [half], [UNIT], high=0.6, low=0.51, allow_low_quality=False)[0] == [-1]


POINT = [5.0, 5.0, 5.0, 5.0]


@pytest.mark.parametrize(
    "bad",
    [POINT, [NAN] * 4, [10.0, 10.0, 0.0, 0.0], [10.0, 0.0, 0.0, 10.0]],
    ids=["point", "NaN", "inverted", "inverted on one axis"],
)
def test_degenerate_anchors_are_background(device, bad):
    """A proposal of zeros beside a ground truth of zeros gives 0 / 0, which is 0 here."""
    matches, ious = one(device, [bad, UNIT], [UNIT, POINT], **HEAD)
    assert matches == [-1, 0]
    assert ious == [0, 1]
    # The NaN of one pair must not hide the overlap of another.
    boxes = torch.tensor([[bad, UNIT, bad]], device=device)
    valid = torch.tensor([[True, True, True]], device=device)
    matches, ious = match_anchors(torch.tensor([bad, UNIT], device=device), boxes, valid, **RPN)
    assert matches.tolist() == [[-1, 1]]
    assert ious.tolist() == [[0, 1]]
    # Nor does a crowd, wherever it is, make one ignored.
    for crowd in ([-50.0, -50.0, 50.0, 50.0], [200.0, 200.0, 300.0, 300.0], bad):
        matches, ious = one(device, [bad, UNIT], [crowd, UNIT], crowd=[True, False], **HEAD)
        assert matches == [-1, 1]
        assert ious == [0, 1]


def test_crowds(device):
    crowd = [0.0, 0.0, 100.0, 100.0]
    inside, out = [10.0, 10.0, 30.0, 20.0], [200.0, 0.0, 220.0, 10.0]
    at, above = [93.0, 0.0, 103.0, 10.0], [92.9, 0.0, 102.9, 10.0]
    anchors, boxes = [inside, out, at, above, UNIT], [crowd, UNIT, crowd]
    matches, ious = one(device, anchors, boxes, crowd=[True, False, True], **HEAD)
    assert matches == [-2, -1, -1, -2, 1], "inside, outside, 0.7 of the area, a little more, matched"
    assert ious[0] == 0
    assert one(device, anchors, boxes, crowd=[False, False, False], **HEAD)[0] == [-1, -1, -1, -1, 1]


def test_crowds_do_not_add_up(device):
    """Two crowds cover half of the anchor each."""
    halves = [[0.0, 0.0, 5.0, 10.0], [5.0, 0.0, 10.0, 10.0]]
    assert one(device, [UNIT], halves, crowd=[True, True], **HEAD)[0] == [-1]


def run_all(function, device) -> None:
    for settings in (RPN, HEAD, {"high": 0.6, "low": 0.05, "allow_low_quality": False}):
        check(function, device, settings)


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
    cpu = torch.device("cpu")

    def battery() -> None:
        run_all(match_anchors, cpu)
        test_bounds_are_inclusive_and_lowest_index_wins(cpu)
        test_a_best_of_zero_never_matches(cpu)
        test_without_ground_truth_all_is_background(cpu, 3)
        test_degenerate_anchors_are_background(cpu, [NAN] * 4)
        test_crowds(cpu)

    with pytest.raises(AssertionError):
        battery()


def test_opcheck_compile_and_no_waiting(device):
    anchors, boxes, valid = (t.to(device) for t in scene())
    for crowd in (None, ~valid):
        torch.library.opcheck(op._match_anchors_traced, (anchors[None], boxes, valid, crowd, 0.7, 0.3, True))

        def whole(anchors, boxes, valid, crowd=crowd):
            return match_anchors(anchors * 1.0, boxes, valid, gt_crowd=crowd, **RPN)

        with count_blocking() as found:
            expected = whole(anchors, boxes, valid)
        assert not found
        got = torch.compile(whole, fullgraph=True, backend="aot_eager")(anchors, boxes, valid)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gt_boxes": torch.zeros(2, 4)}, r"gt_boxes: expected \[N, G, 4\]"),
        ({"anchors": torch.zeros(3, 5, 4)}, r"anchors: expected \[A, 4\] or \[2, A, 4\]"),
        ({"gt_valid": torch.zeros(2, 3)}, r"gt_valid: expected bool \[2, 3\]"),
        ({"gt_crowd": torch.zeros(2, 4, dtype=torch.bool)}, r"gt_crowd: expected bool \[2, 3\]"),
        ({"low": 0.8}, "expected 0 <= low <= high <= 1"),
        ({"high": 1.2}, "expected 0 <= low <= high <= 1"),
        ({"backend": "torchvision"}, "does not exist for this op"),
    ],
    ids=["boxes", "anchors", "valid", "crowd", "order", "range", "backend"],
)
def test_wrong_arguments(changes, message):
    arguments = {"anchors": torch.zeros(5, 4), "gt_boxes": torch.zeros(2, 3, 4),
                 "gt_valid": torch.zeros(2, 3, dtype=torch.bool), **RPN}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        match_anchors(**(arguments | changes))
