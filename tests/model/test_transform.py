"""From images to the padded batch: sizes at the extremes, and values that are refused."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2.functional import convert_bounding_box_format
from torchvision.tv_tensors import BoundingBoxes

from tests.model.conftest import TRANSFORM
from tests.model.sync import count_blocking
from tmask.model.transform import ImageTransform
from tmask.structures import Targets

TRANSFORM = dataclasses.replace(TRANSFORM, num_classes=3)


def targets_of(images: list[Tensor], targets: list[dict[str, Any]], transform: ImageTransform = TRANSFORM) -> Targets:
    padded = transform(images, targets)[1]
    assert padded is not None
    return padded


def target(**changes: Any) -> dict[str, Any]:
    """Two instances of an image [3, 20, 30]."""
    base = {
        "boxes": torch.tensor([[2.0, 3.0, 12.0, 9.0], [0.0, 0.0, 30.0, 20.0]]),
        "labels": torch.tensor([1, 2]),
        "masks": torch.ones(2, 20, 30, dtype=torch.uint8),
    }
    return base | changes


def typed_boxes(canvas: tuple[int, int]) -> BoundingBoxes:
    return BoundingBoxes(target()["boxes"], format="XYXY", canvas_size=canvas)  # type: ignore[call-arg]


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (1, 2), (2, 9000)], ids=str)
def test_no_image_is_too_small_or_too_long(size: tuple[int, int], antialias: bool) -> None:
    """The short side of a long image would round to 0."""
    transform = dataclasses.replace(TRANSFORM, antialias=antialias)
    boxes = torch.tensor([[0.0, 0.0, size[1], size[0]]])
    one = {"boxes": boxes, "labels": torch.tensor([1]), "masks": torch.ones(1, *size, dtype=torch.uint8)}
    images, targets = transform([torch.full((3, *size), 255, dtype=torch.uint8)], [one])
    height, width = images.sizes[0].tolist()
    assert min(height, width) >= 1
    assert max(height, width) in ((64,) if size == (1, 1) else (95, 96))
    assert targets is not None
    assert targets.boxes[0, 0].tolist() == pytest.approx([0, 0, width, height])
    torch.testing.assert_close(images.tensor[0, :, :height, :width], torch.full((3, height, width), 2.0))
    assert not images.tensor[0, :, height:].any()


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 200), st.integers(0, 100))
def test_without_antialias_sizes_are_those_of_a_scale_factor(height: int, width: int, low: int, more: int) -> None:
    """torchvision's way of resizing, but for sides that it rounds to nothing."""
    transform = dataclasses.replace(TRANSFORM, antialias=False, min_size=low, max_size=low + more)
    scale = min(low / min(height, width), (low + more) / max(height, width))
    if int(min(height, width) * scale) < 1:
        return
    image = torch.rand(3, height, width)
    expected = torch.nn.functional.interpolate(
        (image[None] - 0.5) / 0.25, scale_factor=scale, mode="bilinear", recompute_scale_factor=True
    )[0]
    batch, _ = transform([image])
    assert batch.sizes[0].tolist() == list(expected.shape[1:])
    assert torch.equal(batch.tensor[0, :, : expected.shape[1], : expected.shape[2]], expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("train", [True, False], ids=["train", "inference"])
def test_a_value_that_is_not_finite_names_the_image(value: float, train: bool) -> None:
    images = [torch.rand(3, 20, 30) for _ in range(3)]
    images[1][2, 4, 5] = value
    with pytest.raises(ValueError, match=r"images\[1\]: expected finite values, got 1 NaN or infinite of 1800"):
        TRANSFORM(images, [target()] * 3 if train else None)


@pytest.mark.parametrize("train", [True, False], ids=["train", "inference"])
@pytest.mark.parametrize(
    ("spoil", "got"),
    [
        (lambda image: (image - 0.5) / 0.5, r"-1\.0\.\.1\.0"),
        (lambda image: image.half() * 3, r"0\.0\.\.3\.0"),
    ],
    ids=["-1..1", "half"],
)
def test_float_images_of_another_range_are_named(spoil: Callable[[Tensor], Tensor], got: str, train: bool) -> None:
    """Others: docs/bad-input.md."""
    image = torch.linspace(0, 1, 1800).view(3, 20, 30)
    expected = rf"images\[1\]: expected float values in 0\.\.1, got {got} \(the model itself"
    with pytest.raises(ValueError, match=expected):
        TRANSFORM([image, spoil(image)], [target()] * 2 if train else None)


def test_float_images_a_little_outside_are_taken() -> None:
    """A filter overshoots at edges, and so does noise; bytes are of any value."""
    images = [torch.linspace(-0.4, 1.4, 1800).view(3, 20, 30), torch.full((3, 20, 30), 255, dtype=torch.uint8)]
    assert TRANSFORM(images)[0].tensor.isfinite().all()


@pytest.mark.parametrize("mean", [(0.0, 0.0, 0.0), (103.5, 116.3, 123.7)], ids=str)
def test_other_ranges_are_taken_with_a_mean_of_their_own(mean: tuple[float, float, float]) -> None:
    """Images that come normalised, and Caffe's of 0..255."""
    transform = dataclasses.replace(TRANSFORM, image_mean=mean, image_std=(1.0, 1.0, 1.0))
    image = torch.linspace(-2, 255, 1800).view(3, 20, 30)
    assert transform([image])[0].tensor.max() > 100


@pytest.mark.parametrize(
    ("dtype", "train", "reads"),
    [(torch.uint8, False, 0), (torch.uint8, True, 1), (torch.float32, False, 1), (torch.float32, True, 1)],
    ids=str,
)
def test_values_are_read_once(dtype: torch.dtype, train: bool, reads: int) -> None:
    """One wait for a GPU in all, and none for bytes."""
    images = [torch.ones(3, 20, 30, dtype=dtype)] * 2
    with count_blocking() as found:
        TRANSFORM(images, [target()] * 2 if train else None)
    assert found["_local_scalar_dense"] == reads, found


CROWD = {"iscrowd": torch.tensor([1, 0])}


BAD: dict[str, tuple[Any, str]] = {
    "label 0": (target(labels=torch.tensor([0, 1])), r"['labels'][0]: expected 1..2, got 0"),
    "no area": (target(boxes=torch.tensor([[2.0, 3, 12, 9], [9, 0, 9, 20]])), r"['boxes'][1]: expected finite x1 < x2"),
    "xywh": (target(boxes=torch.tensor([[20.0, 9, 10, 10], [0, 0, 9, 9]])), r"['boxes'][0]: expected finite x1 < x2"),
    "infinite": (target(boxes=torch.tensor([[2, torch.inf, 12, 9], [0, 0, 9, 9]])), r"['boxes'][0]: expected finite"),
    "NaN crowd": (target(boxes=torch.full((2, 4), torch.nan), **CROWD), r"['boxes'][0]: expected finite"),
    "turned masks": (target(masks=torch.ones(2, 30, 20)), r"['masks']: expected shape (2, 20, 30), got (2, 30, 20)"),
    "has_mask": (target(has_mask=torch.ones(3)), r"['has_mask']: expected shape (2,), got (3,)"),
    "list": (target(boxes=[[0, 0, 1, 1]]), r"['boxes']: expected a tensor, got list"),
    "none": (target(boxes=None), r"['boxes']: expected a tensor, got NoneType"),
    "number": (target(boxes=torch.tensor(3.0)), r"['boxes']: expected shape (0, 4), got ()"),
    "five numbers": (target(boxes=torch.zeros(2, 5)), r"['boxes']: expected shape (2, 4), got (2, 5)"),
    "no dict": ([target()], r": expected a dict, got list"),
    "device": (
        target(boxes=torch.zeros(2, 4, device="meta")),
        r"['boxes']: expected on the image's device, cpu, got m",
    ),
    "canvas": (
        target(boxes=typed_boxes((30, 20))),
        r"['boxes']: expected a canvas_size of (20, 30), the image's, got (30, 20)",
    ),
    "min_size 0": (target(min_size=0), r"['min_size']: expected whole pixels, at least 1, got"),
    "min_size 2.5": (target(min_size=2.5), r"['min_size']: expected whole pixels, at least 1, got"),
    "min_size '800'": (target(min_size="800"), r"['min_size']: expected whole pixels, at least 1, got"),
}


@pytest.mark.parametrize(("bad", "message"), BAD.values(), ids=BAD)
def test_bad_targets_are_named(bad: dict[str, Any], message: str) -> None:
    """Others, and bad images: docs/bad-input.md."""
    with pytest.raises(ValueError, match=re.escape(f"targets[1]{message}")):
        TRANSFORM([torch.rand(3, 20, 30)] * 2, [target(), bad])


def test_a_crowd_without_area_is_no_fault() -> None:
    boxes = torch.tensor([[2.0, 3.0, 2.0, 3.0], [0.0, 0.0, 30.0, 20.0]])
    one = target(boxes=boxes, labels=torch.tensor([0, 2]), **CROWD)
    assert targets_of([torch.rand(3, 20, 30)], [one]).valid.tolist() == [[False, True]]


def test_images_of_several_devices_or_in_a_batch_are_named() -> None:
    for images, message in (
        (
            [torch.rand(3, 20, 30), torch.rand(3, 20, 30, device="meta")],
            "images[1]: expected on cpu like the first, got m",
        ),
        ([torch.rand(2, 3, 64, 64)], "images[0]: expected a tensor [3, h, w]"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            TRANSFORM(images)


@pytest.mark.parametrize("antialias", [True, False])
def test_gradient_to_the_images(antialias: bool) -> None:
    """The batch is affine in the pixels, so a difference over any step is the derivative; boxes are linear too."""
    transform = dataclasses.replace(TRANSFORM, antialias=antialias)
    images = [torch.rand(3, 20, 30), torch.rand(3, 41, 37), torch.rand(3, 64, 64)]
    steps = [torch.rand_like(image) for image in images]
    before, _ = transform(images)
    after, _ = transform([image + step for image, step in zip(images, steps, strict=True)])
    weights = torch.randn_like(before.tensor)
    leaves = [image.requires_grad_() for image in images[:2]] + images[2:]  # not every image needs one
    batch, _ = transform(leaves)
    gradients = torch.autograd.grad(batch.tensor, leaves[:2], weights)
    difference = (weights[:2] * (after.tensor - before.tensor)[:2]).double().sum((1, 2, 3))
    found = [(g * step).double().sum() for g, step in zip(gradients, steps, strict=False)]
    torch.testing.assert_close(torch.stack(found), difference, rtol=1e-3, atol=1e-2)


def test_gradient_to_the_boxes() -> None:
    one = target(boxes=target()["boxes"].requires_grad_())
    boxes = targets_of([torch.rand(3, 20, 30)], [one]).boxes
    (gradient,) = torch.autograd.grad(boxes.sum(), one["boxes"])
    torch.testing.assert_close(gradient, torch.full((2, 4), 3.2))  # 20 pixels become 64


@pytest.mark.parametrize("boxes_format", ["XYXY", "XYWH", "CXCYWH"])
def test_torchvision_s_boxes_of_any_format_are_the_same(boxes_format: str) -> None:
    typed = convert_bounding_box_format(typed_boxes((20, 30)), new_format=boxes_format)
    expected, found = (targets_of([torch.rand(3, 20, 30)], [one]).boxes for one in (target(), target(boxes=typed)))
    assert torch.equal(found, expected)
    assert type(found) is Tensor


def test_a_mask_without_a_pixel_is_not_learnt() -> None:
    """It contradicts its box; with ``has_mask`` the caller says what is known."""
    masks = torch.ones(2, 20, 30, dtype=torch.uint8)
    masks[1] = 0
    for known, expected in (({}, [True, False]), ({"has_mask": torch.tensor([True, True])}, [True, True])):
        for one in (masks, masks.float(), masks.bool()):
            targets = targets_of([torch.rand(3, 20, 30)], [target(masks=one, **known)])
            assert targets.has_mask[0].tolist() == expected


def test_masks_of_0_and_255_are_those_of_0_and_1() -> None:
    masks = torch.zeros(2, 20, 30, dtype=torch.uint8)
    masks[0, 3:9, 2:12] = masks[1, ::3, ::5] = 1
    expected, found = (targets_of([torch.rand(3, 20, 30)], [target(masks=one)]).masks for one in (masks, masks * 255))
    assert torch.equal(found, expected)
