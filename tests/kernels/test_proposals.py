"""rpn_proposals against torchvision's RPN, and its own rules: order, padding, NaN, layout, no synchronisation."""

from pathlib import Path

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers
from torchvision.ops import clip_boxes_to_image

from tests.launches import Count, count_call
from tests.model.sync import count_blocking
from tests.mutation import mutant
from tmask_kernels import AnchorSpec, make_anchors, padded_nms, rpn_proposals
from tmask_kernels.backend import interpreter_enabled
from tmask_kernels.ops.anchors.reference import level_strides
from tmask_kernels.ops.nms.kernels import padded as nms_kernels
from tmask_kernels.ops.proposals import op
from tmask_kernels.ops.proposals import reference as proposals
from tmask_kernels.ops.proposals.kernels import candidates as kernels_candidates
from tmask_kernels.testing import assert_close, guarded, poisoned_empty

# The interpreter's numpy warns where padding gives 0 / 0.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

BACKENDS = ["torchvision", "reference", "triton"]
SIZES = ((16.0,), (32.0,), (64.0,))
RATIOS = (0.5, 1.0, 2.0)
SPEC = AnchorSpec(SIZES, RATIOS, rounded=True)
PADDED = (96, 128)
GRIDS = [(24, 32), (12, 16), (6, 8)]
IMAGE_SIZES = [(96, 120), (75, 128)]
SETTINGS = {"padded_size": PADDED, "pre_nms_top_n": 100, "post_nms_top_n": 150, "nms_threshold": 0.6, "min_size": 1.0,
            "score_threshold": 0.1}  # fmt: skip


