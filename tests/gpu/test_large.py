"""Offsets past 2^31: the last part of a large tensor has the results that it has alone. In a rehearsal it is small."""

import pytest
import torch
from torch import Tensor

from bench.cases.proposals import CASES
from bench.contest import LAYOUTS
from tests.gpu.tools import need_memory, random_like
from tests.kernels.test_match_anchors import RPN
from tests.kernels.tools import assert_close_gradient, assert_same
from tmask_kernels import (
    decode_boxes,
    decode_keypoints,
    make_anchors,
    mask_bce,
    mask_targets,
    masks_to_rle,
    match_anchors,
    padded_nms,
    paste_masks,
    roi_align,
    sigmoid_focal_loss,
    unpack_masks,
)
from tmask_kernels.testing import assert_close, random_boxes

pytestmark = pytest.mark.gpu

LIMIT = 2**31


def normal_(tensor: Tensor) -> Tensor:
    return tensor.normal_(generator=torch.Generator(tensor.device).manual_seed(0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_of_roi_align(layout: str, full: bool, device: torch.device) -> None:
    """RoIs in the last image, forward and backward, as if that image were alone."""
    need_memory(30, device)
    images, channels, side, count = (9, 256, 1024, 64) if full else (3, 8, 16, 3)
    feature = torch.zeros(images, channels, side, side, dtype=torch.bfloat16, device=device)
    feature = feature.contiguous(memory_format=LAYOUTS[layout])
    assert feature[1:].numel() >= LIMIT or not full
    normal_(feature[-1])
    feature.requires_grad_()
    last = feature.detach()[-1:].requires_grad_()
    boxes = random_boxes(count, height=4 * side, width=4 * side, min_size=8, max_size=2 * side).to(device)
    index = torch.full((count, 1), images - 1.0, device=device)
    out = roi_align(feature, torch.cat([index, boxes], 1), 7, 0.25, 2, True, backend="triton")
    expected = roi_align(last, torch.cat([index * 0, boxes], 1), 7, 0.25, 2, True, backend="triton")
    assert expected.abs().max() > 0.1
    assert_same(out, expected)
    upstream = random_like(out)
    (got,), (want,) = torch.autograd.grad(out, feature, upstream), torch.autograd.grad(expected, last, upstream)
    assert_close(got[-1:], want.double())
    assert not any(image.any() for image in got[:-1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_of_roi_align(layout: str, full: bool, device: torch.device) -> None:
    need_memory(30, device)
    count, channels, last = (43_000, 256, 9) if full else (3, 8, 1)
    assert count * channels * 14 * 14 >= LIMIT or not full
    feature = torch.randn(1, channels, 64, 64, device=device, dtype=torch.bfloat16)
    feature = feature.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    boxes = random_boxes(count, height=256, width=256, min_size=8).to(device)[None]
    size = 14 if full else 3
    out = roi_align(feature, boxes, size, 0.25, 2, True, backend="triton")
    tail = roi_align(feature, boxes[:, -last:].contiguous(), size, 0.25, 2, True, backend="triton")
    assert_same(out[-last:], tail)
    upstream = torch.zeros_like(out)
    upstream[-last:] = random_like(tail)
    (got,), (want,) = (torch.autograd.grad(o, feature, u) for o, u in ((out, upstream), (tail, upstream[-last:])))
    assert want.any()
    assert_close(got, want.double())


def test_deltas_of_decode_boxes(full: bool, device: torch.device) -> None:
    need_memory(40, device)
    case = CASES["proposals-rpn"] if full else CASES["proposals-rpn"].small()
    anchors = make_anchors(case.spec, case.sizes, (800, 1344), device=device)
    images = LIMIT // (4 * len(anchors)) + 2 if full else 3
    deltas = torch.zeros(images, len(anchors), 4, dtype=torch.bfloat16, device=device)
    assert deltas.numel() > LIMIT or not full
    normal_(deltas[-1])
    boxes = decode_boxes(deltas, anchors, backend="triton")
    assert_same(boxes[-1], decode_boxes(deltas[-1].clone(), anchors, backend="triton"))
    assert_close(boxes[0], anchors.double())
    assert not torch.equal(boxes[-1], boxes[0])


def test_logits_of_the_focal_loss(full: bool, device: torch.device) -> None:
    need_memory(20, device)
    count = LIMIT + 5000 if full else 3000
    logits = torch.full((count,), -20.0, dtype=torch.bfloat16, device=device)
    targets = torch.zeros(count, dtype=torch.uint8, device=device)
    normal_(logits[-1000:])
    targets[-500:] = 1
    logits.requires_grad_()
    loss = sigmoid_focal_loss(logits, targets, reduction="sum", backend="triton")
    (gradient,) = torch.autograd.grad(loss, logits)
    end = logits.detach()[-1000:].double().requires_grad_()
    expected = sigmoid_focal_loss(end, targets[-1000:], reduction="sum", backend="reference")
    assert_close(loss, expected)  # the others' losses are of the order of 1e-26
    assert_close_gradient(gradient[-1000:], torch.autograd.grad(expected, end)[0])
    assert not gradient[:-1000].abs().amax() > 1e-12


def test_logits_of_the_mask_loss(full: bool, device: torch.device) -> None:
    need_memory(20, device)
    K, C = (LIMIT // (80 * 784) + 2, 80) if full else (3, 4)
    logits = torch.zeros(K, C, 28, 28, dtype=torch.bfloat16, device=device)
    normal_(logits[-1])
    logits.requires_grad_()
    classes, valid = torch.full((K,), C - 1, device=device), torch.arange(K, device=device) >= K - 2
    targets = torch.ones(1, 28, 28, dtype=torch.bool, device=device).expand(K, -1, -1)
    loss = mask_bce(logits, classes, targets, valid=valid, backend="triton")
    (gradient,) = torch.autograd.grad(loss, logits)
    end = logits.detach()[-2:].double().requires_grad_()
    expected = mask_bce(end, classes[-2:], targets[-2:], valid=valid[-2:], backend="reference")
    assert_close(loss, expected)
    assert_close_gradient(gradient[-2:], torch.autograd.grad(expected, end)[0])
    assert not gradient[:-2].any()


def test_words_of_mask_targets(full: bool, device: torch.device) -> None:
    """2,120 masks of 4,000 x 8,160: the last one begins past 2^31 words."""
    need_memory(12, device)
    count, height, words = (2120, 4000, 255) if full else (2, 6, 2)
    assert (count - 1) * height * words > LIMIT or not full
    packed = torch.zeros(1, count, height, words, dtype=torch.int32, device=device)
    packed[0, -1] = torch.randint(-LIMIT, LIMIT, (height, words), dtype=torch.int32, device=device)
    box = torch.tensor([words * 32 - 40.0, height - 5.0, words * 32.0, height], device=device).expand(1, 1, 4)
    index = torch.full((1, 1), count - 1, device=device)
    got = mask_targets(packed, box, index, 2, convention="torchvision", backend="triton")
    expected = mask_targets(packed[:, -1:], box, index * 0, 2, convention="torchvision", backend="reference")
    assert torch.equal(got, expected)
    assert expected.any()


def test_anchors_of_match_anchors(full: bool, device: torch.device) -> None:
    """The best IoU of each box is among the last anchors."""
    need_memory(24, device)
    count, last = (2**29 + 200, 1000) if full else (300, 100)
    assert count * 4 >= LIMIT or not full
    boxes = torch.stack([random_boxes(5, height=90, width=90, min_size=30, seed=s) for s in (0, 1)]).to(device)
    valid = torch.ones(2, 5, dtype=torch.bool, device=device)
    anchors = torch.zeros(count, 4, device=device)
    anchors[-last:] = random_boxes(last, height=90, width=90, min_size=20, seed=2).to(device)
    matches, ious = match_anchors(anchors, boxes, valid, **RPN, backend="triton")
    alone = match_anchors(anchors[-last:].contiguous(), boxes, valid, **RPN, backend="reference")
    assert (alone[0] >= 0).any()
    assert_same((matches[:, -last:], ious[:, -last:]), alone)
    assert not ious[:, :-last].any()


def test_boxes_of_padded_nms(full: bool, device: torch.device) -> None:
    need_memory(64, device)
    segments, count, last = (8_500_000, 64, 500) if full else (3, 64, 1)
    assert segments * count * 4 >= LIMIT or not full
    generator = torch.Generator(device).manual_seed(0)
    corner = torch.rand(segments, count, 2, device=device, generator=generator) * 40
    boxes = torch.cat([corner, corner + 15], 2)
    del corner
    scores = torch.rand(segments, count, device=device, generator=generator)
    indices, counts = padded_nms(boxes, scores, 0.3, max_output=8, backend="triton")
    alone = padded_nms(boxes[-last:].contiguous(), scores[-last:].contiguous(), 0.3, max_output=8, backend="triton")
    assert counts[-last:].float().mean() > 4
    assert_same((indices[-last:], counts[-last:]), alone)


@pytest.mark.parametrize("output", ["bool", "packed"])
def test_pixels_of_paste_masks(output: str, full: bool, device: torch.device) -> None:
    """70 masks of 8,000 x 4,000: the last one begins past 2^31 bytes."""
    need_memory(6, device)
    (height, width), count = ((8000, 4000), 70) if full else ((24, 40), 2)
    masks = torch.rand(count, 28, 28, device=device)
    corner = torch.tensor([width - 17.0, height - 11.0], device=device)
    boxes = torch.cat([corner, corner + 15]).expand(count, 4)

    def paste(rows: slice, backend: str = "triton", output: str = "bool") -> Tensor:
        return paste_masks(masks[rows], boxes[rows], (height, width), output=output, backend=backend)

    got = paste(slice(None), output=output)
    last = unpack_masks(got[-1:], width) if output == "packed" else got[-1:]
    expected = paste(slice(count - 1, None), "reference")
    assert torch.equal(last, expected)
    assert expected.any()
    if output == "bool":
        assert int(got[:-1].sum()) == sum(int(paste(slice(k, k + 1)).sum()) for k in range(count - 1))


def test_pixels_of_masks_to_rle(full: bool, device: torch.device) -> None:
    """80 masks of 8,192 x 4,096: the last one begins past 2^31 bytes."""
    need_memory(5, device)
    shape = (80, 8192, 4096) if full else (2, 40, 33)
    masks = torch.zeros(shape, dtype=torch.bool, device=device)
    masks[-1, 5:-3, 2:9] = True
    got = masks_to_rle(masks, backend="triton")
    assert got[-1:] == masks_to_rle(masks[-1:], backend="reference")
    assert got[:-1] == masks_to_rle(masks[:1], backend="reference") * (shape[0] - 1)


def test_cells_of_decode_keypoints(full: bool, device: torch.device) -> None:
    need_memory(5, device)
    maps = LIMIT // 56**2 + 2 if full else 2
    heatmaps = torch.zeros(maps, 1, 1, 56, 56, dtype=torch.bfloat16, device=device)
    heatmaps[-1, 0, 0, 50, 3] = 1
    boxes = torch.tensor([[[0.0, 0.0, 56.0, 56.0]]], device=device).expand(maps, 1, 4)
    valid = torch.arange(maps, device=device)[:, None] == maps - 1
    xy, scores = decode_keypoints(heatmaps, boxes, valid, backend="triton")
    assert xy[-1, 0, 0].tolist() == [3.5, 50.5]
    assert scores.flatten().nonzero().flatten().tolist() == [maps - 1]
