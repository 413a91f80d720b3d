"""Flips, crops, resizes and scale jitter keep the areas of masks, and their place in the boxes."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.model.conftest import TRANSFORM
from tmask.data.coco import CocoDataset
from tmask.data.transforms import train_transforms
from tmask.model.transform import ImageTransform
from tmask_kernels import pack_masks, unpack_masks

Target = dict[str, Any]

SIDE = 48
TRANSFORM = dataclasses.replace(TRANSFORM, min_size=SIDE, max_size=4000, image_mean=(0.0,) * 3, image_std=(1.0,) * 3)


def places(height: int, width: int) -> Tensor:
    """An image whose pixels hold their own y, x, y."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([y, x, y]).float()


def tight(masks: Tensor) -> Tensor:
    """Boxes [G, 4] of masks that all have a pixel, found pixel by pixel."""
    points = [mask.nonzero() for mask in masks]
    boxes = [torch.cat([p.amin(0).flip(0), p.amax(0).flip(0) + 1]).float() for p in points]
    return torch.stack(boxes) if boxes else torch.zeros(0, 4)


@st.composite
def instances(draw: st.DrawFn) -> tuple[Tensor, Target]:
    """An image and one to four discs, ellipses and rectangles, each with its tight box; packed or bytes."""
    height, width = draw(st.integers(12, 60)), draw(st.integers(12, 60))
    y, x = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    masks = []
    for _ in range(draw(st.integers(1, 4))):
        b, a = draw(st.floats(3, height / 2)), draw(st.floats(3, width / 2))
        v, u = (y - draw(st.floats(1, height - 1))) / b, (x - draw(st.floats(1, width - 1))) / a
        masks.append((v**2 + u**2 <= 1) if draw(st.booleans()) else (v.abs() <= 1) & (u.abs() <= 1))
    inside = torch.stack(masks)
    target = {
        "boxes": tight(inside), "labels": torch.arange(1, len(inside) + 1),
        "masks": pack_masks(inside) if draw(st.booleans()) else inside.byte(),
        "iscrowd": torch.zeros(len(inside), dtype=torch.bool), "has_mask": torch.ones(len(inside), dtype=torch.bool),
    }  # fmt: skip
    return places(height, width), target


def dense(target: Target, width: int) -> Tensor:
    masks: Tensor = target["masks"]
    return unpack_masks(masks, width) if masks.dtype == torch.int32 else masks.bool()


def check_crop(before: tuple[Tensor, Target], after: tuple[Tensor, Target], least: float) -> int:
    """The crop of every mask has the mass that lay inside the window; returns how many instances it dropped."""
    (image, target), (crop, out) = before, after
    (height, width), (h, w) = image.shape[1:], crop.shape[1:]
    top, left = int(crop[0, 0, 0]), int(crop[1, 0, 0])
    assert torch.equal(crop, image[:, top : top + h, left : left + w])
    assert h >= int(least * height)
    assert w >= int(least * width)
    inside = dense(target, width)[:, top : top + h, left : left + w]
    lost = target["has_mask"] & ~inside.flatten(1).any(1)
    window = torch.tensor([left, top, left, top])
    clipped = (target["boxes"] - window).minimum(torch.tensor([w, h, w, h])).clamp(min=0)
    kept = ~lost & ((clipped[:, 2:] - clipped[:, :2]) >= 0.01).all(1)
    assert torch.equal(dense(out, w), inside[kept])
    for name in ("labels", "iscrowd", "has_mask"):
        assert torch.equal(out[name], target[name][kept])
    cut = (clipped != target["boxes"] - window).any(1)[kept]
    assert torch.equal(out["boxes"][~cut], clipped[kept][~cut])
    assert torch.equal(out["boxes"][cut & ~out["has_mask"]], clipped[kept][cut & ~out["has_mask"]])
    assert out["image_id"] == target["image_id"]
    # A cut box is where the mask and the clipped box both are.
    cut &= out["has_mask"]
    whole, box = tight(inside[kept][cut]), clipped[kept][cut]
    both = torch.cat([whole[:, :2].maximum(box[:, :2]), whole[:, 2:].minimum(box[:, 2:])], dim=1)
    torch.testing.assert_close(out["boxes"][cut], both)
    return int((~kept).sum())