def maps(seed: int = 0, grids=GRIDS) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits [2, 3, H, W] without ties and deltas [2, 12, H, W] that move and stretch anchors a good deal."""
    generator = torch.Generator().manual_seed(seed)
    logits, deltas = [], []
    for height, width in grids:
        count = 2 * 3 * height * width
        logits.append((torch.randperm(count, generator=generator) / count * 8 - 4).view(2, 3, height, width))
        deltas.append(torch.randn(2, 12, height, width, generator=generator) * 0.7)
    return logits, deltas


def torchvision_rpn(logits, deltas, sizes, settings):
    """Its RPN, all its decoded boxes [2, A, 4], its logits [2 * A, 1] and the number of anchors of each level."""
    generator = AnchorGenerator(SIZES, (RATIOS,) * 3)
    top = {"training": settings["pre_nms_top_n"], "testing": settings["pre_nms_top_n"]}
    keep = {"training": settings["post_nms_top_n"], "testing": settings["post_nms_top_n"]}
    rpn = RegionProposalNetwork(
        generator, None, 0.7, 0.3, 256, 0.5, top, keep, settings["nms_threshold"], settings["score_threshold"]
    )
    rpn.min_size = settings["min_size"]
    anchors = generator(ImageList(torch.zeros(2, 3, *PADDED), sizes), logits)
    flat_logits, flat_deltas = concat_box_prediction_layers(list(logits), list(deltas))
    boxes = rpn.box_coder.decode(flat_deltas, anchors).view(2, -1, 4)
    return rpn, boxes, flat_logits, [x[0].numel() for x in logits]


def torchvision_proposals(logits, deltas, sizes, settings) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    rpn, boxes, flat_logits, counts = torchvision_rpn(logits, deltas, sizes, settings)
    return rpn.filter_proposals(boxes, flat_logits, sizes, counts)


def call(logits, deltas, device, backend=None, function=rpn_proposals, **changes):
    sizes = torch.tensor(IMAGE_SIZES, device=device)
    logits, deltas = [x.to(device) for x in logits], [x.to(device) for x in deltas]
    kwargs = {"spec": SPEC, **SETTINGS} | changes
    return function(logits, deltas, sizes, backend=backend, **kwargs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="plain"),
        pytest.param({"nms_threshold": 0.3, "post_nms_top_n": 40}, id="few"),
        pytest.param(
            {"pre_nms_top_n": 10_000, "post_nms_top_n": 3000, "min_size": 20.0}, id="all", marks=pytest.mark.slow
        ),
        pytest.param({"score_threshold": 0.9}, id="scores"),
    ],
)
def test_equals_torchvision(device, backend, changes, monkeypatch):
    if backend == "torchvision" and device.type == "cuda":
        pytest.skip("the torchvision backend serves CPU tensors")
    # One program a segment, however long: the interpreter takes three times as long for the many of the other way.
    monkeypatch.setattr(nms_kernels, "strategy", lambda S, K: nms_kernels.padded_nms_segments)
    logits, deltas = maps()
    boxes, scores, counts = call(logits, deltas, device, backend, **changes)
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
        if backend == "triton" or device.type == "cuda":
            assert_close(boxes[n, :count].cpu(), expected_boxes.double())
            assert_close(scores[n, :count].cpu(), expected_scores.double())
        else:
            assert torch.equal(boxes[n, :count].cpu(), expected_boxes)
            assert torch.equal(scores[n, :count].cpu(), expected_scores)
        assert not boxes[n, count:].any()
        assert not scores[n, count:].any()


def candidates_of(logits, deltas, sizes, module, spec, padded_size, top_n, *, by_kernel=False, **limits):
    """The candidates by `rpn_candidates_reference` of `module`, or by its kernels."""
    strides = level_strides(spec, [(x.shape[2], x.shape[3]) for x in logits], padded_size)
    if not by_kernel:
        return module.rpn_candidates_reference(logits, deltas, sizes, spec, strides, top_n=top_n, **limits)
    half_sides = [side for level in spec.half_sides for pair in level for side in pair]
    steps = [float(step) for pair in strides for step in pair]
    return module.rpn_candidates_fwd(logits, deltas, sizes, half_sides, steps, spec.offset, top_n, **limits)


@pytest.mark.parametrize("by_kernel", [False, True], ids=["reference", "triton"])
def test_candidates_equal_torchvision(device, by_kernel):
    """The stage before the filters and the NMS: top-k, anchors, decoding, clip."""
    logits, deltas = maps()
    rpn, decoded, flat_logits, counts = torchvision_rpn(logits, deltas, IMAGE_SIZES, SETTINGS)
    flat_logits = flat_logits.view(2, -1)
    best = rpn._get_top_n_idx(flat_logits, counts)  # [2, 3 * 100], level by level
    boxes, scores, valid = candidates_of(
        [x.to(device) for x in logits], [x.to(device) for x in deltas], torch.tensor(IMAGE_SIZES, device=device),
        kernels_candidates if by_kernel else proposals, SPEC, PADDED, 100, by_kernel=by_kernel,
        scale_clamp=op.SCALE_CLAMP, min_size=0.0, score_threshold=0.0,
    )  # fmt: skip
    assert valid.all()
    clipped = [clip_boxes_to_image(decoded[n][best[n]], size) for n, size in enumerate(IMAGE_SIZES)]
    for got, expected in ((boxes, torch.stack(clipped)), (scores, flat_logits.gather(1, best).sigmoid())):
        got = got.unflatten(0, (2, 3)).flatten(1, 2).cpu()
        if by_kernel or device.type == "cuda":
            assert_close(got, expected.double())
        else:
            assert torch.equal(got, expected)


def composed(module):
    """`rpn_proposals` by the two steps of `module` around the reference's NMS."""

    def function(logits, deltas, sizes, *, backend, spec, padded_size, pre_nms_top_n, post_nms_top_n, nms_threshold,
                 **limits):  # fmt: skip
        boxes, scores, valid = candidates_of(
            logits, deltas, sizes, module, spec, padded_size, pre_nms_top_n, scale_clamp=op.SCALE_CLAMP, **limits
        )
        limit = min(post_nms_top_n, boxes.shape[1])
        kept, _ = padded_nms(boxes, scores, nms_threshold, valid=valid, max_output=limit, backend="reference")
        boxes, scores, _, counts = module.select_best_reference(boxes, scores, kept, 2, post_nms_top_n, False)
        return boxes, scores, counts

    return function


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("good &= _at_least(box, min_size) & ", "good &= "),
        ("& (score >= score_threshold)", ""),
        ("cell, anchor = index // A, index % A", "cell, anchor = index // A, index * 0"),
        ("channel = anchor[..., None] * 4 + torch", "channel = anchor[..., None] + 3 * torch"),
        ("(cell // W)[..., None], (cell % W)[..., None]", "(cell % W)[..., None] % 6, (cell // W)[..., None]"),
        ("logits.permute(0, 2, 3, 1)", "logits.permute(0, 3, 2, 1)"),
        ("F.pad(good, (0, pad))", "F.pad(good, (0, pad), value=True)"),
        ("marked = _mark(kept, K).view(images, G, K)", "marked = _mark(kept, K).view(images, G, K).flip(1)"),
        ("score = torch.sigmoid(logit)", "score = logit"),
        ("ranked = torch.where(marked, scores.reshape(images, G, K), -torch.inf)",
         "ranked = scores.reshape(images, G, K)"),
        ("row = segment * K + box", "row = segment * G + box"),
    ],
    ids=["min size", "score", "anchor", "channel", "cell", "order", "padding", "segments", "sigmoid", "kept", "row"],
)  # fmt: skip
def test_a_broken_composition_fails(tmp_path: Path, old, new):
    broken = mutant(proposals, old, new, tmp_path)
    logits, deltas = maps()
    strict = {"min_size": 20.0, "score_threshold": 0.9, "pre_nms_top_n": 200}  # the last level has 144 anchors
    got = call(logits, deltas, torch.device("cpu"), function=composed(broken), **strict)
    expected = call(logits, deltas, torch.device("cpu"), "reference", **strict)
    assert not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    again = call(logits, deltas, torch.device("cpu"), function=composed(proposals), **strict)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


