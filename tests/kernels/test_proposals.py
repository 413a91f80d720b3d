"""rpn_proposals against torchvision's RPN; the kernels against the reference; its own rules: order, padding, NaN."""

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers

from tests.kernels.tools import INF, NAN, assert_same, each_mutant, slow
from tests.launches import Count, count_call
from tests.mutation import mutant
from tmask_kernels import AnchorSpec, make_anchors, padded_nms, rpn_proposals
from tmask_kernels.backend import interpreter_enabled
from tmask_kernels.ops.anchors.reference import level_strides
from tmask_kernels.ops.nms.kernels import padded as nms_kernels
from tmask_kernels.ops.proposals import op
from tmask_kernels.ops.proposals import reference as proposals
from tmask_kernels.ops.proposals.kernels import candidates as kernels_candidates
from tmask_kernels.ops.proposals.kernels import select as kernels_select
from tmask_kernels.testing import assert_close, guarded, poisoned_empty

SIZES = ((16.0,), (32.0,), (64.0,))
RATIOS = (0.5, 1.0, 2.0)
SPEC = AnchorSpec(SIZES, RATIOS, rounded=True)
PADDED = (96, 128)
GRIDS = [(24, 32), (12, 16), (6, 8)]
IMAGE_SIZES = [(96, 120), (75, 128)]
SETTINGS = {"padded_size": PADDED, "pre_nms_top_n": 100, "post_nms_top_n": 150, "nms_threshold": 0.6, "min_size": 1.0,
            "score_threshold": 0.1}  # fmt: skip


def maps(seed: int = 0, grids=GRIDS) -> tuple[list[Tensor], list[Tensor]]:
    """Logits [2, 3, H, W] without ties and deltas [2, 12, H, W] that move and stretch anchors a good deal."""
    generator = torch.Generator().manual_seed(seed)
    logits, deltas = [], []
    for height, width in grids:
        count = 2 * 3 * height * width
        logits.append((torch.randperm(count, generator=generator) / count * 8 - 4).view(2, 3, height, width))
        deltas.append(torch.randn(2, 12, height, width, generator=generator) * 0.7)
    return logits, deltas


def torchvision_proposals(logits, deltas, sizes, settings) -> tuple[list[Tensor], list[Tensor]]:
    """Boxes and probabilities of each image, by torchvision's RPN."""
    generator = AnchorGenerator(SIZES, (RATIOS,) * 3)
    top = dict.fromkeys(("training", "testing"), settings["pre_nms_top_n"])
    keep = dict.fromkeys(("training", "testing"), settings["post_nms_top_n"])
    limits = settings["nms_threshold"], settings["score_threshold"]
    rpn = RegionProposalNetwork(generator, None, 0.7, 0.3, 256, 0.5, top, keep, *limits)
    rpn.min_size = settings["min_size"]
    anchors = generator(ImageList(torch.zeros(2, 3, *PADDED), sizes), logits)
    flat_logits, flat_deltas = concat_box_prediction_layers(list(logits), list(deltas))
    boxes = rpn.box_coder.decode(flat_deltas, anchors).view(2, -1, 4)
    return rpn.filter_proposals(boxes, flat_logits, sizes, [x[0].numel() for x in logits])


def call(logits, deltas, device, backend=None, function=rpn_proposals, **changes):
    sizes = torch.tensor(IMAGE_SIZES, device=device)
    logits, deltas = [x.to(device) for x in logits], [x.to(device) for x in deltas]
    kwargs = {"spec": SPEC, **SETTINGS} | changes
    return function(logits, deltas, sizes, backend=backend, **kwargs)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"nms_threshold": 0.3, "post_nms_top_n": 40},
        {"score_threshold": 0.9},
        slow({"pre_nms_top_n": 10_000, "post_nms_top_n": 3000, "min_size": 20.0}),
    ],
    ids=["plain", "few", "scores", "all"],
)
def test_equals_torchvision(device, nms_backend, changes, monkeypatch):
    # One program a segment, however long: the interpreter takes three times as long for the many of the other way.
    monkeypatch.setattr(nms_kernels, "strategy", lambda S, K: nms_kernels.padded_nms_segments)
    logits, deltas = maps()
    boxes, scores, counts = call(logits, deltas, device, nms_backend, **changes)
    settings = SETTINGS | changes
    P = settings["post_nms_top_n"]
    assert (boxes.shape, scores.shape, counts.shape) == ((2, P, 4), (2, P), (2,))
    assert (boxes.dtype, scores.dtype, counts.dtype) == (torch.float32, torch.float32, torch.int64)
    expected = torchvision_proposals(logits, deltas, IMAGE_SIZES, settings)
    for n, (expected_boxes, expected_scores) in enumerate(zip(*expected, strict=True)):
        count = len(expected_boxes)
        assert 10 < count <= P
        assert counts[n] == count
        # torchvision computes on the CPU; the exp and the sigmoid of another device or of Triton round differently.
        if nms_backend == "triton" or device.type == "cuda":
            assert_close(boxes[n, :count].cpu(), expected_boxes.double())
            assert_close(scores[n, :count].cpu(), expected_scores.double())
        else:
            assert torch.equal(boxes[n, :count].cpu(), expected_boxes)
            assert torch.equal(scores[n, :count].cpu(), expected_scores)
        assert not boxes[n, count:].any()
        assert not scores[n, count:].any()


