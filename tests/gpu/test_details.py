"""What one op alone does at full size on a GPU."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from bench.rle import decode_rle
from tests.gpu.tools import (
    FULL_SIZE_FP32,
    MEBIBYTE,
    assert_gradients_close,
    assert_same_bits,
    need_cuda,
    peak_bytes,
    random_like,
    recorded,
    to,
    waiting_is_an_error,
)
from tests.gpu.work import (
    BICUBIC,
    FULL_TOLERANCES,
    HEAD,
    LAYOUTS,
    LEVELS,
    LIST,
    MASK_ROIS,
    MASKS,
    MEDIUM,
    ONE_MAP,
    PROPOSALS,
    ROIS,
    RPN,
    WORK,
    assert_greedy,
    case_of,
    pool,
)
from tmask.model import losses
from tmask_kernels import (
    decode_boxes,
    decode_keypoints,
    encode_boxes,
    make_anchors,
    match_anchors,
    nms,
    padded_nms,
    paste_masks,
    paste_masks_batched,
    roi_align,
    soft_nms,
)
from tmask_kernels.ops.nms.reference import sort_segments
from tmask_kernels.ops.proposals.reference import top_indices
from tmask_kernels.testing import Tolerance, assert_close, random_boxes

pytestmark = [
    pytest.mark.gpu,
    # The interpreter's.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# RoIAlign


@pytest.mark.parametrize(("dtype", "layout"), [(torch.float32, "nchw"), (torch.bfloat16, "nhwc")], ids=str)
@pytest.mark.parametrize("name", [ROIS, MASK_ROIS, BICUBIC, ONE_MAP])
def test_roi_align_gradient_to_the_boxes(
    name: str, dtype: torch.dtype, layout: str, full: bool, device: torch.device
) -> None:
    """Against the reference in float64, 64 boxes; the same bits again.

    At a cell's centre the gradient of a bilinear sample jumps, so no sample may be a rounding away from one. Of boxes
    in 1/8 pixel the samples of 14 bins of 2 are multiples of 1/448 pixel away from the start; 1/896 keeps them clear.
    """
    case = replace(case_of(name, full), rois=64) if full else case_of(name, full)
    features = case.features(dtype, LAYOUTS[layout], device)
    boxes = (case.boxes().to(device) * 8).round() / 8 + 1 / 896
    out = pool(case, features, boxes.requires_grad_())
    upstream = random_like(out)
    first, second = (torch.autograd.grad(out, boxes, upstream, retain_graph=True) for _ in range(2))
    assert_same_bits(first, second)
    exact = boxes.detach().double().requires_grad_()
    expected = pool(case, [f.double() for f in features], exact, "reference")
    (want,) = torch.autograd.grad(expected, exact, upstream.double())
    assert_close(first[0], want, tolerance=Tolerance(**FULL_SIZE_FP32))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_roi_align_under_autocast_copies_no_features(
    dtype: torch.dtype, layout: str, full: bool, device: torch.device
) -> None:
    """Boxes stay float32: the result is that without autocast. Memory: the output, and no float32 features."""
    case = case_of(ROIS, full)
    features, boxes = case.features(dtype, LAYOUTS[layout], device), case.boxes().to(device)
    expected = pool(case, features, boxes)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert_same_bits(pool(case, features, boxes), expected)
        assert expected.dtype == dtype
        peak = peak_bytes(lambda: pool(case, features, boxes), device)
    assert peak is None or peak <= expected.nbytes + 2 * MEBIBYTE, f"{peak} bytes for an output of {expected.nbytes}"


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "every second channel": lambda x: x[:, ::2],
    "every second column": lambda x: x[..., ::2],
    "a window": lambda x: x[:, 1:, 3:-2, 1:-5],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "one image for all": lambda x: x[:1].expand_as(x),
    "backwards in memory order": lambda x: x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_roi_align_reads_views_where_they_lie(view: str, layout: str, full: bool, device: torch.device) -> None:
    case = case_of(ONE_MAP, full)
    (feature,), boxes = case.features(torch.float32, LAYOUTS[layout], device), case.boxes().to(device)
    size = 7 if full else 2
    strided = VIEWS[view](feature).requires_grad_()
    out = roi_align(strided, boxes, size, case.scales[0], 2, True, backend="triton")
    dense = strided.detach().contiguous().requires_grad_()
    expected = roi_align(dense, boxes, size, case.scales[0], 2, True, backend="triton")
    assert_same_bits(out, expected)
    upstream = random_like(out)
    (got,), (want,) = torch.autograd.grad(out, strided, upstream), torch.autograd.grad(expected, dense, upstream)
    assert_close(got, want)


def test_roi_align_compiles_with_inductor(full: bool, device: torch.device) -> None:
    need_cuda(device, "inductor backend for Triton kernels")
    case = case_of(ROIS, full)
    boxes = case.boxes().to(device)
    features = [f.requires_grad_() for f in case.features(torch.float32, LAYOUTS["nhwc"], device)]

    def run(features: list[Tensor], boxes: Tensor) -> Any:
        return pool(case, [f * 2 for f in features], boxes).relu()

    eager, out = run(features, boxes), torch.compile(run, fullgraph=True)(features, boxes)
    assert_close(out, eager)
    upstream = random_like(eager)
    both = [torch.autograd.grad(result, features, upstream) for result in (out, eager)]
    for got, want in zip(*both, strict=True):
        assert_close(got, want, tolerance=FULL_TOLERANCES[torch.float32])


# Boxes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_coding_of_all_anchors_equals_the_reference(dtype: torch.dtype, full: bool, device: torch.device) -> None:
    case = case_of(PROPOSALS, full)
    anchors = make_anchors(case.spec, case.sizes, (case.height, case.width), device=device)  # [A, 4]
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(2, len(anchors), 4, generator=generator).to(device, dtype).requires_grad_()
    sizes = torch.tensor([[case.height, case.width], [case.height // 2, case.width // 2]], device=device)
    boxes = decode_boxes(deltas, anchors, image_size=sizes, backend="triton")
    exact = deltas.detach().double().requires_grad_()
    expected = decode_boxes(exact, anchors, image_size=sizes, backend="reference")
    assert_close(boxes, expected)
    # A coordinate at the border to rounding is clipped by one and not by the other.
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


@pytest.mark.parametrize("name", ["rpn_proposals-nchw", "detections"])
def test_boxes_compile_with_inductor(name: str, full: bool, device: torch.device) -> None:
    need_cuda(device, "inductor backend for Triton kernels")
    spec = WORK[name](full, device).spec
    inputs = spec.make()
    compiled = torch.compile(lambda inputs: spec.call(inputs, "triton"), fullgraph=True)
    assert_same_bits(compiled(inputs), spec.call(inputs, "triton"))


def test_matching_of_proposals_in_any_order(full: bool, device: torch.device) -> None:
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


# NMS


def test_the_definition_of_nms_is_told_from_others(full: bool, device: torch.device) -> None:
    """One box more, one box fewer, and two in the wrong order are seen."""
    case = case_of(LIST, full)
    (boxes,), (scores,), (valid,) = case.inputs(device)
    kept = nms(boxes, scores, case.threshold, backend="triton")
    assert_greedy(boxes, scores, valid, kept, case.threshold, case.boxes)
    spare = torch.ones_like(valid)
    spare[kept] = False
    more = torch.cat([kept, spare.nonzero()[:1, 0]])
    for other in (more[scores[more].argsort(descending=True)], kept[1:], kept.flip(0)):
        with pytest.raises(AssertionError):
            assert_greedy(boxes, scores, valid, other, case.threshold, case.boxes)


@pytest.mark.parametrize("name", [LEVELS, MEDIUM])
def test_nms_does_not_depend_on_which_program_is_last(name: str, full: bool, device: torch.device) -> None:
    case = case_of(name, full)
    boxes, scores, valid = case.inputs(device)
    first, *others = [
        padded_nms(boxes, scores, case.threshold, valid=valid, max_output=case.boxes, backend="triton")
        for _ in range(100 if full else 2)
    ]
    for other in others:
        assert_same_bits(other, first)


def test_nms_of_a_chain_of_removals(full: bool, device: torch.device) -> None:
    """Each box removes the next, so every second is kept: as many rounds inside a step as it has boxes."""
    count = 5_000 if full else 150
    left = torch.arange(count, device=device)[:, None] * 4.0
    boxes = torch.cat([left, left * 0, left + 10, left * 0 + 10], 1)
    scores = torch.linspace(1, 0.5, count, device=device)
    assert_same_bits(nms(boxes, scores, 0.4, backend="triton"), torch.arange(0, count, 2, device=device))


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_nms_equals_the_reference(method: str, full: bool, device: torch.device) -> None:
    case = case_of(LIST, full)
    (boxes,), (scores,), _ = case.inputs(device)
    found, expected = (
        soft_nms(boxes, scores, method=method, score_threshold=0.01, backend=backend)
        for backend in ("triton", "reference")
    )
    assert len(found[0]) > 20
    if method == "linear":
        assert_same_bits(found, expected)
        return
    # By the rounding of `exp` neighbours may change places, and the last be dropped.
    n = min(len(found[1]), len(expected[1]))
    assert max(len(found[1]), len(expected[1])) <= n + 2
    torch.testing.assert_close(found[1][:n], expected[1][:n], rtol=1e-4, atol=0)


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
        real = expected.suppresses  # the order of boxes without a score does not matter
        assert_same_bits(got.suppresses.cpu(), real)
        assert_same_bits(got.order.cpu()[real], expected.order[real])
    for dtype in DTYPES:
        k = min(count, 2000)
        assert_same_bits(top_indices(scores.to(device, dtype), k).cpu(), top_indices(scores.to(dtype), k))


# Masks and keypoints


@pytest.mark.parametrize("output", ["bool", "rle"])
def test_a_pasted_batch_is_its_images(output: str, full: bool, device: torch.device) -> None:
    """Four images of their own sizes, one without masks. Run lengths decode to the masks."""
    case, x = case_of(MASKS, full), WORK[f"{MASKS}-bool"](full, device).spec.make()
    masks, boxes, (height, width) = x["masks"], x["boxes"], (case.height, case.width) if full else (7, 19)
    sizes = [(height, width), (height // 2, width), (height, width // 3), (height + 1, 2 * width)]
    counts = [len(masks), 1, 0, len(masks) - 1]
    images = masks.expand(4, -1, -1, -1), boxes.expand(4, -1, -1)
    got = paste_masks_batched(*images, counts, sizes, output=output, convention=case.convention, backend="triton")
    for one, count, size in zip(got, counts, sizes, strict=True):
        given = masks[:count], boxes[:count], size
        own = paste_masks(*given, output=output, convention=case.convention, backend="triton")
        assert torch.equal(one, own) if isinstance(one, Tensor) else one == own
        if output == "rle" and count:
            inside = paste_masks(*given, convention=case.convention, backend="triton")
            assert torch.equal(torch.stack([decode_rle(run) for run in own]), inside.cpu())


def test_the_reference_of_pasting_has_the_same_bits_on_the_gpu(full: bool, device: torch.device) -> None:
    for output in ("probability", "bool"):
        spec = WORK[f"{MASKS}-{output}"](full, device).spec
        inputs = {name: value[:9] for name, value in spec.make().items()}
        here, there = (spec.call(to(inputs, where), "reference") for where in (device, torch.device("cpu")))
        assert torch.equal(here.cpu(), there)


@pytest.mark.parametrize("kind", ["noise", "constant", "checkerboard"])
def test_keypoints_of_huge_boxes_end(kind: str, full: bool, device: torch.device) -> None:
    """64 M pixels a map, where bounds rule out most, all but some, and nothing."""
    cells, side = (56, 8000.0) if full else (3, 12.0)
    y, x = torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij")
    heatmap = {"noise": torch.randn(cells, cells), "constant": torch.ones(cells, cells), "checkerboard": (x + y) % 2.0}
    heatmaps = heatmap[kind].to(device).expand(1, 1, 2, cells, cells)
    boxes = torch.tensor([[[1.0, 2.0, 1.0 + side, 1.5 + side]]], device=device)
    got = decode_keypoints(heatmaps, boxes, backend="triton")
    expected = decode_keypoints(heatmaps[:, :, :1], boxes, backend="reference")
    assert_same_bits([t[:, :, 1:].cpu() for t in got], [t.cpu() for t in expected])


# Losses of the box head


def head_losses(
    box_loss: losses.BoxLoss, class_loss: losses.ClassLoss, full: bool, device: torch.device
) -> tuple[Callable[[], list[Tensor]], Tensor]:
    """Both losses of the box head for two images with their gradients, and the deltas, of which some boxes have no
    area. Half of the RoIs are positive, a few of them are empty slots.
    """
    S, C = (512, 81) if full else (9, 4)
    generator = torch.Generator().manual_seed(0)
    rois = random_boxes(2 * S, height=800, width=1300, min_size=8, max_size=300).view(2, S, 4)
    matched = rois + torch.randn(2, S, 4, generator=generator) * 2
    labels = torch.randint(1, C, (2, S), generator=generator) * (torch.arange(S) % 2)
    valid = torch.arange(S) < S - 3
    deltas = torch.randn(2, S, C, 4, generator=generator)
    deltas[0, 1] = -200.0  # sides that round to 0
    columns = C - (class_loss == "sigmoid_focal")
    logits, deltas = torch.randn(2, S, columns, generator=generator).to(device), deltas.to(device)
    given = [labels * valid, rois, matched, (labels > 0) & valid, valid.expand(2, S)]
    given = [value.to(device) for value in given]
    focal = losses.Focal(alpha=0.25, gamma=2.0, prior=0.01)
    leaves = [logits.requires_grad_(), deltas.requires_grad_()]
    settings = {"class_loss": class_loss, "focal": focal, "box_loss": box_loss, "weights": (10.0, 10.0, 5.0, 5.0)}

    def run() -> list[Tensor]:
        both = losses.box_losses(*leaves, *given, **settings)
        return [*(one.detach() for one in both), *torch.autograd.grad(sum(both), leaves)]

    return run, deltas


@pytest.mark.parametrize("class_loss", get_args(losses.ClassLoss))
@pytest.mark.parametrize("box_loss", get_args(losses.BoxLoss))
def test_losses_of_the_box_head_never_wait(
    box_loss: losses.BoxLoss, class_loss: losses.ClassLoss, full: bool, device: torch.device
) -> None:
    """Both ways, as on the CPU, and again from a graph with other deltas."""
    run, deltas = head_losses(box_loss, class_loss, full, device)
    expected, _ = head_losses(box_loss, class_loss, full, torch.device("cpu"))
    run()  # kernels compile
    with waiting_is_an_error(device):
        got = run()
    for name, one, want in zip(("classes", "boxes", "to logits", "to deltas"), got, expected(), strict=True):
        assert one.isfinite().all(), name
        # Both sides are float32, with other exponentials and arc tangents.
        assert_gradients_close(one.cpu(), want, tolerance=Tolerance(max=1e-4, rms=1e-5))
    replay = recorded(run, device)
    with torch.no_grad():
        deltas.copy_(deltas.flip(1) * 0.5)
    again = to(run(), device)
    assert_same_bits(replay(), again)