# --- candidates by the kernels ---------------------------------------------------------------------------------------

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


def check_candidates(module, device, logits, deltas, spec=SPEC, *, top_n=30, min_size=9.0, score_threshold=0.3):
    """The kernels' candidates of padded images of 61 x 40 against the reference's: the same boxes in the same order."""
    logits, deltas = [guarded(x, device) for x in logits], [guarded(x, device) for x in deltas]
    sizes = torch.tensor([[60, 33], [47, 40]], device=device)[: len(logits[0])]
    limits = {"scale_clamp": 1.5, "min_size": min_size, "score_threshold": score_threshold}
    with poisoned_empty():
        got = candidates_of(logits, deltas, sizes, module, spec, (61, 40), top_n, by_kernel=True, **limits)
    expected = candidates_of(logits, deltas, sizes, proposals, spec, (61, 40), top_n, **limits)
    for name, ours, theirs in zip(("boxes", "scores", "valid"), got, expected, strict=True):
        assert_close(ours, theirs.double() if theirs.is_floating_point() else theirs, name=name)
    return expected


@pytest.mark.parametrize(
    ("convention", "dtype"),
    [*((name, torch.float32) for name in CONVENTIONS), ("torchvision", torch.bfloat16), ("uneven", torch.float16)],
    ids=str,
)
def test_candidates_of_each_convention(device, convention, dtype):
    spec = CONVENTIONS[convention]
    valid = check_candidates(kernels_candidates, device, *tiny_maps(spec, dtype=dtype), spec)[2]
    assert valid.any()
    assert not valid.all()