MUTANTS = {
    "min size": ("good &= _at_least(box, min_size) & ", "good &= "),
    "score": ("& (score >= score_threshold)", ""),
    "anchor": ("cell, anchor = index // A, index % A", "cell, anchor = index // A, index * 0"),
    "channel": ("channel = anchor[..., None] * 4 + torch", "channel = anchor[..., None] + 3 * torch"),
    "cell": ("(cell // W)[..., None], (cell % W)[..., None]", "(cell % W)[..., None] % 6, (cell // W)[..., None]"),
    "order": ("logits.permute(0, 2, 3, 1)", "logits.permute(0, 3, 2, 1)"),
    "padding": ("F.pad(good, (0, pad))", "F.pad(good, (0, pad), value=True)"),
    "segments": ("marked = _mark(kept, K).view(images, G, K)", "marked = _mark(kept, K).view(images, G, K).flip(1)"),
    "sigmoid": ("score = torch.sigmoid(logit)", "score = logit"),
    "kept": ("torch.where(marked, scores.reshape(images, G, K), -torch.inf)", "scores.reshape(images, G, K)"),
    "row": ("row = segment * K + box", "row = segment * G + box"),
}


@each_mutant(MUTANTS)
def test_a_broken_reference_fails(tmp_path, name):
    broken = mutant(proposals, *MUTANTS[name], tmp_path, seen_from=op)
    strict = {"min_size": 20.0, "score_threshold": 0.9, "pre_nms_top_n": 200}  # the last level has 144 anchors
    spec = broken.AnchorSpec(SIZES, RATIOS, rounded=True)
    expected = call(*maps(), torch.device("cpu"), "reference", **strict)
    with pytest.raises(AssertionError):
        assert_same(
            call(*maps(), torch.device("cpu"), "reference", broken.rpn_proposals, spec=spec, **strict), expected
        )


TINY = [(5, 4), (2, 3), (1, 2)]
CONVENTIONS = {
    # 61 // 5 and 61 // 2 pixels a cell downwards, 40 // 4 and 40 // 3 across.
    "torchvision": SPEC,
    "detectron2": AnchorSpec(SIZES, RATIOS, strides=(8, 16, 32)),
    "offset": AnchorSpec(SIZES, RATIOS, strides=(8, 16, 32), offset=0.5),
    "uneven": AnchorSpec(((16.0,), (20.0, 33.0), (64.0,)), (0.7, 1.5), offset=0.5),
    "flat": AnchorSpec(((0.7,), (0.7, 9.0), (9.0,)), (0.5, 2.0), rounded=True),
}


def tiny_maps(spec: AnchorSpec, grids=TINY, dtype=torch.float32, images: int = 2, seed: int = 0):
    """Logits and deltas of each level between guard bands of NaN, with ties among the logits."""
    generator = torch.Generator().manual_seed(seed)
    logits, deltas = [], []
    for (height, width), A in zip(grids, spec.anchors_per_cell(), strict=True):
        drawn = torch.randn(images, 5 * A, height, width, generator=generator)
        logits.append(guarded((drawn[:, :A] * 4).round().div(2).to(dtype)))
        deltas.append(guarded((drawn[:, A:] * 0.7).to(dtype)))
    return logits, deltas


LOOSE = {"min_size": 0.0, "score_threshold": 0.0}


