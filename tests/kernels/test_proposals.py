"""rpn_proposals against torchvision's RPN, and its own rules: order, padding, NaN, layout, no synchronisation."""

from pathlib import Path

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers

from tests.model.sync import count_blocking
from tests.mutation import mutant
from tmask_kernels import AnchorSpec, make_anchors, padded_nms, rpn_proposals
from tmask_kernels.ops.boxes import op, proposals
from tmask_kernels.ops.boxes.reference import decode_boxes_reference
from tmask_kernels.testing import assert_close

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


def torchvision_proposals(logits, deltas, sizes, settings) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = AnchorGenerator(SIZES, (RATIOS,) * 3)
    top = {"training": settings["pre_nms_top_n"], "testing": settings["pre_nms_top_n"]}
    keep = {"training": settings["post_nms_top_n"], "testing": settings["post_nms_top_n"]}
    rpn = RegionProposalNetwork(
        generator, None, 0.7, 0.3, 256, 0.5, top, keep, settings["nms_threshold"], settings["score_threshold"]
    )
    rpn.min_size = settings["min_size"]
    anchors = generator(ImageList(torch.zeros(2, 3, *PADDED), sizes), logits)
    counts = [x[0].numel() for x in logits]
    flat_logits, flat_deltas = concat_box_prediction_layers(list(logits), list(deltas))
    boxes = rpn.box_coder.decode(flat_deltas, anchors).view(2, -1, 4)
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
        {},
        {"nms_threshold": 0.3, "post_nms_top_n": 40},
        {"pre_nms_top_n": 10_000, "post_nms_top_n": 3000, "min_size": 20.0},
        {"score_threshold": 0.9},
    ],
    ids=["plain", "few", "all", "scores"],
)
def test_equals_torchvision(device, backend, changes):
    if backend == "torchvision" and device.type == "cuda":
        pytest.skip("the torchvision backend serves CPU tensors")
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


def composed(module):
    """`rpn_proposals` with the composition of `module`, on the reference backend."""

    def function(logits, deltas, sizes, *, backend, **kwargs):
        return module.propose(
            logits, deltas, sizes, kwargs.pop("spec"), **kwargs,
            nms=lambda *a, **k: padded_nms(*a, backend="reference", **k),
            decode=lambda d, a, s: decode_boxes_reference(d, a, (1.0,) * 4, op.SCALE_CLAMP, s),
        )  # fmt: skip

    return function


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("good &= (sides >= min_size).all(-1)", "good &= (sides >= 0).all(-1)"),
        ("& (score >= score_threshold)", ""),
        ("cell, anchor = index // A, index % A", "cell, anchor = index // A, index * 0"),
        ("channel = anchor[..., None] * 4 + torch", "channel = anchor[..., None] + 3 * torch"),
        ("(cell // W)[..., None], (cell % W)[..., None]", "(cell % W)[..., None] % 6, (cell // W)[..., None]"),
        ("logits.permute(0, 2, 3, 1)", "logits.permute(0, 3, 2, 1)"),
        ("all_valid.view(N * L, most)", "all_valid.view(N * L, most) | True"),
        ("all_boxes.view(N * L, most, 4),", "all_boxes.view(N * L, most, 4).flip(0),"),
        ("return boxes, torch.sigmoid(logit), numbers", "return boxes, logit, numbers"),
        ("ranked = torch.where(keep, scores, -torch.inf)", "ranked = scores"),
    ],
    ids=["min size", "score", "anchor", "channel", "cell", "order", "padding", "segments", "sigmoid", "kept"],
)
def test_a_broken_composition_fails(tmp_path: Path, old, new):
    broken = mutant(proposals, old, new, tmp_path)
    logits, deltas = maps()
    strict = {"min_size": 20.0, "score_threshold": 0.9}
    got = call(logits, deltas, torch.device("cpu"), function=composed(broken), **strict)
    expected = call(logits, deltas, torch.device("cpu"), "reference", **strict)
    assert not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    again = call(logits, deltas, torch.device("cpu"), function=composed(proposals), **strict)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_memory_layout_does_not_matter(device):
    logits, deltas = maps()
    last = torch.channels_last
    plain = call(logits, deltas, device)
    strided = call([x.to(memory_format=last) for x in logits], [x.to(memory_format=last) for x in deltas], device)
    assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))


