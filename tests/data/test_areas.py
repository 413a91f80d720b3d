"""Flips, crops, resizes and scale jitter keep masks right: their areas, and their place in the boxes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tmask.data.coco import CocoDataset
from tmask.data.transforms import train_transforms
from tmask.model.transform import ImageTransform
from tmask_kernels import pack_masks, unpack_masks

Target = dict[str, Any]

SIDE = 48
TRANSFORM = ImageTransform(
    num_classes=99, min_size=SIDE, max_size=2000, image_mean=(0.0,) * 3, image_std=(1.0,) * 3,  # type: ignore[arg-type]
    size_divisible=32, antialias=True, mask_resize="bilinear", keep_crowds=True,
)  # fmt: skip


def places(height: int, width: int) -> Tensor:
    """An image that tells of each pixel where it comes from."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([y, x, y]).float()


def tight(masks: Tensor) -> Tensor:
    """Boxes [G, 4] of masks that all have a pixel, found pixel by pixel."""
    points = [mask.nonzero() for mask in masks]
    boxes = [torch.cat([p.amin(0).flip(0), p.amax(0).flip(0) + 1]).float() for p in points]
    return torch.stack(boxes) if boxes else torch.zeros(0, 4)


def outlines(masks: Tensor) -> Tensor:
    """How many sides of pixels part the inside of each mask from the outside: [G]."""
    ringed = torch.nn.functional.pad(masks, (1, 1, 1, 1))
    return sum((ringed.diff(dim=dim)).sum((1, 2)) for dim in (1, 2))  # type: ignore[return-value]


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
    """The crop of every mask has the mass that lay inside the window; how many instances it dropped."""
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
    whole = tight(inside[kept])
    # A cut box is where the mask and the clipped box both are.
    both = torch.cat([whole[:, :2].maximum(clipped[kept][:, :2]), whole[:, 2:].minimum(clipped[kept][:, 2:])], dim=1)
    torch.testing.assert_close(out["boxes"][cut & out["has_mask"]], both[cut & out["has_mask"]])
    return int((~kept).sum())


def check_resize(image: Tensor, target: Target, transform: ImageTransform) -> None:
    """Areas grow by the factor squared, up to half a pixel along the outline of the box (for `nearest` of the coarser
    grid, and else a rounded corner of it); the box of the mask is the resized box, up to a pixel of the coarser grid.
    """
    batch, targets = transform([image], [target])
    assert targets is not None
    assert targets.masks is not None
    (height, width), (h, w) = image.shape[1:], batch.sizes[0].tolist()
    count = len(target["boxes"])
    masks = unpack_masks(targets.masks[0, :count], batch.tensor.shape[3])
    assert not masks[:, h:].any()
    assert not masks[:, :, w:].any()
    coarse = max(1.0, h / height, w / width)
    area = dense(target, width).sum((1, 2)) * (h / height) * (w / width)
    sides = targets.boxes[0, :count, 2:] - targets.boxes[0, :count, :2]
    room = coarse * sides.sum(1) + 1 if transform.mask_resize == "nearest" else sides.sum(1) + coarse**2
    assert ((masks.sum((1, 2)) - area).abs() <= room).all(), (masks.sum((1, 2)), area, sides)
    torch.testing.assert_close(tight(masks), targets.boxes[0, :count], rtol=0, atol=coarse + 1e-3)


@settings(max_examples=25, deadline=None)
@given(instances(), st.sampled_from([(1, 0), (0, 1), (1, 1)]))
def test_flips(item: tuple[Tensor, Target], flips: tuple[int, int]) -> None:
    image, target = item
    _, out = train_transforms(*flips)(image, target)
    dims = [dim for dim, flip in zip((2, 1), flips, strict=True) if flip]
    masks = dense(out, image.shape[2])
    assert torch.equal(masks, dense(target, image.shape[2]).flip(dims))
    assert torch.equal(out["boxes"], tight(masks))


@settings(max_examples=50, deadline=None)
@given(instances(), st.floats(0.05, 0.99), st.integers(0, 2**31))
def test_crops(item: tuple[Tensor, Target], least: float, seed: int) -> None:
    torch.manual_seed(seed)
    check_crop(item, train_transforms(0, 0, min_crop=least)(*item), least)


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


