"""The standard work is seeded, as large as its name says and counted right; the gates refuse wrong results."""

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.ops.boxes import _batched_nms_coordinate_trick

from bench.cases import CASES, SWEEPS, box_coding, decode_keypoints, focal_loss, mask_bce, mask_targets, roi_pool
from bench.cases import match_anchors as match_bench
from bench.cases import nms as nms_bench
from bench.cases import paste_masks as paste_bench
from bench.cases import proposals as proposals_bench
from bench.cases import roi_align as roi_align_bench
from bench.cases._shared import Bench, rois, sized
from bench.contest import DTYPES, LAYOUTS
from bench.rle import decode_rle, encoder
from tmask_kernels.common.pyramid import pyramid_levels
from tmask_kernels.ops.match_anchors import kernels as match
from tmask_kernels.ops.nms.kernels import blocks, padded
from tmask_kernels.ops.roi_align.kernels import forward

CPU = torch.device("cpu")
MB = 1e6


def test_every_case_has_a_small_one_an_aim_and_counted_work() -> None:
    with_aim = {name for name, case in CASES.items() for mode in case.modes if case.aim(mode)}
    without = {"roi-align-one-image", "roi-align-max", "roi-pool-map", "box-coding", "mask-loss", "keypoints"}
    assert with_aim == set(CASES) - without
    for name, case in CASES.items():
        small = case.small()
        assert (type(small), small.name, name) == (type(case), name, case.name)
        assert small != case
        for mode in case.modes:
            assert small.work(case.dtype, mode).bytes > 0


def test_a_cpu_gets_the_reduced_size() -> None:
    case = CASES["roi-align-box-head"]
    for kind, expected in (("cpu", (case.small(), "reduced")), ("cuda", (case, "full"))):
        with mock.patch("bench.cases._shared.device", return_value=torch.device(kind)):
            assert sized(case) == expected


@pytest.mark.parametrize(
    ("name", "mode", "dtype", "megabytes"),
    [
        ("match-anchors", "forward", "fp32", 6.45),
        ("paste-masks", "bool", "fp32", 107),
        ("paste-masks", "packed", "fp32", 13.8),  # a row of 1,333 bits takes 42 words
        ("focal-rpn", "forward", "fp32", 10.7 * 2 / 5),
        ("focal-rpn", "backward", "bf16", 5.4 * 3 / 5),
        ("proposals-rpn", "forward", "bf16", 1.26),
        ("roi-align-box-head", "backward", "bf16", 117.1),
        ("roi-align-map", "backward", "bf16", 92.8),
        ("roi-align-map-adaptive", "forward", "bf16", 91.6),
        ("roi-pool-map", "backward", "bf16", 144),
        ("mask-loss", "backward", "bf16", 33.3),
        ("keypoints", "forward", "bf16", 10.7),
        ("nms-10k", "forward", "fp32", 0.28),
        ("inference-b1", "results", "bf16", 102),
    ],
)
def test_least_bytes(name: str, mode: str, dtype: str, megabytes: float) -> None:
    assert CASES[name].work(dtype, mode).bytes / MB == pytest.approx(megabytes, rel=0.01)


@pytest.mark.parametrize("name", ["roi-align-box-head", "roi-align-map", "roi-align-map-adaptive"])
def test_touched_cells_are_those_that_take_a_gradient(name: str) -> None:
    case = dataclasses.replace(roi_align_bench.CASES[name].small(), channels=1)
    features = [x.double().requires_grad_() for x in case.features(torch.float32, torch.contiguous_format, CPU)]
    boxes = [b.double() for b in case.boxes()]
    if len(features) > 1:
        names = [str(i) for i in range(len(features))]
        pool = torchvision.ops.MultiScaleRoIAlign(names, case.pooled, case.sampling_ratio)
        out = pool(dict(zip(names, features, strict=True)), boxes, [(case.height, case.width)] * case.images)
    else:
        out = torchvision.ops.roi_align(features[0], boxes, case.pooled, case.scales[0], case.sampling_ratio)
    out.sum().backward()
    samples, cells = roi_align_bench.count_touched(case)
    assert cells == sum(int((x.grad != 0).sum()) for x in features)  # type: ignore[operator]
    if case.sampling_ratio:
        assert samples == case.rois * case.pooled**2 * case.sampling_ratio**2


@pytest.mark.parametrize("name", ["roi-align-box-head", "roi-align-mask-head", "roi-align-one-image"])
def test_a_small_pyramid_uses_several_levels(name: str) -> None:
    for case, levels in ((roi_align_bench.CASES[name], 4), (roi_align_bench.CASES[name].small(), 2)):
        assert len(pyramid_levels(case.boxes(), case.scales).unique()) >= levels


