"""Box coding, proposals and detections at full size on a GPU."""

import functools

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers

from bench.cases import CASES, RPNCase, rois
from tests.gpu.tools import assert_same_bits, need_cuda, need_memory, recorded, to, waiting_is_an_error
from tmask_kernels import decode_boxes, detections, encode_boxes, make_anchors, padded_nms, rpn_proposals
from tmask_kernels.ops.anchors.reference import level_strides
from tmask_kernels.ops.proposals import op
from tmask_kernels.ops.proposals.kernels import candidates as kernels_candidates
from tmask_kernels.ops.proposals.reference import rpn_candidates_reference, select_best_reference
from tmask_kernels.testing import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # the interpreter's, of padding
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case_of(full: bool) -> RPNCase:
    case = CASES["proposals-rpn"]
    assert isinstance(case, RPNCase)
    return case if full else case.small()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_coding_of_all_anchors_equals_the_reference(dtype: torch.dtype, full: bool, device: torch.device) -> None:
    case = case_of(full)
    anchors = make_anchors(case.spec, case.sizes, (case.height, case.width), device=device)  # [A, 4]
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(2, len(anchors), 4, generator=generator).to(device, dtype).requires_grad_()
    sizes = torch.tensor([[case.height, case.width], [case.height // 2, case.width // 2]], device=device)
    boxes = decode_boxes(deltas, anchors, image_size=sizes, backend="triton")
    exact = deltas.detach().double().requires_grad_()
    expected = decode_boxes(exact, anchors, image_size=sizes, backend="reference")
    assert_close(boxes, expected)
    # Where a coordinate stands at the border to rounding, one clips it and the other does not.
    upstream = torch.randn(boxes.shape, generator=generator).to(device)
    (got,), (want,) = (torch.autograd.grad(b, d, upstream.to(b.dtype)) for b, d in ((boxes, deltas), (expected, exact)))
    limits = sizes.flip(1).repeat(1, 2)[:, None]
    at_border = ((expected < 1e-3) | (expected > limits - 1e-3)).any(-1, keepdim=True)
    assert at_border.float().mean() < 0.9
    assert_close(torch.where(at_border, 0, got), torch.where(at_border, 0, want))
    if dtype == torch.float32:
        free = decode_boxes(deltas.detach(), anchors, backend="triton")
        back = encode_boxes(free, anchors, backend="triton")
        assert_close(back, encode_boxes(free.double(), anchors, backend="reference"))


def test_coding_equals_torchvision(full: bool, device: torch.device) -> None:
    count = 268_569 if full else 300
    anchors, boxes = (rois(1, count, 800, 1344, seed=seed)[0].to(device) + torch.tensor(
        [0.0, 0.0, 1.0, 1.0], device=device) for seed in (0, 1))  # fmt: skip
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    weights = (10.0, 10.0, 5.0, 5.0)
    deltas = encode_boxes(boxes, anchors, weights, backend="triton")
    assert_close(deltas, coder.encode_single(boxes, anchors).double())
    near = torch.randn(count, 4, generator=torch.Generator().manual_seed(0)).to(device)
    assert_close(
        decode_boxes(near, anchors, weights=weights, backend="triton"), coder.decode_single(near, anchors).double()
    )


def proposals(case: RPNCase, maps: tuple[list[Tensor], list[Tensor], Tensor], backend: str = "triton") -> tuple:
    return rpn_proposals(
        *maps, case.spec, padded_size=(case.height, case.width), pre_nms_top_n=case.pre_nms_top_n,
        post_nms_top_n=case.post_nms_top_n, nms_threshold=case.nms_threshold, min_size=1e-3, score_threshold=0.0,
        backend=backend,
    )  # fmt: skip


def candidates(case: RPNCase, maps: tuple[list[Tensor], list[Tensor], Tensor]) -> tuple[tuple[Tensor, ...], ...]:
    """What goes into the NMS: by the kernels and by the reference."""
    strides = level_strides(case.spec, case.sizes, (case.height, case.width))
    limits = {"scale_clamp": op.SCALE_CLAMP, "min_size": 1e-3, "score_threshold": 0.0}
    half_sides = [side for level in case.spec.half_sides for pair in level for side in pair]
    steps = [float(step) for pair in strides for step in pair]
    ours = kernels_candidates.rpn_candidates(
        *maps, half_sides, steps, case.spec.offset, case.pre_nms_top_n, *limits.values()
    )
    return ours, rpn_candidates_reference(*maps, case.spec, strides, top_n=case.pre_nms_top_n, **limits)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_proposals_equal_the_reference(
    dtype: torch.dtype, channels_last: bool, full: bool, device: torch.device
) -> None:
    """Stage by stage: the candidates to rounding, and what the reference makes of these to the bit."""
    case = case_of(full)
    maps = case.inputs(dtype, device)
    if channels_last:
        maps = (*([x.contiguous(memory_format=torch.channels_last) for x in m] for m in maps[:2]), maps[2])
    (boxes, scores, valid), expected = candidates(case, maps)
    assert_close(boxes, expected[0].double())
    assert_close(scores, expected[1].double())
    assert (valid != expected[2]).sum() <= 2, "a side at min_size may fall on either side of it"
    limit = min(case.post_nms_top_n, boxes.shape[1])
    kept, _ = padded_nms(boxes, scores, case.nms_threshold, valid=valid, max_output=limit, backend="reference")
    boxes, scores, _, counts = select_best_reference(boxes, scores, kept, case.images, case.post_nms_top_n, False)
    assert (counts > 10).all()
    assert_same_bits(proposals(case, maps), (boxes, scores, counts))


def test_proposals_are_torchvisions(full: bool, device: torch.device) -> None:
    """Matched by box: its arithmetic rounds otherwise, and a few boxes at the threshold go the other way."""
    case = case_of(full)
    objectness, deltas, sizes = case.inputs(torch.float32, device)
    boxes, scores, counts = proposals(case, (objectness, deltas, sizes))
    generator = AnchorGenerator(case.spec.sizes, (case.spec.aspect_ratios,) * 5)
    top = {"training": case.pre_nms_top_n, "testing": case.pre_nms_top_n}
    keep = {"training": case.post_nms_top_n, "testing": case.post_nms_top_n}
    rpn = RegionProposalNetwork(generator, None, 0.7, 0.3, 256, 0.5, top, keep, case.nms_threshold)
    shape = [(case.height, case.width)] * case.images
    images = ImageList(torch.zeros(case.images, 3, case.height, case.width, device=device), shape)
    anchors = generator(images, objectness)
    flat_logits, flat_deltas = concat_box_prediction_layers(list(objectness), list(deltas))
    decoded = rpn.box_coder.decode(flat_deltas, anchors).view(case.images, -1, 4)
    per_level = [x[0].numel() for x in objectness]
    theirs, _ = rpn.filter_proposals(decoded, flat_logits, shape, per_level)
    for n, expected in enumerate(theirs):
        ours = boxes[n, : int(counts[n])]
        assert abs(len(ours) - len(expected)) <= 0.01 * len(expected)
        near = (torch.cdist(expected, ours, p=torch.inf) < 1e-2).any(1)
        assert near.float().mean() > 0.99
    assert (scores.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_proposals_replay_from_a_graph(dtype: torch.dtype, full: bool, device: torch.device) -> None:
    case = case_of(full)
    maps = case.inputs(dtype, device)
    other = to(maps, device)
    replay = recorded(lambda: proposals(case, maps), device)
    for x in [*maps[0], *maps[1]]:
        x.copy_(x.flip(0))
    assert_same_bits(replay(), proposals(case, to(maps, device)))
    for x, before in zip([*maps[0], *maps[1]], [*other[0], *other[1]], strict=True):
        x.copy_(before)
    assert_same_bits(replay(), proposals(case, other))
    with waiting_is_an_error(device):
        proposals(case, maps)


def detection_inputs(full: bool, device: torch.device) -> dict[str, Tensor]:
    """1,000 RoIs and 80 classes of two images; a RoI scores over 0.05 in a few of them."""
    count, classes = (1000, 80) if full else (40, 3)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, count, classes + 1, generator=generator) * 2
    boxes = rois(2, count, 800, 1344)[:, :, None] + torch.randn(2, count, classes, 4, generator=generator)
    valid = torch.arange(count) < torch.tensor([[count], [count - 7]])
    sizes = torch.tensor([[800, 1344], [700, 1200]])
    values = {"class_scores": logits.softmax(-1)[..., 1:], "boxes": boxes, "valid": valid, "image_sizes": sizes}
    return {name: value.to(device) for name, value in values.items()}


def detect(inputs: dict[str, Tensor], backend: str = "triton") -> tuple[Tensor, ...]:
    return detections(**inputs, score_threshold=0.05, nms_threshold=0.5, max_detections=100, backend=backend)


def test_detections_equal_the_reference_and_replay(full: bool, device: torch.device) -> None:
    inputs = detection_inputs(full, device)
    got = detect(inputs)
    assert (got[3] > 10).all()
    assert_same_bits(got, detect(inputs, "reference"))
    replay = recorded(lambda: detect(inputs), device)
    for value in inputs.values():
        value.copy_(value.flip(0))
    assert_same_bits(replay(), detect(to(inputs, device)))
    with waiting_is_an_error(device):
        detect(inputs)


def test_more_than_2_to_the_31_deltas(full: bool, device: torch.device) -> None:
    need_memory(40, device)
    anchors = make_anchors(case_of(full).spec, case_of(full).sizes, (800, 1344), device=device)
    images = 2**31 // (4 * len(anchors)) + 2 if full else 3
    deltas = torch.zeros(images, len(anchors), 4, dtype=torch.bfloat16, device=device)
    assert deltas.numel() > 2**31 or not full
    deltas[-1].normal_(generator=torch.Generator(device).manual_seed(0))
    boxes = decode_boxes(deltas, anchors, backend="triton")
    assert_same_bits(boxes[-1], decode_boxes(deltas[-1].clone(), anchors, backend="triton"))
    assert_close(boxes[0], anchors.double())
    assert not torch.equal(boxes[-1], boxes[0])


@pytest.mark.parametrize("which", ["proposals", "detections"])
def test_compiles_with_inductor(which: str, full: bool, device: torch.device) -> None:
    need_cuda(device, "inductor backend for Triton kernels")
    if which == "detections":
        inputs = detection_inputs(full, device)
        assert_same_bits(torch.compile(detect, fullgraph=True)(inputs), detect(inputs))
        return
    case = case_of(full)
    maps = case.inputs(torch.float32, device)
    assert_same_bits(torch.compile(functools.partial(proposals, case), fullgraph=True)(maps), proposals(case, maps))
