"""The standard work: seeded, as large as the table of workloads says, counted right; and the gates that guard it."""

import dataclasses
from unittest import mock

import pytest
import torch
import torchvision
from torch import Tensor
from torchvision.ops.boxes import _batched_nms_coordinate_trick

from bench.cases import CASES, Case, NMSCase, RoICase, RPNCase, Segments, count_touched, rois, sized
from bench.contest import DTYPES, LAYOUTS, UnavailableError
from bench.graph import captured
from bench.ops import matcher as matcher_bench
from bench.ops import nms as nms_bench
from bench.ops import proposals as proposals_bench
from bench.ops import roi_align as roi_align_bench
from tmask_kernels.common.pyramid import box_levels

CPU = torch.device("cpu")
MB = 1e6


def roi_case(name: str) -> RoICase:
    case = CASES[name]
    assert isinstance(case, RoICase)
    return case


def nms_case(name: str) -> NMSCase:
    case = CASES[name]
    assert isinstance(case, NMSCase)
    return case


def test_names_are_the_keys() -> None:
    assert all(name == case.name for name, case in CASES.items())


@pytest.mark.parametrize("name", CASES)
def test_a_small_case_is_the_same_work_in_small(name: str) -> None:
    case = CASES[name]
    small = case.small()
    assert type(small) is type(case)
    assert small.name == name
    assert small != case


def test_a_cpu_gets_the_reduced_size() -> None:
    case: Case = CASES["W1"]
    with mock.patch("bench.cases.case.device", return_value=CPU):
        assert sized(case) == (case.small(), "reduced")
    with mock.patch("bench.cases.case.device", return_value=torch.device("cuda")):
        assert sized(case) == (case, "full")


# The table of workloads in bf16: output, cells touched of all cells, bytes in all.
@pytest.mark.parametrize(
    ("name", "out", "cells", "of"),
    [("W1", 25.7, (14, 30), 91.4), ("W2", 25.7, (8, 30), 91.4), ("W4-ratio2", 25.7, (55, 67.1), 67.1)],
)
def test_roi_align_counts_what_the_table_says(name: str, out: float, cells: tuple[float, float], of: float) -> None:
    case = roi_case(name)
    boxes = case.rois * 16 / MB
    touched = case.work("bf16", "forward").bytes / MB - out - boxes
    assert cells[0] <= touched <= cells[1]
    assert case.work("bf16", "backward").bytes / MB == pytest.approx(of + out + boxes, abs=0.1)
    assert case.work("fp32", "forward").bytes - case.rois * 16 == 2 * (
        case.work("bf16", "forward").bytes - case.rois * 16
    )


def test_an_adaptive_grid_touches_almost_the_whole_map() -> None:
    assert 90 <= roi_case("W4-ratio0").work("bf16", "forward").bytes / MB <= 93


def test_w8_counts_what_the_table_says() -> None:
    case = CASES["W8"]
    assert isinstance(case, RPNCase)
    assert case.anchors == 268_569
    assert case.candidates == 8_819 == sum(nms_case("W5").lengths) // 2
    assert 1 <= case.work("bf16").bytes / MB <= case.work("fp32").bytes / MB <= 2.5


@pytest.mark.parametrize("name", ["W1", "W4-ratio2", "W4-ratio0"])
def test_touched_cells_are_those_that_take_a_gradient(name: str) -> None:
    case = dataclasses.replace(roi_case(name).small(), channels=1)
    features = [x.double().requires_grad_() for x in case.features(torch.float32, torch.contiguous_format, CPU)]
    boxes = [b.double() for b in case.boxes()]
    if len(features) > 1:
        names = [str(i) for i in range(len(features))]
        pool = torchvision.ops.MultiScaleRoIAlign(names, case.pooled, case.sampling_ratio)
        out = pool(dict(zip(names, features, strict=True)), boxes, [(case.height, case.width)] * case.images)
    else:
        out = torchvision.ops.roi_align(features[0], boxes, case.pooled, case.scales[0], case.sampling_ratio)
    out.sum().backward()
    assert count_touched(case)[1] == sum(int((x.grad != 0).sum()) for x in features)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["W1", "W2", "W3"])
