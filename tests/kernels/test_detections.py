"""detections against torchvision's postprocess_detections, and its own rules."""

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads

from tests.kernels.tools import INF, NAN, assert_same, each_mutant
from tests.launches import Count, count_call
from tests.mutation import mutant
from tmask_kernels import detections, padded_nms
from tmask_kernels.backend import interpreter_enabled
from tmask_kernels.ops.proposals import op
from tmask_kernels.ops.proposals import reference as proposals
from tmask_kernels.ops.proposals.kernels import candidates as kernels_candidates
from tmask_kernels.testing import guarded, poisoned_empty, random_boxes

IMAGE_SIZES = [(96, 120), (75, 128)]
SETTINGS = {"score_threshold": 0.05, "nms_threshold": 0.5, "max_detections": 60}
HEAD = (10.0, 10.0, 5.0, 5.0)


def inputs(classes: int = 5, count: int = 80, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Class logits [2, P, classes + 1], deltas [2, P, 4 * (classes + 1)] and proposals [2, P, 4]."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, count, classes + 1, generator=generator) * 2
    deltas = torch.randn(2, count, 4 * (classes + 1), generator=generator)
    rois = [random_boxes(count, height=96, width=128, min_size=10, max_size=60, seed=seed + i) for i in range(2)]
    return logits, deltas, torch.stack(rois)


def heads(settings) -> RoIHeads:
    return RoIHeads(None, None, None, 0.5, 0.5, 8, 0.25, HEAD, settings["score_threshold"], settings["nms_threshold"],
                    settings["max_detections"])  # fmt: skip


def decoded(deltas, rois) -> Tensor:
    """All classes' boxes [2, P, classes + 1, 4]."""
    boxes = heads(SETTINGS).box_coder.decode(deltas.flatten(0, 1), list(rois))
    return boxes.view(2, rois.shape[1], -1, 4)


def call(logits, boxes, device, backend=None, function=detections, valid=None, **changes):
    scores = torch.softmax(logits, -1)[..., 1:].to(device)
    valid = torch.ones(boxes.shape[:2], dtype=torch.bool) if valid is None else valid
    return function(scores, boxes.to(device), valid=valid.to(device),
                    image_sizes=torch.tensor(IMAGE_SIZES, device=device), backend=backend,
                    **(SETTINGS | changes))  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [{}, {"max_detections": 5}, {"max_detections": 500}, {"score_threshold": 0.4, "nms_threshold": 0.2}],
    ids=["plain", "few", "all", "strict"],
)
@pytest.mark.parametrize("counts", [(80, 80), (80, 31), (0, 80)], ids=["full", "padded", "empty"])
def test_equals_torchvision(device, nms_backend, changes, counts):
    logits, deltas, rois = inputs()
    settings = SETTINGS | changes
    valid = torch.arange(80) < torch.tensor(counts)[:, None]
    boxes = decoded(deltas, rois)[:, :, 1:]
    got_boxes, got_scores, got_labels, got_counts = call(logits, boxes, device, nms_backend, valid=valid, **changes)
    D = settings["max_detections"]
    assert got_boxes.shape == (2, D, 4)
    assert (got_boxes.dtype, got_scores.dtype, got_labels.dtype) == (torch.float32, torch.float32, torch.int64)
    for n, count in enumerate(counts):
        # torchvision keeps background in column 0, so its labels are ours plus 1.
        expected = heads(settings).postprocess_detections(
            logits[n, :count], deltas[n, :count], [rois[n, :count]], [IMAGE_SIZES[n]]
        )
        (boxes_n,), (scores_n,), (labels_n,) = expected
        found = len(boxes_n)
        assert got_counts[n] == found
        assert torch.equal(got_boxes[n, :found].cpu(), boxes_n)
        assert torch.equal(got_scores[n, :found].cpu(), scores_n)
        assert torch.equal(got_labels[n, :found].cpu() + 1, labels_n)
        assert not got_boxes[n, found:].any()
        assert not got_scores[n, found:].any()
        assert not got_labels[n, found:].any()


def test_boxes_shared_by_the_classes(device, nms_backend):
    logits, _, rois = inputs()
    shared = call(logits, rois[:, :, None], device, nms_backend)
    repeated = call(logits, rois[:, :, None].expand(-1, -1, 5, -1), device, nms_backend)
    assert_same(shared, repeated)


