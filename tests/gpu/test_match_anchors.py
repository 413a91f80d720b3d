"""Matching at full size on a GPU, held bit for bit against the reference on the CPU, and against torchvision."""

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from bench.cases import CASES, MatchCase
from tests.gpu.tools import assert_same_bits, need_cuda, need_memory, peak_bytes, recorded, waiting_is_an_error
from tmask_kernels import match_anchors
from tmask_kernels.testing import random_boxes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),  # the interpreter's
]

RPN = {"high": 0.7, "low": 0.3, "allow_low_quality": True}
HEAD = {"high": 0.5, "low": 0.5, "allow_low_quality": False}


def inputs_of(full: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Anchors, boxes, valid, crowd on the CPU; every fifth box is a crowd region, every seventh padding."""
    case = CASES["match-anchors"]
    assert isinstance(case, MatchCase)
    anchors, boxes = (case if full else case.small()).inputs(torch.device("cpu"))
    place = torch.arange(boxes.shape[1]).expand(len(boxes), -1)
    crowd = place % 5 == 4
    return anchors if full else anchors[::29], boxes, ~crowd & (place % 7 != 6), crowd


@pytest.mark.parametrize("settings", [RPN, HEAD], ids=["rpn", "head"])
@pytest.mark.parametrize("crowds", [False, True], ids=["without crowds", "crowds"])
def test_has_the_bits_of_the_reference(settings: dict, crowds: bool, full: bool, device: torch.device) -> None:
    """Atomic maxima in whatever order, and two kernels that must agree to the bit."""
    anchors, boxes, valid, crowd = inputs_of(full)
    on_gpu = [t.to(device) for t in (anchors, boxes, valid)]
    gpu_crowd = crowd.to(device) if crowds else None
    got = match_anchors(*on_gpu, gt_crowd=gpu_crowd, **settings, backend="triton")
    for _ in range(3 if full else 0):
        assert_same_bits(match_anchors(*on_gpu, gt_crowd=gpu_crowd, **settings, backend="triton"), got)
    expected = match_anchors(
        anchors, boxes, valid, gt_crowd=crowd if crowds else None, **settings, backend="reference"
    )  # fmt: skip
    assert_same_bits([t.cpu() for t in got], expected)
    assert (expected[0] >= 0).any()
    assert (expected[0] == -2).any() == (settings is RPN or crowds)


def test_proposals_in_any_order(full: bool, device: torch.device) -> None:
    """Boxes of each image that lie anywhere, some of them odd."""
    count, real = (1100, 100) if full else (70, 40)
    proposals = torch.stack([random_boxes(count, height=800, width=1333, min_size=8, seed=s) for s in (0, 1)])
    boxes = torch.stack([random_boxes(real, height=800, width=1333, min_size=8, seed=s) for s in (2, 3)])
    proposals[:, :real] = boxes + 3
    for odd, value in enumerate((float("nan"), float("inf"), -float("inf"), 1e-40, 1e30)):
        proposals[:, odd::37, odd % 4] = value
        boxes[:, odd::23, 3 - odd % 4] = value
    valid = torch.rand(2, real, generator=torch.Generator().manual_seed(0)) < 0.8
    for settings in (HEAD, RPN):
        expected = match_anchors(proposals, boxes, valid, gt_crowd=~valid, **settings, backend="reference")
        arguments = [t.to(device) for t in (proposals, boxes, valid, ~valid)]
        got = match_anchors(*arguments[:3], gt_crowd=arguments[3], **settings, backend="triton")
        assert_same_bits([t.cpu() for t in got], expected)
        assert (expected[0] >= 0).sum() > 20


def test_equals_torchvision(full: bool, device: torch.device) -> None:
    """Every box of the case overlaps an anchor, so the rules are the same; its IoU may fuse a product and a sum."""
    anchors, boxes, *_ = (t.to(device) for t in inputs_of(full))
    valid = torch.ones(boxes.shape[:2], dtype=torch.bool, device=device)
    matches, ious = match_anchors(anchors, boxes, valid, **RPN, backend="triton")
    for n, one in enumerate(boxes):
        quality = box_iou(one, anchors)
        theirs = Matcher(0.7, 0.3, allow_low_quality_matches=True)(quality)
        assert (matches[n] != theirs).float().mean() < 1e-4
        assert (ious[n] - quality.amax(0)).abs().max() < 1e-6


def test_replays_from_a_graph(full: bool, device: torch.device) -> None:
    anchors, boxes, valid, crowd = (t.to(device) for t in inputs_of(full))

    def call() -> tuple[Tensor, Tensor]:
        return match_anchors(anchors, boxes, valid, gt_crowd=crowd, **RPN, backend="triton")

    replay = recorded(call, device)
    for value in (boxes, valid, crowd):
        value.copy_(value.flip(1))
    assert_same_bits(replay(), [t.clone() for t in call()])
    with waiting_is_an_error(device):
        call()


def test_memory_is_the_results_and_a_number_for_each_box(full: bool, device: torch.device) -> None:
    anchors, boxes, valid, crowd = (t.to(device) for t in inputs_of(full))
    peak = peak_bytes(
        lambda: match_anchors(anchors, boxes, valid, gt_crowd=crowd, **RPN, backend="triton"), device
    )  # fmt: skip
    need_cuda(device, "memory statistics")
    assert peak is not None
    # The allocator rounds each of three tensors up to 2 MiB at most.
    assert peak <= 2 * (12 * len(anchors) + 4 * boxes.shape[1]) + 3 * 2**21


def test_more_than_2_to_the_31_coordinates(full: bool, device: torch.device) -> None:
    """The last anchors, past 2^31 elements, as if they were alone; the best IoU of each box is among them."""
    need_memory(24, device)
    count, last = (2**29 + 200, 1000) if full else (300, 100)
    assert count * 4 >= 2**31 or not full
    boxes = torch.stack([random_boxes(5, height=90, width=90, min_size=30, seed=s) for s in (0, 1)]).to(device)
    valid = torch.ones(2, 5, dtype=torch.bool, device=device)
    anchors = torch.zeros(count, 4, device=device)
    anchors[-last:] = random_boxes(last, height=90, width=90, min_size=20, seed=2).to(device)
    matches, ious = match_anchors(anchors, boxes, valid, **RPN, backend="triton")
    alone = match_anchors(anchors[-last:].contiguous(), boxes, valid, **RPN, backend="reference")
    assert (alone[0] >= 0).any()
    assert_same_bits((matches[:, -last:], ious[:, -last:]), alone)
    assert not ious[:, :-last].any()
