"""NMS at full size on a GPU, held against the definition, which has one solution, and against torchvision's CUDA op."""

import dataclasses

import pytest
import torch
import torchvision
from torch import Tensor

from bench.cases import CASES, NMSCase
from tests.gpu.tools import assert_same_bits, need_cuda, need_memory, peak_bytes, recorded, waiting_is_an_error
from tmask_kernels import batched_nms, nms, padded_nms, soft_nms
from tmask_kernels.common.reference import box_iou
from tmask_kernels.ops.nms.reference import sort_segments
from tmask_kernels.ops.proposals.reference import top_indices
from tmask_kernels.testing import random_boxes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # the interpreter's, of padding
]

NAMES = ["nms-rpn", "nms-classes", "nms-1k", "nms-10k", "nms-10k-dense", "nms-100k"]
ALL = [*NAMES, pytest.param("nms-1m", marks=pytest.mark.slow)]
TILE = 2**25  # IoUs at once
CHECKED = 20_000  # boxes of a segment whose fate is worked out; a sample of longer segments


def case_of(name: str, full: bool) -> NMSCase:
    case = CASES[name]
    assert isinstance(case, NMSCase)
    if full:
        return case
    small = case.small()
    # Segments of 140 boxes and more are taken in steps.
    few = 140 if case.kind == "list" else 100
    return dataclasses.replace(small, lengths=tuple(min(n, few) for n in small.lengths[-3:]))