def check_candidates(module, device, logits, deltas, spec=SPEC, *, padded=(61, 40), sizes=None, **limits):
    """The kernels' candidates of `padded` images against the reference's: the same boxes in the same order."""
    logits, deltas = [guarded(x, device) for x in logits], [guarded(x, device) for x in deltas]
    sizes = torch.tensor([[60, 33], [47, 40]], device=device)[: len(logits[0])] if sizes is None else sizes
    limits = {"top_n": 30, "scale_clamp": 1.5, "min_size": 9.0, "score_threshold": 0.3} | limits
    strides = level_strides(spec, [(x.shape[2], x.shape[3]) for x in logits], padded)
    half_sides = [side for level in spec.half_sides for pair in level for side in pair]
    steps = [float(step) for pair in strides for step in pair]
    with poisoned_empty():
        got = module.rpn_candidates_fwd(logits, deltas, sizes, half_sides, steps, spec.offset, **limits)
    expected = proposals.rpn_candidates_reference(logits, deltas, sizes, spec, strides, **limits)
    for name, ours, theirs in zip(("boxes", "scores", "valid"), got, expected, strict=True):
        assert_close(ours, theirs.double() if theirs.is_floating_point() else theirs, name=name)
    return expected


def odd_maps() -> tuple[list[Tensor], list[Tensor]]:
    """NaN and infinities among the logits and the deltas, zeros of both signs, and a number that is not normal."""
    logits, deltas = tiny_maps(CONVENTIONS["flat"])
    odd = torch.tensor([0.0, -1.5, INF, NAN, -0.0, 2.0, -INF, 2.0, -1.25, 1e-40, -NAN, 90.0, -90.0, 0.0])
    logits[0][0].view(-1)[: len(odd)] = odd
    for i, value in enumerate((NAN, INF, -INF)):
        for channel in range(4):
            deltas[0][1, channel, i, channel] = value
            deltas[1][1, channel, i % 2, channel % 3] = value
    return logits, deltas


def of_one_convolution() -> tuple[list[Tensor], list[Tensor]]:
    """Logits and deltas as slices of one map, and levels of different dtypes."""
    whole = [torch.cat(pair, 1) for pair in zip(*tiny_maps(SPEC), strict=True)]
    whole[1] = whole[1].half()
    return [x[:, :3] for x in whole], [x[:, 3:] for x in whole]


CANDIDATES = {
    **{name: lambda spec=spec: (*tiny_maps(spec), spec) for name, spec in CONVENTIONS.items()},
    "bfloat16": lambda: tiny_maps(SPEC, dtype=torch.bfloat16),
    "float16": lambda: (*tiny_maps(CONVENTIONS["uneven"], dtype=torch.float16), CONVENTIONS["uneven"]),
    "channels_last": lambda: [[x.to(memory_format=torch.channels_last) for x in given] for given in tiny_maps(SPEC)],
    "one convolution": of_one_convolution,
    "no image": lambda: tiny_maps(SPEC, images=0),
    "empty levels": lambda: tiny_maps(SPEC, [(0, 3), (2, 0), (0, 0)]),
    "an empty level": lambda: tiny_maps(SPEC, [(2, 2), (0, 0), (1, 1)]),
}


@pytest.mark.parametrize("name", CANDIDATES)
def test_candidates_equal_the_reference(device, name):
    _, _, valid = check_candidates(kernels_candidates, device, *CANDIDATES[name]())
    assert valid.any() == (name not in ("no image", "empty levels"))
    assert not valid.all() or not valid.numel()


def test_candidates_over_several_blocks(device):
    """546 anchors are more than a block of keys, 150 candidates more than a block of slots."""
    given = tiny_maps(SPEC, [(13, 14), (0, 3), (1, 2)], images=1)
    _, _, valid = check_candidates(kernels_candidates, device, *given, top_n=150)
    assert valid[0].any()
    assert not valid[1].any()
    assert not valid[2, 6:].any()


def test_candidates_of_odd_input(device):
    boxes, _, valid = check_candidates(kernels_candidates, device, *odd_maps(), CONVENTIONS["flat"], **LOOSE, top_n=60)
    assert boxes.isfinite().all()
    assert not valid.all()


