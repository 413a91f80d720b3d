"""mask_targets against torchvision's RoIAlign of the float mask."""

from pathlib import Path
from unittest import mock

import pytest
import torch
import torchvision

from tests.model.sync import count_blocking
from tests.mutation import mutant
from tmask_kernels import mask_targets, pack_masks
from tmask_kernels.common import reference as common
from tmask_kernels.ops.mask_targets import reference
from tmask_kernels.testing import Tolerance, assert_close, random_boxes

CONVENTIONS = ["detectron2", "torchvision"]
# torchvision places its samples in float32 too, and rounds them in another order.
ROUNDING = Tolerance(max=2e-5, rms=2e-6)


def blobs(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random masks with both smooth parts and ragged edges: bool [..., H, W]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(*shape, generator=generator).flatten(0, -3)
    smooth = torch.nn.functional.avg_pool2d(noise, 5, stride=1, padding=2, count_include_pad=False)
    return (smooth > 0.5).view(shape)


def expected_targets(masks, boxes, gt_index, size, *, aligned):
    """torchvision's RoIAlign, one RoI on its own mask, in float64: [N, S, size, size] soft values."""
    n, s = gt_index.shape
    picked = masks[torch.arange(n)[:, None], gt_index.clamp(min=0)].view(n * s, 1, *masks.shape[-2:])
    rois = torch.cat([torch.arange(n * s)[:, None], boxes.reshape(-1, 4)], dim=1)
    out = torchvision.ops.roi_align(picked.double(), rois.double(), size, 1.0, -1, aligned)
    return torch.where((gt_index >= 0)[..., None, None], out.view(n, s, size, size), 0)


def awkward_boxes(height: int, width: int) -> torch.Tensor:
    """Boxes [11, 4] that touch or leave the image, are tiny, empty, inverted or far larger than it."""
    return torch.tensor(
        [
            [0, 0, width, height],
            [-3.7, -2.2, width + 5.1, height + 9.4],
            [width - 2.5, height - 1.25, width, height],
            [0, 0, 1.5, 0.75],
            [5.0, 5.0, 5.0, 9.0],
            [9.0, 9.0, 4.0, 3.0],
            [width + 10.0, 0, width + 30.0, 8.0],
            [-400.0, -300.0, 900.0, 700.0],
            [3.3, 4.4, 3.3001, 4.4001],
            [0, 0, 28, 28],
            [0, 0, 28.001, 56.001],
        ]
    )


def check(device, function, *, convention, height=61, width=45, size=28, seed=0):
    """`function` (called as mask_targets) equals torchvision's op where that op is not within rounding of 0.5."""
    masks = blobs(2, 5, height, width, seed=seed)
    boxes = torch.cat([random_boxes(29, height=height, width=width, seed=seed), awkward_boxes(height, width)])
    boxes = boxes.view(2, 20, 4)
    gt_index = torch.randint(-1, 5, (2, 20), generator=torch.Generator().manual_seed(seed))
    sizes = torch.tensor([[height, width]] * 2)
    args = (pack_masks(masks).to(device), boxes.to(device), gt_index.to(device), size)
    got = function(*args, convention=convention, image_sizes=sizes.to(device)).cpu()
    assert got.dtype == torch.float32
    soft = expected_targets(masks, boxes, gt_index, size, aligned=convention == "detectron2")
    if convention == "torchvision":
        assert_close(got, soft, tolerance=ROUNDING)
        return
    # Strictly: where no bin of the float64 truth lies at the threshold, the bits must be equal.
    assert ((got == 0) | (got == 1)).all()
    clear = (soft - 0.5).abs() > ROUNDING.max
    assert clear.float().mean() > 0.97
    assert torch.equal(got[clear], (soft >= 0.5).float()[clear])


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("size", [1, 7, 28], ids=lambda s: f"size{s}")
@pytest.mark.parametrize(("height", "width"), [(61, 45), (64, 96), (1, 200), (130, 33)], ids=lambda v: str(v))
def test_equals_torchvision_roi_align(device, convention, size, height, width):
    check(device, mask_targets, convention=convention, height=height, width=width, size=size, seed=size)


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        (common, "NEARBY_SAMPLES = 5", "NEARBY_SAMPLES = 2"),
        (common, "(0.5 if aligned else 0.0)", "0.0"),
        (common, "size if aligned else torch.where(size < 1, 1.0, size)", "size"),
        (reference, "at >= -1", "at >= 0"),
        (reference, "at <= limit", "at <= limit - 1"),
        (reference, "(limit - 1).clamp(min=0)", "limit.clamp(min=0)"),
        (reference, "bin_size.ceil()", "bin_size.round()"),
        (reference, "(index >= 0) &", "(index >= -1) &"),
        (reference, "UNIT = 2**18", "UNIT = 2**8"),
        (reference, "mean >= 0.5", "mean > 0.6"),
    ],
    ids=["two samples", "half pixel", "one pixel", "low", "high", "last pixel", "grid", "no target", "unit", "half"],
)
def test_a_broken_reference_fails(device, tmp_path: Path, module, old, new):
    copy = mutant(module, old, new, tmp_path, seen_from=reference)

    def function(packed, boxes, gt_index, size, *, convention, image_sizes):
        binary = convention == "detectron2"
        return copy.mask_targets_reference(
            packed, boxes, gt_index, size, image_sizes, aligned=binary, binary=binary
        )  # fmt: skip

    def run(convention):
        check(device, function, convention=convention, size=7)

    failures = 0
    for convention in CONVENTIONS:
        try:
            run(convention)
        except AssertionError:
            failures += 1
    assert failures