def check_resize(image: Tensor, target: Target, transform: ImageTransform, *, real: bool = False) -> None:
    """Areas grow by the factor squared, up to half a pixel along the outline of the box (for `nearest` of the coarser
    grid, and else a rounded corner of it); the box of the mask is the resized box, up to a pixel of the coarser grid.

    Of `real` masks the outline is their own, and nine of ten box sides of objects of over 400 pixels are right: thin
    tips may vanish.
    """
    batch, targets = transform([image], [target])
    assert targets is not None
    assert targets.masks is not None
    (height, width), (h, w) = image.shape[1:], batch.sizes[0].tolist()
    count = len(target["boxes"])
    before, masks = dense(target, width), unpack_masks(targets.masks[0, :count], batch.tensor.shape[3])
    assert not masks[:, h:].any()
    assert not masks[:, :, w:].any()
    coarse = max(1.0, h / height, w / width)
    area = before.sum((1, 2)) * (h / height) * (w / width)
    error = (masks.sum((1, 2)) - area).abs()
    if real:
        ringed = torch.nn.functional.pad(before, (1, 1, 1, 1))
        outlines = sum(ringed.diff(dim=dim).sum((1, 2)) for dim in (1, 2))  # sides of pixels: [G]
        assert (error <= 0.5 * coarse * outlines * (h * w / height / width) ** 0.5 + 1).all()
        large = (before.sum((1, 2)) > 400).nonzero().flatten()
        found, expected = tight(masks[large]), tight(before[large]) * torch.tensor([w / width, h / height] * 2)
        assert not large.numel() or ((found - expected).abs() <= coarse + 1e-3).float().mean() > 0.9
        return
    sides = (targets.boxes[0, :count, 2:] - targets.boxes[0, :count, :2]).sum(1)
    room = coarse * sides + 1 if transform.mask_resize == "nearest" else sides + coarse**2
    assert (error <= room).all(), (masks.sum((1, 2)), area, sides)
    torch.testing.assert_close(tight(masks), targets.boxes[0, :count], rtol=0, atol=coarse + 1e-3)


@settings(max_examples=25, deadline=None)
@given(instances(), st.sampled_from([(1, 0), (0, 1), (1, 1), (0, 0)]))
def test_flips(item: tuple[Tensor, Target], flips: tuple[int, int]) -> None:
    image, target = item
    flipped, out = train_transforms(*flips)(image, target | {"image_id": 4})
    dims = [dim for dim, flip in zip((2, 1), flips, strict=True) if flip]
    masks = dense(out, image.shape[2])
    assert torch.equal(flipped, image.flip(dims))
    assert torch.equal(masks, dense(target, image.shape[2]).flip(dims))
    assert torch.equal(out["boxes"], tight(masks))
    assert out["image_id"] == 4
    assert torch.equal(out["labels"], target["labels"])
    assert torch.equal(target["boxes"], tight(dense(target, image.shape[2]))), "as it was"
    assert {type(value) for value in (flipped, out["boxes"], out["masks"])} == {Tensor}


@settings(max_examples=60, deadline=None)
@given(instances(), st.lists(st.booleans(), min_size=4, max_size=4), st.floats(0.05, 0.99), st.integers(0, 2**31))
def test_crops(item: tuple[Tensor, Target], has_mask: list[bool], least: float, seed: int) -> None:
    """The masks of some instances are unknown: their boxes are cut, but not fitted."""
    image, target = item
    known = torch.tensor(has_mask[: len(target["boxes"])])
    target |= {"image_id": 3, "has_mask": known, "masks": target["masks"] * known[:, None, None]}
    torch.manual_seed(seed)
    check_crop((image, target), train_transforms(0, 0, min_crop=least)(image, target), least)


@settings(max_examples=50, deadline=None)
@given(instances(), st.sampled_from(["bilinear", "nearest"]), st.integers(24, 110), st.booleans())
def test_resizes(item: tuple[Tensor, Target], mode: str, side: int, antialias: bool) -> None:
    transform = dataclasses.replace(TRANSFORM, mask_resize=mode, antialias=antialias, min_size=side)
    check_resize(*item, transform)


def test_scale_jitter_draws_every_size_and_resizes_once() -> None:
    image, boxes = places(30, 40), torch.tensor([[5.0, 6.0, 25.0, 26.0]])
    masks = torch.zeros(1, 30, 40, dtype=torch.uint8)
    masks[0, 6:26, 5:25] = 1
    target = {"boxes": boxes, "labels": torch.tensor([1]), "masks": masks}
    jitter, seen = train_transforms(0, 0, min_sizes=(24, 60, 90)), set()
    for _ in range(20):
        moved, out = jitter(image, target)
        assert torch.equal(moved, image)
        batch, targets = TRANSFORM([moved, image], [out, target])
        assert targets is not None
        seen.add(side := out["min_size"])
        assert batch.sizes.tolist() == [[side, side * 40 // 30], [SIDE, 64]]
        torch.testing.assert_close(targets.boxes[0], boxes * side / 30)
        check_resize(moved, out, TRANSFORM)
    assert seen == {24, 60, 90}


@pytest.mark.parametrize("name", ["nuclei", "coco-mini"])
def test_real_instances(real_data: Path, name: str) -> None:
    """Cropped, and resized to half and double size."""
    plain = CocoDataset(real_data / name / "images", real_data / name / "instances_val.json", packed_masks=True)
    dropped = 0
    for i in range(0, len(plain), 9):
        image, target = plain[i]
        image = places(*image.shape[1:])
        torch.manual_seed(i)
        dropped += check_crop((image, target), train_transforms(0, 0, min_crop=0.3)(image, target), 0.3)
        for factor, mode in itertools.product((0.5, 2.0), ("bilinear", "nearest")):
            side = int(factor * min(image.shape[1:]))
            check_resize(image, target, dataclasses.replace(TRANSFORM, min_size=side, mask_resize=mode), real=True)
    assert dropped