BROKEN_CANDIDATES = {
    "length": ("real = index < decode_int(of_level(level, lengths, NUM_LEVELS))", "real = index >= 0"),
    "cell": ("return index % A, cell // W, cell % W", "return index % A, cell % W, cell // W"),
    "channel stride": ("channel.to(tl.int64) * decode_int(of_level(level, strides[1]",
                       "channel.to(tl.int64) * decode_int(of_level(level, strides[2]"),
    "image": ("offset = image * decode_int(", "offset = 0 * decode_int("),
    "level": ("image, level = row // NUM_LEVELS, row % NUM_LEVELS\n    mask",
              "image, level = row // NUM_LEVELS, row % NUM_LEVELS // 2 * 2\n    mask"),
    "sides": ("half_h = tl.where(shape == i, half_heights[i]", "half_h = tl.where(shape == i, half_widths[i]"),
    "shape": ("shape = anchor + decode_int(of_level(level, first_shapes, NUM_LEVELS)).to(tl.int32)", "shape = anchor"),
    "step": ("y.to(tl.float32) * of_level(level, steps_y", "y.to(tl.float32) * of_level(level, steps_x"),
    "shift": ("+ of_level(level, shifts_x, NUM_LEVELS)", ""),
    "delta": ("deltas_ptr + next_delta * 2", "deltas_ptr + next_delta * 3"),
    "anchor": ("_offset(image, anchor * 4, y", "_offset(image, anchor, y"),
    "clip": ("clipped(x2, limit_x)", "tl.where(x2 < 0.0, 0.0, x2)"),
    "height and width": ("sizes_ptr + image * 2 + 1", "sizes_ptr + image * 2"),
    "side": ("(y2 - y1 >= min_size)", "(y2 - y1 >= 0)"),
    "score": ("& (score >= score_threshold)", ""),
    "NaN": ("good = real & (is_nan == 0) &", "good = real &"),
    "NaN box": ("empty = bad | (real == 0)", "empty = real == 0"),
    "sigmoid": ("tl.where(logit < 0, shrunk, 1.0)", "1.0"),
    "padding": ("real = mask & (slot < decode_int(of_level(level, lengths, NUM_LEVELS)))", "real = mask"),
    "mask": ("tl.store(scores_ptr + rows, score, mask=mask)", "tl.store(scores_ptr + rows, score)"),
}  # fmt: skip
FAST = {"length", "level", "shift", "clip", "NaN"}


@each_mutant(BROKEN_CANDIDATES, FAST)
def test_a_broken_kernel_of_candidates_fails(device, tmp_path, name):
    module = mutant(kernels_candidates, *BROKEN_CANDIDATES[name], tmp_path)
    spec = CONVENTIONS["flat" if name.startswith("NaN") else "uneven"]
    given = odd_maps() if name.startswith("NaN") else tiny_maps(spec)
    with pytest.raises((AssertionError, IndexError)):
        check_candidates(module, device, *given, spec, **(LOOSE if name.startswith("NaN") else {}))


def test_ties_go_by_level_then_index(device, nms_backend):
    """All logits equal and nothing overlaps: the anchors of the first level come first, in their order."""
    spec = AnchorSpec(((2.0,), (2.0,)), (1.0,), strides=(4, 16))
    logits = [torch.zeros(1, 1, 4, 4, device=device), torch.zeros(1, 1, 2, 2, device=device)]
    deltas = [torch.zeros(1, 4, 4, 4, device=device), torch.zeros(1, 4, 2, 2, device=device)]
    boxes, scores, counts = rpn_proposals(
        logits, deltas, torch.tensor([[100, 100]], device=device), spec, padded_size=(100, 100), pre_nms_top_n=10,
        post_nms_top_n=12, nms_threshold=0.7, min_size=0.0, score_threshold=0.0, backend=nms_backend,
    )  # fmt: skip
    anchors = make_anchors(spec, [(4, 4), (2, 2)], (100, 100), device=device).clamp(min=0)
    assert counts.tolist() == [12]
    assert torch.equal(boxes[0], torch.cat([anchors[:10], anchors[16:18]]))
    assert (scores == 0.5).all()


def test_nan_is_no_proposal(device, nms_backend):
    logits, deltas = maps()
    logits[0][0, 1, 3, 4] = NAN
    logits[0][0, 0, 0, 0] = 50.0
    deltas[0][0, 2, 0, 0] = NAN
    logits[1][0, 0, 1, 1] = 60.0
    deltas[1][0, 2, 1, 1] = INF
    boxes, scores, counts = call(logits, deltas, device, nms_backend, min_size=0.0, score_threshold=0.0)
    assert boxes.isfinite().all()
    assert scores.isfinite().all()
    assert (scores[0, :2] == torch.tensor([1.0, scores[0, 1].item()], device=device)).all()
    assert scores[0, 1] < 0.99, "the box with NaN deltas and a logit of 50 is there"
    assert counts[0] > 10


def test_nothing_is_left(device, nms_backend):
    """No proposal passes the filters; all levels are empty."""
    for given, changes in ((maps(grids=TINY), {"min_size": 500.0}), (maps(grids=[(0, 2), (1, 0), (0, 0)]), {})):
        boxes, scores, counts = call(*given, device, nms_backend, **changes)
        assert (boxes.shape, scores.shape, counts.tolist()) == ((2, 150, 4), (2, 150), [0, 0])
        assert not boxes.any()
        assert not scores.any()