def test_a_small_pyramid_uses_several_levels(name: str) -> None:
    for case, levels in ((roi_case(name), 4), (roi_case(name).small(), 2)):
        assert len(box_levels(case.boxes(), case.thresholds).unique()) >= levels


def test_a_fixed_grid_has_ratio_squared_samples_a_bin() -> None:
    case = roi_case("W1").small()
    assert count_touched(case)[0] == case.rois * case.pooled**2 * case.sampling_ratio**2


def test_rois_are_seeded_and_lie_in_the_image() -> None:
    boxes = rois(2, 500, 800, 1344)
    assert torch.equal(boxes, rois(2, 500, 800, 1344))
    assert not torch.equal(boxes, rois(2, 500, 800, 1344, seed=1))
    assert bool((boxes >= 0).all())
    assert bool((boxes <= torch.tensor([1344, 800, 1344, 800])).all())
    scale = (boxes[..., 2:] - boxes[..., :2]).prod(-1).sqrt()
    assert float(scale.max()) > 300
    assert float(scale.quantile(0.1)) < 50


@pytest.mark.parametrize("name", ["W5", "W6", "W7-1k", "W7-10k", "W7-10k-dense"])
def test_nms_keeps_the_share_it_says(name: str) -> None:
    case = nms_case(name)
    boxes, scores, valid = case.inputs(CPU)
    assert all(torch.equal(a, b) for a, b in zip(case.inputs(CPU), (boxes, scores, valid), strict=True))
    kept = 0
    for box, score, fits in zip(boxes, scores, valid, strict=True):
        assert len(score[fits].unique()) == int(fits.sum()), "a tie leaves the answer open"
        kept += len(torchvision.ops.nms(box[fits], score[fits], case.threshold))
    assert kept / sum(case.lengths) == pytest.approx(case.kept, rel=0.2)
    assert float(scores.median()) < 0.1, "most scores are low"


def test_w6_has_a_few_candidates_a_roi() -> None:
    case = nms_case("W6")
    share = float(case.inputs(CPU).valid.float().mean())
    assert share == pytest.approx(proposals_bench.CANDIDATES, rel=0.2)


# ---- The gate of NMS


@pytest.fixture(scope="module")
def segment() -> tuple[Tensor, Tensor, Tensor]:
    boxes, scores, _ = nms_case("W7-1k").inputs(CPU)
    return boxes[0], scores[0], torchvision.ops.nms(boxes[0], scores[0], 0.5)


def held(segment: tuple[Tensor, Tensor, Tensor], kept: Tensor, limit: int = 1000) -> tuple[int, int]:
    """Boxes that are kept against the definition, and boxes that are dropped against it."""
    boxes, scores, _ = segment
    valid = torch.ones_like(scores, dtype=torch.bool)
    return nms_bench.count_faults(boxes, scores, valid, kept, 0.5, limit, 0.0)[:2]


def test_the_gate_passes_greedy_nms(segment: tuple[Tensor, Tensor, Tensor]) -> None:
    assert held(segment, segment[2]) == (0, 0)
    assert held(segment, segment[2][:100], limit=100) == (0, 0)


def test_the_gate_counts_in_parts(segment: tuple[Tensor, Tensor, Tensor]) -> None:
    dropped = torch.cat([segment[2][:50], segment[2][51:]])
    whole = held(segment, dropped)
    with mock.patch.object(nms_bench, "PAIRS", 5000):
        assert held(segment, segment[2]) == (0, 0)
        assert held(segment, dropped) == whole
        with mock.patch.object(nms_bench, "ALL_PAIRS", 100_000):
            assert held(segment, segment[2]) == (0, 0)
            assert held(segment, segment[2][::2])[1] > 0