def run(scores, boxes, device, backend):
    """The detections of scores [N, P, classes] and boxes [N, P, 1, 4], which are all valid."""
    scores, boxes = torch.as_tensor(scores, device=device), torch.as_tensor(boxes, device=device)
    valid = torch.ones(boxes.shape[:2], dtype=torch.bool, device=device)
    sizes = torch.tensor(IMAGE_SIZES, device=device)[: len(boxes)]
    return detections(scores, boxes, valid=valid, image_sizes=sizes, backend=backend, **SETTINGS)


def test_classes_do_not_suppress_each_other(device, nms_backend):
    scores = torch.tensor([[0.3, 0.6, 0.0], [0.4, 0.5, 0.0], [0.0, 0.0, 0.0]]).expand(2, 3, 3)
    got = run(scores, torch.tensor([[10.0, 10.0, 50.0, 50.0]]).expand(2, 3, 1, 4), device, nms_backend)
    assert got[3].tolist() == [2, 2]
    assert got[2][0, :3].tolist() == [1, 0, 0]
    assert torch.equal(got[1][0, :2].cpu(), torch.tensor([0.6, 0.4]))


def test_ties_go_by_proposal_then_class(device, nms_backend):
    boxes = [[[[0.0, 0.0, 9.0, 9.0]], [[20.0, 0.0, 29.0, 9.0]]]]
    got = run([[[0.5] * 2] * 2], boxes, device, nms_backend)
    assert got[2][0, :4].tolist() == [0, 1, 0, 1]
    assert got[0][0, :4, 0].tolist() == [0, 0, 20, 20]


def test_what_is_no_detection(device, nms_backend):
    """A score at the threshold, NaN in a score or a box, a box outside the image or thinner than min_size."""
    rows = [([0, 0, 9, 9], 0.05), ([0, 20, 9, 29], NAN), ([0, NAN, 9, 9], 0.9), ([200, 0, 210, 9], 0.9),
            ([0, 0, 0.005, 9], 0.9), ([9, 0, 0, 9], 0.9), ([0, 40, 9, 49], 0.9)]  # fmt: skip
    got = run([[[score] for _, score in rows]], [[[box] for box, _ in rows]], device, nms_backend)
    assert got[3].tolist() == [1]
    assert got[0][0, 0].tolist() == [0, 40, 9, 49]


@pytest.mark.parametrize(("count", "classes"), [(0, 5), (80, 0), (1, 1)], ids=["no proposals", "no classes", "one"])
def test_degenerate_sizes(device, nms_backend, count, classes):
    boxes = torch.tensor([1.0, 1.0, 5.0, 5.0]).expand(2, count, 1, 4)
    got = run(torch.full((2, count, classes), 0.5), boxes, device, nms_backend)
    assert [tuple(t.shape) for t in got] == [(2, 60, 4), (2, 60), (2, 60), (2,)]
    assert got[3].tolist() == [int(count == 1)] * 2


MUTANTS = {
    "score": ("(scores > score_threshold)", "(scores >= 0)"),
    "size": ("& _at_least(boxes, min_size) &", "& _at_least(boxes, 0) &"),
    "valid": ("& valid[..., None]", ""),
    "clip": ("boxes = clip_boxes(boxes.float(), image_sizes)", "boxes = boxes.float()"),
    "class box": ("boxes.expand(N, P, Cls, 4).transpose(1, 2)", "boxes.expand(N, P, Cls, 4)"),
    "class of valid": ("alive.transpose(1, 2)", "alive"),
    "row": ("(order % G, order // G) if box_first", "(order // K, order % K) if box_first"),
    "order": ("ranked = ranked.transpose(1, 2)", "ranked = ranked.flip(1).transpose(1, 2)"),
    "label": ("F.pad(torch.where(real, segment, 0)", "F.pad(torch.where(real, segment + 1, 0)"),
}