def test_half_maps_compute_in_float32(device):
    logits, deltas = maps()
    logits, deltas = [x.bfloat16() for x in logits], [x.bfloat16() for x in deltas]
    got = call(logits, deltas, device)
    expected = call([x.float() for x in logits], [x.float() for x in deltas], device)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_ties_go_by_level_then_index(device):
    """All logits equal and nothing overlaps: the anchors of the first level come first, in their order."""
    spec = AnchorSpec(((2.0,), (2.0,)), (1.0,), strides=(4, 16))
    logits = [torch.zeros(1, 1, 4, 4, device=device), torch.zeros(1, 1, 2, 2, device=device)]
    deltas = [torch.zeros(1, 4, 4, 4, device=device), torch.zeros(1, 4, 2, 2, device=device)]
    boxes, scores, counts = rpn_proposals(
        logits, deltas, torch.tensor([[100, 100]], device=device), spec, padded_size=(100, 100), pre_nms_top_n=10,
        post_nms_top_n=12, nms_threshold=0.7, min_size=0.0, score_threshold=0.0,
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
def test_no_images(device, backend):
    if backend == "torchvision" and device.type == "cuda":
        pytest.skip("the torchvision backend serves CPU tensors")
    logits, deltas = maps()
    boxes, scores, counts = rpn_proposals(
        [x[:0].to(device) for x in logits], [x[:0].to(device) for x in deltas],
        torch.zeros(0, 2, dtype=torch.int64, device=device), SPEC, **SETTINGS, backend=backend,
    )  # fmt: skip
    assert (boxes.shape, scores.shape, counts.shape) == ((0, 150, 4), (0, 150), (0,))


def test_no_gradient_passes(device):
    logits, deltas = maps()
    boxes, scores, _ = call([x.requires_grad_() for x in logits], [x.requires_grad_() for x in deltas], device)
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


def test_nothing_waits(device):
    logits, deltas = maps()
    args = [x.to(device) for x in logits], [x.to(device) for x in deltas], torch.tensor(IMAGE_SIZES, device=device)
    with count_blocking() as found:
        rpn_proposals(*args, SPEC, **SETTINGS, backend="reference")
    assert not found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectness": lambda x: x[:2]}, "objectness: expected 3 levels"),
        ({"deltas": lambda x: x[:2]}, "deltas: expected 3 levels"),
        ({"objectness": lambda x: [x[0][:, :2], *x[1:]]}, r"objectness\[0\]: expected shape \[2, 3, 24, 32\]"),
        ({"deltas": lambda x: [*x[:2], x[2][:, :8]]}, r"deltas\[2\]: expected shape \[2, 12, 6, 8\]"),
        ({"image_sizes": lambda x: x[0]}, r"image_sizes: expected shape \[N, 2\]"),
        ({"post_nms_top_n": lambda x: 0}, "post_nms_top_n: expected at least 1"),
        ({"nms_threshold": lambda x: 2.0}, "iou_threshold: expected a number in"),
    ],
    ids=["levels", "delta levels", "anchors", "deltas", "sizes", "count", "threshold"],
)
def test_wrong_arguments(changes, message):
    logits, deltas = maps()
    arguments = {
        "objectness": logits,
        "deltas": deltas,
        "image_sizes": torch.tensor(IMAGE_SIZES),
        "spec": SPEC,
    } | SETTINGS
    for name, change in changes.items():
        arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        rpn_proposals(**arguments)