def test_the_counts_of_anchors_agree() -> None:
    rpn = proposals_bench.CASES["proposals-rpn"]
    columns = focal_loss.CASES["focal-rpn"].columns
    assert rpn.anchors == match_bench.CASES["match-anchors"].rpn.anchors == columns == 268_569
    assert rpn.candidates == sum(nms_bench.CASES["nms-rpn"].lengths) // 2 == 8_819


def test_rois_are_seeded_and_lie_in_the_image() -> None:
    boxes = rois(2, 500, 800, 1344)
    assert torch.equal(boxes, rois(2, 500, 800, 1344))
    assert not torch.equal(boxes, rois(2, 500, 800, 1344, seed=1))
    assert bool(((boxes >= 0) & (boxes <= torch.tensor([1344, 800, 1344, 800]))).all())
    scale = (boxes[..., 2:] - boxes[..., :2]).prod(-1).sqrt()
    assert float(scale.max()) > 300
    assert float(scale.quantile(0.1)) < 50


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_features_have_the_dtype_and_layout(dtype: str, layout: str) -> None:
    features = roi_align_bench.CASES["roi-align-box-head"].small().features(DTYPES[dtype], LAYOUTS[layout], CPU)
    assert {x.dtype for x in features} == {DTYPES[dtype]}
    assert all(x.is_contiguous(memory_format=LAYOUTS[layout]) for x in features)


@pytest.mark.parametrize("small", [True, False], ids=["reduced", "full"])
def test_every_box_overlaps_an_anchor(small: bool) -> None:
    case = match_bench.CASES["match-anchors"]
    anchors, boxes = (case.small() if small else case).inputs(CPU)
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    for one in boxes.flatten(0, 1):
        assert ((centres > one[:2]) & (centres < one[2:])).all(1).any()


@pytest.mark.parametrize("name", ["nms-rpn", "nms-classes", "nms-1k", "nms-10k", "nms-10k-dense"])
def test_nms_keeps_the_share_it_says(name: str) -> None:
    case = nms_bench.CASES[name]
    boxes, scores, valid = case.inputs(CPU)
    assert all(torch.equal(a, b) for a, b in zip(case.inputs(CPU), (boxes, scores, valid), strict=True))
    kept = 0
    for box, score, fits in zip(boxes, scores, valid, strict=True):
        assert len(score[fits].unique()) == int(fits.sum()), "a tie leaves the answer open"
        kept += len(torchvision.ops.nms(box[fits], score[fits], case.threshold))
    assert kept / sum(case.lengths) == pytest.approx(case.kept, rel=0.2)
    assert float(scores.median()) < 0.1, "most scores are low"
    if name == "nms-classes":
        assert float(valid.float().mean()) == pytest.approx(proposals_bench.CANDIDATES, rel=0.2)


# ---- The gate of NMS


@pytest.fixture(scope="module")
def segment() -> tuple[Tensor, Tensor, Tensor]:
    boxes, scores, _ = nms_bench.CASES["nms-1k"].inputs(CPU)
    return boxes[0], scores[0], torchvision.ops.nms(boxes[0], scores[0], 0.5)


def held(segment: tuple[Tensor, Tensor, Tensor], kept: Tensor, limit: int = 1000) -> tuple[int, int]:
    """Boxes that are kept against the definition, and boxes that are dropped against it."""
    boxes, scores, _ = segment
    valid = torch.ones_like(scores, dtype=torch.bool)
    return nms_bench.count_faults(boxes, scores, valid, kept, 0.5, limit, 0.0)[:2]


def test_the_gate_counts_the_faults_of_an_nms(segment: tuple[Tensor, Tensor, Tensor]) -> None:
    scores, kept = segment[1], segment[2]
    assert held(segment, kept) == held(segment, kept[:100], limit=100) == (0, 0)
    assert held(segment, kept[:-1])[1] >= 1
    too_many, too_few = held(segment, kept[:100])
    assert (too_many, too_few >= len(kept) - 100) == (0, True), "and what those would have removed"
    dropped = torch.ones_like(scores, dtype=torch.bool).index_fill(0, kept, False).nonzero()[0]
    more = torch.cat([kept, dropped])
    assert held(segment, more[scores[more].argsort(descending=True)])[0] == 1
    with pytest.raises(AssertionError, match="falling score"):
        held(segment, kept.flip(0))


def test_the_gate_counts_in_parts(segment: tuple[Tensor, Tensor, Tensor]) -> None:
    dropped = torch.cat([segment[2][:50], segment[2][51:]])
    whole = held(segment, dropped)
    with mock.patch.object(nms_bench, "PAIRS", 5000):
        assert held(segment, segment[2]) == (0, 0)
        assert held(segment, dropped) == whole
        with mock.patch.object(nms_bench, "ALL_PAIRS", 100_000):
            assert held(segment, segment[2]) == (0, 0)
            assert held(segment, segment[2][::2])[1] > 0