@each_mutant(MUTANTS)
def test_a_broken_reference_fails(tmp_path, name):
    broken = mutant(proposals, *MUTANTS[name], tmp_path, seen_from=op)
    logits, deltas, rois = inputs()
    boxes = decoded(deltas, rois)[:, :, 1:]
    options = {"valid": torch.arange(80).expand(2, -1) % 3 > 0, "min_size": 15.0, "max_detections": 200}
    got, expected = (
        call(logits, boxes, torch.device("cpu"), "reference", f, **options) for f in (broken.detections, detections)
    )
    with pytest.raises(AssertionError):
        assert_same(got, expected)


def check_candidates(module, device, scores, boxes) -> tuple[Tensor, ...]:
    """The kernel's candidates against the reference's, to the bit."""
    valid = torch.arange(2 * scores.shape[1]).view(2, -1) % 3 > 0
    sizes = torch.tensor(IMAGE_SIZES)
    scores, boxes, valid, sizes = (guarded(t, device) for t in (scores, boxes, valid, sizes))
    limits = {"score_threshold": 0.3, "min_size": 15.0}
    with poisoned_empty():
        got = module.class_candidates_fwd(scores, boxes, valid, sizes, **limits)
    expected = proposals.class_candidates_reference(scores, boxes, valid, sizes, **limits)
    assert_same(got, expected)
    return got


def candidates_input(dtype=torch.float32, count: int = 20) -> tuple[Tensor, Tensor]:
    """Scores [2, P, 3] and boxes [2, P, 3, 4], both without their first column, with NaN and infinities."""
    logits, deltas, rois = inputs(classes=3, count=count)
    scores, boxes = torch.softmax(logits, -1), decoded(deltas, rois)
    scores[0, 1], boxes[0, 2, :, 1], boxes[0, 4, :, 2], boxes[1, 5, :, 0] = NAN, NAN, INF, -INF
    return guarded(scores.to(dtype))[:, :, 1:], guarded(boxes.to(dtype))[:, :, 1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_candidates_equal_the_reference(device, dtype):
    valid = check_candidates(kernels_candidates, device, *candidates_input(dtype))[2]
    assert valid.any()


def test_candidates_of_more_than_a_block_and_boxes_that_are_not_aligned(device):
    """Rows of 6 numbers: a box does not begin at a multiple of 16 bytes."""
    scores, boxes = candidates_input(count=130)
    check_candidates(kernels_candidates, device, scores, torch.nn.functional.pad(boxes[:, :, :1], (1, 1))[..., 1:5])


BROKEN_CANDIDATES = {
    "score": ("(score > score_threshold)", "(score >= 0)"),
    "valid": ("(tl.load(valid_ptr + image * P + slot, mask=mask, other=0) != 0) &", "mask &"),
    "image": ("valid_ptr + image * P + slot", "valid_ptr + slot"),
    "class": ("label * box_c", "label * 0"),
    "class of score": ("label * score_c", "label * 0"),
    "size": ("(x2 - x1 >= min_size)", "(x2 - x1 >= 0)"),
    "clip": ("clipped(x1, limit_x)", "tl.where(x1 > limit_x, limit_x, x1)"),
    "NaN": ("clipped(y1, limit_y)", "tl.where(y1 >= 0.0, clipped(y1, limit_y), 0.0)"),
    "row": ("segment * P + slot, mask", "slot, mask"),
}


@each_mutant(BROKEN_CANDIDATES)
def test_a_broken_kernel_of_candidates_fails(device, tmp_path, name):
    module = mutant(kernels_candidates, *BROKEN_CANDIDATES[name], tmp_path)
    with pytest.raises((AssertionError, IndexError)):
        check_candidates(module, device, *candidates_input())


@pytest.mark.skipif(not interpreter_enabled(), reason="counts through Triton's interpreter")
def test_few_launches():
    """Around the NMS: the candidates; keys of what is kept, their top-k and the rows taken."""
    scores, boxes = candidates_input()
    valid, sizes = torch.ones(2, 20, dtype=torch.bool), torch.tensor(IMAGE_SIZES)
    whole = count_call(lambda: detections(scores, boxes, valid=valid, image_sizes=sizes, **SETTINGS, backend="triton"))
    segments = torch.zeros(4, 20, 4), torch.zeros(4, 20)
    alive = segments[1] > 0
    nms = count_call(lambda: padded_nms(*segments, 0.5, valid=alive, max_output=20, backend="triton"))
    assert whole == Count(ops=nms.ops + 1, kernels=nms.kernels + 3)