def assert_greedy(boxes: Tensor, scores: Tensor, valid: Tensor, kept: Tensor, threshold: float, limit: int) -> None:
    """`kept` is the result of greedy NMS on one segment: by falling score, and a box is in it exactly if no box of
    higher score that is in it overlaps it. Only one set has that property. Beyond `limit` kept boxes nothing is said.
    """
    assert len(kept) <= limit
    assert valid[kept].all()
    assert len(kept.unique()) == len(kept)
    assert (scores[kept].diff() < 0).all()
    boxes, limit_fp32 = boxes.float(), torch.tensor(threshold, dtype=torch.float32, device=boxes.device)
    candidates = valid.nonzero()[:, 0]
    if len(kept) == limit:  # whatever scores less than the last one kept was not looked at
        candidates = candidates[scores[candidates] >= scores[kept[-1]]]
    if len(candidates) > CHECKED:
        order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(0))[:CHECKED]
        candidates = candidates[order.to(boxes.device)]
    is_kept = torch.zeros_like(valid)
    is_kept[kept] = True
    for rows in candidates.split(max(1, TILE // max(1, len(kept)))):
        over = box_iou(boxes[rows, None], boxes[kept]) > limit_fp32  # [rows, kept]
        over &= scores[kept] > scores[rows, None]
        wrong = over.any(1) == is_kept[rows]
        assert not wrong.any(), f"{int(wrong.sum())} of {len(rows)} boxes, first {rows[wrong][:5].tolist()}"


@pytest.mark.parametrize("name", ALL)
def test_equals_the_definition(name: str, full: bool, device: torch.device) -> None:
    case = case_of(name, full)
    boxes, scores, valid = case.inputs(device)
    indices, counts = padded_nms(
        boxes, scores, case.threshold, valid=valid, max_output=case.keep, backend="triton"
    )  # fmt: skip
    again = padded_nms(boxes, scores, case.threshold, valid=valid, max_output=case.keep, backend="triton")
    assert_same_bits(again, (indices, counts))
    assert counts.sum() > len(counts)
    for s, count in enumerate(counts.tolist()):
        assert (indices[s, count:] == -1).all()
        assert_greedy(boxes[s], scores[s], valid[s], indices[s, :count], case.threshold, case.keep)


def test_the_definition_is_told_from_others(full: bool, device: torch.device) -> None:
    """One box more, one box fewer, and two in the wrong order are seen."""
    case = case_of("nms-1k", full)
    (boxes,), (scores,), (valid,) = case.inputs(device)
    kept = nms(boxes, scores, case.threshold, backend="triton")
    assert_greedy(boxes, scores, valid, kept, case.threshold, case.boxes)
    spare = torch.ones_like(valid)
    spare[kept] = False
    more = torch.cat([kept, spare.nonzero()[:1, 0]])
    wrong = [more[scores[more].argsort(descending=True)], kept[1:], kept.flip(0)]
    for other in wrong:
        with pytest.raises(AssertionError):
            assert_greedy(boxes, scores, valid, other, case.threshold, case.boxes)


@pytest.mark.parametrize("name", NAMES)
def test_keeps_what_torchvision_keeps(name: str, full: bool, device: torch.device) -> None:
    """Its kernel may fuse products and sums, so boxes whose IoU stands at the threshold may go the other way."""
    case = case_of(name, full)
    boxes, scores, valid = case.inputs(device)
    indices, counts = padded_nms(boxes, scores, case.threshold, valid=valid, max_output=case.boxes, backend="triton")
    different = total = 0
    for s, count in enumerate(counts.tolist()):
        rows = valid[s].nonzero()[:, 0]
        theirs = torch.zeros_like(valid[s])
        theirs[rows[torchvision.ops.nms(boxes[s, rows], scores[s, rows], case.threshold)]] = True
        ours = torch.zeros_like(theirs)
        ours[indices[s, :count]] = True
        different, total = different + int((ours != theirs).sum()), total + len(rows)
    assert different <= 1e-4 * total, f"{different} of {total}"


def test_batched_nms_keeps_what_torchvision_keeps(full: bool, device: torch.device) -> None:
    count = 10_000 if full else 90
    boxes = random_boxes(count, height=400, width=600, min_size=10, max_size=150).to(device)
    scores = (torch.randperm(count, generator=torch.Generator().manual_seed(0)) / count).to(device)
    classes = torch.randint(80 if full else 4, (count,), generator=torch.Generator().manual_seed(1)).to(device)
    ours = batched_nms(boxes, scores, classes, 0.5, backend="triton")
    theirs = torchvision.ops.batched_nms(boxes, scores, classes, 0.5)
    # It moves the classes apart by an offset, which rounds the coordinates.
    common = torch.isin(ours, theirs).sum()
    assert common >= 0.999 * max(len(ours), len(theirs))
    assert (scores[ours].diff() < 0).all()


@pytest.mark.parametrize("name", ["nms-rpn", "nms-classes", "nms-1k"])
def test_replays_from_a_graph(name: str, full: bool, device: torch.device) -> None:
    case = case_of(name, full)
    boxes, scores, valid = case.inputs(device)

    def call() -> tuple[Tensor, Tensor]:
        return padded_nms(boxes, scores, case.threshold, valid=valid, max_output=case.keep, backend="triton")

    replay = recorded(call, device)
    for value in (boxes, scores, valid):
        value.copy_(value.flip(1))
    expected = [t.clone() for t in call()]
    assert_same_bits(replay(), expected)
    with waiting_is_an_error(device):
        call()


@pytest.mark.parametrize("name", ["nms-rpn", "nms-10k"])
def test_the_result_does_not_depend_on_which_program_is_last(name: str, full: bool, device: torch.device) -> None:
    case = case_of(name, full)
    boxes, scores, valid = case.inputs(device)
    first, *others = [
        padded_nms(boxes, scores, case.threshold, valid=valid, max_output=case.boxes, backend="triton")
        for _ in range(100 if full else 2)
    ]
    for other in others:
        assert_same_bits(other, first)


def test_a_chain_of_removals(full: bool, device: torch.device) -> None:
    """Each box removes the next, so every second is kept: as many rounds inside a step as it has boxes."""
    count = 5_000 if full else 150
    left = torch.arange(count, device=device)[:, None] * 4.0
    boxes = torch.cat([left, left * 0, left + 10, left * 0 + 10], 1)
    scores = torch.linspace(1, 0.5, count, device=device)
    assert_same_bits(nms(boxes, scores, 0.4, backend="triton"), torch.arange(0, count, 2, device=device))


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_nms_equals_the_reference(method: str, full: bool, device: torch.device) -> None:
    case = case_of("nms-1k", full)
    (boxes,), (scores,), _ = case.inputs(device)
    settings = {"method": method, "score_threshold": 0.01}
    indices, taken = soft_nms(boxes, scores, backend="triton", **settings)
    expected, expected_scores = soft_nms(boxes, scores, backend="reference", **settings)
    assert len(indices) > 20
    if method == "linear":
        assert_same_bits((indices, taken), (expected, expected_scores))
        return
    # By the rounding of `exp` neighbours may change places, and the last be dropped.
    assert abs(len(taken) - len(expected_scores)) <= 2
    n = min(len(taken), len(expected_scores))
    torch.testing.assert_close(taken[:n], expected_scores[:n], rtol=1e-4, atol=0)


def test_memory_is_linear(full: bool, device: torch.device) -> None:
    case = case_of("nms-100k", full)
    boxes, scores, _ = case.inputs(device)
    peak = peak_bytes(lambda: nms(boxes[0], scores[0], case.threshold, backend="triton"), device)
    need_cuda(device, "memory statistics")
    assert peak is not None
    bits = case.boxes**2 / 8
    assert peak < 0.1 * bits, f"{peak} bytes; a matrix of bits would take {bits:.0f}"


@pytest.mark.parametrize("count", [1, 31, 33, 130, 1025, 4097, 20_000, 300_000])
def test_sorts_and_top_indices_have_the_order_of_the_cpu(count: int, device: torch.device) -> None:
    """CUDA sorts short, medium and long rows by different kernels; ties, signed zeros and NaN must stand alike."""
    generator = torch.Generator().manual_seed(0)
    odd = torch.tensor([0.0, -0.0, float("nan"), float("-nan"), float("inf"), -float("inf"), 0.5, 0.25, -1.5])
    scores = odd[torch.randint(len(odd), (3, count), generator=generator)]
    scores[1] = torch.randn(count, generator=generator).bfloat16().float()
    boxes, valid = torch.rand(3, count, 4, generator=generator), torch.rand(3, count, generator=generator) > 0.2
    for mask in (None, valid):
        expected = sort_segments(boxes, scores, mask)
        got = sort_segments(boxes.to(device), scores.to(device), None if mask is None else mask.to(device))
        real = expected.suppresses  # those without a score stand in an order that does not matter, among themselves
        assert_same_bits(got.suppresses.cpu(), real)
        assert_same_bits(got.order.cpu()[real], expected.order[real])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        k = min(count, 2000)
        assert_same_bits(top_indices(scores.to(device, dtype), k).cpu(), top_indices(scores.to(dtype), k))


def test_more_than_2_to_the_31_coordinates(full: bool, device: torch.device) -> None:
    """The last segments, whose boxes lie past 2^31 elements, as if they were alone."""
    need_memory(64, device)
    segments, count = (8_500_000, 64) if full else (3, 64)
    assert segments * count * 4 >= 2**31 or not full
    last = 500 if full else 1
    generator = torch.Generator(device).manual_seed(0)
    corner = torch.rand(segments, count, 2, device=device, generator=generator) * 40
    boxes = torch.cat([corner, corner + 15], 2)
    del corner
    scores = torch.rand(segments, count, device=device, generator=generator)
    indices, counts = padded_nms(boxes, scores, 0.3, max_output=8, backend="triton")
    alone = padded_nms(boxes[-last:].contiguous(), scores[-last:].contiguous(), 0.3, max_output=8, backend="triton")
    assert counts[-last:].float().mean() > 4
    assert_same_bits((indices[-last:], counts[-last:]), alone)