def test_a_box_on_whole_pixels_of_the_target_size_copies_the_mask(device):
    masks = blobs(1, 1, 40, 40)
    boxes = torch.tensor([[[4.0, 7.0, 32.0, 35.0]]], device=device)
    index = torch.zeros(1, 1, dtype=torch.int64, device=device)
    out = mask_targets(pack_masks(masks).to(device), boxes, index, 28, convention="detectron2")
    assert torch.equal(out[0, 0].cpu(), masks[0, 0, 7:35, 4:32].float())


def test_missing_rows_give_zeros(device):
    packed = pack_masks(torch.ones(1, 2, 32, 32, dtype=torch.bool, device=device))
    boxes = torch.tensor([4.0, 4.0, 20.0, 20.0], device=device).expand(1, 4, 4)
    index = torch.tensor([[0, -1, 1, 2]], device=device)
    out = mask_targets(packed, boxes, index, 4, convention="detectron2")
    assert out.flatten(2).sum(-1).tolist() == [[16, 0, 16, 0]]


def test_padding_of_a_smaller_image_does_not_leak_in(device):
    """Two images of unequal size in one batch: each as if it were alone, with its own borders."""
    masks = torch.zeros(2, 1, 60, 90, dtype=torch.bool)
    masks[0, 0, :50, :70] = True
    masks[1, 0] = True
    sizes = torch.tensor([[50, 70], [60, 90]])
    boxes = torch.tensor([[[10.0, 10.0, 70.0, 50.0]], [[10.0, 10.0, 90.0, 60.0]]])
    index = torch.zeros(2, 1, dtype=torch.int64)
    packed = pack_masks(masks).to(device)
    args = (packed, boxes.to(device), index.to(device), 28)
    out = mask_targets(*args, convention="torchvision", image_sizes=sizes.to(device))
    assert_close(out.cpu(), torch.ones(2, 1, 28, 28))
    unpadded = mask_targets(*args, convention="torchvision").cpu()
    assert unpadded[0, 0, -1].max() < 1


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)], ids=["no image", "no ground truth", "no roi"])
def test_empty_inputs(device, convention, shape):
    n, g, s = shape
    packed = torch.zeros(n, g, 16, 1, dtype=torch.int32, device=device)
    boxes = torch.rand(n, s, 4, device=device)
    index = torch.full((n, s), -1, dtype=torch.int64, device=device)
    out = mask_targets(packed, boxes, index, 28, convention=convention)
    assert out.shape == (n, s, 28, 28)
    assert not out.any()


def test_nan_and_infinite_boxes_give_zeros(device):
    packed = pack_masks(torch.ones(1, 1, 32, 32, dtype=torch.bool, device=device))
    nan, inf = float("nan"), float("inf")
    boxes = torch.tensor([[[nan, 0, 9, 9], [0, 0, nan, 9], [0, 0, inf, 9], [-inf, 0, inf, 9]]], device=device)
    index = torch.zeros(1, 4, dtype=torch.int64, device=device)
    for convention in CONVENTIONS:
        assert not mask_targets(packed, boxes, index, 4, convention=convention).any()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("given", [False, True], ids=["whole", "sizes"])
def test_nothing_waits(device, convention, given, backend):
    masks, boxes = blobs(2, 3, 40, 64), random_boxes(4, height=40, width=64).view(2, 2, 4)
    args = pack_masks(masks).to(device), boxes.to(device), torch.zeros(2, 2, dtype=torch.int64, device=device), 3
    sizes = torch.tensor([[40, 64]] * 2, device=device)
    options = {"convention": convention, "backend": backend}
    expected = mask_targets(*args, image_sizes=sizes, **options)
    # A GPU gets a tensor made from a list by a copy that the host waits for.
    with count_blocking() as found, mock.patch.object(torch, "tensor", wraps=torch.tensor) as from_host:
        got = mask_targets(*args, image_sizes=sizes if given else None, **options)
    assert not found
    assert not from_host.called
    assert torch.equal(got, expected)


def test_chunks_do_not_change_the_result(device, monkeypatch):
    masks, boxes = blobs(2, 3, 40, 64), random_boxes(10, height=40, width=64).view(2, 5, 4)
    args = (pack_masks(masks).to(device), boxes.to(device), torch.tensor([[0, 1, 2, -1, 0]] * 2, device=device), 14)
    whole = mask_targets(*args, convention="torchvision", backend="reference")
    monkeypatch.setattr(reference, "_CHUNK_PIXELS", {device.type: 3 * 40 * 64})
    assert_close(mask_targets(*args, convention="torchvision", backend="reference"), whole)


def test_autocast_does_not_coarsen_the_targets(device):
    masks, boxes = blobs(1, 1, 40, 64), random_boxes(5, height=40, width=64).view(1, 5, 4)
    index = torch.zeros(1, 5, dtype=torch.int64, device=device)
    args = (pack_masks(masks).to(device), boxes.to(device), index, 14)
    plain = mask_targets(*args, convention="torchvision")
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(mask_targets(*args, convention="torchvision"), plain)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_custom_op_is_sound_and_traces(device, convention):
    masks, boxes = blobs(1, 2, 20, 32), random_boxes(3, height=20, width=32)[None]
    index = torch.tensor([[0, 1, -1]], device=device)
    args = (pack_masks(masks).to(device), boxes.to(device), index)
    torch.library.opcheck(torch.ops.tmask.mask_targets_reference, (*args, 7, convention == "detectron2", None))
    compiled = torch.compile(lambda *a: mask_targets(*a, 7, convention=convention), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), mask_targets(*args, 7, convention=convention))