def test_only_a_peer_that_moves_boxes_may_err_in_a_thousandth() -> None:
    """On a GPU `batched_nms` moves the levels of an image apart, which changes one box of nms-rpn."""
    case = nms_bench.CASES["nms-rpn"]
    given = nms_bench.Given(case, *case.inputs(CPU))
    _, boxes, scores, valid = given
    S, K = scores.shape
    parts = zip(torch.arange(S * K).split(case.segments_an_image * K), valid.split(case.segments_an_image), strict=True)
    rows = [positions[fits.flatten()] for positions, fits in parts]
    boxes, scores = boxes.view(-1, 4), scores.view(-1)
    moved = [_batched_nms_coordinate_trick(boxes[r], scores[r], r // K, case.threshold) for r in rows]
    nms_bench.check(nms_bench.Flat(moved, rows, moved=True), given, "torchvision")
    with pytest.raises(AssertionError, match=r"0 boxes kept .* 1 dropped"):
        nms_bench.check(nms_bench.Flat(moved, rows), given, "torchvision")
    with pytest.raises(AssertionError, match=r", \d\d dropped that none removes"):
        nms_bench.check(nms_bench.Flat([moved[0][20:], moved[1]], rows, moved=True), given, "torchvision")

    one = dataclasses.replace(nms_bench.CASES["nms-1k"], lengths=(100,), keep=100)
    apart = torch.arange(100.0)[:, None] * 10 + torch.tensor([0.0, 0.0, 5.0, 5.0])
    alone = nms_bench.Given(one, apart[None], torch.linspace(1, 0.1, 100)[None], torch.ones(1, 100).bool())
    nms_bench.check((torch.arange(100)[None], torch.tensor([100])), alone, "triton")
    with pytest.raises(AssertionError, match=r", 1 dropped"):
        nms_bench.check((torch.cat([torch.arange(99), torch.tensor([-1])])[None], torch.tensor([99])), alone, "triton")


# ---- The other gates


def test_the_gate_of_roi_align_refuses_a_shifted_tap_and_is_loose_for_half_of_peers_alone() -> None:
    contest = roi_align_bench.BENCH.contest("roi-align-box-head", "forward", "bf16", "nhwc")
    given = contest.inputs()
    truth = contest.truth(given)
    right = contest.providers["torchvision"](given)()
    contest.check(right, truth, "torchvision")
    shifted = given._replace(boxes=given.boxes + torch.tensor([1.0, 0, 1, 0]))
    off = right.half() + 0.1
    contest.check(off, truth, "torchvision")
    for wrong, provider in ((contest.providers["torchvision"](shifted)(), "torchvision"), (off, "triton")):
        with pytest.raises(AssertionError, match="value 0: max error"):
            contest.check(wrong, truth, provider)
    with pytest.raises(AssertionError, match="value 0: max error"):
        contest.check(-off, truth, "torchvision")


@pytest.mark.parametrize(
    ("bench", "name", "mode", "dtype"),
    [
        (focal_loss.BENCH, "focal-rpn", "backward", "bf16"),
        (mask_bce.BENCH, "mask-loss", "backward", "fp32"),
        (mask_targets.BENCH, "mask-loss", "targets", "fp32"),
        (box_coding.BENCH, "box-coding", "forward", "fp32"),
        (box_coding.BENCH, "box-coding", "backward", "fp32"),
        (decode_keypoints.BENCH, "keypoints", "forward", "fp32"),
        (roi_pool.BENCH, "roi-pool-map", "backward", "fp32"),
    ],
)
def test_a_gate_refuses_a_value_that_is_off_by_a_fiftieth(bench: Bench, name: str, mode: str, dtype: str) -> None:
    contest = bench.contest(name, mode, dtype, "nchw")
    given = contest.inputs()
    truth, right = contest.truth(given), contest.providers["reference"](given)()
    contest.check(right, truth, "triton")
    wrong = tuple(x + 0.02 * x.abs().max() for x in ([right] if isinstance(right, Tensor) else right))
    with pytest.raises(AssertionError):
        contest.check(wrong[0] if isinstance(right, Tensor) else wrong, truth, "triton")


def test_the_gate_of_proposals_refuses_moved_and_missing_boxes() -> None:
    boxes, scores, counts = rois(2, 40, 800, 1344), torch.rand(2, 40), torch.tensor([40, 30])
    labels = torch.zeros(2, 40, dtype=torch.int64)

    def check(got: Any, *true: Tensor, ties: bool = False, provider: str = "triton") -> None:
        proposals_bench.check(got, (true or (boxes, scores, counts), not ties), provider)

    check((boxes, scores, counts))
    check(([boxes[0], boxes[1, :30]], [scores[0], scores[1, :30]]))
    with pytest.raises(AssertionError, match=r"image 0: 0\.0% of the true found"):
        check((boxes + 1, scores, counts))
    fewer = (boxes, scores, counts - torch.tensor([0, 1]))
    check(fewer, ties=True, provider="torchvision")
    for ties, provider in ((True, "triton"), (False, "torchvision")):
        with pytest.raises(AssertionError, match="image 1: 29, not 30"):
            check(fewer, ties=ties, provider=provider)
    with pytest.raises(AssertionError, match="image 0"):
        check((boxes, scores, labels + 1, counts), boxes, scores, labels, counts)


def test_a_wrong_match_is_found() -> None:
    bench = match_bench.BENCH
    given = bench.inputs(match_bench.CASES["match-anchors"].small(), "forward", "fp32", "-")
    truth, right = bench.truth(given), bench.ours(given, "reference")
    bench.check(right, truth, "triton")
    assert {int(n) for n in truth.matches.clamp(max=0).unique()} == {-2, -1, 0}
    bench.check([(m.clamp(min=0), (m >= 0).long() - (m == -2).long()) for m in right[0]], truth, "detectron2")
    matched = int(truth.matches[truth.sure & (truth.matches >= 0)][0])
    for old, new in ((-2, -1), (-1, -2), (matched, matched + 1), (matched, -1)):
        with pytest.raises(AssertionError, match="matches"):
            bench.check([torch.where(m == old, new, m) for m in right[0]], truth, "torchvision")
    with pytest.raises(AssertionError, match="ious"):
        bench.check((right[0], right[1] + 1e-5), truth, "triton")


@pytest.mark.parametrize("output", ["bool", "packed", "rle"])
def test_a_wrong_pixel_is_found(output: str) -> None:
    bench = paste_bench.BENCH
    given = bench.inputs(paste_bench.CASES["paste-masks"].small(), output, "fp32", "-")
    truth, out = bench.truth(given), bench.ours(given, "reference")
    bench.check(out, truth, "triton")
    index = tuple(i[None] for i in (truth.inside & truth.sure).nonzero()[0])
    flipped = truth._replace(inside=truth.inside.index_put(index, torch.tensor(False)))
    with pytest.raises(AssertionError, match="1 pixels"):
        bench.check(out, flipped, "triton")
    bench.check(out, flipped._replace(sure=truth.sure.index_put(index, torch.tensor(False))), "triton")


def test_run_lengths_are_written_and_drawn_as_pycocotools_draws_them() -> None:
    bound = torch.tensor([0.5, 0.02, -1, 2])[:, None, None]  # half, nearly all, all, none of the pixels
    masks = torch.rand(4, 37, 23, generator=torch.Generator().manual_seed(0)) > bound
    for mask, rle in zip(masks, encoder()(masks), strict=True):
        assert np.array_equal(coco_mask.decode(rle), mask.numpy())
        assert torch.equal(decode_rle(rle), mask)


# ---- The sweeps

STEPS = {"step": 512, "tile": 128, "programs": 128, "num_warps": 16}


@pytest.mark.parametrize(
    ("sweep", "launch", "module", "function", "seen", "expected"),
    [
        ("roi_align-forward", "bins=16,groups=2,warps=4", forward, "multiscale_roi_align",
         lambda: forward.pick_tile(256, (7, 7), 2, True), forward.Tile(16, 2, 64, 4)),
        ("nms", "block=128,warps=8", padded, "padded_nms", lambda: (padded.BLOCK, padded.NUM_WARPS), (128, 8)),
        ("nms-levels", "step=512,tile=128,programs=128,num_warps=16", padded, "padded_nms",
         lambda: padded.strategy(1, 1000).keywords["launch"], blocks.Launch(**STEPS)),
        ("nms-list", "step=512,tile=128,programs=128,num_warps=16", padded, "padded_nms",
         lambda: padded.strategy(1, 1000).keywords["launch"], blocks.Launch(**STEPS)),
        ("match_anchors", "anchors=128,warps=2", match, "match_anchors",
         lambda: match.pick_block(), match.Block(128, 2)),
    ],
    ids=["roi_align", "nms", "nms-levels", "nms-list", "match_anchors"],
)  # fmt: skip
def test_a_sweep_launches_what_it_names(
    sweep: str, launch: str, module: Any, function: str, seen: Callable[[], Any], expected: Any
) -> None:
    contest = SWEEPS[sweep]()
    assert len(contest.providers) >= 12
    assert not any("/" in name for name in contest.providers), "a slash parts a key"
    with mock.patch.object(module, function, side_effect=lambda *_: seen()):
        assert contest.providers[f"triton[{launch}]"](contest.inputs())() == expected