def test_top_indices_orders_ties_signs_and_nan():
    scores = torch.tensor([[0.0, -1.5, INF, NAN, -0.0, 2.0, -INF, 2.0, -1.25, 1e-40]])
    order = [2, 5, 7, 9, 0, 4, 8, 1, 6, 3]
    assert proposals.top_indices(scores, 10)[0].tolist() == order
    assert proposals.top_indices(-scores, 10)[0].tolist() == [6, 1, 8, 0, 4, 9, 5, 7, 2, 3]
    assert proposals.top_indices(scores, 4)[0].tolist() == order[:4]
    many = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = torch.sort(many.float(), dim=1, descending=True, stable=True).indices
    assert torch.equal(proposals.top_indices(many, 700), expected[:, :700])


@pytest.mark.skipif(not interpreter_enabled(), reason="counts through Triton's interpreter")
def test_few_launches():
    """Around the NMS: keys, their top-k and the candidates; keys of what is kept, their top-k and the rows taken."""
    logits, deltas = maps(grids=TINY)
    whole = count_call(lambda: call(logits, deltas, torch.device("cpu"), "triton"))
    boxes, scores = torch.zeros(6, 60, 4), torch.zeros(6, 60)
    valid = scores > 0
    nms = count_call(lambda: padded_nms(boxes, scores, 0.6, valid=valid, max_output=60, backend="triton"))
    # `call` makes the tensor of image sizes, which no dispatch shows.
    assert whole == Count(ops=nms.ops + 2, kernels=nms.kernels + 4)


# The best of what NMS kept


def kept_boxes(images: int = 2, segments: int = 3, count: int = 9, kept: int = 5, seed: int = 0):
    """Boxes [S, K, 4], scores [S, K] that tie often, and kept [S, M] by falling score, -1 behind."""
    generator = torch.Generator().manual_seed(seed)
    S = images * segments
    scores = torch.randint(-3, 4, (S, count), generator=generator) / 4
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :kept]
    filled = torch.randint(0, kept + 1, (S, 1), generator=generator)
    kept_rows = torch.where(torch.arange(order.shape[1]) < filled, order, -1)
    return torch.rand(S, count, 4, generator=generator), scores, kept_rows


def check_select(module, device, boxes, scores, kept, images: int, limit: int) -> None:
    boxes, scores, kept = (guarded(t.to(device)) for t in (boxes, scores, kept))
    for box_first in (False, True):
        with poisoned_empty():
            got = module.select_best_fwd(boxes, scores, kept, images, limit, box_first)
        expected = proposals.select_best_reference(boxes, scores, kept, images, limit, box_first)
        assert [t.dtype for t in got] == [torch.float32, torch.float32, torch.int64, torch.int64]
        assert_same(got, expected)


SELECTED = {
    "plain": ({}, 7),
    "one": ({}, 1),
    "more than there are": ({}, 40),
    "blocks": ({"images": 1, "segments": 2, "count": 400, "kept": 300}, 200),
    "no images": ({"images": 0}, 5),
    "no segments": ({"segments": 0}, 5),
    "no outputs": ({"kept": 0}, 5),
    "no boxes": ({"count": 0, "kept": 0}, 5),
}


@pytest.mark.parametrize("name", SELECTED)
def test_the_best_equal_the_reference(device, name):
    sizes, limit = SELECTED[name]
    check_select(kernels_select, device, *kept_boxes(**sizes), sizes.get("images", 2), limit)


def test_nothing_is_kept(device):
    boxes, scores, kept = kept_boxes()
    kept[:3] = -1
    check_select(kernels_select, device, boxes, scores, kept, 2, 7)


def test_scores_of_every_kind(device):
    """Signed zeros tie, a number that is not normal stands over them."""
    scores = torch.tensor([[-0.0, 1e-40, INF, 0.0, -1e-40, 3.4e38, -0.0, -3.4e38, -1.5, 2.0]])
    kept = torch.sort(scores, dim=1, descending=True, stable=True).indices
    check_select(kernels_select, device, torch.rand(1, 10, 4), scores, kept, 1, 10)


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


BROKEN_SELECTION = {
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


@each_mutant(BROKEN_SELECTION)
def test_a_broken_kernel_of_the_best_fails(device, tmp_path, name):
    module = mutant(kernels_select, *BROKEN_SELECTION[name], tmp_path)
    boxes, scores, kept = kept_boxes()
    kept[:3] = -1
    scores[3, :4] = torch.tensor([-0.0, 1.0, 0.0, -1.0])
    kept[3] = torch.tensor([1, 0, 2, 3, -1])
    with pytest.raises((AssertionError, IndexError)):
        check_select(module, device, boxes, scores, kept, 2, 20)