@pytest.mark.parametrize("bad", [0, 2.5, "800"], ids=repr)
def test_a_short_side_is_checked(bad: Any) -> None:
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "min_size": bad}
    with pytest.raises(ValueError, match=r"targets\[0\]\['min_size'\]: expected whole pixels, at least 1, got"):
        TRANSFORM([places(9, 9)], [target])


def test_a_crop_drops_what_it_leaves_and_fits_what_it_cuts() -> None:
    """An L whose box keeps more than its pixels, a box without a mask, and one that is always outside."""
    masks = torch.zeros(3, 40, 40, dtype=torch.uint8)
    masks[0, 2:38, 2:6] = masks[0, 34:38, 2:38] = 1
    boxes = torch.tensor([[2.0, 2.0, 38.0, 38.0], [10.0, 10.0, 30.0, 30.0], [0.0, 0.0, 1.0, 1.0]])
    target = {
        "image_id": 3, "boxes": boxes, "labels": torch.tensor([1, 2, 3]), "masks": masks,
        "iscrowd": torch.zeros(3, dtype=torch.bool), "has_mask": torch.tensor([True, False, False]),
    }  # fmt: skip
    dropped, narrow = 0, 0
    crop = train_transforms(0, 0, min_crop=0.4)
    for seed in range(30):
        torch.manual_seed(seed)
        image, out = crop(places(40, 40), target)
        assert out["image_id"] == 3
        assert {len(out[name]) for name in ("boxes", "labels", "masks", "iscrowd", "has_mask")} == {len(out["boxes"])}
        for label, box, mask in zip(out["labels"].tolist(), out["boxes"], out["masks"].bool(), strict=True):
            if label == 1:
                assert torch.equal(box, tight(mask[None])[0])
                narrow += int(box[2] - box[0] == 4 and image.shape[2] > 8)
        dropped += 3 not in out["labels"]
    assert dropped > 15
    assert narrow, "no crop in which the L's upright alone is left"


@pytest.mark.parametrize("name", ["nuclei", "coco-mini"])
def test_real_instances(real_data: Path, name: str) -> None:
    """Crops keep every pixel; resized to half and double size, areas are right up to half a pixel of the larger grid
    along each outline, and nine of ten box sides of objects of over 400 pixels to one: thin tips may vanish.
    """
    files = real_data / name / "images", real_data / name / "instances_val.json"
    plain = CocoDataset(*files, packed_masks=True)
    dropped = 0
    for i in range(0, len(plain), 9):
        image, target = plain[i]
        image = places(*image.shape[1:])
        torch.manual_seed(i)
        before = dense(target, image.shape[2])
        after = train_transforms(0, 0, min_crop=0.3)(image, target)
        top, left = int(after[0][0, 0, 0]), int(after[0][1, 0, 0])
        window = before[:, top : top + after[0].shape[1], left : left + after[0].shape[2]]
        kept = window.flatten(1).any(1)
        assert dense(after[1], after[0].shape[2]).sum() == window.sum()
        dropped += int((~kept).sum())
        for factor, mode in ((0.5, "bilinear"), (2.0, "bilinear"), (0.5, "nearest"), (2.0, "nearest")):
            side = int(factor * min(image.shape[1:]))
            resized = dataclasses.replace(TRANSFORM, min_size=side, max_size=4000, mask_resize=mode)
            batch, targets = resized([image], [target])
            assert targets is not None
            assert targets.masks is not None
            masks = unpack_masks(targets.masks[0], batch.tensor.shape[3])
            scale = float(batch.sizes[0].prod()) / image[0].numel()
            error = (masks.sum((1, 2)) - scale * before.sum((1, 2))).abs()
            assert (error <= 0.5 * max(1, factor) * outlines(before) * scale**0.5 + 1).all()
            large = (before.sum((1, 2)) > 400).nonzero().flatten()
            found, expected = tight(masks[large]), tight(before[large]) * batch.sizes[0].flip(0).repeat(2)
            expected = expected / torch.tensor(image.shape[1:]).flip(0).repeat(2)
            close = ((found - expected).abs() <= max(1, factor) + 1e-3).float().mean()
            assert not large.numel() or close > 0.9, (factor, mode, float(close))
    assert dropped