def test_the_gate_counts_a_dropped_box(segment: tuple[Tensor, Tensor, Tensor]) -> None:
    assert held(segment, segment[2][:-1])[1] >= 1
    too_many, too_few = held(segment, segment[2][:100])
    assert too_many == 0
    assert too_few >= len(segment[2]) - 100, "and what those would have removed"


def test_the_gate_counts_a_box_too_many(segment: tuple[Tensor, Tensor, Tensor]) -> None:
    scores, kept = segment[1], segment[2]
    dropped = torch.ones_like(scores, dtype=torch.bool).index_fill(0, kept, False).nonzero()[0]
    more = torch.cat([kept, dropped])
    assert held(segment, more[scores[more].argsort(descending=True)])[0] == 1


def test_only_a_peer_that_moves_boxes_may_err_in_a_thousandth() -> None:
    """On a GPU `batched_nms` moves the levels of an image apart, which changes one box of W5."""
    case = nms_case("W5")
    given = nms_bench.Given(case, case.inputs(CPU))
    boxes, scores, valid = given.segments
    S, K = scores.shape
    parts = zip(torch.arange(S * K).split(case.segments_an_image * K), valid.split(case.segments_an_image), strict=True)
    rows = [positions[fits.flatten()] for positions, fits in parts]
    boxes, scores = boxes.view(-1, 4), scores.view(-1)
    moved = [_batched_nms_coordinate_trick(boxes[r], scores[r], r // K, case.threshold) for r in rows]
    nms_bench.check(nms_bench.Flat(moved, rows, moved=True), given)
    with pytest.raises(AssertionError, match=r"0 boxes kept .* 1 dropped"):
        nms_bench.check(nms_bench.Flat(moved, rows), given)
    with pytest.raises(AssertionError, match=r", \d\d dropped that none removes"):
        nms_bench.check(nms_bench.Flat([moved[0][20:], moved[1]], rows, moved=True), given)

    one = NMSCase(name="one", kind="list", lengths=(100,), threshold=0.5, keep=100, kept=1.0)
    apart = torch.arange(100.0)[:, None] * 10 + torch.tensor([0.0, 0.0, 5.0, 5.0])
    alone = nms_bench.Given(one, Segments(apart[None], torch.linspace(1, 0.1, 100)[None], torch.ones(1, 100).bool()))
    nms_bench.check((torch.arange(100)[None], torch.tensor([100])), alone)
    with pytest.raises(AssertionError, match=r", 1 dropped"):
        nms_bench.check((torch.cat([torch.arange(99), torch.tensor([-1])])[None], torch.tensor([99])), alone)


def test_the_gate_refuses_another_order(segment: tuple[Tensor, Tensor, Tensor]) -> None:
    with pytest.raises(AssertionError, match="falling score"):
        held(segment, segment[2].flip(0))


# ---- The other gates, and the sweeps


def test_the_gate_of_roi_align_refuses_a_shifted_tap() -> None:
    contest = roi_align_bench.pooling("W1", "forward", "bf16", "nhwc", roi_align_bench.PYRAMID_PROVIDERS)
    given = contest.inputs()
    truth = contest.truth(given)
    right = contest.providers["torchvision"](given)()
    contest.check(right, truth)
    shifted = given._replace(boxes=given.boxes + torch.tensor([1.0, 0, 1, 0]))
    with pytest.raises(AssertionError, match="value 0: max error"):
        contest.check(contest.providers["torchvision"](shifted)(), truth)
    with pytest.raises(AssertionError, match="value 0: max error"):
        contest.check(roi_align_bench.Loose(-right, roi_align_bench.HALF_COORDINATES), truth)


def test_the_gate_of_proposals_refuses_moved_and_missing_boxes() -> None:
    boxes, scores = rois(2, 40, 800, 1344), torch.rand(2, 40)
    counts = torch.tensor([40, 30])
    truth = (boxes, scores, counts)
    proposals_bench.check(truth, truth)
    listed = [boxes[0], boxes[1, :30]], [scores[0], scores[1, :30]]
    proposals_bench.check(listed, truth)
    with pytest.raises(AssertionError, match=r"image 0: 0\.0% of the true found"):
        proposals_bench.check((boxes + 1, scores, counts), truth)
    with pytest.raises(AssertionError, match="image 1: 29, not 30"):
        proposals_bench.check((boxes, scores, counts - torch.tensor([0, 1])), truth)
    labels = torch.zeros(2, 40, dtype=torch.int64)
    with pytest.raises(AssertionError, match="image 0"):
        proposals_bench.check((boxes, scores, labels + 1, counts), (boxes, scores, labels, counts))


def test_a_graph_needs_a_gpu() -> None:
    with (
        mock.patch("bench.graph.device", return_value=CPU),
        pytest.raises(UnavailableError, match="a CUDA graph needs a GPU"),
    ):
        captured(lambda: None)


def test_a_sweep_launches_the_tile_it_names() -> None:
    from tmask_kernels.ops.roi_align.kernels import forward as kernels

    contest = roi_align_bench.SWEEPS["roi_align-forward"]()
    assert len(contest.providers) >= 12
    given = contest.inputs()

    def launch(*_: object) -> kernels.Tile:
        return kernels.pick_tile(256, 7, True)

    with mock.patch.object(kernels, "multiscale_roi_align", launch):
        for block_c, warps in ((32, 2), (256, 8)):
            call = contest.providers[f"triton[block_c={block_c},warps={warps}]"](given)
            assert call() == kernels.Tile(8, block_c, warps)


def test_a_sweep_launches_the_block_it_names() -> None:
    from tmask_kernels.ops.nms.kernels import padded as kernels

    contest = nms_bench.SWEEPS["nms"]()
    assert len(contest.providers) >= 12
    given = contest.inputs()

    def launch(*_: object) -> tuple[int, int]:
        return kernels.BLOCK, kernels.NUM_WARPS

    with mock.patch.object(kernels, "padded_nms", launch):
        assert contest.providers["triton[block=128,warps=8]"](given)() == (128, 8)


def test_a_sweep_launches_the_anchors_it_names() -> None:
    from tmask_kernels.ops.match_anchors import kernels

    contest = matcher_bench.SWEEPS["match_anchors"]()
    assert len(contest.providers) >= 12
    given = contest.inputs()

    def launch(*_: object) -> kernels.Block:
        return kernels.pick_block()

    with mock.patch.object(kernels, "match_anchors", launch):
        assert contest.providers["triton[anchors=128,warps=2]"](given)() == kernels.Block(128, 2)


@pytest.mark.parametrize("name", ["nms-levels", "nms-list"])
def test_a_sweep_launches_the_steps_it_names(name: str) -> None:
    from tmask_kernels.ops.nms.kernels import blocks as kernels_blocks
    from tmask_kernels.ops.nms.kernels import padded as kernels

    contest = nms_bench.SWEEPS[name]()
    assert len(contest.providers) >= 12
    given = contest.inputs()

    def launch(*_: object) -> object:
        return kernels.strategy(1, 1000).keywords["launch"]  # type: ignore[attr-defined]

    with mock.patch.object(kernels, "padded_nms", launch):
        call = contest.providers["triton[step=512,tile=128,programs=128,num_warps=16]"](given)
        assert call() == kernels_blocks.Launch(step=512, tile=128, programs=128, num_warps=16)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_features_have_the_dtype_and_layout(dtype: str, layout: str) -> None:
    features = roi_case("W1").small().features(DTYPES[dtype], LAYOUTS[layout], CPU)
    assert {x.dtype for x in features} == {DTYPES[dtype]}
    assert all(x.is_contiguous(memory_format=LAYOUTS[layout]) for x in features)