LAYOUTS = {
    "channels_last": lambda x: guarded(x.contiguous(memory_format=torch.channels_last)),
    "columns first": lambda x: guarded(x.transpose(2, 3).contiguous()).transpose(2, 3),
    "every second image": lambda x: x.repeat_interleave(2, 0)[1::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_candidates_of_any_layout(device, layout):
    logits, deltas = tiny_maps(SPEC)
    check_candidates(kernels_candidates, device, [LAYOUTS[layout](x) for x in logits], map(LAYOUTS[layout], deltas))


def test_candidates_of_one_convolution(device):
    """Logits and deltas as slices of one map, and levels of different dtypes."""
    whole = [torch.cat(pair, 1) for pair in zip(*tiny_maps(SPEC), strict=True)]
    whole[1] = whole[1].half()
    check_candidates(kernels_candidates, device, [x[:, :3] for x in whole], [x[:, 3:] for x in whole])


def test_candidates_over_several_blocks(device):
    """546 anchors are more than a block of keys, 150 candidates more than a block of slots."""
    logits, deltas = tiny_maps(SPEC, [(13, 14), (0, 3), (1, 2)], images=1)
    _, _, valid = check_candidates(kernels_candidates, device, logits, deltas, top_n=150)
    assert valid[0].any()
    assert not valid[1].any()
    assert not valid[2, 6:].any()


def odd_maps() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """NaN and infinities among the logits and the deltas, zeros of both signs, and a number that is not normal."""
    logits, deltas = tiny_maps(CONVENTIONS["flat"])
    nan, inf = float("nan"), float("inf")
    odd = torch.tensor([0.0, -1.5, inf, nan, -0.0, 2.0, -inf, 2.0, -1.25, 1e-40, -nan, 90.0, -90.0, 0.0])
    logits[0][0].view(-1)[: len(odd)] = odd
    for i, value in enumerate((nan, inf, -inf)):
        for channel in range(4):
            deltas[0][1, channel, i, channel] = value
            deltas[1][1, channel, i % 2, channel % 3] = value
    return logits, deltas


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_candidates_of_odd_input(device):
    boxes, _, valid = check_candidates(
        kernels_candidates, device, *odd_maps(), CONVENTIONS["flat"], min_size=0.0, score_threshold=0.0, top_n=60
    )
    assert boxes.isfinite().all()
    assert not valid.all()


@pytest.mark.parametrize("grids", [[(0, 3), (2, 0), (0, 0)], [(2, 2), (0, 0), (1, 1)]], ids=["all", "some"])
@pytest.mark.parametrize("images", [0, 2])
def test_candidates_of_empty_levels(device, grids, images):
    check_candidates(kernels_candidates, device, *tiny_maps(SPEC, grids, images=images))


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


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize(
    "broken", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in BROKEN_CANDIDATES]
)
def test_a_broken_kernel_of_candidates_fails(device, tmp_path: Path, broken):
    module = mutant(kernels_candidates, *BROKEN_CANDIDATES[broken], tmp_path)
    spec = CONVENTIONS["flat" if broken.startswith("NaN") else "uneven"]
    given = odd_maps() if broken.startswith("NaN") else tiny_maps(spec)
    loose = {"min_size": 0.0, "score_threshold": 0.0} if broken.startswith("NaN") else {}
    with pytest.raises((AssertionError, IndexError)):
        check_candidates(module, device, *given, spec, **loose)


# --- rules of the whole ----------------------------------------------------------------------------------------------


def test_memory_layout_does_not_matter(device):
    logits, deltas = maps()  # the kernels: test_candidates_of_any_layout
    last = torch.channels_last
    plain = call(logits, deltas, device)
    strided = call([x.to(memory_format=last) for x in logits], [x.to(memory_format=last) for x in deltas], device)
    assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_maps_compute_in_float32(device, backend, dtype):
    """Under autocast too: only the logits and deltas themselves are rounded."""
    if backend == "torchvision" and device.type == "cuda":
        pytest.skip("the torchvision backend serves CPU tensors")
    logits, deltas = ([x.to(dtype) for x in given] for given in maps(grids=TINY))
    small = {"padded_size": (61, 40), "pre_nms_top_n": 20}
    with torch.autocast(device.type, torch.bfloat16):
        got = call(logits, deltas, device, backend, **small)
    expected = call([x.float() for x in logits], [x.float() for x in deltas], device, backend, **small)
    assert (got[2] > 3).all()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_by_level_then_index(device, backend):
    """All logits equal and nothing overlaps: the anchors of the first level come first, in their order."""
    if backend == "torchvision" and device.type == "cuda":
        pytest.skip("the torchvision backend serves CPU tensors")
    spec = AnchorSpec(((2.0,), (2.0,)), (1.0,), strides=(4, 16))
    logits = [torch.zeros(1, 1, 4, 4, device=device), torch.zeros(1, 1, 2, 2, device=device)]
    deltas = [torch.zeros(1, 4, 4, 4, device=device), torch.zeros(1, 4, 2, 2, device=device)]
    boxes, scores, counts = rpn_proposals(
        logits, deltas, torch.tensor([[100, 100]], device=device), spec, padded_size=(100, 100), pre_nms_top_n=10,
        post_nms_top_n=12, nms_threshold=0.7, min_size=0.0, score_threshold=0.0, backend=backend,
    )  # fmt: skip
    anchors = make_anchors(spec, [(4, 4), (2, 2)], (100, 100), device=device).clamp(min=0)
    assert counts.tolist() == [12]
    assert torch.equal(boxes[0], torch.cat([anchors[:10], anchors[16:18]]))
    assert (scores == 0.5).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_no_proposal(device, backend):
    if backend == "torchvision" and device.type == "cuda":
        pytest.skip("the torchvision backend serves CPU tensors")
    logits, deltas = maps()
    logits[0][0, 1, 3, 4] = float("nan")
    logits[0][0, 0, 0, 0] = 50.0
    deltas[0][0, 2, 0, 0] = float("nan")
    logits[1][0, 0, 1, 1] = 60.0
    deltas[1][0, 2, 1, 1] = float("inf")
    boxes, scores, counts = call(logits, deltas, device, backend, min_size=0.0, score_threshold=0.0)
    assert boxes.isfinite().all()
    assert scores.isfinite().all()
    assert (scores[0, :2] == torch.tensor([1.0, scores[0, 1].item()], device=device)).all()
    assert scores[0, 1] < 0.99, "the box with NaN deltas and a logit of 50 is there"
    assert counts[0] > 10


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_left(device, backend):
    """No proposal passes the filters, and all levels are empty."""
    if backend == "torchvision" and device.type == "cuda":
        pytest.skip("the torchvision backend serves CPU tensors")
    for given, changes in ((maps(grids=TINY), {"min_size": 500.0}), (maps(grids=[(0, 2), (1, 0), (0, 0)]), {})):
        boxes, scores, counts = call(*given, device, backend, **changes)
        assert (boxes.shape, scores.shape, counts.tolist()) == ((2, 150, 4), (2, 150), [0, 0])
        assert not boxes.any()
        assert not scores.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images(device, backend):
    if backend == "torchvision" and device.type == "cuda":
        pytest.skip("the torchvision backend serves CPU tensors")
    logits, deltas = maps()
    boxes, scores, counts = rpn_proposals(
        [x[:0].to(device) for x in logits], [x[:0].to(device) for x in deltas],
        torch.zeros(0, 2, dtype=torch.int64, device=device), SPEC, **SETTINGS, backend=backend,
    )  # fmt: skip
    assert (boxes.shape, scores.shape, counts.shape) == ((0, 150, 4), (0, 150), (0,))


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_no_gradient_passes(device, backend):
    logits, deltas = ([x.requires_grad_() for x in given] for given in maps(grids=TINY))
    boxes, scores, _ = call(logits, deltas, device, backend)
    assert not boxes.requires_grad
    assert not scores.requires_grad


def test_top_indices_orders_ties_signs_and_nan():
    inf = float("inf")
    scores = torch.tensor([[0.0, -1.5, inf, float("nan"), -0.0, 2.0, -inf, 2.0, -1.25, 1e-40]])
    order = [2, 5, 7, 9, 0, 4, 8, 1, 6, 3]
    assert proposals.top_indices(scores, 10)[0].tolist() == order
    assert proposals.top_indices(-scores, 10)[0].tolist() == [6, 1, 8, 0, 4, 9, 5, 7, 2, 3]
    assert proposals.top_indices(scores, 4)[0].tolist() == order[:4]
    many = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = torch.sort(many.float(), dim=1, descending=True, stable=True).indices
    assert torch.equal(proposals.top_indices(many, 700), expected[:, :700])


@pytest.mark.parametrize("chosen", ["auto", "triton"])
def test_compiles_to_one_graph(device, chosen):
    grids = [(4, 5), (2, 3), (1, 2)]
    logits, deltas = maps(grids=grids)
    logits, deltas = [x.to(device) for x in logits], [x.to(device) for x in deltas]

    def whole(logits, deltas, sizes):
        return rpn_proposals(logits, deltas, sizes, SPEC, **SETTINGS, backend=chosen)

    args = logits, deltas, torch.tensor(IMAGE_SIZES, device=device)
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*args), whole(*args), strict=True):
        assert torch.equal(got, expected)


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


def test_opcheck(device):
    logits, deltas = maps(grids=[(2, 3)])
    sizes, half_sides = torch.tensor([[60, 33], [47, 40]], device=device), [4.0, 3.0] * 3
    maps_on = [x.to(device) for x in logits], [x.to(device) for x in deltas]
    torch.library.opcheck(
        kernels_candidates.rpn_candidates, (*maps_on, sizes, half_sides, [8.0] * 2, 0.5, 10, 4.0, 1.0, 0.1)
    )


def test_nothing_waits(device):
    logits, deltas = maps()
    args = [x.to(device) for x in logits], [x.to(device) for x in deltas], torch.tensor(IMAGE_SIZES, device=device)
    with count_blocking() as found:
        rpn_proposals(*args, SPEC, **SETTINGS, backend="reference")
    assert not found
